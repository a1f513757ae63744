//! The local socket: operators' requests answered, with progress where it takes time.

use crate::cycle::decide;
use crate::explain;
use crate::io::environments::{access, down, unknown, up};
use crate::io::monitors::ask;
use crate::io::progress::Words;
use crate::io::run::stamp;
use crate::io::world::Shared;
use crate::io::{clock, execute, hosts, progress, strays};
use crate::model::{Snapshot, Standing};
use crate::plan::Origin;
use crate::policy::{Move, Proposal, violin};
use crate::records::{KeptMode, RecordV1};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use violin_channel::local::Sink;
use violin_common::VmId;
use violin_common::api::Response;
use violin_common::api::adapt::{AdaptReply, AdaptRequest, AdaptStatus, Condition, Event, Outcome};
use violin_common::control::monitor::{Answer, Command};

/// Longest wait for the end of a move that is given up: what takes longer waits for a host that may not answer for minutes.
const ABORT: Duration = Duration::from_secs(3);

/// Answers one request.
pub async fn answer(shared: Arc<Shared>, request: AdaptRequest, sink: Sink<AdaptReply>) {
    let result = match request {
        AdaptRequest::Watch => return watch(&shared, &sink).await,
        AdaptRequest::EnvUp { spec, placement, image } => {
            let (words, telling) = words_to(&sink);
            let result = up(&shared, spec, placement, image, &words).await;
            done(result, words, telling).await
        }
        AdaptRequest::EnvDown { environment } => {
            let (words, telling) = words_to(&sink);
            let result = down(&shared, &environment, &words).await;
            done(result, words, telling).await
        }
        AdaptRequest::EnvDestroy { environment } => {
            let (words, telling) = words_to(&sink);
            let result = strays::destroy(&shared, &environment, &words).await;
            done(result, words, telling).await
        }
        AdaptRequest::EnvMove { environment, to } => {
            let proposal = |snapshot: &Snapshot| {
                if !snapshot.environments.contains_key(&environment) {
                    return Err(unknown(&environment, snapshot.environments.keys()));
                }
                if snapshot.hosts.values().all(|host| host.domain != to) {
                    return Err(format!("got domain {to}, want one of: {}", crate::place::domains(snapshot)));
                }
                // An operator may overload cores: what the policy would refuse for want of them is found without them.
                let policy = &shared.config.policy;
                let gang = violin::gang(snapshot, policy, &environment, &to)
                    .or_else(|_| violin::gang(&roomy(snapshot), policy, &environment, &to))
                    .map_err(|refusal| refusal.to_string())?;
                let reason = format!("an operator asked to move {environment} to {to}");
                Ok(Proposal { moves: gang.moves, gang: Some(environment.clone()), reason })
            };
            moved(&shared, &sink, proposal).await
        }
        AdaptRequest::VmMigrate { vm, to } => {
            let proposal = |snapshot: &Snapshot| {
                let known = snapshot.vms.get(&vm).ok_or_else(|| no_vm(&vm, snapshot))?;
                let moves = vec![Move { vm: vm.clone(), from: known.host.clone(), to: to.clone() }];
                Ok(Proposal { moves, gang: None, reason: format!("an operator asked to move {vm} to {to}") })
            };
            moved(&shared, &sink, proposal).await
        }
        AdaptRequest::VmAbort { vm } => abort(&shared, &sink, &vm).await,
        AdaptRequest::Access { environment } => access(&shared, &environment).await,
        AdaptRequest::Switch { host, request } => {
            let command = Command::Switch(request);
            let known = hosts::is_known(&shared.world(), &host);
            if let Err(words) = known {
                let _ = sink.finish(Err(words)).await;
                return;
            }
            match ask(&shared, &host, &command, Duration::from_secs(30), |_, _| {}).await {
                Ok(Answer::Switch(Ok(reply))) => Ok(AdaptReply::Switch(reply)),
                Ok(Answer::Switch(Err(words))) => Err(format!("the switch of {host}: {words}")),
                Ok(other) => Err(format!("got the answer {other:?} of {host}, want its switch's")),
                Err(error) => Err(error.to_string()),
            }
        }
        other => at_once(&shared, other),
    };
    // Whoever hung up does not want to know.
    let _ = sink.finish(result).await;
}

