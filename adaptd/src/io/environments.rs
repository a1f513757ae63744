//! Environments: up as one unit or not at all, down, and the door into one.

use crate::io::monitors::ask;
use crate::io::progress::Words;
use crate::io::world::{Shared, World};
use crate::io::{clock, ending, keys, progress, strays};
use crate::place::place;
use crate::records::{Life, RecordV1, StoredEnvironment};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use violin_common::api::adapt::AdaptReply;
use violin_common::config::environment::EnvironmentSpec;
use violin_common::control::monitor::{Answer, Command, ImageDigest, Role, VmSpec, VmState};
use violin_common::{EnvironmentId, HostId, VmId};

const SHORT: Duration = Duration::from_secs(60);
/// Longest wait for hosts to list their VMs before something is started.
const LISTED: Duration = Duration::from_secs(10);

/// A name taken by the call that is about to start an environment, until it is recorded or refused.
struct Taken<'a>(&'a Shared, &'a EnvironmentId);

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.0.world().being_begun.remove(self.1);
    }
}

/// Starts an environment; undone as a whole if any VM is not ready in time.
pub async fn up(
    shared: &Arc<Shared>,
    spec: EnvironmentSpec,
    placement: BTreeMap<String, HostId>,
    image: Option<ImageDigest>,
    words: &Words,
) -> Result<(), String> {
    let name = spec.name.clone();
    listed(shared).await;
    {
        let mut world = shared.world();
        admit(shared, &world, &spec, &placement)?;
        if !world.being_begun.insert(name.clone()) {
            return Err(being_started(&name, None));
        }
    }
    let taken = Taken(shared, &name);
    let words = &words.about(shared, &name, "its key pair is being made".into());
    let pair = keys::generate(&shared.config.socket, &name).await.map_err(|error| format!("{error:#}"))?;
    // Whoever hangs up does not end this task: an environment of this name may be another one when it goes on.
    let begun = pair.public.clone();
    let starts = {
        // Admitted again, and recorded under the same lock: another environment may have come meanwhile, and whoever is
        // refused must not overwrite its key.
        let mut world = shared.world();
        let placed = admit(shared, &world, &spec, &placement)?;
        keys::store(&shared.config.socket, &name, &pair).map_err(|error| format!("{error:#}"))?;
        let stored = StoredEnvironment { spec, home: placed.home, image, placement: placed.hosts, keys: pair };
        shared.record(&mut world, RecordV1::EnvironmentBegins(Box::new(stored)))?;
        let specs: Vec<(VmSpec, HostId)> = world
            .state
            .vms
            .values()
            .filter(|known| known.environment == name)
            .map(|known| (known.spec.clone(), known.host.clone()))
            .collect();
        let mut starts = Vec::new();
        for (spec, host) in specs {
            let epoch = world.state.next_epoch(&spec);
            shared.record(&mut world, RecordV1::VmStarts { vm: spec.vm.clone(), epoch })?;
            world.seen.remove(&spec.vm);
            world.observer.forget(&spec.vm);
            world.starting.insert(spec.vm.clone());
            let image_sources = world.image_sources(spec.image.as_ref(), &host);
            starts.push((host, Command::Start { spec, epoch, image_sources }));
        }
        starts
    };
    drop(taken);
    let started = start_all(shared, &name, &begun, starts, words).await;
    {
        let mut world = shared.world();
        if !world.state.is_starting(&name, &begun) {
            let ended = format!("{name} was ended by another command before all its VMs were ready");
            words.say(ended.clone());
            return Err(ended);
        }
        if started.is_ok() {
            shared.record(&mut world, RecordV1::EnvironmentReady(name.clone()))?;
        }
    }
    shared.changed();
    let Err(why) = started else { return Ok(()) };
    words.say(format!("{why}; ending what was started of {name}"));
    match end(shared, &name, &begun, words).await {
        Ok(()) => Err(format!("{why}; everything started of {name} was ended")),
        Err(left) => Err(format!("{why}; {left}")),
    }
}

/// Waits until every host that is connected has said what runs there; those that do not within a time take no VM.
async fn listed(shared: &Shared) {
    let mut changes = shared.changes.subscribe();
    let all = async {
        while shared.world().hosts.values().any(|known| known.connection.is_some() && !known.listed) {
            if changes.changed().await.is_err() {
                return;
            }
        }
    };
    let _ = tokio::time::timeout(LISTED, all).await;
}

/// What another call for an environment of the same name is told.
fn being_started(name: &EnvironmentId, progress: Option<String>) -> String {
    let progress = progress.map_or_else(String::new, |progress| format!(" ({progress})"));
    format!(
        "environment {name} is being started by another call{progress}; `violin env status {name}` shows how far it is, \
         `violin env down {name}` gives it up"
    )
}

