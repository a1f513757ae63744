//! What is claimed, in report.json and in a table, and the checks that would refute it.

use crate::capture::Seen;
use crate::hpl::Finished;
use crate::prober::Received;
use crate::runs::{Recorded, Run};
use crate::seed::Cast;
use crate::stage::Stage;
use crate::{Options, shell};
use anyhow::{Context, Result};
use comfy_table::{Table, presets};
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use violin_common::api::adapt::{MigrationSeen, Outcome, VmListed};
use violin_common::control::monitor::Role;

/// One move, as reported.
#[derive(Debug, Clone, Serialize)]
struct Moved {
    vm: String,
    from: String,
    to: String,
    from_domain: String,
    to_domain: String,
    cross_domain: bool,
    gang: Option<String>,
    driver: String,
    reason: String,
    terms: Value,
    outcome: String,
    /// First step to end.
    total_ms: Option<f64>,
    /// STOP at the source to RESUME at the destination, by the hypervisor's events, one clock.
    downtime_ms: Option<f64>,
    /// Last frame delivered at the source to first frame read at the destination, minus the pause.
    blackout_ms: Option<f64>,
    frames_received: Option<u64>,
    frames_lost: Option<u64>,
    frames_reordered: Option<u64>,
    frames_duplicated: Option<u64>,
    /// Frames the VM received and could not keep in its record.
    frames_unrecorded: Option<u64>,
    /// Numbers the prober used: received and lost ones together.
    frames_sent: Option<u64>,
    /// Whether the VM learned of the run's end; else the tail is counted by what the prober sent.
    probe_ended: Option<bool>,
    probe_error: Option<String>,
    /// First frame of the prober to first step of the move.
    probed_before_ms: Option<f64>,
    /// What was not seen of the move, so that a figure above is null.
    unseen: Vec<&'static str>,
    raw: Value,
}

/// A claim with its verdict.
#[derive(Debug, Clone, Serialize)]
struct Check {
    claim: &'static str,
    holds: bool,
    /// Whether it counts: claims about run times do not where other work disturbs those.
    checked: bool,
    saw: String,
}

/// Claims about run times.
const TIMED: [&str; 2] = ["with adaptation HPL ended sooner", "at least a fifth of the run followed the last move"];

/// The whole report.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    hpl: BTreeMap<&'static str, Finished>,
    calm: Value,
    migrations: Vec<Moved>,
    gang: Option<Value>,
    demand: Value,
    tcp: Value,
    probe: Value,
    isolation: Value,
    head_nodes_left_domain: usize,
    seed: u64,
    guests: &'static str,
    crowded: String,
    versions: BTreeMap<String, String>,
    evidence: String,
    checks: Vec<Check>,
}

fn moved(migration: &MigrationSeen, run: &Run) -> Moved {
    let source = migration.source.clone().unwrap_or_default();
    let destination = migration.destination.clone().unwrap_or_default();
    let downtime_ms = migration.pause.map(|pause| pause.ms);
    let gap_ms = migration.gap.map(|gap| gap.ms);
    let probe = run.probes.get(&migration.number);
    let received = probe.and_then(|probe| probe.as_ref().ok());
    Moved {
        vm: migration.vm.to_string(),
        from: migration.from.to_string(),
        to: migration.to.to_string(),
        from_domain: migration.from_domain.to_string(),
        to_domain: migration.to_domain.to_string(),
        cross_domain: migration.from_domain != migration.to_domain,
        gang: migration.gang.as_ref().map(ToString::to_string),
        driver: migration.driver.clone(),
        reason: migration.reason.clone(),
        terms: json!(migration.terms),
        outcome: format!("{:?}", migration.outcome),
        total_ms: migration.total_ms,
        downtime_ms,
        blackout_ms: gap_ms.zip(downtime_ms).map(|(gap, pause)| gap - pause),
        frames_received: received.map(|received| received.report.received),
        frames_lost: received.map(Received::lost),
        frames_reordered: received.map(|received| received.report.reordered),
        frames_duplicated: received.map(|received| received.report.duplicated),
        frames_unrecorded: received.map(|received| received.report.unrecorded),
        frames_sent: received.map(|received| received.sent.numbers),
        probe_ended: received.map(|received| received.report.ended),
        probe_error: match probe {
            Some(Err(error)) => Some(error.clone()),
            None => Some("no probe followed this move".to_owned()),
            Some(Ok(_)) => None,
        },
        probed_before_ms: received
            .zip(migration.began)
            .map(|(received, began)| (began.0 as f64 - received.sent.first_ns as f64) / 1e6),
        unseen: [
            ("its first step", migration.began),
            ("its end", migration.ended),
            ("STOP at the source", source.stopped),
            ("RESUME at the destination", destination.resumed),
            ("the last frame delivered at the source", source.last_delivered),
            ("the first frame read at the destination", destination.first_read),
        ]
        .into_iter()
        .filter_map(|(what, at)| at.is_none().then_some(what))
        .collect(),
        raw: json!({ "source": migration.source, "destination": migration.destination, "announced": migration.announced,
                     "began": migration.began, "ended": migration.ended, "decision": migration.decision, "number": migration.number }),
    }
}

