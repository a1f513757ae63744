//! The control side's state: the only writer of the tables that workers read.
//!
//! Pure: events and `now` in (`handle_*`), [`Command`]s out; no clock, no socket. Peers are kept by `members.rs`, owned MACs
//! by `moves.rs`; this file joins them with networks and ports. Read `switch/heard.rs` (what peers say) and
//! `switch/requests.rs` (what operators and monitors ask) next; `io/control.rs` carries the commands out.

mod command;
mod contest;
mod heard;
mod mtus;
mod peers;
mod requests;
mod sessions;
mod tables;
#[cfg(test)]
mod tests;

pub use command::{Command, Expecting, Nic, Wanted};
use contest::Contest;
use sessions::Challenge;
pub use sessions::{Ability, Drawn};

use crate::counters::PortCounters;
use crate::fdb::Fdb;
use crate::members::{Call, Ends, LinkId, Members, Told};
use crate::moves::{Effect, Key, Moves, Until};
use crate::tables::{PeerSlot, Place, PortSlot, WorkerEvent};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use violin_common::api::switch::{NetworkSpec, PortSpec, SwitchReply};
use violin_common::config::switch::PlainPath;
use violin_common::control::mesh::{Hello, Message, OLDEST, PROTOCOL, feature};
use violin_common::{DomainId, HostId, Instant, MacAddr, PortId, Vni};

/// After this time ports that run here claim their MACs even if not all members were reached.
pub const SETTLE: Duration = Duration::from_secs(2);
/// How long a request about a move waits for the other end.
pub const WAIT: Duration = Duration::from_secs(10);
/// Learned MACs announced within [`REFILL`] at most.
const ANNOUNCEMENTS: u32 = 64;
/// See there.
const REFILL: Duration = Duration::from_millis(50);
/// How often FDBs are swept; workers look at an entry's age when they use it.
const AGE_EVERY: Duration = Duration::from_secs(1);
/// Stations in one message: about 90 KiB.
const STATIONS_CHUNK: usize = 4096;
/// Owned MACs in one message: about 150 KiB.
const OWNED_CHUNK: usize = 4096;

/// What a switch is, besides what it carries.
#[derive(Debug, Clone)]
pub struct Nature {
    /// Its host.
    pub host: HostId,
    /// Its domain.
    pub domain: DomainId,
    /// Its mesh port.
    pub listen: SocketAddr,
    /// Largest UDP payload it takes.
    pub max_datagram: u16,
    /// Drawn at each start.
    pub boot: u64,
    /// The ciphers it has.
    pub ciphers: Vec<Ability>,
    /// Queues it sends from.
    pub queues: u16,
    /// Where data may go plain.
    pub plain: Vec<PlainPath>,
    /// Age at which a session is renewed, see [`crate::members::RENEW`].
    pub renew: Duration,
}

/// What peers said that was not kept, since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Refusals {
    /// Members they told of, beyond [`crate::members::LIMIT`].
    pub hints: u64,
    /// Owned MACs that no port here can have, or beyond what there is room for.
    pub macs: u64,
    /// HELLOs of second switches with one certificate.
    pub twins: u64,
}

/// A request that waits for its answer, numbered by whoever asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ticket(pub u64);

#[derive(Debug)]
struct Net {
    spec: NetworkSpec,
    fdb: Arc<Fdb>,
}

#[derive(Debug)]
struct PortState {
    slot: PortSlot,
    spec: PortSpec,
    traffic: Arc<PortCounters>,
    /// Who waits for it to be attached.
    ticket: Option<Ticket>,
}

impl PortState {
    fn key(&self) -> Option<Key> {
        self.spec.owned.as_ref().map(|owned| (self.spec.vni, owned.mac))
    }
}

#[derive(Debug)]
struct Waiter {
    ticket: Ticket,
    key: Key,
    until: Until,
    deadline: Instant,
}

/// The control side of one switch.
#[derive(Debug)]
pub struct Switch {
    nature: Nature,
    started: Instant,
    members: Members,
    moves: Moves,
    networks: BTreeMap<Vni, Net>,
    ports: BTreeMap<PortId, PortState>,
    slots: Vec<Option<PortId>>,
    next_port: u32,
    waiters: Vec<Waiter>,
    settled: bool,
    dirty: bool,
    aged: Instant,
    /// Learned MACs that may still be announced.
    announcements: u32,
    /// Since when.
    refilled: Instant,
    /// When time was last told.
    looked: Instant,
    /// Peers that were seen elsewhere and asked there, by session.
    challenges: BTreeMap<u32, Challenge>,
    /// Callers whose place somebody else has, until that one answers or is gone.
    contests: BTreeMap<LinkId, Contest>,
    /// Whose MTUs the log has told of lately.
    mtus_said: Vec<(HostId, Instant)>,
    commands: Vec<Command>,
}

