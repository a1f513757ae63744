//! After a HELLO: what runs there and what the journal says are brought together. No VM runs twice, none is left behind.

use crate::io::monitors::ask;
use crate::io::progress::Words;
use crate::io::world::{Shared, World};
use crate::io::{clock, environments, strays};
use crate::records::{KnownEnvironment, KnownVm, Life, RecordV1, State};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use violin_common::control::monitor::{Answer, Command, VmSeen, VmState};
use violin_common::{HostId, Instant, VmId, Vni};

const SHORT: Duration = Duration::from_secs(60);
/// Least time between two comparisons because of a stray VM: a late observation is none.
const AGAIN: Duration = Duration::from_secs(3);

/// Whether a VM should not be where it was seen: what a command that outlived its manager has left.
pub fn is_stray(world: &World, host: &HostId, vm: &VmId, state: VmState) -> bool {
    match world.state.vms.get(vm) {
        None => world.state.ended.contains_key(vm),
        Some(known) => {
            known.host != *host && matches!(state, VmState::Arriving | VmState::Running) && world.state.moving_to(vm).is_none()
        }
    }
}

/// Whether a host has yet to say that what was there of ended environments is gone.
pub fn is_owed(world: &World, host: &HostId) -> bool {
    let ended = |environment| !world.state.environments.contains_key(environment);
    owed(world, host).next().is_some()
        || world.state.abandoned.contains_key(host)
        || world.state.doors.keys().any(|(old, at)| at == host && ended(old))
}

/// Those VMs; what is only being ended now is stopped by whoever ends it.
fn owed<'a>(world: &'a World, host: &'a HostId) -> impl Iterator<Item = &'a VmId> {
    let State { to_stop, vms, .. } = &world.state;
    to_stop.iter().filter(|(vm, hosts)| hosts.contains(host) && !vms.contains_key(*vm)).map(|(vm, _)| vm)
}

/// Whether a host may be compared with the journal again; remembers that it is.
pub fn is_due(world: &mut World, host: &HostId, now: Instant) -> bool {
    let Some(known) = world.hosts.get_mut(host) else { return false };
    let due = now.since(known.compared) >= AGAIN && !world.comparing.contains_key(host);
    if due {
        known.compared = now;
    }
    due
}

/// Lists a host's VMs and settles what differs from the journal. Once at a time for each host: while it waits for a monitor
/// that does not answer, whoever wants the same, as after a new HELLO, has it done once more afterwards.
pub async fn host(shared: Arc<Shared>, host: HostId) {
    {
        let mut world = shared.world();
        if let Some(again) = world.comparing.get_mut(&host) {
            *again = true;
            return;
        }
        world.comparing.insert(host.clone(), false);
    }
    loop {
        compare(&shared, &host).await;
        let mut world = shared.world();
        if world.comparing.insert(host.clone(), false) != Some(true) {
            world.comparing.remove(&host);
            break;
        }
    }
    shared.changed();
}

async fn compare(shared: &Shared, host: &HostId) {
    let list = match ask(shared, host, &Command::List, SHORT, |_, _| {}).await {
        Ok(Answer::Vms(list)) => list,
        other => {
            // Once: it is asked again and again as long as it is not known what runs there.
            match shared.world().hosts.get_mut(host).map(|known| std::mem::replace(&mut known.unlisted, true)) {
                Some(true) => tracing::debug!(%host, "could not list its VMs: {other:?}"),
                _ => tracing::warn!(%host, "could not list its VMs, and takes none before it has: {other:?}"),
            }
            return;
        }
    };
    let (commands, undescribed) = settle(shared, host, &list);
    strays::describe(shared, host, undescribed).await;
    if let Some(known) = shared.world().hosts.get_mut(host) {
        (known.listed, known.unlisted) = (true, false);
    }
    shared.changed();
    for command in commands {
        {
            let mut world = shared.world();
            // It has gone on while the commands before this one were answered.
            if !is_wanted(&world, host, &command) {
                continue;
            }
            world.clearing.insert(host.clone(), command.clone());
        }
        tracing::info!(%host, ?command, "clearing up what an earlier plan left");
        match ask(shared, host, &command, SHORT, |_, _| {}).await {
            Ok(_) => note_done(shared, host, &command),
            Err(error) => tracing::warn!(%host, "not cleared up: {error}"),
        }
        shared.world().clearing.remove(host);
    }
}

