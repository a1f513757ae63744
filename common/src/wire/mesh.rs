//! The mesh format: how a slice of a frame travels between two switches.
//!
//! Ours; see docs/decisions/0003 and 0012. A datagram is an [`Outer`] header, a sealed body and a tag of [`TAG_LEN`] bytes;
//! a plain one has no tag. The body is a [`Slice`] header followed by bytes of the frame. QUIC shares the UDP port: its
//! datagrams have bit 0x40 of the first byte set (RFC 9000 §17), ours never.

use crate::addr::Vni;

/// Bytes of [`Outer`].
pub const OUTER_LEN: usize = 16;
/// Bytes of [`Slice`].
pub const SLICE_LEN: usize = 16;
/// Bytes of the authentication tag behind a sealed body.
pub const TAG_LEN: usize = 16;
/// Bytes in front of the frame's bytes.
pub const OVERHEAD: usize = OUTER_LEN + SLICE_LEN;
/// Largest network MTU that fits an underlay MTU of 1500 over IPv4 with two VLAN tags in the frame: 1500 − 28 (IP, UDP) −
/// [`OVERHEAD`] − [`TAG_LEN`] − 22 (Ethernet, two tags) leaves 1402.
pub const DEFAULT_MTU: u16 = 1400;
/// Largest layer-3 packet (or segment of a super-frame) that crosses, also on a network with a smaller MTU.
pub const LARGEST_PACKET: u16 = 9000;

/// Whether a datagram that came to the mesh port belongs to QUIC. Source: RFC 9000 §17.2, §17.3 (fixed bit).
pub const fn is_quic(first_byte: u8) -> bool {
    first_byte & 0x40 != 0
}

/// What a datagram carries; the first byte of [`Outer`]. The upper nibble is the format's version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A slice of a frame, sealed.
    Data = 0x21,
    /// A [`Probe`] of a path, sealed.
    Probe = 0x22,
    /// A slice of a frame as it is, between ends whose configurations both say so.
    Plain = 0x23,
}

/// The clear header of every datagram; authenticated together with the body when sealed.
///
/// Shape: 16 bytes, network order.
///
/// ```text
///  0      8       16              32                              64                128
///  | kind | epoch |     queue     |        receiver index         |  packet number  |
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outer {
    /// What follows.
    pub kind: Kind,
    /// Low byte of the key epoch; 0 of a plain datagram.
    pub key_epoch: u8,
    /// Sending queue; packet numbers count per queue.
    pub queue: u16,
    /// The index the receiver gave this sender in its HELLO.
    pub receiver: u32,
    /// Counts up from 1 per key epoch and queue, never reused. Of a plain datagram: see [`Outer::cookie`].
    pub packet_number: u64,
}

/// Why bytes are not a datagram of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Shorter than its headers.
    #[error("got {got} bytes, want at least {want}")]
    Short {
        /// Bytes there were.
        got: usize,
        /// Bytes needed.
        want: usize,
    },
    /// A kind or version this code does not know.
    #[error("got datagram kind {0:#04x}, want 0x21 to 0x23")]
    Kind(u8),
    /// VNI 0, an unknown flag or a segmentation kind that does not exist.
    #[error("got slice header with an illegal field: {0}")]
    Field(&'static str),
}

impl Outer {
    /// Reads the header at the start of a datagram.
    pub fn parse(datagram: &[u8]) -> Result<Self, Malformed> {
        let Some(&bytes) = datagram.first_chunk::<OUTER_LEN>() else {
            return Err(Malformed::Short { got: datagram.len(), want: OUTER_LEN });
        };
        let [kind, key_epoch, q0, q1, r0, r1, r2, r3, number @ ..] = bytes;
        let kind = match kind {
            0x21 => Kind::Data,
            0x22 => Kind::Probe,
            0x23 => Kind::Plain,
            other => return Err(Malformed::Kind(other)),
        };
        Ok(Self {
            kind,
            key_epoch,
            queue: u16::from_be_bytes([q0, q1]),
            receiver: u32::from_be_bytes([r0, r1, r2, r3]),
            packet_number: u64::from_be_bytes(number),
        })
    }