/// Requests that need nobody else.
fn at_once(shared: &Shared, request: AdaptRequest) -> Result<AdaptReply, String> {
    let now = clock::now();
    let mut world = shared.world();
    Ok(match request {
        AdaptRequest::Status => AdaptReply::Status(AdaptStatus {
            version: env!("CARGO_PKG_VERSION").into(),
            policy: "violin".into(),
            mode: world.mode,
            generation: world.journal.generation(),
            hosts: count(world.connected().len()),
            vms: count(world.state.vms.len()),
            moving: count(world.state.migrations.values().filter(|seen| seen.outcome == Outcome::Running).count()),
            log_lines_lost: violin_channel::log::lines_lost(),
        }),
        AdaptRequest::SetMode(mode) => {
            let kept = KeptMode { set: mode, configured: shared.config.mode };
            if world.state.mode != Some(kept) {
                shared.record(&mut world, RecordV1::ModeSet(kept))?;
            }
            tracing::info!(?mode, "mode set");
            world.mode = mode;
            AdaptReply::Done
        }
        AdaptRequest::EnvAdopt { environment } => AdaptReply::Words(strays::adopt(shared, &mut world, &environment)?),
        AdaptRequest::StrayList => AdaptReply::Strays(strays::list(&world)),
        AdaptRequest::EnvList => AdaptReply::Environments(progress::list(shared, &world, now)),
        AdaptRequest::HostList => AdaptReply::Hosts(world.list_hosts(now, &shared.config)),
        AdaptRequest::HostDrain { host } => hosts::drain(shared, &mut world, &host, true)?,
        AdaptRequest::HostUndrain { host } => hosts::drain(shared, &mut world, &host, false)?,
        AdaptRequest::HostForget { host, vms_are_lost } => hosts::forget(shared, &mut world, &host, vms_are_lost)?,
        AdaptRequest::VmList => AdaptReply::Vms(world.list_vms(now, &shared.config, None)),
        AdaptRequest::MigrationList => {
            AdaptReply::Migrations(world.state.migrations.values().map(|migration| world.state.told(migration)).collect())
        }
        AdaptRequest::DecisionList { last } => {
            let skip = world.state.decisions.len().saturating_sub(last as usize);
            AdaptReply::Decisions(world.state.decisions.iter().skip(skip).map(|one| world.state.told_decision(one)).collect())
        }
        AdaptRequest::Why { vm } => {
            let known = world.condition(now, &vm, &shared.config) != Condition::Unknown;
            let sight = if known { explain::Sight::Known } else { explain::Sight::Lost(world.heard_of(now, &vm)) };
            let mut why = explain::why(&world.state, &vm, sight, &world.refusals, now)?;
            if let Some(moving) = world.state.move_of(&vm).filter(|moving| world.giving_up.contains(&moving.number)) {
                let now = world.state.giving_up(moving).unwrap_or_else(|too_late| too_late);
                why.push_str(&format!("An operator asked to give that up: {now}.\n"));
            }
            AdaptReply::Words(why)
        }
        other => return Err(format!("got {other:?}, which is answered elsewhere")),
    })
}

