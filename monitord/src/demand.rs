//! Demand: how much CPU each VM of a host wants, in declared cores.
//!
//! On a crowded host a VM that wants a core shows only its share as utilisation, so utilisation alone hides exactly the
//! VMs to look for. Time spent waiting for a core tells them apart, but a VM that merely wakes often waits too: behind a
//! quota, one that runs 1 % of the time can wait 80 % of it. So waiting counts only for a VM that has used up its fair share,
//! or whose way of running tells that it would use all it gets: it computes on and on, and hardly ever sleeps of itself.
//! Source: ours, see docs/architecture.md, Demand; Ruth et al. (2011) use utilisation.

use std::collections::VecDeque;
use std::time::Duration;

/// A VM has used up its fair share when it ran this part of it. The rest is the slack of scheduling: three endless loops
/// behind one quota on two cores were seen to get 1.4, 0.8 and 0.75 of a fair 1.0.
const USED_UP: f64 = 0.6;
/// Intervals over which a VM's share is judged.
const KEPT: usize = 4;

/// CPU time between two sleeps from which on a VM computes, rather than merely wakes. Real time: what a waker does for one
/// event takes microseconds, also where it does the work of a whole quota period at once.
const LONG: Duration = Duration::from_millis(2);
/// Sleeps after which short bursts say that a VM merely wakes. One or two say nothing: a computing one has some, too.
const SLEEPS: u64 = 3;
/// What a slice may take that did nothing: behind a spent quota the kernel picks a thread, sees that, and takes it off its
/// core again, 13 times in 250 ms. A starved loop and a waker look the same then, with 4 to 8 us each time.
const EMPTY_SLICE: Duration = Duration::from_micros(20);
/// Part of the time a VM may sleep, as seen over the last few intervals, and still want all.
const ASLEEP: f64 = 0.2;

/// How a VM's threads came onto cores and left them, in an interval.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bursts {
    /// CPU time they ran; real, by no scale.
    pub ran: Duration,
    /// Times they were put onto a core.
    pub slices: u64,
    /// Times they left one of themselves, to sleep; all others ended because somebody else's turn or the quota's end had come.
    pub sleeps: u64,
    /// How many ran or were ready to at both ends of the interval.
    pub ready: u64,
}

/// What one VM did in an interval. Units: `run` in declared cores (time run / (wall × scale)), `wait` in cores of wall
/// time (time ready and waiting / wall), which no scale changes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Load {
    /// Its virtual CPUs.
    pub vcpus: u32,
    /// Declared cores it ran on.
    pub run: f64,
    /// Cores it waited for.
    pub wait: f64,
    /// Time run / wall: `run` in cores of wall time.
    pub real: f64,
    /// How it ran, where that can be had.
    pub bursts: Option<Bursts>,
}

/// What follows for one VM, as fractions of its virtual CPUs, 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Demand {
    /// Run.
    pub run: f64,
    /// Waited.
    pub wait: f64,
    /// Run, plus wait where it counts.
    pub demand: f64,
}

impl Load {
    fn limit(self) -> f64 {
        f64::from(self.vcpus.max(1))
    }

    /// The most it may have wanted: all it ran and waited, never more than its virtual CPUs.
    fn bound(self) -> f64 {
        (self.run + self.wait).clamp(0.0, self.limit())
    }
}

/// The last few loads of one VM, and what it was found to be. Whether it gets its fair share is seen over some intervals,
/// not in one: on a full host a busy VM was seen to run 0.27 of a core in one second and 1.0 in the next.
#[derive(Debug, Clone, Default)]
pub struct Recent {
    loads: VecDeque<Load>,
    /// What it did since it was last judged: some intervals hold no evidence, as when the quota was spent all the while.
    unjudged: Bursts,
    /// None: nothing has told yet.
    computes: Option<bool>,
}

/// A VM's last interval in the light of the ones before.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Judged {
    /// The last interval.
    pub load: Load,
    /// Mean of the last few.
    pub mean: Load,
    /// Whether it computes for long each time it may.
    pub computes: bool,
    /// Threads that ran or were ready to all through the last interval, whatever their counters say by now: the kernel tells
    /// time waited only when the wait ends, which on a full host may take longer than an interval.
    pub ready: u64,
}

