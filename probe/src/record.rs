//! What a guest received: numbered frames by run, and canaries by tag. Bounded, whatever arrives.

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};

/// Runs remembered; the oldest is forgotten first.
pub const MAX_RUNS: usize = 64;
/// Ranges of numbers remembered per run; a frame that would make one more is counted as unrecorded.
pub const MAX_RANGES: usize = 100_000;
/// Foreign tags told apart; further ones are only counted.
const MAX_TAGS: usize = 64;
/// Ranges of lost numbers written out.
const MAX_SHOWN: usize = 1000;

/// What was received of one run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Run {
    /// Numbers received, as inclusive ranges, ascending, apart from each other.
    ranges: Vec<(u64, u64)>,
    last_sent: Option<u64>,
    received: u64,
    reordered: u64,
    duplicated: u64,
    unrecorded: u64,
    first: Option<(u64, u64)>,
    last: Option<(u64, u64)>,
    gap: Option<Gap>,
}

/// The longest time without a frame of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// Number received before it.
    pub before: u64,
    /// Number received after it.
    pub after: u64,
    /// When the frame before it came, ns of the receiver's clock.
    pub from_ns: u64,
    /// When the frame after it came, ns of the receiver's clock.
    pub to_ns: u64,
}

/// A run as it is told to whoever asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunReport {
    /// The run.
    pub run: u64,
    /// Numbers received, each once.
    pub received: u64,
    /// Numbers from 0 to the last sent, or the highest received while the end is not known, that never came.
    pub lost: u64,
    /// They, as inclusive ranges; the first thousand.
    pub lost_ranges: Vec<(u64, u64)>,
    /// Frames that came after a higher number.
    pub reordered: u64,
    /// Frames that came again.
    pub duplicated: u64,
    /// Frames that did not fit into the record.
    pub unrecorded: u64,
    /// Whether the prober's end of the run arrived.
    pub ended: bool,
    /// First number received and when, ns of the receiver's monotonic clock.
    pub first: Option<(u64, u64)>,
    /// Last number received and when.
    pub last: Option<(u64, u64)>,
    /// Longest time without a frame.
    pub gap: Option<Gap>,
}

impl Run {
    /// Notes a frame's arrival at `now_ns` of the receiver's clock.
    pub fn receive(&mut self, number: u64, now_ns: u64) {
        let after = self.ranges.partition_point(|range| range.1 < number);
        if self.ranges.get(after).is_some_and(|range| range.0 <= number) {
            self.duplicated += 1;
            return;
        }
        let joins_left = after > 0 && self.ranges[after - 1].1 + 1 == number;
        let joins_right = self.ranges.get(after).is_some_and(|range| number + 1 == range.0);
        let is_late = after < self.ranges.len();
        match (joins_left, joins_right) {
            (true, true) => {
                self.ranges[after - 1].1 = self.ranges[after].1;
                self.ranges.remove(after);
            }
            (true, false) => self.ranges[after - 1].1 = number,
            (false, true) => self.ranges[after].0 = number,
            (false, false) if self.ranges.len() >= MAX_RANGES => {
                self.unrecorded += 1;
                return;
            }
            (false, false) => self.ranges.insert(after, (number, number)),
        }
        self.received += 1;
        self.reordered += u64::from(is_late);
        if let Some((before, from_ns)) = self.last {
            let longest = self.gap.map_or(0, |gap| gap.to_ns.saturating_sub(gap.from_ns));
            if now_ns.saturating_sub(from_ns) > longest {
                self.gap = Some(Gap { before, after: number, from_ns, to_ns: now_ns });
            }
        }
        self.first.get_or_insert((number, now_ns));
        self.last = Some((number, now_ns));
    }

    /// Notes the end of the run.
    pub const fn end(&mut self, last: u64) {
        self.last_sent = Some(last);
    }

    /// The run in figures.
    pub fn report(&self, run: u64) -> RunReport {
        let highest = self.ranges.last().map(|range| range.1);
        let mut lost = 0u64;
        let mut lost_ranges = Vec::new();
        if let Some(top) = self.last_sent.max(highest) {
            let mut next = Some(0);
            let beyond = top.checked_add(1).map(|start| (start, start));
            for (start, end) in self.ranges.iter().copied().chain(beyond) {
                if let Some(from) = next.filter(|from| *from < start) {
                    lost = lost.saturating_add(start - from);
                    if lost_ranges.len() < MAX_SHOWN {
                        lost_ranges.push((from, start - 1));
                    }
                }
                next = end.checked_add(1);
            }
        }
        RunReport {
            run,
            received: self.received,
            lost,
            lost_ranges,
            reordered: self.reordered,
            duplicated: self.duplicated,
            unrecorded: self.unrecorded,
            ended: self.last_sent.is_some(),
            first: self.first,
            last: self.last,
            gap: self.gap,
        }
    }
}

/// The runs of all probers.
#[derive(Debug, Clone, Default)]
pub struct Runs {
    runs: BTreeMap<u64, Run>,
    order: VecDeque<u64>,
}