impl Switch {
    /// A switch without networks, ports and peers.
    pub fn new(now: Instant, nature: Nature, join: &[SocketAddr]) -> Self {
        let members = Members::new(now, (nature.host.clone(), nature.boot), nature.renew, join);
        let moves = Moves::new(nature.host.clone());
        Self {
            nature,
            started: now,
            members,
            moves,
            networks: BTreeMap::new(),
            ports: BTreeMap::new(),
            slots: Vec::new(),
            next_port: 1,
            waiters: Vec::new(),
            settled: false,
            dirty: true,
            aged: now,
            announcements: ANNOUNCEMENTS,
            refilled: now,
            looked: now,
            challenges: BTreeMap::new(),
            contests: BTreeMap::new(),
            mtus_said: Vec::new(),
            commands: Vec::new(),
        }
    }

    /// What is to be done now, in order. Tables come first: what a message or an answer says is true by then.
    pub fn take_commands(&mut self, now: Instant) -> Vec<Command> {
        self.carry_out_effects();
        self.answer_waiters(now);
        let mut commands = Vec::new();
        if std::mem::take(&mut self.dirty) {
            self.compare_mtus(now);
            commands.push(Command::Publish(Box::new(self.forwarding())));
        }
        commands.append(&mut self.commands);
        commands
    }

    fn send(&mut self, link: LinkId, message: Message) {
        self.commands.push(Command::Send { link, message });
    }

    fn carry_out_effects(&mut self) {
        for effect in self.moves.take_effects() {
            self.dirty = true;
            match effect {
                Effect::Send { to, message } => {
                    if let Some(link) = self.members.link_to(&to) {
                        self.send(link, message);
                    }
                }
                Effect::Announce { message, also } => {
                    let vni = match &message {
                        Message::Owned { macs, .. } => macs.first().map(|owned| owned.vni),
                        Message::Disowned(owned) => Some(owned.vni),
                        _ => None,
                    };
                    let links: Vec<LinkId> = self
                        .members
                        .connected_links()
                        .filter(|(host, _, _, link)| {
                            also.as_ref() == Some(*host) || vni.is_some_and(|vni| link.networks.contains(&vni))
                        })
                        .map(|(_, _, id, _)| id)
                        .collect();
                    for link in links {
                        self.send(link, message.clone());
                    }
                }
                Effect::Duplicate { key, host, epoch } => {
                    tracing::warn!(vni = %key.0, mac = %key.1, %host, %epoch, "MAC is claimed by two places; ours is muted");
                }
            }
        }
    }

    fn answer_waiters(&mut self, now: Instant) {
        let (moves, commands) = (&self.moves, &mut self.commands);
        self.waiters.retain(|waiter| {
            let result = moves.outcome(waiter.key, waiter.until).or_else(|| {
                (now >= waiter.deadline).then(|| {
                    let state = moves.seen(waiter.key).map(|seen| seen.state);
                    Err(format!("no answer from the other end within {} s; the move is {state:?} here", WAIT.as_secs()))
                })
            });
            let Some(result) = result else { return true };
            commands.push(Command::Answer { ticket: waiter.ticket, reply: result.map(|()| SwitchReply::Done) });
            false
        });
    }

