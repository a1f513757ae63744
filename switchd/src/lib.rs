//! The fabric: one layer-2 switch per virtual network, spread over all hosts.
//!
//! A frame's way out: [`tables`] (what a worker knows) → [`outbound`] (port → parse → admit → learn → lookup → slice →
//! burst). Its way in: [`inbound`] (datagram → admit → parse → merge → learn → lookup → deliver). [`worker`] holds what
//! both need between two vectors of frames; none of them reads a clock or opens a socket, that is done in `io`.
#![deny(unsafe_code)]
#![warn(missing_docs)]

// Data plane.
pub mod counters;
pub mod drops;
pub mod fdb;
pub mod inbound;
pub mod nested;
pub mod outbound;
pub mod reassembly;
pub mod slice;
pub mod tables;
pub mod toobig;
pub mod traffic;
pub mod transport;
pub mod virtio;
pub mod worker;

// Control side.
pub mod members;
pub mod moves;
pub mod switch;

#[cfg(feature = "io")]
pub mod io;
#[cfg(feature = "io")]
pub mod port;
