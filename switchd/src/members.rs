//! Who belongs to the mesh, whom to call, and which of two connections stays.
//!
//! Pure: connections come and go as events, calls to make are handed out. Join through any known member: each tells whom it
//! is connected with, so everybody calls everybody. A lost member is called for ever, with back-off; one that left is not.

mod rivals;
mod sessions;
mod troubles;

pub use rivals::Rivals;
pub use sessions::{Agreed, Context, Sessions, words};
pub use troubles::{Told, Trouble};

use crate::counters::PeerCounters;
use crate::tables::PeerSlot;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use violin_common::control::mesh::{self, Hello, Member as Hint, Offer};
use violin_common::{DomainId, HostId, Instant, Vni};

/// First pause between two calls of the same member; doubles up to [`BACKOFF_MAX`].
pub const BACKOFF_MIN: Duration = Duration::from_millis(200);
/// Longest pause between two calls.
pub const BACKOFF_MAX: Duration = Duration::from_secs(3);
/// Pause before a lost member is called: the other end may have closed this connection for another one.
const AFTER_LOSS: Duration = Duration::from_millis(50);
/// How long the higher name of two lets the lower one call, so that they seldom call at once.
const LET_OTHER_CALL: Duration = Duration::from_millis(300);
/// Age of a session at which a new one is made, with a new handshake.
pub const RENEW: Duration = Duration::from_secs(3600);
/// Connections of one peer that may wait for a newer one to be known at both ends.
const STANDBY: usize = 3;
/// How long the end that was called lets the other renew.
const LET_OTHER_RENEW: Duration = Duration::from_secs(60);
/// Members at most: a bound on what a member can make us remember. One that comes itself takes the place of one that was only
/// told of.
pub const LIMIT: usize = 1024;

/// Smallest `max-datagram` a member may ask for, in bytes: the smallest MTU a switch can be configured with, less IPv6 and UDP.
/// Less would make every frame a storm of datagrams.
pub const MIN_DATAGRAM: u16 = 1280 - 48;

/// One connection, numbered by whoever makes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinkId(pub u64);

/// Somebody to be called now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// Where.
    pub address: SocketAddr,
    /// Who must answer; none for a `join` address.
    pub expected: Option<HostId>,
}

#[derive(Debug)]
struct Dial {
    next: Instant,
    backoff: Duration,
    busy: bool,
    /// Why no call of it led to anything, since when.
    trouble: Option<Trouble>,
}

fn patience(us: &HostId, them: &HostId) -> Duration {
    if us < them { Duration::ZERO } else { LET_OTHER_CALL }
}

impl Dial {
    const fn at(next: Instant) -> Self {
        Self { next, backoff: BACKOFF_MIN, busy: false, trouble: None }
    }

    fn failed(&mut self, now: Instant) {
        self.busy = false;
        self.next = now + self.backoff;
        self.backoff = (self.backoff * 2).min(BACKOFF_MAX);
    }

    fn due(&mut self, now: Instant) -> bool {
        let due = !self.busy && now >= self.next;
        self.busy |= due;
        due
    }
}

/// One member other than ourselves.
#[derive(Debug)]
pub struct Member {
    /// Its domain, once it was connected.
    pub domain: Option<DomainId>,
    /// Its mesh port: where its last connection came from, or a hint.
    pub address: SocketAddr,
    /// Its place in the tables, once it was connected.
    pub slot: Option<PeerSlot>,
    /// The connection that counts.
    pub link: Option<LinkId>,
    /// Older ones, kept until the peer is known to have the one that counts.
    standby: Vec<LinkId>,
    /// What it counted; survives connections.
    pub traffic: Arc<PeerCounters>,
    boot: Option<u64>,
    same_boot: bool,
    dial: Dial,
    /// When its connection was last lost.
    lost: Option<Instant>,
    /// Who else has its certificate, and was refused.
    rivals: Rivals,
    /// It refused us after both HELLOs: what looks like a connection is none until it says more.
    refused: Option<Trouble>,
    /// Networks that have another MTU there, as was seen on its last connection.
    mtus: Option<Trouble>,
    /// What its data is protected by.
    pub sessions: Sessions,
    /// Its data could go plain as far as our configuration says, not as far as its own does.
    unsealed: Option<Trouble>,
    /// Calls for a new session while the present one stands.
    renewal: Dial,
}

