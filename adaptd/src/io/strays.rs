//! VMs that run though the journal knows nothing of them, as after it was lost. They are shown, keep their names and their network,
//! and run on until an operator has said whether they are taken up or ended.

use crate::adopt::{Found, adopted};
use crate::io::keys;
use crate::io::monitors::ask;
use crate::io::progress::Words;
use crate::io::world::{Shared, World};
use crate::records::{RecordV1, StoredEnvironment};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::task::JoinSet;
use violin_common::api::adapt::StraySeen;
use violin_common::config::environment::Node;
use violin_common::control::monitor::{Answer, Command, VmSeen, VmSpec, VmState};
use violin_common::{EnvironmentId, Epoch, HostId, VmId, Vni};

const SHORT: Duration = Duration::from_secs(60);

/// One such VM, on one host.
#[derive(Debug, Clone, PartialEq)]
pub struct Stray {
    /// How it was last seen.
    pub state: VmState,
    /// How it was started, and its epoch; none: its monitor does not tell.
    pub described: Option<(VmSpec, Option<Epoch>)>,
}

/// Whether the journal knows nothing of a VM that is seen on a host: neither that it is nor that it was.
pub fn is_unknown(world: &World, host: &HostId, vm: &VmId) -> bool {
    let state = &world.state;
    let given_up = state.abandoned.get(host).is_some_and(|left| left.vms.contains_key(vm));
    !state.vms.contains_key(vm) && !state.ended.contains_key(vm) && !state.is_owed(vm, host) && !given_up
}

/// Whether a host observes other strays than were found there: it must be asked for its list.
pub fn differ<'a>(world: &World, host: &HostId, observed: impl Iterator<Item = &'a VmId>) -> bool {
    let observed: BTreeSet<_> = observed.filter(|vm| is_unknown(world, host, vm)).collect();
    let known = world.strays.get(host).into_iter().flat_map(BTreeMap::keys);
    observed != known.filter(|vm| is_unknown(world, host, vm)).collect()
}

/// Takes in what a host has listed; returns those nothing more is known of.
pub fn note(world: &mut World, host: &HostId, list: &[VmSeen]) -> Vec<VmId> {
    let mut before = world.strays.remove(host).unwrap_or_default();
    let mut now = BTreeMap::new();
    for seen in list.iter().filter(|seen| seen.state != VmState::Stopped && is_unknown(world, host, &seen.vm)) {
        let known = before.remove(&seen.vm);
        if known.is_none() {
            tracing::warn!(
                %host, vm = %seen.vm,
                "runs there, but this journal knows no such VM; it is left alone until you say otherwise: `violin env adopt ENVIRONMENT` \
                 takes up what runs, `violin env destroy ENVIRONMENT` ends it, `violin vm list` shows it"
            );
        }
        now.insert(seen.vm.clone(), Stray { state: seen.state, described: known.and_then(|known| known.described) });
    }
    let unnamed = now.iter().filter(|(_, stray)| stray.described.is_none()).map(|(vm, _)| vm.clone()).collect();
    if !now.is_empty() {
        world.strays.insert(host.clone(), now);
    }
    unnamed
}

/// Asks a host how these were started.
pub async fn describe(shared: &Shared, host: &HostId, strays: Vec<VmId>) {
    for vm in strays {
        match ask(shared, host, &Command::Describe { vm: vm.clone() }, SHORT, |_, _| {}).await {
            Ok(Answer::Described { spec, epoch }) if spec.vm == vm => {
                if let Some(stray) = shared.world().strays.get_mut(host).and_then(|strays| strays.get_mut(&vm)) {
                    stray.described = Some((*spec, epoch));
                }
            }
            // A monitor of an earlier version, or one that has lost its own records.
            Ok(_) => tracing::warn!(%host, %vm, "its monitor told of another VM"),
            Err(error) => tracing::warn!(%host, %vm, "it is not known how it was started: {error}"),
        }
    }
    shared.changed();
}

/// All there are now.
fn all(world: &World) -> impl Iterator<Item = (&HostId, &VmId, &Stray)> {
    let all = world.strays.iter().flat_map(|(host, strays)| strays.iter().map(move |(vm, stray)| (host, vm, stray)));
    all.filter(|(host, vm, _)| is_unknown(world, host, vm))
}

/// As listed.
pub fn list(world: &World) -> Vec<StraySeen> {
    let seen = all(world).map(|(host, vm, stray)| {
        let spec = stray.described.as_ref().map(|(spec, _)| spec);
        StraySeen {
            stray: true,
            vm: vm.clone(),
            environment: spec.map(|spec| spec.environment.clone()),
            role: spec.map(|spec| spec.role),
            address: spec.map(|spec| spec.address),
            vni: spec.map(|spec| spec.network.vni),
            host: host.clone(),
            state: if world.connection(host).is_some() {
                stray.state.into()
            } else {
                violin_common::api::adapt::Condition::Unknown
            },
        }
    });
    seen.collect()
}

/// Refuses an environment whose names or network a stray has.
pub fn keeps(world: &World, name: &EnvironmentId, vni: Vni, nodes: &[Node]) -> Result<(), String> {
    for (host, vm, stray) in all(world) {
        let spec = stray.described.as_ref().map(|(spec, _)| spec);
        let meant = nodes.iter().any(|node| node.vm == *vm) || spec.is_some_and(|spec| spec.environment == *name);
        let key = match spec {
            _ if meant => format!("key `name`: got {name}"),
            Some(spec) if spec.network.vni == vni => format!("key `network.vni`: got {vni}"),
            _ => continue,
        };
        let whose = spec.map_or_else(|| name.clone(), |spec| spec.environment.clone());
        return Err(format!(
            "{key}, but {vm} of an environment {whose} that the journal does not know runs on {host}: take it up with \
             `violin env adopt {whose}`, end it with `violin env destroy {whose}`, or choose another"
        ));
    }
    Ok(())
}

