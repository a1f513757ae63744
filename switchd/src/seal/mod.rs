//! How data between two switches is kept secret and unforgeable.
//!
//! A session's secret comes from the control channel's handshake ([`session`]); each direction and queue has a chain of keys
//! of its own ([`schedule`]), one after another by time and volume. The sending end of a chain is a [`sealing::Sealer`], the
//! receiving end an [`opening::Opener`] with a [`window`] against replays; [`cipher`] is the algorithm itself. Nothing here
//! reads a clock or draws random numbers.

pub mod cipher;
pub mod opening;
pub mod schedule;
pub mod sealing;
pub mod session;
pub mod window;

#[cfg(test)]
mod tests;

use std::time::Duration;

/// How long a key is used before the next one takes its place.
pub const REKEY_AFTER: Duration = Duration::from_secs(120);
/// How long the key before the present one still opens what was under way.
pub const OLD_KEY: Duration = Duration::from_secs(3);
/// Datagrams one key seals at most. Source: RFC 9001 appendix B.1.1, AES-GCM's confidentiality limit for packets up to 2^11
/// bytes. The next key is due at half of it.
pub const LIMIT: u64 = 1 << 28;
/// Likewise of a key that has sealed a datagram larger than [`SMALL`]: the limit for packets up to 2^16 bytes.
pub const LIMIT_LARGE: u64 = 1 << 23;
/// Size up to which [`LIMIT`] holds, in bytes.
pub const SMALL: usize = 1 << 11;
/// Queues a switch may send from: a bound on what a peer can make us remember.
pub const MAX_QUEUES: u16 = 16;
