//! The fast path's state between two vectors of frames. Its two ways are told in `outbound.rs` and `inbound.rs`.
//!
//! Never reads a clock, opens a socket or waits: time and tables are arguments, what leaves goes through [`Egress`].

use crate::counters::Counters;
use crate::drops::DropReason;
use crate::seal::sealing::Limits;
use crate::slice::{Arena, Crossing, Sender};
use crate::tables::{ByIndex, Forwarding, Gate, Network, PeerSlot, Place, Port, PortSlot, SourceRule, WorkerEvent};
use crate::toobig;
use crate::traffic::{Pair, Traffic};
use crate::transport::Transport;
use crate::tunnel::Tunnel;
use crate::virtio::Offload;
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use violin_common::wire::ethernet::{Header, TAG_LEN};
use violin_common::wire::mesh::{LARGEST_PACKET, Probe};
use violin_common::{Instant, MacAddr, PortId, Vni};

/// Frames one port may have on hold.
pub const HOLD_FRAMES: usize = 512;
/// Bytes one port may have on hold.
pub const HOLD_BYTES: usize = 4 << 20;
/// Bytes put together before they are sent.
const ARENA_BYTES: usize = 1 << 20;
/// Shortest time between two [`WorkerEvent::Stolen`] of one address at one port, and between two looks for those told so long
/// ago.
const STOLEN_AGAIN: Duration = Duration::from_secs(1);

/// What became of a frame for a local port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivered {
    /// It was written.
    Written,
    /// It waits for the interface; whoever writes it later counts it.
    Waiting,
}

/// Where a worker puts what leaves it.
pub trait Egress {
    /// Writes one frame, given in parts, to a local port. The first part holds all of the frame's headers.
    fn deliver(
        &mut self,
        now: Instant,
        slot: PortSlot,
        port: &Port,
        offload: &Offload,
        parts: &[&[u8]],
    ) -> Result<Delivered, DropReason>;

    /// Largest layer-3 packet a gateway's foreign tunnel end takes; `None`: no limit known.
    fn path_mtu(&self, slot: PortSlot) -> Option<u16>;

    /// Hands datagrams to the underlay.
    fn send(&mut self, arena: &Arena);

    /// Tells the control side; `false` when there was no room.
    fn tell(&mut self, event: WorkerEvent) -> bool;
}

/// A frame as it was read from a port.
#[derive(Debug)]
pub struct Frame<'a> {
    /// What its `virtio_net_hdr` says; refused by name when that is not understood.
    pub offload: Result<Offload, DropReason>,
    /// The frame.
    pub bytes: &'a mut [u8],
}

#[derive(Debug)]
struct Held {
    id: PortId,
    bytes: usize,
    frames: VecDeque<(Offload, Vec<u8>)>,
}

/// A frame of the present vector that goes to a peer.
#[derive(Debug)]
pub(crate) struct Leaving {
    pub(crate) peer: PeerSlot,
    pub(crate) frame: usize,
    pub(crate) offload: Offload,
    pub(crate) transport: Option<Transport>,
}

/// The fast path. One thread, or one simulated host, has one.
#[derive(Debug)]
pub struct Worker {
    pub(crate) counters: Arc<Counters>,
    traffic: Arc<Traffic>,
    pub(crate) arena: Arena,
    pub(crate) leaving: Vec<Leaving>,
    pub(crate) seen: Vec<(Pair, u64, u64)>,
    /// By the session's index.
    pub(crate) tunnels: ByIndex<Tunnel>,
    pub(crate) limits: Limits,
    scratch: Vec<u8>,
    /// The segments of one super-frame that only this switch can cut.
    pub(crate) segments: Vec<u8>,
    held: HashMap<PortSlot, Held>,
    stolen: HashMap<(Vni, MacAddr, PortSlot), Instant>,
    swept: Instant,
}