impl Runs {
    /// The record of a run, made if it is new.
    pub fn entry(&mut self, run: u64) -> &mut Run {
        if !self.runs.contains_key(&run) {
            if self.order.len() >= MAX_RUNS
                && let Some(oldest) = self.order.pop_front()
            {
                self.runs.remove(&oldest);
            }
            self.order.push_back(run);
        }
        self.runs.entry(run).or_default()
    }

    /// The figures of a run, if any of it was received.
    pub fn report(&self, run: u64) -> Option<RunReport> {
        self.runs.get(&run).map(|record| record.report(run))
    }

    /// Runs remembered, the oldest first.
    pub fn known(&self) -> Vec<u64> {
        self.order.iter().copied().collect()
    }
}

/// Canaries sent and received.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Canaries sent, broadcast and unicast.
    pub sent: u64,
    /// Of these to one neighbour alone.
    pub sent_unicast: u64,
    /// Canaries received with the own tag.
    pub own: u64,
    /// Canaries received with any other tag: frames that crossed between networks.
    pub foreign: u64,
    /// They by tag.
    pub foreign_tags: BTreeMap<u64, u64>,
    /// Numbered frames received.
    pub numbered: u64,
    /// Times the interface went and the socket had to be made anew.
    pub rebinds: u64,
}

impl Counts {
    /// Notes a canary; `own` is the receiver's tag.
    pub fn receive(&mut self, own: u64, tag: u64) {
        if tag == own {
            self.own += 1;
            return;
        }
        self.foreign += 1;
        if self.foreign_tags.len() < MAX_TAGS || self.foreign_tags.contains_key(&tag) {
            *self.foreign_tags.entry(tag).or_default() += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(numbers: &[u64]) -> Run {
        let mut run = Run::default();
        for (index, number) in numbers.iter().enumerate() {
            run.receive(*number, 1000 * index as u64);
        }
        run
    }

    #[test]
    fn a_whole_run_has_no_losses() {
        let mut run = of(&[0, 1, 2, 3]);
        run.end(3);
        let report = run.report(7);
        assert_eq!((report.received, report.lost, report.reordered, report.duplicated), (4, 0, 0, 0));
        assert!(report.ended && report.lost_ranges.is_empty());
    }

    #[test]
    fn a_withheld_number_is_lost_and_so_are_head_and_tail() {
        let mut run = of(&[2, 3, 5]);
        run.end(8);
        let report = run.report(7);
        assert_eq!(report.lost_ranges, [(0, 1), (4, 4), (6, 8)]);
        assert_eq!(report.lost, 6);
    }

    #[test]
    fn a_late_number_is_reordered_and_not_lost() {
        let report = of(&[0, 2, 1, 3]).report(7);
        assert_eq!((report.received, report.lost, report.reordered), (4, 0, 1));
    }

    #[test]
    fn a_number_that_comes_again_is_duplicated_only() {
        let report = of(&[0, 1, 1, 0]).report(7);
        assert_eq!((report.received, report.lost, report.reordered, report.duplicated), (2, 0, 0, 2));
    }

    #[test]
    fn the_longest_gap_is_named() {
        let mut run = Run::default();
        for (number, at) in [(0, 0), (1, 10), (2, 500), (3, 520)] {
            run.receive(number, at);
        }
        assert_eq!(run.report(1).gap, Some(Gap { before: 1, after: 2, from_ns: 10, to_ns: 500 }));
    }

    #[test]
    fn the_ends_of_the_numbers_are_no_trap() {
        let mut run = of(&[u64::MAX, 0]);
        run.end(u64::MAX);
        assert_eq!(run.report(1).lost, u64::MAX - 1);
    }

    #[test]
    fn any_order_leaves_the_same_losses() {
        // Every permutation of five numbers out of seven.
        fn permute(rest: &[u64], taken: &mut Vec<u64>, check: &mut dyn FnMut(&[u64])) {
            if rest.is_empty() {
                check(taken);
            }
            for (index, number) in rest.iter().enumerate() {
                let mut others = rest.to_vec();
                others.remove(index);
                taken.push(*number);
                permute(&others, taken, check);
                taken.pop();
            }
        }
        permute(&[0, 1, 3, 4, 6], &mut Vec::new(), &mut |numbers| {
            let report = of(numbers).report(1);
            assert_eq!(report.lost_ranges, [(2, 2), (5, 5)], "{numbers:?}");
            assert_eq!((report.received, report.duplicated), (5, 0));
        });
    }

    #[test]
    fn memory_stays_bounded() {
        let mut run = Run::default();
        for number in 0..MAX_RANGES as u64 + 10 {
            run.receive(number * 2, 0);
        }
        assert_eq!(run.report(1).unrecorded, 10);
        let mut runs = Runs::default();
        for number in 0..200 {
            runs.entry(number).receive(0, 0);
        }
        assert_eq!(runs.known().len(), MAX_RUNS);
        assert!(runs.report(0).is_none() && runs.report(199).is_some());
        let mut counts = Counts::default();
        for tag in 0..1000 {
            counts.receive(7, tag);
        }
        assert_eq!((counts.own, counts.foreign, counts.foreign_tags.len()), (1, 999, MAX_TAGS));
    }
}