    /// When [`Self::handle_timeout`] is to be called at the latest, if nothing else happens before. `None`: not at all.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let refill = (self.announcements < ANNOUNCEMENTS).then(|| self.refilled + REFILL);
        // Who has just started looks whether all members were heard.
        let settle = (!self.settled).then(|| self.looked + REFILL);
        let waits = self.waiters.iter().map(|waiter| waiter.deadline).min();
        let ages = self.networks.values().any(|network| !network.fdb.is_empty()).then(|| self.aged + AGE_EVERY);
        let (calls, sessions) = (self.members.next_call(), self.members.next_expiry());
        let all = [refill, settle, waits, ages, calls, sessions, self.next_challenge_end(), self.moves.poll_timeout(self.looked)];
        all.into_iter().flatten().min()
    }

    /// Time has passed. May be called at any time; nothing is due before [`Self::poll_timeout`].
    pub fn handle_timeout(&mut self, now: Instant) {
        self.looked = now;
        if now.since(self.refilled) >= REFILL {
            (self.announcements, self.refilled) = (ANNOUNCEMENTS, now);
        }
        for call in self.members.due(now) {
            self.commands.push(Command::Call(call));
        }
        if !self.settled && (now.since(self.started) >= SETTLE || self.members.complete()) {
            self.settled = true;
            self.moves.settle(now);
            self.dirty = true;
        }
        self.dirty |= self.members.expire_sessions(now);
        self.forget_challenges(now);
        let members = &self.members;
        self.moves.tick(now, &|host| members.link_to(host).is_some(), members.complete());
        if now.since(self.aged) < AGE_EVERY {
            return;
        }
        self.aged = now;
        // A worker may have learned from a port it did not yet know to be removed.
        let slots = self.slots.clone();
        self.forget_stations(|slot| slots.get(usize::from(slot.0)).copied().flatten().is_none());
        for network in self.networks.values() {
            network.fdb.age(now, Duration::from_secs(network.spec.ageing_s.into()));
        }
    }

    /// A connection stands: our HELLO goes out. `drawn`: numbers nobody can guess.
    pub fn handle_connected(
        &mut self,
        link: LinkId,
        (host, domain): (HostId, DomainId),
        ends: impl Into<Ends>,
        called: bool,
        drawn: Drawn,
    ) {
        let ends = ends.into();
        let (index, offer) = self.offer(&domain, &ends, drawn);
        self.members.connected(link, (host, domain), ends, called, (index, offer.clone()));
        let hello = Hello {
            oldest: OLDEST,
            newest: PROTOCOL,
            features: feature::FORGET | feature::MTUS,
            host: self.nature.host.clone(),
            domain: self.nature.domain.clone(),
            boot: self.nature.boot,
            receiver: index,
            reserved: 0,
            max_datagram: self.nature.max_datagram,
            networks: self.networks.keys().copied().collect(),
            offer: Some(offer),
        };
        self.send(link, Message::Hello(hello));
    }

    /// A call has ended, in a connection or not.
    pub fn handle_called(&mut self, now: Instant, call: &Call, failed: Option<&Told>) {
        self.members.called(now, call, failed);
    }

    /// The other end refuses this connection, in its words; [`Self::handle_closed`] follows.
    pub fn handle_refused(&mut self, now: Instant, link: LinkId, why: &str) {
        if let Some((peer, address)) = self.members.refused(now, link, &Told::Refuses(why.to_owned())) {
            tracing::warn!(%peer, %address, "the peer refuses us, and is called again all the same: {why}");
        }
    }

    /// A connection has ended.
    pub fn handle_closed(&mut self, now: Instant, link: LinkId) {
        self.contests.remove(&link);
        if let Some(host) = self.members.closed(now, link) {
            if self.members.refuses_us(&host) {
                tracing::debug!(peer = %host, "peer lost");
            } else {
                tracing::info!(peer = %host, "peer lost");
            }
            self.forget_place(&host);
            self.moves.peer_down(now, &host);
        }
        self.contest_won(now, link);
    }

    fn forget_place(&mut self, host: &HostId) {
        if let Some(slot) = self.members.slot(host) {
            self.flush_place(Place::Peer(slot));
        }
        self.dirty = true;
    }

    fn flush_place(&self, place: Place) {
        for network in self.networks.values() {
            network.fdb.flush_place(place);
        }
    }

    /// Stations learned at these ports are there no more: forgets them here and tells everybody, who would send there until
    /// they have aged. They are flooded to until they are heard again, wherever that is.
    fn forget_stations(&mut self, gone: impl Fn(PortSlot) -> bool) {
        let gone = |place| matches!(place, Place::Port(slot) if gone(slot));
        let forgotten: Vec<_> = self.networks.iter().map(|(vni, network)| (*vni, network.fdb.take_places(gone))).collect();
        for (vni, stations) in forgotten {
            for stations in stations.chunks(STATIONS_CHUNK) {
                let understands = |hello: &Hello| hello.features & feature::FORGET != 0;
                self.tell_carriers_that(vni, &Message::Forgotten { vni, stations: stations.to_vec() }, understands);
            }
        }
    }

    fn flush_owned(&self, key: Key) {
        if let Some(network) = self.networks.get(&key.0) {
            network.fdb.flush_mac(key.1);
        }
    }

    /// A worker saw something.
    pub fn handle_worker(&mut self, now: Instant, event: WorkerEvent) {
        match event {
            // Guests can cause these at will: so many in a tick and no more; a flood tells peers as well.
            WorkerEvent::Learned { vni, vid, mac, .. } if self.announcements > 0 => {
                self.announcements -= 1;
                self.tell_carriers(vni, &Message::Learned { vni, vid, mac });
            }
            WorkerEvent::Learned { .. } => {}
            WorkerEvent::Lost { port, id } if self.port_of(port) == Some(id) => self.forget_stations(|slot| slot == port),
            // Removed since, and what was learned there with it.
            WorkerEvent::Lost { .. } => {}
            WorkerEvent::Oversize { port, len } => {
                let port = self.port_of(port).and_then(|id| Some((id, &self.ports.get(&id)?.spec)));
                let Some((port, spec)) = port else { return };
                let mtu = self.networks.get(&spec.vni).map_or(0, |network| network.spec.mtu);
                tracing::warn!(
                    %port, at = ?spec.kind, vni = %spec.vni, bytes = len, mtu,
                    "a station sends packets larger than its network's MTU: they are carried, in more datagrams (counter \
                     oversize-carried); want the station's MTU at {mtu}, or a larger `mtu` of the network on \
                     every host"
                );
            }
            WorkerEvent::Opened { session, queue, epoch } => self.epoch_begun(session, queue, epoch),
            WorkerEvent::Roamed { session, from } => self.seen_elsewhere(session, from),
            WorkerEvent::Answered { session, token, from } => self.challenge_answered(now, session, (from, token)),
            WorkerEvent::Stolen { vni, mac, port } => {
                let port = self.slots.get(usize::from(port.0)).copied().flatten();
                tracing::warn!(%vni, %mac, ?port, "a port used a MAC that somebody else owns; refused");
            }
        }
    }

    fn tell_carriers(&mut self, vni: Vni, message: &Message) {
        self.tell_carriers_that(vni, message, |_| true);
    }

    fn tell_carriers_that(&mut self, vni: Vni, message: &Message, which: impl Fn(&Hello) -> bool) {
        let carriers: Vec<LinkId> = self
            .members
            .connected_links()
            .filter(|(_, _, _, link)| link.networks.contains(&vni) && link.hello.as_ref().is_some_and(&which))
            .map(|(_, _, id, _)| id)
            .collect();
        for link in carriers {
            self.send(link, message.clone());
        }
    }

    fn tell_all(&mut self, message: &Message) {
        let links: Vec<LinkId> = self.members.connected_links().map(|(_, _, id, _)| id).collect();
        for link in links {
            self.send(link, message.clone());
        }
    }

    /// The daemon ends: ports go, peers are told. Owned MACs are not given up, their VMs run on.
    pub fn handle_drain(&mut self) {
        self.tell_all(&Message::Leave);
        for (id, port) in std::mem::take(&mut self.ports) {
            self.commands.push(Command::Detach { slot: port.slot, id, keep: true });
        }
        self.slots.clear();
        self.dirty = true;
    }

    /// The port of a slot's place for operators.
    fn port_of(&self, slot: PortSlot) -> Option<PortId> {
        self.slots.get(usize::from(slot.0)).copied().flatten()
    }

    /// The host of a peer's place.
    fn host_of(&self, slot: PeerSlot) -> Option<HostId> {
        self.members.all().find(|(_, member)| member.slot == Some(slot)).map(|(host, _)| host.clone())
    }

    /// Whether a MAC is owned by somebody.
    fn is_owned(&self, vni: Vni, mac: MacAddr) -> bool {
        self.moves.seen((vni, mac)).is_some()
    }

    /// What was not kept of what peers said.
    pub const fn refusals(&self) -> Refusals {
        Refusals { hints: self.members.hints_refused, macs: self.moves.macs_refused, twins: self.members.twins_refused }
    }

    /// The address of the peer at a connection's end, for those that keep figures of connections.
    pub fn link_of(&self, host: &HostId) -> Option<LinkId> {
        self.members.link_to(host)
    }
}
