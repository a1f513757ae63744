//! Where owned MACs are, and how they change their place: the only way is a move.
//!
//! Pure: events and `now` in, [`Effect`]s out. Safety invariant: at any instant at most one unfenced port for each owned
//! MAC. Messages may be lost, repeated or reordered, switches may die; only the owner grants, one grant outstanding. This
//! file holds what is known and the ports; `moves/source.rs`, `moves/destination.rs` and `moves/bystander.rs` the three parts a switch
//! can have in a move; `moves/local.rs` the hypervisor's word and time; `moves/heard.rs` steps that peers tell; `moves/view.rs` what is
//! told of all that. `moves/model.rs` looks through all schedules of a small world, `moves/tests.rs` runs random ones.
//!
//! ```text
//! Source  OWNED ─grant→ GRANTED ─VM stopped→ FENCED ─destination owns→ GONE
//!         GRANTED ─abort + RELEASED(dest)→ OWNED        FENCED ─VM runs here again + RELEASED(dest)→ OWNED(+2)
//!         either, aborted ─VM runs here, dest out of reach for PATIENCE→ OWNED(+2)
//! Dest    ABSENT ─grant→ PREPARED ─VM runs here, source is fenced→ OWNED(+1)     PREPARED ─abort or expiry→ RELEASED
//! Sender  DIRECT ─HOLD→ HOLD(lease) ─OWNED(+1)→ DIRECT     reserved in the protocol, not implemented
//! ```
//!
//! The source tells FENCED when its VM stops, long before the VM runs elsewhere. A destination that has not heard it when
//! its VM runs asks for it (FENCE) and owns on the answer: one round trip. It owns without an answer only when the source
//! cannot be reached for [`PATIENCE`]: the hypervisor's word that the VM runs here says that it does not run there.

mod bystander;
mod destination;
mod heard;
mod local;
#[cfg(test)]
mod model;
mod source;
#[cfg(test)]
mod tests;
mod view;

use std::collections::BTreeMap;
use std::time::Duration;
use violin_common::api::switch::{MoveSeen, MoveState, Ownership};
use violin_common::control::mesh::{Message, OwnedAt, Step};
use violin_common::{Epoch, HostId, Instant, MacAddr, PortId, VmId, Vni};

/// How long a source forwards late frames after the move.
pub const TOMBSTONE: Duration = Duration::from_secs(300);
/// How long an end whose VM runs waits for an unreachable other end.
pub const PATIENCE: Duration = Duration::from_secs(3);
/// After this time a grant whose VM never ran is given back.
pub const GRANT_EXPIRY: Duration = Duration::from_secs(3600);
/// How often an unanswered step is told again on a standing connection.
const REPEAT: Duration = Duration::from_secs(1);
/// MACs known of at most: a bound on what peers can make us remember.
const LIMIT: usize = 65_536;
/// Of these, how many one peer can make us remember: none takes the room of all.
const SHARE: usize = LIMIT / 8;
/// Moves beyond which no epoch we own is raised because of what a peer says: as many are left to move it.
const HEARD_MOVES: u32 = u32::MAX / 2;

/// One owned MAC.
pub type Key = (Vni, MacAddr);

/// What is to be done about a move.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Tell one peer; lost if it is not connected.
    Send {
        /// Whom.
        to: HostId,
        /// What.
        message: Message,
    },
    /// Tell all peers that carry the network, and `also` in any case.
    Announce {
        /// What: [`Message::Owned`] or [`Message::Disowned`].
        message: Message,
        /// The former owner.
        also: Option<HostId>,
    },
    /// Two places claim one MAC; ours is muted. Worth an operator's look.
    Duplicate {
        /// Which.
        key: Key,
        /// The other.
        host: HostId,
        /// Its epoch.
        epoch: Epoch,
    },
}

/// A grant we gave.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Given {
    epoch: Epoch,
    to: HostId,
    /// It said PREPARED.
    taken: bool,
    /// It said so once, but has started anew since.
    lost: bool,
    /// We want it back.
    aborting: bool,
    /// It said RELEASED; only remembered while fenced.
    released: bool,
    told: Instant,
}

/// A grant we got.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Got {
    epoch: Epoch,
    from: HostId,
    /// The source said FENCED.
    fenced: bool,
    since: Instant,
    told: Instant,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Entry {
    port: Option<PortId>,
    vm: Option<VmId>,
    state: MoveState,
    /// Epoch we own or owned last.
    own: Epoch,
    given: Option<Given>,
    /// Highest epoch we ever granted.
    last_given: Epoch,
    got: Option<Got>,
    /// Grants up to here are refused for ever.
    released: Epoch,
    /// Since when the hypervisor says that the VM runs behind our port.
    running: Option<Instant>,
    /// The hypervisor stopped the VM while it was OWNED here.
    stopped: bool,
    /// A port that runs already and has not been allowed to speak yet.
    claiming: Option<Epoch>,
    /// Best known owner elsewhere.
    owner: Option<(Epoch, HostId)>,
    /// That one has started anew since, and may have lost it: whoever else claims it is believed.
    doubted: bool,
    /// When what is known of a MAC without port may be forgotten.
    expires: Option<Instant>,
    /// Why the last grant came to nothing.
    refusal: Option<String>,
    entered: BTreeMap<u8, (MoveState, Instant)>,
    /// The peer that made us remember it.
    told_by: Option<HostId>,
}