fn count(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

fn no_vm(vm: &VmId, snapshot: &Snapshot) -> String {
    let all = snapshot.vms.keys().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    format!("got VM {vm}, want one of: {}", if all.is_empty() { "(there is none)" } else { &all })
}

/// The same with more cores than anybody wants.
fn roomy(snapshot: &Snapshot) -> Snapshot {
    let mut roomy = snapshot.clone();
    let wanted: u32 = snapshot.vms.values().map(|vm| vm.vcpus).sum();
    for host in roomy.hosts.values_mut().filter(|host| host.standing == Standing::Live) {
        host.cores += f64::from(wanted);
    }
    roomy
}

/// Progress in words, each of which becomes a line.
fn words_to(sink: &Sink<AdaptReply>) -> (Words, JoinHandle<()>) {
    let (told, mut heard) = mpsc::unbounded_channel::<String>();
    let lines = sink.clone();
    let telling = tokio::spawn(async move {
        while let Some(words) = heard.recv().await {
            if lines.send(Response::Ok(AdaptReply::Progress(words))).await.is_err() {
                return;
            }
        }
    });
    (Words::to(told), telling)
}

/// The last answer comes after all progress.
async fn done(result: Result<(), String>, words: Words, telling: JoinHandle<()>) -> Result<AdaptReply, String> {
    drop(words);
    let _ = telling.await;
    result.map(|()| AdaptReply::Done)
}

/// Plans, checks and carries out an operator's move, the same way as the policy's.
async fn moved(
    shared: &Arc<Shared>,
    sink: &Sink<AdaptReply>,
    proposal: impl Fn(&Snapshot) -> Result<Proposal, String>,
) -> Result<AdaptReply, String> {
    let mut events = shared.events.subscribe();
    let mut work = {
        let mut world = shared.world();
        execute::may_begin(&world, Origin::Operator)?;
        let snapshot = world.snapshot(clock::now(), &shared.config);
        let stamp = stamp(shared, &world);
        let decision = decide(&snapshot, &shared.config.policy, proposal(&snapshot)?, Origin::Operator, stamp)
            .map_err(|violation| violation.to_string())?;
        execute::begin(shared, &mut world, &decision, None)?
    };
    loop {
        tokio::select! {
            migrations = &mut work => {
                let migrations = migrations.map_err(|error| format!("carrying out the plan broke off: {error}"))?;
                let world = shared.world();
                return Ok(AdaptReply::Migrations(migrations.iter().map(|one| world.state.told(one)).collect()));
            }
            event = events.recv() => {
                let words = match event {
                    Ok(Event::Began(seen)) => format!("{} leaves {} for {}", seen.vm, seen.from, seen.to),
                    Ok(Event::Ended(seen)) => match &seen.outcome {
                        Outcome::Undone(why) => format!("{}: undone: {why}", seen.vm),
                        _ => format!("{} runs on {}", seen.vm, seen.to),
                    },
                    _ => continue,
                };
                // The move goes on without whoever hung up.
                let _ = sink.send(Response::Ok(AdaptReply::Progress(words))).await;
            }
        }
    }
}

/// Has a move given up, says what that waits for, and waits for its end, whichever that is; but not for long.
async fn abort(shared: &Shared, sink: &Sink<AdaptReply>, vm: &VmId) -> Result<AdaptReply, String> {
    let mut changes = shared.changes.subscribe();
    let (number, words) = {
        let mut world = shared.world();
        let running = world.state.move_of(vm);
        let running = running.ok_or_else(|| format!("got {vm}, want a VM that is being moved (`violin vm list` shows moves)"))?;
        let (number, words) = (running.number, world.state.giving_up(running)?);
        world.giving_up.insert(number);
        // Nobody listens if the plan has ended this instant: then its end is on record below.
        let _ = shared.give_up.send(vm.clone());
        (number, words)
    };
    tracing::info!("{words}");
    let _ = sink.send(Response::Ok(AdaptReply::Progress(words))).await;
    let seen = || {
        let world = shared.world();
        let seen = world.state.migrations.get(&number).map(|migration| world.state.told(migration));
        seen.ok_or_else(|| format!("move {number} of {vm} is no longer on record"))
    };
    let end = async {
        while seen()?.outcome == Outcome::Running {
            changes.changed().await.map_err(|_| "the manager ends")?;
        }
        Ok::<(), String>(())
    };
    if let Ok(ended) = tokio::time::timeout(ABORT, end).await {
        ended?;
    }
    Ok(AdaptReply::Migrations(vec![seen()?]))
}

async fn watch(shared: &Shared, sink: &Sink<AdaptReply>) {
    let mut events = shared.events.subscribe();
    loop {
        let event = tokio::select! {
            event = events.recv() => event,
            () = sink.closed() => return,
        };
        match event {
            Ok(event) => {
                if sink.send(Response::Ok(AdaptReply::Event(event))).await.is_err() {
                    return;
                }
            }
            Err(RecvError::Lagged(missed)) => tracing::warn!(missed, "a watcher reads too slowly"),
            Err(RecvError::Closed) => return,
        }
    }
}
