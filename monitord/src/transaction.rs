//! Which step follows when a VM changes, and how far-reaching commands are undone: pure tables.

use crate::hypervisor::Change;
use serde::{Deserialize, Serialize};
use violin_common::HostId;

/// How a VM stands to this host. Kept on disk, so a restarted monitor goes on from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// Runs here.
    Here,
    /// Being moved away.
    Leaving {
        /// To this host.
        to: HostId,
        /// What that host's hypervisor gave for the move; empty in records of earlier versions.
        #[serde(default)]
        uri: String,
    },
    /// Prepared for, does not run here yet.
    Arriving {
        /// What the hypervisor gave for the source.
        uri: String,
    },
}

/// What the switch has to be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fabric {
    /// The VM stopped: fence it.
    Stopped,
    /// The VM runs here (again).
    Running,
}

/// Says what the switch is told when the hypervisor reports a change.
///
/// A pause outside a move tells nothing: the VM keeps its MAC. A VM that ended in a move away was stopped before, but the
/// event of that may have been lost, and fencing twice is harmless while not fencing is not.
pub const fn on_change(standing: &Standing, change: Change) -> Option<Fabric> {
    match (standing, change) {
        (Standing::Leaving { .. }, Change::Stopped | Change::Ended) => Some(Fabric::Stopped),
        (Standing::Leaving { .. } | Standing::Arriving { .. }, Change::Running) => Some(Fabric::Running),
        (Standing::Here, _) | (Standing::Arriving { .. }, Change::Stopped | Change::Ended) => None,
    }
}

/// A part of what one command makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The guest's interface.
    Interface,
    /// The switch's port.
    Port,
    /// The hypervisor's readiness for an arrival.
    Incoming,
    /// The running VM.
    Guest,
}

/// What a command has made so far, to be undone in reverse if a later part fails.
#[derive(Debug, Default)]
pub struct Made(Vec<Part>);

impl Made {
    /// Notes a part *before* it is made: a part that fails half-way is undone too, every undoing being harmless alone.
    pub fn begin(&mut self, part: Part) {
        self.0.push(part);
    }

    /// The parts in the order in which they are to be undone.
    pub fn undo(self) -> impl Iterator<Item = Part> {
        self.0.into_iter().rev()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaving() -> Standing {
        Standing::Leaving { to: "h2".parse().unwrap(), uri: String::new() }
    }

    #[test]
    fn a_stop_fences_only_in_a_move_away() {
        assert_eq!(on_change(&leaving(), Change::Stopped), Some(Fabric::Stopped));
        assert_eq!(on_change(&Standing::Here, Change::Stopped), None);
        assert_eq!(on_change(&Standing::Arriving { uri: String::new() }, Change::Stopped), None);
    }

    #[test]
    fn running_is_told_at_the_destination_and_after_a_failed_move() {
        assert_eq!(on_change(&Standing::Arriving { uri: String::new() }, Change::Running), Some(Fabric::Running));
        assert_eq!(on_change(&leaving(), Change::Running), Some(Fabric::Running));
        assert_eq!(on_change(&Standing::Here, Change::Running), None);
    }

    #[test]
    fn a_vm_that_left_is_fenced_even_if_its_stop_was_missed() {
        assert_eq!(on_change(&leaving(), Change::Ended), Some(Fabric::Stopped));
    }

    #[test]
    fn a_record_of_a_leaving_vm_without_a_uri_is_read() {
        assert_eq!(serde_json::from_str::<Standing>(r#"{"leaving":{"to":"h2"}}"#).unwrap(), leaving());
    }

    #[test]
    fn parts_are_undone_last_first() {
        let mut made = Made::default();
        made.begin(Part::Interface);
        made.begin(Part::Port);

        assert_eq!(made.undo().collect::<Vec<_>>(), [Part::Port, Part::Interface]);
    }
}
