//! One VM's move: check, prepare, migrate, finish; or look where it is, clean up, end.
//!
//! ```text
//! WAITING → CHECKING → PREPARING → MIGRATING → FINISHING → ended: done
//!               │          │           │           │
//!               │          └→ CANCELLING ← LOOKING ┘ (a failure or a broken stream anywhere later)
//!               └→ ended: undone ← ──────┘   └→ FINISHING (it runs at the destination)
//! ```

use super::{Effect, LOOK_AGAIN, PATIENCE, record, tell};
use crate::plan::{Action, PlannedMove};
use crate::records::RecordV1;
use violin_common::api::adapt::{Event, Migration, Outcome};
use violin_common::control::monitor::{Answer, MigrationMode, VmSeen, VmState};
use violin_common::{HostId, Instant};

/// Why a move ended that an operator aborted.
const GIVEN_UP: &str = "given up as an operator asked";

/// What a monitor is asked for a move.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask {
    /// `PrepareIncoming`.
    Prepare,
    /// `Migrate`.
    Migrate {
        /// Where to.
        to: HostId,
        /// What the destination answered.
        uri: String,
        /// How.
        mode: MigrationMode,
    },
    /// `FinishIncoming`.
    Finish,
    /// `CancelIncoming`.
    Cancel,
    /// `AbortMigration`.
    Abort,
    /// `List`.
    Look,
    /// `Stop`, of what is left at an end where the VM does not run.
    Clear,
}

/// Whom to ask what.
pub type Asked = (HostId, Ask);

/// A monitor was asked and did not do it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AskError {
    /// It said no, in its words.
    #[error("{0}")]
    Refused(String),
    /// It is not connected, or the stream broke: what happened is not known.
    #[error("{0}")]
    Lost(String),
}

/// What one end says about the VM.
#[derive(Debug, Clone, PartialEq)]
enum Sight {
    /// Asked, not answered.
    Open,
    /// It could not be asked.
    Unknown,
    /// It answered: how the VM is there, if at all.
    Known(Option<VmSeen>),
}

#[derive(Debug, Clone, PartialEq)]
enum Phase {
    Waiting {
        not_before: Instant,
    },
    /// First the destination is asked, then the source; an end that cannot be asked is waited for.
    Checking {
        since: Instant,
        again: Option<(Instant, HostId)>,
    },
    Preparing,
    Migrating,
    Finishing,
    Looking {
        since: Instant,
        again: Option<Instant>,
        source: Sight,
        destination: Sight,
        aborted: bool,
    },
    Cancelling,
    Ended,
}

/// One VM's move under way.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) planned: PlannedMove,
    pub(super) seen: Migration,
    phase: Phase,
    why: String,
    attempts: u32,
    finish_failed: bool,
    /// An operator wants it given up; when to ask the source's hypervisor for that (again).
    given_up: Option<Instant>,
    /// Since when it is not known where the VM runs.
    in_doubt: Option<Instant>,
    back: bool,
    told: bool,
}

impl Run {
    pub(super) fn new(planned: PlannedMove, seen: Migration) -> Self {
        let phase = Phase::Waiting { not_before: Instant(0) };
        Self {
            planned,
            seen,
            phase,
            why: String::new(),
            attempts: 0,
            finish_failed: false,
            given_up: None,
            in_doubt: None,
            back: false,
            told: false,
        }
    }

    /// A move that takes back: it is tried several times before its end is told.
    pub(super) fn new_back(planned: PlannedMove, seen: Migration) -> Self {
        Self { back: true, ..Self::new(planned, seen) }
    }

    pub(super) fn resumed(now: Instant, planned: PlannedMove, seen: Migration, begun: bool, back: bool) -> Self {
        let mut run = Self { back, ..Self::new(planned, seen) };
        if run.seen.outcome != Outcome::Running {
            run.phase = Phase::Ended;
            run.told = true;
            run.attempts = u32::MAX;
        } else if begun {
            run.why = "the manager was restarted in the middle of it".into();
            // Due at once: the first tick asks both ends.
            run.look_at(now, now);
        }
        run
    }

    pub(super) fn is_waiting(&self) -> bool {
        matches!(self.phase, Phase::Waiting { .. })
    }

    pub(super) fn has_ended(&self) -> bool {
        self.phase == Phase::Ended
    }

