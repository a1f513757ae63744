//! The executor: a plan carried out step by step, as a state machine without clock or sockets.
//!
//! Answers go in, [`Effect`]s come out and are to be done in their order: a record is on disk before the command after it
//! is sent. What a broken stream leaves open is found out by asking both ends where the VM runs; nothing is guessed.
//! `run.rs` is one VM's move; this file orders the moves, and takes a gang back that failed half-way.

mod run;
#[cfg(test)]
mod tests;

pub use run::{Ask, AskError, Asked};

use crate::plan::{Plan, PlannedMove, planned};
use crate::policy::Move;
use crate::records::{RecordV1, Unfinished};
use run::Run;
use std::collections::BTreeMap;
use std::time::Duration;
use violin_common::api::adapt::{Event, Migration, Outcome};
use violin_common::control::monitor::{Answer, MigrationMode};
use violin_common::{HostId, Instant, VmId};

/// Longest wait for an end that cannot be asked, before the move is given up.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// Time between two looks at where a VM runs.
pub const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// Times a move back is tried.
const BACK_ATTEMPTS: u32 = 5;

/// What the executor wants done.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Write this before anything that follows.
    Record(Box<RecordV1>),
    /// Ask a monitor; hand the answer to [`Execution::answered`].
    Ask {
        /// Number of the migration it is for.
        migration: u64,
        /// Whom.
        at: HostId,
        /// Which VM.
        vm: VmId,
        /// What.
        ask: Ask,
    },
    /// Tell watchers.
    Tell(Box<Event>),
}

/// One plan being carried out.
#[derive(Debug)]
pub struct Execution {
    plan: Plan,
    forward: Vec<Run>,
    back: Vec<Run>,
    returning: Option<String>,
    not_before: Instant,
    ended: bool,
}

impl Execution {
    /// Begins a plan: the effects record and announce it. Its first step comes after `notice`.
    pub fn begin(now: Instant, plan: Plan, migrations: Vec<Migration>, notice: Duration) -> (Self, Vec<Effect>) {
        let mut effects = vec![record(RecordV1::PlanBegins { plan: Box::new(plan.clone()), migrations: migrations.clone() })];
        effects.extend(migrations.iter().cloned().map(|migration| tell(Event::Announced(migration.into()))));
        let forward = plan.moves.iter().cloned().zip(migrations).map(|(planned, seen)| Run::new(planned, seen)).collect();
        let execution = Self { plan, forward, back: Vec::new(), returning: None, not_before: now + notice, ended: false };
        (execution, effects)
    }

    /// Takes up a plan that an earlier manager left: what was begun is looked for, what was not is begun. None if the
    /// journal lacks a migration of it.
    pub fn resume(now: Instant, unfinished: &Unfinished, migrations: &BTreeMap<u64, Migration>) -> Option<Self> {
        let take_up = |moves: &[PlannedMove], back: bool| -> Option<Vec<Run>> {
            let run = |planned: &PlannedMove| {
                let seen = migrations.get(&planned.migration)?.clone();
                let begun = unfinished.steps.contains_key(&planned.migration);
                Some(Run::resumed(now, planned.clone(), seen, begun, back))
            };
            moves.iter().map(run).collect()
        };
        let (back, returning) = match &unfinished.back {
            Some((moves, why)) => (take_up(moves, true)?, Some(why.clone())),
            None => (Vec::new(), None),
        };
        let forward = take_up(&unfinished.plan.moves, false)?;
        Some(Self { plan: unfinished.plan.clone(), forward, back, returning, not_before: now, ended: false })
    }

    /// Number of its plan.
    pub const fn number(&self) -> u64 {
        self.plan.number
    }

    /// Whether all its moves have ended.
    pub const fn has_ended(&self) -> bool {
        self.ended
    }

    /// Its migrations as they stand, moves back included.
    pub fn migrations(&self) -> impl Iterator<Item = &Migration> {
        self.forward.iter().chain(&self.back).map(|run| &run.seen)
    }

    /// Goes on with whatever time alone allows; to be called again and again.
    pub fn tick(&mut self, now: Instant) -> Vec<Effect> {
        let mut effects = Vec::new();
        for run in self.forward.iter_mut().chain(&mut self.back) {
            run.tick(now, &mut effects);
        }
        self.go_on(now, &mut effects);
        effects
    }

