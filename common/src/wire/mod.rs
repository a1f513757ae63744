//! What travels between two switches.
//!
//! The contract of every reader here: check the length once when parsing, then no accessor panics; positions come from
//! named offsets only; nothing allocates.

pub mod ethernet;
pub mod mesh;