    pub(super) fn is_active(&self) -> bool {
        !self.is_waiting() && !self.has_ended()
    }

    pub(super) fn may_start(&self, now: Instant) -> bool {
        matches!(self.phase, Phase::Waiting { not_before } if now >= not_before)
    }

    pub(super) fn undone(&self) -> Option<String> {
        match (&self.phase, &self.seen.outcome) {
            (Phase::Ended, Outcome::Undone(why)) => Some(format!("{}: {why}", self.seen.vm)),
            _ => None,
        }
    }

    /// Whether it has ended for good, all attempts counted.
    pub(super) fn is_final(&self, attempts: u32) -> bool {
        self.has_ended() && (self.seen.outcome == Outcome::Done || self.attempts >= attempts)
    }

    pub(super) fn try_again(&mut self, now: Instant, attempts: u32) {
        if self.has_ended() && !self.is_final(attempts) {
            self.seen.outcome = Outcome::Running;
            self.seen.ended = None;
            self.phase = Phase::Waiting { not_before: now + LOOK_AGAIN * 4 };
        }
    }

    pub(super) fn tell_if_final(&mut self, attempts: u32, effects: &mut Vec<Effect>) {
        if self.back && !self.told && self.is_final(attempts) {
            self.tell(effects);
        }
    }

    fn tell(&mut self, effects: &mut Vec<Effect>) {
        self.told = true;
        effects.push(record(RecordV1::MoveEnded(Box::new(self.seen.clone()))));
        effects.push(tell(Event::Ended(self.seen.clone().into())));
    }

    pub(super) fn end(&mut self, now: Instant, outcome: Outcome, effects: &mut Vec<Effect>) {
        self.phase = Phase::Ended;
        self.seen.ended = Some(now);
        self.seen.outcome = outcome;
        if !self.back {
            self.tell(effects);
        }
    }

    fn ask(&self, at: &HostId, ask: Ask, effects: &mut Vec<Effect>) {
        let (migration, vm) = (self.planned.migration, self.planned.vm.clone());
        effects.push(Effect::Ask { migration, at: at.clone(), vm, ask });
    }

    /// Records that a step begins, then asks for it.
    fn step(&mut self, now: Instant, place: u32, ask: Ask, effects: &mut Vec<Effect>) {
        effects.push(record(RecordV1::StepBegins { migration: self.planned.migration, step: place, at: now }));
        let at = self.planned.steps.get(place as usize).map_or_else(|| self.planned.to.clone(), |step| step.at.clone());
        self.ask(&at, ask, effects);
    }

    pub(super) fn start(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        self.attempts = self.attempts.saturating_add(1);
        self.phase = Phase::Checking { since: now, again: None };
        if self.seen.began.is_none() {
            self.seen.began = Some(now);
            effects.push(tell(Event::Began(self.seen.clone().into())));
        }
        self.ask(&self.planned.to, Ask::Look, effects);
    }

    /// Looks where the VM is, because what happened is not known.
    fn look(&mut self, now: Instant, why: String, effects: &mut Vec<Effect>) {
        self.why = why;
        self.look_at(now, now);
        self.tick(now, effects);
    }

    /// Asks both ends at a time to come.
    fn look_at(&mut self, now: Instant, at: Instant) {
        let since = *self.in_doubt.get_or_insert(now);
        let (source, destination) = (Sight::Unknown, Sight::Unknown);
        self.phase = Phase::Looking { since, again: Some(at), source, destination, aborted: false };
    }

    fn cancel(&mut self, why: String, effects: &mut Vec<Effect>) {
        self.why = why;
        self.phase = Phase::Cancelling;
        self.ask(&self.planned.to, Ask::Cancel, effects);
    }

    pub(super) fn give_up(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        match self.phase {
            Phase::Waiting { .. } => self.end(now, Outcome::Undone(format!("{GIVEN_UP}, before it began")), effects),
            // Before the hypervisor moves anything there is nothing to abort: the next answer ends it.
            Phase::Checking { .. } | Phase::Preparing => self.given_up = Some(now),
            Phase::Migrating => {
                self.given_up = Some(now);
                self.tick(now, effects);
            }
            Phase::Finishing | Phase::Looking { .. } | Phase::Cancelling | Phase::Ended => {}
        }
    }