impl Worker {
    /// A worker that counts into `counters` and `traffic`.
    pub fn new(counters: Arc<Counters>, traffic: Arc<Traffic>) -> Self {
        Self {
            counters,
            traffic,
            arena: Arena::default(),
            leaving: Vec::new(),
            seen: Vec::new(),
            tunnels: ByIndex::default(),
            limits: Limits::default(),
            scratch: Vec::new(),
            segments: Vec::new(),
            held: HashMap::new(),
            stolen: HashMap::new(),
            swept: Instant(0),
        }
    }

    /// The same with other limits to what one key seals.
    #[must_use]
    pub fn with_limits(self, limits: Limits) -> Self {
        Self { limits, ..self }
    }

    /// Takes a vector of frames from a port.
    pub fn outbound(
        &mut self,
        now: Instant,
        tables: &Forwarding,
        slot: PortSlot,
        frames: &mut [Frame<'_>],
        out: &mut dyn Egress,
    ) {
        let Some((port, network)) = port_of(tables, slot) else {
            return self.counters.drops.add(DropReason::NoNetwork, frames.len() as u64);
        };
        match port.gate {
            Gate::Open => {
                self.release(now, tables, slot, out);
                self.forward_out(now, tables, (slot, port, network), frames, out);
            }
            Gate::Hold => frames.iter().for_each(|frame| self.hold(slot, port, frame)),
            Gate::Closed => self.counters.drops.add(DropReason::GateClosed, frames.len() as u64),
        }
    }

    /// Looks at sessions and gates after new tables were published: what belongs to a session that is no more goes with it, what
    /// is on hold leaves, or is refused.
    pub fn tables_changed(&mut self, now: Instant, tables: &Forwarding, out: &mut dyn Egress) {
        self.tunnels.retain(|index, tunnel| tables.by_receiver.get(index).is_some_and(|(_, session)| tunnel.is_of(session)));
        let slots: Vec<_> = self.held.keys().copied().collect();
        for slot in slots {
            let gate = port_of(tables, slot).filter(|(port, _)| self.held.get(&slot).is_some_and(|held| held.id == port.id));
            match gate.map(|(port, _)| port.gate) {
                Some(Gate::Open) => self.release(now, tables, slot, out),
                Some(Gate::Hold) => (),
                Some(Gate::Closed) | None => {
                    let count = self.held.remove(&slot).map_or(0, |held| held.frames.len());
                    self.counters.drops.add(DropReason::GateClosed, count as u64);
                }
            }
        }
    }

    /// Whether time asks for something soon: else [`Self::tick`] may wait for some seconds.
    pub fn is_restless(&self) -> bool {
        !self.stolen.is_empty() || self.tunnels.values().any(Tunnel::is_restless)
    }

    /// Does what time asks for: gives up unfinished frames and old keys, tells again what was not heard. To be called some times a
    /// second.
    pub fn tick(&mut self, now: Instant, out: &mut dyn Egress) {
        for (&session, tunnel) in &mut self.tunnels {
            self.counters.drops.add(DropReason::ReassemblyTimeout, tunnel.tick(now) as u64);
            tunnel.report_epochs(|queue, epoch| out.tell(WorkerEvent::Opened { session, queue, epoch }));
        }
        if now.since(self.swept) >= STOLEN_AGAIN {
            self.swept = now;
            self.stolen.retain(|_, told| now.since(*told) < STOLEN_AGAIN);
        }
    }

    fn hold(&mut self, slot: PortSlot, port: &Port, frame: &Frame<'_>) {
        let Ok(offload) = frame.offload else { return self.counters.drops.count(DropReason::Segmentation) };
        let held = self.held.entry(slot).or_insert_with(|| Held { id: port.id, bytes: 0, frames: VecDeque::new() });
        if held.id != port.id {
            self.counters.drops.add(DropReason::GateClosed, held.frames.len() as u64);
            *held = Held { id: port.id, bytes: 0, frames: VecDeque::new() };
        }
        if held.frames.len() >= HOLD_FRAMES || held.bytes + frame.bytes.len() > HOLD_BYTES {
            return self.counters.drops.count(DropReason::HoldFull);
        }
        held.bytes += frame.bytes.len();
        held.frames.push_back((offload, frame.bytes.to_vec()));
    }

    /// Lets go what the port said while its gate was on hold, in order.
    fn release(&mut self, now: Instant, tables: &Forwarding, slot: PortSlot, out: &mut dyn Egress) {
        if self.held.is_empty() {
            return;
        }
        let Some(held) = self.held.remove(&slot) else { return };
        let Some((port, network)) = port_of(tables, slot).filter(|(port, _)| port.id == held.id) else {
            return self.counters.drops.add(DropReason::GateClosed, held.frames.len() as u64);
        };
        let mut frames = held.frames;
        let mut frames: Vec<_> =
            frames.iter_mut().map(|(offload, bytes)| Frame { offload: Ok(*offload), bytes: bytes.as_mut_slice() }).collect();
        self.forward_out(now, tables, (slot, port, network), &mut frames, out);
    }

    /// Hands a frame to a local port, or answers for a gateway that cannot take it.
    pub(crate) fn hand_over(
        &mut self,
        now: Instant,
        tables: &Forwarding,
        slot: PortSlot,
        passing: &Passing<'_>,
        out: &mut dyn Egress,
    ) {
        let Some((port, network)) = port_of(tables, slot).filter(|(port, _)| port.vni == passing.vni) else {
            return self.counters.drops.count(DropReason::Gone);
        };
        if port.source == SourceRule::Only(passing.header.source) {
            // A VM's own broadcast that was still on its way when the VM arrived here.
            return self.counters.drops.count(DropReason::Hairpin);
        }
        if port.gateway
            && let Some(limit) = out.path_mtu(slot)
            && passing.packet_len() > usize::from(limit)
        {
            self.counters.drops.count(DropReason::GatewayTooBig);
            // An answer speaks in the name of the destination, and whoever hears it learns that this is where it lives.
            if !passing.flooded
                && let Some(answer) = toobig::answer(passing.parts, &passing.header, limit.min(network.mtu))
            {
                self.answer(now, tables, passing, &answer, out);
            }
            return;
        }
        match out.deliver(now, slot, port, &passing.offload, passing.parts) {
            Ok(Delivered::Written) => port.traffic.written(now, passing.parts.iter().map(|part| part.len() as u64).sum()),
            Ok(Delivered::Waiting) => (),
            Err(reason) => self.counters.drops.count(reason),
        }
    }

    /// Sends a frame made here back to where the frame it answers came from.
    fn answer(&mut self, now: Instant, tables: &Forwarding, passing: &Passing<'_>, answer: &[u8], out: &mut dyn Egress) {
        self.counters.too_big_answers.fetch_add(1, Relaxed);
        match passing.from {
            Place::Port(slot) => {
                if let Some((port, _)) = port_of(tables, slot)
                    && let Err(reason) = out.deliver(now, slot, port, &Offload::default(), &[answer])
                {
                    self.counters.drops.count(reason);
                }
            }
            Place::Peer(slot) => {
                let crossing =
                    Crossing { vni: passing.vni, marks: 0, offload: Offload::default(), transport: None, frame: answer };
                self.cross(now, tables, slot, &crossing, out);
            }
            Place::Nowhere => (),
        }
    }

    /// Puts a frame on its way to a peer that carries its network.
    pub(crate) fn cross(
        &mut self,
        now: Instant,
        tables: &Forwarding,
        slot: PeerSlot,
        crossing: &Crossing<'_>,
        out: &mut dyn Egress,
    ) {
        let peer = tables.peers.get(usize::from(slot.0)).and_then(Option::as_ref);
        let Some(peer) = peer.filter(|peer| peer.networks.contains(&crossing.vni)) else {
            return self.counters.drops.count(DropReason::Gone);
        };
        let limits = self.limits;
        let tunnel = self.tunnels.entry(peer.session.index).or_insert_with(|| Tunnel::new(now, &peer.session, limits));
        let mut sender = Sender { now, slot, peer, tunnel, arena: &mut self.arena };
        if let Err(reason) = sender.cross(crossing, &mut self.scratch) {
            self.counters.drops.count(reason);
        }
        if self.arena.bytes().len() >= ARENA_BYTES {
            self.depart(tables, out);
        }
    }

    /// Sends a probe in a session, to wherever it is to go. Nobody waits for it: what asked will ask again.
    pub fn challenge(
        &mut self,
        now: Instant,
        tables: &Forwarding,
        session: u32,
        (to, token): (SocketAddr, u64),
        out: &mut dyn Egress,
    ) {
        if let Err(reason) = self.probe(now, tables, session, to, Probe::Challenge(token)) {
            self.counters.drops.count(reason);
        }
        self.depart(tables, out);
    }

    pub(crate) fn probe(
        &mut self,
        now: Instant,
        tables: &Forwarding,
        index: u32,
        to: SocketAddr,
        probe: Probe,
    ) -> Result<(), DropReason> {
        let (slot, session) = tables.by_receiver.get(&index).ok_or(DropReason::UnknownReceiver)?;
        let peer = tables.peers.get(usize::from(slot.0)).and_then(Option::as_ref).ok_or(DropReason::UnknownReceiver)?;
        let limits = self.limits;
        let tunnel = self.tunnels.entry(index).or_insert_with(|| Tunnel::new(now, session, limits));
        Sender { now, slot: *slot, peer, tunnel, arena: &mut self.arena }.probe(to, probe)
    }

    /// Hands what was put together to the underlay.
    pub(crate) fn depart(&mut self, tables: &Forwarding, out: &mut dyn Egress) {
        if self.arena.bursts().is_empty() {
            return;
        }
        for burst in self.arena.bursts() {
            if let Some(Some(peer)) = tables.peers.get(usize::from(burst.peer.0)) {
                peer.traffic.sent(burst.count as u64, (burst.end - burst.start) as u64);
            }
        }
        out.send(&self.arena);
        self.arena.clear();
    }

    pub(crate) fn tell(&self, event: WorkerEvent, out: &mut dyn Egress) -> bool {
        let told = out.tell(event);
        if !told {
            self.counters.events_lost.fetch_add(1, Relaxed);
        }
        told
    }

    /// Reports a stolen MAC, once a second at most.
    pub(crate) fn report_stolen(&mut self, now: Instant, vni: Vni, mac: MacAddr, port: PortSlot, out: &mut dyn Egress) {
        if self.stolen.len() >= 256 || self.stolen.get(&(vni, mac, port)).is_some_and(|told| now.since(*told) < STOLEN_AGAIN) {
            return;
        }
        self.stolen.insert((vni, mac, port), now);
        let _ = self.tell(WorkerEvent::Stolen { vni, mac, port }, out);
    }

    pub(crate) fn note_traffic(&mut self) {
        self.traffic.add(&mut self.seen);
    }
}

/// A frame on its way through this switch, in parts; the first part holds all headers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Passing<'a> {
    pub(crate) vni: Vni,
    pub(crate) from: Place,
    pub(crate) header: Header,
    pub(crate) offload: Offload,
    pub(crate) transport: Option<Transport>,
    pub(crate) parts: &'a [&'a [u8]],
    /// Nobody knows where its destination is.
    pub(crate) flooded: bool,
}

impl Passing<'_> {
    /// Length of the layer-3 packet, or of one segment of a super-frame.
    pub(crate) fn packet_len(&self) -> usize {
        packet_len(&self.header, &self.offload, self.parts.iter().map(|part| part.len()).sum())
    }
}

/// Length of the layer-3 packet in a frame of `len` bytes, or of one of its segments.
pub(crate) fn packet_len(header: &Header, offload: &Offload, len: usize) -> usize {
    let len = if offload.is_super() { usize::from(offload.header_len) + usize::from(offload.segment_size) } else { len };
    len.saturating_sub(header.payload)
}

/// Largest frame that is not a super-frame: two tags are not part of the packet.
pub(crate) const fn largest_frame() -> usize {
    LARGEST_PACKET as usize + violin_common::wire::ethernet::HEADER_LEN + 2 * TAG_LEN
}

pub(crate) fn port_of(tables: &Forwarding, slot: PortSlot) -> Option<(&Port, &Network)> {
    let port = tables.ports.get(usize::from(slot.0))?.as_ref()?;
    Some((port, tables.networks.get(&port.vni)?))
}
