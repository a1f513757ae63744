//! Super-frames of a guest's own tunnel (VXLAN, Geneve, GRE, IP in IP): a packet socket reports them as plain TCP or UDP with a
//! checksum far inside. They are cut here into the frames that the guest's kernel would have sent on a wire.
//!
//! What lies between an outer header and the next inner one is not understood, only copied: an inner header is known by
//! itself (its length reaches exactly to the frame's end) and by its EtherType or place, so the ports of tunnels do not matter.

use crate::transport::{
    Ip, MAX_HEADERS, MAX_SEGMENTS, Part, TCP, Transport, UDP, UDP_CHECKSUM, be16, complete, fold, put16, sum,
};
use crate::virtio::{Offload, Partial};
use violin_common::wire::ethernet::{Header, ethertype};

/// Headers of tunnels around the innermost packet.
const MAX_OUTER: usize = 2;
/// Longest that lies between an outer header and an inner one: Geneve with all its options, an Ethernet header, two tags.
const MAX_BETWEEN: usize = 8 + 252 + 22;
const IP_IN_IP: u8 = 4;
const IPV6_IN_IP: u8 = 41;
const GRE: u8 = 47;
/// EtherType of MPLS labels, which need no change when a packet is cut.
const MPLS: u16 = 0x8847;

/// An outer header and the tunnel's own behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Outer {
    ip: Ip,
    /// The tunnel's header has a checksum over all that follows.
    checksum: bool,
}

/// Where the headers of a tunnel's super-frame are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nested {
    /// From the outermost inwards.
    outer: [Option<Outer>; MAX_OUTER],
    inner: Transport,
}

/// An IP header at `at` that belongs to a packet reaching to the frame's end.
fn whole(frame: &[u8], at: usize, v6: bool) -> Option<Ip> {
    let ip = Ip::at(frame, at, v6).filter(|ip| ip.end(frame) == Some(frame.len()))?;
    (v6 || fold(sum(frame.get(ip.l3..ip.l4)?)) == 0xffff).then_some(ip)
}

/// The tunnel that a packet is, and where what it carries can begin.
fn tunnel(frame: &[u8], ip: Ip) -> Option<(Outer, usize)> {
    let (checksum, behind) = match ip.protocol {
        UDP => (be16(frame, ip.l4 + 6)? != 0, ip.l4 + 8),
        GRE => {
            // RFC 2890; a sequence number would differ from segment to segment, and no stack cuts such packets.
            let flags = be16(frame, ip.l4)?;
            let (checksum, key) = (flags & 0x8000 != 0, flags & 0x2000 != 0);
            if flags & !0xa000 != 0 {
                return None;
            }
            (checksum, ip.l4 + 4 + 4 * (usize::from(checksum) + usize::from(key)))
        }
        IP_IN_IP | IPV6_IN_IP => (false, ip.l4),
        _ => return None,
    };
    Some((Outer { ip, checksum }, behind))
}

/// The next IP header inwards from `from`. `start`: where the innermost transport header is, when that is known.
fn inwards(frame: &[u8], from: usize, start: Option<usize>) -> Option<Ip> {
    let last = start.unwrap_or(usize::MAX).min(from + MAX_BETWEEN).min(frame.len());
    (from..=last).find_map(|at| {
        let version = frame.get(at)? >> 4;
        let (v6, ethertype) = match version {
            4 => (false, ethertype::IPV4),
            6 => (true, ethertype::IPV6),
            _ => return None,
        };
        let ip = whole(frame, at, v6)?;
        let announced = at == from || be16(frame, at - 2) == Some(ethertype);
        (announced || start == Some(ip.l4)).then_some(ip)
    })
}

