//! What the journal holds, and the state its records add up to.
//!
//! Records are written before anything is done and never changed; [`State::apply`] is the only way the state changes, so
//! a restart that reads the records again arrives at the same state. Enums only ever grow at their end.

mod state;
mod times;

use crate::plan::Plan;
use serde::{Deserialize, Serialize};
pub use state::{Abandoned, Goal, KEPT, KnownEnvironment, KnownVm, Life, State, Unfinished, vm_spec};
use std::collections::BTreeMap;
pub use times::{MoveTimes, Times};
use violin_common::api::adapt::{DecisionSeen, Migration, Mode};
use violin_common::config::environment::EnvironmentSpec;
use violin_common::control::monitor::ImageDigest;
use violin_common::{DomainId, EnvironmentId, Epoch, HostId, Instant, VmId};

/// One line of the journal, versioned.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Record {
    /// The first form.
    V1(RecordV1),
}

impl Record {
    /// The key pair it holds, and the environment that this is of. The journal keeps the private half apart.
    pub fn keys_mut(&mut self) -> Option<(&EnvironmentId, &mut Keys)> {
        match self {
            Self::V1(RecordV1::EnvironmentBegins(stored)) => Some((&stored.spec.name, &mut stored.keys)),
            Self::V1(_) => None,
        }
    }
}

/// What happened, or is about to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum RecordV1 {
    /// A manager started; plans of lower generations are finished or undone by it and by no other.
    Generation {
        /// Its generation.
        generation: u64,
        /// When, on the machine's monotonic clock.
        at: Instant,
    },
    /// An environment is about to be started.
    EnvironmentBegins(Box<StoredEnvironment>),
    /// A VM is about to be started.
    VmStarts {
        /// Which.
        vm: VmId,
        /// Epoch its port claims.
        epoch: Epoch,
    },
    /// All its VMs are ready.
    EnvironmentReady(EnvironmentId),
    /// An environment is about to be ended: none of its VMs may run anywhere from now on.
    EnvironmentEnds(EnvironmentId),
    /// Nothing is left of it.
    EnvironmentGone(EnvironmentId),
    /// A VM was found on another host than the journal says, without a move of ours.
    VmFound {
        /// Which.
        vm: VmId,
        /// Where.
        host: HostId,
    },
    /// A decision was taken.
    Decided {
        /// As it is told.
        decision: Box<DecisionSeen>,
        /// The snapshot it was taken on, as text.
        snapshot: String,
    },
    /// A plan is about to be carried out; its migrations are announced.
    PlanBegins {
        /// The plan.
        plan: Box<Plan>,
        /// Its migrations, in the order of its moves.
        migrations: Vec<Migration>,
    },
    /// A step of a move is about to be done.
    StepBegins {
        /// Number of the migration.
        migration: u64,
        /// Place of the step in its move, from 0.
        step: u32,
        /// When.
        at: Instant,
    },
    /// The plan's finished moves are about to be taken back by these migrations.
    PlanReturns {
        /// Number of the plan.
        plan: u64,
        /// The moves back.
        back: Vec<crate::plan::PlannedMove>,
        /// Their migrations.
        migrations: Vec<Migration>,
        /// Why.
        why: String,
    },
    /// A move ended; the VM is where its outcome says.
    MoveEnded(Box<Migration>),
    /// All moves of a plan have ended.
    PlanEnded {
        /// Number of the plan.
        plan: u64,
    },
    /// The access namespace of an environment is about to be made on a host.
    AccessOpens {
        /// Environment.
        environment: EnvironmentId,
        /// Where.
        host: HostId,
    },
    /// A host's monitor has said that an ended VM is stopped there.
    VmStopped {
        /// Which.
        vm: VmId,
        /// Where.
        host: HostId,
    },
    /// A host's monitor has said that the access namespace of an environment is gone there.
    AccessClosed {
        /// Environment.
        environment: EnvironmentId,
        /// Where.
        host: HostId,
    },
    /// An operator set what is done with decisions.
    ModeSet(KeptMode),
    /// A move is about to end without anybody saying at which of its ends the VM runs; this is the one it is not recorded at.
    MoveInDoubt {
        /// Which.
        vm: VmId,
        /// Where it may run too.
        host: HostId,
    },
    /// An operator wants a host empty, or no longer.
    HostDrains {
        /// Which.
        host: HostId,
        /// Whether.
        on: bool,
    },
    /// An operator has said that a host is gone for good, with whatever runs there.
    HostForgotten(HostId),
    /// What time it is: times recorded from here on are of this clock.
    Clock {
        /// The clock's name.
        name: String,
        /// What it shows.
        at: Instant,
        /// Nanoseconds since 1970, in UTC.
        utc_ns: u64,
    },
    /// Spans of a move between two hosts, each with how far off it may be, in milliseconds; none: it could not be measured.
    Measured {
        /// Number of the migration.
        migration: u64,
        /// From its stop at the source to its start at the destination.
        pause: Option<(f64, f64)>,
        /// From the last frame delivered there to the first one read here.
        gap: Option<(f64, f64)>,
    },
}

/// A mode an operator set, kept over restarts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptMode {
    /// What was set.
    pub set: Mode,
    /// What the configuration said then: whoever changes it there afterwards means that.
    pub configured: Mode,
}

/// The mode a manager starts with, and why that: `--dry-run`, else what an operator has set, else the configuration.
pub fn mode_at_start(dry_run: bool, kept: Option<KeptMode>, configured: Mode) -> (Mode, &'static str) {
    match kept {
        _ if dry_run => (Mode::DryRun, "--dry-run was given"),
        Some(kept) if kept.configured == configured => (kept.set, "set by `violin mode` before this start"),
        Some(_) => (configured, "the configuration; its `mode` was changed since `violin mode` was last used"),
        None => (configured, "the configuration"),
    }
}

/// An environment as the journal keeps it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StoredEnvironment {
    /// As it was asked for.
    pub spec: EnvironmentSpec,
    /// Domain its head node stays in.
    pub home: DomainId,
    /// Image of its VMs.
    pub image: Option<ImageDigest>,
    /// Where each VM is placed first.
    pub placement: BTreeMap<VmId, HostId>,
    /// Key pair of the environment.
    pub keys: Keys,
}

/// An OpenSSH key pair.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keys {
    /// One line, as in `authorized_keys`.
    pub public: String,
    /// PEM; empty on disk but in journals of earlier versions, and where its file beside the journal was lost.
    pub private: String,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keys").field("public", &self.public).finish_non_exhaustive()
    }
}
