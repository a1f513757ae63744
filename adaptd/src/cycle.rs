//! One turn of the manager's thinking: observe → score → propose → decide → plan → check.
//!
//! Everything it thought is returned, the refusals too; the journal and the executor come after it. The same code runs
//! live, dry and in replay. The steps: [`crate::observe`] makes the snapshot's figures, [`crate::score`] weighs it,
//! [`crate::policy`] proposes, this file decides whether the time is ripe, [`crate::plan`] spells out, [`crate::check`]
//! looks again.

use crate::check::{Violation, check};
use crate::model::Snapshot;
use crate::plan::{Origin, Plan, Stamp, plan};
use crate::policy::{Proposal, Refusal, Thought, violin};
use crate::score::{Score, is_high};
use std::collections::BTreeSet;
use violin_common::api::adapt::Term;
use violin_common::config::adapt::Policy;
use violin_common::{HostId, Instant, VmId};

/// What is remembered from one cycle to the next: how long the picture has been the same.
///
/// Smoothed demands cross the threshold one after another, though the load came at once; a decision on half of such a
/// picture would move the wrong VMs.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Settling {
    picture: BTreeSet<(VmId, HostId)>,
    cycles: u32,
    wanted_since: Option<Instant>,
}

impl Settling {
    /// Takes in this cycle's picture; returns what is still open, if anything.
    fn take(&mut self, now: Instant, snapshot: &Snapshot, policy: &Policy, wants: bool) -> Option<String> {
        let picture: BTreeSet<_> =
            snapshot.vms.iter().filter(|(_, vm)| is_high(vm, policy)).map(|(name, vm)| (name.clone(), vm.host.clone())).collect();
        if picture == self.picture {
            self.cycles = self.cycles.saturating_add(1);
        } else {
            *self = Self { picture, cycles: 1, wanted_since: self.wanted_since };
        }
        if !wants {
            self.wanted_since = None;
            return None;
        }
        let since = *self.wanted_since.get_or_insert(now);
        if self.cycles < policy.settle {
            return Some(format!("the set of high-demand VMs is the same for {} of {} cycles", self.cycles, policy.settle));
        }
        let rising = snapshot.vms.iter().find(|(_, vm)| vm.rising);
        // A VM whose load comes in spikes would rise for ever: two half-lives show what is there to be seen.
        match rising {
            Some((vm, _)) if now.since(since) < policy.half_life.0 * 2 => Some(format!("the demand of {vm} is rising")),
            _ => None,
        }
    }
}

/// All that one cycle thought.
#[derive(Debug, Clone, PartialEq)]
pub struct Cycle {
    /// Scores and refusals.
    pub thought: Thought,
    /// What is to be done now, if anything.
    pub decision: Option<Decision>,
}

/// A decision that has been planned and checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// What is wanted.
    pub proposal: Proposal,
    /// Terms before and after.
    pub terms: Vec<Term>,
    /// How.
    pub plan: Plan,
}

/// Thinks once about a snapshot taken at `now`.
pub fn cycle(now: Instant, snapshot: &Snapshot, policy: &Policy, settling: &mut Settling, stamp: Stamp) -> Cycle {
    let mut thought = violin::think(snapshot, policy);
    let unsettled = settling.take(now, snapshot, policy, thought.proposal.is_some() && !thought.drains);
    if let Some(why) = unsettled {
        thought.refusals.push(Refusal::Unsettled { why });
        return Cycle { thought, decision: None };
    }
    let decision = match thought.proposal.as_ref().map(|(proposal, after)| (proposal.clone(), after)) {
        None => None,
        Some((proposal, after)) => match decide(snapshot, policy, proposal, Origin::Policy, stamp) {
            Ok(mut decision) => {
                decision.terms = terms(&thought.before, after);
                Some(decision)
            }
            Err(violation) => {
                thought.refusals.push(Refusal::NotMovable { vm: violation.vm.clone(), why: violation.what });
                None
            }
        },
    };
    Cycle { thought, decision }
}

/// Plans and checks what a policy or an operator wants.
pub fn decide(
    snapshot: &Snapshot,
    policy: &Policy,
    proposal: Proposal,
    origin: Origin,
    stamp: Stamp,
) -> Result<Decision, Violation> {
    let plan = plan(&proposal, origin, stamp);
    check(snapshot, policy, &plan)?;
    let after = proposal.moves.iter().fold(snapshot.clone(), |moved, next| moved.with_move(&next.vm, &next.to));
    let terms = terms(&crate::score::score(snapshot, policy), &crate::score::score(&after, policy));
    Ok(Decision { proposal, terms, plan })
}

/// The terms of two scores side by side; hosts whose score does not change are left out.
pub fn terms(before: &Score, after: &Score) -> Vec<Term> {
    let mut terms = vec![
        term("spread of host scores", before.spread, after.spread, "high-demand VMs per core"),
        term("overload", before.overload_cores, after.overload_cores, "cores"),
    ];
    for (host, score) in &before.hosts {
        let then = after.hosts.get(host).copied().unwrap_or(*score);
        if (then - score).abs() > f64::EPSILON {
            terms.push(term(&format!("score of {host}"), *score, then, "high-demand VMs per core"));
        }
    }
    terms
}

fn term(name: &str, before: f64, after: f64, unit: &str) -> Term {
    Term { name: name.into(), before, after, unit: unit.into() }
}