impl Recent {
    /// Adds the load of the last interval and judges it.
    pub fn judge(&mut self, load: Load) -> Judged {
        if self.loads.len() == KEPT {
            self.loads.pop_front();
        }
        self.loads.push_back(load);
        #[allow(clippy::cast_precision_loss)] // At most KEPT.
        let count = self.loads.len() as f64;
        let mean = |figure: fn(&Load) -> f64| self.loads.iter().map(figure).sum::<f64>() / count;
        let mean = Load { run: mean(|load| load.run), wait: mean(|load| load.wait), real: mean(|load| load.real), ..load };
        let asleep = 1.0 - ((mean.real + mean.wait) / load.limit()).min(1.0);
        match load.bursts {
            Some(bursts) => self.weigh(bursts, asleep),
            None => (self.computes, self.unjudged) = (None, Bursts::default()),
        }
        let ready = load.bursts.filter(|bursts| bursts.sleeps == 0).map_or(0, |bursts| bursts.ready);
        // One that was never seen to run, and is ready all the while, certainly wants to.
        Judged { load, mean, computes: self.computes.unwrap_or(ready > 0), ready }
    }

    fn weigh(&mut self, bursts: Bursts, asleep: f64) {
        let empty = EMPTY_SLICE.saturating_mul(u32::try_from(bursts.slices).unwrap_or(u32::MAX));
        self.unjudged.ran += bursts.ran.saturating_sub(empty);
        self.unjudged.sleeps += bursts.sleeps;
        let Bursts { ran, sleeps, .. } = self.unjudged;
        let long = ran >= LONG.saturating_mul(u32::try_from(sleeps.saturating_add(1)).unwrap_or(u32::MAX));
        if long {
            self.computes = Some(sleeps == 0 || asleep < ASLEEP);
        } else if sleeps >= SLEEPS {
            self.computes = Some(false);
        } else {
            return;
        }
        self.unjudged = Bursts::default();
    }
}

/// Demands of all VMs of a host with `cores` declared cores, in the order given, each judged by its last few intervals
/// ([`Recent`]).
///
/// Fair shares are max-min fair: the cores are poured over the VMs' bounds to one level, so a VM that wants less than the
/// level leaves its rest to the others. Cost: O(n log n).
pub fn demands(cores: f64, judged: &[Judged]) -> Vec<Demand> {
    let level = fair_level(cores, judged.iter().map(|vm| vm.mean.bound()).collect());
    judged
        .iter()
        .map(|Judged { load, mean, computes, ready }| {
            let share = mean.bound().min(level);
            #[allow(clippy::cast_precision_loss)] // A VM has fewer than 2^52 threads.
            let wait = if *computes { load.wait.max(*ready as f64 - load.real) } else { load.wait };
            let counts = *computes || mean.run >= USED_UP * share;
            let wanted = if counts { load.run + wait } else { load.run };
            let fraction = |cores: f64| (cores / load.limit()).clamp(0.0, 1.0);
            Demand { run: fraction(load.run), wait: fraction(load.wait), demand: fraction(wanted) }
        })
        .collect()
}

