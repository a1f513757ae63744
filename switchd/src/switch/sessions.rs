//! Sessions from the switch's side: what is offered, when a session begins, and peers that speak from elsewhere.

use super::{Command, Switch};
use crate::members::{Agreed, Ends, LinkId};
use crate::seal::cipher::{Choice, Library};
use crate::seal::schedule::Secret;
use crate::seal::session::{Keys, Protection};
use std::net::SocketAddr;
use std::time::Duration;
use violin_common::control::mesh::{Aead, Cipher, Message, Offer};
use violin_common::{DomainId, Instant};

/// How long an answer to a challenge counts.
const CHALLENGE: Duration = Duration::from_secs(3);

/// A cipher of this host, the library that is faster with it, and how long that takes to seal 1,400 bytes, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ability {
    /// Which, and by whom.
    pub choice: Choice,
    /// How long.
    pub ns: u32,
}

/// Random numbers for one connection, from the operating system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drawn {
    /// The index we give the peer.
    pub index: u32,
    /// The cookie we give it, should its data go plain.
    pub cookie: u64,
}

/// A peer that was asked whether it is where it seems to be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Challenge {
    to: SocketAddr,
    token: u64,
    sent: Instant,
}

impl Switch {
    /// What a peer is offered, with an index that no other has.
    pub(super) fn offer(&self, domain: &DomainId, ends: &Ends, drawn: Drawn) -> (u32, Offer) {
        let mut index = drawn.index;
        while self.members.has_index(index) {
            index = index.wrapping_add(1);
        }
        let leads_there = |name: &str| ends.via.as_ref().is_some_and(|via| via.name == name);
        let plain = self.nature.plain.iter().any(|path| path.domain == *domain && leads_there(&path.interface));
        let offer = Offer {
            ciphers: self.nature.ciphers.iter().map(|can| Cipher { code: can.choice.aead.code(), ns: can.ns }).collect(),
            queues: self.nature.queues,
            plain: plain.then_some(drawn.cookie & 0xffff_ffff_ffff),
        };
        (index, offer)
    }

    /// Both HELLOs of a connection that counts are there.
    pub(super) fn begin_session(&mut self, now: Instant, link: LinkId) {
        match self.members.agreed(link) {
            Some(Agreed::Plain(plain)) => self.session_made(now, link, |_| Protection::Plain(plain)),
            Some(Agreed::Sealed(aead)) => {
                if let Some(context) = self.members.context(link, aead) {
                    self.commands.push(Command::Export { link, context });
                }
            }
            None => {}
        }
    }

    fn library(&self, aead: Aead) -> Library {
        let ours = self.nature.ciphers.iter().find(|can| can.choice.aead == aead);
        ours.map_or(Library::Ring, |can| can.choice.library)
    }

    /// A connection's secret, as its handshake gave it.
    pub fn handle_secret(&mut self, now: Instant, link: LinkId, secret: &Secret) {
        let Some(Agreed::Sealed(aead)) = self.members.agreed(link) else { return };
        let choice = Choice { aead, library: self.library(aead) };
        let ours = self.nature.queues;
        self.session_made(now, link, |link| {
            let theirs = link.hello.as_ref().and_then(|hello| hello.offer.as_ref()).map_or(1, |offer| offer.queues);
            Protection::Sealed(Keys::new(secret, link.called, (ours, theirs), choice))
        });
    }

    fn session_made(&mut self, now: Instant, link: LinkId, protection: impl FnOnce(&crate::members::Link) -> Protection) {
        if self.members.session_made(now, link, protection) {
            // Tables are published before messages leave: what the peer sends next is understood.
            self.dirty = true;
            self.send(link, Message::Ready);
        }
    }

    pub(super) fn peer_is_ready(&mut self, now: Instant, link: LinkId) {
        for old in self.members.session_ready(now, link) {
            self.members.closed(now, old);
            self.close(old, "a newer connection between us stays");
        }
        self.dirty = true;
    }

    /// The peer must hear that its new key works here before it may go on to the next.
    pub(super) fn epoch_begun(&mut self, session: u32, queue: u16, epoch: u64) {
        let link = self.members.of_session(session).and_then(|host| self.members.link_to(host));
        if let Some(link) = link {
            self.send(link, Message::Opened { receiver: session, queue, epoch });
        }
    }

    /// A peer's data came from elsewhere, and it was authentic; but whoever reads along can send it on from anywhere. It counts
    /// only when the peer answers there, and keeps its address until then.
    pub(super) fn seen_elsewhere(&mut self, session: u32, from: SocketAddr) {
        let host = self.members.of_session(session);
        let moved = host.and_then(|host| self.members.address(host)).is_some_and(|address| address != from);
        if moved {
            self.commands.push(Command::Challenge { session, to: from });
        }
    }

    /// A challenge has been sent.
    pub fn handle_challenged(&mut self, now: Instant, session: u32, to: SocketAddr, token: u64) {
        self.challenges.insert(session, Challenge { to, token, sent: now });
    }

    pub(super) fn challenge_answered(&mut self, now: Instant, session: u32, (from, token): (SocketAddr, u64)) {
        let asked = self.challenges.get(&session);
        if !asked.is_some_and(|asked| (asked.to, asked.token) == (from, token) && now.since(asked.sent) < CHALLENGE) {
            return;
        }
        self.challenges.remove(&session);
        if let Some(host) = self.members.of_session(session).cloned() {
            tracing::info!(peer = %host, address = %from, "peer has another address");
            self.members.roamed(&host, from);
            self.dirty = true;
        }
    }

    pub(super) fn next_challenge_end(&self) -> Option<Instant> {
        self.challenges.values().map(|challenge| challenge.sent + CHALLENGE).min()
    }

    pub(super) fn forget_challenges(&mut self, now: Instant) {
        self.challenges.retain(|_, challenge| now.since(challenge.sent) < CHALLENGE);
    }

    /// A connection has wandered to another address, as its own path validation says.
    pub fn handle_migrated(&mut self, link: LinkId, address: SocketAddr) {
        let host = self.members.link(link).map(|link| link.host.clone());
        if let Some(host) = host.filter(|host| self.members.link_to(host) == Some(link))
            && self.members.address(&host) != Some(address)
        {
            tracing::info!(peer = %host, %address, "peer has another address");
            self.members.roamed(&host, address);
            self.dirty = true;
        }
    }
}
