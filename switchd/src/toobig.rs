//! "Packet too big", said on behalf of a gateway that cannot pass a packet on.

use crate::transport::{fold, sum};
use violin_common::wire::ethernet::{Header, ethertype};

/// Bytes of the offending packet sent back over IPv4: header and as much as routers usually give.
const QUOTE4: usize = 128;
/// The same over IPv6; the whole answer must fit 1280 bytes (RFC 4443 §2.4).
const QUOTE6: usize = 512;

/// Makes the answer to a frame (its first part holds all headers): ICMP "fragmentation needed" (RFC 1191) for IPv4 packets
/// that may not be fragmented, ICMPv6 "packet too big" (RFC 4443 §3.2) for IPv6; `None` for everything else, for group
/// addresses and for ICMP errors, which are never answered (RFC 1122 §3.2.2).
///
/// The answer comes from the packet's destination, the only address known to lie behind the gateway.
pub fn answer(parts: &[&[u8]], header: &Header, mtu: u16) -> Option<Vec<u8>> {
    if header.destination.is_group() {
        return None;
    }
    let mut quote: Vec<u8> = Vec::with_capacity(QUOTE6);
    for part in parts {
        quote.extend_from_slice(&part[..part.len().min(header.payload + QUOTE6 - quote.len())]);
    }
    let (l2, packet) = quote.split_at_checked(header.payload)?;
    let mut out = Vec::with_capacity(header.payload + 60 + QUOTE6);
    out.extend_from_slice(&header.source.0);
    out.extend_from_slice(&header.destination.0);
    out.extend_from_slice(l2.get(12..)?);
    match header.ethertype {
        ethertype::IPV4 => answer4(packet, mtu, &mut out)?,
        ethertype::IPV6 => answer6(packet, mtu, &mut out)?,
        _ => return None,
    }
    Some(out)
}

fn answer4(packet: &[u8], mtu: u16, out: &mut Vec<u8>) -> Option<()> {
    let fixed = packet.first_chunk::<20>()?;
    let (may_fragment, later_fragment) = (fixed[6] & 0x40 == 0, (fixed[6] & 0x1f) | fixed[7] != 0);
    // ICMP errors are types 3, 4, 5, 11 and 12.
    let icmp_error = fixed[9] == 1 && matches!(packet.get(usize::from(fixed[0] & 0xf) * 4)?, 3 | 4 | 5 | 11 | 12);
    if fixed[0] >> 4 != 4 || may_fragment || later_fragment || icmp_error {
        return None;
    }
    let quote = &packet[..packet.len().min(QUOTE4)];
    let mut ip = [0x45, 0xc0, 0, 0, 0, 0, 0, 0, 64, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    ip[2..4].copy_from_slice(&((28 + quote.len()) as u16).to_be_bytes());
    ip[12..16].copy_from_slice(&fixed[16..20]);
    ip[16..20].copy_from_slice(&fixed[12..16]);
    let check = !fold(sum(&ip));
    ip[10..12].copy_from_slice(&check.to_be_bytes());
    let mut icmp = [3, 4, 0, 0, 0, 0, 0, 0];
    icmp[6..8].copy_from_slice(&mtu.to_be_bytes());
    let check = !fold(sum(&icmp) + sum(quote));
    icmp[2..4].copy_from_slice(&check.to_be_bytes());
    out.extend_from_slice(&ip);
    out.extend_from_slice(&icmp);
    out.extend_from_slice(quote);
    Some(())
}

fn answer6(packet: &[u8], mtu: u16, out: &mut Vec<u8>) -> Option<()> {
    let fixed = packet.first_chunk::<40>()?;
    let icmp_error = fixed[6] == 58 && packet.get(40)? < &128;
    if fixed[0] >> 4 != 6 || icmp_error || fixed[24] == 0xff {
        return None;
    }
    let quote = &packet[..packet.len().min(QUOTE6)];
    let len = 8 + quote.len();
    let mut ip = [0; 40];
    ip[0] = 0x60;
    ip[4..6].copy_from_slice(&(len as u16).to_be_bytes());
    (ip[6], ip[7]) = (58, 64);
    ip[8..24].copy_from_slice(&fixed[24..40]);
    ip[24..40].copy_from_slice(&fixed[8..24]);
    let mut icmp = [2, 0, 0, 0, 0, 0, 0, 0];
    icmp[4..8].copy_from_slice(&u32::from(mtu).to_be_bytes());
    let check = !fold(sum(&ip[8..40]) + 58 + len as u64 + sum(&icmp) + sum(quote));
    icmp[2..4].copy_from_slice(&check.to_be_bytes());
    out.extend_from_slice(&ip);
    out.extend_from_slice(&icmp);
    out.extend_from_slice(quote);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{PacketBuilder, SlicedPacket};

    fn ask(frame: &[u8]) -> Option<Vec<u8>> {
        answer(&[frame], &Header::parse(frame).unwrap(), 1400)
    }

    #[test]
    fn ipv4_is_answered_with_a_valid_fragmentation_needed() {
        let mut frame = Vec::new();
        let builder = PacketBuilder::ethernet2([2; 6], [4; 6]).ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64).udp(1, 2);
        builder.write(&mut frame, &[7; 1500]).unwrap();

        let answer = ask(&frame).unwrap();

        let parsed = SlicedPacket::from_ethernet(&answer).unwrap();
        let etherparse::TransportSlice::Icmpv4(icmp) = parsed.transport.unwrap() else { panic!("not ICMP") };
        assert_eq!((icmp.type_u8(), icmp.code_u8()), (3, 4));
        assert_eq!(icmp.bytes5to8()[2..], 1400u16.to_be_bytes());
        assert_eq!(fold(sum(icmp.slice())), 0xffff);
        assert_eq!(&answer[..12], [2, 2, 2, 2, 2, 2, 4, 4, 4, 4, 4, 4]);
    }

    #[test]
    fn ipv6_is_answered_with_a_valid_packet_too_big() {
        let mut frame = Vec::new();
        let builder = PacketBuilder::ethernet2([2; 6], [4; 6]).ipv6([1; 16], [2; 16], 64).udp(1, 2);
        builder.write(&mut frame, &[7; 1500]).unwrap();

        let answer = ask(&frame).unwrap();

        let parsed = SlicedPacket::from_ethernet(&answer).unwrap();
        let etherparse::TransportSlice::Icmpv6(icmp) = parsed.transport.unwrap() else { panic!("not ICMPv6") };
        assert_eq!(icmp.type_u8(), 2);
        assert!(icmp.is_checksum_valid([2; 16], [1; 16]));
    }

    #[test]
    fn arp_broadcasts_and_cut_off_packets_are_not_answered() {
        let mut frame = vec![2; 12];
        frame.extend([8, 6, 0, 1]);
        assert_eq!(ask(&frame), None);
        let mut frame = vec![0xff; 6];
        frame.extend([2, 2, 2, 2, 2, 2, 8, 0]);
        frame.extend([0x45; 40]);
        assert_eq!(ask(&frame), None);
        for len in 0..24 {
            let mut frame = vec![2; 12];
            frame.extend([8, 0]);
            frame.extend(vec![0x45; len]);
            let _ = ask(&frame);
        }
    }
}