    /// Takes in a monitor's answer to an [`Effect::Ask`].
    pub fn answered(
        &mut self,
        now: Instant,
        migration: u64,
        at: &HostId,
        ask: &Ask,
        answer: Result<Answer, AskError>,
    ) -> Vec<Effect> {
        let mut effects = Vec::new();
        let run = self.forward.iter_mut().chain(&mut self.back).find(|run| run.planned.migration == migration);
        if let Some(run) = run {
            run.answered(now, at, ask, answer, &mut effects);
        }
        self.go_on(now, &mut effects);
        effects
    }

    /// An operator wants the move of this VM given up. One that has passed the point of no return goes on to its end.
    pub fn give_up(&mut self, now: Instant, vm: &VmId) -> Vec<Effect> {
        let mut effects = Vec::new();
        for run in self.forward.iter_mut().filter(|run| run.planned.vm == *vm) {
            run.give_up(now, &mut effects);
        }
        self.go_on(now, &mut effects);
        effects
    }

    fn go_on(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        if self.ended || now < self.not_before {
            return;
        }
        if self.plan.gang.is_some()
            && self.returning.is_none()
            && let Some(failed) = self.forward.iter().find_map(Run::undone)
        {
            let why = format!("the gang of {} gave up: {failed}", failed_environment(&self.plan));
            for run in self.forward.iter_mut().filter(|run| run.is_waiting()) {
                run.end(now, Outcome::Undone(format!("not begun: {why}")), effects);
            }
            self.returning = Some(why);
        }
        start(&mut self.forward, self.plan.parallel, now, effects);
        if self.forward.iter().any(|run| !run.has_ended()) {
            return;
        }
        if self.back.is_empty()
            && let Some(why) = self.returning.clone()
        {
            self.turn_back(now, &why, effects);
        }
        for run in &mut self.back {
            run.try_again(now, BACK_ATTEMPTS);
        }
        start(&mut self.back, 1, now, effects);
        for run in &mut self.back {
            run.tell_if_final(BACK_ATTEMPTS, effects);
        }
        if self.back.iter().all(|run| run.is_final(BACK_ATTEMPTS)) {
            self.ended = true;
            effects.push(record(RecordV1::PlanEnded { plan: self.plan.number }));
        }
    }

    /// Plans the moves back of what a failed gang has moved.
    fn turn_back(&mut self, now: Instant, why: &str, effects: &mut Vec<Effect>) {
        let first = self.forward.iter().map(|run| run.planned.migration).max().unwrap_or(0) + 1;
        let done = self.forward.iter().filter(|run| run.seen.outcome == Outcome::Done);
        for (next, run) in (first..).zip(done) {
            let was = &run.seen;
            let moved = Move { vm: was.vm.clone(), from: was.to.clone(), to: was.from.clone() };
            let seen = Migration {
                number: next,
                from: was.to.clone(),
                to: was.from.clone(),
                from_domain: was.to_domain.clone(),
                to_domain: was.from_domain.clone(),
                reason: format!("returns: {why}"),
                terms: Vec::new(),
                announced: now,
                began: None,
                ended: None,
                outcome: Outcome::Running,
                source: None,
                destination: None,
                ..was.clone()
            };
            self.back.push(Run::new_back(planned(&moved, next, mode(&run.planned)), seen));
        }
        let migrations: Vec<_> = self.back.iter().map(|run| run.seen.clone()).collect();
        effects.push(record(RecordV1::PlanReturns {
            plan: self.plan.number,
            back: self.back.iter().map(|run| run.planned.clone()).collect(),
            migrations: migrations.clone(),
            why: why.into(),
        }));
        effects.extend(migrations.into_iter().map(|migration| tell(Event::Announced(migration.into()))));
    }
}

fn record(record: RecordV1) -> Effect {
    Effect::Record(Box::new(record))
}

fn tell(event: Event) -> Effect {
    Effect::Tell(Box::new(event))
}

fn failed_environment(plan: &Plan) -> String {
    plan.gang.as_ref().map(ToString::to_string).unwrap_or_default()
}

fn mode(planned: &PlannedMove) -> MigrationMode {
    let mode = planned.steps.iter().find_map(|step| match step.action {
        crate::plan::Action::Migrate(mode) => Some(mode),
        _ => None,
    });
    mode.unwrap_or(MigrationMode::PreCopy)
}

/// Starts waiting moves in their order, as many as may be under way at once, one per source.
fn start(runs: &mut [Run], parallel: u32, now: Instant, effects: &mut Vec<Effect>) {
    for next in 0..runs.len() {
        let active: Vec<_> = runs.iter().filter(|run| run.is_active()).collect();
        let busy = active.iter().any(|run| run.planned.from == runs[next].planned.from);
        if active.len() >= parallel as usize {
            return;
        }
        if !busy && runs[next].may_start(now) {
            runs[next].start(now, effects);
        }
    }
}