    pub(super) fn tick(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        if self.phase == Phase::Migrating && self.given_up.is_some_and(|again| now >= again) {
            // Again and again: at first the hypervisor may have no job yet that it could abort.
            self.given_up = Some(now + LOOK_AGAIN);
            self.ask(&self.planned.from, Ask::Abort, effects);
        }
        if let Phase::Checking { again, .. } = &mut self.phase
            && let Some((_, at)) = again.take_if(|(again, _)| now >= *again)
        {
            self.ask(&at, Ask::Look, effects);
        }
        let Phase::Looking { again, source, destination, .. } = &mut self.phase else { return };
        if again.is_some_and(|again| now >= again) {
            (*again, *source, *destination) = (None, Sight::Open, Sight::Open);
            self.ask(&self.planned.from, Ask::Look, effects);
            self.ask(&self.planned.to, Ask::Look, effects);
        }
    }

    pub(super) fn answered(
        &mut self,
        now: Instant,
        at: &HostId,
        ask: &Ask,
        answer: Result<Answer, AskError>,
        effects: &mut Vec<Effect>,
    ) {
        match (&self.phase, ask, answer) {
            (Phase::Checking { .. }, Ask::Look, _) if self.given_up.is_some() => {
                self.end(now, Outcome::Undone(GIVEN_UP.into()), effects);
            }
            (Phase::Preparing, Ask::Prepare, _) if self.given_up.is_some() => self.cancel(GIVEN_UP.into(), effects),
            (Phase::Checking { .. }, Ask::Look, Ok(Answer::Vms(_))) if *at == self.planned.to => {
                self.ask(&self.planned.from, Ask::Look, effects);
            }
            (Phase::Checking { .. }, Ask::Look, Ok(Answer::Vms(vms))) => {
                let here = vms.iter().find(|seen| seen.vm == self.planned.vm);
                match here {
                    Some(VmSeen { state: VmState::Running, leaving: false, .. }) => {
                        self.phase = Phase::Preparing;
                        self.step(now, 0, Ask::Prepare, effects);
                    }
                    other => {
                        let got = other.map_or_else(|| "not there".into(), |seen| format!("{:?}", seen.state).to_lowercase());
                        let why = format!("{} is {got} on {at}, want it running", self.planned.vm);
                        self.end(now, Outcome::Undone(why), effects);
                    }
                }
            }
            // After a restart of the manager its monitors come back one by one: that fails no move.
            (Phase::Checking { since, .. }, Ask::Look, Err(AskError::Lost(_))) if now.since(*since) < PATIENCE => {
                self.phase = Phase::Checking { since: *since, again: Some((now + LOOK_AGAIN, at.clone())) };
            }
            (Phase::Checking { .. }, Ask::Look, other) => {
                let why = format!("{at} did not say which VMs run there: {}", words(other));
                self.end(now, Outcome::Undone(why), effects);
            }
            (Phase::Preparing, Ask::Prepare, Ok(Answer::Prepared { uri })) => {
                self.phase = Phase::Migrating;
                let mode = self.planned.steps.iter().find_map(|step| match step.action {
                    Action::Migrate(mode) => Some(mode),
                    _ => None,
                });
                let mode = mode.unwrap_or(MigrationMode::PreCopy);
                self.step(now, 1, Ask::Migrate { to: self.planned.to.clone(), uri, mode }, effects);
            }
            (Phase::Preparing, Ask::Prepare, other) => {
                self.cancel(format!("{at} did not prepare: {}", words(other)), effects);
            }
            (Phase::Migrating, Ask::Migrate { .. }, Ok(Answer::Migrated(figures))) => {
                self.seen.source = Some(figures);
                self.phase = Phase::Finishing;
                self.step(now, 2, Ask::Finish, effects);
            }
            (Phase::Migrating, Ask::Migrate { .. }, other) => {
                self.look(now, format!("{at} did not migrate: {}", words(other)), effects);
            }
            (Phase::Finishing, Ask::Finish, Ok(Answer::Arrived(figures))) => {
                self.seen.destination = Some(figures);
                self.end(now, Outcome::Done, effects);
            }
            (Phase::Finishing, Ask::Finish, other) => {
                self.finish_failed = true;
                self.look(now, format!("{at} did not finish: {}", words(other)), effects);
            }
            (Phase::Cancelling, Ask::Cancel, Err(AskError::Refused(said))) => {
                // Refused means that it runs there after all, or that something was left: look before saying so.
                if !self.why.contains("did not cancel") {
                    self.why = format!("{}; {at} did not cancel: {said}", self.why);
                }
                self.look_at(now, now + LOOK_AGAIN);
            }
            (Phase::Cancelling, Ask::Cancel, _) => {
                // An end that cannot be asked clears up when its monitor comes back.
                self.end(now, Outcome::Undone(self.why.clone()), effects);
            }
            (Phase::Looking { .. }, Ask::Look, answer) => self.seen_at(now, at, answer, effects),
            // A late answer to a question that no longer matters.
            _ => {}
        }
    }

