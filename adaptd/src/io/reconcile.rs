//! After a HELLO: what runs there and what the journal says are brought together. No VM runs twice, none is left behind.

use crate::io::environments;
use crate::io::monitors::ask;
use crate::io::world::{Shared, World};
use crate::records::{Life, RecordV1};
use std::sync::Arc;
use std::time::Duration;
use violin_common::control::monitor::{Answer, Command, VmSeen, VmState};
use violin_common::{HostId, Instant, VmId};

const SHORT: Duration = Duration::from_secs(60);
/// Least time between two comparisons because of a stray VM: a late observation is none.
const AGAIN: Duration = Duration::from_secs(3);

/// Whether a VM should not be where it was seen: what a command that outlived its manager has left.
pub fn is_stray(world: &World, host: &HostId, vm: &VmId, state: VmState) -> bool {
    match world.state.vms.get(vm) {
        None => world.state.ended.contains(vm),
        Some(known) => {
            known.host != *host && matches!(state, VmState::Arriving | VmState::Running) && world.state.moving_to(vm).is_none()
        }
    }
}

/// Whether a host may be compared with the journal again; remembers that it is.
pub fn is_due(world: &mut World, host: &HostId, now: Instant) -> bool {
    let Some(known) = world.hosts.get_mut(host) else { return false };
    let due = now.since(known.compared) >= AGAIN;
    if due {
        known.compared = now;
    }
    due
}

/// Lists a host's VMs and settles what differs from the journal.
pub async fn host(shared: Arc<Shared>, host: HostId) {
    let list = match ask(&shared, &host, &Command::List, SHORT, |_, _| {}).await {
        Ok(Answer::Vms(list)) => list,
        other => {
            tracing::warn!(%host, "could not list its VMs: {other:?}");
            return;
        }
    };
    for command in settle(&shared, &host, &list) {
        tracing::info!(%host, ?command, "clearing up what an earlier plan left");
        if let Err(error) = ask(&shared, &host, &command, SHORT, |_, _| {}).await {
            tracing::warn!(%host, "not cleared up: {error}");
        }
    }
    shared.changed();
}

fn settle(shared: &Shared, host: &HostId, list: &[VmSeen]) -> Vec<Command> {
    let mut world = shared.world();
    let mut commands = Vec::new();
    for seen in list {
        let vm = &seen.vm;
        let Some(known) = world.state.vms.get(vm) else {
            if world.state.ended.contains(vm) {
                commands.push(Command::Stop { vm: vm.clone() });
            } else {
                tracing::warn!(%host, %vm, "runs there, but this journal knows no such VM; left alone");
            }
            continue;
        };
        let ending = world.state.environments.get(&known.environment).is_some_and(|env| env.life == Life::Ending);
        let moving = world.state.moving_to(vm).is_some();
        let elsewhere = known.host != *host;
        match seen.state {
            _ if ending => commands.push(Command::Stop { vm: vm.clone() }),
            // The executor asks both ends itself.
            _ if moving => {}
            VmState::Arriving if elsewhere => commands.push(Command::CancelIncoming { vm: vm.clone() }),
            VmState::Running if elsewhere => {
                tracing::warn!(%host, %vm, "runs there, the journal has it on {}: taking note", known.host);
                let found = RecordV1::VmFound { vm: vm.clone(), host: host.clone() };
                if shared.record(&mut world, found).is_ok() {
                    world.seen.insert(vm.clone(), (host.clone(), seen.state));
                }
            }
            _ if elsewhere => {}
            state => {
                world.seen.insert(vm.clone(), (host.clone(), state));
            }
        }
    }
    // What should be here and is not has ended by itself.
    let here = world.state.vms.iter().filter(|(_, known)| known.host == *host);
    let up = here.filter(|(_, known)| world.state.environments.get(&known.environment).is_some_and(|env| env.life == Life::Up));
    let gone: Vec<VmId> = up
        .filter(|(vm, _)| list.iter().all(|seen| seen.vm != **vm) && world.state.moving_to(vm).is_none())
        .map(|(vm, _)| vm.clone())
        .collect();
    for vm in gone {
        world.seen.insert(vm, (host.clone(), VmState::Stopped));
    }
    commands
}

/// After a restart: environments that were being started or ended are ended, as soon as their hosts are there.
pub async fn leftovers(shared: Arc<Shared>) {
    let left: Vec<_> = {
        let world = shared.world();
        let left = world.state.environments.iter().filter(|(_, env)| env.life != Life::Up);
        left.map(|(name, env)| (name.clone(), env.stored.placement.values().cloned().collect::<Vec<_>>())).collect()
    };
    for (environment, hosts) in left {
        tracing::info!(%environment, "was half started or half ended when the last manager stopped: ending it");
        let mut changes = shared.changes.subscribe();
        let all_there = async {
            loop {
                let there = hosts.iter().all(|host| shared.world().connection(host).is_some());
                if there || changes.changed().await.is_err() {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(SHORT, all_there).await;
        if let Err(words) = environments::down(&shared, &environment, &environments::Words::default()).await {
            tracing::warn!(%environment, "not ended: {words}");
        }
    }
}
