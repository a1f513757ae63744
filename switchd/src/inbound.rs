//! A datagram's way in: session by index → open → check the network → parse → merge → learn → lookup → deliver.
//!
//! Consecutive slices of one super-frame become one super-frame again without being copied: the parts handed to a port
//! point into the receive buffers. A gap, or the end of what was received, ends the super-frame; what is there leaves as a
//! shorter one with its headers made to fit, so a lost datagram costs one segment and nothing waits.

use crate::drops::DropReason;
use crate::fdb::Learned;
use crate::reassembly::MAX_FRAME;
use crate::seal::session::Session;
use crate::slice::Crossing;
use crate::tables::{Forwarding, Network, Peer, PeerSlot, Place, WorkerEvent};
use crate::transport::{MAX_HEADERS, Part, Transport};
use crate::tunnel::Tunnel;
use crate::virtio::Offload;
use crate::worker::{Egress, Passing, Worker, largest_frame};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use violin_common::wire::ethernet::Header;
use violin_common::wire::mesh::{Kind, LARGEST_PACKET, Outer, Probe, SLICE_LEN, Segmentation, Slice, mark};
use violin_common::{Instant, MacAddr};

/// Parts one write can take: IOV_MAX is 1024, and a port adds headers of its own.
const MAX_PARTS: usize = 1000;

/// A super-frame whose slices are still coming in; lives as long as the receive buffers it points into.
#[derive(Debug)]
struct Merge<'b> {
    peer: PeerSlot,
    first: Slice,
    header: Header,
    transport: Transport,
    /// Headers, then one payload after another.
    parts: Vec<&'b [u8]>,
    /// Where the next slice's payload belongs.
    next: u32,
}

/// The super-frame in the making while a vector of datagrams is walked. To be given to [`Worker::inbound_end`].
#[derive(Debug, Default)]
pub struct Merging<'b>(Option<Merge<'b>>);

impl<'b> Merge<'b> {
    fn start(peer: PeerSlot, slice: Slice, bytes: &'b [u8]) -> Result<Self, DropReason> {
        let header = Header::parse(bytes).map_err(|_| DropReason::Runt)?;
        let transport = Transport::find(bytes, &header)
            .filter(|t| t.is(slice.segmentation) && t.payload <= MAX_HEADERS)
            .ok_or(DropReason::BadSlice)?;
        let (headers, _) = bytes.split_at_checked(transport.payload).ok_or(DropReason::BadSlice)?;
        let before = (slice.offset as usize).checked_sub(transport.payload).ok_or(DropReason::BadSlice)?;
        if before % usize::from(slice.segment_size.max(1)) != 0 || slice.total as usize > MAX_FRAME {
            return Err(DropReason::BadSlice);
        }
        let mut merge = Self { peer, first: slice, header, transport, parts: vec![headers], next: slice.offset };
        if merge.extend(&slice, bytes) { Ok(merge) } else { Err(DropReason::BadSlice) }
    }

    /// Takes the slice if it is the next one of this super-frame and there is room for it.
    fn extend(&mut self, slice: &Slice, bytes: &'b [u8]) -> bool {
        if self.parts.len() >= MAX_PARTS || *slice != (Slice { offset: self.next, ..self.first }) {
            return false;
        }
        let Some((_, piece)) = bytes.split_at_checked(self.transport.payload) else { return false };
        // Whole segments, but for the last of all.
        let whole = piece.len().is_multiple_of(usize::from(slice.segment_size));
        let end = self.next as usize + piece.len();
        if piece.is_empty() || end > slice.total as usize || !(whole || end == slice.total as usize) {
            return false;
        }
        self.parts.push(piece);
        self.next = end as u32;
        true
    }

    fn is_complete(&self) -> bool {
        self.next == self.first.total
    }
}

/// How a datagram came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival {
    /// Who sent it.
    pub from: SocketAddr,
    /// Through which interface, by its number; 0: not known.
    pub interface: u32,
}

