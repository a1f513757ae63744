//! Observations → smoothed figures: an exponentially weighted mean per VM, and how old each figure is.
//!
//! It never asks for the time and never guesses: a VM without enough observations has no demand. Read [`crate::model`]
//! next, which these figures end up in.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use violin_common::config::adapt::Policy;
use violin_common::control::monitor::{Observation, VmSample, VmState};
use violin_common::{HostId, Instant, VmId};

/// A mean in which an observation counts half after each half-life.
///
/// Shape: `weight` grows from 0 to 1 with the time observed, so that the first observations are not mistaken for a long
/// history. Units: those of what is observed.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Smoothed {
    sum: f64,
    weight: f64,
}

impl Smoothed {
    /// Takes in a value that held for `span`.
    pub fn take(&mut self, value: f64, span: Duration, half_life: Duration) {
        let fresh = 1.0 - 0.5f64.powf(span.as_secs_f64() / half_life.as_secs_f64().max(1e-3));
        self.sum += fresh * (value - self.sum);
        self.weight += fresh * (1.0 - self.weight);
    }

    /// The mean; none before half of its weight has been observed, which takes one half-life.
    pub fn mean(self) -> Option<f64> {
        (self.weight >= 0.499).then(|| self.sum / self.weight)
    }

    /// The mean so far, however short it was observed.
    pub fn so_far(self) -> f64 {
        if self.weight > 0.0 { self.sum / self.weight } else { 0.0 }
    }
}

/// What is known of one VM's load.
#[derive(Debug, Clone, PartialEq)]
pub struct VmFigures {
    /// Its last sample.
    pub last: VmSample,
    /// Where that was taken.
    pub host: HostId,
    /// When it came in.
    pub at: Instant,
    /// Demand, smoothed.
    pub demand: Smoothed,
    /// Since when that has been above the threshold.
    pub high_since: Option<Instant>,
}

/// What is known of one host's load.
#[derive(Debug, Clone, PartialEq)]
pub struct HostFigures {
    /// Its last observation.
    pub last: Observation,
    /// When it came in.
    pub at: Instant,
}

/// What a host can hold, as found when its observation and the journal were of the same VMs.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Room {
    mib: u64,
    at: Instant,
}

/// VMs that the journal has on a host and that its monitor counts, with what they were promised.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Held {
    /// In MiB, by VM.
    pub mib: BTreeMap<VmId, u64>,
    /// Those of them that are only being started: a monitor that does not observe them does not count them yet.
    pub starting: BTreeSet<VmId>,
    /// Whether moves from or to the host are under way: when either end begins and stops to count a VM is not known.
    pub moving: bool,
}

/// All figures, by host and VM.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Observer {
    hosts: BTreeMap<HostId, HostFigures>,
    rooms: BTreeMap<HostId, Room>,
    vms: BTreeMap<VmId, VmFigures>,
}

impl Observer {
    /// Takes in one host's observation, which came in at `now`.
    ///
    /// Only VMs that run are smoothed: the load of booting is no demand of the job, and a VM that arrives has none yet. A
    /// VM keeps its history when it moves. Values that are no numbers are taken as 0, more than 1 as 1.
    pub fn take(&mut self, now: Instant, host: &HostId, observation: Observation, policy: &Policy) {
        let half_life = policy.half_life.0;
        for sample in &observation.vms {
            let demand = if sample.demand.is_finite() { sample.demand.clamp(0.0, 1.0) } else { 0.0 };
            if sample.state == VmState::Arriving {
                continue;
            }
            let known = self.vms.entry(sample.vm.clone()).or_insert_with(|| VmFigures {
                last: sample.clone(),
                host: host.clone(),
                at: now,
                demand: Smoothed::default(),
                high_since: None,
            });
            if sample.state == VmState::Running {
                // A gap is not a long observation of one value: a sample speaks for max-age at most.
                let span = now.since(known.at).min(policy.max_age.0);
                known.demand.take(demand, span, half_life);
                let high = known.demand.mean().is_some_and(|mean| mean > policy.high_demand);
                known.high_since = high.then(|| known.high_since.unwrap_or(now));
            }
            known.last = VmSample { demand, ..sample.clone() };
            known.host = host.clone();
            known.at = now;
        }
        self.hosts.insert(host.clone(), HostFigures { last: observation, at: now });
    }