fn admit(
    shared: &Shared,
    world: &World,
    spec: &EnvironmentSpec,
    placement: &BTreeMap<String, HostId>,
) -> Result<crate::place::Placed, String> {
    let nodes = spec.check().map_err(|error| error.to_string())?;
    if world.state.environments.get(&spec.name).is_some_and(|known| known.life == Life::Starting) {
        return Err(being_started(&spec.name, progress::of(shared, world, &spec.name)));
    }
    let meets = |command: &Command| match command {
        Command::Stop { vm } | Command::CancelIncoming { vm } => nodes.iter().any(|node| node.vm == *vm),
        Command::AccessClose { environment } => *environment == spec.name,
        Command::NetworkRemove { vni } => *vni == spec.network.vni,
        _ => false,
    };
    if let Some((host, _)) = world.clearing.iter().find(|(_, command)| meets(command)) {
        return Err(format!("{host} is just clearing up what an ended environment has left there; try again in a moment"));
    }
    // `x` with a group `y-c` and `x-y` with a group `c` both have an `x-y-c`.
    for node in &nodes {
        let Some(known) = world.state.vms.get(&node.vm).filter(|known| known.environment != spec.name) else { continue };
        return Err(format!(
            "key `name` and `group[].name`: node {} of environment {} would be the VM {}, which environment {} has on {}; \
             choose another name for one of the two",
            node.name, spec.name, node.vm, known.environment, known.host
        ));
    }
    for node in nodes.iter().filter(|node| !world.state.vms.contains_key(&node.vm)) {
        let Some(host) = world.state.to_stop.get(&node.vm).and_then(|hosts| hosts.first()) else { continue };
        let what = match world.connection(host) {
            Some(_) => format!("on {host}, which has not stopped it yet; try again in a moment"),
            None => format!("on {host}, whose monitor is away; bring it back, or choose another name"),
        };
        return Err(format!("{} of an ended environment may still run {what}", node.vm));
    }
    let vni = spec.network.vni;
    ending::keeps(world, &spec.name, vni)?;
    strays::keeps(world, &spec.name, vni, &nodes)?;
    let ended = |environment: &EnvironmentId| !world.state.environments.contains_key(environment);
    if let Some(((old, host), _)) = world.state.doors.iter().find(|((old, _), at)| **at == vni && ended(old)) {
        return Err(format!(
            "key `network.vni`: got {vni}, into which an access namespace of the ended environment {old} may still lead on \
             {host}; bring its monitor back, or choose another network"
        ));
    }
    let taken = world.state.environments.iter().map(|(name, known)| (name.clone(), known.stored.spec.network.vni)).collect();
    let unlisted = |host: &&HostId| world.hosts.get(*host).is_some_and(|known| known.connection.is_some() && !known.listed);
    if let Some(host) = placement.values().find(unlisted) {
        return Err(format!(
            "placement: got host {host}, whose monitor does not tell what runs there (its log says why); want another"
        ));
    }
    let mut snapshot = world.snapshot(clock::now(), &shared.config);
    // Where anything may run already.
    snapshot.hosts.retain(|host, _| world.hosts.get(host).is_none_or(|known| known.listed || known.connection.is_none()));
    place(&snapshot, &taken, spec, placement).map_err(|refusal| refusal.to_string())
}

/// A VM that a monitor is being told to start, until it has answered or nobody waits for that any more.
struct Asked(Arc<Shared>, VmId);

impl Drop for Asked {
    fn drop(&mut self) {
        self.0.world().starting.remove(&self.1);
    }
}