fn demand(vms: &[VmListed]) -> Value {
    vms.iter()
        .map(|vm| {
            (
                vm.vm.to_string(),
                json!({ "host": vm.host, "run": vm.run, "wait": vm.wait, "demand": vm.demand, "smoothed": vm.smoothed_demand }),
            )
        })
        .collect::<serde_json::Map<_, _>>()
        .into()
}

/// Puts the report together and judges it.
pub(crate) fn assemble(options: &Options, seed: u64, cast: &Cast, stage: &Stage, recorded: &Recorded) -> Result<Report> {
    let [calm, overloaded, adaptive] = recorded.runs.as_slice() else { anyhow::bail!("three runs were to be played") };
    let migrations: Vec<Moved> = adaptive.migrations.iter().map(|migration| moved(migration, adaptive)).collect();
    let done: Vec<&MigrationSeen> = adaptive.migrations.iter().filter(|migration| migration.outcome == Outcome::Done).collect();

    let gang =
        done.iter().find(|migration| migration.gang.is_some() && migration.from_domain != migration.to_domain).map(|first| {
            // Those of one decision: two halves make no gang.
            let same = |other: &&&MigrationSeen| other.gang == first.gang && other.decision == first.decision;
            let members: BTreeSet<_> = done.iter().filter(same).map(|other| other.vm.to_string()).collect();
            json!({ "environment": first.gang, "from": first.from_domain, "to": first.to_domain, "members": members })
        });
    let gang_size = gang.as_ref().and_then(|gang| gang["members"].as_array()).map_or(0, Vec::len);
    let inside = done.iter().filter(|migration| migration.from_domain == migration.to_domain).count();
    let first_crosses =
        done.iter().min_by_key(|migration| migration.began).is_some_and(|first| first.from_domain != first.to_domain);
    let heads: BTreeSet<_> = stage.vms()?.into_iter().filter(|vm| vm.role == Role::Head).map(|vm| vm.vm).collect();
    let heads_moved = stage
        .migrations()?
        .iter()
        .filter(|migration| heads.contains(&migration.vm) && migration.from_domain != migration.to_domain)
        .count();

    let transfers: Vec<_> =
        recorded.runs.iter().flat_map(|run| run.transfers.iter().map(|transfer| (run.label, transfer))).collect();
    let intact = transfers.iter().all(|(_, transfer)| transfer.intact && transfer.bytes > 0);
    let covered = done.iter().filter(|migration| migration.vm.as_str().starts_with("beta-c")).count();
    let leaked: u64 = recorded.canaries.values().map(|counts| counts.foreign).sum();
    let underlay: BTreeMap<_, _> = recorded.runs.iter().map(|run| (run.label, &run.underlay)).collect();
    let first_began = done.iter().filter_map(|migration| migration.began).map(|at| at.0).min();
    let last_ended = done.iter().filter_map(|migration| migration.ended).map(|at| at.0).max();
    let total = adaptive.ended_ns.saturating_sub(adaptive.began_ns) as f64;
    let rest = last_ended.map(|ended| adaptive.ended_ns.saturating_sub(ended) as f64 / total);
    let unprobed = migrations.iter().filter(|moved| moved.frames_received.unwrap_or(0) == 0).count();

    let probed = || {
        let of = |migration: &'_ MigrationSeen| adaptive.probes.get(&migration.number).and_then(|probe| probe.as_ref().ok());
        adaptive.migrations.iter().filter_map(move |migration| Some((migration, of(migration)?)))
    };

    let mut checks = Vec::new();
    let counts = |claim| !(options.untimed && TIMED.contains(&claim));
    let mut check = |claim, holds, saw: String| checks.push(Check { claim, holds, checked: counts(claim), saw });
    for run in &recorded.runs {
        check("HPL passed its residual check", run.hpl.passed, format!("{}: {}", run.label, run.hpl.passed));
    }
    check("the calm run shows no move", calm.migrations.is_empty(), format!("{} moves", calm.migrations.len()));
    check("the overloaded run shows no move", overloaded.migrations.is_empty(), format!("{} moves", overloaded.migrations.len()));
    check("VMs were moved inside a domain first", inside > 0 && !first_crosses, format!("{inside} moves inside a domain"));
    check("then all compute nodes of one environment went to another domain", gang_size == 4, format!("a gang of {gang_size}"));
    check(
        "every move that began was done",
        done.len() == adaptive.migrations.len(),
        format!("{} of {}", done.len(), adaptive.migrations.len()),
    );
    check(
        "the first move began after HPL had started",
        first_began.is_some_and(|began| began > adaptive.began_ns),
        format!("{:?} s after", first_began.map(|began| (began as f64 - adaptive.began_ns as f64) / 1e9)),
    );
    check(TIMED[1], rest.is_some_and(|rest| rest >= 0.2), format!("{rest:.2?} of the run"));
    check(
        TIMED[0],
        adaptive.hpl.seconds < overloaded.hpl.seconds,
        format!("{:.1} s against {:.1} s", adaptive.hpl.seconds, overloaded.hpl.seconds),
    );
    let unseen: Vec<_> =
        migrations.iter().filter(|moved| !moved.unseen.is_empty()).map(|moved| (&moved.vm, &moved.unseen)).collect();
    check("total, pause and black-out of every move were measured", unseen.is_empty(), format!("not seen: {unseen:?}"));
    check("TCP connections stayed open and intact", intact, format!("{} connections", transfers.len()));
    check("a VM with such a connection was moved", covered > 0, format!("{covered} moved"));
    let corrupted = &recorded.corrupted;
    let noticed = corrupted.noticed_corruption();
    check("a corrupted transfer is noticed (control)", noticed, format!("{:?} in {} bytes", corrupted.error, corrupted.bytes));
    check(
        "every moved VM was probed",
        unprobed == 0 && !migrations.is_empty(),
        format!("{unprobed} of {} were not", migrations.len()),
    );
    let lead = migrations.iter().map(|moved| moved.probed_before_ms.unwrap_or(f64::NEG_INFINITY)).fold(f64::INFINITY, f64::min);
    check("the prober's first frame was sent before the first step of each move", lead > 0.0, format!("{lead:.0} ms at least"));
    let partial = probed().filter(|(_, received)| !received.whole()).count();
    check("every probe frame sent is accounted for, received or lost", partial == 0, format!("{partial} moves with a rest"));
    let withheld = &recorded.withheld;
    check(
        "a withheld probe frame is counted lost (control)",
        withheld.withheld_is_lost(),
        format!("{} lost: {:?}", withheld.lost(), withheld.report.lost_ranges),
    );
    check("no foreign canary reached a guest", leaked == 0, leaked.to_string());
    let blind: Vec<_> = recorded.planted_seen.iter().filter(|(_, count)| **count == 0).map(|(vm, _)| vm.as_str()).collect();
    let control_seen = blind.is_empty() && !recorded.planted_seen.is_empty();
    check(
        "a planted foreign canary is counted by every compute node (control)",
        control_seen,
        format!("{} compute nodes, not by {blind:?}", recorded.planted_seen.len()),
    );
    let on_underlay = |of: fn(&Seen) -> u64| underlay.values().flat_map(|hosts| hosts.values()).map(of).sum::<u64>();
    let [sealed, readable, plain, bare] =
        [|seen: &Seen| seen.sealed, |seen: &Seen| seen.readable, |seen: &Seen| seen.plain, |seen: &Seen| seen.bare]
            .map(on_underlay);
    check(
        "on the underlay all data was sealed, nothing of it can be read, and no guest's frame was bare",
        sealed > 0 && readable + plain + bare == 0,
        format!("{sealed} datagrams sealed, {readable} of them readable, {plain} plain, {bare} bare"),
    );
    let dropped = on_underlay(|seen| seen.dropped);
    check("every host's underlay was captured without a gap", dropped == 0, format!("{dropped} packets missed"));
    let control = &recorded.planted_underlay;
    check(
        "a readable datagram, a bare canary and frames to a guest's MAC are counted there (control)",
        control.readable > 0 && control.bare_of_guests > 0 && control.bare > control.bare_of_guests,
        format!("{} readable, {} bare, {} of them to a guest", control.readable, control.bare, control.bare_of_guests),
    );
    check("head nodes stayed in their domain", heads_moved == 0, heads_moved.to_string());

    Ok(Report {
        hpl: recorded.runs.iter().map(|run| (run.label, run.hpl.clone())).collect(),
        calm: json!({ "moves": calm.migrations.len() }),
        migrations,
        gang,
        demand: recorded
            .runs
            .iter()
            .map(|run| (run.label.to_owned(), json!({ "before": demand(&run.before), "after": demand(&run.after) })))
            .collect::<serde_json::Map<_, _>>()
            .into(),
        tcp: json!({ "intact": intact, "control_failed": noticed, "control": corrupted,
                     "transfers": transfers.iter().map(|(label, transfer)| json!({ "run": label, "transfer": transfer })).collect::<Vec<_>>() }),
        probe: json!({ "control_lost": withheld.lost(), "control_counted": withheld.withheld_is_lost(), "control": withheld.report }),
        isolation: json!({ "leaked_frames": leaked, "control_seen": control_seen, "planted_seen": recorded.planted_seen,
                           "canaries": recorded.canaries, "underlay": underlay, "underlay_control": control }),
        head_nodes_left_domain: heads_moved,
        seed,
        guests: options.guests.word(),
        crowded: cast.crowded.clone(),
        versions: versions(options),
        evidence: options.out.join("evidence").to_string_lossy().into_owned(),
        checks,
    })
}

