//! What daemons tell each other over QUIC, encoded with postcard.
//!
//! Enums only ever grow at their end; a change of meaning raises the protocol number of that surface.

pub mod mesh;
pub mod monitor;
