//! Observations → smoothed figures: an exponentially weighted mean per VM, and how old each figure is.
//!
//! It never asks for the time and never guesses: a VM without enough observations has no demand. Read [`crate::model`]
//! next, which these figures end up in.

use std::collections::BTreeMap;
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

/// All figures, by host and VM.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Observer {
    hosts: BTreeMap<HostId, HostFigures>,
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
