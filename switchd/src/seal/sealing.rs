//! The sending end of a queue: one key after another, and a packet number that only counts up.

use super::cipher::Cipher;
use super::schedule::Chain;
use super::{LIMIT, LIMIT_LARGE, REKEY_AFTER, SMALL};
use crate::drops::DropReason;
use std::time::Duration;
use violin_common::Instant;
use violin_common::wire::mesh::{Kind, OUTER_LEN, Outer, TAG_LEN};

/// When a key has done enough.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// By time.
    pub after: Duration,
    /// By datagrams, all of them at most [`SMALL`].
    pub small: u64,
    /// By datagrams, one of them larger.
    pub large: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { after: REKEY_AFTER, small: LIMIT, large: LIMIT_LARGE }
    }
}

/// A key that seals, with its packet number: not to be cloned, and the number not to be set back, for one number under one key
/// twice would give both datagrams away and let anybody forge more (RFC 5116 §5.1.1).
#[derive(Debug)]
struct SealKey {
    cipher: Cipher,
    number: u64,
    large: bool,
    born: Instant,
}

impl SealKey {
    fn next_number(&mut self, len: usize, limits: &Limits) -> Result<u64, DropReason> {
        self.large |= len > SMALL;
        if self.number >= if self.large { limits.large } else { limits.small } {
            return Err(DropReason::KeyExhausted);
        }
        self.number += 1;
        Ok(self.number)
    }

    fn is_due(&self, now: Instant, limits: &Limits) -> bool {
        self.number >= if self.large { limits.large } else { limits.small } / 2 || now.since(self.born) >= limits.after
    }
}

/// See the head of this file.
#[derive(Debug)]
pub struct Sealer {
    key: SealKey,
    /// The key's own link, and the one after it.
    chain: Option<Chain>,
    epoch: u64,
    limits: Limits,
}

impl Sealer {
    /// Begins with a chain's key. `None`: see [`Cipher::new`].
    pub fn new(now: Instant, chain: Chain, limits: Limits) -> Option<Self> {
        let key = SealKey { cipher: chain.cipher()?, number: 0, large: false, born: now };
        Some(Self { key, epoch: chain.epoch(), chain: Some(chain), limits })
    }

    /// The epoch it seals with.
    pub const fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Goes on to the next key if that is due and the peer is known to have opened something under the present one: it has only
    /// one key ahead.
    fn advance(&mut self, now: Instant, acknowledged: u64) {
        if acknowledged < self.epoch || !self.key.is_due(now, &self.limits) {
            return;
        }
        let Some(chain) = self.chain.take().map(Chain::next) else { return };
        if let Some(cipher) = chain.cipher() {
            self.key = SealKey { cipher, number: 0, large: false, born: now };
            self.epoch = chain.epoch();
        }
        self.chain = Some(chain);
    }

    /// Seals a datagram in place: room for the outer header, the body, room for the tag. `acknowledged`: the highest epoch under
    /// which the peer has opened something.
    ///
    /// *Errors*: the key has sealed all it may and the peer has not acknowledged it; the datagram has no room for its head and tag.
    pub fn seal(
        &mut self,
        (now, acknowledged): (Instant, u64),
        (kind, queue, receiver): (Kind, u16, u32),
        datagram: &mut [u8],
    ) -> Result<(), DropReason> {
        self.advance(now, acknowledged);
        let len = datagram.len();
        let (head, rest) = datagram.split_at_mut_checked(OUTER_LEN).ok_or(DropReason::BadDatagram)?;
        let (body, tag) = rest.split_last_chunk_mut::<TAG_LEN>().ok_or(DropReason::BadDatagram)?;
        let packet_number = self.key.next_number(len, &self.limits)?;
        head.copy_from_slice(&Outer { kind, key_epoch: self.epoch as u8, queue, receiver, packet_number }.emit());
        *tag = self.key.cipher.seal(packet_number, head, body).ok_or(DropReason::BadDatagram)?;
        Ok(())
    }
}
