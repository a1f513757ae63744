//! The sessions of one member, and how its data is to be protected.
//!
//! A new session takes the place of the old one without a gap: it is opened from the moment its keys are here, and sent in from
//! the moment its keys are known to be there; the old one still opens what was under way then.

use super::{LinkId, Members, Told, Trouble};
use crate::seal::OLD_KEY;
use crate::seal::cipher::Choice;
use crate::seal::session::{Plain, Protection, Session};
use std::sync::Arc;
use violin_common::control::mesh::{Aead, Cipher, Offer, PROTOCOL};
use violin_common::{HostId, Instant};

/// Sessions on their way out that are kept: a bound on what one that calls without pause can make us remember.
const LEAVING: usize = 4;

/// How a session protects data, as both HELLOs say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Agreed {
    /// Both configurations let it go plain.
    Plain(Plain),
    /// Sealed with this; the library is ours to choose.
    Sealed(Aead),
}

/// What both ends derive a session's secret from, besides their handshake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Context(pub Vec<u8>);

/// See the head of this file.
#[derive(Debug, Default)]
pub struct Sessions {
    present: Option<Arc<Session>>,
    coming: Option<(LinkId, Arc<Session>)>,
    leaving: Vec<(Arc<Session>, Instant)>,
}

impl Sessions {
    /// What is sent in: the one the peer has, or else may have.
    pub fn sending(&self) -> Option<&Arc<Session>> {
        self.present.as_ref().or_else(|| self.coming.as_ref().map(|(_, session)| session))
    }

    /// All that may bring data.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Session>> {
        let coming = self.coming.iter().map(|(_, session)| session);
        self.present.iter().chain(coming).chain(self.leaving.iter().map(|(session, _)| session))
    }

    fn leave(&mut self, now: Instant, session: Arc<Session>) {
        if self.leaving.len() >= LEAVING {
            self.leaving.remove(0);
        }
        self.leaving.push((session, now + OLD_KEY));
    }

    fn made(&mut self, now: Instant, link: LinkId, session: Arc<Session>) {
        if let Some((_, before)) = self.coming.replace((link, session)) {
            // The peer may be sending in it.
            self.leave(now, before);
        }
    }

    fn ready(&mut self, now: Instant, link: LinkId) {
        let Some((_, session)) = self.coming.take_if(|(from, _)| *from == link) else { return };
        if let Some(before) = self.present.replace(session) {
            self.leave(now, before);
        }
    }

    /// The connection that was to bring a new session came to nothing.
    pub(super) fn retract(&mut self, now: Instant, link: LinkId) {
        if let Some((_, session)) = self.coming.take_if(|(from, _)| *from == link) {
            self.leave(now, session);
        }
    }

    /// Ends those whose time is over. Returns whether there were any.
    fn expire(&mut self, now: Instant) -> bool {
        let before = self.leaving.len();
        self.leaving.retain(|(_, until)| now < *until);
        self.leaving.len() < before
    }

    /// When the first of those on their way out ends.
    pub fn next(&self) -> Option<Instant> {
        self.leaving.iter().map(|(_, until)| *until).min()
    }
}

/// The cipher that the slower end of the two is faster with.
fn cipher(ours: &[Cipher], theirs: &[Cipher]) -> Option<Aead> {
    let time = |aead: &Aead| {
        let of = |all: &[Cipher]| all.iter().find(|cipher| cipher.code == aead.code()).map(|cipher| cipher.ns);
        Some(of(ours)?.max(of(theirs)?))
    };
    Aead::ALL.into_iter().filter(|aead| time(aead).is_some()).min_by_key(|aead| (time(aead), *aead))
}

fn names(ciphers: &[Cipher]) -> String {
    let names: Vec<_> = ciphers.iter().filter_map(|cipher| Aead::of_code(cipher.code)).map(Aead::name).collect();
    if names.is_empty() { "nothing we know".to_owned() } else { names.join(" or ") }
}

/// Whether a peer's offer can be taken; in words if not.
pub(super) fn acceptable(ours: &Offer, theirs: Option<&Offer>) -> Result<(), String> {
    let theirs = theirs.ok_or("got a HELLO without an offer how data is to be sealed")?;
    if theirs.queues == 0 || theirs.queues > crate::seal::MAX_QUEUES {
        return Err(format!("got {} queues, want 1 to {}", theirs.queues, crate::seal::MAX_QUEUES));
    }
    if cipher(&ours.ciphers, &theirs.ciphers).is_none() {
        let (got, want) = (names(&theirs.ciphers), names(&ours.ciphers));
        return Err(format!("got data sealed with {got}, want {want}: see `aead` at both ends"));
    }
    Ok(())
}

impl Members {
    /// How data of a connection is to be protected, once both HELLOs are there.
    pub fn agreed(&self, id: LinkId) -> Option<Agreed> {
        let link = self.links.get(&id)?;
        let theirs = link.hello.as_ref()?.offer.as_ref()?;
        if let (Some(ours), Some(theirs)) = (link.offer.plain, theirs.plain) {
            return Some(Agreed::Plain(Plain { ours, theirs, interface: link.interface }));
        }
        cipher(&link.offer.ciphers, &theirs.ciphers).map(Agreed::Sealed)
    }

