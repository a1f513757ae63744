//! Everything that touches the machine.

pub mod burn;
pub mod clock;
pub mod guest;
pub mod hpl;
pub mod link;
pub mod node;
pub mod packet;
pub mod sandbox;
pub mod send;
pub mod signal;
pub mod ssh;
pub mod transfer;
