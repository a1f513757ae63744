//! From two readings of counters to rates.

use crate::demand::{Bursts, Load};
use crate::hypervisor::Usage;
use std::collections::BTreeMap;
use std::time::Duration;
use violin_common::api::switch::TrafficSeen;
use violin_common::control::monitor::TrafficSample;
use violin_common::{Instant, MacAddr, Vni};

/// A reading and when it was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct At<T> {
    /// When.
    pub at: Instant,
    /// What.
    pub value: T,
}

/// What a VM's CPU counters grew by, as cores of wall time: (run, wait).
///
/// `None`: no time passed, or a counter fell, as after a move; the next reading is good again.
pub fn cpu(before: At<Usage>, now: At<Usage>) -> Option<(f64, f64)> {
    let run = now.value.run_ns.checked_sub(before.value.run_ns)?;
    let wait = now.value.wait_ns.checked_sub(before.value.wait_ns)?;
    let wall = wall(before.at, now.at)?;
    Some((Duration::from_nanos(run).as_secs_f64() / wall, Duration::from_nanos(wait).as_secs_f64() / wall))
}

/// How a VM ran in between. `None`: it is not told, or a counter fell.
pub fn bursts(before: At<Usage>, now: At<Usage>) -> Option<Bursts> {
    let (was, is) = (before.value.scheduled?, now.value.scheduled?);
    Some(Bursts {
        ran: Duration::from_nanos(now.value.run_ns.checked_sub(before.value.run_ns)?),
        slices: is.slices.checked_sub(was.slices)?,
        sleeps: is.sleeps.checked_sub(was.sleeps)?,
        ready: is.ready.min(was.ready),
    })
}

/// A VM's load between two readings, on a host of this scale. `None`: as of [`cpu`].
pub fn load(vcpus: u32, scale: f64, before: At<Usage>, now: At<Usage>) -> Option<Load> {
    let (real, wait) = cpu(before, now)?;
    Some(Load { vcpus, run: real / scale, wait, real, bursts: bursts(before, now) })
}

/// Growth per second of a counter; 0 if it fell (its daemon was restarted).
pub fn rate(before: At<u64>, now: At<u64>) -> Option<f64> {
    let wall = wall(before.at, now.at)?;
    #[allow(clippy::cast_precision_loss)] // Counters stay far below 2^52 in one interval.
    Some(now.value.saturating_sub(before.value) as f64 / wall)
}

fn wall(before: Instant, now: Instant) -> Option<f64> {
    let wall = now.since(before).as_secs_f64();
    (wall > 0.0).then_some(wall)
}

/// Rates of a switch's traffic counters between two readings, those that did not grow left out.
#[derive(Debug, Default)]
pub struct Traffic {
    last: Option<At<Counts>>,
}

/// Bytes and frames by network, sender and receiver.
type Counts = BTreeMap<(Vni, MacAddr, MacAddr), (u64, u64)>;

impl Traffic {
    /// Takes a reading; the first one gives nothing.
    pub fn update(&mut self, now: Instant, seen: &[TrafficSeen]) -> Vec<TrafficSample> {
        let counts: Counts = seen.iter().map(|s| ((s.vni, s.from, s.to), (s.bytes, s.frames))).collect();
        let mut samples = Vec::new();
        if let Some(last) = &self.last {
            for ((vni, from, to), (bytes, frames)) in &counts {
                let (old_bytes, old_frames) = last.value.get(&(*vni, *from, *to)).copied().unwrap_or_default();
                // A counter that fell began anew when the switch was restarted.
                let (old_bytes, old_frames) =
                    if old_frames > *frames || old_bytes > *bytes { (0, 0) } else { (old_bytes, old_frames) };
                let per_second = |old, new| rate(At { at: last.at, value: old }, At { at: now, value: new });
                if let (Some(bytes), Some(frames)) = (per_second(old_bytes, *bytes), per_second(old_frames, *frames))
                    && frames > 0.0
                {
                    samples.push(TrafficSample { vni: *vni, from: *from, to: *to, bytes, frames });
                }
            }
        }
        self.last = Some(At { at: now, value: counts });
        samples
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(run_ms: u64, wait_ms: u64) -> Usage {
        Usage { run_ns: run_ms * 1_000_000, wait_ns: wait_ms * 1_000_000, ..Usage::default() }
    }

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn cpu_time_per_wall_time_is_cores() {
        let before = At { at: Instant(SECOND), value: usage(100, 0) };
        let now = At { at: Instant(3 * SECOND), value: usage(1100, 500) };

        assert_eq!(cpu(before, now), Some((0.5, 0.25)));
    }

    #[test]
    fn counters_that_fell_give_no_figure() {
        let before = At { at: Instant(SECOND), value: usage(100, 0) };

        assert_eq!(cpu(before, At { at: Instant(2 * SECOND), value: usage(50, 0) }), None);
        assert_eq!(cpu(before, At { at: Instant(SECOND), value: usage(200, 0) }), None);
    }

    #[test]
    fn traffic_is_a_rate_and_silent_pairs_are_left_out() {
        let pair = |last: u8, frames| TrafficSeen {
            vni: 7.try_into().unwrap(),
            from: MacAddr([2, 0, 0, 0, 0, last]),
            to: MacAddr::BROADCAST,
            frames,
            bytes: frames * 100,
        };
        let mut traffic = Traffic::default();

        assert!(traffic.update(Instant(0), &[pair(1, 10), pair(2, 10)]).is_empty());
        let samples = traffic.update(Instant(2 * SECOND), &[pair(1, 30), pair(2, 10), pair(3, 4)]);

        let rates: Vec<_> = samples.iter().map(|s| (s.from.0[5], s.frames, s.bytes)).collect();
        assert_eq!(rates, [(1, 10.0, 1000.0), (3, 2.0, 200.0)]);
        let restarted = traffic.update(Instant(3 * SECOND), &[pair(1, 5)]);
        assert_eq!(restarted[0].frames, 5.0);
    }
}