    /// What a connection's secret is bound to: version, cipher, both names and both indices.
    pub fn context(&self, id: LinkId, aead: Aead) -> Option<Context> {
        let link = self.links.get(&id)?;
        let hello = link.hello.as_ref()?;
        let (us, them) = ((&self.host, link.index), (&link.host, hello.receiver));
        let (caller, called) = if link.called { (us, them) } else { (them, us) };
        let mut bytes = PROTOCOL.to_be_bytes().to_vec();
        bytes.push(aead.code());
        for (name, index) in [caller, called] {
            bytes.extend(index.to_be_bytes());
            bytes.extend((name.as_str().len() as u16).to_be_bytes());
            bytes.extend(name.as_str().as_bytes());
        }
        Some(Context(bytes))
    }

    /// A connection's session is there: it is opened from now on. `false`: another connection counts by now.
    pub fn session_made(&mut self, now: Instant, id: LinkId, protection: impl FnOnce(&super::Link) -> Protection) -> bool {
        let Some(link) = self.links.get(&id) else { return false };
        let Some(receiver) = link.hello.as_ref().map(|hello| hello.receiver) else { return false };
        let session = Arc::new(Session { index: link.index, receiver, protection: protection(link) });
        let Some(member) = self.hosts.get_mut(&link.host).filter(|member| member.link == Some(id)) else { return false };
        let one_sided = link.offer.plain.is_some() && matches!(session.protection, Protection::Sealed(_));
        member.unsealed = one_sided.then_some(Trouble { told: Told::PlainHereOnly, since: now });
        member.sessions.made(now, id, session);
        true
    }

    /// The peer has a connection's session: it is sent in from now on. Older connections are needed no more; which, is returned.
    pub fn session_ready(&mut self, now: Instant, id: LinkId) -> Vec<LinkId> {
        let member = self.links.get(&id).and_then(|link| self.hosts.get_mut(&link.host));
        let Some(member) = member.filter(|member| member.link == Some(id)) else { return Vec::new() };
        member.sessions.ready(now, id);
        std::mem::take(&mut member.standby)
    }

    /// Ends sessions whose time is over. Returns whether there were any.
    pub fn expire_sessions(&mut self, now: Instant) -> bool {
        self.hosts.values_mut().fold(false, |any, member| member.sessions.expire(now) | any)
    }

    /// When [`Self::expire_sessions`] has something to do.
    pub fn next_expiry(&self) -> Option<Instant> {
        self.hosts.values().filter_map(|member| member.sessions.next()).min()
    }

    /// Whether an index is in use.
    pub fn has_index(&self, index: u32) -> bool {
        let in_use = |member: &super::Member| member.sessions.all().any(|session| session.index == index);
        self.links.values().any(|link| link.index == index) || self.hosts.values().any(in_use)
    }

    /// Whose session has that index.
    pub fn of_session(&self, index: u32) -> Option<&HostId> {
        let found = self.hosts.iter().find(|(_, member)| member.sessions.all().any(|session| session.index == index));
        found.map(|(host, _)| host)
    }

    /// A peer has opened something that a queue of ours sealed under that epoch, in the session it knows by `receiver`.
    pub fn acknowledged(&self, host: &HostId, receiver: u32, queue: u16, epoch: u64) {
        let Some(member) = self.hosts.get(host) else { return };
        for session in member.sessions.all().filter(|session| session.receiver == receiver) {
            if let Protection::Sealed(keys) = &session.protection {
                keys.acknowledge(queue, epoch);
            }
        }
    }

    /// Where a member's data goes.
    pub fn address(&self, host: &HostId) -> Option<std::net::SocketAddr> {
        self.hosts.get(host).map(|member| member.address)
    }

    /// A member is reached at another address from now on.
    pub fn roamed(&mut self, host: &HostId, address: std::net::SocketAddr) {
        if let Some(member) = self.hosts.get_mut(host) {
            member.address = address;
        }
    }
}

/// How a member's data is protected, for operators.
pub fn words(session: &Session) -> String {
    match &session.protection {
        Protection::Sealed(keys) => {
            let Choice { aead, library } = keys.choice();
            format!("{} ({})", aead.name(), library.name())
        }
        Protection::Plain(_) => "plain".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slower_end_of_the_two_decides_the_cipher() {
        let of = |ns: [u32; 2]| Aead::ALL.map(|aead| Cipher { code: aead.code(), ns: ns[usize::from(aead.code()) - 1] });
        assert_eq!(cipher(&of([300, 800]), &of([400, 900])), Some(Aead::Aes256Gcm));
        // An end without AES instructions.
        assert_eq!(cipher(&of([300, 800]), &of([9000, 900])), Some(Aead::ChaCha20Poly1305));
        assert_eq!(cipher(&of([300, 800])[..1], &of([9000, 900])), Some(Aead::Aes256Gcm));
        assert_eq!(cipher(&of([300, 800])[..1], &of([9000, 900])[1..]), None);
        assert_eq!(cipher(&of([5, 5]), &of([5, 5])), Some(Aead::Aes256Gcm));
        assert_eq!(cipher(&[Cipher { code: 77, ns: 1 }], &[Cipher { code: 77, ns: 1 }]), None);
    }
}