    /// Notes what a host can hold, from an observation of these VMs that came in at `now`.
    ///
    /// Observations lag behind: after the manager has started or ended something, what is free does not fit what is held until
    /// a later one tells of the same VMs as the journal.
    pub fn note_room(&mut self, now: Instant, host: &HostId, observed: &BTreeSet<VmId>, free_mib: u64, held: &Held) {
        if !held.moving && held.mib.keys().eq(observed) {
            let mib = held.mib.values().sum::<u64>().saturating_add(free_mib);
            self.rooms.insert(host.clone(), Room { mib, at: now });
        }
    }

    /// What a host can hold in MiB, as far as the last observations tell; none: there was none.
    pub fn room_mib(&self, now: Instant, host: &HostId, held: &Held, policy: &Policy) -> Option<u64> {
        let figures = self.hosts.get(host)?;
        if let Some(room) = self.rooms.get(host).filter(|room| now.since(room.at) <= policy.max_age.0) {
            return Some(room.mib);
        }
        // They have differed for long: something runs there that the journal does not know, or its hypervisor tells nothing.
        let seen = |vm: &VmId| figures.last.vms.iter().any(|sample| sample.vm == *vm);
        let counted = held.mib.iter().filter(|(vm, _)| seen(vm) || !held.starting.contains(*vm));
        Some(counted.map(|(_, mib)| mib).sum::<u64>().saturating_add(figures.last.host.memory_free_mib))
    }

    /// Forgets a VM that is gone for good, so that one of the same name starts without a history.
    pub fn forget(&mut self, vm: &VmId) {
        self.vms.remove(vm);
    }

    /// A host's last observation.
    pub fn host(&self, host: &HostId) -> Option<&HostFigures> {
        self.hosts.get(host)
    }

    /// A VM's figures.
    pub fn vm(&self, vm: &VmId) -> Option<&VmFigures> {
        self.vms.get(vm)
    }

    /// Age of a host's last observation; none if there never was one.
    pub fn age(&self, now: Instant, host: &HostId) -> Option<Duration> {
        self.hosts.get(host).map(|figures| now.since(figures.at))
    }
}

impl VmFigures {
    /// Whether they say how the VM is doing now on this host; a host it moved to a moment ago has not told yet.
    pub fn is_current(&self, now: Instant, host: &HostId, policy: &Policy) -> bool {
        self.host == *host && now.since(self.at) <= policy.max_age.0
    }

