//! TCP and UDP inside a frame: where their headers are, their checksums, and what changes in the headers when a super-frame
//! is cut. Everything else that frames carry passes untouched and unread.

use crate::drops::DropReason;
use crate::nested;
use crate::virtio::{Offload, Partial};
use violin_common::wire::ethernet::{self, ethertype};
use violin_common::wire::mesh::Segmentation;

/// Longest headers a super-frame may have: two VLAN tags, IPv6 with extensions, TCP with options.
pub const MAX_HEADERS: usize = 256;

/// Segments a super-frame may have: 64 KiB of what TCP's smallest segments hold (48 bytes, TCP_MIN_SND_MSS), and some.
pub const MAX_SEGMENTS: usize = 1400;

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
const SCTP: u8 = 132;
/// Place of the checksum in a TCP and in a UDP header.
const TCP_CHECKSUM: u16 = 16;
pub(crate) const UDP_CHECKSUM: u16 = 6;
/// Place of the CRC in an SCTP header.
const SCTP_CHECKSUM: u16 = 8;
/// UDP ports of DHCP, servers and clients. Clients of old read the raw packet and know nothing of checksums still to be made.
const DHCP: [u16; 2] = [67, 68];
const FIN_PSH: u8 = 0x09;
const CWR: u8 = 0x80;

/// Positions of the headers of a TCP segment or UDP datagram within a frame, in bytes from its start.
///
/// All lie within the frame the value was found in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transport {
    /// The IP header.
    pub l3: usize,
    /// The TCP or UDP header.
    pub l4: usize,
    /// The first byte behind it.
    pub payload: usize,
    /// IPv6, else IPv4.
    pub v6: bool,
    /// TCP, else UDP.
    pub tcp: bool,
}

pub(crate) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(crate) fn put16(bytes: &mut [u8], at: usize, value: u16) {
    if let Some(field) = bytes.get_mut(at..at + 2) {
        field.copy_from_slice(&value.to_be_bytes());
    }
}

/// The ones' complement sum of 16-bit words, not folded. Source: RFC 1071. An odd last byte is padded with zero.
pub fn sum(bytes: &[u8]) -> u64 {
    let mut words = bytes.chunks_exact(4);
    let mut total: u64 = words.by_ref().map(|w| u64::from(u32::from_be_bytes([w[0], w[1], w[2], w[3]]))).sum();
    let mut rest = [0; 4];
    let tail = words.remainder();
    rest[..tail.len()].copy_from_slice(tail);
    total += u64::from(u32::from_be_bytes(rest));
    total
}

/// Folds a sum to 16 bits.
pub fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// An IP header within a frame: its place and what follows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ip {
    /// Its first byte.
    pub l3: usize,
    /// The first byte behind it and its extensions.
    pub l4: usize,
    /// IPv6, else IPv4.
    pub v6: bool,
    /// What is there.
    pub protocol: u8,
}

impl Ip {
    /// Reads the header of an unfragmented packet that starts at `l3`. `None`: another version, a fragment, or cut off.
    pub fn at(frame: &[u8], l3: usize, v6: bool) -> Option<Self> {
        if !v6 {
            let first = *frame.get(l3)?;
            let l4 = l3 + usize::from(first & 0x0f) * 4;
            let fragment = be16(frame, l3 + 6)? & 0x3fff;
            if first >> 4 != 4 || l4 < l3 + 20 || fragment != 0 {
                return None;
            }
            return Some(Self { l3, l4, v6, protocol: *frame.get(l3 + 9)? });
        }
        if frame.get(l3)? >> 4 != 6 {
            return None;
        }
        let (mut protocol, mut l4) = (*frame.get(l3 + 6)?, l3 + 40);
        for _ in 0..8 {
            // Hop-by-hop, routing and destination options share one shape (RFC 8200 §4).
            if !matches!(protocol, 0 | 43 | 60) {
                break;
            }
            protocol = *frame.get(l4)?;
            l4 += 8 + usize::from(*frame.get(l4 + 1)?) * 8;
        }
        Some(Self { l3, l4, v6, protocol })
    }