/// Goes inwards to the header of the packet whose transport header begins at `start`, or that is TCP.
fn walk(frame: &[u8], header: &Header, start: Option<usize>) -> Option<([Option<Outer>; MAX_OUTER], Ip)> {
    let mut outer = [None; MAX_OUTER];
    let mut ip = match header.ethertype {
        ethertype::IPV4 => Ip::at(frame, header.payload, false)?,
        ethertype::IPV6 => Ip::at(frame, header.payload, true)?,
        MPLS => inwards(frame, header.payload, start)?,
        _ => return None,
    };
    for place in &mut outer {
        if start.map_or(ip.protocol == TCP, |start| ip.l4 == start) {
            break;
        }
        let (found, behind) = tunnel(frame, ip)?;
        *place = Some(found);
        ip = inwards(frame, behind, start)?;
    }
    start.map_or(ip.protocol == TCP, |start| ip.l4 == start).then_some((outer, ip))
}

/// The IP header of the packet whose checksum is to be completed, which a tunnel may carry.
pub fn at_checksum(frame: &[u8], header: &Header, partial: Partial) -> Option<Ip> {
    walk(frame, header, Some(partial.start.into())).map(|(_, ip)| ip)
}

/// Whether a frame is a tunnel's super-frame that can be cut, and how. Ordinary frames and plain super-frames are not.
pub fn find(frame: &[u8], offload: &Offload) -> Option<Nested> {
    if !offload.is_super() || offload.segment_size == 0 {
        return None;
    }
    let header = Header::parse(frame).ok()?;
    let plain = Transport::find(frame, &header).filter(|transport| transport.is(offload.segmentation));
    if plain.is_some_and(|transport| offload.checksum.is_none_or(|partial| partial == transport.checksum())) {
        return None;
    }
    let (outer, ip) = walk(frame, &header, offload.checksum.map(|partial| partial.start.into()))?;
    let inner = Transport::within(frame, &ip)
        .filter(|t| t.is(offload.segmentation) && t.payload < frame.len() && t.payload <= MAX_HEADERS)
        .filter(|t| offload.checksum.is_none_or(|partial| partial == t.checksum()))?;
    ((frame.len() - inner.payload).div_ceil(offload.segment_size.into()) <= MAX_SEGMENTS).then_some(Nested { outer, inner })
}

impl Nested {
    /// Cuts the frame it was found in into `out`, one frame behind the other with nothing left to do to any. Returns the length
    /// of each but the last, which may be shorter.
    pub fn cut(&self, frame: &[u8], segment_size: u16, out: &mut Vec<u8>) -> usize {
        out.clear();
        let inner = &self.inner;
        let Some((headers, payload)) = frame.split_at_checked(inner.payload) else { return 0 };
        for (index, piece) in payload.chunks(usize::from(segment_size.max(1))).enumerate() {
            let from = out.len();
            out.extend_from_slice(headers);
            out.extend_from_slice(piece);
            let segment = &mut out[from..];
            let start = index * usize::from(segment_size);
            let part = Part { start, len: piece.len(), last: start + piece.len() == payload.len() };
            inner.cut(&mut segment[..inner.payload], part, segment_size);
            // Cannot fail: the place was found in this very frame.
            let _ = complete(segment, inner.checksum());
            // Inwards out: an outer checksum covers what is within.
            self.outer.iter().rev().flatten().for_each(|outer| outer.fit(segment, index));
        }
        inner.payload + usize::from(segment_size)
    }
}

impl Outer {
    /// Makes the headers fit the packet that reaches to the end of `frame`.
    fn fit(&self, frame: &mut [u8], index: usize) {
        let ip = &self.ip;
        ip.fit(frame, frame.len() - ip.l3, index);
        let len = frame.len() - ip.l4;
        match ip.protocol {
            UDP => {
                put16(frame, ip.l4 + 4, len as u16);
                if self.checksum {
                    put16(frame, ip.l4 + 6, ip.pseudo(frame, len));
                    let _ = complete(frame, Partial { start: ip.l4 as u16, offset: UDP_CHECKSUM });
                }
            }
            GRE if self.checksum => {
                put16(frame, ip.l4 + 4, 0);
                let _ = complete(frame, Partial { start: ip.l4 as u16, offset: 4 });
            }
            _ => (),
        }
    }
}

#[cfg(test)]
#[path = "nested_tests.rs"]
mod tests;
