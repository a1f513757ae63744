//! What an environment that is being ended has left: on hosts that are away, or that did not do as they were told. It keeps its
//! names and its network until the last of it is gone, for whoever started in them would meet it.

use crate::io::environments::end;
use crate::io::progress::Words;
use crate::io::world::{Shared, World};
use crate::records::{Life, State};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use violin_common::{EnvironmentId, HostId, Vni};

/// First and longest wait before a host that is connected is told again.
const AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Hosts on which something of an environment that is being ended may still be.
fn hosts(state: &State, name: &EnvironmentId) -> BTreeSet<HostId> {
    let vms = state.vms_of(name).filter_map(|vm| state.to_stop.get(vm)).flatten();
    vms.chain(doors(state, name)).cloned().collect()
}

fn doors<'a>(state: &'a State, name: &'a EnvironmentId) -> impl Iterator<Item = &'a HostId> {
    state.doors.keys().filter(move |(environment, _)| environment == name).map(|(_, host)| host)
}

/// What may still be there of an environment that is being ended, in words; none: nothing.
pub fn left(world: &World, name: &EnvironmentId) -> Option<String> {
    let state = &world.state;
    let vms = state.vms_of(name).flat_map(|vm| state.to_stop.get(vm).into_iter().flatten().map(move |host| (vm, host)));
    let vms = vms.map(|(vm, host)| format!("{vm} may still run on {}", told(world, host)));
    let doors = doors(state, name).map(|host| format!("its access namespace may still be on {}", told(world, host)));
    let all: Vec<_> = vms.chain(doors).collect();
    (!all.is_empty()).then(|| all.join(", "))
}

/// A host that has not done what it was told, or could not be told.
fn told(world: &World, host: &HostId) -> String {
    match world.connection(host) {
        Some(_) => format!("{host}, which has not ended it yet"),
        None => format!("{host}, whose monitor is away"),
    }
}

/// What an operator can do about it: those hosts of it that are away.
pub fn way_out(world: &World, name: &EnvironmentId) -> String {
    let away: Vec<_> = hosts(&world.state, name).into_iter().filter(|host| world.connection(host).is_none()).collect();
    match away.first() {
        None => "try again in a moment".to_owned(),
        Some(host) => format!("bring that monitor back, or say that the host is gone for good: `violin host forget {host}`"),
    }
}

/// Refuses a name or a network of which something may still run; none: both are free.
pub fn keeps(world: &World, name: &EnvironmentId, vni: Vni) -> Result<(), String> {
    let state = &world.state;
    let meets = |old: &EnvironmentId, leads: Vni| old == name || leads == vni;
    let ending = state.environments.iter().filter(|(_, known)| known.life == Life::Ending);
    for (old, known) in ending {
        if !meets(old, known.stored.spec.network.vni) {
            continue;
        }
        let key = if old == name { "key `name`: got" } else { "key `network.vni`: got" };
        let got = if old == name { format!("{name},") } else { format!("{vni}, of environment {old},") };
        let left = left(world, old).unwrap_or_else(|| "the last of it is being removed".to_owned());
        return Err(format!("{key} {got} which is still being ended: {left}; {}, or choose another", way_out(world, old)));
    }
    // Journals of earlier versions say that an environment is gone whose VMs may run.
    let ended = state.to_stop.iter().filter(|(vm, _)| !state.vms.contains_key(*vm) && state.ended.get(*vm) == Some(&vni));
    match ended.flat_map(|(vm, hosts)| hosts.iter().map(move |host| (vm, host))).next() {
        None => Ok(()),
        Some((vm, host)) => Err(format!(
            "key `network.vni`: got {vni}, in which {vm} of an ended environment may still run on {}; bring its monitor back, \
             choose another network, or say that the host is gone for good: `violin host forget {host}`",
            told(world, host)
        )),
    }
}

/// Ends the rest of an environment whenever a host that may have some of it can be told; once at a time for each environment.
pub fn go_on(shared: &Arc<Shared>, name: &EnvironmentId, begun: &str) {
    if shared.world().finishing.insert((name.clone(), begun.to_owned())) {
        tokio::spawn(rest(Arc::clone(shared), name.clone(), begun.to_owned()));
    }
}

async fn rest(shared: Arc<Shared>, name: EnvironmentId, begun: String) {
    let mut changes = shared.changes.subscribe();
    let mut wait = AGAIN.0;
    // Connections over which it was told already.
    let mut told = BTreeSet::new();
    loop {
        let again = tokio::time::Instant::now() + wait;
        loop {
            changes.mark_unchanged();
            let (mut there, mut left) = (BTreeSet::new(), false);
            {
                let mut world = shared.world();
                if !world.state.is_begun(&name, &begun) {
                    world.finishing.remove(&(name, begun));
                    return;
                }
                for host in hosts(&world.state, &name) {
                    left = true;
                    there.extend(world.connection(&host).map(|connection| (host, connection.stable_id())));
                }
            }
            let comes = there.iter().any(|connection| !told.contains(connection));
            let can = !left || !there.is_empty();
            if comes || (can && tokio::time::Instant::now() >= again) {
                wait = if comes { AGAIN.0 } else { (wait * 2).min(AGAIN.1) };
                told = there;
                break;
            }
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                () = tokio::time::sleep_until(again), if can => {}
            }
        }
        if let Err(words) = end(&shared, &name, &begun, &Words::default()).await {
            tracing::warn!("{words}");
        }
    }
}