/// Whether what is to be cleared up has not been started anew.
fn is_wanted(world: &World, host: &HostId, command: &Command) -> bool {
    match command {
        // The host takes nothing before what it was given up with is gone: what has that name runs elsewhere.
        Command::Stop { vm } => world.state.ended.contains_key(vm) || is_abandoned(world, host, vm),
        Command::CancelIncoming { vm } => {
            world.state.moving_to(vm).is_none() && world.state.vms.get(vm).is_none_or(|known| known.host != *host)
        }
        Command::AccessClose { environment } => {
            let open = world.state.doors.contains_key(&(environment.clone(), host.clone()));
            !open || !world.state.environments.contains_key(environment)
        }
        // After the last of what was in it there.
        Command::NetworkRemove { vni } => {
            let State { environments, doors, ended, .. } = &world.state;
            let used = environments.values().any(|known| known.stored.spec.network.vni == *vni);
            let door = doors.iter().any(|((_, at), leads)| at == host && leads == vni);
            !used && !door && owed(world, host).all(|vm| ended.get(vm) != Some(vni))
        }
        _ => true,
    }
}

/// Whether a VM is one of those that a host was given up with.
fn is_abandoned(world: &World, host: &HostId, vm: &VmId) -> bool {
    let runs = world.state.vms.get(vm).is_some_and(|known| known.host == *host);
    !runs && world.state.abandoned.get(host).is_some_and(|left| left.vms.contains_key(vm))
}

/// Takes down in the journal that a host has done what it owed.
fn note_done(shared: &Shared, host: &HostId, command: &Command) {
    let mut world = shared.world();
    let record = match command {
        Command::Stop { vm } if world.state.is_owed(vm, host) || is_abandoned(&world, host, vm) => {
            RecordV1::VmStopped { vm: vm.clone(), host: host.clone() }
        }
        Command::AccessClose { environment } => RecordV1::AccessClosed { environment: environment.clone(), host: host.clone() },
        _ => return,
    };
    if let Err(words) = shared.record(&mut world, record) {
        tracing::error!("{words}");
    }
}

