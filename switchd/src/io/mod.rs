//! Everything impure: sockets, clocks, threads.

// Data plane.
pub mod dataplane;
pub mod guard;
pub mod link;
pub mod needs;
pub mod netlink;
pub mod nft;
mod outqueue;
mod ports;
mod pump;
pub mod sys;
pub mod udp;

// Control side.
pub mod api;
pub mod attach;
pub mod ciphers;
pub mod control;
pub mod mesh_socket;
pub mod random;
pub mod route;
pub mod run;

pub use sys::now;