impl Member {
    fn new(address: SocketAddr, dial: Dial) -> Self {
        let traffic = Arc::default();
        let (domain, slot, link, boot, lost, refused, mtus, unsealed) = (None, None, None, None, None, None, None, None);
        let (standby, rivals, same_boot) = (Vec::new(), Rivals::default(), false);
        let (sessions, renewal) = (Sessions::default(), Dial::at(Instant(u64::MAX)));
        Self {
            domain,
            address,
            slot,
            link,
            standby,
            traffic,
            boot,
            same_boot,
            dial,
            lost,
            rivals,
            refused,
            mtus,
            sessions,
            unsealed,
            renewal,
        }
    }
}

/// Both ends of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ends {
    /// The peer's.
    pub theirs: SocketAddr,
    /// To which of our addresses the peer called; none: we called, or have only one.
    pub ours: Option<IpAddr>,
    /// The underlay interface that leads there, where plain data is spoken of.
    pub via: Option<Via>,
}

/// An interface of the underlay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Via {
    /// Its name.
    pub name: String,
    /// Its number.
    pub index: u32,
}

impl From<SocketAddr> for Ends {
    fn from(theirs: SocketAddr) -> Self {
        Self { theirs, ours: None, via: None }
    }
}

/// One connection.
#[derive(Debug)]
pub struct Link {
    /// Whom the certificate names.
    pub host: HostId,
    /// Likewise.
    pub domain: DomainId,
    /// Where it comes from.
    pub address: SocketAddr,
    /// To which of our addresses it came; none: we called, or have only one.
    pub ours: Option<IpAddr>,
    /// The index we give this peer.
    pub index: u32,
    /// What we offer it.
    pub offer: Offer,
    /// The underlay interface it is reached through, if plain data is offered; else 0.
    interface: u32,
    /// What it said first.
    pub hello: Option<Hello>,
    /// Networks it carries now.
    pub networks: BTreeSet<Vni>,
    /// Their MTUs, where it told.
    pub mtus: BTreeMap<Vni, u16>,
    /// Whether we called.
    pub called: bool,
}

/// What a HELLO led to.
#[derive(Debug, PartialEq, Eq)]
pub enum Greeted {
    /// The connection counts from now on; another one may have to go.
    Up {
        /// Connections of the same peer that have to go at once.
        replaced: Vec<LinkId>,
        /// Whether the peer's daemon is the one known before.
        same_boot: bool,
    },
    /// Another connection of this peer counts; this one has to go.
    Superseded,
    /// It is our own switch that called itself.
    Ourselves,
    /// Another switch with this certificate is connected from elsewhere. Whether it still answers must be seen on that
    /// connection; the HELLO is to be said again if it is gone, and refused by [`Members::refuse_rival`] if not.
    Contested {
        /// The connection of the other one.
        standing: LinkId,
    },
}

/// All members.
#[derive(Debug)]
pub struct Members {
    host: HostId,
    boot: u64,
    join: BTreeMap<SocketAddr, Dial>,
    /// Addresses at which we found ourselves.
    ourselves: BTreeSet<SocketAddr>,
    /// Who answered at a `join` address, though it may count for us at another of its addresses.
    met: BTreeMap<SocketAddr, HostId>,
    hosts: BTreeMap<HostId, Member>,
    links: HashMap<LinkId, Link>,
    slots: Vec<bool>,
    renew: Duration,
    /// Who else has our own name.
    twins: Rivals,
    /// Hints refused since the start because there were [`LIMIT`] members.
    pub hints_refused: u64,
    /// HELLOs refused since the start because another switch with that certificate answers.
    pub twins_refused: u64,
}

