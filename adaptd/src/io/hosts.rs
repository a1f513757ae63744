//! What operators say of hosts: to be emptied, no longer, gone for good.

use crate::io::world::{Shared, World};
use crate::records::{Life, RecordV1};
use violin_common::api::adapt::{AdaptReply, Mode};
use violin_common::{EnvironmentId, HostId};

/// Has a host emptied, or no longer.
pub fn drain(shared: &Shared, world: &mut World, host: &HostId, on: bool) -> Result<AdaptReply, String> {
    let drains = world.state.draining.contains(host);
    if !drains {
        is_known(world, host)?;
    }
    if drains != on {
        shared.record(world, RecordV1::HostDrains { host: host.clone(), on })?;
        tracing::info!(%host, on, "draining set");
    }
    let left = world.state.vms.values().filter(|known| known.host == *host).count();
    let then = match (on, left, world.mode) {
        (false, ..) => "VMs may start on and move to it again".to_owned(),
        (true, 0, _) => "nothing starts on or moves to it, and no VM is on it".to_owned(),
        (true, left, Mode::Act) => {
            format!(
                "nothing starts on or moves to it, and its {left} VMs leave one after another: `violin host` shows which are left"
            )
        }
        (true, left, _) => format!(
            "nothing starts on or moves to it; its {left} VMs leave only in mode act: `violin mode act`, or move them by hand"
        ),
    };
    Ok(AdaptReply::Words(format!("{host} is {}: {then}", if on { "being drained" } else { "no longer drained" })))
}

/// Strikes out a host that is gone for good.
pub fn forget(shared: &Shared, world: &mut World, host: &HostId, vms_are_lost: bool) -> Result<AdaptReply, String> {
    let recorded = world.state.recorded_on(host);
    if recorded.is_empty() && !world.state.draining.contains(host) {
        is_known(world, host)?;
    }
    if world.connection(host).is_some() {
        return Err(format!(
            "got {host}, whose monitor is connected; want a host that is gone for good: empty it with `violin host drain {host}` and \
             end its monitor first"
        ));
    }
    let touches = |moved: &crate::plan::PlannedMove| moved.from == *host || moved.to == *host;
    if world.state.unfinished.values().any(|unfinished| unfinished.plan.moves.iter().any(touches)) {
        return Err(format!(
            "a plan with moves from or to {host} is under way; try again when it has ended (`violin migrations`)"
        ));
    }
    if !recorded.is_empty() && !vms_are_lost {
        return Err(format!(
            "got {host}, on which may still run: {}; want it back, or your word that they are lost: \
             `violin host forget {host} --vms-are-lost` (should it come back all the same, they are ended there)",
            recorded.join(", ")
        ));
    }
    let busy = |environment: &EnvironmentId| {
        let starting = world.state.environments.get(environment).is_some_and(|known| known.life == Life::Starting);
        starting || world.being_ended.contains(environment)
    };
    let on = world.state.vms.values().filter(|known| known.host == *host || known.doubt.as_ref() == Some(host));
    if let Some(known) = on.into_iter().find(|known| busy(&known.environment)) {
        return Err(format!(
            "{} is just being started or ended; try again when it is not (`violin env status`)",
            known.environment
        ));
    }
    let lost: Vec<_> = world.state.vms.iter().filter(|(_, known)| known.host == *host).map(|(vm, _)| vm.clone()).collect();
    shared.record(world, RecordV1::HostForgotten(host.clone()))?;
    world.hosts.remove(host);
    world.second.remove(host);
    world.twice.retain(|_, second| second != host);
    for vm in &lost {
        world.seen.remove(vm);
        world.twice.remove(vm);
        world.observer.forget(vm);
    }
    shared.changed();
    tracing::warn!(%host, ?recorded, "forgotten, as an operator asked");
    let with = if recorded.is_empty() { String::new() } else { format!(", and given up with it: {}", recorded.join(", ")) };
    Ok(AdaptReply::Words(format!("{host} is forgotten{with}")))
}

/// Whether a host has ever been heard of.
pub fn is_known(world: &World, host: &HostId) -> Result<(), String> {
    if world.hosts.contains_key(host) {
        return Ok(());
    }
    let all = world.hosts.keys().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    let all = if all.is_empty() { "(none)" } else { &all };
    Err(format!("got host {host}, want one whose monitor has called since this manager started: {all}"))
}
