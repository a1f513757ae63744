//! Hosts' clocks: times of one host's clock are never compared with another's, but through what was measured between them.
//!
//! A host is asked what its clock shows: that was some time between the question and the answer on the manager's clock, so its
//! offset lies between two values. Several such readings narrow it down; the older one is, the more the clocks may have drifted
//! since. Source: Cristian (1989), Probabilistic clock synchronization; Marzullo (1984) for the intersection.

use std::collections::{BTreeMap, VecDeque};
use violin_common::api::adapt::Span;
use violin_common::{HostId, Instant};

/// Readings kept of a host.
const KEPT: usize = 16;
/// Most by which two clocks may drift apart, in parts per million: what NTP slews at most, and more than crystals do.
const DRIFT_PPM: i128 = 500;

/// What a host's clock showed, and when it was asked and answered on the manager's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    /// Asked.
    pub asked: Instant,
    /// Shown.
    pub at: Instant,
    /// Answered.
    pub answered: Instant,
}

impl Reading {
    /// By how much the manager's clock is ahead, at least and at most, when the host's shows `at`. In nanoseconds.
    fn offset(self, at: Instant) -> (i128, i128) {
        let shown = i128::from(self.at.0);
        let drift = (i128::from(at.0) - shown).abs() * DRIFT_PPM / 1_000_000;
        (i128::from(self.asked.0) - shown - drift, i128::from(self.answered.0) - shown + drift)
    }
}

#[derive(Debug, Default)]
struct HostClock {
    name: String,
    readings: VecDeque<Reading>,
}

/// The clocks of all hosts, as seen from the manager's.
#[derive(Debug, Default)]
pub struct Clocks {
    own: String,
    hosts: BTreeMap<HostId, HostClock>,
}

impl Clocks {
    /// Nothing read yet; `own`: the name of the manager's clock.
    pub fn new(own: String) -> Self {
        Self { own, hosts: BTreeMap::new() }
    }

    /// Takes in a reading. A clock of another name is another one: what was read of the one before says nothing of it.
    pub fn read(&mut self, host: &HostId, name: &str, reading: Reading) {
        let known = self.hosts.entry(host.clone()).or_default();
        if known.name != name {
            *known = HostClock { name: name.to_owned(), readings: VecDeque::new() };
        }
        if known.readings.len() == KEPT {
            known.readings.pop_front();
        }
        known.readings.push_back(reading);
    }

    /// Whether a host has told its clock.
    pub fn knows(&self, host: &HostId) -> bool {
        self.hosts.contains_key(host)
    }

    /// Where a time of a host's clock lies on the manager's: earliest and latest, in nanoseconds.
    fn place(&self, host: &HostId, at: Instant) -> Option<(i128, i128)> {
        let known = self.hosts.get(host)?;
        let shown = i128::from(at.0);
        if known.name == self.own {
            return Some((shown, shown));
        }
        let offsets = known.readings.iter().map(|reading| reading.offset(at));
        let (low, high) = offsets.clone().reduce(|all, one| (all.0.max(one.0), all.1.min(one.1)))?;
        // Readings that contradict each other: that machine was suspended in between. The last one is of now.
        let (low, high) = if low <= high { (low, high) } else { offsets.clone().next_back()? };
        Some((shown + low, shown + high))
    }

