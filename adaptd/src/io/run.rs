//! The manager's life: journal, socket, monitors, cycle; and a clean end.

use crate::cycle::{Decision, cycle};
use crate::io::journal::Journal;
use crate::io::secrets::Secrets;
use crate::io::world::{Shared, World};
use crate::io::{api, clock, execute, keys, monitors, reconcile};
use crate::plan::{Origin, Stamp};
use crate::policy::Refusal;
use crate::records::{Life, RecordV1, mode_at_start};
use anyhow::{Context, anyhow, bail};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use violin_channel::start::folder_of_can_be;
use violin_channel::tls::{Credentials, Timing};
use violin_channel::{local, quic};
use violin_common::api::adapt::{DecisionSeen, Event, Mode, Term};
use violin_common::config::adapt::AdaptConfig;
use violin_common::{EnvironmentId, Instant};

/// Least time between two records of refusals alone.
const REFUSALS: Duration = Duration::from_secs(10);
/// Most refusals written with one decision.
const MOST_REFUSALS: usize = 50;

/// Whether a start would work, as far as can be told without starting: another manager may run.
pub fn check(config: &AdaptConfig) -> anyhow::Result<()> {
    Credentials::load(&config.tls)?.must_be_valid(SystemTime::now())?;
    folder_of_can_be(&config.socket).and_then(|()| local::must_be_socket(&config.socket)).context("key `socket`")?;
    Journal::check(&config.journal).context("key `journal`")
}

/// Runs until `stop` ends or the journal fails; `dry_run`: whatever mode the journal and the configuration say.
pub async fn run(config: AdaptConfig, dry_run: bool, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    let credentials = Arc::new(Credentials::load(&config.tls)?);
    if let Err(error) = credentials.must_be_valid(SystemTime::now()) {
        tracing::error!("the certificate will be refused by everybody: {error}");
    }
    let (journal, state) = Journal::open(&config.journal, clock::now())?;
    tracing::info!(generation = journal.generation(), environments = state.environments.len(), "journal read");
    let mut stop = std::pin::pin!(stop);
    let endpoint = tokio::select! {
        opened = quic::listen_patiently(config.listen, credentials, quic::alpn::MONITOR, Timing::CALM) => opened?,
        () = &mut stop => return Ok(()),
    };
    let listener = local::bind(&config.socket)?;
    keys::tidy(&config.socket)?;
    for name in journal.gone() {
        keys::forget(&config.socket, name)?;
    }
    for (name, environment) in &state.environments {
        if environment.stored.keys.private.is_empty() {
            let wanted = Secrets::beside(&config.journal).path(name);
            tracing::error!(
                "the private key of environment {name} is missing: want it in {}; restore it from a copy and start adaptd anew. Until \
                 then nobody enters {name} with it, and what moves is not told it",
                wanted.display()
            );
            continue;
        }
        keys::store(&config.socket, name, &environment.stored.keys)?;
    }
    let (mode, why) = mode_at_start(dry_run, state.mode, config.mode);
    let shared = Arc::new(Shared::new(config, journal, state, mode));
    shared.record_time(&mut shared.world()).map_err(|words| anyhow!(words))?;
    let (listen, socket) = (shared.config.listen, shared.config.socket.display());
    tracing::info!(%listen, %socket, ?mode, mode_from = why, "adaptd runs");
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(monitors::serve(Arc::clone(&shared), endpoint.clone()));
    let answering = Arc::clone(&shared);
    tasks.spawn(local::serve(listener, move |request, sink| api::answer(Arc::clone(&answering), request, sink)));
    drop(execute::resume(&shared));
    tasks.spawn(cycles(Arc::clone(&shared)));
    tokio::spawn(reconcile::leftovers(Arc::clone(&shared)));
    let mut fatal = shared.fatal.subscribe();
    let ended = tokio::select! {
        () = &mut stop => Ok(()),
        reason = fatal.wait_for(Option::is_some) => match reason {
            Ok(reason) => bail!("{}", reason.clone().unwrap_or_default()),
            Err(error) => Err(error).context("waiting for the end"),
        },
        Some(task) = tasks.join_next() => bail!("a part of the manager ended: {task:?}"),
    };
    tracing::info!("adaptd ends; moves under way are taken up at the next start");
    // Before any connection closes, or every question open would count as failed and undo its move.
    shared.ending.send_replace(true);
    tasks.shutdown().await;
    endpoint.close("adaptd ends").await;
    ended
}

async fn cycles(shared: Arc<Shared>) {
    let mut period = tokio::time::interval(shared.config.period.0);
    period.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        period.tick().await;
        let mut world = shared.world();
        if let Err(words) = shared.record_time(&mut world) {
            tracing::error!("{words}");
        }
        if let Err(words) = once(&shared, &mut world, clock::now()) {
            tracing::error!("{words}");
        }
    }
}