    /// Where the packet ends, as its header says; beyond the frame's end when that is cut off.
    pub fn end(&self, frame: &[u8]) -> Option<usize> {
        if self.v6 {
            Some(self.l3 + 40 + usize::from(be16(frame, self.l3 + 4)?))
        } else {
            Some(self.l3 + usize::from(be16(frame, self.l3 + 2)?))
        }
    }

    /// Rewrites the header for a packet of `len` bytes, the `index`-th of those it was cut into: length, and IPv4's
    /// identification and checksum.
    pub fn fit(&self, frame: &mut [u8], len: usize, index: usize) {
        if self.v6 {
            put16(frame, self.l3 + 4, len.saturating_sub(40) as u16);
            return;
        }
        put16(frame, self.l3 + 2, len as u16);
        let id = be16(frame, self.l3 + 4).unwrap_or(0).wrapping_add(index as u16);
        put16(frame, self.l3 + 4, id);
        put16(frame, self.l3 + 10, 0);
        let check = !fold(frame.get(self.l3..self.l4).map_or(0, sum));
        put16(frame, self.l3 + 10, check);
    }

    /// Folded sum of the pseudo-header for `len` bytes behind this header.
    pub fn pseudo(&self, frame: &[u8], len: usize) -> u16 {
        let addresses = if self.v6 { self.l3 + 8..self.l3 + 40 } else { self.l3 + 12..self.l3 + 20 };
        fold(frame.get(addresses).map_or(0, sum) + u64::from(self.protocol) + len as u64)
    }
}

impl Transport {
    /// Looks for TCP or UDP in an unfragmented IPv4 or IPv6 packet. `None`: something else, or cut off.
    pub fn find(frame: &[u8], header: &ethernet::Header) -> Option<Self> {
        let v6 = match header.ethertype {
            ethertype::IPV4 => false,
            ethertype::IPV6 => true,
            _ => return None,
        };
        Self::within(frame, &Ip::at(frame, header.payload, v6)?)
    }

    /// The same of a packet whose IP header is known.
    pub fn within(frame: &[u8], &Ip { l3, l4, v6, protocol }: &Ip) -> Option<Self> {
        let payload = match protocol {
            TCP => {
                let len = usize::from(frame.get(l4 + 12)? >> 4) * 4;
                if len < 20 {
                    return None;
                }
                l4 + len
            }
            UDP => l4 + 8,
            _ => return None,
        };
        (payload <= frame.len()).then_some(Self { l3, l4, payload, v6, tcp: protocol == TCP })
    }

    const fn ip(&self) -> Ip {
        let &Self { l3, l4, v6, tcp, .. } = self;
        Ip { l3, l4, v6, protocol: if tcp { TCP } else { UDP } }
    }

    /// Where its checksum is, as `virtio_net_hdr` says it.
    pub fn checksum(&self) -> Partial {
        Partial { start: self.l4 as u16, offset: if self.tcp { TCP_CHECKSUM } else { UDP_CHECKSUM } }
    }

    /// Folded sum of the pseudo-header for `len` bytes of transport header and payload: what a partial checksum holds.
    /// `frame` must be the one this was found in (or at least its headers).
    pub fn pseudo(&self, frame: &[u8], len: usize) -> u16 {
        self.ip().pseudo(frame, len)
    }

    fn is_dhcp(&self, frame: &[u8]) -> bool {
        let port = |at| be16(frame, at).is_some_and(|port| DHCP.contains(&port));
        !self.tcp && (port(self.l4) || port(self.l4 + 2))
    }

    /// Whether this is what `segmentation` says.
    pub fn is(&self, segmentation: Segmentation) -> bool {
        match segmentation {
            Segmentation::None => false,
            Segmentation::Tcp4 => self.tcp && !self.v6,
            Segmentation::Tcp6 => self.tcp && self.v6,
            Segmentation::Udp => !self.tcp,
        }
    }

