//! The epoch of an owned MAC.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Orders the successive owners of one MAC: the higher epoch is the later owner.
///
/// The lower half counts moves and is raised only by the owner's switch, by one per move (by two when a fenced VM runs on
/// at its source). The upper half, the *incarnation*, is raised only by the manager, at every later start of a VM with that MAC.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Epoch {
    /// Raised by the manager's journal only.
    pub incarnation: u32,
    /// Raised by the owner's switch only.
    pub moves: u32,
}

impl Epoch {
    /// The epoch of a MAC whose VM was just started for the first time.
    pub const FIRST: Self = Self { incarnation: 1, moves: 1 };

    /// The epoch `moves` further on, in the same incarnation.
    #[must_use]
    pub const fn after(self, moves: u32) -> Self {
        Self { incarnation: self.incarnation, moves: self.moves.saturating_add(moves) }
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.incarnation, self.moves)
    }
}

impl fmt::Debug for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_higher_incarnation_outranks_any_number_of_moves() {
        let moved = Epoch::FIRST.after(1000);
        assert!(Epoch { incarnation: 2, moves: 0 } > moved);
        assert!(moved > Epoch::FIRST);
    }
}
