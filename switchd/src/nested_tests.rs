use super::*;
use etherparse::PacketBuilder;
use proptest::prelude::*;
use violin_common::wire::mesh::Segmentation;

/// A tunnel's headers around a packet.
#[derive(Debug, Clone, Copy)]
enum Shell {
    Vxlan { v6: bool, checksum: bool },
    Geneve { v6: bool, options: usize },
    Gre { v6: bool, checksum: bool, key: bool },
    IpInIp { v6: bool },
}
use Shell::*;

impl Shell {
    fn v6(self) -> bool {
        let (Vxlan { v6, .. } | Geneve { v6, .. } | Gre { v6, .. } | IpInIp { v6 }) = self;
        v6
    }
}

const ETHERNET: [u8; 12] = [2, 2, 2, 2, 2, 2, 4, 4, 4, 4, 4, 4];

fn ethertype_of(v6: bool) -> [u8; 2] {
    if v6 { [0x86, 0xdd] } else { [8, 0] }
}

fn ip(v6: bool, protocol: u8, body: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    if v6 {
        PacketBuilder::ipv6([1; 16], [2; 16], 64).write(&mut packet, protocol.into(), body).unwrap();
    } else {
        PacketBuilder::ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64).write(&mut packet, protocol.into(), body).unwrap();
    }
    packet
}

/// The sum of a UDP header's own packet, which is what a stack leaves there of a super-frame that wants checksums.
fn udp(v6: bool, checksum: bool, port: u16, body: &[u8]) -> Vec<u8> {
    let len = (8 + body.len()) as u16;
    let field = [0, u8::from(checksum)];
    let header = [&[0x12, 0x34][..], &port.to_be_bytes(), &len.to_be_bytes(), &field].concat();
    ip(v6, 17, &[&header[..], body].concat())
}

fn wrap(shell: Shell, v6: bool, packet: &[u8]) -> Vec<u8> {
    let framed = [&ETHERNET[..], &ethertype_of(v6), packet].concat();
    match shell {
        Vxlan { v6, checksum } => udp(v6, checksum, 4789, &[&[8, 0, 0, 0, 0, 0, 9, 0][..], &framed].concat()),
        Geneve { v6, options } => {
            let header = [&[(options / 4) as u8, 0, 0x65, 0x58, 0, 0, 9, 0][..], &vec![0x45; options]].concat();
            udp(v6, false, 6081, &[&header[..], &framed].concat())
        }
        Gre { v6: outer, checksum, key } => {
            let flags = if checksum { 0x80 } else { 0 } | if key { 0x20 } else { 0 };
            let mut header = [&[flags, 0][..], &ethertype_of(v6)].concat();
            header.extend(if checksum { &[0; 4][..] } else { &[] });
            header.extend(if key { &[0, 0, 0, 7][..] } else { &[] });
            ip(outer, 47, &[&header[..], packet].concat())
        }
        IpInIp { v6: outer } => ip(outer, if v6 { 41 } else { 4 }, packet),
    }
}

/// A super-frame as a packet socket reports it.
fn super_frame(shells: &[Shell], v6: bool, tcp: bool, payload: &[u8], segment_size: u16) -> (Vec<u8>, Offload) {
    let mut packet = Vec::new();
    let (v4, v6_builder) = (PacketBuilder::ipv4([10, 9, 0, 1], [10, 9, 0, 2], 64), PacketBuilder::ipv6([3; 16], [4; 16], 64));
    let builder = if v6 { v6_builder } else { v4 };
    if tcp {
        builder.tcp(5, 6, 1000, 4096).ack(77).psh().write(&mut packet, payload).unwrap();
    } else {
        builder.udp(5, 6).write(&mut packet, payload).unwrap();
    }
    let (behind, mut innermost) = (packet.len() - if v6 { 40 } else { 20 }, v6);
    for shell in shells.iter().rev() {
        packet = wrap(*shell, innermost, &packet);
        innermost = shell.v6();
    }
    let frame = [&ETHERNET[..], &ethertype_of(innermost), &packet].concat();
    let start = (frame.len() - behind) as u16;
    let segmentation = match (tcp, v6) {
        (true, false) => Segmentation::Tcp4,
        (true, true) => Segmentation::Tcp6,
        (false, _) => Segmentation::Udp,
    };
    let checksum = Some(Partial { start, offset: if tcp { 16 } else { 6 } });
    (frame, Offload { checksum, segmentation, segment_size, ecn: false, header_len: 0 })
}