impl Worker {
    /// Takes one datagram that is not QUIC's; it is opened in place. `merging` carries super-frames over from one datagram to
    /// the next.
    pub fn inbound<'b>(
        &mut self,
        now: Instant,
        tables: &Forwarding,
        arrival: Arrival,
        datagram: &'b mut [u8],
        merging: &mut Merging<'b>,
        out: &mut dyn Egress,
    ) {
        if let Err(reason) = self.datagram_in(now, tables, arrival, datagram, merging, out) {
            self.counters.drops.count(reason);
        }
    }

    /// Ends a vector of datagrams: nothing of it waits for the next.
    pub fn inbound_end(&mut self, now: Instant, tables: &Forwarding, merging: Merging<'_>, out: &mut dyn Egress) {
        self.emerge(now, tables, merging.0, out);
        self.depart(tables, out);
    }

    /// Opens a datagram: nothing in it is believed, nor counted as its sender's, before that.
    fn opened<'b>(
        &mut self,
        now: Instant,
        (index, session, peer): (u32, &Arc<Session>, &Peer),
        arrival: Arrival,
        (outer, datagram): (&Outer, &'b mut [u8]),
        out: &mut dyn Egress,
    ) -> Result<&'b mut [u8], DropReason> {
        let (len, same_address, limits) = (datagram.len() as u64, peer.address == arrival.from, self.limits);
        let tunnel = self.tunnels.entry(index).or_insert_with(|| Tunnel::new(now, session, limits));
        let body = tunnel.open(now, outer, (same_address, arrival.interface), datagram)?;
        peer.traffic.admitted(1, len);
        if tunnel.has_news(outer.queue) {
            tunnel.report_epochs(|queue, epoch| out.tell(WorkerEvent::Opened { session: index, queue, epoch }));
        }
        if !same_address && tunnel.may_report_roaming(now) {
            let _ = out.tell(WorkerEvent::Roamed { session: index, from: arrival.from });
        }
        Ok(body)
    }

    fn datagram_in<'b>(
        &mut self,
        now: Instant,
        tables: &Forwarding,
        arrival: Arrival,
        datagram: &'b mut [u8],
        merging: &mut Merging<'b>,
        out: &mut dyn Egress,
    ) -> Result<(), DropReason> {
        let outer = Outer::parse(datagram).map_err(|_| DropReason::BadDatagram)?;
        let &(slot, ref session) = tables.by_receiver.get(&outer.receiver).ok_or(DropReason::UnknownReceiver)?;
        let peer = tables.peers.get(usize::from(slot.0)).and_then(Option::as_ref).ok_or(DropReason::UnknownReceiver)?;
        let body: &'b [u8] = self.opened(now, (outer.receiver, session, peer), arrival, (&outer, datagram), out)?;
        if outer.kind == Kind::Probe {
            return self.probe_in(now, tables, (outer.receiver, arrival.from), body, out);
        }
        let slice = Slice::parse(body).map_err(|_| DropReason::BadSlice)?;
        if !tables.networks.contains_key(&slice.vni) || !peer.networks.contains(&slice.vni) {
            return Err(DropReason::ForeignNetwork);
        }
        let bytes = body.get(SLICE_LEN..).ok_or(DropReason::BadSlice)?;

        if slice.segmentation != Segmentation::None {
            let extended = merging.0.as_mut().is_some_and(|merge| merge.peer == slot && merge.extend(&slice, bytes));
            if !extended {
                self.emerge(now, tables, merging.0.take(), out);
                merging.0 = Some(Merge::start(slot, slice, bytes)?);
            }
            if merging.0.as_ref().is_some_and(Merge::is_complete) {
                self.emerge(now, tables, merging.0.take(), out);
            }
            return Ok(());
        }
        self.emerge(now, tables, merging.0.take(), out);
        if slice.total as usize > largest_frame() {
            return Err(DropReason::TooBig);
        }
        if slice.offset == 0 && slice.total as usize == bytes.len() {
            return self.ordinary_in(now, tables, slot, &slice, bytes, out);
        }
        let tunnel = self.tunnels.get_mut(&outer.receiver).ok_or(DropReason::UnknownReceiver)?;
        let drops = &self.counters.drops;
        match tunnel.reassembly.take(now, outer.queue, &slice, bytes, |reason| drops.count(reason))? {
            Some(frame) => self.ordinary_in(now, tables, slot, &slice, &frame, out),
            None => Ok(()),
        }
    }

    /// A challenge is answered on the way it came; an answer is the control side's to judge.
    fn probe_in(
        &mut self,
        now: Instant,
        tables: &Forwarding,
        (session, from): (u32, SocketAddr),
        body: &[u8],
        out: &mut dyn Egress,
    ) -> Result<(), DropReason> {
        match Probe::parse(body).map_err(|_| DropReason::BadDatagram)? {
            Probe::Challenge(token) => self.probe(now, tables, session, from, Probe::Answer(token)),
            Probe::Answer(token) => {
                let _ = self.tell(WorkerEvent::Answered { session, token, from }, out);
                Ok(())
            }
        }
    }

    fn ordinary_in(
        &mut self,
        now: Instant,
        tables: &Forwarding,
        peer: PeerSlot,
        slice: &Slice,
        frame: &[u8],
        out: &mut dyn Egress,
    ) -> Result<(), DropReason> {
        let header = Header::parse(frame).map_err(|_| DropReason::Runt)?;
        let mut offload = Offload::default();
        let mut transport = None;
        if slice.marks & mark::PARTIAL_CHECKSUM != 0 {
            let found = Transport::find(frame, &header).ok_or(DropReason::Checksum)?;
            offload.checksum = Some(found.checksum());
            transport = Some(found);
        }
        let parts: [&[u8]; 1] = [frame];
        let passing =
            Passing { vni: slice.vni, from: Place::Peer(peer), header, offload, transport, parts: &parts, flooded: false };
        self.forward_in(now, tables, peer, slice.marks, &passing, out)
    }

    /// Lets a super-frame go as far as it has come.
    fn emerge(&mut self, now: Instant, tables: &Forwarding, merge: Option<Merge<'_>>, out: &mut dyn Egress) {
        let Some(mut merge) = merge else { return };
        let (first, transport) = (merge.first, merge.transport);
        let mut headers = [0; MAX_HEADERS];
        let whole = first.offset as usize == transport.payload && merge.is_complete();
        if let (false, Some(headers), Some(original)) = (whole, headers.get_mut(..transport.payload), merge.parts.first()) {
            headers.copy_from_slice(original);
            let start = first.offset as usize - transport.payload;
            let part = Part { start, len: (merge.next - first.offset) as usize, last: merge.is_complete() };
            transport.cut(headers, part, first.segment_size);
        }
        if !whole {
            merge.parts[0] = &headers[..transport.payload];
        }
        let several = merge.next - first.offset > u32::from(first.segment_size);
        let offload = Offload {
            checksum: Some(transport.checksum()),
            segmentation: if several { first.segmentation } else { Segmentation::None },
            segment_size: if several { first.segment_size } else { 0 },
            ecn: several && first.marks & mark::ECN != 0,
            header_len: transport.payload as u16,
        };
        let (vni, from, header) = (first.vni, Place::Peer(merge.peer), merge.header);
        let passing = Passing { vni, from, header, offload, transport: Some(transport), parts: &merge.parts, flooded: false };
        if let Err(reason) = self.forward_in(now, tables, merge.peer, first.marks, &passing, out) {
            self.counters.drops.count(reason);
        }
    }

    /// Decides where a frame from a tunnel goes: local ports only, but for a MAC that has just moved.
    fn forward_in(
        &mut self,
        now: Instant,
        tables: &Forwarding,
        from: PeerSlot,
        marks: u8,
        passing: &Passing<'_>,
        out: &mut dyn Egress,
    ) -> Result<(), DropReason> {
        let network = tables.networks.get(&passing.vni).ok_or(DropReason::ForeignNetwork)?;
        let Header { source, destination, .. } = passing.header;
        if source.is_group() || source == MacAddr([0; 6]) {
            return Err(DropReason::BadSource);
        }
        if destination.is_link_local() {
            return Err(DropReason::LinkLocal);
        }
        if passing.packet_len() > usize::from(LARGEST_PACKET) {
            return Err(DropReason::TooBig);
        }
        let moved = marks & mark::MOVED != 0;
        if !moved && !network.owned.contains_key(&source) {
            self.learn_in(now, network, from, &passing.header);
        }
        if destination.is_group() {
            self.flood_in(now, tables, network, passing, out);
            return Ok(());
        }
        if let Some(owned) = network.owned.get(&destination) {
            match (owned.arriving, owned.at) {
                (Some(port), _) | (None, Place::Port(port)) => self.hand_over(now, tables, port, passing, out),
                (None, Place::Peer(peer)) if owned.forward_late && !moved => {
                    self.counters.late_forwards.fetch_add(1, Relaxed);
                    let frame = passing.parts.concat();
                    let Passing { vni, offload, transport, .. } = *passing;
                    let crossing = Crossing { vni, marks: mark::MOVED, offload, transport, frame: &frame };
                    self.cross(now, tables, peer, &crossing, out);
                }
                (None, Place::Peer(_)) => return Err(DropReason::SplitHorizon),
                (None, Place::Nowhere) => return Err(DropReason::OwnerUnreachable),
            }
            return Ok(());
        }
        match network.fdb.lookup(now, passing.header.outer_vid, destination, network.ageing) {
            Some(Place::Port(port)) => self.hand_over(now, tables, port, passing, out),
            Some(_) => return Err(DropReason::SplitHorizon),
            None => self.flood_in(now, tables, network, passing, out),
        }
        Ok(())
    }

    fn learn_in(&self, now: Instant, network: &Network, from: PeerSlot, header: &Header) {
        if let Learned::New | Learned::Moved { .. } = network.fdb.learn(now, header.outer_vid, header.source, Place::Peer(from)) {
            self.counters.learned.fetch_add(1, Relaxed);
        }
    }

    fn flood_in(&mut self, now: Instant, tables: &Forwarding, network: &Network, passing: &Passing<'_>, out: &mut dyn Egress) {
        let passing = Passing { flooded: true, ..*passing };
        for &port in &network.ports {
            self.hand_over(now, tables, port, &passing, out);
        }
    }
}
