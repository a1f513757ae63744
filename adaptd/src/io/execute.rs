//! Plans carried out: the executor's effects done, its questions asked.

use crate::act::{Ask, AskError, Effect, Execution};
use crate::cycle::Decision;
use crate::io::monitors::{ask, read_clock};
use crate::io::world::{Shared, World};
use crate::io::{clock, reconcile};
use crate::plan::Origin;
use crate::records::RecordV1;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use violin_common::api::adapt::{Event, Migration, Outcome};
use violin_common::control::monitor::{Answer, Command};
use violin_common::{HostId, Instant, VmId};

/// Time between two looks at the executor's own clocks.
const TICK: Duration = Duration::from_millis(100);

type Answered = (u64, HostId, Ask, Result<Answer, AskError>);

/// Records and announces a plan, and starts to carry it out. `number`: of the decision, none when an operator asked.
pub fn begin(
    shared: &Arc<Shared>,
    world: &mut World,
    decision: &Decision,
    number: Option<u64>,
) -> Result<JoinHandle<Vec<Migration>>, String> {
    let now = clock::now();
    let snapshot = world.snapshot(now, &shared.config);
    let migrations = decision.plan.moves.iter().map(|moved| {
        let from = snapshot.hosts.get(&moved.from).ok_or_else(|| format!("{} is not known any more", moved.from))?;
        let to = snapshot.hosts.get(&moved.to).ok_or_else(|| format!("{} is not known any more", moved.to))?;
        Ok(Migration {
            number: moved.migration,
            vm: moved.vm.clone(),
            from: moved.from.clone(),
            to: moved.to.clone(),
            from_domain: from.domain.clone(),
            to_domain: to.domain.clone(),
            gang: decision.plan.gang.clone(),
            decision: number,
            reason: decision.proposal.reason.clone(),
            terms: decision.terms.clone(),
            driver: from.driver.clone(),
            announced: now,
            began: None,
            ended: None,
            outcome: Outcome::Running,
            demand_before: snapshot.vms.get(&moved.vm).and_then(|vm| vm.demand).unwrap_or(0.0),
            source: None,
            destination: None,
        })
    });
    let migrations = migrations.collect::<Result<Vec<_>, String>>()?;
    let (execution, effects) = Execution::begin(now, decision.plan.clone(), migrations, shared.config.notice.0);
    let mut asks = Vec::new();
    for effect in effects {
        match effect {
            Effect::Record(record) => shared.record(world, *record)?,
            Effect::Tell(event) => shared.tell(world.state.told_event(*event)),
            ask @ Effect::Ask { .. } => asks.push(ask),
        }
    }
    tracing::info!(plan = decision.plan.number, origin = ?decision.plan.origin, "{}", decision.proposal.reason);
    Ok(tokio::spawn(drive(Arc::clone(shared), execution, asks)))
}

/// Takes up the plans an earlier manager left.
pub fn resume(shared: &Arc<Shared>) -> Vec<JoinHandle<Vec<Migration>>> {
    let world = shared.world();
    let now = clock::now();
    let executions = world.state.unfinished.values().filter_map(|unfinished| {
        let execution = Execution::resume(now, unfinished, &world.state.migrations);
        tracing::info!(plan = unfinished.plan.number, "was under way when the last manager stopped: taken up");
        execution
    });
    executions.map(|execution| tokio::spawn(drive(Arc::clone(shared), execution, Vec::new()))).collect()
}

/// Carries a plan to its end; returns its migrations, moves back included.
async fn drive(shared: Arc<Shared>, mut execution: Execution, first: Vec<Effect>) -> Vec<Migration> {
    let (answers, mut answered) = mpsc::unbounded_channel::<Answered>();
    let mut ticks = tokio::time::interval(TICK);
    let mut orders = shared.give_up.subscribe();
    let mut ending = shared.ending.subscribe();
    let mut effects = first;
    loop {
        for effect in effects {
            if let Err(words) = carry_out(&shared, effect, &answers) {
                // Without its journal the manager stops; what was begun is taken up by the next one.
                tracing::error!("{words}");
                return execution.migrations().cloned().collect();
            }
        }
        if execution.has_ended() {
            let undone = execution.migrations().filter(|seen| seen.outcome != Outcome::Done);
            for host in undone.map(|seen| seen.to.clone()).collect::<BTreeSet<_>>() {
                // What was prepared there may be left if it did not answer; no observation tells of an arrival. One that is
                // away is compared at its HELLO.
                if shared.world().connection(&host).is_some() {
                    tokio::spawn(reconcile::host(Arc::clone(&shared), host));
                }
            }
            shared.changed();
            return execution.migrations().cloned().collect();
        }
        effects = tokio::select! {
            biased;
            _ = ending.wait_for(|ending| *ending) => return execution.migrations().cloned().collect(),
            Some((migration, at, ask, answer)) = answered.recv() => {
                execution.answered(clock::now(), migration, &at, &ask, answer)
            }
            // One missed among very many is asked for again by whoever wants it.
            Ok(vm) = orders.recv() => execution.give_up(clock::now(), &vm),
            _ = ticks.tick() => execution.tick(clock::now()),
        };
    }
}