impl Members {
    /// Nobody yet. `host` and `boot` are ours; `renew`: see [`RENEW`].
    pub fn new(now: Instant, (host, boot): (HostId, u64), renew: Duration, join: &[SocketAddr]) -> Self {
        let join = join.iter().map(|address| (*address, Dial::at(now))).collect();
        let (ourselves, met, hosts) = (BTreeSet::new(), BTreeMap::new(), BTreeMap::new());
        let (links, slots, twins, hints_refused, twins_refused) = (HashMap::new(), Vec::new(), Rivals::default(), 0, 0);
        Self { host, boot, join, ourselves, met, hosts, links, slots, renew, twins, hints_refused, twins_refused }
    }

    /// Replaces the addresses of known members.
    pub fn set_join(&mut self, now: Instant, join: &[SocketAddr]) {
        self.join.retain(|address, _| join.contains(address));
        self.met.retain(|address, _| join.contains(address));
        for address in join {
            self.join.entry(*address).or_insert_with(|| Dial::at(now));
        }
        self.hosts.retain(|_, member| member.boot.is_some() || !join.contains(&member.address));
    }

    /// Addresses that need not be called to find out who is there: those of members, ours, and further ones of a member that is
    /// connected by another.
    fn known(&self) -> BTreeSet<SocketAddr> {
        let connected = |host: &HostId| self.hosts.get(host).is_some_and(|member| member.link.is_some());
        let met = self.met.iter().filter(|(_, host)| connected(host)).map(|(address, _)| *address);
        self.hosts.values().map(|member| member.address).chain(self.ourselves.iter().copied()).chain(met).collect()
    }

    /// Whom to call now. Each call must be answered by [`Self::called`].
    pub fn due(&mut self, now: Instant) -> Vec<Call> {
        let known = self.known();
        let mut calls = Vec::new();
        for (&address, dial) in &mut self.join {
            if !known.contains(&address) && dial.due(now) {
                calls.push(Call { address, expected: None });
            }
        }
        for (host, member) in &mut self.hosts {
            let renews = member.link.is_some() && member.renewal.due(now);
            if renews || member.link.is_none() && member.dial.due(now) {
                calls.push(Call { address: member.address, expected: Some(host.clone()) });
            }
        }
        calls
    }

    /// When [`Self::due`] has somebody to call, if nothing happens before.
    pub fn next_call(&self) -> Option<Instant> {
        let known = self.known();
        let join = self.join.iter().filter(|(address, _)| !known.contains(address)).map(|(_, dial)| dial);
        let members = self.hosts.values().map(|member| if member.link.is_some() { &member.renewal } else { &member.dial });
        join.chain(members).filter(|dial| !dial.busy).map(|dial| dial.next).min()
    }

    /// A connection stands; `index` and `offer` are what we will tell the peer. HELLOs follow.
    pub fn connected(
        &mut self,
        link: LinkId,
        (host, domain): (HostId, DomainId),
        ends: Ends,
        called: bool,
        (index, offer): (u32, Offer),
    ) {
        let (networks, mtus) = Default::default();
        let Ends { theirs: address, ours, via } = ends;
        let interface = via.map_or(0, |via| via.index);
        self.links
            .insert(link, Link { host, domain, address, ours, index, offer, interface, hello: None, networks, mtus, called });
    }