/// What the next plan is stamped with.
pub fn stamp(shared: &Shared, world: &World) -> Stamp {
    Stamp {
        generation: world.journal.generation(),
        number: world.state.plans + 1,
        first_migration: world.state.next_migration(),
        parallel: shared.config.parallel,
        mode: shared.config.migration,
    }
}

/// One cycle: think, write down, act.
fn once(shared: &Arc<Shared>, world: &mut World, now: Instant) -> Result<(), String> {
    if world.mode == Mode::Observe || execute::may_begin(world, Origin::Policy).is_err() {
        // Whatever the picture was, it is another one afterwards.
        world.settling = crate::cycle::Settling::default();
        return Ok(());
    }
    let snapshot = world.snapshot(now, &shared.config);
    let busy: Vec<_> = world.state.environments.iter().filter_map(|(name, known)| busy(world, name, known.life)).collect();
    if !busy.is_empty() {
        world.settling = crate::cycle::Settling::default();
        world.refusals.clone_from(&busy);
        return refused(shared, world, now, &busy, &snapshot.to_string());
    }
    let stamp = stamp(shared, world);
    let mut thought = cycle(now, &snapshot, &shared.config.policy, &mut world.settling, stamp);
    let twice = world.twice.iter().map(|(vm, second)| Refusal::RunsTwice { vm: vm.clone(), second: second.clone() });
    thought.thought.refusals.extend(twice);
    world.refusals.clone_from(&thought.thought.refusals);
    tracing::debug!("{}", thought.thought.before);
    match &thought.decision {
        Some(decision) => {
            let seen = seen(world, now, decision, &thought.thought.refusals);
            let same = world.state.decisions.iter().rev().find(|last| !last.moves.is_empty());
            if world.mode == Mode::DryRun && same.is_some_and(|last| last.moves == seen.moves && last.mode == Mode::DryRun) {
                return Ok(());
            }
            let number = seen.number;
            write_down(shared, world, seen, snapshot.to_string())?;
            if world.mode == Mode::Act {
                drop(execute::begin(shared, world, decision, Some(number))?);
            }
            Ok(())
        }
        None => refused(shared, world, now, &thought.thought.refusals, &snapshot.to_string()),
    }
}

/// An environment that comes or goes changes the picture: until it is up or gone nothing is decided. What one has left on a host
/// that is away may stay there for days.
fn busy(world: &World, environment: &EnvironmentId, life: Life) -> Option<Refusal> {
    let waits = world.finishing.iter().any(|(name, _)| name == environment);
    let doing = match life {
        Life::Up => return None,
        Life::Starting => "started",
        Life::Ending if waits || !world.being_ended.contains(environment) => return None,
        Life::Ending => "ended",
    };
    Some(Refusal::Busy { environment: environment.clone(), doing })
}

fn write_down(shared: &Shared, world: &mut World, seen: DecisionSeen, snapshot: String) -> Result<(), String> {
    tracing::info!(decision = seen.number, mode = ?seen.mode, moves = ?seen.moves, "{}", seen.reason);
    shared.record(world, RecordV1::Decided { decision: Box::new(seen.clone()), snapshot })?;
    shared.tell(Event::Decided(world.state.told_decision(&seen)));
    Ok(())
}

fn seen(world: &World, now: Instant, decision: &Decision, refusals: &[Refusal]) -> DecisionSeen {
    DecisionSeen {
        number: world.state.next_decision(),
        at: now,
        mode: world.mode,
        policy: "violin".into(),
        moves: decision.proposal.moves.iter().map(|moved| format!("{} from {} to {}", moved.vm, moved.from, moved.to)).collect(),
        reason: decision.proposal.reason.clone(),
        terms: decision.terms.clone(),
        refusals: refusals.iter().take(MOST_REFUSALS).map(ToString::to_string).collect(),
    }
}

/// Writes down what a cycle refused, when that is something new.
fn refused(shared: &Shared, world: &mut World, now: Instant, refusals: &[Refusal], snapshot: &str) -> Result<(), String> {
    let settled = |refusal: &&Refusal| !matches!(refusal, Refusal::Unsettled { .. });
    let set: BTreeSet<_> = refusals.iter().filter(settled).cloned().collect();
    let (last, at) = &world.refusals_written;
    if world.state.vms.is_empty() || set.is_empty() || set == *last || (now.since(*at) < REFUSALS && !last.is_empty()) {
        return Ok(());
    }
    let score = crate::score::score(&world.snapshot(now, &shared.config), &shared.config.policy);
    let spread = Term {
        name: "spread of host scores".into(),
        before: score.spread,
        after: score.spread,
        unit: "high-demand VMs per core".into(),
    };
    let seen = DecisionSeen {
        number: world.state.next_decision(),
        at: now,
        mode: world.mode,
        policy: "violin".into(),
        moves: Vec::new(),
        reason: format!("nothing to be done: {score}"),
        terms: vec![spread],
        refusals: set.iter().take(MOST_REFUSALS).map(ToString::to_string).collect(),
    };
    world.refusals_written = (set, now);
    write_down(shared, world, seen, snapshot.to_owned())
}
