//! What two switches have agreed on for their data: made by the control side, used by workers.
//!
//! Each chain is handed out once, to the worker whose queue it is: nobody can begin it a second time, so no packet number is
//! used twice under one key.

use super::cipher::Choice;
use super::schedule::{Chain, Direction, Secret};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

/// One session; data of a peer comes in it, goes in it, or both.
#[derive(Debug)]
pub struct Session {
    /// The index we gave the peer: in every datagram from it.
    pub index: u32,
    /// The index it gave us: in every datagram to it.
    pub receiver: u32,
    /// How data is protected.
    pub protection: Protection,
}

/// How data of a session is protected.
#[derive(Debug)]
pub enum Protection {
    /// Sealed.
    Sealed(Keys),
    /// Not at all, as both ends' configurations say: datagrams are known by address and cookie.
    Plain(Plain),
}

/// What a plain datagram is known by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plain {
    /// In every datagram from the peer; 48 bits.
    pub ours: u64,
    /// In every datagram to it.
    pub theirs: u64,
    /// Number of the underlay interface it is bound to.
    pub interface: u32,
}

/// One handed-out thing.
#[derive(Debug)]
struct Once<T>(Mutex<Option<T>>);

impl<T> Once<T> {
    const fn new(value: T) -> Self {
        Self(Mutex::new(Some(value)))
    }

    fn take(&self) -> Option<T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The keys of a session.
#[derive(Debug)]
pub struct Keys {
    choice: Choice,
    sealing: Box<[Once<Chain>]>,
    opening: Box<[Once<Chain>]>,
    /// Per queue of ours: the highest epoch under which the peer has opened something.
    acknowledged: Box<[AtomicU64]>,
}

impl Keys {
    /// Derives all chains. `called`: whether we called the peer. `queues`: how many we send from, and how many the peer.
    pub fn new(secret: &Secret, called: bool, (ours, theirs): (u16, u16), choice: Choice) -> Self {
        let (out, inn) = match called {
            true => (Direction::FromCaller, Direction::FromCalled),
            false => (Direction::FromCalled, Direction::FromCaller),
        };
        let chains =
            |direction, queues| (0..queues).map(|queue| Once::new(Chain::first(secret, direction, queue, choice))).collect();
        let acknowledged = (0..ours).map(|_| AtomicU64::new(0)).collect();
        Self { choice, sealing: chains(out, ours), opening: chains(inn, theirs), acknowledged }
    }

    /// The cipher.
    pub const fn choice(&self) -> Choice {
        self.choice
    }

    /// The chain a queue of ours seals with; `None` when it was handed out before, or there is no such queue.
    pub fn take_sealing(&self, queue: u16) -> Option<Chain> {
        self.sealing.get(usize::from(queue))?.take()
    }

    /// Likewise for what a queue of the peer sent.
    pub fn take_opening(&self, queue: u16) -> Option<Chain> {
        self.opening.get(usize::from(queue))?.take()
    }

    /// How many queues the peer sends from.
    pub fn peer_queues(&self) -> u16 {
        self.opening.len() as u16
    }

    /// The peer has opened something under this epoch.
    pub fn acknowledge(&self, queue: u16, epoch: u64) {
        if let Some(known) = self.acknowledged.get(usize::from(queue)) {
            known.fetch_max(epoch, Relaxed);
        }
    }

    /// The highest epoch of a queue of ours that the peer has acknowledged.
    pub fn acknowledged(&self, queue: u16) -> u64 {
        self.acknowledged.get(usize::from(queue)).map_or(0, |known| known.load(Relaxed))
    }
}
