//! `host`, `vm`: what there is and where it runs.

use super::times::without_raw;
use crate::table::{Output, joined, or_dash, percent, say};
use crate::target::Target;
use anyhow::{Result, bail};
use violin_common::api::adapt::{AdaptReply, AdaptRequest, Condition, MigrationSeen, Outcome, StraySeen, VmListed};
use violin_common::{HostId, VmId};

/// `violin vm …`
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Vm {
    /// List VMs: where they run and what they want.
    ///
    /// RUN, WAIT and DEMAND are of the last observation, in percent of the VM's vCPUs: time it ran, time it was ready and
    /// waited, and what the manager takes it to want. SMOOTHED is the mean of DEMAND that decisions are taken on.
    /// STATE is `unknown`, with what it was and how long ago, and the figures are `-`, when its host's monitor is away or has not
    /// told of it for `max-age` (10 s).
    /// Strays stand below: VMs that run though the manager's journal does not know them (`"stray": true` as JSON).
    List,
    /// Move a VM to another host while it runs, and wait for the end.
    ///
    /// Fails if the move did not happen; OUTCOME then says where the VM is, which as a rule is where it was.
    #[command(after_help = "Example: violin vm migrate alpha-c1 --to h2")]
    Migrate {
        /// VM, for example alpha-c1.
        vm: VmId,
        /// Host it goes to.
        #[arg(long, value_name = "HOST")]
        to: HostId,
    },
    /// Give up the move of a VM that is under way: it runs on where it was. A gang takes its other VMs back.
    ///
    /// Shows the move as it ended; or, if that takes longer than a few seconds, as running: it is given up all the same, as soon as the
    /// host that is at work for it answers. Fails if it comes too late.
    Abort {
        /// VM, for example alpha-c1.
        vm: VmId,
    },
}

/// `violin host …`
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Host {
    /// Keep a host empty: nothing starts on or moves to it, and in mode act its VMs leave it, one after another.
    ///
    /// They go where the policy would move them: in their domain first, an environment as a whole to another domain when there is
    /// no room; head nodes stay in their home domain. `violin host` shows what is left and what keeps it. Kept over restarts.
    Drain {
        /// Host.
        host: HostId,
    },
    /// Use a host again.
    Undrain {
        /// Host.
        host: HostId,
    },
    /// Strike out a host that is gone for good; its monitor must be away.
    Forget {
        /// Host.
        host: HostId,
        /// Give up the VMs that are recorded there, too: their environments go on without them, their names may be used again.
        /// Should the host come back all the same, they are ended there before anything else.
        #[arg(long)]
        vms_are_lost: bool,
    },
}

/// Runs `violin host …`.
pub(crate) fn host(target: &Target, output: Output, command: Host) -> Result<()> {
    let request = match command {
        Host::Drain { host } => AdaptRequest::HostDrain { host },
        Host::Undrain { host } => AdaptRequest::HostUndrain { host },
        Host::Forget { host, vms_are_lost } => AdaptRequest::HostForget { host, vms_are_lost },
    };
    let AdaptReply::Words(words) = target.ask(&request)? else { bail!("the manager answered another question") };
    output.words(&words);
    Ok(())
}

/// Lists hosts.
pub(crate) fn hosts(target: &Target, output: Output) -> Result<()> {
    let AdaptReply::Hosts(hosts) = target.ask(&AdaptRequest::HostList)? else { bail!("the manager answered another question") };
    output.list(
        &hosts,
        ["HOST", "DOMAIN", "CONNECTED", "DRIVER", "CORES", "WANTED", "SCORE", "MEMORY FREE", "SEEN", "DRAINING", "VMS"],
        |host| {
            [
                host.host.to_string(),
                host.domain.to_string(),
                if host.connected { "yes" } else { "no" }.to_owned(),
                host.driver.clone(),
                format!("{:.1}", host.cores),
                or_dash(host.demand_cores.map(|cores| format!("{cores:.2}"))),
                or_dash(host.score.map(|score| format!("{score:.2}"))),
                format!("{} of {} MiB", or_dash(host.memory_free_mib), host.memory_mib),
                or_dash(host.age_s.map(|age| format!("{age:.1} s ago"))),
                match (host.draining, host.vms.len()) {
                    (false, _) => "no".to_owned(),
                    (true, 0) => "empty".to_owned(),
                    (true, left) => format!("{left} left"),
                },
                joined(&host.vms),
            ]
        },
    )?;
    if !output.json {
        hosts.iter().flat_map(|host| &host.staying).for_each(|words| say!("{words}"));
        for host in &hosts {
            host.troubles.iter().for_each(|words| say!("{}: {words}", host.host));
        }
    }
    Ok(())
}

/// How a VM is; if nobody says at present, how it was and when.
fn condition(vm: &VmListed) -> String {
    match (vm.state, vm.last_state, vm.seen_s) {
        (Condition::Unknown, Some(last), Some(age)) => format!("unknown ({last} {age:.0} s ago)"),
        (Condition::Unknown, Some(last), None) => format!("unknown (was {last})"),
        (state, _, _) => state.to_string(),
    }
}

/// Prints VMs as a table.
pub(crate) fn print(output: Output, vms: &[VmListed]) -> Result<()> {
    output.list(vms, ["VM", "ROLE", "ADDRESS", "HOST", "STATE", "RUN", "WAIT", "DEMAND", "SMOOTHED", "MOVING TO"], |vm| {
        [
            vm.vm.to_string(),
            format!("{:?}", vm.role).to_lowercase(),
            vm.address.to_string(),
            or_dash(vm.host.as_ref()),
            condition(vm),
            or_dash(vm.run.map(percent)),
            or_dash(vm.wait.map(percent)),
            or_dash(vm.demand.map(percent)),
            or_dash(vm.smoothed_demand.map(percent)),
            or_dash(vm.moving_to.as_ref().map(|to| if vm.giving_up { format!("{to} (given up)") } else { to.to_string() })),
        ]
    })
}