/// What can be done about an environment of which there are strays.
pub fn way_out(world: &World, name: &EnvironmentId) -> Option<String> {
    strays_of(world, name).ok()?;
    Some(format!(
        "environment {name} runs, but the journal does not know it: `violin env adopt {name}` takes it up, \
         `violin env destroy {name}` ends it"
    ))
}

/// An environment of which there are strays, for an operator's word; errors: there are none.
fn strays_of(world: &World, name: &EnvironmentId) -> Result<Vec<(HostId, VmId, Stray)>, String> {
    if world.state.environments.contains_key(name) {
        return Err(format!(
            "the journal knows environment {name}; want one it does not know (`violin env down {name}` ends {name})"
        ));
    }
    let of = |stray: &Stray| stray.described.as_ref().is_some_and(|(spec, _)| spec.environment == *name);
    let these: Vec<_> =
        all(world).filter(|(_, _, stray)| of(stray)).map(|(host, vm, stray)| (host.clone(), vm.clone(), stray.clone())).collect();
    if !these.is_empty() {
        return Ok(these);
    }
    let others: BTreeSet<_> = all(world).filter_map(|(_, _, stray)| Some(&stray.described.as_ref()?.0.environment)).collect();
    let others = others.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    let others = if others.is_empty() { "(there is none)" } else { &others };
    Err(format!("got environment {name}, want one that runs and is not in the journal: {others}"))
}

/// Takes up what runs of an environment that the journal does not know.
pub fn adopt(shared: &Shared, world: &mut World, name: &EnvironmentId) -> Result<String, String> {
    let strays = strays_of(world, name)?;
    if let Some((host, vm, _)) = strays.iter().find(|(host, _, _)| world.connection(host).is_none()) {
        return Err(format!("the monitor of {host}, where {vm} was seen, is away; bring it back first"));
    }
    // What arrives somewhere is looked at when the move it is of has ended; here it counts where it runs.
    let here = strays.iter().filter(|(_, _, stray)| stray.state != VmState::Arriving);
    let found: Vec<Found> =
        here.filter_map(|(host, _, stray)| Some((stray.described.as_ref()?.0.clone(), host.clone()))).collect();
    let stored: StoredEnvironment = adopted(name, &found, |host| world.hosts.get(host).map(|known| known.hello.domain.clone()))
        .map_err(|why| format!("environment {name} is not taken up: {why}"))?;
    let vni = stored.spec.network.vni;
    if let Some((other, _)) = world.state.environments.iter().find(|(_, known)| known.stored.spec.network.vni == vni) {
        return Err(format!("environment {name} is not taken up: its network {vni} is that of environment {other}"));
    }
    keys::store(&shared.config.socket, name, &stored.keys).map_err(|error| format!("{error:#}"))?;
    shared.record(world, RecordV1::EnvironmentBegins(Box::new(stored)))?;
    for (_, vm, stray) in &strays {
        if let Some((_, Some(epoch))) = stray.described {
            shared.record(world, RecordV1::VmStarts { vm: vm.clone(), epoch })?;
        }
    }
    shared.record(world, RecordV1::EnvironmentReady(name.clone()))?;
    for (host, vm, stray) in &strays {
        if stray.state != VmState::Arriving {
            world.seen.insert(vm.clone(), (host.clone(), stray.state));
        }
    }
    shared.changed();
    let words = format!("environment {name} is taken up: {} VMs", found.len());
    tracing::warn!("{words}");
    Ok(words)
}

/// Ends what runs of an environment that the journal does not know. Errors: what was not ended.
pub async fn destroy(shared: &std::sync::Arc<Shared>, name: &EnvironmentId, words: &Words) -> Result<(), String> {
    let (strays, networks, hosts) = {
        let world = shared.world();
        let strays = strays_of(&world, name)?;
        let used = |vni: &Vni| world.state.environments.values().any(|known| known.stored.spec.network.vni == *vni);
        let networks = strays.iter().filter_map(|(_, _, stray)| Some(stray.described.as_ref()?.0.network.vni));
        let networks: BTreeSet<Vni> = networks.filter(|vni| !used(vni)).collect();
        (strays, networks, world.connected())
    };
    let mut stopping = JoinSet::new();
    for (host, vm, _) in strays {
        words.say(format!("{vm} is ended on {host}"));
        let shared = std::sync::Arc::clone(shared);
        stopping.spawn(async move {
            let stopped = ask(&shared, &host, &Command::Stop { vm: vm.clone() }, SHORT, |_, _| {}).await;
            stopped.map_err(|error| format!("{vm} was not ended on {host}: {error}"))?;
            if let Some(strays) = shared.world().strays.get_mut(&host) {
                strays.remove(&vm);
            }
            Ok::<_, String>(())
        });
    }
    let mut left = Vec::new();
    while let Some(stopped) = stopping.join_next().await {
        left.extend(stopped.unwrap_or_else(|error| Err(error.to_string())).err());
    }
    let networks = networks.into_iter().map(|vni| Command::NetworkRemove { vni });
    let commands: Vec<_> = std::iter::once(Command::AccessClose { environment: name.clone() }).chain(networks).collect();
    for host in &hosts {
        for command in &commands {
            if let Err(error) = ask(shared, host, command, SHORT, |_, _| {}).await {
                words.say(format!("{host}: {error}"));
            }
        }
    }
    shared.changed();
    if left.is_empty() { Ok(()) } else { Err(format!("{}; what is left stays a stray", left.join("; "))) }
}
