//! Whether to look again at once when nothing is there, or to sleep until something comes.
//!
//! Being woken costs tens of microseconds, more than what is then done for a small frame. A worker that has been given work at
//! short intervals therefore looks again for a while, and lets others run in between; one that has not sleeps.

use std::time::Duration;
use violin_common::Instant;

/// How long it looks after the last work at most.
pub const LONGEST: Duration = Duration::from_micros(100);
/// Bytes in one go from which on more will have come by the time it is woken: what they gain by being taken together is more than
/// what they lose by waiting.
const BULK: usize = 16 << 10;
/// Short intervals in a row after which it looks.
const SURE: u8 = 4;
/// Short intervals that are remembered at most: so many long ones, halving, are forgiven.
const SUREST: u8 = 32;

/// See the head of this file.
#[derive(Debug, Clone, Copy)]
pub struct Spin {
    worked: Instant,
    short: u8,
}

impl Spin {
    /// Sleeps, as long as nothing is known.
    pub const fn new(now: Instant) -> Self {
        Self { worked: now, short: 0 }
    }

    /// There was work, of so many bytes, and it is done.
    pub fn worked(&mut self, found: Instant, done: Instant, bytes: usize) {
        if bytes >= BULK {
            self.short = 0;
        } else if found.since(self.worked) <= LONGEST {
            self.short = (self.short + 1).min(SUREST);
        } else {
            self.short /= 2;
        }
        self.worked = done;
    }

    /// Whether to look again now, rather than sleep.
    pub fn goes_on(&self, now: Instant) -> bool {
        self.short >= SURE && now.since(self.worked) < LONGEST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(micros: u64) -> Instant {
        Instant(micros * 1000)
    }

    #[test]
    fn it_looks_again_after_work_at_short_intervals_and_sleeps_when_it_is_idle() {
        let mut spin = Spin::new(at(0));
        assert!(!spin.goes_on(at(1)));
        for round in 1..=40 {
            spin.worked(at(round * 50), at(round * 50 + 5), 100);
        }
        assert!(spin.goes_on(at(40 * 50 + 100)));
        assert!(!spin.goes_on(at(40 * 50 + 105)), "so long and no longer");
        // Work every millisecond is worth no looking.
        for round in 10..20 {
            spin.worked(at(round * 1000), at(round * 1000 + 5), 100);
        }
        assert!(!spin.goes_on(at(19 * 1000 + 6)));
    }

    #[test]
    fn it_sleeps_after_bulk_however_often_that_comes() {
        let mut spin = Spin::new(at(0));
        for round in 1..=40 {
            spin.worked(at(round * 50), at(round * 50 + 5), if round % 3 == 0 { 64_000 } else { 60 });
            assert!(!spin.goes_on(at(round * 50 + 6)));
        }
    }
}
