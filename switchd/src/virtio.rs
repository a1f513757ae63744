//! `virtio_net_hdr`: what a TAP or packet socket says about a frame whose checksum or segmentation is still to be done.

use violin_common::wire::mesh::Segmentation;

/// Bytes of the header in its legacy form, in native byte order. Source: virtio 1.2 §5.1.6, linux/virtio_net.h.
pub const LEN: usize = 10;

const NEEDS_CSUM: u8 = 1;
const GSO_TCP4: u8 = 1;
const GSO_TCP6: u8 = 4;
const GSO_UDP: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// A checksum that covers the pseudo-header only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Partial {
    /// Where summing starts, in bytes from the start of the frame.
    pub start: u16,
    /// Where the sum belongs, in bytes from `start`.
    pub offset: u16,
}

/// What is still to be done to a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offload {
    /// A checksum to complete.
    pub checksum: Option<Partial>,
    /// How to segment; `None` for an ordinary frame.
    pub segmentation: Segmentation,
    /// Payload bytes per segment; 0 for an ordinary frame.
    pub segment_size: u16,
    /// Explicit congestion notification of a TCP super-frame.
    pub ecn: bool,
    /// Bytes of headers in front of the payload; a hint, 0 when unknown.
    pub header_len: u16,
}

/// A kind of segmentation this switch does not know (UFO, tunnels): nobody could segment the frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("got segmentation type {0:#04x}, want none, TCPv4, TCPv6 or UDP_L4")]
pub struct UnknownSegmentation(pub u8);

impl Offload {
    /// Reads the header.
    pub fn parse(bytes: &[u8; LEN]) -> Result<Self, UnknownSegmentation> {
        let [flags, gso, h0, h1, s0, s1, c0, c1, o0, o1] = *bytes;
        let segmentation = match gso & !GSO_ECN {
            0 => Segmentation::None,
            GSO_TCP4 => Segmentation::Tcp4,
            GSO_TCP6 => Segmentation::Tcp6,
            GSO_UDP => Segmentation::Udp,
            _ => return Err(UnknownSegmentation(gso)),
        };
        let ordinary = segmentation == Segmentation::None;
        Ok(Self {
            checksum: (flags & NEEDS_CSUM != 0)
                .then(|| Partial { start: u16::from_ne_bytes([c0, c1]), offset: u16::from_ne_bytes([o0, o1]) }),
            segmentation,
            segment_size: if ordinary { 0 } else { u16::from_ne_bytes([s0, s1]) },
            ecn: !ordinary && gso & GSO_ECN != 0,
            header_len: u16::from_ne_bytes([h0, h1]),
        })
    }

    /// The header as the kernel takes it.
    pub fn emit(&self) -> [u8; LEN] {
        let mut out = [0; LEN];
        if let Some(Partial { start, offset }) = self.checksum {
            out[0] = NEEDS_CSUM;
            out[6..8].copy_from_slice(&start.to_ne_bytes());
            out[8..10].copy_from_slice(&offset.to_ne_bytes());
        }
        out[1] = match self.segmentation {
            Segmentation::None => 0,
            Segmentation::Tcp4 => GSO_TCP4,
            Segmentation::Tcp6 => GSO_TCP6,
            Segmentation::Udp => GSO_UDP,
        };
        if self.segmentation != Segmentation::None {
            out[1] |= if self.ecn { GSO_ECN } else { 0 };
            out[2..4].copy_from_slice(&self.header_len.to_ne_bytes());
            out[4..6].copy_from_slice(&self.segment_size.to_ne_bytes());
        }
        out
    }

    /// Whether the frame is a super-frame.
    pub fn is_super(&self) -> bool {
        self.segmentation != Segmentation::None
    }

    /// The same after `bytes` were put into the frame in front of the layer-3 header, as when a VLAN tag comes back.
    #[must_use]
    pub fn shifted(mut self, bytes: u16) -> Self {
        if let Some(partial) = &mut self.checksum {
            partial.start = partial.start.saturating_add(bytes);
        }
        if self.header_len != 0 {
            self.header_len = self.header_len.saturating_add(bytes);
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_understood_survives_a_round_trip(bytes in any::<[u8; LEN]>()) {
            if let Ok(offload) = Offload::parse(&bytes) {
                let again = Offload::parse(&offload.emit()).unwrap();
                prop_assert_eq!(again.checksum, offload.checksum);
                prop_assert_eq!(again.segmentation, offload.segmentation);
                prop_assert_eq!(again.segment_size, offload.segment_size);
            }
        }
    }

    #[test]
    fn a_tunnels_segmentation_is_refused() {
        for gso in [3, 0x20 | 1, 0x40 | 4, 6, 0x7f] {
            assert!(Offload::parse(&[1, gso, 0, 0, 0, 0, 0, 0, 0, 0]).is_err(), "{gso}");
        }
    }
}