async fn start_all(
    shared: &Arc<Shared>,
    name: &EnvironmentId,
    begun: &str,
    starts: Vec<(HostId, Command)>,
    words: &Words,
) -> Result<(), String> {
    let deadline = tokio::time::Instant::now() + shared.config.ready_timeout.0;
    let mut waiting = BTreeSet::new();
    let mut starting = JoinSet::new();
    let (told, mut heard) = tokio::sync::mpsc::unbounded_channel();
    for (host, command) in starts {
        let Command::Start { spec, .. } = &command else { continue };
        let (vm, image) = (spec.vm.clone(), spec.image.clone());
        words.say(format!("{vm} starts on {host}"));
        waiting.insert(vm.clone());
        let (asked, shared, told) = (Asked(Arc::clone(shared), vm.clone()), Arc::clone(shared), told.clone());
        starting.spawn(async move {
            let limit = shared.config.ready_timeout.0;
            let answer = ask(&shared, &host, &command, limit, |_, doing| {
                let _ = told.send(format!("{vm} on {host}: {doing}"));
            })
            .await;
            drop(asked);
            match answer {
                Ok(Answer::Done) => {
                    shared.world().has_image(image.as_ref(), &host);
                    Ok(())
                }
                Ok(other) => Err(format!("{vm} was not started on {host}: got the answer {other:?}, want done")),
                Err(error) => Err(format!("{vm} was not started on {host}: {error}")),
            }
        });
    }
    let count = waiting.len();
    let mut changes = shared.changes.subscribe();
    loop {
        let ready: Vec<VmId> = {
            let world = shared.world();
            if !world.state.is_starting(name, begun) {
                return Err(format!("{name} is being ended"));
            }
            let running = |vm: &&VmId| world.seen.get(*vm).is_some_and(|(_, state)| *state == VmState::Running);
            waiting.iter().filter(running).cloned().collect()
        };
        for vm in ready {
            waiting.remove(&vm);
            words.say(format!("{vm} is ready ({} of {count})", count - waiting.len()));
        }
        if waiting.is_empty() && starting.is_empty() {
            return Ok(());
        }
        tokio::select! {
            Some(said) = heard.recv() => words.say(said),
            Some(started) = starting.join_next(), if !starting.is_empty() => {
                started.map_err(|error| format!("starting {name} broke off: {error}"))??;
            }
            _ = changes.changed() => {}
            () = tokio::time::sleep_until(deadline) => {
                let late = waiting.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
                let limit = shared.config.ready_timeout;
                return Err(format!("not ready within {limit} (key `ready-timeout`): {late}; look at the guests' consoles"));
            }
        }
    }
}

/// Ends the environment that has this name now. Errors: what is left of it, as on a host that is away; it is ended when that host
/// comes back, and the environment stays on record until then.
pub async fn down(shared: &Arc<Shared>, name: &EnvironmentId, words: &Words) -> Result<(), String> {
    let begun = {
        let world = shared.world();
        let environments = &world.state.environments;
        let known = environments
            .get(name)
            .ok_or_else(|| strays::way_out(&world, name).unwrap_or_else(|| unknown(name, environments.keys())))?;
        known.stored.keys.public.clone()
    };
    end(shared, name, &begun, words).await
}

/// Ends the environment that was begun with this public key, and no later one of the same name. One that is gone is fine; one
/// that another call is ending is waited for: a command of the slower of the two could meet a VM started anew.
pub async fn end(shared: &Arc<Shared>, name: &EnvironmentId, begun: &str, words: &Words) -> Result<(), String> {
    let mut changes = shared.changes.subscribe();
    let moves = {
        let world = shared.world();
        !world.state.unfinished.is_empty() && !world.being_ended.contains(name)
    };
    let waiting = moves.then(|| words.about(shared, name, String::new()));
    if let Some(waiting) = &waiting {
        waiting.say(format!("{name} is ended as soon as the moves under way have ended (`violin vm list` shows them)"));
    }
    loop {
        quiet(shared).await?;
        {
            let mut world = shared.world();
            if !world.state.is_begun(name, begun) {
                return Ok(());
            }
            // A plan may have begun since: its VMs would be looked for where they no longer are.
            if !world.state.unfinished.is_empty() {
                continue;
            }
            if !world.being_ended.contains(name) {
                if !world.state.is_ending(name) {
                    shared.record(&mut world, RecordV1::EnvironmentEnds(name.clone()))?;
                }
                world.being_ended.insert(name.clone());
                break;
            }
        }
        let _ = tokio::time::timeout(Duration::from_millis(500), changes.changed()).await;
    }
    let words = words.about(shared, name, "its VMs are being stopped".into());
    let ended = end_alone(shared, name, &words).await;
    shared.world().being_ended.remove(name);
    shared.changed();
    if ended.is_err() {
        ending::go_on(shared, name, begun);
    }
    ended
}

