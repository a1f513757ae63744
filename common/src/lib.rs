//! Vocabulary, wire formats, messages and configuration shared by the violin daemons.
//!
//! Nothing in here reads a clock, opens a socket or a file, or is asynchronous: every value is plain data.
//! What enters needs two users. Read in this order: [`id`], [`addr`], [`epoch`] (the words), [`wire`] (what a frame looks
//! like between two switches), [`control`] (what daemons tell each other), [`api`] (what operators and local programs
//! ask), [`config`] (the files).
#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod addr;
pub mod api;
pub mod config;
pub mod control;
pub mod epoch;
pub mod id;
pub mod time;
pub mod wire;

pub use addr::{MacAddr, Vni};
pub use epoch::Epoch;
pub use id::{DomainId, EnvironmentId, HostId, PortId, VmId, is_interface_name, is_label};
pub use time::{Anchor, Instant, Utc};
