//! The policy of Ruth et al. 2011 §2.2.2: balance inside a domain VM by VM; when a domain is overloaded, move one
//! environment as a whole to another.
//!
//! Ours: ties and order are fixed, so equal snapshots give equal decisions; a domain counts as overloaded only if its
//! worst host has more high-demand vCPUs than cores *and* no other host there has room. Low-demand VMs make room: only
//! VMs that are not low must fit into the cores; with the low ones the sum may exceed them by the policy's `overcommit`.

use super::{Move, Proposal, Refusal, Thought};
use crate::model::{Doing, Failed, Snapshot, Standing, Vm};
use crate::score::{Score, high_count, is_high, is_low, score};
use std::cmp::Ordering;
use std::time::Duration;
use violin_common::config::adapt::Policy;
use violin_common::control::monitor::Role;
use violin_common::{DomainId, EnvironmentId, HostId, VmId};

/// Rounding in sums of fractions must not decide.
const EPSILON: f64 = 1e-6;

/// Longest wait before a move that was undone is tried again.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// Thinks about a snapshot.
pub fn think(snapshot: &Snapshot, policy: &Policy) -> Thought {
    let mut thought = Thought { before: score(snapshot, policy), ..Thought::default() };
    for host in &thought.before.blind {
        thought.refusals.push(Refusal::HostUnknown { host: host.clone() });
    }
    for (vm, seen) in &snapshot.vms {
        if let Doing::Moving(to) = &seen.doing {
            thought.refusals.push(Refusal::MovesUnderWay { vm: vm.clone(), to: to.clone() });
            return thought;
        }
    }
    if let Some(found) = drain(snapshot, policy, &mut thought.refusals) {
        (thought.proposal, thought.drains) = (Some(found), true);
        return thought;
    }
    for worst in overworked(&thought.before) {
        let Some(domain) = snapshot.domain(&worst).cloned() else { continue };
        let found = within(snapshot, policy, &thought.before, &worst, &domain, &mut thought.refusals);
        thought.proposal = match found {
            Within::Move(proposal, score) => Some((proposal, score)),
            Within::NoGain => None,
            Within::NoRoom => across(snapshot, policy, &thought.before, &worst, &domain, &mut thought.refusals),
        };
        if thought.proposal.is_some() {
            break;
        }
    }
    thought
}

/// The first VM that can leave a host which is to be emptied: to the least used host of its domain that takes it; when none
/// does, its environment as a gang to the domain where the spread is lowest. Balance and cooldowns do not count: an operator
/// waits. What cannot leave is told.
fn drain(snapshot: &Snapshot, policy: &Policy, refusals: &mut Vec<Refusal>) -> Option<(Proposal, Score)> {
    let mut domains: Vec<_> = snapshot.hosts.values().map(|host| &host.domain).collect();
    domains.sort();
    domains.dedup();
    let mut found = None;
    for (name, vm) in &snapshot.vms {
        let Some(from) = snapshot.hosts.get(&vm.host).filter(|host| host.draining) else { continue };
        let mut why = match from.standing {
            Standing::Live => format!("no other host of {} is there", from.domain),
            _ => Refusal::HostUnknown { host: vm.host.clone() }.to_string(),
        };
        let mut hosts: Vec<_> = snapshot.live_hosts(&from.domain).filter(|host| **host != vm.host).collect();
        hosts.retain(|host| {
            let failed = || failed_before(vm.failed.get(host), policy, || format!("{name} from {} to {host}", vm.host));
            let refused = takes(snapshot, policy, name, vm, host).err().or_else(failed);
            refused.inspect(|refusal| why = refusal.to_string()).is_none()
        });
        hosts.sort_by(|a, b| snapshot.free_cores(b).total_cmp(&snapshot.free_cores(a)).then_with(|| a.cmp(b)));
        let to = hosts.first().filter(|_| from.standing == Standing::Live);
        if let Some(to) = to {
            let moves = vec![Move { vm: name.clone(), from: vm.host.clone(), to: (*to).clone() }];
            let reason = format!("{} is being drained; {to} in the same domain takes {name}", vm.host);
            let proposal = Proposal { moves, gang: None, reason };
            found.get_or_insert_with(|| (proposal, score(&snapshot.with_move(name, to), policy)));
            continue;
        }
        // What has just started or moved counts in full: no environment leaves its domain for want of an observation.
        let unknown = |other: &&Vm| other.doing == Doing::Running && other.demand.is_none();
        let at_home = |other: &&Vm| snapshot.domain(&other.host) == Some(&from.domain);
        if vm.role == Role::Compute && snapshot.vms.values().filter(at_home).any(|other| unknown(&other)) {
            why = format!("{why}; what the VMs of {} want is not known yet", from.domain);
            refusals.push(Refusal::CannotLeave { vm: name.clone(), host: vm.host.clone(), why });
            continue;
        }
        let environment = &vm.environment;
        let failed = snapshot.environments.get(environment).map(|known| &known.failed);
        let others = domains.iter().filter(|other| vm.role == Role::Compute && ***other != from.domain);
        let mut best: Option<Gang> = None;
        for other in others {
            let before = failed.and_then(|failed| failed.get(other));
            let refused = failed_before(before, policy, || format!("{environment} to {other}"));
            match refused.map_or_else(|| gang(snapshot, policy, environment, other), Err) {
                Err(refusal) => why = format!("{why}; {refusal}"),
                Ok(gang) if best.as_ref().is_none_or(|best| gang.order(best) == Ordering::Less) => best = Some(gang),
                Ok(_) => {}
            }
        }
        match best.filter(|_| from.standing == Standing::Live) {
            Some(Gang { moves, to, after, .. }) => {
                let reason = format!(
                    "{} is being drained and no other host of {} takes {name}: {environment} moves to {to} as a whole",
                    vm.host, from.domain
                );
                found.get_or_insert_with(|| (Proposal { moves, gang: Some(environment.clone()), reason }, after));
            }
            None => refusals.push(Refusal::CannotLeave { vm: name.clone(), host: vm.host.clone(), why }),
        }
    }
    found
}

