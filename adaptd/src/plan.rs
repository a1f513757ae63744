//! A proposal spelled out: ordered steps, each with its precondition and its undo; nothing is left to choose.
//!
//! Plans are what the journal holds, so their types only grow at the end. [`crate::check`] looks at a plan with other eyes,
//! [`crate::act`] carries it out.

use crate::policy::{Move, Proposal};
use serde::{Deserialize, Serialize};
use violin_common::control::monitor::MigrationMode;
use violin_common::{EnvironmentId, HostId, VmId};

/// Who wants a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Origin {
    /// The policy: must balance.
    Policy,
    /// An operator: may overload cores, never memory.
    Operator,
}

/// One unit of work: one move, or a gang.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Generation of the manager that made it; a later manager fences it.
    pub generation: u64,
    /// Counts up over the life of the deployment.
    pub number: u64,
    /// Who wants it.
    pub origin: Origin,
    /// The environment whose compute nodes move together: all or none.
    pub gang: Option<EnvironmentId>,
    /// Moves under way at once.
    pub parallel: u32,
    /// The moves, in order.
    pub moves: Vec<PlannedMove>,
}

/// The steps of one VM's move, in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedMove {
    /// Number of its migration record.
    pub migration: u64,
    /// Which VM, from where to where.
    pub vm: VmId,
    /// Source.
    pub from: HostId,
    /// Destination.
    pub to: HostId,
    /// Prepare, migrate, finish.
    pub steps: Vec<Step>,
}

/// One step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// Host whose monitor does it.
    pub at: HostId,
    /// What.
    pub action: Action,
    /// What must hold before.
    pub precondition: Precondition,
    /// What takes it back.
    pub undo: Undo,
}

/// What a step does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Action {
    /// Makes the destination ready.
    Prepare,
    /// Moves the VM.
    Migrate(MigrationMode),
    /// Sees that it runs there.
    Finish,
}

/// What must hold before a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Precondition {
    /// The VM runs at its source and both monitors are connected.
    RunsAtSource,
    /// The destination has said where the hypervisor's data goes.
    DestinationReady,
    /// The source has said that the VM is gone.
    LeftSource,
}

/// What takes a step back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Undo {
    /// The destination forgets the VM, unless it runs there.
    CancelIncoming,
    /// The source's hypervisor gives up; the VM runs on there.
    AbortMigration,
    /// Past the point of no return: only a move the other way takes it back.
    MoveBack,
}

/// Spells out one move.
pub fn planned(moved: &Move, migration: u64, mode: MigrationMode) -> PlannedMove {
    let step = |at: &HostId, action, precondition, undo| Step { at: at.clone(), action, precondition, undo };
    PlannedMove {
        migration,
        vm: moved.vm.clone(),
        from: moved.from.clone(),
        to: moved.to.clone(),
        steps: vec![
            step(&moved.to, Action::Prepare, Precondition::RunsAtSource, Undo::CancelIncoming),
            step(&moved.from, Action::Migrate(mode), Precondition::DestinationReady, Undo::AbortMigration),
            step(&moved.to, Action::Finish, Precondition::LeftSource, Undo::MoveBack),
        ],
    }
}

/// What a plan is stamped with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// Generation of this manager.
    pub generation: u64,
    /// Number of the plan.
    pub number: u64,
    /// Number of its first migration; the others count up.
    pub first_migration: u64,
    /// Moves of a gang under way at once.
    pub parallel: u32,
    /// How VMs are moved.
    pub mode: MigrationMode,
}

/// Spells out a proposal.
pub fn plan(proposal: &Proposal, origin: Origin, stamp: Stamp) -> Plan {
    Plan {
        generation: stamp.generation,
        number: stamp.number,
        origin,
        gang: proposal.gang.clone(),
        parallel: stamp.parallel.max(1),
        moves: (stamp.first_migration..)
            .zip(&proposal.moves)
            .map(|(migration, moved)| planned(moved, migration, stamp.mode))
            .collect(),
    }
}
