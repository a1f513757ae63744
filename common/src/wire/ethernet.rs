//! The Ethernet II header with up to two VLAN tags: all that the forwarding path needs to know of a frame.

use crate::addr::MacAddr;

/// Bytes of destination, source and EtherType.
pub const HEADER_LEN: usize = 14;
/// Bytes of one 802.1Q or 802.1ad tag.
pub const TAG_LEN: usize = 4;

/// EtherTypes named in this project. Source: IEEE 802 numbers at IANA.
pub mod ethertype {
    /// IPv4.
    pub const IPV4: u16 = 0x0800;
    /// ARP.
    pub const ARP: u16 = 0x0806;
    /// IPv6.
    pub const IPV6: u16 = 0x86dd;
    /// 802.1Q customer tag.
    pub const VLAN: u16 = 0x8100;
    /// 802.1ad service tag.
    pub const QINQ: u16 = 0x88a8;
    /// First local experimental EtherType (IEEE 802 §9.2.3): canaries and probes.
    pub const EXPERIMENTAL: u16 = 0x88b5;
}

/// A frame shorter than an Ethernet header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("got a frame of {0} bytes, want at least 14")]
pub struct Runt(pub usize);

/// What the forwarding path reads of a frame.
///
/// Shape: the EtherType is the one behind the tags; `payload` is the offset of the byte after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Destination address.
    pub destination: MacAddr,
    /// Source address.
    pub source: MacAddr,
    /// VLAN identifier of the outer tag, 0 without one.
    pub outer_vid: u16,
    /// EtherType behind at most two tags.
    pub ethertype: u16,
    /// Offset of the first byte behind the EtherType.
    pub payload: usize,
}

impl Header {
    /// Reads the header.
    ///
    /// A tag cut off by the end of the frame is not an error: its type is then the frame's EtherType, as a bridge without
    /// VLAN knowledge would see it.
    pub fn parse(frame: &[u8]) -> Result<Self, Runt> {
        let Some((addresses, rest)) = frame.split_first_chunk::<12>() else { return Err(Runt(frame.len())) };
        let Some(&first) = rest.first_chunk::<2>() else { return Err(Runt(frame.len())) };
        let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5] = *addresses;
        let mut header = Self {
            destination: MacAddr([d0, d1, d2, d3, d4, d5]),
            source: MacAddr([s0, s1, s2, s3, s4, s5]),
            outer_vid: 0,
            ethertype: u16::from_be_bytes(first),
            payload: HEADER_LEN,
        };
        for depth in 0..2 {
            if !matches!(header.ethertype, ethertype::VLAN | ethertype::QINQ) {
                break;
            }
            let Some(&[tci0, tci1, type0, type1]) = frame.get(header.payload..).and_then(|rest| rest.first_chunk::<4>()) else {
                break;
            };
            if depth == 0 {
                header.outer_vid = u16::from_be_bytes([tci0, tci1]) & 0x0fff;
            }
            header.ethertype = u16::from_be_bytes([type0, type1]);
            header.payload += TAG_LEN;
        }
        Ok(header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: [u8; 14] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0x08, 0x00];

    #[test]
    fn a_plain_header_is_read() {
        let header = Header::parse(&PLAIN).unwrap();
        assert_eq!(header.ethertype, ethertype::IPV4);
        assert_eq!((header.outer_vid, header.payload), (0, 14));
    }

    #[test]
    fn two_tags_are_skipped_and_the_outer_vid_is_kept() {
        let mut frame = PLAIN[..12].to_vec();
        frame.extend([0x88, 0xa8, 0x20, 0x05, 0x81, 0x00, 0x00, 0x07, 0x86, 0xdd]);
        let header = Header::parse(&frame).unwrap();
        assert_eq!((header.outer_vid, header.ethertype, header.payload), (5, ethertype::IPV6, 22));
    }

    #[test]
    fn no_length_panics() {
        let mut frame = PLAIN[..12].to_vec();
        frame.extend([0x81, 0x00, 0x00, 0x07, 0x81, 0x00, 0, 1, 0x81, 0x00]);
        for len in 0..frame.len() {
            assert_eq!(Header::parse(&frame[..len]).is_ok(), len >= HEADER_LEN);
        }
    }
}