/// Hosts with more than their share (a score above the mean), worst first, then by name.
fn overworked(before: &Score) -> Vec<HostId> {
    let mut hosts: Vec<_> = before.hosts.iter().collect();
    #[allow(clippy::cast_precision_loss)]
    let mean = hosts.iter().map(|(_, score)| **score).sum::<f64>() / hosts.len().max(1) as f64;
    hosts.retain(|(_, score)| **score > mean + EPSILON);
    hosts.sort_by(|a, b| b.1.total_cmp(a.1).then_with(|| a.0.cmp(b.0)));
    hosts.into_iter().map(|(host, _)| host.clone()).collect()
}

/// What a search inside one domain found.
enum Within {
    /// This helps.
    Move(Proposal, Score),
    /// Some host has room, but balance would not get better.
    NoGain,
    /// No other host of the domain has room for any of the high-demand VMs.
    NoRoom,
}

fn within(
    snapshot: &Snapshot,
    policy: &Policy,
    before: &Score,
    worst: &HostId,
    domain: &DomainId,
    refusals: &mut Vec<Refusal>,
) -> Within {
    let mut others: Vec<_> = snapshot.live_hosts(domain).filter(|host| *host != worst).collect();
    others.sort_by(|a, b| {
        let utilisation = |host: &HostId| -snapshot.free_cores(host) / snapshot.hosts[host].cores;
        utilisation(a)
            .total_cmp(&utilisation(b))
            .then_with(|| before.hosts[*a].total_cmp(&before.hosts[*b]))
            .then_with(|| a.cmp(b))
    });
    let mut room = false;
    let mut resting = false;
    for (name, vm) in high_vms(snapshot, policy, worst) {
        if vm.rested.is_some_and(|rested| rested < policy.cooldown.0) {
            resting = true;
            refusals.push(Refusal::VmCoolingDown { vm: name.clone() });
            continue;
        }
        for to in &others {
            if let Err(refusal) = takes(snapshot, policy, name, vm, to) {
                refusals.push(refusal);
                continue;
            }
            room = true;
            if let Some(refusal) = failed_before(vm.failed.get(to), policy, || format!("{name} from {worst} to {to}")) {
                refusals.push(refusal);
                continue;
            }
            let after = score(&snapshot.with_move(name, to), policy);
            if before.spread - after.spread < policy.min_gain - EPSILON {
                refusals.push(Refusal::NoGain { what: format!("{name} from {worst} to {to}") });
                continue;
            }
            let reason = format!(
                "{worst} has {} high-demand VMs on {} cores; {to} in the same domain has {:.2} cores free; the spread of host scores falls from {:.3} to {:.3}",
                high_count(snapshot, worst, policy),
                snapshot.hosts[worst].cores,
                snapshot.free_cores(to),
                before.spread,
                after.spread,
            );
            let moves = vec![Move { vm: name.clone(), from: worst.clone(), to: (*to).clone() }];
            return Within::Move(Proposal { moves, gang: None, reason }, after);
        }
    }
    // A VM that merely rests may have room elsewhere: that domain is not known to be full.
    let resting_has_room = resting
        && high_vms(snapshot, policy, worst)
            .iter()
            .any(|(name, vm)| others.iter().any(|to| takes(snapshot, policy, name, vm, to).is_ok()));
    if room || resting_has_room { Within::NoGain } else { Within::NoRoom }
}