    /// The peer's HELLO has come.
    ///
    /// Simultaneous calls: the one of the lower name stays, at both ends. Two calls from the same end: the newer, because
    /// only an end that has lost the older one calls again.
    ///
    /// *Errors*: versions without overlap, a name that is not the certificate's, another AEAD, datagrams below
    /// [`MIN_DATAGRAM`], too many members.
    pub fn greet(&mut self, now: Instant, id: LinkId, hello: Hello) -> Result<Greeted, String> {
        let link = self.links.get(&id).ok_or("this connection is closed")?;
        if link.hello.is_some() {
            return Err("got a second HELLO".into());
        }
        if hello.host != link.host || hello.domain != link.domain {
            return Err(format!(
                "got HELLO of {} of {}, but the certificate says {} of {}",
                hello.host, hello.domain, link.host, link.domain
            ));
        }
        if hello.host == self.host {
            if hello.boot == self.boot {
                self.ourselves.insert(link.address);
                return Ok(Greeted::Ourselves);
            }
            return Err(self.twin_came(now, id, hello.boot));
        }
        if hello.newest < mesh::OLDEST || hello.oldest > mesh::PROTOCOL {
            return Err(format!(
                "got protocol {} to {}, want one of {} to {}: upgrade the older end",
                hello.oldest,
                hello.newest,
                mesh::OLDEST,
                mesh::PROTOCOL
            ));
        }
        sessions::acceptable(&link.offer, hello.offer.as_ref())?;
        if hello.max_datagram < MIN_DATAGRAM {
            return Err(format!(
                "got max-datagram {}, want {MIN_DATAGRAM} or more: see underlay-mtu at the other end",
                hello.max_datagram
            ));
        }
        let (address, host, called) = (link.address, link.host.clone(), link.called);
        if self.hosts.len() >= LIMIT && !self.hosts.contains_key(&host) && !self.make_room() {
            return Err(format!("got one more member, want at most {LIMIT}"));
        }
        if called && self.join.contains_key(&address) {
            self.met.insert(address, host.clone());
        }
        if let Some(standing) = self.contested(now, id, hello.boot)? {
            return Ok(Greeted::Contested { standing });
        }
        let member = self.hosts.entry(host.clone()).or_insert_with(|| Member::new(address, Dial::at(now)));
        let mut replaced = Vec::new();
        if let Some(old) = member.link {
            let old_called = self.links.get(&old).is_some_and(|link| link.called);
            let lower_called_old = if old_called { self.host < host } else { host < self.host };
            if member.boot == Some(hello.boot) && old_called != called && lower_called_old {
                return Ok(Greeted::Superseded);
            }
            member.standby.push(old);
        }
        let same_boot = member.boot == Some(hello.boot);
        if !same_boot {
            // Whoever started anew has none of the keys, nor the other ends of those connections.
            member.sessions = Sessions::default();
            replaced.append(&mut member.standby);
        } else if member.standby.len() > STANDBY {
            replaced.push(member.standby.remove(0));
        }
        if member.slot.is_none() {
            let free = self.slots.iter().position(|taken| !taken).unwrap_or(self.slots.len());
            if free == self.slots.len() {
                self.slots.push(true);
            } else {
                self.slots[free] = true;
            }
            member.slot = u16::try_from(free).ok().map(PeerSlot);
        }
        member.domain = Some(hello.domain.clone());
        member.same_boot = same_boot;
        member.rivals.remove(hello.boot);
        (member.address, member.link, member.boot, member.dial) = (address, Some(id), Some(hello.boot), Dial::at(now));
        member.renewal = Dial::at(now + self.renew + if called { Duration::ZERO } else { LET_OTHER_RENEW });
        if let Some(link) = self.links.get_mut(&id) {
            link.networks = hello.networks.iter().copied().collect();
            link.hello = Some(hello);
        }
        Ok(Greeted::Up { replaced, same_boot })
    }

    /// Forgets a member that was only told of: anybody could have made it up. `false`: there is none.
    fn make_room(&mut self) -> bool {
        let found = self.hosts.iter().find(|(_, member)| member.boot.is_none()).map(|(host, _)| host.clone());
        found.is_some_and(|host| self.hosts.remove(&host).is_some())
    }

    /// A connection has ended. Returns the peer that was lost with it, if it was the one that counts.
    pub fn closed(&mut self, now: Instant, id: LinkId) -> Option<HostId> {
        let link = self.links.remove(&id)?;
        let member = self.hosts.get_mut(&link.host)?;
        member.standby.retain(|standby| *standby != id);
        if member.link != Some(id) {
            return None;
        }
        member.link = member.standby.pop();
        if member.link.is_some() {
            // The new connection came to nothing before the other end knew of it: the old one counts again.
            member.sessions.retract(now, id);
            return None;
        }
        member.sessions = Sessions::default();
        member.lost = Some(now);
        let lost = Trouble { told: Told::Lost, since: now };
        let soon = AFTER_LOSS + patience(&self.host, &link.host);
        let pause = if member.refused.is_some() { BACKOFF_MAX } else { soon };
        member.dial = Dial { trouble: Some(lost), ..Dial::at(now + pause) };
        Some(link.host)
    }

