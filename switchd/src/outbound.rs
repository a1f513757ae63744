//! A frame's way out: port → parse → admit → settle → learn → lookup → local ports and peers → slices.
//!
//! The gate was asked before (`worker.rs`). Frames to peers are only noted while the vector is walked and sliced afterwards,
//! peer by peer, so that what goes to one peer lies side by side and leaves in few calls.

use crate::drops::DropReason;
use crate::fdb::Learned;
use crate::nested;
use crate::slice::Crossing;
use crate::tables::{Forwarding, Network, PeerSlot, Place, Port, PortSlot, SourceRule, WorkerEvent};
use crate::toobig;
use crate::transport::settle;
use crate::virtio::Offload;
use crate::worker::{Egress, Frame, Leaving, Passing, Worker, packet_len};
use std::sync::atomic::Ordering::Relaxed;
use violin_common::wire::ethernet::Header;
use violin_common::wire::mesh::LARGEST_PACKET;
use violin_common::{Instant, MacAddr, Vni};

impl Worker {
    pub(crate) fn forward_out(
        &mut self,
        now: Instant,
        tables: &Forwarding,
        from: (PortSlot, &Port, &Network),
        frames: &mut [Frame<'_>],
        out: &mut dyn Egress,
    ) {
        from.1.traffic.taken(frames.len() as u64, frames.iter().map(|frame| frame.bytes.len() as u64).sum());
        let mut rest = frames;
        while let Some((at, nested, size)) = rest.iter().enumerate().find_map(|(at, frame)| {
            let offload = frame.offload.ok()?;
            Some((at, nested::find(frame.bytes, &offload)?, offload.segment_size))
        }) {
            // Frames leave in the order they came.
            let (before, behind) = rest.split_at_mut(at);
            self.forward_plain(now, tables, from, before, out);
            let Some((frame, behind)) = behind.split_first_mut() else { return };
            let mut segments = std::mem::take(&mut self.segments);
            let len = nested.cut(frame.bytes, size, &mut segments);
            let plain = |bytes| Frame { offload: Ok(Offload::default()), bytes };
            let mut cut: Vec<_> = segments.chunks_mut(len.max(1)).map(plain).collect();
            self.counters.software_segmentations.fetch_add(1, Relaxed);
            self.forward_plain(now, tables, from, &mut cut, out);
            self.segments = segments;
            rest = behind;
        }
        self.forward_plain(now, tables, from, rest, out);
    }

    /// The same of frames that cross as they are.
    fn forward_plain(
        &mut self,
        now: Instant,
        tables: &Forwarding,
        from: (PortSlot, &Port, &Network),
        frames: &mut [Frame<'_>],
        out: &mut dyn Egress,
    ) {
        for (index, frame) in frames.iter_mut().enumerate() {
            if let Err(reason) = self.frame_out(now, tables, from, index, frame, out) {
                self.counters.drops.count(reason);
            }
        }
        self.note_traffic();
        let mut leaving = std::mem::take(&mut self.leaving);
        leaving.sort_by_key(|leaving| leaving.peer);
        for Leaving { peer, frame, offload, transport } in leaving.drain(..) {
            let crossing = Crossing { vni: from.1.vni, marks: 0, offload, transport, frame: frames[frame].bytes };
            self.cross(now, tables, peer, &crossing, out);
        }
        self.leaving = leaving;
        self.depart(tables, out);
    }

    fn frame_out(
        &mut self,
        now: Instant,
        tables: &Forwarding,
        (slot, port, network): (PortSlot, &Port, &Network),
        index: usize,
        frame: &mut Frame<'_>,
        out: &mut dyn Egress,
    ) -> Result<(), DropReason> {
        let header = Header::parse(frame.bytes).map_err(|_| DropReason::Runt)?;
        let source = header.source;
        if source.is_group() || source == MacAddr([0; 6]) {
            return Err(DropReason::BadSource);
        }
        if header.destination.is_link_local() {
            return Err(DropReason::LinkLocal);
        }
        self.admit_source(now, (slot, port, network), source, out)?;
        let wanted = frame.offload?;
        let (offload, transport) = settle(frame.bytes, &header, wanted)?;
        if wanted.checksum.is_some() && offload.checksum.is_none() {
            self.counters.software_checksums.fetch_add(1, Relaxed);
        }
        let packet = packet_len(&header, &offload, frame.bytes.len());
        let oversize = packet > usize::from(network.mtu);
        if oversize && (port.gateway || packet > usize::from(LARGEST_PACKET)) {
            return Err(self.refuse_size(now, (slot, port, network), &header, frame.bytes, out));
        }
        if port.source == SourceRule::Learn {
            self.learn(now, (slot, port, network), &header, out);
        }
        let bytes = frame.bytes.len() as u64;
        let to = if header.destination.is_group() { MacAddr::BROADCAST } else { header.destination };
        self.note_pair((port.vni, source, to), bytes);

        let parts: [&[u8]; 1] = [frame.bytes];
        let passing =
            Passing { vni: port.vni, from: Place::Port(slot), header, offload, transport, parts: &parts, flooded: false };
        let leaving = |peer| Leaving { peer, frame: index, offload, transport };
        match place(now, tables, (port.vni, network), &header) {
            Some(Place::Port(to)) if to == slot => return Err(DropReason::Hairpin),
            Some(Place::Port(to)) => self.hand_over(now, tables, to, &passing, out),
            Some(Place::Peer(peer)) => self.leaving.push(leaving(peer)),
            Some(Place::Nowhere) => return Err(DropReason::OwnerUnreachable),
            None => {
                self.counters.floods.fetch_add(1, Relaxed);
                let passing = Passing { flooded: true, ..passing };
                for &to in network.ports.iter().filter(|&&to| to != slot) {
                    self.hand_over(now, tables, to, &passing, out);
                }
                self.leaving.extend(network.peers.iter().map(|&peer| leaving(peer)));
            }
        }
        if oversize {
            self.note_oversize((slot, port), packet, out);
        }
        Ok(())
    }

    /// A black hole would be worse than a second datagram: the station is served, and the operator told once.
    fn note_oversize(&self, (slot, port): (PortSlot, &Port), packet: usize, out: &mut dyn Egress) {
        self.counters.oversize_carried.fetch_add(1, Relaxed);
        let len = u16::try_from(packet).unwrap_or(u16::MAX);
        port.traffic.oversized(|| self.tell(WorkerEvent::Oversize { port: slot, len }, out));
    }

    fn admit_source(
        &mut self,
        now: Instant,
        (slot, port, network): (PortSlot, &Port, &Network),
        source: MacAddr,
        out: &mut dyn Egress,
    ) -> Result<(), DropReason> {
        match port.source {
            SourceRule::Only(mac) if mac == source => Ok(()),
            _ if network.owned.contains_key(&source) => {
                self.report_stolen(now, port.vni, source, slot, out);
                Err(DropReason::StolenMac)
            }
            SourceRule::Only(_) => Err(DropReason::ForeignSource),
            SourceRule::Learn => Ok(()),
        }
    }

    fn learn(&self, now: Instant, (slot, port, network): (PortSlot, &Port, &Network), header: &Header, out: &mut dyn Egress) {
        match network.fdb.learn(now, header.outer_vid, header.source, Place::Port(slot)) {
            Learned::New | Learned::Moved { .. } => {
                self.counters.learned.fetch_add(1, Relaxed);
                let event = WorkerEvent::Learned { vni: port.vni, vid: header.outer_vid, mac: header.source, port: slot };
                let _ = self.tell(event, out);
            }
            Learned::Refreshed | Learned::Flapping | Learned::Refused => (),
        }
    }

    /// A foreign tunnel end is told what fits; any other station learns it from its interface's MTU.
    fn refuse_size(
        &self,
        now: Instant,
        (slot, port, network): (PortSlot, &Port, &Network),
        header: &Header,
        frame: &[u8],
        out: &mut dyn Egress,
    ) -> DropReason {
        if port.gateway
            && let Some(answer) = toobig::answer(&[frame], header, network.mtu)
            && out.deliver(now, slot, port, &Offload::default(), &[&answer]).is_ok()
        {
            self.counters.too_big_answers.fetch_add(1, Relaxed);
        }
        DropReason::TooBig
    }

    fn note_pair(&mut self, pair: (Vni, MacAddr, MacAddr), bytes: u64) {
        match self.seen.last_mut() {
            Some((last, frames, total)) if *last == pair => {
                *frames += 1;
                *total += bytes;
            }
            _ => self.seen.push((pair, 1, bytes)),
        }
    }
}

/// Where a frame goes; `None`: to all. Owned MACs win over learned ones.
fn place(now: Instant, tables: &Forwarding, (vni, network): (Vni, &Network), header: &Header) -> Option<Place> {
    if header.destination.is_group() {
        return None;
    }
    if let Some(owned) = network.owned.get(&header.destination) {
        return Some(owned.at);
    }
    let carries = |peer: &PeerSlot| {
        let peer = tables.peers.get(usize::from(peer.0)).and_then(Option::as_ref);
        peer.is_some_and(|peer| peer.networks.contains(&vni))
    };
    // What was learned at a peer that carries the network no more is worth nothing.
    network.fdb.lookup(now, header.outer_vid, header.destination, network.ageing).filter(|place| match place {
        Place::Peer(peer) => carries(peer),
        _ => true,
    })
}