impl Entry {
    fn new() -> Self {
        Self {
            port: None,
            vm: None,
            state: MoveState::Elsewhere,
            own: Epoch::default(),
            given: None,
            last_given: Epoch::default(),
            got: None,
            released: Epoch::default(),
            running: None,
            stopped: false,
            claiming: None,
            owner: None,
            doubted: false,
            expires: None,
            refusal: None,
            entered: BTreeMap::new(),
            told_by: None,
        }
    }

    fn enter(&mut self, now: Instant, state: MoveState) {
        self.state = state;
        self.entered.insert(state as u8, (state, now));
    }

    /// Somebody else owns what we owned. `twice`: the VM has not moved there, it runs here as well. It may speak again when
    /// that other one has ended.
    fn mute(&mut self, now: Instant, twice: bool) {
        self.running = (twice && self.state == MoveState::Owned && !self.stopped).then_some(now);
        self.given = None;
        self.enter(now, MoveState::Gone);
        self.expires = Some(now + TOMBSTONE);
    }

    /// The VM runs behind our port: the hypervisor says so, or whoever put the port back.
    const fn runs(&self) -> bool {
        self.running.is_some() || self.claiming.is_some()
    }

    /// When the destination was last told of a grant that it may not know, or not know any more: one that has owned the MAC and
    /// started anew before we heard of it claims less than it was granted, until it is told again.
    fn untold(&self) -> Option<Instant> {
        let given = self.given.as_ref().filter(|given| !given.released)?;
        let open = !given.taken || given.lost || given.aborting || self.state == MoveState::Fenced;
        open.then_some(given.told)
    }

    const fn owns(&self) -> bool {
        matches!(self.state, MoveState::Owned | MoveState::Granted)
    }

    fn highest(&self) -> Epoch {
        let known = self.owner.as_ref().map_or_else(Epoch::default, |(epoch, _)| *epoch);
        known.max(self.own).max(self.got.as_ref().map_or_else(Epoch::default, |got| got.epoch))
    }
}

/// Where frames for an owned MAC go and whether its port may speak; the switch turns it into tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// The local port.
    pub port: Option<PortId>,
    /// Whether the local port is where the MAC is.
    pub here: bool,
    /// Otherwise where it is, if known.
    pub host: Option<HostId>,
    /// Whether the local port may speak: `None` while frames wait.
    pub open: Option<bool>,
    /// Whether the local port takes what tunnels bring although the MAC is elsewhere.
    pub arriving: bool,
    /// Whether late frames are forwarded.
    pub forward_late: bool,
}

/// What a request waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// The destination is PREPARED.
    Granted,
    /// The MAC is OWNED here.
    Owned,
    /// The grant is forgotten by the destination.
    Released,
}

/// All owned MACs this switch knows of. A value: a copy goes the same way as the original, and effects come in the order of MACs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Moves {
    host: HostId,
    entries: BTreeMap<Key, Entry>,
    effects: Vec<Effect>,
    /// How many MACs each peer has made us remember; those forgotten since the last tick are still among them.
    told: BTreeMap<HostId, usize>,
    /// Owned MACs that peers named and that were not taken down, since the start: group addresses, networks not carried here,
    /// more than there is room for.
    pub macs_refused: u64,
}

impl Moves {
    /// Knows nothing yet. `host` is ours.
    pub fn new(host: HostId) -> Self {
        Self { host, entries: BTreeMap::new(), effects: Vec::new(), told: BTreeMap::new(), macs_refused: 0 }
    }

    /// Takes what is to be done since the last call.
    pub fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    /// Remembers a MAC because `from` named it. `false`, and counted: it is not known, and there is no room.
    fn remember(&mut self, from: &HostId, key: Key) -> bool {
        if self.entries.contains_key(&key) {
            return true;
        }
        let told = self.told.get(from).copied().unwrap_or_default();
        if self.entries.len() >= LIMIT || told >= SHARE {
            self.macs_refused += 1;
            return false;
        }
        self.told.insert(from.clone(), told + 1);
        self.entries.insert(key, Entry { told_by: Some(from.clone()), ..Entry::new() });
        true
    }

    /// Counts anew what each peer made us remember. A MAC with a port here takes nobody's share.
    fn recount(&mut self) {
        self.told.clear();
        let told = self.entries.values().filter(|entry| entry.port.is_none()).filter_map(|entry| entry.told_by.as_ref());
        for host in told {
            match self.told.get_mut(host) {
                Some(count) => *count += 1,
                None => drop(self.told.insert(host.clone(), 1)),
            }
        }
    }