/// Versions of what took part.
fn versions(options: &Options) -> BTreeMap<String, String> {
    let mut versions = BTreeMap::from([("violin".to_owned(), env!("CARGO_PKG_VERSION").to_owned())]);
    let mut asked = vec![("kernel", "uname", "-r"), ("mpirun", "mpirun", "--version")];
    if options.guests == crate::Guests::Qemu {
        asked.extend([("qemu", "qemu-system-x86_64", "--version"), ("libvirt", "libvirtd", "--version")]);
    }
    for (name, program, flag) in asked {
        let output = std::process::Command::new(program).arg(flag).output();
        let line = output
            .ok()
            .and_then(|output| String::from_utf8(output.stdout).ok())
            .and_then(|text| text.lines().next().map(str::to_owned));
        versions.insert(name.to_owned(), line.unwrap_or_else(|| "unknown".to_owned()));
    }
    versions.insert("commit".to_owned(), commit().unwrap_or_else(|| "unknown".to_owned()));
    versions
}

/// The commit of the tree the demo is run in, which is where the programs are built; none without git.
fn commit() -> Option<String> {
    let mut git = std::process::Command::new("git");
    let output = git.args(["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned()).filter(|text| !text.is_empty())
}

/// Writes report.json, prints the summary; whether every check held. The evidence lies there already but for the daemons'
/// own words, which are kept when the stage goes.
pub(crate) fn publish(options: &Options, report: &Report) -> Result<bool> {
    let path = options.out.join("report.json");
    std::fs::write(&path, serde_json::to_string_pretty(report)?).with_context(|| format!("cannot write {}", path.display()))?;

    let mut runs = Table::new();
    runs.load_style(presets::NOTHING).set_header(["RUN", "HPL", "GFLOP/S", "SECONDS", "HPL'S OWN"]);
    for label in ["calm", "overloaded", "adaptive"] {
        if let Some(hpl) = report.hpl.get(label) {
            let passed = if hpl.passed { "PASSED" } else { "FAILED" };
            runs.add_row([
                label,
                passed,
                &format!("{:.4}", hpl.gflops),
                &format!("{:.1}", hpl.seconds),
                &format!("{:.1}", hpl.own_seconds),
            ]);
        }
    }
    println!("\n{runs}\n");

    let ms = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.1} ms"));
    let count = |value: Option<u64>| value.map_or_else(|| "-".to_owned(), |count| count.to_string());
    let mut moves = Table::new();
    moves.load_style(presets::NOTHING).set_header([
        "MOVED",
        "FROM",
        "TO",
        "TOTAL",
        "PAUSE",
        "BLACK-OUT",
        "LOST",
        "REORDERED",
        "WHY",
    ]);
    for moved in &report.migrations {
        moves.add_row([
            moved.vm.clone(),
            format!("{} ({})", moved.from, moved.from_domain),
            format!("{} ({})", moved.to, moved.to_domain),
            ms(moved.total_ms),
            ms(moved.downtime_ms),
            ms(moved.blackout_ms),
            count(moved.frames_lost),
            count(moved.frames_reordered),
            moved.reason.clone(),
        ]);
    }
    println!("{moves}\n");

    let mut held = true;
    for check in &report.checks {
        held &= check.holds || !check.checked;
        let verdict = match check {
            Check { checked: false, .. } => "not checked (--untimed):",
            Check { holds: true, .. } => "ok  ",
            _ => "FAIL",
        };
        println!("  {verdict} {} ({})", check.claim, check.saw);
    }
    println!();
    let left_out = if options.untimed { " but those about run times, which were left out" } else { "" };
    let words = if held { format!("every check held{left_out}") } else { "not every check held".to_owned() };
    shell::say(&format!("report: {}; {words}", path.display()));
    Ok(held)
}