/// Whether a move was undone too often too lately: the wait is the cooldown, doubled with every time but the first.
fn failed_before(failed: Option<&Failed>, policy: &Policy, what: impl Fn() -> String) -> Option<Refusal> {
    let Failed { count, since } = *failed?;
    let doubled = 1u32.checked_shl(count.saturating_sub(1)).unwrap_or(u32::MAX);
    let wait = policy.cooldown.0.saturating_mul(doubled).min(LONGEST_WAIT.max(policy.cooldown.0));
    (since < wait).then(|| Refusal::FailedBefore { what: what(), count, wait })
}

/// High-demand VMs of a host: those that came to it last first (in steps of a half-life), since they made the crowd and a
/// job that has run for long is disturbed last; then the highest demand (in steps of 5 %), the fewest bytes to copy, name.
fn high_vms<'a>(snapshot: &'a Snapshot, policy: &Policy, host: &HostId) -> Vec<(&'a VmId, &'a Vm)> {
    let mut vms: Vec<_> = snapshot.vms.iter().filter(|(_, vm)| vm.host == *host && is_high(vm, policy)).collect();
    let age = |vm: &Vm| vm.high_for.map_or(0, |span| span.as_millis() / policy.half_life.0.as_millis().max(1));
    let step = |vm: &Vm| (vm.demand.unwrap_or(0.0) * 20.0).round();
    vms.sort_by(|(name_a, a), (name_b, b)| {
        age(a)
            .cmp(&age(b))
            .then_with(|| step(b).total_cmp(&step(a)))
            .then(a.memory_mib.cmp(&b.memory_mib))
            .then_with(|| name_a.cmp(name_b))
    });
    vms
}

/// Whether a host can take a VM now. Errors: the first thing in the way.
pub fn takes(snapshot: &Snapshot, policy: &Policy, name: &VmId, vm: &Vm, to: &HostId) -> Result<(), Refusal> {
    let Some(host) = snapshot.hosts.get(to).filter(|host| host.standing == Standing::Live) else {
        return Err(Refusal::HostUnknown { host: to.clone() });
    };
    if host.draining {
        return Err(Refusal::Draining { host: to.clone() });
    }
    if vm.doing != Doing::Running {
        return Err(Refusal::NotMovable { vm: name.clone(), why: "it does not run".into() });
    }
    if let Some(environment) = snapshot.environments.get(&vm.environment)
        && vm.role == Role::Head
        && environment.home != host.domain
    {
        return Err(Refusal::HeadStays { vm: name.clone(), home: environment.home.clone() });
    }
    if snapshot.hosts.get(&vm.host).is_some_and(|from| from.driver != host.driver) {
        return Err(Refusal::OtherDriver { vm: name.clone(), host: to.clone() });
    }
    let free_mib = snapshot.free_memory_mib(to);
    if free_mib < vm.memory_mib {
        return Err(Refusal::NotEnoughMemory { host: to.clone(), vm: name.clone(), free_mib, wanted_mib: vm.memory_mib });
    }
    if has_cores(snapshot, policy, vm, to) { Ok(()) } else { Err(Refusal::NotEnoughCores { host: to.clone(), vm: name.clone() }) }
}

/// Whether a host's cores suffice for what it has and one VM more, see the head of this file.
fn has_cores(snapshot: &Snapshot, policy: &Policy, vm: &Vm, to: &HostId) -> bool {
    let cores = snapshot.hosts[to].cores;
    let held = || snapshot.held_by(to).map(|(_, held)| held).chain([vm]);
    let firm: f64 = held().filter(|vm| !is_low(vm, policy)).map(Vm::wanted_cores).sum();
    let all: f64 = held().map(Vm::wanted_cores).sum();
    firm <= cores + EPSILON && all <= cores * (1.0 + policy.overcommit) + EPSILON
}