/// The level to which `cores` fill vessels of these heights; infinite if all can be filled.
fn fair_level(cores: f64, mut bounds: Vec<f64>) -> f64 {
    bounds.sort_by(f64::total_cmp);
    let mut left = cores;
    let mut vessels = bounds.len();
    for bound in bounds {
        #[allow(clippy::cast_precision_loss)] // A host has fewer than 2^52 VMs.
        let level = left / vessels as f64;
        if bound > level {
            return level;
        }
        left -= bound;
        vessels -= 1;
    }
    f64::INFINITY
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Demands when each VM has always done the same.
    fn steady(cores: f64, loads: &[Load]) -> Vec<Demand> {
        demands(cores, &loads.iter().map(|load| Recent::default().judge(*load)).collect::<Vec<_>>())
    }

    fn one(run: f64, wait: f64) -> Load {
        Load { vcpus: 1, run, wait, real: run, bursts: None }
    }

    #[test]
    fn a_receiver_on_a_full_host_wants_little_and_its_starved_neighbours_all() {
        // Measured behind a 34 % quota: a process waking every 2 ms runs 1.2 % and waits 83 %; here in declared cores.
        let loads = [one(0.98, 0.86), one(0.98, 0.86), one(0.96, 0.86), one(0.08, 0.82)];

        let demands = steady(3.0, &loads);

        assert!(demands[3].demand < 0.25, "{demands:?}");
        assert!(demands[..3].iter().all(|d| d.demand > 0.75), "{demands:?}");
    }

    #[test]
    fn a_scheduler_that_shares_unevenly_hides_no_starved_vm() {
        // Five loops on two cores: two on the one, three on the other.
        let loads = [one(0.75, 0.9), one(0.75, 0.9), one(0.5, 0.9), one(0.5, 0.9), one(0.5, 0.9)];

        assert!(steady(3.0, &loads).iter().all(|d| d.demand > 0.75));
    }

    #[test]
    fn one_bad_interval_hides_no_starved_vm() {
        let mut past = Recent::default();
        for run in [0.8, 0.6, 0.9] {
            past.judge(one(run, 0.9));
        }
        let others = [1.0, 1.0, 0.8].map(|run| Recent::default().judge(one(run, 0.9)));

        let demands = demands(3.0, &[past.judge(one(0.2, 0.95)), others[0], others[1], others[2]]);

        assert!(demands[0].demand > 0.75, "{demands:?}");
    }

    #[test]
    fn starved_ranks_want_their_whole_core() {
        let loads = [one(0.5, 0.9); 6];

        assert!(steady(3.0, &loads).iter().all(|d| d.demand > 0.75));
    }

    #[test]
    fn a_vm_that_runs_alone_wants_what_it_ran() {
        let demands = steady(3.0, &[one(0.4, 0.0), one(0.0, 0.0)]);

        assert_eq!(demands[0], Demand { run: 0.4, wait: 0.0, demand: 0.4 });
        assert_eq!(demands[1].demand, 0.0);
    }

    #[test]
    fn a_vm_with_more_virtual_cpus_gets_a_larger_share_only_of_what_others_leave() {
        let loads = [Load { vcpus: 4, ..one(2.2, 1.5) }, one(0.8, 0.2)];

        let demands = steady(3.0, &loads);

        assert!((demands[0].demand - 3.7 / 4.0).abs() < 1e-9);
        assert_eq!(demands[1].demand, 1.0);
    }

    #[test]
    fn a_wait_that_has_not_ended_counts() {
        // Recorded on Linux 6.18 (3 cores, scale 0.3, quota period 100 ms, 5 loops, every 250 ms): the third loop.
        let seen = [(0.413, 0.917, 31_096, 22), (0.105, 0.016, 7_870, 2), (0.0, 0.0, 0, 0), (0.0, 0.0, 0, 0), (0.0, 0.0, 0, 0)];
        let load = |(run, wait, ran_us, slices), vcpus, ready| {
            let bursts = Bursts { ran: Duration::from_micros(ran_us), slices, sleeps: 0, ready };
            Load { vcpus, run, wait, real: run * 0.3, bursts: Some(bursts) }
        };
        let demand = |vcpus, ready| {
            let mut past = Recent::default();
            seen.map(|seen| demands(3.0, &[past.judge(load(seen, vcpus, ready))])[0].demand)
        };

        assert!(demand(1, 1).iter().all(|demand| *demand > 0.9), "{:?}", demand(1, 1));
        // One of two virtual CPUs computes; the other is idle.
        assert!(demand(2, 1)[1..].iter().all(|demand| (0.45..0.55).contains(demand)), "{:?}", demand(2, 1));
        // It is not ready any more: its job has ended.
        assert_eq!(demand(1, 0)[4], 0.0);
        // One that gets nothing from the start.
        let bursts = Bursts { ready: 1, ..Bursts::default() };
        let starved = Load { bursts: Some(bursts), ..one(0.0, 0.0) };
        assert_eq!(demands(3.0, &[Recent::default().judge(starved)])[0].demand, 1.0);
    }

    #[test]
    fn no_vm_and_no_core_are_no_trouble() {
        assert!(steady(3.0, &[]).is_empty());
        assert_eq!(steady(0.0, &[one(0.0, 1.0)])[0].demand, 1.0);
    }

    proptest! {
        #[test]
        fn demand_is_a_fraction_at_least_the_time_run(cores in 0.1..64.0f64, raw in prop::collection::vec((1..8u32, 0.0..9.0f64, 0.0..9.0f64), 0..20)) {
            let loads: Vec<_> = raw.into_iter().map(|(vcpus, run, wait)| Load { vcpus, ..one(run, wait) }).collect();

            for demand in steady(cores, &loads) {
                prop_assert!((0.0..=1.0).contains(&demand.demand) && demand.demand >= demand.run);
            }
        }
    }
}
