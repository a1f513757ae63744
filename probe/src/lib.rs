//! What runs inside a guest, and what asks it questions from outside.
//!
//! The pure part says what is on the wire ([`frame`]), what was received ([`record`]), what a guest is told ([`config`]),
//! what a transfer's blocks are ([`block`]) and how HPL is told and read ([`hpl`]). Everything that touches the machine is
//! in [`io`]. The contract of a guest is docs/guest.md.

pub mod block;
pub mod config;
pub mod frame;
pub mod hpl;
pub mod io;
pub mod record;