    /// A member has left for good. Returns its place in the tables.
    pub fn left(&mut self, host: &HostId) -> Option<PeerSlot> {
        let member = self.hosts.remove(host)?;
        if let Some(slot) = member.slot {
            self.slots[usize::from(slot.0)] = false;
        }
        member.slot
    }

    /// Somebody told of members.
    pub fn hinted(&mut self, now: Instant, hints: Vec<Hint>) {
        for hint in hints {
            let full = self.hosts.len() >= LIMIT;
            // Whoever is at a `join` address is called there, whatever it is called: a false name would keep us from it.
            if hint.host == self.host || self.join.contains_key(&hint.address) {
                continue;
            }
            match self.hosts.get_mut(&hint.host) {
                // Where it is called, not when: hints by turns of two addresses would have us call without pause.
                Some(member) if member.link.is_none() => member.address = hint.address,
                Some(_) => {}
                None if !full => {
                    let dial = Dial::at(now + patience(&self.host, &hint.host));
                    self.hosts.insert(hint.host, Member::new(hint.address, dial));
                }
                None => self.hints_refused += 1,
            }
        }
    }

    /// Everybody we are connected with, as told to others.
    pub fn hints(&self, except: &HostId) -> Vec<Hint> {
        let connected = self.hosts.iter().filter(|(host, member)| member.link.is_some() && *host != except);
        connected.map(|(host, member)| Hint { host: host.clone(), address: member.address }).collect()
    }

    /// All members, connected or not.
    pub fn all(&self) -> impl Iterator<Item = (&HostId, &Member)> {
        self.hosts.iter()
    }

    /// Connected members with the connection that counts.
    pub fn connected_links(&self) -> impl Iterator<Item = (&HostId, &Member, LinkId, &Link)> {
        self.hosts.iter().filter_map(|(host, member)| {
            let id = member.link?;
            Some((host, member, id, self.links.get(&id)?))
        })
    }

    /// The connection that counts.
    pub fn link_to(&self, host: &HostId) -> Option<LinkId> {
        self.hosts.get(host)?.link
    }

    /// One connection.
    pub fn link(&self, id: LinkId) -> Option<&Link> {
        self.links.get(&id)
    }

    /// A peer carries these networks from now on. Returns those it did not carry before, and those it carries no more.
    pub fn carries(&mut self, id: LinkId, networks: Vec<Vni>) -> (Vec<Vni>, Vec<Vni>) {
        let Some(link) = self.links.get_mut(&id) else { return Default::default() };
        let new: BTreeSet<Vni> = networks.into_iter().collect();
        let added = new.difference(&link.networks).copied().collect();
        let removed = link.networks.difference(&new).copied().collect();
        link.networks = new;
        link.mtus.retain(|vni, _| link.networks.contains(vni));
        (added, removed)
    }

    /// Whether the peer's daemon is the one we were connected with before.
    pub fn same_boot(&self, host: &HostId) -> bool {
        self.hosts.get(host).is_some_and(|member| member.same_boot)
    }

    /// Whether its connection takes the place of one that still stands.
    pub fn is_renewed(&self, host: &HostId) -> bool {
        self.hosts.get(host).is_some_and(|member| !member.standby.is_empty())
    }

    /// The place of a connected or once connected member.
    pub fn slot(&self, host: &HostId) -> Option<PeerSlot> {
        self.hosts.get(host)?.slot
    }

    /// Whether everybody we know of, and every `join` address, has been reached. Who knows nobody cannot tell.
    pub fn complete(&self) -> bool {
        if self.hosts.is_empty() {
            return false;
        }
        let known = self.known();
        self.hosts.values().all(|member| member.link.is_some()) && self.join.keys().all(|address| known.contains(address))
    }
}

#[cfg(test)]
mod tests;
