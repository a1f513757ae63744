//! Frames into slices, slices into bursts: everything that goes to the underlay is put together here.
//!
//! The arena is one buffer, reused; a burst is a run of datagrams in it that one system call can send (UDP_SEGMENT): one
//! receiver, one size, only the last may be shorter.

use crate::drops::DropReason;
use crate::tables::{Peer, PeerSlot};
use crate::transport::{self, Transport};
use crate::tunnel::Tunnel;
use crate::virtio::Offload;
use std::net::{IpAddr, SocketAddr};
use violin_common::wire::mesh::{OUTER_LEN, OVERHEAD, Probe, SLICE_LEN, Slice, TAG_LEN, mark};
use violin_common::{Instant, Vni};

/// Datagrams in one burst. Source: UDP_MAX_SEGMENTS of older kernels.
pub const MAX_SEGMENTS: usize = 64;
/// Payload a TCP segment is cut down to at least, in bytes; below it more headers than bytes would cross.
const SMALLEST_CUT: u16 = 256;
/// Bytes in one burst: the largest UDP payload over IPv4.
pub const MAX_BURST: usize = 65_507;

/// How a datagram leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Way {
    /// Where it goes.
    pub to: SocketAddr,
    /// Which of our addresses it leaves from; none: the kernel chooses.
    pub from: Option<IpAddr>,
    /// Through which interface, by its number; 0: the kernel chooses.
    pub interface: u32,
}

/// Datagrams that leave in one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Burst {
    /// How.
    pub way: Way,
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

    /// Appends one datagram: a head with room for the outer header, then the parts, then room for a tag of `tag` bytes; `close`
    /// seals it, just copied and still in the cache. One that cannot be closed is not sent.
    fn datagram(
        &mut self,
        (peer, way): (PeerSlot, Way),
        head: &[u8],
        parts: [&[u8]; 2],
        tag: usize,
        close: impl FnOnce(&mut [u8]) -> Result<(), DropReason>,
    ) -> Result<(), DropReason> {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(head);
        self.bytes.extend_from_slice(parts[0]);
        self.bytes.extend_from_slice(parts[1]);
        self.bytes.extend_from_slice(&[0; TAG_LEN][..tag]);
        let end = self.bytes.len();
        if let Err(reason) = close(&mut self.bytes[start..]) {
            self.bytes.truncate(start);
            return Err(reason);
        }
        if let Some(last) = self.bursts.last_mut()
            && (last.peer, last.way) == (peer, way)
            && last.end - last.start == last.segment * last.count
            && end - start <= last.segment
            && last.count < MAX_SEGMENTS
            && end - last.start <= MAX_BURST
        {
            last.end = end;
            last.count += 1;
            return Ok(());
        }
        self.bursts.push(Burst { way, peer, start, end, segment: end - start, count: 1 });
        Ok(())
    }
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

/// What puts frames for one peer into the arena.
#[derive(Debug)]
pub(crate) struct Sender<'a> {
    pub(crate) now: Instant,
    pub(crate) slot: PeerSlot,
    pub(crate) peer: &'a Peer,
    pub(crate) tunnel: &'a mut Tunnel,
    pub(crate) arena: &'a mut Arena,
}

impl Sender<'_> {
    fn datagram(&mut self, slice: &Slice, parts: [&[u8]; 2]) -> Result<(), DropReason> {
        let &mut Self { now, slot, peer, ref mut tunnel, ref mut arena } = self;
        let mut head = [0; OVERHEAD];
        head[OUTER_LEN..OUTER_LEN + SLICE_LEN].copy_from_slice(&slice.emit());
        let way = Way { to: peer.address, from: peer.ours, interface: tunnel.interface() };
        let (_, tag) = tunnel.overhead();
        arena.datagram((slot, way), &head, parts, tag, |datagram| tunnel.close(now, false, datagram))
    }

    /// Puts a probe into the arena, to wherever it is to go.
    pub(crate) fn probe(&mut self, to: SocketAddr, probe: Probe) -> Result<(), DropReason> {
        let &mut Self { now, slot, peer, ref mut tunnel, ref mut arena } = self;
        let way = Way { to, from: peer.ours, interface: 0 };
        let body = probe.emit();
        arena.datagram((slot, way), &[0; OUTER_LEN], [&body, &[]], TAG_LEN, |datagram| tunnel.close(now, true, datagram))
    }

    /// Puts a frame into the arena as as many datagrams as the path needs.
    ///
    /// A super-frame is cut at its segments, of which a datagram takes as many as fit. Where those do not fit a datagram, as those of a station with a larger MTU than
    /// its network's, TCP's become smaller, as the kernel does it to make room for a tunnel's headers
    /// (skb_decrease_gso_size): a stream has no boundaries, and the super-frame stays one. UDP's datagrams do have them: each
    /// crosses as an ordinary frame, in slices.
    ///
    /// *Errors*: there is no key (any more); what was put in before leaves all the same.
    pub(crate) fn cross(&mut self, crossing: &Crossing<'_>, scratch: &mut Vec<u8>) -> Result<(), DropReason> {
        let room = usize::from(self.peer.max_datagram).saturating_sub(self.tunnel.overhead().0).max(1);
        let (offload, frame) = (crossing.offload, crossing.frame);
        let Some(transport) = crossing.transport.filter(|_| offload.is_super()) else {
            return self.cross_ordinary(crossing, room);
        };
        let fits = u16::try_from(room.saturating_sub(transport.payload)).unwrap_or(u16::MAX);
        let segment_size =
            if transport.tcp && fits >= SMALLEST_CUT { offload.segment_size.min(fits) } else { offload.segment_size };
        if segment_size > fits {
            let mut result = Ok(());
            transport::segments(frame, &transport, offload.segment_size, scratch, |segment, offload| {
                let crossing = Crossing { offload, frame: segment, ..*crossing };
                // Numbers and order are each segment's own: one that fails keeps no other.
                let crossed = self.cross_ordinary(&crossing, room);
                result = result.and(crossed);
            });
            return result;
        }
        let Some((headers, payload)) = frame.split_at_checked(transport.payload) else { return Ok(()) };
        let mut slice = Slice {
            vni: crossing.vni,
            marks: crossing.marks | mark::PARTIAL_CHECKSUM | if offload.ecn { mark::ECN } else { 0 },
            segmentation: offload.segmentation,
            frame_id: self.tunnel.next_frame_id(),
            offset: transport.payload as u32,
            total: frame.len() as u32,
            segment_size,
        };
        // As many whole segments as a datagram takes: on a path of jumbo frames several.
        let whole = usize::from((fits / segment_size.max(1)).max(1));
        for piece in payload.chunks(whole * usize::from(segment_size.max(1))) {
            self.datagram(&slice, [headers, piece])?;
            slice.offset += piece.len() as u32;
        }
        Ok(())
    }

    fn cross_ordinary(&mut self, crossing: &Crossing<'_>, room: usize) -> Result<(), DropReason> {
        let mut slice = Slice {
            vni: crossing.vni,
            marks: crossing.marks | if crossing.offload.checksum.is_some() { mark::PARTIAL_CHECKSUM } else { 0 },
            segmentation: Default::default(),
            frame_id: self.tunnel.next_frame_id(),
            offset: 0,
            total: crossing.frame.len() as u32,
            segment_size: 0,
        };
        for piece in crossing.frame.chunks(room) {
            self.datagram(&slice, [piece, &[]])?;
            slice.offset += piece.len() as u32;
        }
        Ok(())
    }
}
