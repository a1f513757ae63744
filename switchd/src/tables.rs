//! What the control side tells the workers: a snapshot, published as a whole, never changed in place.
//!
//! The `Switch` is its only writer; workers read it through `arc_swap`, once per vector of frames. Learned MACs are not in
//! here: they live in each network's [`Fdb`], which workers write themselves. Read `outbound.rs` and `inbound.rs` next.

use crate::fdb::Fdb;
use crate::seal::session::Session;
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use violin_common::{HostId, MacAddr, PortId, Vni};

/// Place of a port in [`Forwarding::ports`]; reused after the port is gone, unlike [`PortId`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortSlot(pub u16);

/// Place of a peer in [`Forwarding::peers`]; reused after the peer is forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerSlot(pub u16);

/// Something for each session's index.
pub type ByIndex<T> = HashMap<u32, T, BuildHasherDefault<IndexHasher>>;

/// Indices are random numbers of ours: each is its own hash.
#[derive(Debug, Clone, Copy, Default)]
pub struct IndexHasher(u64);

impl Hasher for IndexHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.0 = self.0 << 8 | u64::from(*byte));
    }

    fn write_u32(&mut self, index: u32) {
        // The table looks at the upper bits and at the lower ones.
        self.0 = u64::from(index) << 32 | u64::from(index);
    }
}

/// Everything a worker needs to forward, but the learned MACs.
#[derive(Debug, Clone, Default)]
pub struct Forwarding {
    /// Networks this switch carries.
    pub networks: HashMap<Vni, Network>,
    /// Ports by slot.
    pub ports: Vec<Option<Port>>,
    /// Peers by slot.
    pub peers: Vec<Option<Peer>>,
    /// The index of a session (see [`Session::index`]) → whose it is. Datagrams with another index are refused. A peer has
    /// several sessions while one takes another's place.
    pub by_receiver: ByIndex<(PeerSlot, Arc<Session>)>,
}

/// One network on this switch.
#[derive(Debug, Clone)]
pub struct Network {
    /// Largest layer-3 packet, in bytes.
    pub mtu: u16,
    /// Age at which a silent learned MAC is forgotten.
    pub ageing: Duration,
    /// Its local ports behind which a guest is or arrives (the gate is not closed): where a flood goes first.
    pub ports: Vec<PortSlot>,
    /// Peers that carry it: each gets one copy of a flood from a local port.
    pub peers: Vec<PeerSlot>,
    /// Owned MACs; no data frame changes these.
    pub owned: HashMap<MacAddr, Owned>,
    /// Learned MACs.
    pub fdb: Arc<Fdb>,
}

/// Where an owned MAC is, as the moves say (see `moves.rs`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owned {
    /// Where frames from local ports (and flooding) find it.
    pub at: Place,
    /// A local port that takes what tunnels bring for this MAC although `at` is elsewhere: PREPARED at a destination.
    pub arriving: Option<PortSlot>,
    /// FENCED or GONE here: what tunnels bring for this MAC is forwarded once to `at`, marked. Otherwise it is refused
    /// (split horizon).
    pub forward_late: bool,
}

/// Where frames for a MAC go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    /// A local port.
    Port(PortSlot),
    /// Another switch.
    Peer(PeerSlot),
    /// Known to be owned, but nobody can be reached: refused, never flooded.
    Nowhere,
}

/// What may come out of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// Frames enter the network.
    Open,
    /// Frames wait, bounded, until the gate is open or closed: PREPARED.
    Hold,
    /// Frames are refused: ABSENT, FENCED, GONE, RELEASED, or a duplicate MAC.
    Closed,
}

/// Which source addresses a port may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceRule {
    /// Any individual address that nobody owns; they are learned.
    Learn,
    /// This one, owned by the VM behind the port; nothing is learned.
    Only(MacAddr),
}

/// One port.
#[derive(Debug, Clone)]
pub struct Port {
    /// Its number for operators.
    pub id: PortId,
    /// Its network.
    pub vni: Vni,
    /// Who may speak.
    pub source: SourceRule,
    /// Whether it may speak now.
    pub gate: Gate,
    /// A gateway to a foreign VXLAN tunnel end: "too big" is answered, not sliced.
    pub gateway: bool,
    /// What went through; shared with the control side.
    pub traffic: Arc<crate::counters::PortCounters>,
}

/// One peer.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Its host.
    pub host: HostId,
    /// Where datagrams go; plain ones of it must come from there.
    pub address: SocketAddr,
    /// The one of our addresses that it knows us by; none: the one the kernel chooses, as it chose when we called.
    pub ours: Option<IpAddr>,
    /// What goes to it goes in this session, which it is known to have.
    pub session: Arc<Session>,
    /// Largest UDP payload on the path to it, in bytes.
    pub max_datagram: u16,
    /// Networks it carries and may carry: data for others is refused.
    pub networks: HashSet<Vni>,
    /// What went to it and came from it; shared with the control side.
    pub traffic: Arc<crate::counters::PeerCounters>,
}

/// What a worker tells the control side over a bounded channel; lost when full, which only delays an announcement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkerEvent {
    /// A source was learned on a local port for the first time, or came from there after having been elsewhere.
    Learned {
        /// Network.
        vni: Vni,
        /// Outer VLAN identifier.
        vid: u16,
        /// Address.
        mac: MacAddr,
        /// Where.
        port: PortSlot,
    },
    /// The first frame of a port that was larger than its network's MTU; worth telling the operator.
    Oversize {
        /// Where.
        port: PortSlot,
        /// Length of its packet, or of one segment.
        len: u16,
    },
    /// A port has lost its interface: what was learned there is there no more.
    Lost {
        /// Where.
        port: PortSlot,
        /// Its number: by now the place may be another's.
        id: PortId,
    },
    /// Something of a peer's queue has opened under a new key; it waits to hear that.
    Opened {
        /// The session's index.
        session: u32,
        /// The peer's queue.
        queue: u16,
        /// The key's epoch.
        epoch: u64,
    },
    /// Something authentic of a session came from elsewhere than where its peer is.
    Roamed {
        /// The session's index.
        session: u32,
        /// Where from.
        from: SocketAddr,
    },
    /// A challenge was answered.
    Answered {
        /// The session's index.
        session: u32,
        /// The challenge's.
        token: u64,
        /// Where from.
        from: SocketAddr,
    },
    /// A port used a MAC that somebody else owns: refused; worth telling the operator.
    Stolen {
        /// Network.
        vni: Vni,
        /// Address.
        mac: MacAddr,
        /// Where.
        port: PortSlot,
    },
}