    /// The header as it travels.
    pub fn emit(&self) -> [u8; OUTER_LEN] {
        let mut out = [0; OUTER_LEN];
        out[0] = self.kind as u8;
        out[1] = self.key_epoch;
        out[2..4].copy_from_slice(&self.queue.to_be_bytes());
        out[4..8].copy_from_slice(&self.receiver.to_be_bytes());
        out[8..16].copy_from_slice(&self.packet_number.to_be_bytes());
        out
    }

    /// What a plain datagram has in the place of a packet number: the 48-bit cookie its receiver gave the sender, and 16 bits
    /// that count up, for who reads along.
    pub const fn cookie(&self) -> u64 {
        self.packet_number >> 16
    }
}

/// The body of a [`Kind::Probe`]: whoever opens a challenge answers it from where it came to where it came from, which shows
/// that its sender is reached there.
///
/// Shape: 9 bytes: 1 for a challenge or 2 for an answer, and a token that only the challenger can know, network order. More
/// bytes are padding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probe {
    /// Are you there?
    Challenge(u64),
    /// I am.
    Answer(u64),
}

/// Bytes of [`Probe`].
pub const PROBE_LEN: usize = 9;

impl Probe {
    /// Reads an opened body.
    pub fn parse(body: &[u8]) -> Result<Self, Malformed> {
        let Some(&[kind, token @ ..]) = body.first_chunk::<PROBE_LEN>() else {
            return Err(Malformed::Short { got: body.len(), want: PROBE_LEN });
        };
        match kind {
            1 => Ok(Self::Challenge(u64::from_be_bytes(token))),
            2 => Ok(Self::Answer(u64::from_be_bytes(token))),
            _ => Err(Malformed::Field("probe")),
        }
    }

    /// The body as it travels.
    pub fn emit(&self) -> [u8; PROBE_LEN] {
        let (kind, token) = match self {
            Self::Challenge(token) => (1, token),
            Self::Answer(token) => (2, token),
        };
        let mut out = [kind; PROBE_LEN];
        out[1..].copy_from_slice(&token.to_be_bytes());
        out
    }
}

/// How the frame a slice belongs to is to be segmented, as in `virtio_net_hdr` (virtio 1.2 §5.1.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum Segmentation {
    /// Not a super-frame.
    #[default]
    None = 0,
    /// TCP over IPv4.
    Tcp4 = 1,
    /// UDP, one datagram a segment.
    Udp = 2,
    /// TCP over IPv6.
    Tcp6 = 3,
}

/// Marks of a slice, or-ed together; part of the flags byte.
pub mod mark {
    /// Forwarded once, tunnel to tunnel, because the MAC has just moved: deliver locally, do not learn, never forward again.
    pub const MOVED: u8 = 0x01;
    /// The transport checksum covers the pseudo-header only; whoever leaves the mesh completes it or says so to the reader.
    pub const PARTIAL_CHECKSUM: u8 = 0x02;
    /// Explicit congestion notification of a TCP super-frame (VIRTIO_NET_HDR_GSO_ECN).
    pub const ECN: u8 = 0x04;
    /// All marks there are.
    pub const ALL: u8 = MOVED | PARTIAL_CHECKSUM | ECN;
}

/// The header in front of a slice's bytes, inside the seal.
///
/// Shape: 16 bytes, network order. Source: ours, docs/decisions/0003.
///
/// ```text
///  0                24      32              64               88              112            128
///  |      VNI       | flags |   frame id    |     offset     |     total     | segment size  |
/// ```
///
/// *flags* is marks (low nibble) and [`Segmentation`] (high nibble). A frame without segmentation is cut at any place:
/// `offset` says where the slice's bytes belong in it, `total` is its length. A super-frame is cut at its segments: every
/// slice carries the frame's headers in full, then the payload of one segment, or of as many whole ones as fit; `offset` is
/// where that payload belongs in the super-frame (so the first slice's `offset` is the length of the headers) and `total` the
/// super-frame's length. Each slice of a super-frame can thus leave as a frame of its own, and a lost datagram costs its segments only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slice {
    /// The network the frame belongs to.
    pub vni: Vni,
    /// [`mark`]s.
    pub marks: u8,
    /// How the frame is to be segmented.
    pub segmentation: Segmentation,
    /// The same for all slices of one frame, counting up per sender and queue.
    pub frame_id: u32,
    /// Where the slice's bytes (or its payload) belong in the frame; 24 bits.
    pub offset: u32,
    /// Length of the whole frame; 24 bits.
    pub total: u32,
    /// Payload bytes per segment of a super-frame, 0 otherwise.
    pub segment_size: u16,
}