    fn seen_at(&mut self, now: Instant, at: &HostId, answer: Result<Answer, AskError>, effects: &mut Vec<Effect>) {
        let Phase::Looking { source, destination, .. } = &mut self.phase else { return };
        let sight = match answer {
            Ok(Answer::Vms(vms)) => Sight::Known(vms.into_iter().find(|seen| seen.vm == self.planned.vm)),
            _ => Sight::Unknown,
        };
        if *at == self.planned.from {
            *source = sight;
        } else {
            *destination = sight;
        }
        if *source != Sight::Open && *destination != Sight::Open {
            self.judge(now, effects);
        }
    }

    /// Decides from what both ends say. Only a VM that is known to run at exactly one end settles it at once.
    fn judge(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let Phase::Looking { since, again, source, destination, aborted } = &mut self.phase else { return };
        let runs = |sight: &Sight| matches!(sight, Sight::Known(Some(VmSeen { state: VmState::Running, .. })));
        let absent = |sight: &Sight| matches!(sight, Sight::Known(None | Some(VmSeen { state: VmState::Stopped, .. })));
        let leaving = matches!(source, Sight::Known(Some(VmSeen { leaving: true, .. })));
        let patient = now.since(*since) < PATIENCE;
        if runs(destination) && !runs(source) {
            if matches!(source, Sight::Known(Some(VmSeen { state: VmState::Stopped, .. }))) {
                let from = self.planned.from.clone();
                self.ask(&from, Ask::Clear, effects);
            }
            if self.finish_failed {
                self.end(now, Outcome::Done, effects);
            } else {
                self.finish_failed = true;
                self.phase = Phase::Finishing;
                self.step(now, 2, Ask::Finish, effects);
            }
        } else if runs(source) && !leaving && !runs(destination) {
            match destination {
                // Also where it is not seen: a preparation may still be under way there, and the cancelling waits for it.
                Sight::Known(_) if patient => self.cancel(self.why.clone(), effects),
                _ => self.end(now, Outcome::Undone(self.why.clone()), effects),
            }
        } else if patient {
            *again = Some(now + LOOK_AGAIN);
        } else if leaving && !*aborted {
            (*aborted, *since, *again) = (true, now, Some(now + LOOK_AGAIN));
            let from = self.planned.from.clone();
            self.ask(&from, Ask::Abort, effects);
        } else if self.seen.source.is_some() && !absent(destination)
            || matches!((&*source, &*destination), (Sight::Known(None), Sight::Unknown))
        {
            // It has left its source: wherever it is to be stopped or looked for, that is its destination.
            self.end(now, Outcome::Done, effects);
        } else {
            let told = |sight: &Sight| match sight {
                Sight::Known(Some(seen)) => format!("{:?}", seen.state).to_lowercase(),
                Sight::Known(None) => "not there".into(),
                Sight::Open | Sight::Unknown => "unknown".into(),
            };
            let ends = format!("{} at {}, {} at {}", told(source), self.planned.from, told(destination), self.planned.to);
            if !absent(destination) {
                effects.push(record(RecordV1::MoveInDoubt { vm: self.planned.vm.clone(), host: self.planned.to.clone() }));
            }
            self.end(now, Outcome::Undone(format!("{}; after {PATIENCE:?} it is {ends}", self.why)), effects);
        }
    }
}

fn words(answer: Result<Answer, AskError>) -> String {
    match answer {
        Ok(Answer::Failed(said)) => said,
        Ok(other) => format!("got the answer {other:?}, which does not fit the question"),
        Err(error) => error.to_string(),
    }
}
