//! The receiving end of a peer's queue: the present key, the one before it for a while, the next one ahead.

use super::OLD_KEY;
use super::cipher::Cipher;
use super::schedule::Chain;
use super::window::Window;
use crate::drops::DropReason;
use violin_common::Instant;
use violin_common::wire::mesh::{OUTER_LEN, Outer};

#[derive(Debug)]
struct OpenKey {
    epoch: u64,
    cipher: Cipher,
    window: Window,
}

impl OpenKey {
    fn of(chain: &Chain) -> Option<Self> {
        Some(Self { epoch: chain.epoch(), cipher: chain.cipher()?, window: Window::default() })
    }

    fn open<'b>(&mut self, outer: &Outer, datagram: &'b mut [u8]) -> Result<&'b mut [u8], DropReason> {
        if !self.window.is_new(outer.packet_number) {
            return Err(DropReason::Replayed);
        }
        let (head, sealed) = datagram.split_at_mut_checked(OUTER_LEN).ok_or(DropReason::BadDatagram)?;
        let body = self.cipher.open(outer.packet_number, head, sealed).ok_or(DropReason::NotAuthentic)?;
        self.window.mark(outer.packet_number);
        Ok(body)
    }
}

/// See the head of this file.
#[derive(Debug)]
pub struct Opener {
    before: Option<(OpenKey, Instant)>,
    present: OpenKey,
    /// Derived ahead, so that a forged epoch costs no derivation; the chain is at its link.
    ahead: OpenKey,
    chain: Option<Chain>,
}

impl Opener {
    /// Begins with a chain's key. `None`: see [`Cipher::new`].
    pub fn new(chain: Chain) -> Option<Self> {
        let present = OpenKey::of(&chain)?;
        let chain = chain.next();
        Some(Self { before: None, present, ahead: OpenKey::of(&chain)?, chain: Some(chain) })
    }

    /// The newest epoch under which something has opened.
    pub const fn epoch(&self) -> u64 {
        self.present.epoch
    }

    /// Opens a datagram whose head is `outer`; its body is returned. The first one under the next key makes that the present one.
    ///
    /// *Errors*: of an epoch that has no key here; its number was seen or is too old; it is not authentic.
    pub fn open<'b>(&mut self, now: Instant, outer: &Outer, datagram: &'b mut [u8]) -> Result<&'b mut [u8], DropReason> {
        let is = |key: &OpenKey| key.epoch as u8 == outer.key_epoch;
        if is(&self.present) {
            return self.present.open(outer, datagram);
        }
        if is(&self.ahead) {
            let body = self.ahead.open(outer, datagram)?;
            self.commit(now);
            return Ok(body);
        }
        match &mut self.before {
            Some((key, until)) if is(key) && now < *until => key.open(outer, datagram),
            _ => Err(DropReason::UnknownEpoch),
        }
    }

    fn commit(&mut self, now: Instant) {
        let Some(chain) = self.chain.take().map(Chain::next) else { return };
        if let Some(ahead) = OpenKey::of(&chain) {
            let present = std::mem::replace(&mut self.ahead, ahead);
            let before = std::mem::replace(&mut self.present, present);
            self.before = Some((before, now + OLD_KEY));
        }
        self.chain = Some(chain);
    }

    /// Erases the key before the present one when its time is over.
    pub fn tick(&mut self, now: Instant) {
        if self.before.as_ref().is_some_and(|(_, until)| now >= *until) {
            self.before = None;
        }
    }
}