    /// Rewrites `headers` (the frame's first [`Self::payload`] bytes) for a part of its payload: lengths, IPv4 identification
    /// and checksum, TCP sequence number and flags; the transport checksum becomes partial.
    ///
    /// `segment_size` tells how many segments lie in front of the part. FIN and PSH stay with the last byte, CWR with the
    /// first, as the kernel does it (tcp_gso_segment).
    pub fn cut(&self, headers: &mut [u8], part: Part, segment_size: u16) {
        let l4_len = self.payload - self.l4 + part.len;
        self.ip().fit(headers, self.payload - self.l3 + part.len, part.start / usize::from(segment_size.max(1)));
        if self.tcp {
            if let Some(field) = headers.get_mut(self.l4 + 4..self.l4 + 8)
                && let Some(&bytes) = field.first_chunk::<4>()
            {
                field.copy_from_slice(&u32::from_be_bytes(bytes).wrapping_add(part.start as u32).to_be_bytes());
            }
            if let Some(flags) = headers.get_mut(self.l4 + 13) {
                *flags &= if part.last { 0xff } else { !FIN_PSH };
                *flags &= if part.start == 0 { 0xff } else { !CWR };
            }
        } else {
            put16(headers, self.l4 + 4, l4_len as u16);
        }
        let pseudo = self.pseudo(headers, l4_len);
        let Partial { start, offset } = self.checksum();
        put16(headers, usize::from(start + offset), pseudo);
    }
}

/// A part of a super-frame's payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// First byte, from the start of the payload; a multiple of the segment size.
    pub start: usize,
    /// How many.
    pub len: usize,
    /// Whether it reaches the end.
    pub last: bool,
}

/// Completes a partial checksum in place. Errors: the place lies outside the frame.
pub fn complete(frame: &mut [u8], partial: Partial) -> Result<(), DropReason> {
    let (start, field) = (usize::from(partial.start), usize::from(partial.start) + usize::from(partial.offset));
    if field + 2 > frame.len() {
        return Err(DropReason::Checksum);
    }
    let check = !fold(sum(frame.get(start..).ok_or(DropReason::Checksum)?));
    // To UDP, and to nothing else, all zero means "no checksum"; both forms mean the same number (RFC 768).
    let udp = partial.offset == UDP_CHECKSUM;
    put16(frame, field, if check == 0 && udp { 0xffff } else { check });
    Ok(())
}

/// Completes the checksum of an SCTP packet: CRC-32C of all of it with the field zero, the least significant byte first
/// (RFC 9260 §6.8, appendix A). Errors: the packet is cut off.
fn complete_sctp(frame: &mut [u8], ip: &Ip) -> Result<(), DropReason> {
    let end = ip.end(frame).unwrap_or(0);
    let packet = frame.get_mut(ip.l4..end).filter(|packet| packet.len() >= 12).ok_or(DropReason::Checksum)?;
    let field = usize::from(SCTP_CHECKSUM)..usize::from(SCTP_CHECKSUM) + 4;
    packet[field.clone()].fill(0);
    let crc = crc32c(packet);
    packet[field].copy_from_slice(&crc.to_le_bytes());
    Ok(())
}

/// CRC-32C (Castagnoli), reflected, one byte a step. SCTP through a switch without its offload is rare.
fn crc32c(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let (mut table, mut index) = ([0; 256], 0);
        while index < 256 {
            let (mut value, mut bit) = (index as u32, 0);
            while bit < 8 {
                value = (value >> 1) ^ if value & 1 == 1 { 0x82f6_3b78 } else { 0 };
                bit += 1;
            }
            table[index] = value;
            index += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |crc: u32, byte| (crc >> 8) ^ TABLE[(crc as u8 ^ byte) as usize])
}