/// One line of a list of both kinds.
#[derive(serde::Serialize)]
#[serde(untagged)]
enum Listed<'a> {
    Known(&'a VmListed),
    Stray(&'a StraySeen),
}

/// VMs that run though the manager's journal does not know them.
pub(crate) fn strays(target: &Target) -> Result<Vec<StraySeen>> {
    match target.ask(&AdaptRequest::StrayList)? {
        AdaptReply::Strays(strays) => Ok(strays),
        other => bail!("got {other:?}, want the list of strays"),
    }
}

/// Prints those, if there are any, and what can be done about them.
pub(crate) fn print_strays(output: Output, strays: &[StraySeen]) -> Result<()> {
    if strays.is_empty() {
        return Ok(());
    }
    say!("\nStrays: they run, but the manager's journal does not know them.");
    output.list(strays, ["VM", "ENVIRONMENT", "ROLE", "ADDRESS", "VNI", "HOST", "STATE"], |stray| {
        [
            stray.vm.to_string(),
            or_dash(stray.environment.as_ref()),
            or_dash(stray.role.map(|role| format!("{role:?}").to_lowercase())),
            or_dash(stray.address),
            or_dash(stray.vni),
            stray.host.to_string(),
            stray.state.to_string(),
        ]
    })?;
    let environments: std::collections::BTreeSet<_> = strays.iter().filter_map(|stray| stray.environment.as_ref()).collect();
    for name in environments {
        say!("take up what runs of {name}: violin env adopt {name}; end it: violin env destroy {name}");
    }
    if let Some(stray) = strays.iter().find(|stray| stray.environment.is_none()) {
        say!("of {} nobody tells how it was started: end it on {} with its hypervisor's own tools", stray.vm, stray.host);
    }
    Ok(())
}

/// Prints moves as a table.
pub(crate) fn print_migrations(output: Output, migrations: &[MigrationSeen]) -> Result<()> {
    if output.json {
        return output.value(&without_raw(&migrations)?);
    }
    output.list(migrations, ["NO", "BEGAN", "VM", "FROM", "TO", "GANG", "TOTAL", "PAUSE", "OUTCOME", "REASON"], |migration| {
        let pause = migration.pause.map(|pause| match pause.error_ms {
            error if error < 0.5 => format!("{:.0} ms", pause.ms),
            error => format!("{:.0} ms ±{error:.0}", pause.ms),
        });
        [
            migration.number.to_string(),
            or_dash(migration.began_at.or(migration.announced_at)),
            migration.vm.to_string(),
            format!("{} ({})", migration.from, migration.from_domain),
            format!("{} ({})", migration.to, migration.to_domain),
            or_dash(migration.gang.as_ref()),
            or_dash(migration.total_ms.map(|ms| format!("{:.2} s", ms / 1e3))),
            or_dash(pause),
            match &migration.outcome {
                Outcome::Running => "running".to_owned(),
                Outcome::Done => "done".to_owned(),
                Outcome::Undone(why) => format!("undone: {why}"),
            },
            migration.reason.clone(),
        ]
    })
}

/// Runs `violin vm …`.
pub(crate) fn run(target: &Target, output: Output, command: Vm) -> Result<()> {
    match command {
        Vm::List => match target.ask(&AdaptRequest::VmList)? {
            AdaptReply::Vms(vms) => {
                let strays = strays(target)?;
                if output.json {
                    return output
                        .value(&(vms.iter().map(Listed::Known)).chain(strays.iter().map(Listed::Stray)).collect::<Vec<_>>());
                }
                print(output, &vms)?;
                print_strays(output, &strays)
            }
            other => bail!("got {other:?}, want the list of VMs"),
        },
        Vm::Migrate { vm, to } => match target.follow(&AdaptRequest::VmMigrate { vm, to }, |words| eprintln!("{words}"))? {
            AdaptReply::Migrations(migrations) => finished(output, &migrations),
            other => bail!("got {other:?}, want the move's record"),
        },
        Vm::Abort { vm } => match target.follow(&AdaptRequest::VmAbort { vm: vm.clone() }, |words| eprintln!("{words}"))? {
            AdaptReply::Migrations(migrations) => {
                print_migrations(output, &migrations)?;
                if migrations.iter().any(|migration| migration.outcome == Outcome::Running) {
                    eprintln!("that goes on by itself; `violin vm list` and `violin why {vm}` show when it has ended, and how");
                }
                if migrations.iter().any(|migration| migration.outcome == Outcome::Done) {
                    bail!("it came too late: the VM has moved; `violin vm migrate` takes it back");
                }
                Ok(())
            }
            other => bail!("got {other:?}, want the move's record"),
        },
    }
}

/// Prints moves that have ended; an error if one did not happen, so that scripts see it.
pub(crate) fn finished(output: Output, migrations: &[MigrationSeen]) -> Result<()> {
    print_migrations(output, migrations)?;
    let undone = migrations.iter().filter(|migration| migration.outcome != Outcome::Done).count();
    if undone > 0 {
        bail!("{undone} of {} moves did not happen; OUTCOME says where each VM is", migrations.len())
    }
    Ok(())
}