async fn end_alone(shared: &Arc<Shared>, name: &EnvironmentId, words: &Words) -> Result<(), String> {
    let (all, vms, doors, vni) = {
        let world = shared.world();
        let Some(known) = world.state.environments.get(name) else { return Ok(()) };
        let all: Vec<VmId> = world.state.vms_of(name).cloned().collect();
        let vni = known.stored.spec.network.vni;
        // On every host where it may run: of a move whose end nobody could tell that is both.
        let owed = world.state.vms_of(name).filter_map(|vm| Some((vm, world.state.to_stop.get(vm)?)));
        let vms: Vec<_> = owed.flat_map(|(vm, hosts)| hosts.iter().map(move |host| (vm.clone(), host.clone()))).collect();
        let doors = world.state.doors.keys().filter(|(environment, _)| environment == name).map(|(_, host)| host.clone());
        (all, vms, doors.collect::<Vec<_>>(), vni)
    };
    for host in doors {
        let close = Command::AccessClose { environment: name.clone() };
        match ask(shared, &host, &close, SHORT, |_, _| {}).await {
            Ok(_) => shared.record(&mut shared.world(), RecordV1::AccessClosed { environment: name.clone(), host })?,
            Err(error) => words.say(format!("the access namespace of {name} on {host} was not removed: {error}")),
        }
    }
    let mut stopping = JoinSet::new();
    for (vm, host) in vms {
        let shared = Arc::clone(shared);
        stopping.spawn(async move {
            let answer = ask(&shared, &host, &Command::Stop { vm: vm.clone() }, SHORT, |_, _| {}).await;
            let stopped = answer.map_err(|error| format!("{vm} was not stopped on {host}: {error}"));
            stopped.and_then(|_| shared.record(&mut shared.world(), RecordV1::VmStopped { vm, host }))
        });
    }
    while let Some(stopped) = stopping.join_next().await {
        if let Err(error) = stopped.unwrap_or_else(|error| Err(error.to_string())) {
            words.say(error);
        }
    }
    // Also of those that came meanwhile and were told to stop something.
    let hosts = shared.world().connected();
    for host in hosts {
        if let Err(error) = ask(shared, &host, &Command::NetworkRemove { vni }, SHORT, |_, _| {}).await {
            words.say(format!("network {vni} was not removed from {host}: {error}"));
        }
    }
    let mut world = shared.world();
    for vm in all {
        if !world.state.vms.contains_key(&vm) {
            world.seen.remove(&vm);
            world.observer.forget(&vm);
        }
    }
    if let Some(left) = ending::left(&world, name) {
        return Err(format!(
            "environment {name} is not gone yet: {left}. The rest is ended as soon as that can be told; until then {name} is listed \
             as ending, and its names and network {vni} stay taken. To be done: {}",
            ending::way_out(&world, name)
        ));
    }
    // Before it is on record, so that a kill leaves no key of what is gone; before anybody can begin one of this name, whose key
    // is kept.
    keys::forget(&shared.config.socket, name).map_err(|error| format!("{error:#}"))?;
    shared.record(&mut world, RecordV1::EnvironmentGone(name.clone()))
}

/// Waits until no plan is under way.
async fn quiet(shared: &Shared) -> Result<(), String> {
    let mut changes = shared.changes.subscribe();
    let still = async {
        while !shared.world().state.unfinished.is_empty() {
            let _ = tokio::time::timeout(Duration::from_millis(500), changes.changed()).await;
        }
    };
    let limit = Duration::from_secs(180);
    tokio::time::timeout(limit, still).await.map_err(|_| format!("moves are still under way after {limit:?}; try again later"))
}

/// An environment that is not there, in words.
pub fn unknown<'a>(name: &EnvironmentId, known: impl Iterator<Item = &'a EnvironmentId>) -> String {
    let known = known.map(ToString::to_string).collect::<Vec<_>>().join(" ");
    format!("got environment {name}, want one of: {}", if known.is_empty() { "(none is up)" } else { &known })
}

/// Opens the access namespace of an environment: where it already is, or on its head node's host.
pub async fn access(shared: &Arc<Shared>, name: &EnvironmentId) -> Result<AdaptReply, String> {
    let (host, command) = {
        let mut world = shared.world();
        let Some(known) = world.state.environments.get(name) else {
            return Err(unknown(name, world.state.environments.keys()));
        };
        if known.life == Life::Ending {
            return Err(format!("environment {name} is being ended; want one that is up"));
        }
        let spec = known.stored.spec.clone();
        let open = known.access.clone().filter(|host| world.connection(host).is_some());
        let head = world.state.vms.values().find(|vm| vm.environment == *name && vm.spec.role == Role::Head);
        let Some(host) = open.clone().or_else(|| head.map(|head| head.host.clone())) else {
            return Err(format!("{name} has no head node"));
        };
        if open.is_none() {
            shared.record(&mut world, RecordV1::AccessOpens { environment: name.clone(), host: host.clone() })?;
        }
        let command = Command::AccessOpen {
            environment: name.clone(),
            network: spec.network_spec(),
            address: spec.access_address(),
            prefix_len: spec.network.prefix_len,
        };
        (host, command)
    };
    match ask(shared, &host, &command, SHORT, |_, _| {}).await {
        Ok(Answer::Access { netns }) => Ok(AdaptReply::Access { host, netns }),
        Ok(other) => Err(format!("got the answer {other:?} of {host}, want the access namespace")),
        Err(error) => Err(format!("no access namespace on {host}: {error}")),
    }
}