/// One environment, as a gang, out of an overloaded domain.
fn across(
    snapshot: &Snapshot,
    policy: &Policy,
    before: &Score,
    worst: &HostId,
    domain: &DomainId,
    refusals: &mut Vec<Refusal>,
) -> Option<(Proposal, Score)> {
    // No room elsewhere is no overload yet: as long as every high-demand VM has a core, the domain bears its load.
    let high: u32 = snapshot.vms.values().filter(|vm| vm.host == *worst && is_high(vm, policy)).map(|vm| vm.vcpus).sum();
    if f64::from(high) <= snapshot.hosts[worst].cores + EPSILON {
        return None;
    }
    let mut domains: Vec<_> = snapshot.hosts.values().map(|host| &host.domain).filter(|other| *other != domain).collect();
    domains.sort();
    domains.dedup();
    let mut best: Option<Gang> = None;
    for (environment, known) in &snapshot.environments {
        let here = |vm: &Vm| snapshot.domain(&vm.host) == Some(domain);
        if !snapshot.compute_nodes(environment).any(|(_, vm)| here(vm)) {
            continue;
        }
        if known.rested.is_some_and(|rested| rested < policy.cooldown.0) {
            refusals.push(Refusal::EnvironmentCoolingDown { environment: environment.clone() });
            continue;
        }
        for to in &domains {
            if let Some(refusal) = failed_before(known.failed.get(to), policy, || format!("{environment} to {to}")) {
                refusals.push(refusal);
                continue;
            }
            match gang(snapshot, policy, environment, to) {
                Err(refusal) => refusals.push(refusal),
                Ok(found) if before.spread - found.after.spread < policy.min_gain - EPSILON => {
                    refusals.push(Refusal::NoGain { what: format!("{environment} to {to}") });
                }
                Ok(found) => {
                    if best.as_ref().is_none_or(|best| found.order(best) == Ordering::Less) {
                        best = Some(found);
                    }
                }
            }
        }
    }
    let best = best?;
    let reason = format!(
        "{worst} has {} high-demand VMs on {} cores and no other host of {domain} has room: {} moves to {} as a whole; the spread of host scores falls from {:.3} to {:.3}",
        high_count(snapshot, worst, policy),
        snapshot.hosts[worst].cores,
        best.environment,
        best.to,
        before.spread,
        best.after.spread,
    );
    Some((Proposal { moves: best.moves, gang: Some(best.environment), reason }, best.after))
}

/// A gang and what it would bring.
#[derive(Debug, Clone)]
pub struct Gang {
    /// Whose compute nodes.
    pub environment: EnvironmentId,
    /// Where to.
    pub to: DomainId,
    /// Each VM's host there.
    pub moves: Vec<Move>,
    /// Score afterwards.
    pub after: Score,
    memory_mib: u64,
}

impl Gang {
    /// Less is better: lowest spread afterwards, then fewest bytes to copy, then name.
    fn order(&self, other: &Self) -> Ordering {
        let step = |gang: &Self| (gang.after.spread / EPSILON).round();
        step(self)
            .total_cmp(&step(other))
            .then(self.memory_mib.cmp(&other.memory_mib))
            .then_with(|| self.environment.cmp(&other.environment))
            .then_with(|| self.to.cmp(&other.to))
    }
}

/// Finds a host in a domain for every compute node of an environment that is not there yet: largest wish first, each to
/// the host where it leaves the fewest cores free. Errors: what is in the way.
pub fn gang(snapshot: &Snapshot, policy: &Policy, environment: &EnvironmentId, to: &DomainId) -> Result<Gang, Refusal> {
    let mut nodes: Vec<_> = snapshot.compute_nodes(environment).filter(|(_, vm)| snapshot.domain(&vm.host) != Some(to)).collect();
    nodes.sort_by(|(name_a, a), (name_b, b)| {
        b.wanted_cores().total_cmp(&a.wanted_cores()).then(b.memory_mib.cmp(&a.memory_mib)).then_with(|| name_a.cmp(name_b))
    });
    let full = |why: String| Refusal::DomainFull { domain: to.clone(), environment: environment.clone(), why };
    let mut moved = snapshot.clone();
    let mut moves = Vec::new();
    for (name, vm) in &nodes {
        if snapshot.hosts.get(&vm.host).is_none_or(|host| host.standing != Standing::Live) {
            return Err(Refusal::HostUnknown { host: vm.host.clone() });
        }
        let mut why = String::from("it has no host whose figures are known");
        let mut fitting: Vec<_> = moved
            .live_hosts(to)
            .filter(|host| takes(&moved, policy, name, vm, host).map_err(|refusal| why = refusal.to_string()).is_ok())
            .collect();
        fitting.sort_by(|a, b| moved.free_cores(a).total_cmp(&moved.free_cores(b)).then_with(|| a.cmp(b)));
        let Some(host) = fitting.first().copied().cloned() else { return Err(full(why)) };
        moved = moved.with_move(name, &host);
        moves.push(Move { vm: (*name).clone(), from: vm.host.clone(), to: host });
    }
    if moves.is_empty() {
        return Err(full("they are there already".into()));
    }
    moves.sort_by(|a, b| a.vm.cmp(&b.vm));
    let memory_mib = nodes.iter().map(|(_, vm)| vm.memory_mib).sum();
    Ok(Gang { environment: environment.clone(), to: to.clone(), moves, after: score(&moved, policy), memory_mib })
}