/// Checks what the reader of a port said about a frame and brings it into the form the mesh carries: either nothing is left
/// to do, or a TCP/UDP checksum at its usual place, perhaps with segmentation of just that protocol.
///
/// A checksum anywhere else is completed here, so that no position needs to travel, and so is DHCP's. SCTP's is a CRC, which
/// whoever reports it does not say. Tunnels' super-frames were cut before (`nested.rs`). Errors: segmentation that does not fit
/// the frame, or cuts it into more than [`MAX_SEGMENTS`]; a checksum outside the frame.
pub fn settle(frame: &mut [u8], header: &ethernet::Header, offload: Offload) -> Result<(Offload, Option<Transport>), DropReason> {
    if !offload.is_super() {
        let Some(partial) = offload.checksum else { return Ok((Offload::default(), None)) };
        let found = Transport::find(frame, header).filter(|transport| transport.checksum() == partial);
        if let Some(transport) = found.filter(|transport| !transport.is_dhcp(frame)) {
            return Ok((Offload { checksum: Some(partial), ..Offload::default() }, Some(transport)));
        }
        match nested::at_checksum(frame, header, partial).filter(|ip| ip.protocol == SCTP && partial.offset == SCTP_CHECKSUM) {
            Some(ip) => complete_sctp(frame, &ip)?,
            None => complete(frame, partial)?,
        }
        return Ok((Offload::default(), None));
    }
    let transport = Transport::find(frame, header)
        .filter(|t| t.is(offload.segmentation) && t.payload < frame.len() && t.payload <= MAX_HEADERS)
        .ok_or(DropReason::Segmentation)?;
    if offload.segment_size == 0 || offload.checksum.is_some_and(|partial| partial != transport.checksum()) {
        return Err(DropReason::Segmentation);
    }
    if (frame.len() - transport.payload).div_ceil(usize::from(offload.segment_size)) > MAX_SEGMENTS {
        // Each would be a datagram to each peer: one frame of a guest must not keep the worker for seconds.
        return Err(DropReason::Segmentation);
    }
    let checksum = transport.checksum();
    if offload.checksum.is_none() {
        let pseudo = transport.pseudo(frame, frame.len() - transport.l4);
        put16(frame, usize::from(checksum.start + checksum.offset), pseudo);
    }
    let checksum = Some(checksum);
    if frame.len() - transport.payload <= usize::from(offload.segment_size) {
        return Ok((Offload { checksum, ..Offload::default() }, Some(transport)));
    }
    Ok((Offload { checksum, header_len: transport.payload as u16, ..offload }, Some(transport)))
}

/// Cuts a settled super-frame into its segments, each a frame with a partial checksum, made in `scratch` one after another.
pub fn segments(
    frame: &[u8],
    transport: &Transport,
    segment_size: u16,
    scratch: &mut Vec<u8>,
    mut each: impl FnMut(&mut Vec<u8>, Offload),
) {
    let Some((headers, payload)) = frame.split_at_checked(transport.payload) else { return };
    let mut start = 0;
    for piece in payload.chunks(usize::from(segment_size.max(1))) {
        scratch.clear();
        scratch.extend_from_slice(headers);
        let last = start + piece.len() == payload.len();
        transport.cut(scratch, Part { start, len: piece.len(), last }, segment_size);
        scratch.extend_from_slice(piece);
        each(scratch, Offload { checksum: Some(transport.checksum()), ..Offload::default() });
        start += piece.len();
    }
}

/// What a frame from a source without `virtio_net_hdr` leaves to do.
///
/// A tunnel end on a link without real hardware hands over TCP and UDP with the checksum still partial, and whole
/// super-frames as one packet: the first is known by the field holding just the pseudo-header's sum, the second by TCP
/// larger than `mtu`. Completing such a checksum gives the right one whether or not it was complete already.
pub fn guess(frame: &[u8], header: &ethernet::Header, mtu: u16) -> Offload {
    let Some(transport) = Transport::find(frame, header) else { return Offload::default() };
    let l3_len = if transport.v6 {
        be16(frame, transport.l3 + 4).map(|len| usize::from(len) + 40)
    } else {
        be16(frame, transport.l3 + 2).map(usize::from)
    };
    if l3_len != Some(frame.len() - transport.l3) {
        return Offload::default();
    }
    let checksum = transport.checksum();
    let field = be16(frame, usize::from(checksum.start + checksum.offset));
    if field != Some(transport.pseudo(frame, frame.len() - transport.l4)) {
        return Offload::default();
    }
    let too_big = frame.len() - transport.l3 > usize::from(mtu);
    let segment_size = usize::from(mtu).saturating_sub(transport.payload - transport.l3);
    if too_big && transport.tcp && segment_size > 0 {
        let segmentation = if transport.v6 { Segmentation::Tcp6 } else { Segmentation::Tcp4 };
        let (segment_size, header_len) = (segment_size as u16, transport.payload as u16);
        return Offload { checksum: Some(checksum), segmentation, segment_size, ecn: false, header_len };
    }
    Offload { checksum: Some(checksum), ..Offload::default() }
}

#[cfg(test)]
#[path = "transport_tests.rs"]
mod tests;