    fn send(&mut self, to: &HostId, message: Message) {
        self.effects.push(Effect::Send { to: to.clone(), message });
    }

    fn step(&mut self, to: &HostId, key: Key, epoch: Epoch, step: Step) {
        self.send(to, Message::Move { owned: at(key, epoch), step });
    }

    /// A port for an owned MAC was made. A port whose VM runs here claims at once if `settled`, else in [`Self::settle`].
    ///
    /// *Errors*: another port here has that MAC, or a move of it away from here has not ended.
    pub fn port_added(
        &mut self,
        now: Instant,
        key: Key,
        port: PortId,
        vm: VmId,
        ownership: Ownership,
        settled: bool,
    ) -> Result<(), String> {
        let entry = self.entries.entry(key).or_insert_with(Entry::new);
        if let Some(other) = entry.port {
            return Err(format!("got MAC {} for a second port, but port {other} has it: remove that first", key.1));
        }
        // The VM was started anew after its destination died with the grant, which would keep its MAC from here for ever.
        let next_life = matches!(ownership, Ownership::Here { epoch } if epoch.incarnation > entry.own.incarnation);
        if entry.state == MoveState::Fenced && next_life {
            entry.given = None;
        } else if matches!(entry.state, MoveState::Granted | MoveState::Fenced) {
            return Err(format!("a move of MAC {} away from this host has not ended: wait for it or abort it", key.1));
        }
        (entry.port, entry.vm, entry.running, entry.stopped) = (Some(port), Some(vm), None, false);
        entry.enter(now, MoveState::Absent);
        if let Ownership::Here { epoch } = ownership {
            entry.claiming = Some(epoch);
            if settled {
                self.claim(now, key);
            }
        }
        Ok(())
    }

    /// All members we know of were heard, or enough time has passed: ports that run here may claim.
    pub fn settle(&mut self, now: Instant) {
        let waiting: Vec<Key> = self.entries.iter().filter(|(_, e)| e.claiming.is_some()).map(|(key, _)| *key).collect();
        for key in waiting {
            self.claim(now, key);
        }
    }

    fn claim(&mut self, now: Instant, key: Key) {
        let me = self.host.clone();
        let Some(entry) = self.entries.get_mut(&key) else { return };
        let Some(wanted) = entry.claiming.take() else { return };
        if entry.state == MoveState::Prepared {
            // Its source has not heard that the VM arrived, and has granted again: that one is fenced first.
            entry.running.get_or_insert(now);
            return self.arrive(now, key);
        }
        match entry.owner.clone() {
            // Whoever is known to own it keeps it: a claim of the same epoch is the later one.
            Some((epoch, host)) if epoch >= wanted && host != me => {
                entry.enter(now, MoveState::Released);
                entry.running.get_or_insert(now);
                self.effects.push(Effect::Duplicate { key, host, epoch });
            }
            _ => {
                let floor = entry.highest();
                entry.own = if floor >= wanted { floor.after(1) } else { wanted };
                entry.owner = None;
                entry.running = None;
                entry.expires = None;
                entry.enter(now, MoveState::Owned);
                self.announce(key, None);
            }
        }
    }

    fn announce(&mut self, key: Key, also: Option<HostId>) {
        let Some(entry) = self.entries.get(&key) else { return };
        let message = Message::Owned { all: false, macs: vec![at(key, entry.own)] };
        self.effects.push(Effect::Announce { message, also });
    }

    /// A port for an owned MAC was removed: its VM has ended here, or moved away.
    pub fn port_removed(&mut self, now: Instant, key: Key) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        (entry.port, entry.running, entry.claiming) = (None, None, None);
        match entry.state {
            MoveState::Owned => {
                let message = Message::Disowned(at(key, entry.own));
                self.entries.remove(&key);
                self.effects.push(Effect::Announce { message, also: None });
            }
            // The destination may own it any time: this end stays fenced until it knows.
            MoveState::Granted => {
                entry.enter(now, MoveState::Fenced);
                self.tell_fenced(now, key);
            }
            MoveState::Prepared => self.release(now, key, "its port was removed"),
            MoveState::Fenced if entry.given.as_ref().is_some_and(|given| given.released) => {
                let message = Message::Disowned(at(key, entry.own));
                self.entries.remove(&key);
                self.effects.push(Effect::Announce { message, also: None });
            }
            MoveState::Absent | MoveState::Released => entry.enter(now, MoveState::Elsewhere),
            MoveState::Fenced | MoveState::Gone | MoveState::Elsewhere => {}
        }
        if let Some(entry) = self.entries.get_mut(&key)
            && matches!(entry.state, MoveState::Released | MoveState::Elsewhere)
        {
            entry.enter(now, MoveState::Elsewhere);
            if entry.owner.is_none() {
                entry.expires = Some(now + TOMBSTONE);
            }
        }
    }
}

fn at((vni, mac): Key, epoch: Epoch) -> OwnedAt {
    OwnedAt { vni, mac, epoch }
}
