//! A worker's end of one session: seals what goes to a peer, opens what comes from it, and keeps what both need between two
//! datagrams. It dies with the session: nothing of one is mixed with the next.

use crate::drops::DropReason;
use crate::reassembly::Reassembly;
use crate::seal::opening::Opener;
use crate::seal::sealing::{Limits, Sealer};
use crate::seal::session::{Protection, Session};
use std::sync::Arc;
use std::time::Duration;
use violin_common::Instant;
use violin_common::wire::mesh::{Kind, OUTER_LEN, OVERHEAD, Outer, TAG_LEN};

/// The queue a worker sends from.
const QUEUE: u16 = 0;
/// Shortest time between two reports that a peer speaks from elsewhere.
const ROAMED_AGAIN: Duration = Duration::from_millis(100);

/// See the head of this file.
#[derive(Debug)]
pub(crate) struct Tunnel {
    session: Arc<Session>,
    sealer: Option<Sealer>,
    /// By the peer's queue; and the newest epoch of it that the control side knows of.
    openers: Vec<(Option<Opener>, u64)>,
    pub(crate) reassembly: Reassembly,
    frame_id: u32,
    /// Of plain datagrams.
    count: u16,
    roamed: Option<Instant>,
}

impl Tunnel {
    /// Takes over the session's keys, which nobody else can then.
    pub(crate) fn new(now: Instant, session: &Arc<Session>, limits: Limits) -> Self {
        let (mut sealer, mut openers) = (None, Vec::new());
        if let Protection::Sealed(keys) = &session.protection {
            sealer = keys.take_sealing(QUEUE).and_then(|chain| Sealer::new(now, chain, limits));
            openers = (0..keys.peer_queues()).map(|queue| (keys.take_opening(queue).and_then(Opener::new), 0)).collect();
        }
        let (reassembly, frame_id, count, roamed) = (Reassembly::default(), 0, 0, None);
        Self { session: Arc::clone(session), sealer, openers, reassembly, frame_id, count, roamed }
    }

    pub(crate) fn is_of(&self, session: &Arc<Session>) -> bool {
        Arc::ptr_eq(&self.session, session)
    }

    /// Bytes of a datagram that are not the frame's, and how many of them lie behind it.
    pub(crate) fn overhead(&self) -> (usize, usize) {
        match self.session.protection {
            Protection::Sealed(_) => (OVERHEAD + TAG_LEN, TAG_LEN),
            Protection::Plain(_) => (OVERHEAD, 0),
        }
    }

    /// The underlay interface it is bound to; 0: none.
    pub(crate) fn interface(&self) -> u32 {
        match self.session.protection {
            Protection::Sealed(_) => 0,
            Protection::Plain(plain) => plain.interface,
        }
    }

    pub(crate) fn next_frame_id(&mut self) -> u32 {
        self.frame_id = self.frame_id.wrapping_add(1);
        self.frame_id
    }

    /// Makes a datagram of a slice (or, sealed only, a probe) that has room for the outer header in front and the tag behind.
    ///
    /// *Errors*: there is no key for it (any more).
    pub(crate) fn close(&mut self, now: Instant, probe: bool, datagram: &mut [u8]) -> Result<(), DropReason> {
        match &self.session.protection {
            Protection::Sealed(keys) => {
                let kind = if probe { Kind::Probe } else { Kind::Data };
                let sealer = self.sealer.as_mut().ok_or(DropReason::NoKey)?;
                sealer.seal((now, keys.acknowledged(QUEUE)), (kind, QUEUE, self.session.receiver), datagram)
            }
            Protection::Plain(plain) if !probe => {
                self.count = self.count.wrapping_add(1);
                let packet_number = plain.theirs << 16 | u64::from(self.count);
                let receiver = self.session.receiver;
                let outer = Outer { kind: Kind::Plain, key_epoch: 0, queue: QUEUE, receiver, packet_number };
                let head = datagram.get_mut(..OUTER_LEN).ok_or(DropReason::BadDatagram)?;
                head.copy_from_slice(&outer.emit());
                Ok(())
            }
            Protection::Plain(_) => Err(DropReason::NoKey),
        }
    }

    /// Opens a datagram of this session and returns its body. `plain_from`: whether a plain one comes from where its peer is,
    /// through which interface.
    ///
    /// *Errors*: it is not what this session sends, or not authentic; nothing of it is to be believed then.
    pub(crate) fn open<'b>(
        &mut self,
        now: Instant,
        outer: &Outer,
        (same_address, interface): (bool, u32),
        datagram: &'b mut [u8],
    ) -> Result<&'b mut [u8], DropReason> {
        match (&self.session.protection, outer.kind) {
            (Protection::Sealed(_), Kind::Data | Kind::Probe) => {
                let (opener, _) = self.openers.get_mut(usize::from(outer.queue)).ok_or(DropReason::UnknownQueue)?;
                opener.as_mut().ok_or(DropReason::NoKey)?.open(now, outer, datagram)
            }
            (Protection::Plain(plain), Kind::Plain) => {
                if !same_address {
                    return Err(DropReason::WrongAddress);
                }
                if plain.interface != interface {
                    return Err(DropReason::WrongInterface);
                }
                if plain.ours != outer.cookie() {
                    return Err(DropReason::BadCookie);
                }
                datagram.get_mut(OUTER_LEN..).ok_or(DropReason::BadDatagram)
            }
            _ => Err(DropReason::WrongProtection),
        }
    }

    /// Whether it is time to say that the peer speaks from elsewhere.
    pub(crate) fn may_report_roaming(&mut self, now: Instant) -> bool {
        let may = self.roamed.is_none_or(|last| now.since(last) >= ROAMED_AGAIN);
        if may {
            self.roamed = Some(now);
        }
        may
    }

    /// Tells of epochs that have begun since the last time: `tell` gets queue and epoch, and says whether that was heard.
    pub(crate) fn report_epochs(&mut self, mut tell: impl FnMut(u16, u64) -> bool) {
        for (queue, (opener, told)) in (0u16..).zip(&mut self.openers) {
            if let Some(epoch) = opener.as_ref().map(Opener::epoch).filter(|epoch| epoch > told)
                && tell(queue, epoch)
            {
                *told = epoch;
            }
        }
    }

    /// Whether an epoch has begun that the control side does not know of.
    pub(crate) fn has_news(&self, queue: u16) -> bool {
        let Some((opener, told)) = self.openers.get(usize::from(queue)) else { return false };
        opener.as_ref().is_some_and(|opener| opener.epoch() > *told)
    }

    /// Whether something is unfinished or untold, so that time asks for something soon.
    pub(crate) fn is_restless(&self) -> bool {
        !self.reassembly.is_empty() || (0..self.openers.len()).any(|queue| self.has_news(queue as u16))
    }

    /// Does what time asks for; returns how many unfinished frames were given up.
    pub(crate) fn tick(&mut self, now: Instant) -> usize {
        for (opener, _) in &mut self.openers {
            if let Some(opener) = opener {
                opener.tick(now);
            }
        }
        self.reassembly.expire(now)
    }
}
