//! How well a snapshot is balanced: named terms with units, lower is better.
//!
//! It never changes anything and knows no moves. Source of the host score: Ruth et al. 2011 §2.2.2.

use crate::model::{Doing, Snapshot, Standing, Vm};
use std::collections::BTreeMap;
use std::fmt;
use violin_common::HostId;
use violin_common::config::adapt::Policy;

/// The score of one snapshot.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Score {
    /// Score of each live host: high-demand VMs / cores.
    pub hosts: BTreeMap<HostId, f64>,
    /// Population standard deviation of them; fewer than two live hosts give 0. The one term that decides.
    pub spread: f64,
    /// Cores wanted beyond what hosts have, summed over live hosts. Told, not weighed.
    pub overload_cores: f64,
    /// Hosts left out because their figures are missing or too old.
    pub blind: Vec<HostId>,
}

/// Whether a VM's smoothed demand is above the threshold. A VM that does not run, or is not known, has none.
pub fn is_high(vm: &Vm, policy: &Policy) -> bool {
    matches!(vm.doing, Doing::Running | Doing::Moving(_)) && vm.demand.is_some_and(|demand| demand > policy.high_demand)
}

/// Whether it is below the lower one: such a VM makes room for others.
pub fn is_low(vm: &Vm, policy: &Policy) -> bool {
    vm.doing == Doing::Halted || vm.demand.is_some_and(|demand| demand < policy.low_demand)
}

/// High-demand VMs of a host.
pub fn high_count(snapshot: &Snapshot, host: &HostId, policy: &Policy) -> u32 {
    let count = snapshot.vms.values().filter(|vm| vm.host == *host && is_high(vm, policy)).count();
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// Scores a snapshot.
pub fn score(snapshot: &Snapshot, policy: &Policy) -> Score {
    let mut score = Score::default();
    for (name, host) in &snapshot.hosts {
        if host.standing != Standing::Live {
            score.blind.push(name.clone());
            continue;
        }
        score.hosts.insert(name.clone(), f64::from(high_count(snapshot, name, policy)) / host.cores);
        score.overload_cores += (-snapshot.free_cores(name)).max(0.0);
    }
    score.spread = spread(score.hosts.values().copied());
    score
}

/// Population standard deviation; fewer than two values give 0.
pub fn spread(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let count = values.clone().count();
    if count < 2 {
        return 0.0;
    }
    #[allow(clippy::cast_precision_loss)]
    let count = count as f64;
    let mean = values.clone().sum::<f64>() / count;
    (values.map(|value| (value - mean).powi(2)).sum::<f64>() / count).sqrt()
}

impl fmt::Display for Score {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spread {:.3}", self.spread)?;
        for (host, score) in &self.hosts {
            write!(f, ", {host} {score:.2}")?;
        }
        for host in &self.blind {
            write!(f, ", {host} unknown")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_is_the_population_standard_deviation() {
        assert!((spread([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0].into_iter()) - 2.0).abs() < 1e-12);
        assert!(spread([3.0].into_iter()).abs() < 1e-12);
    }
}