/// What is to be cleared up, and VMs of which nothing is known.
fn settle(shared: &Shared, host: &HostId, list: &[VmSeen]) -> (Vec<Command>, Vec<VmId>) {
    let mut world = shared.world();
    let now = clock::now();
    // Also those not listed: one may be about to start.
    let owing: Vec<VmId> = owed(&world, host).cloned().collect();
    let State { doors, environments, ended, .. } = &world.state;
    let doors: Vec<_> =
        doors.iter().filter(|((environment, at), _)| at == host && !environments.contains_key(environment)).collect();
    let mut networks: BTreeSet<Vni> = owing.iter().filter_map(|vm| ended.get(vm)).copied().collect();
    networks.extend(doors.iter().map(|(_, vni)| **vni));
    let closes = doors.into_iter().map(|((environment, _), _)| Command::AccessClose { environment: environment.clone() });
    let mut commands: Vec<_> = owing.iter().map(|vm| Command::Stop { vm: vm.clone() }).chain(closes).collect();
    // What it was given up with, also what is not listed.
    if let Some(left) = world.state.abandoned.get(host) {
        tracing::info!(%host, vms = ?left.vms.keys(), "had been forgotten and is back: what ran there is ended");
        networks.extend(left.vms.values().chain(left.doors.values()));
        commands.extend(left.vms.keys().map(|vm| Command::Stop { vm: vm.clone() }));
        commands.extend(left.doors.keys().map(|environment| Command::AccessClose { environment: environment.clone() }));
    }
    world.twice.retain(|_, second| second != host);
    for seen in list {
        let vm = &seen.vm;
        if is_abandoned(&world, host, vm) {
            continue;
        }
        if world.state.is_owed(vm, host) && !world.state.vms.contains_key(vm) {
            continue;
        }
        let Some(known) = world.state.vms.get(vm) else {
            if let Some(vni) = world.state.ended.get(vm) {
                networks.insert(*vni);
                commands.push(Command::Stop { vm: vm.clone() });
            }
            continue;
        };
        let ending = world.state.is_ending(&known.environment);
        let moving = world.state.moving_to(vm).is_some();
        let elsewhere = known.host != *host;
        match seen.state {
            // Whoever ends it stops it where it may run, but not what a late command has left elsewhere.
            _ if ending && world.state.is_owed(vm, host) => {}
            _ if ending => commands.push(Command::Stop { vm: vm.clone() }),
            // The executor asks both ends itself.
            _ if moving => {}
            VmState::Arriving if elsewhere => commands.push(Command::CancelIncoming { vm: vm.clone() }),
            VmState::Running if elsewhere && runs_where_known(&world, vm, known, now, shared.config.policy.max_age.0) => {
                tracing::error!(
                    "{vm} runs on {host} and on {}, where the journal has it: its disk and its address are used twice; \
                     look which of the two is right and end the other one on its host",
                    known.host
                );
                world.twice.insert(vm.clone(), host.clone());
            }
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
    // A VM that a move might have left here runs where it was.
    let State { vms, .. } = &world.state;
    let doubted = vms.iter().filter(|(vm, known)| known.doubt.as_ref() == Some(host) && world.state.moving_to(vm).is_none());
    let found: Vec<_> = doubted
        .filter(|(vm, _)| list.iter().all(|seen| seen.vm != **vm))
        .map(|(vm, known)| RecordV1::VmFound { vm: vm.clone(), host: known.host.clone() })
        .collect();
    for record in found {
        if let Err(words) = shared.record(&mut world, record) {
            tracing::error!("{words}");
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
    commands.extend(networks.into_iter().map(|vni| Command::NetworkRemove { vni }));
    let undescribed = strays::note(&mut world, host, list);
    (commands, undescribed)
}

/// Whether a VM is known to run on the host that the journal has it on.
fn runs_where_known(world: &World, vm: &VmId, known: &KnownVm, now: Instant, max_age: Duration) -> bool {
    let seen = world.seen.get(vm).is_some_and(|(at, state)| *at == known.host && *state == VmState::Running);
    // Seen, but not observed for long: it has left, as by a hand's move.
    let fresh = world.observer.vm(vm).is_none_or(|figures| figures.host != known.host || now.since(figures.at) <= max_age);
    seen && fresh && world.connection(&known.host).is_some()
}

/// After a restart: environments that were being started or ended are ended, as soon as their hosts are there.
pub async fn leftovers(shared: Arc<Shared>) {
    let left: Vec<_> = {
        let world = shared.world();
        let left = world.state.environments.iter().filter(|(_, env)| env.life != Life::Up);
        let hosts = |env: &KnownEnvironment| env.stored.placement.values().cloned().collect::<Vec<_>>();
        left.map(|(name, env)| (name.clone(), env.stored.keys.public.clone(), hosts(env))).collect()
    };
    let mut ends = JoinSet::new();
    for (environment, begun, hosts) in left {
        tracing::info!(%environment, "was half started or half ended when the last manager stopped: ending it");
        let shared = Arc::clone(&shared);
        ends.spawn(async move {
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
            if let Err(words) = environments::end(&shared, &environment, &begun, &Words::default()).await {
                tracing::warn!("{words}");
            }
        });
    }
    while ends.join_next().await.is_some() {}
}
