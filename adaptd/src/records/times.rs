//! When what is recorded was, in UTC: records hold times of the manager's monotonic clock, and beside them what time that was.

use super::{RecordV1, State};
use std::collections::BTreeMap;
use violin_common::api::adapt::{DecisionSeen, DecisionTold, Event, Migration, MigrationSeen, Span};
use violin_common::{Anchor, Instant, Utc};

/// When a moment was, and on which clock it was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Moment {
    utc: Utc,
    at: Instant,
    clock: String,
}

/// What is known of a move's times beside its record.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MoveTimes {
    announced: Option<Moment>,
    began: Option<Moment>,
    ended: Option<Moment>,
    pause: Option<Span>,
    gap: Option<Span>,
}

/// When recorded moves and decisions were.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Times {
    /// What time it was on the clock of the manager that writes; none: it is of a version that did not tell.
    anchor: Option<Anchor>,
    moves: BTreeMap<u64, MoveTimes>,
    decisions: BTreeMap<u64, Utc>,
}

impl Times {
    fn moment(&self, at: Instant) -> Option<Moment> {
        let anchor = self.anchor.as_ref()?;
        Some(Moment { utc: anchor.utc(at), at, clock: anchor.clock.clone() })
    }

    /// What time it is when the manager's clock shows `at`.
    pub fn utc(&self, at: Instant) -> Option<Utc> {
        self.anchor.as_ref().map(|anchor| anchor.utc(at))
    }

    /// Takes in one record.
    pub(super) fn apply(&mut self, record: &RecordV1) {
        match record {
            // Another start, perhaps another boot, whose clock shows another time.
            RecordV1::Generation { .. } => self.anchor = None,
            RecordV1::Clock { name, at, utc_ns } => {
                self.anchor = Some(Anchor { clock: name.clone(), at: *at, utc: Utc(*utc_ns) });
            }
            RecordV1::PlanBegins { migrations, .. } | RecordV1::PlanReturns { migrations, .. } => {
                for migration in migrations {
                    let announced = self.moment(migration.announced);
                    self.moves.entry(migration.number).or_default().announced = announced;
                }
            }
            RecordV1::StepBegins { migration, at, .. } => {
                let moment = self.moment(*at);
                let times = self.moves.entry(*migration).or_default();
                times.began = times.began.take().or(moment);
            }
            RecordV1::MoveEnded(migration) => {
                let (began, ended) =
                    (migration.began.and_then(|at| self.moment(at)), migration.ended.and_then(|at| self.moment(at)));
                let times = self.moves.entry(migration.number).or_default();
                // It looked at both ends before its first step; after a restart its record is of another clock.
                let same_clock = |seen: &Moment| ended.as_ref().is_some_and(|ended| ended.clock == seen.clock);
                if times.began.as_ref().is_none_or(same_clock) {
                    times.began = began;
                }
                times.ended = ended;
            }
            RecordV1::Measured { migration, pause, gap } => {
                let span = |measured: &Option<(f64, f64)>| measured.map(|(ms, error_ms)| Span { ms, error_ms });
                let times = self.moves.entry(*migration).or_default();
                (times.pause, times.gap) = (span(pause), span(gap));
            }
            RecordV1::Decided { decision, .. } => {
                if let Some(at) = self.utc(decision.at) {
                    self.decisions.insert(decision.number, at);
                }
            }
            _ => {}
        }
    }
}

impl State {
    /// Forgets the times of what is not kept.
    pub(super) fn forget_old_times(&mut self) {
        let Self { times, migrations, decisions, .. } = self;
        times.moves.retain(|number, _| migrations.contains_key(number));
        let first = decisions.first().map_or(0, |decision| decision.number);
        times.decisions.retain(|number, _| *number >= first);
    }

    /// A move as told.
    pub fn told(&self, migration: &Migration) -> MigrationSeen {
        let known = self.times.moves.get(&migration.number).cloned().unwrap_or_default();
        let utc = |moment: &Option<Moment>| moment.as_ref().map(|moment| moment.utc);
        let ms = |later: u64, earlier: u64| std::time::Duration::from_nanos(later.saturating_sub(earlier)).as_secs_f64() * 1e3;
        let total_ms = match (&known.began, &known.ended) {
            (Some(began), Some(ended)) if began.clock == ended.clock => Some(ms(ended.at.0, began.at.0)),
            // The machine was booted anew meanwhile.
            (Some(began), Some(ended)) => Some(ms(ended.utc.0, began.utc.0)),
            // As an earlier version recorded it.
            _ => migration
                .began
                .zip(migration.ended)
                .filter(|(began, ended)| began <= ended)
                .map(|(began, ended)| ms(ended.0, began.0)),
        };
        MigrationSeen {
            announced_at: utc(&known.announced),
            began_at: utc(&known.began),
            ended_at: utc(&known.ended).filter(|_| migration.ended.is_some()),
            total_ms: total_ms.filter(|_| migration.ended.is_some()),
            pause: known.pause,
            gap: known.gap,
            ..MigrationSeen::from(migration.clone())
        }
    }

    /// A decision as told.
    pub fn told_decision(&self, decision: &DecisionSeen) -> DecisionTold {
        DecisionTold { decision: decision.clone(), decided_at: self.times.decisions.get(&decision.number).copied() }
    }

    /// An event with the times that are known here.
    pub fn told_event(&self, event: Event) -> Event {
        match event {
            Event::Announced(seen) => Event::Announced(self.told(&seen)),
            // Its first step is recorded once both ends were looked at.
            Event::Began(seen) => {
                let began_at = seen.began.and_then(|at| self.times.utc(at));
                Event::Began(MigrationSeen { began_at, ..self.told(&seen) })
            }
            Event::Ended(seen) => Event::Ended(self.told(&seen)),
            Event::Decided(told) => Event::Decided(self.told_decision(&told)),
            other @ Event::Host { .. } => other,
        }
    }
}