fn checked_ip(packet: &[u8], v6: bool) -> (u64, &[u8]) {
    if v6 {
        assert_eq!(usize::from(be16(packet, 4).unwrap()), packet.len() - 40);
        return (sum(&packet[8..40]) + u64::from(packet[6]), &packet[40..]);
    }
    assert_eq!(usize::from(be16(packet, 2).unwrap()), packet.len());
    assert_eq!(fold(sum(&packet[..20])), 0xffff, "the IPv4 header's checksum");
    (sum(&packet[12..20]) + u64::from(packet[9]), &packet[20..])
}

fn checked_udp(pseudo: u64, datagram: &[u8], wants: bool) -> &[u8] {
    assert_eq!(usize::from(be16(datagram, 4).unwrap()), datagram.len());
    assert_eq!(be16(datagram, 6) != Some(0), wants, "a checksum stays what it was: there or not");
    if wants {
        assert_eq!(fold(pseudo + datagram.len() as u64 + sum(datagram)), 0xffff, "the UDP checksum");
    }
    &datagram[8..]
}

/// Takes a segment apart and checks every length and checksum. Returns TCP's sequence number and the payload.
fn checked<'a>(frame: &'a [u8], shells: &[Shell], v6: bool, tcp: bool) -> (u32, &'a [u8]) {
    let mut packet = &frame[14..];
    for shell in shells {
        let (pseudo, body) = checked_ip(packet, shell.v6());
        packet = match *shell {
            Vxlan { checksum, .. } => &checked_udp(pseudo, body, checksum)[8 + 14..],
            Geneve { options, .. } => &checked_udp(pseudo, body, false)[8 + options + 14..],
            Gre { checksum, key, .. } => {
                assert!(!checksum || fold(sum(body)) == 0xffff, "GRE's checksum");
                &body[4 + 4 * (usize::from(checksum) + usize::from(key))..]
            }
            IpInIp { .. } => body,
        };
    }
    let (pseudo, body) = checked_ip(packet, v6);
    if !tcp {
        return (0, checked_udp(pseudo, body, true));
    }
    assert_eq!(fold(pseudo + body.len() as u64 + sum(body)), 0xffff, "the TCP checksum");
    (u32::from_be_bytes(*body[4..].first_chunk().unwrap()), &body[20..])
}

fn shells() -> impl Strategy<Value = Vec<Shell>> {
    let shell = prop_oneof![
        any::<(bool, bool)>().prop_map(|(v6, checksum)| Vxlan { v6, checksum }),
        (any::<bool>(), 0usize..10).prop_map(|(v6, words)| Geneve { v6, options: words * 4 }),
        any::<(bool, bool, bool)>().prop_map(|(v6, checksum, key)| Gre { v6, checksum, key }),
        any::<bool>().prop_map(|v6| IpInIp { v6 }),
    ];
    // Two IPv6 tunnels with all options would be longer than headers may be.
    proptest::collection::vec(shell, 1..3)
        .prop_filter("longest headers", |shells| super_frame(shells, true, true, &[0; 8], 4).1.checksum.unwrap().start < 236)
}