impl Slice {
    /// Reads the header at the start of an opened body.
    pub fn parse(body: &[u8]) -> Result<Self, Malformed> {
        let Some(&bytes) = body.first_chunk::<SLICE_LEN>() else {
            return Err(Malformed::Short { got: body.len(), want: SLICE_LEN });
        };
        let [v0, v1, v2, flags, i0, i1, i2, i3, o0, o1, o2, t0, t1, t2, s0, s1] = bytes;
        let segmentation = match flags >> 4 {
            0 => Segmentation::None,
            1 => Segmentation::Tcp4,
            2 => Segmentation::Udp,
            3 => Segmentation::Tcp6,
            _ => return Err(Malformed::Field("segmentation")),
        };
        let marks = flags & 0x0f;
        if marks & !mark::ALL != 0 {
            return Err(Malformed::Field("marks"));
        }
        let slice = Self {
            vni: Vni::new(u32::from_be_bytes([0, v0, v1, v2])).map_err(|_| Malformed::Field("vni"))?,
            marks,
            segmentation,
            frame_id: u32::from_be_bytes([i0, i1, i2, i3]),
            offset: u32::from_be_bytes([0, o0, o1, o2]),
            total: u32::from_be_bytes([0, t0, t1, t2]),
            segment_size: u16::from_be_bytes([s0, s1]),
        };
        if (slice.segmentation == Segmentation::None) != (slice.segment_size == 0) {
            return Err(Malformed::Field("segment size"));
        }
        if slice.offset > slice.total {
            return Err(Malformed::Field("offset"));
        }
        Ok(slice)
    }

    /// The header as it travels.
    pub fn emit(&self) -> [u8; SLICE_LEN] {
        let mut out = [0; SLICE_LEN];
        out[0..3].copy_from_slice(&self.vni.value().to_be_bytes()[1..]);
        out[3] = self.marks | (self.segmentation as u8) << 4;
        out[4..8].copy_from_slice(&self.frame_id.to_be_bytes());
        out[8..11].copy_from_slice(&self.offset.to_be_bytes()[1..]);
        out[11..14].copy_from_slice(&self.total.to_be_bytes()[1..]);
        out[14..16].copy_from_slice(&self.segment_size.to_be_bytes());
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Golden bytes: a change here is a change of the format and needs a new version nibble.
    #[test]
    fn the_format_is_frozen() {
        let outer = Outer { kind: Kind::Data, key_epoch: 2, queue: 3, receiver: 0x0405_0607, packet_number: 8 };
        assert_eq!(outer.emit(), [0x21, 2, 0, 3, 4, 5, 6, 7, 0, 0, 0, 0, 0, 0, 0, 8]);
        assert_eq!(Probe::Challenge(0x0102).emit(), [1, 0, 0, 0, 0, 0, 0, 1, 2]);
        assert_eq!(Probe::Answer(0x0102).emit(), [2, 0, 0, 0, 0, 0, 0, 1, 2]);

        let slice = Slice {
            vni: Vni::new(0x01_0203).unwrap(),
            marks: mark::MOVED | mark::PARTIAL_CHECKSUM,
            segmentation: Segmentation::Tcp6,
            frame_id: 0x0506_0708,
            offset: 0x09_0a0b,
            total: 0x0c_0d0e,
            segment_size: 0x0f10,
        };
        assert_eq!(slice.emit(), [1, 2, 3, 0x33, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]);
    }

    proptest! {
        #[test]
        fn any_bytes_parse_or_are_refused_and_what_parses_is_emitted_unchanged(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            if let Ok(outer) = Outer::parse(&bytes) {
                prop_assert_eq!(&outer.emit()[..], &bytes[..OUTER_LEN]);
                prop_assert!(!is_quic(bytes[0]));
            }
            if let Ok(probe) = Probe::parse(&bytes) {
                prop_assert_eq!(&probe.emit()[..], &bytes[..PROBE_LEN]);
            }
            if let Ok(slice) = Slice::parse(&bytes) {
                prop_assert_eq!(&slice.emit()[..], &bytes[..SLICE_LEN]);
            }
        }
    }
}
