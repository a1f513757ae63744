//! Policies: a snapshot in, a [`Thought`] out. They never act and keep nothing between two cycles.

pub mod violin;

use crate::score::Score;
use serde::{Deserialize, Serialize};
use std::time::Duration;
use violin_common::{DomainId, EnvironmentId, HostId, VmId};

/// One VM to another host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Move {
    /// Which.
    pub vm: VmId,
    /// Where it runs.
    pub from: HostId,
    /// Where to.
    pub to: HostId,
}

/// What a policy, or an operator, wants done.
#[derive(Debug, Clone, PartialEq)]
pub struct Proposal {
    /// The moves, in the order in which they are to be made.
    pub moves: Vec<Move>,
    /// The environment whose compute nodes move as one unit, if they do.
    pub gang: Option<EnvironmentId>,
    /// Why, in words.
    pub reason: String,
}

/// What was considered and not done.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Refusal {
    /// Nothing is decided while moves are under way.
    #[error("{vm} is moving to {to}: nothing else is decided before it is there")]
    MovesUnderWay {
        /// A VM that moves.
        vm: VmId,
        /// Where to.
        to: HostId,
    },
    /// A host's figures are missing or too old.
    #[error("nothing moves from or to {host}: its monitor is away or its observations are too old")]
    HostUnknown {
        /// Which.
        host: HostId,
    },
    /// A VM moved a short while ago.
    #[error("{vm} stays: it moved less than the cooldown ago")]
    VmCoolingDown {
        /// Which.
        vm: VmId,
    },
    /// An environment moved a short while ago.
    #[error("{environment} stays: it moved as a gang less than the cooldown ago")]
    EnvironmentCoolingDown {
        /// Which.
        environment: EnvironmentId,
    },
    /// The same move was undone before: it is tried less and less often.
    #[error("{what} was undone {count} times in a row; it is tried again {wait:?} after the last time")]
    FailedBefore {
        /// The move, in words.
        what: String,
        /// How often.
        count: u32,
        /// From the end of the last one.
        wait: Duration,
    },
    /// A VM cannot be moved now.
    #[error("{vm} cannot be moved now: {why}")]
    NotMovable {
        /// Which.
        vm: VmId,
        /// Why.
        why: String,
    },
    /// Head nodes stay at home.
    #[error("{vm} is a head node and stays in {home}")]
    HeadStays {
        /// Which.
        vm: VmId,
        /// Its home.
        home: DomainId,
    },
    /// Drivers differ.
    #[error("{vm} cannot go to {host}: the hypervisors have different drivers")]
    OtherDriver {
        /// Which.
        vm: VmId,
        /// Where to.
        host: HostId,
    },
    /// Memory is a hard limit: a host that swaps stalls every VM on it.
    #[error("{host} has {free_mib} MiB free, {vm} needs {wanted_mib} MiB")]
    NotEnoughMemory {
        /// Where to.
        host: HostId,
        /// Which.
        vm: VmId,
        /// What there is.
        free_mib: u64,
        /// What is needed.
        wanted_mib: u64,
    },
    /// Cores that its VMs leave over do not suffice.
    #[error("{host} has not enough free cores for {vm}")]
    NotEnoughCores {
        /// Where to.
        host: HostId,
        /// Which.
        vm: VmId,
    },
    /// It is to be emptied.
    #[error("{host} is being drained: nothing goes there before `violin host undrain {host}`")]
    Draining {
        /// Which.
        host: HostId,
    },
    /// A VM on a host that is to be emptied has nowhere to go.
    #[error("{vm} cannot leave {host}, which is being drained: {why}")]
    CannotLeave {
        /// Which.
        vm: VmId,
        /// Where it is.
        host: HostId,
        /// What is in the way.
        why: String,
    },
    /// Balance would not get better.
    #[error("{what}: the spread would not fall by the least gain")]
    NoGain {
        /// The move, in words.
        what: String,
    },
    /// No host of a domain can take all compute nodes.
    #[error("{domain} cannot take all compute nodes of {environment}: {why}")]
    DomainFull {
        /// Where to.
        domain: DomainId,
        /// Which.
        environment: EnvironmentId,
        /// What is in the way.
        why: String,
    },
    /// The picture is not yet complete.
    #[error("waiting for the picture to settle: {why}")]
    Unsettled {
        /// What is still changing.
        why: String,
    },
    /// An environment is being started or ended.
    #[error("nothing is decided: {environment} is being {doing}")]
    Busy {
        /// Which.
        environment: EnvironmentId,
        /// `started` or `ended`.
        doing: &'static str,
    },
    /// A VM runs on two hosts: a fault that only its operator can undo.
    #[error("{vm} is not moved: it runs on {second} too; look which of the two is right and end the other one on its host")]
    RunsTwice {
        /// Which.
        vm: VmId,
        /// The host the journal does not have it on.
        second: HostId,
    },
}

/// All a policy thought in one cycle.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Thought {
    /// How things stand.
    pub before: Score,
    /// What is wanted, and how things would stand then.
    pub proposal: Option<(Proposal, Score)>,
    /// Whether that is to empty a host: no balance has to settle before.
    pub drains: bool,
    /// What was considered and refused.
    pub refusals: Vec<Refusal>,
}
