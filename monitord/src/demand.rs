//! Demand: how much CPU each VM of a host wants, in declared cores.
//!
//! On a crowded host a VM that wants a core shows only its share as utilisation, so utilisation alone hides exactly the
//! VMs to look for. Time spent waiting for a core tells them apart, but a VM that merely wakes often waits too: behind a
//! quota, one that runs 1 % of the time can wait 80 % of it. So waiting counts only for a VM that has used up its fair share.
//! Source: ours, see docs/architecture.md, Demand; Ruth et al. (2011) use utilisation.

use std::collections::VecDeque;

/// A VM has used up its fair share when it ran this part of it. The rest is the slack of scheduling: three endless loops
/// behind one quota on two cores were seen to get 1.4, 0.8 and 0.75 of a fair 1.0.
const USED_UP: f64 = 0.6;
/// Intervals over which a VM's share is judged.
const KEPT: usize = 4;

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

/// The last few loads of one VM. Whether it gets its fair share is seen over some intervals, not in one: on a full host a
/// busy VM was seen to run 0.27 of a core in one second and 1.0 in the next.
#[derive(Debug, Clone, Default)]
pub struct Recent(VecDeque<Load>);

impl Recent {
    /// Adds the load of the last interval and returns the mean of those kept.
    pub fn mean_with(&mut self, load: Load) -> Load {
        if self.0.len() == KEPT {
            self.0.pop_front();
        }
        self.0.push_back(load);
        #[allow(clippy::cast_precision_loss)] // At most KEPT.
        let count = self.0.len() as f64;
        let mean = |figure: fn(&Load) -> f64| self.0.iter().map(figure).sum::<f64>() / count;
        Load { vcpus: load.vcpus, run: mean(|load| load.run), wait: mean(|load| load.wait) }
    }
}

/// Demands of all VMs of a host with `cores` declared cores, in the order given: each VM's load of the last interval and
/// its mean over the last few ([`Recent`]), by which its share is judged.
///
/// Fair shares are max-min fair: the cores are poured over the VMs' bounds to one level, so a VM that wants less than the
/// level leaves its rest to the others. Cost: O(n log n).
pub fn demands(cores: f64, loads: &[(Load, Load)]) -> Vec<Demand> {
    let level = fair_level(cores, loads.iter().map(|(_, mean)| mean.bound()).collect());
    loads
        .iter()
        .map(|(load, mean)| {
            let share = mean.bound().min(level);
            let counts = mean.run >= USED_UP * share;
            let wanted = if counts { load.run + load.wait } else { load.run };
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
        demands(cores, &loads.iter().map(|load| (*load, *load)).collect::<Vec<_>>())
    }

    fn one(run: f64, wait: f64) -> Load {
        Load { vcpus: 1, run, wait }
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
            past.mean_with(one(run, 0.9));
        }
        let now = one(0.2, 0.95);
        let mean = past.mean_with(now);

        let demands = demands(
            3.0,
            &[(now, mean), (one(1.0, 0.9), one(1.0, 0.9)), (one(1.0, 0.9), one(1.0, 0.9)), (one(0.8, 0.9), one(0.8, 0.9))],
        );

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
        let loads = [Load { vcpus: 4, run: 2.2, wait: 1.5 }, one(0.8, 0.2)];

        let demands = steady(3.0, &loads);

        assert!((demands[0].demand - 3.7 / 4.0).abs() < 1e-9);
        assert_eq!(demands[1].demand, 1.0);
    }

    #[test]
    fn no_vm_and_no_core_are_no_trouble() {
        assert!(steady(3.0, &[]).is_empty());
        assert_eq!(steady(0.0, &[one(0.0, 1.0)])[0].demand, 1.0);
    }

    proptest! {
        #[test]
        fn demand_is_a_fraction_at_least_the_time_run(cores in 0.1..64.0f64, raw in prop::collection::vec((1..8u32, 0.0..9.0f64, 0.0..9.0f64), 0..20)) {
            let loads: Vec<_> = raw.into_iter().map(|(vcpus, run, wait)| Load { vcpus, run, wait }).collect();

            for demand in steady(cores, &loads) {
                prop_assert!((0.0..=1.0).contains(&demand.demand) && demand.demand >= demand.run);
            }
        }
    }
}
