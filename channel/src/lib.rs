//! How the daemons talk: QUIC with mutual TLS between machines, JSON lines over a Unix socket on one.
//!
//! [`tls`] says who a peer is, [`quic`] makes endpoints and connections, [`frame`] puts messages on streams, [`local`] is
//! the socket for operators and neighbours, [`log`] what a daemon writes down, [`seldom`] what it does not write each time,
//! [`clock`] its host's clocks, [`start`] what it needs of its host to start, [`kernel`] settings of that.
//! Nothing here knows what a message means.
#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod clock;
pub mod frame;
pub mod kernel;
pub mod local;
pub mod log;
pub mod pki;
pub mod quic;
pub mod seldom;
pub mod start;
pub mod tls;