proptest! {
    #[test]
    fn a_tunnels_super_frame_becomes_what_a_stack_would_have_sent(
        shells in shells(), v6 in any::<bool>(), tcp in any::<bool>(), len in 2usize..20_000, size in 100u16..1500, known in any::<bool>(),
    ) {
        let payload: Vec<u8> = (0..len).map(|i| (i * 7) as u8).collect();
        let (frame, mut offload) = super_frame(&shells, v6, tcp, &payload, size);
        if tcp && !known {
            // As of a super-frame that was put together on the way: its checksums have been looked at.
            offload.checksum = None;
        }
        let nested = find(&frame, &offload).expect("recognised");
        let mut out = Vec::new();
        let each = nested.cut(&frame, size, &mut out);

        let (mut got, mut pieces) = (Vec::new(), 0);
        for segment in out.chunks(each) {
            let (sequence, piece) = checked(segment, &shells, v6, tcp);
            prop_assert!(!tcp || sequence == 1000 + got.len() as u32);
            prop_assert!(piece.len() <= usize::from(size));
            got.extend_from_slice(piece);
            pieces += 1;
        }
        prop_assert_eq!(got, payload);
        prop_assert_eq!(pieces, len.div_ceil(size.into()));
    }

    #[test]
    fn no_spoiled_tunnel_panics(
        shells in shells(), v6 in any::<bool>(), tcp in any::<bool>(), len in 1usize..4000, size in 0u16..1500, start in proptest::option::of(0u16..300),
        spoils in proptest::collection::vec((12usize..260, any::<u8>()), 0..4), cut in any::<prop::sample::Index>(), kind in 0usize..4,
    ) {
        let (mut frame, mut offload) = super_frame(&shells, v6, tcp, &vec![0x45; len], size);
        for (at, value) in spoils {
            frame.get_mut(at).into_iter().for_each(|byte| *byte = value);
        }
        if let Some(start) = start {
            offload.checksum = Some(Partial { start, offset: 16 });
            frame.truncate(cut.index(frame.len()));
        }
        offload.segmentation = [offload.segmentation, offload.segmentation, Segmentation::Tcp4, Segmentation::Udp][kind];
        if let Some(nested) = find(&frame, &offload) {
            nested.cut(&frame, offload.segment_size, &mut Vec::new());
        }
        if let Ok(header) = Header::parse(&frame) {
            let _ = at_checksum(&frame, &header, Partial { start: start.unwrap_or(99), offset: 8 });
        }
    }
}

#[test]
fn what_is_plain_or_cannot_be_cut_right_is_left_alone() {
    let vxlan = [Vxlan { v6: false, checksum: false }];
    let (frame, offload) = super_frame(&vxlan, false, true, &[7; 4000], 1000);
    assert!(find(&frame, &offload).is_some());
    assert_eq!(find(&frame, &Offload { segmentation: Segmentation::None, ..offload }), None, "an ordinary frame");
    assert_eq!(find(&frame, &Offload { segmentation: Segmentation::Tcp6, ..offload }), None, "something else within");
    assert_eq!(find(&frame, &Offload { segment_size: 2, ..offload }), None, "too many segments");
    let mut longer = frame.clone();
    longer.push(0);
    assert_eq!(find(&longer, &Offload { checksum: None, ..offload }), None, "nothing within reaches to the end");

    let (plain, offload) = super_frame(&[], false, true, &[7; 4000], 1000);
    assert_eq!(find(&plain, &offload), None);
    let (plain, offload) = super_frame(&[], true, false, &[7; 4000], 1000);
    assert_eq!(find(&plain, &offload), None);

    let (mut numbered, offload) = super_frame(&[Gre { v6: false, checksum: false, key: true }], false, true, &[7; 4000], 1000);
    numbered[34] |= 0x10;
    assert_eq!(find(&numbered, &offload), None, "GRE with sequence numbers");
}

#[test]
fn a_vlan_tag_within_a_tunnel_and_mpls_labels_are_copied() {
    let (inner, _) = super_frame(&[], false, true, &[7; 4000], 1000);
    let tagged = [&ETHERNET[..], &[0x81, 0, 0, 5, 8, 0], &inner[14..]].concat();
    let packet = udp(false, false, 4789, &[&[8, 0, 0, 0, 0, 0, 9, 0][..], &tagged].concat());
    let labelled = [&ETHERNET[..], &[0x88, 0x47, 0, 1, 1, 64], &inner[14..]].concat();
    for frame in [[&ETHERNET[..], &[8, 0], &packet].concat(), labelled] {
        let start = (frame.len() - 4020) as u16;
        let checksum = Some(Partial { start, offset: 16 });
        let offload = Offload { checksum, segmentation: Segmentation::Tcp4, segment_size: 1000, ecn: false, header_len: 0 };
        let mut out = Vec::new();
        let each = find(&frame, &offload).expect("recognised").cut(&frame, 1000, &mut out);
        let pieces: Vec<&[u8]> = out.chunks(each).collect();
        assert_eq!(pieces.len(), 4);
        for piece in pieces {
            assert_eq!(piece[..34 - 20], frame[..34 - 20]);
            checked_ip(&piece[usize::from(start) - 20..], false);
        }
    }
}
