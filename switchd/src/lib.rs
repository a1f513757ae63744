//! The fabric: one layer-2 switch per virtual network, spread over all hosts.
//!
//! A frame's way out: [`tables`] (what a worker knows) → [`outbound`] (port → parse → admit → learn → lookup → slice →
//! [`seal`] → burst). Its way in: [`inbound`] (datagram → open → parse → merge → learn → lookup → deliver). [`worker`] holds what
//! both need between two vectors of frames; none of them reads a clock or opens a socket, that is done in `io`.
#![deny(unsafe_code)]
#![warn(missing_docs)]
#![warn(clippy::disallowed_methods, clippy::disallowed_types)]

// Data plane.
pub mod counters;
pub mod drops;
pub mod fdb;
pub mod inbound;
pub mod nested;
pub mod outbound;
pub mod reassembly;
pub mod seal;
pub mod slice;
pub mod spin;
pub mod tables;
pub mod toobig;
pub mod traffic;
pub mod transport;
mod tunnel;
pub mod virtio;
pub mod worker;

// Control side.
pub mod members;
pub mod moves;
pub mod switch;

#[cfg(feature = "io")]
#[allow(clippy::disallowed_methods, clippy::disallowed_types)]
pub mod io;
#[cfg(feature = "io")]
#[allow(clippy::disallowed_methods, clippy::disallowed_types)]
pub mod port;