    /// Whether the VM wants more than the threshold now while its smoothed demand has not got there yet.
    pub fn rising(&self, policy: &Policy) -> bool {
        self.last.state == VmState::Running && self.last.demand > policy.high_demand && self.demand.so_far() <= policy.high_demand
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observation(vms: &[&str], free_mib: u64) -> Observation {
        let sample = |vm: &&str| VmSample {
            vm: vm.parse().unwrap(),
            state: VmState::Running,
            run: 0.0,
            wait: 0.0,
            demand: 0.0,
            memory_mib: 0,
            net_in: 0.0,
            net_out: 0.0,
        };
        let host = violin_common::control::monitor::HostSample {
            guest_cores: 0.0,
            memory_free_mib: free_mib,
            cpu_pressure: None,
            memory_pressure: None,
        };
        Observation { at: Instant(0), host, vms: vms.iter().map(sample).collect(), traffic: Vec::new(), missing: Vec::new() }
    }

    fn held(vms: &[(&str, u64)]) -> Held {
        Held { mib: vms.iter().map(|(vm, mib)| (vm.parse().unwrap(), *mib)).collect(), ..Held::default() }
    }

    /// A host of 1000 MiB, as it is when an observation comes in at each time.
    fn rooms(told: &[(u64, Held, Observation)]) -> Vec<u64> {
        let (policy, host) = (Policy::default(), "h1".parse().unwrap());
        let mut observer = Observer::default();
        let room = |(second, held, observation): &(u64, Held, Observation)| {
            let now = Instant(second * 1_000_000_000);
            let seen = observation.vms.iter().map(|sample| sample.vm.clone()).collect();
            observer.note_room(now, &host, &seen, observation.host.memory_free_mib, held);
            observer.take(now, &host, observation.clone(), &policy);
            observer.room_mib(now, &host, held, &policy).unwrap()
        };
        told.iter().map(room).collect()
    }

    #[test]
    fn an_observation_from_before_a_vm_was_started_or_ended_says_nothing_of_what_fits() {
        let (a, b) = (("x-a", 400), ("x-b", 500));
        let starting = Held { starting: ["x-b".parse().unwrap()].into(), ..held(&[a, b]) };

        let told = [
            (1, held(&[a]), observation(&["x-a"], 600)),
            // Its start is on record, the monitor does not know of it yet.
            (2, starting.clone(), observation(&["x-a"], 600)),
            (3, held(&[a, b]), observation(&["x-a", "x-b"], 100)),
            // Both are stopped: the observation is of a moment before.
            (4, held(&[]), observation(&["x-a", "x-b"], 100)),
            (5, held(&[]), observation(&[], 1000)),
        ];

        assert_eq!(rooms(&told), [1000; 5]);
    }

    #[test]
    fn what_differs_for_long_counts_as_it_is_told() {
        let b: VmId = "x-b".parse().unwrap();
        let a_and_b = held(&[("x-a", 400), ("x-b", 500)]);
        let booting = Held { starting: [b].into(), ..a_and_b.clone() };
        let told = |second, held: &Held, vms: &[&str], free| (second, held.clone(), observation(vms, free));

        // Another user's VM; a hypervisor that tells nothing of its VMs; a start that takes long, and one that has been seen.
        assert_eq!(rooms(&[told(1, &held(&[]), &[], 1000), told(60, &held(&[]), &["y"], 700)]), [1000, 700]);
        assert_eq!(rooms(&[told(60, &a_and_b, &[], 100)]), [1000]);
        assert_eq!(rooms(&[told(60, &booting, &["x-a"], 600)]), [1000]);
        assert_eq!(rooms(&[told(60, &booting, &["x-a", "x-b"], 100)]), [1000]);
        let moving = Held { moving: true, ..a_and_b };
        assert_eq!(rooms(&[told(1, &held(&[]), &[], 1000), told(2, &moving, &["x-a", "x-b"], 600)]), [1000, 1000]);
    }

    #[test]
    fn a_value_counts_half_after_a_half_life() {
        let half_life = Duration::from_secs(10);
        let mut smoothed = Smoothed::default();
        smoothed.take(1.0, Duration::from_secs(1000), half_life);

        smoothed.take(0.0, half_life, half_life);

        assert!((smoothed.mean().unwrap() - 0.5).abs() < 1e-9);
    }

    #[test]
    fn small_steps_and_one_large_step_give_the_same_mean() {
        let half_life = Duration::from_secs(10);
        let (mut small, mut large) = (Smoothed::default(), Smoothed::default());

        for _ in 0..20 {
            small.take(0.8, Duration::from_secs(1), half_life);
        }
        large.take(0.8, Duration::from_secs(20), half_life);

        assert!((small.mean().unwrap() - large.mean().unwrap()).abs() < 1e-9);
    }

    #[test]
    fn a_vm_seen_for_less_than_a_half_life_has_no_demand() {
        let mut smoothed = Smoothed::default();

        smoothed.take(1.0, Duration::from_secs(5), Duration::from_secs(10));

        assert_eq!(smoothed.mean(), None);
        assert!((smoothed.so_far() - 1.0).abs() < 1e-9);
    }
}
