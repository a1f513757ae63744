//! A second opinion on a plan, with its own arithmetic: every state it passes through must be legal.
//!
//! It shares no code with the policy that proposed the plan, so an error in one is not repeated in the other.

use crate::model::{Doing, Snapshot, Standing, Vm};
use crate::plan::{Action, Origin, Plan};
use std::collections::{BTreeMap, BTreeSet};
use violin_common::config::adapt::Policy;
use violin_common::control::monitor::Role;
use violin_common::{HostId, VmId};

/// Why a plan must not be carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("plan refused at {vm}: {what}")]
pub struct Violation {
    /// VM whose move is at fault.
    pub vm: VmId,
    /// What is wrong.
    pub what: String,
}

/// Checks every prefix of a plan against a snapshot.
pub fn check(snapshot: &Snapshot, policy: &Policy, plan: &Plan) -> Result<(), Violation> {
    let mut place: BTreeMap<&VmId, &HostId> = snapshot.vms.iter().map(|(name, vm)| (name, &vm.host)).collect();
    let mut seen = BTreeSet::new();
    for moved in &plan.moves {
        let fail = |what: String| Violation { vm: moved.vm.clone(), what };
        let Some(vm) = snapshot.vms.get(&moved.vm) else { return Err(fail("there is no such VM".into())) };
        if !seen.insert(&moved.vm) {
            return Err(fail("it is moved twice".into()));
        }
        if place.get(&moved.vm) != Some(&&moved.from) {
            return Err(fail(format!("it is on {}, not on {}", vm.host, moved.from)));
        }
        if moved.from == moved.to {
            return Err(fail(format!("it is on {} already", moved.to)));
        }
        if vm.doing != Doing::Running {
            return Err(fail("it does not run".into()));
        }
        for end in [&moved.from, &moved.to] {
            match snapshot.hosts.get(end) {
                Some(host) if host.standing == Standing::Live => {}
                Some(host) => return Err(fail(format!("{end} {}, want a host whose monitor tells of it", host.standing))),
                None => return Err(fail(format!("there is no host {end}"))),
            }
        }
        if snapshot.hosts[&moved.to].draining {
            return Err(fail(format!("{0} is being drained; `violin host undrain {0}` ends that", moved.to)));
        }
        let (from, to) = (&snapshot.hosts[&moved.from], &snapshot.hosts[&moved.to]);
        if from.driver != to.driver {
            return Err(fail(format!("{} runs {}, {} runs {}", moved.from, from.driver, moved.to, to.driver)));
        }
        let home = snapshot.environments.get(&vm.environment).map(|environment| &environment.home);
        if vm.role == Role::Head && home != Some(&to.domain) {
            return Err(fail(format!("a head node must stay in its home domain, {} is in {}", moved.to, to.domain)));
        }
        let actions: Vec<_> = moved.steps.iter().map(|step| (&step.at, std::mem::discriminant(&step.action))).collect();
        let migrate = moved.steps.iter().find_map(|step| match step.action {
            Action::Migrate(_) => Some(std::mem::discriminant(&step.action)),
            _ => None,
        });
        let wanted = [
            (&moved.to, Some(std::mem::discriminant(&Action::Prepare))),
            (&moved.from, migrate),
            (&moved.to, Some(std::mem::discriminant(&Action::Finish))),
        ];
        if actions.len() != 3 || actions.iter().zip(&wanted).any(|(got, want)| got.0 != want.0 || Some(got.1) != want.1) {
            return Err(fail("its steps are not prepare, migrate, finish".into()));
        }
        // While it moves the VM takes memory at both ends, so the source keeps its share until the next move.
        place.insert(&moved.vm, &moved.to);
        capacity(snapshot, policy, plan.origin, &place, &moved.to).map_err(fail)?;
    }
    gang_is_whole(snapshot, plan)
}

/// Whether a host holds what lies on it at one prefix.
fn capacity(
    snapshot: &Snapshot,
    policy: &Policy,
    origin: Origin,
    place: &BTreeMap<&VmId, &HostId>,
    host: &HostId,
) -> Result<(), String> {
    let (mut memory, mut firm, mut all) = (0u64, 0.0, 0.0);
    for (name, vm) in &snapshot.vms {
        let coming = matches!(&vm.doing, Doing::Moving(to) if to == host);
        if place.get(name) != Some(&host) && !coming {
            continue;
        }
        memory += vm.memory_mib;
        let wanted = wanted(vm);
        all += wanted;
        if vm.demand.is_none_or(|demand| demand >= policy.low_demand) {
            firm += wanted;
        }
    }
    let has = &snapshot.hosts[host];
    if memory > has.memory_mib {
        return Err(format!("{host} would hold {memory} MiB of {} MiB", has.memory_mib));
    }
    let bound = has.cores * (1.0 + policy.overcommit);
    if origin == Origin::Policy && (firm > has.cores + 1e-3 || all > bound + 1e-3) {
        return Err(format!("{host} would have {firm:.2} (with low-demand VMs {all:.2}) of {} cores wanted", has.cores));
    }
    Ok(())
}

fn wanted(vm: &Vm) -> f64 {
    match vm.doing {
        Doing::Halted => 0.0,
        Doing::Booting => f64::from(vm.vcpus),
        Doing::Running | Doing::Moving(_) => vm.demand.unwrap_or(1.0) * f64::from(vm.vcpus),
    }
}

/// A gang names every compute node that is not yet in the destination's domain, and one domain only.
fn gang_is_whole(snapshot: &Snapshot, plan: &Plan) -> Result<(), Violation> {
    let (Some(environment), Some(first)) = (&plan.gang, plan.moves.first()) else { return Ok(()) };
    let domain = snapshot.domain(&first.to);
    for moved in &plan.moves {
        if snapshot.domain(&moved.to) != domain {
            return Err(Violation { vm: moved.vm.clone(), what: "a gang goes to one domain".into() });
        }
        if snapshot.vms.get(&moved.vm).is_none_or(|vm| vm.environment != *environment || vm.role != Role::Compute) {
            return Err(Violation { vm: moved.vm.clone(), what: format!("it is no compute node of {environment}") });
        }
    }
    let left = snapshot
        .compute_nodes(environment)
        .find(|(name, vm)| snapshot.domain(&vm.host) != domain && plan.moves.iter().all(|moved| moved.vm != **name));
    match left {
        Some((name, _)) => Err(Violation { vm: name.clone(), what: format!("the gang of {environment} leaves it behind") }),
        None => Ok(()),
    }
}