    /// The time from one host's moment to another's. `None`: a clock is not known.
    pub fn between(&self, from: (&HostId, Instant), to: (&HostId, Instant)) -> Option<Span> {
        let name = |host: &HostId| self.hosts.get(host).map(|known| known.name.as_str());
        let one_clock = from.0 == to.0 || name(from.0).is_some() && name(from.0) == name(to.0);
        let (least, most) = if one_clock {
            let span = i128::from(to.1.0) - i128::from(from.1.0);
            (span, span)
        } else {
            let (from, to) = (self.place(from.0, from.1)?, self.place(to.0, to.1)?);
            (to.0 - from.1, to.1 - from.0)
        };
        // What is asked for has taken some time; less than none is a matter of the error.
        let (least, most) = (least.max(0), most.max(0));
        #[allow(clippy::cast_precision_loss)] // Spans of moves: far below 2^52 ns.
        let ms = |nanoseconds: i128| nanoseconds as f64 / 1e6;
        Some(Span { ms: ms(least + most) / 2.0, error_ms: ms(most - least) / 2.0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: u64 = 1_000_000;

    fn host(number: u32) -> HostId {
        format!("h{number}").parse().unwrap()
    }

    fn reading(asked: u64, at: u64, answered: u64) -> Reading {
        Reading { asked: Instant(asked * MS), at: Instant(at * MS), answered: Instant(answered * MS) }
    }

    #[test]
    fn hosts_booted_at_different_times_give_a_true_pause_with_its_error() {
        let mut clocks = Clocks::new("manager".into());
        // Their clocks show 100 000 s more, and 5 s less; asking takes 4 ms.
        clocks.read(&host(1), "one", reading(10_000, 100_010_002, 10_004));
        clocks.read(&host(2), "two", reading(10_000, 5_002, 10_004));

        // Stopped at 10 000 ms on the manager's clock, resumed at 10 300.
        let pause = clocks.between((&host(1), Instant(100_010_000 * MS)), (&host(2), Instant(5_300 * MS))).unwrap();

        assert!((pause.ms - 300.0).abs() <= pause.error_ms && pause.error_ms < 4.5, "{pause:?}");
    }

    #[test]
    fn more_readings_narrow_it_down_and_the_quick_ones_count() {
        let mut clocks = Clocks::new("manager".into());
        clocks.read(&host(2), "manager", reading(0, 0, 0));
        clocks.read(&host(1), "one", reading(10_000, 50_090, 10_100));
        let slow = clocks.between((&host(1), Instant(50_000 * MS)), (&host(2), Instant(10_300 * MS))).unwrap();
        clocks.read(&host(1), "one", reading(10_200, 50_201, 10_202));
        let quick = clocks.between((&host(1), Instant(50_000 * MS)), (&host(2), Instant(10_300 * MS))).unwrap();

        assert!(slow.error_ms > 45.0 && quick.error_ms < 2.0, "{slow:?} {quick:?}");
        assert!((quick.ms - 300.0).abs() <= quick.error_ms, "{quick:?}");
    }

    #[test]
    fn one_clock_needs_no_measuring_and_an_unknown_one_gives_nothing() {
        let mut clocks = Clocks::new("manager".into());
        let times = (Instant(5 * MS), Instant(12 * MS));
        assert_eq!(clocks.between((&host(1), times.0), (&host(2), times.1)), None);
        assert_eq!(clocks.between((&host(1), times.0), (&host(1), times.1)), Some(Span { ms: 7.0, error_ms: 0.0 }));

        for number in [1, 2] {
            clocks.read(&host(number), "the same", reading(10, 400, 60));
        }
        assert_eq!(clocks.between((&host(1), times.0), (&host(2), times.1)), Some(Span { ms: 7.0, error_ms: 0.0 }));

        // It was booted anew: what was read before says nothing.
        clocks.read(&host(2), "another", reading(1000, 7, 1002));
        let span = clocks.between((&host(1), Instant(1340 * MS)), (&host(2), Instant(12 * MS))).unwrap();
        assert!(span.error_ms > 20.0, "{span:?}");
    }

    proptest! {
        /// Whatever the offsets, the ways and the drift, the true time lies within the error.
        #[test]
        fn the_error_is_never_exceeded(
            offsets in prop::array::uniform2(0..1_000_000_000_000_u64),
            drifts in prop::array::uniform2(-400_i64..400),
            ways in prop::collection::vec((0..50_000_000_u64, 0..50_000_000_u64, 0..60_000_000_000_u64), 1..8),
            stopped in 0..60_000_000_000_u64,
            pause in 0..10_000_000_000_u64,
        ) {
            // What a host's clock shows at a time of the manager's.
            let shows = |host: usize, at: u64| {
                let at = i128::from(at);
                Instant(u64::try_from(i128::from(offsets[host]) + at + at * i128::from(drifts[host]) / 1_000_000).unwrap())
            };
            let mut clocks = Clocks::new("manager".into());
            for number in 0..2 {
                for (there, back, asked) in &ways {
                    let reading = Reading {
                        asked: Instant(*asked),
                        at: shows(number, asked + there),
                        answered: Instant(asked + there + back),
                    };
                    clocks.read(&host(u32::try_from(number).unwrap()), ["one", "two"][number], reading);
                }
            }

            let span = clocks.between((&host(0), shows(0, stopped)), (&host(1), shows(1, stopped + pause))).unwrap();

            #[allow(clippy::cast_precision_loss)]
            let truth = pause as f64 / 1e6;
            prop_assert!((span.ms - truth).abs() <= span.error_ms + 1e-3, "{span:?}, in truth {truth}");
        }
    }
}
