//! Frames into slices, slices into bursts: everything that goes to the underlay is put together here.
//!
//! The arena is one buffer, reused; a burst is a run of datagrams in it that one system call can send (UDP_SEGMENT): one
//! receiver, one size, only the last may be shorter.

use crate::tables::{Peer, PeerSlot};
use crate::transport::{self, Transport};
use crate::virtio::Offload;
use std::net::{IpAddr, SocketAddr};
use violin_common::Vni;
use violin_common::wire::mesh::{Kind, OUTER_LEN, OVERHEAD, Outer, SLICE_LEN, Slice, mark};

/// Datagrams in one burst. Source: UDP_MAX_SEGMENTS of older kernels.
pub const MAX_SEGMENTS: usize = 64;
/// Payload a TCP segment is cut down to at least, in bytes; below it more headers than bytes would cross.
const SMALLEST_CUT: u16 = 256;
/// Bytes in one burst: the largest UDP payload over IPv4.
pub const MAX_BURST: usize = 65_507;

/// Datagrams that leave in one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Burst {
    /// Where they go.
    pub to: SocketAddr,
    /// Which of our addresses they leave from; none: the kernel chooses.
    pub from: Option<IpAddr>,
    /// Whose they are.
    pub peer: PeerSlot,
    /// First byte in the arena.
    pub start: usize,
    /// Behind the last byte.
    pub end: usize,
    /// Size of all but the last.
    pub segment: usize,
    /// How many.
    pub count: usize,
}

/// Datagrams to send.
#[derive(Debug, Default)]
pub struct Arena {
    bytes: Vec<u8>,
    bursts: Vec<Burst>,
}

impl Arena {
    /// The buffer bursts point into.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// What is to be sent, in order.
    pub fn bursts(&self) -> &[Burst] {
        &self.bursts
    }

    /// Makes room for the next vector.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.bursts.clear();
    }

    /// Appends one datagram. This is where a body is sealed while it is copied; with AEAD *none* it is copied as it is.
    fn datagram(&mut self, (slot, peer): (PeerSlot, &Peer), outer: &Outer, slice: &Slice, parts: [&[u8]; 2]) {
        let start = self.bytes.len();
        let mut head = [0; OVERHEAD];
        head[..OUTER_LEN].copy_from_slice(&outer.emit());
        head[OUTER_LEN..OUTER_LEN + SLICE_LEN].copy_from_slice(&slice.emit());
        self.bytes.extend_from_slice(&head);
        self.bytes.extend_from_slice(parts[0]);
        self.bytes.extend_from_slice(parts[1]);
        let end = self.bytes.len();
        if let Some(last) = self.bursts.last_mut()
            && last.peer == slot
            && last.to == peer.address
            && last.from == peer.ours
            && last.end - last.start == last.segment * last.count
            && end - start <= last.segment
            && last.count < MAX_SEGMENTS
            && end - last.start <= MAX_BURST
        {
            last.end = end;
            last.count += 1;
            return;
        }
        let (to, from) = (peer.address, peer.ours);
        self.bursts.push(Burst { to, from, peer: slot, start, end, segment: end - start, count: 1 });
    }
}

/// What counts up on the way to one peer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sender {
    receiver: u32,
    packet_number: u64,
    frame_id: u32,
}

/// A frame that was settled (see [`transport::settle`]) and is to cross.
#[derive(Debug, Clone, Copy)]
pub struct Crossing<'a> {
    /// Its network.
    pub vni: Vni,
    /// [`mark::MOVED`] or 0; the others are worked out.
    pub marks: u8,
    /// What is left to do to it.
    pub offload: Offload,
    /// Where its transport header is; always there for a super-frame.
    pub transport: Option<Transport>,
    /// The frame.
    pub frame: &'a [u8],
}

impl Sender {
    fn outer(&mut self, peer: &Peer) -> Outer {
        if self.receiver != peer.receiver {
            // A new session of that peer: its numbers start anew.
            *self = Self { receiver: peer.receiver, packet_number: 0, frame_id: self.frame_id };
        }
        self.packet_number += 1;
        Outer { kind: Kind::Data, key_epoch: 0, queue: 0, receiver: peer.receiver, packet_number: self.packet_number }
    }

    /// Puts a frame into the arena as as many datagrams as the path needs.
    ///
    /// A super-frame is cut at its segments. Where those do not fit a datagram, as those of a station with a larger MTU than
    /// its network's, TCP's become smaller, as the kernel does it to make room for a tunnel's headers
    /// (skb_decrease_gso_size): a stream has no boundaries, and the super-frame stays one. UDP's datagrams do have them: each
    /// crosses as an ordinary frame, in slices.
    pub fn cross(&mut self, slot: PeerSlot, peer: &Peer, crossing: &Crossing<'_>, scratch: &mut Vec<u8>, arena: &mut Arena) {
        let room = usize::from(peer.max_datagram).saturating_sub(OVERHEAD).max(1);
        let (offload, frame) = (crossing.offload, crossing.frame);
        let Some(transport) = crossing.transport.filter(|_| offload.is_super()) else {
            return self.cross_ordinary(slot, peer, crossing, room, arena);
        };
        let fits = u16::try_from(room.saturating_sub(transport.payload)).unwrap_or(u16::MAX);
        let segment_size =
            if transport.tcp && fits >= SMALLEST_CUT { offload.segment_size.min(fits) } else { offload.segment_size };
        if segment_size > fits {
            transport::segments(frame, &transport, offload.segment_size, scratch, |segment, offload| {
                let crossing = Crossing { offload, frame: segment, ..*crossing };
                self.cross_ordinary(slot, peer, &crossing, room, arena);
            });
            return;
        }
        let Some((headers, payload)) = frame.split_at_checked(transport.payload) else { return };
        self.frame_id = self.frame_id.wrapping_add(1);
        let mut slice = Slice {
            vni: crossing.vni,
            marks: crossing.marks | mark::PARTIAL_CHECKSUM | if offload.ecn { mark::ECN } else { 0 },
            segmentation: offload.segmentation,
            frame_id: self.frame_id,
            offset: transport.payload as u32,
            total: frame.len() as u32,
            segment_size,
        };
        for piece in payload.chunks(usize::from(segment_size.max(1))) {
            let outer = self.outer(peer);
            arena.datagram((slot, peer), &outer, &slice, [headers, piece]);
            slice.offset += piece.len() as u32;
        }
    }

    fn cross_ordinary(&mut self, slot: PeerSlot, peer: &Peer, crossing: &Crossing<'_>, room: usize, arena: &mut Arena) {
        self.frame_id = self.frame_id.wrapping_add(1);
        let mut slice = Slice {
            vni: crossing.vni,
            marks: crossing.marks | if crossing.offload.checksum.is_some() { mark::PARTIAL_CHECKSUM } else { 0 },
            segmentation: Default::default(),
            frame_id: self.frame_id,
            offset: 0,
            total: crossing.frame.len() as u32,
            segment_size: 0,
        };
        for piece in crossing.frame.chunks(room) {
            let outer = self.outer(peer);
            arena.datagram((slot, peer), &outer, &slice, [piece, &[]]);
            slice.offset += piece.len() as u32;
        }
    }
}
