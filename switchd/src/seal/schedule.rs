//! From a session's secret to the keys of each direction, queue and epoch, by HKDF-SHA-256 (RFC 5869).
//!
//! ```text
//! TLS exporter ─► Secret ─"chain", direction, queue─► link 0 ─"next"─► link 1 ─"next"─► ...
//!                                                       └"key", "iv"      └"key", "iv"
//! ```
//!
//! A link is erased when the next one is made: whoever takes a host learns nothing of what was sent before.

use super::cipher::{Choice, Cipher, IV_LEN, KEY_LEN};
use aws_lc_rs::hkdf::{HKDF_SHA256, KeyType, Prk};
use std::fmt;
use zeroize::Zeroizing;

/// Bytes of a secret.
pub const SECRET_LEN: usize = 32;

/// Who sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The end that called the other.
    FromCaller = 0,
    /// The end that was called.
    FromCalled = 1,
}

/// Bytes only both ends know.
pub struct Secret(Zeroizing<[u8; SECRET_LEN]>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

struct Len(usize);

impl KeyType for Len {
    fn len(&self) -> usize {
        self.0
    }
}

impl Secret {
    /// What the TLS exporter (RFC 8446 §7.5) gave.
    pub fn new(bytes: [u8; SECRET_LEN]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    fn expand<const N: usize>(&self, label: &[&[u8]]) -> Zeroizing<[u8; N]> {
        let mut out = Zeroizing::new([0; N]);
        let prk = Prk::new_less_safe(HKDF_SHA256, &*self.0);
        // Fails only for more than 255 × 32 bytes, or a length other than asked for.
        if let Ok(okm) = prk.expand(label, Len(N)) {
            let _ = okm.fill(&mut *out);
        }
        out
    }
}

/// One link of a queue's chain: makes the key of its epoch, then the link after it.
#[derive(Debug)]
pub struct Chain {
    secret: Secret,
    epoch: u64,
    choice: Choice,
}

impl Chain {
    /// The first link of a direction and queue.
    pub fn first(session: &Secret, direction: Direction, queue: u16, choice: Choice) -> Self {
        let label: [&[u8]; 3] = [b"violin data chain", &[direction as u8], &queue.to_be_bytes()];
        Self { secret: Secret(session.expand(&label)), epoch: 0, choice }
    }

    /// Its epoch.
    pub const fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The link after it, in its place.
    #[must_use]
    pub fn next(self) -> Self {
        Self { secret: Secret(self.secret.expand(&[b"violin data next"])), epoch: self.epoch + 1, choice: self.choice }
    }

    /// The epoch's key. `None`: see [`Cipher::new`].
    pub(super) fn cipher(&self) -> Option<Cipher> {
        let key: Zeroizing<[u8; KEY_LEN]> = self.secret.expand(&[b"violin data key"]);
        let iv: Zeroizing<[u8; IV_LEN]> = self.secret.expand(&[b"violin data iv"]);
        Cipher::new(self.choice, &key, *iv)
    }
}