fn carry_out(shared: &Arc<Shared>, effect: Effect, answers: &mpsc::UnboundedSender<Answered>) -> Result<(), String> {
    match effect {
        Effect::Record(record) => {
            let mut world = shared.world();
            if let RecordV1::MoveEnded(migration) = &*record
                && let Some(measured) = measured(&world, migration)
            {
                shared.record(&mut world, measured)?;
            }
            shared.record(&mut world, *record)?;
            drop(world);
            shared.changed();
        }
        Effect::Tell(event) => {
            let event = shared.world().state.told_event(*event);
            if let Event::Ended(seen) = &event {
                let Migration { number, vm, from, to, outcome, .. } = &seen.migration;
                let pause = seen.pause.map(|pause| format!("{:.0} ms +-{:.1}", pause.ms, pause.error_ms));
                let began = seen.began_at.map(|at| at.to_string());
                tracing::info!(migration = number, %vm, %from, %to, ?outcome, began, total_ms = seen.total_ms, pause, "move ended");
            }
            shared.tell(event);
        }
        Effect::Ask { migration, at, vm, ask: question } => {
            let (shared, answers) = (Arc::clone(shared), answers.clone());
            tokio::spawn(async move {
                let answer = question_asked(&shared, &at, &vm, &question).await;
                if let Err(error) = &answer {
                    tracing::warn!(migration, %vm, host = %at, ?question, "{error}");
                }
                let _ = answers.send((migration, at, question, answer));
            });
        }
    }
    Ok(())
}

/// What a move's figures of two hosts come to.
fn measured(world: &World, migration: &Migration) -> Option<RecordV1> {
    let (source, destination) = (migration.source.as_ref()?, migration.destination.as_ref()?);
    let span = |from: Option<Instant>, to: Option<Instant>| {
        let span = world.clocks.between((&migration.from, from?), (&migration.to, to?))?;
        Some((span.ms, span.error_ms))
    };
    let pause = span(source.stopped, destination.resumed);
    let gap = span(source.last_delivered, destination.first_read);
    Some(RecordV1::Measured { migration: migration.number, pause, gap })
}

async fn question_asked(shared: &Shared, at: &HostId, vm: &VmId, question: &Ask) -> Result<Answer, AskError> {
    let vm = vm.clone();
    let (command, limit) = match question {
        Ask::Prepare => {
            let world = shared.world();
            let spec = world.state.vms.get(&vm).map(|known| known.spec.clone());
            let spec = spec.ok_or_else(|| AskError::Refused(format!("{vm} is not known any more")))?;
            let image_sources = world.image_sources(spec.image.as_ref(), at);
            // May have to fetch an image first.
            (Command::PrepareIncoming { spec, image_sources }, 300)
        }
        Ask::Migrate { to, uri, mode } => (Command::Migrate { vm, to: to.clone(), uri: uri.clone(), mode: *mode }, 600),
        Ask::Finish => (Command::FinishIncoming { vm }, 60),
        Ask::Cancel => (Command::CancelIncoming { vm }, 60),
        Ask::Abort => (Command::AbortMigration { vm }, 30),
        Ask::Look => (Command::List, 10),
        Ask::Clear => (Command::Stop { vm }, 60),
    };
    let progress = |part: Option<f64>, doing: &str| tracing::debug!(host = %at, ?part, "{doing}");
    let answer = ask(shared, at, &command, Duration::from_secs(limit), progress).await;
    // Its figures are of a moment ago: the clock that saw them has hardly drifted since.
    if matches!(answer, Ok(Answer::Migrated(_) | Answer::Arrived(_))) && shared.world().clocks.knows(at) {
        let _ = read_clock(shared, at, 2).await;
    }
    if let (Ok(Answer::Prepared { .. }), Command::PrepareIncoming { spec, .. }) = (&answer, &command) {
        shared.world().has_image(spec.image.as_ref(), at);
    }
    answer
}

/// Whether an operator's or the policy's plan may begin.
pub fn may_begin(world: &World, origin: Origin) -> Result<(), String> {
    match (world.state.unfinished.keys().next(), origin) {
        (None, _) => Ok(()),
        (Some(plan), _) => Err(format!("plan {plan} is under way; try again when it has ended (`violin vm list` shows moves)")),
    }
}
