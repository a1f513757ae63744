use super::*;
use etherparse::PacketBuilder;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use std::cell::Cell;

/// A TCP super-frame with a partial checksum, as a TAP gives it.
fn super_frame(v6: bool, payload: &[u8], fin: bool) -> Vec<u8> {
    let mut frame = Vec::new();
    let builder = PacketBuilder::ethernet2([2; 6], [4; 6]);
    let builder = if v6 { builder.ipv6([1; 16], [2; 16], 64) } else { builder.ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64) };
    let builder = builder.tcp(5, 6, 1000, 4096).ack(77).psh();
    let builder = if fin { builder.fin() } else { builder };
    builder.write(&mut frame, payload).unwrap();
    let header = ethernet::Header::parse(&frame).unwrap();
    let transport = Transport::find(&frame, &header).unwrap();
    let pseudo = transport.pseudo(&frame, frame.len() - transport.l4);
    let Partial { start, offset } = transport.checksum();
    put16(&mut frame, usize::from(start + offset), pseudo);
    frame
}

proptest! {
    #[test]
    fn no_bytes_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), ethertype in 0usize..3, size in any::<u16>(),
                      start in any::<u16>(), offset in any::<u16>(), kind in 0usize..4, mtu in any::<u16>()) {
        if bytes.len() > 15 {
            bytes[12..14].copy_from_slice(&[[8, 0], [0x86, 0xdd], [0x81, 0]][ethertype]);
            bytes[14] = [0x45, 0x60, 0x4f][ethertype];
        }
        let Ok(header) = ethernet::Header::parse(&bytes) else { return Ok(()) };
        let segmentation = [Segmentation::None, Segmentation::Tcp4, Segmentation::Tcp6, Segmentation::Udp][kind];
        let _ = guess(&bytes, &header, mtu);
        let offload = Offload { checksum: Some(Partial { start, offset }), segmentation, segment_size: size, ecn: false, header_len: 0 };
        if let Ok((offload, Some(transport))) = settle(&mut bytes, &header, offload) {
            segments(&bytes, &transport, offload.segment_size, &mut Vec::new(), |_, _| ());
        }
    }

    #[test]
    fn segments_are_what_a_stack_would_have_sent(len in 1usize..20_000, size in 100u16..1500, v6 in any::<bool>(), fin in any::<bool>()) {
        let payload: Vec<u8> = (0..len).map(|i| i as u8).collect();
        let frame = super_frame(v6, &payload, fin);
        let header = ethernet::Header::parse(&frame).unwrap();
        let transport = Transport::find(&frame, &header).unwrap();
        let (mut bytes, mut seq, mut last_flags) = (Vec::new(), 1000u32, 0);

        segments(&frame, &transport, size, &mut Vec::new(), |segment, offload| {
            complete(segment, offload.checksum.unwrap()).unwrap();
            let parsed = etherparse::SlicedPacket::from_ethernet(segment).unwrap();
            let Some(etherparse::TransportSlice::Tcp(tcp)) = parsed.transport else { panic!("not TCP") };
            assert_eq!(tcp.sequence_number(), seq);
            assert!(tcp.payload().len() <= usize::from(size));
            assert!(!tcp.fin() || bytes.len() + tcp.payload().len() == len);
            let sum = match parsed.net.unwrap() {
                etherparse::NetSlice::Ipv4(ip) => {
                    assert_eq!(ip.header().header_checksum(), ip.header().to_header().calc_header_checksum());
                    tcp.calc_checksum_ipv4(ip.header().source(), ip.header().destination()).unwrap()
                }
                etherparse::NetSlice::Ipv6(ip) => tcp.calc_checksum_ipv6(ip.header().source(), ip.header().destination()).unwrap(),
                _ => panic!("not IP"),
            };
            assert_eq!(tcp.checksum(), sum);
            seq = seq.wrapping_add(tcp.payload().len() as u32);
            last_flags = u8::from(tcp.fin()) | u8::from(tcp.psh()) << 1;
            bytes.extend_from_slice(tcp.payload());
        });

        prop_assert_eq!(bytes, payload);
        prop_assert_eq!(last_flags, u8::from(fin) | 2);
    }
}

/// Real frames with some header bytes changed: most are still cut into segments.
#[test]
fn no_spoiled_header_panics() {
    let spoils = proptest::collection::vec((12usize..80, any::<u8>()), 0..4);
    let cases = (any::<bool>(), 1usize..9000, any::<bool>(), spoils, 0u16..3000, 0usize..4, proptest::option::of(0u16..90));
    let (settled, cut, guessed) = (Cell::new(0), Cell::new(0), Cell::new(0));
    let count = |cell: &Cell<u32>| cell.set(cell.get() + 1);
    let played = TestRunner::new(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() }).run(
        &cases,
        |(v6, len, fin, spoils, segment_size, kind, start)| {
            let mut frame = super_frame(v6, &vec![7; len], fin);
            for (at, value) in spoils {
                frame.get_mut(at).into_iter().for_each(|byte| *byte = value);
            }
            let Ok(header) = ethernet::Header::parse(&frame) else { return Ok(()) };
            if guess(&frame, &header, 1400) != Offload::default() {
                count(&guessed);
            }
            // Mostly what the frame is.
            let own = if v6 { Segmentation::Tcp6 } else { Segmentation::Tcp4 };
            let segmentation = [own, own, Segmentation::None, Segmentation::Udp][kind];
            let checksum = start.map(|start| Partial { start, offset: TCP_CHECKSUM });
            let offload = Offload { checksum, segmentation, segment_size, ecn: false, header_len: 0 };
            if let Ok((offload, transport)) = settle(&mut frame, &header, offload) {
                count(&settled);
                let Some(transport) = transport else { return Ok(()) };
                let mut pieces = 0;
                segments(&frame, &transport, offload.segment_size, &mut Vec::new(), |segment, offload| {
                    pieces += 1;
                    let _ = complete(segment, offload.checksum.unwrap());
                });
                if pieces > 1 {
                    count(&cut);
                }
            }
            Ok(())
        },
    );
    played.unwrap();
    let reached = [&settled, &cut, &guessed].map(Cell::get);
    assert!(reached.iter().all(|count| *count > 20), "settled, cut, guessed: {reached:?}");
}

#[test]
fn a_frame_with_an_unfilled_checksum_and_a_super_frame_are_recognised() {
    let frame = super_frame(false, &[7; 4000], false);
    let header = ethernet::Header::parse(&frame).unwrap();
    let offload = guess(&frame, &header, 1400);
    assert_eq!((offload.segmentation, offload.segment_size), (Segmentation::Tcp4, 1360));

    let mut frame = super_frame(true, &[7; 400], false);
    let offload = guess(&frame, &header_of(&frame), 1400);
    assert!(offload.checksum.is_some() && !offload.is_super());

    complete(&mut frame, offload.checksum.unwrap()).unwrap();
    assert_eq!(guess(&frame, &header_of(&frame), 1400), Offload::default());
}

#[test]
fn a_checksum_of_zero_is_said_otherwise_by_udp_only() {
    // Words that sum to 0xffff: the complement is zero.
    for (offset, wanted) in [(UDP_CHECKSUM, 0xffff), (TCP_CHECKSUM, 0), (2, 0)] {
        let mut frame = vec![0; 20];
        frame[18..].copy_from_slice(&[0xff, 0xff]);
        complete(&mut frame, Partial { start: 0, offset }).unwrap();
        assert_eq!(be16(&frame, usize::from(offset)), Some(wanted), "checksum at {offset}");
    }
}

fn header_of(frame: &[u8]) -> ethernet::Header {
    ethernet::Header::parse(frame).unwrap()
}

#[test]
fn a_tunnels_super_frame_called_tcp_is_refused() {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2([2; 6], [4; 6])
        .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
        .udp(1, 4789)
        .write(&mut frame, &[0; 3000])
        .unwrap();
    let header = header_of(&frame);
    let checksum = Some(Partial { start: 84, offset: 16 });
    let offload = Offload { checksum, segmentation: Segmentation::Tcp4, segment_size: 1348, ecn: false, header_len: 104 };
    assert_eq!(settle(&mut frame, &header, offload), Err(DropReason::Segmentation));
}

#[test]
fn a_super_frame_of_too_many_segments_is_refused() {
    for (size, refused) in [(1, true), (42, true), (43, false), (1300, false)] {
        let mut frame = super_frame(false, &[7; 60_000], false);
        let header = header_of(&frame);
        let offload =
            Offload { checksum: None, segmentation: Segmentation::Tcp4, segment_size: size, ecn: false, header_len: 54 };
        let settled = settle(&mut frame, &header, offload);
        assert_eq!(settled.err(), refused.then_some(DropReason::Segmentation), "segments of {size}");
    }
    // Few are fine, however small: UDP_SEGMENT lets a program choose.
    let mut frame = super_frame(false, &[7; 100], false);
    let header = header_of(&frame);
    let offload = Offload { checksum: None, segmentation: Segmentation::Tcp4, segment_size: 1, ecn: false, header_len: 54 };
    assert!(settle(&mut frame, &header, offload).is_ok());
}

#[test]
fn a_crc_of_sctp_is_the_one_of_its_standard() {
    // The check value of CRC-32C in all catalogues.
    assert_eq!(crc32c(b"123456789"), 0xe306_9283);
}

/// A frame that carries SCTP with nothing in its checksum's place, and where that is summed from.
fn sctp(v6: bool, tunnel: bool) -> (Vec<u8>, u16) {
    let packet = [&[0, 7, 0, 9, 1, 2, 3, 4, 0, 0, 0, 0][..], &[0x2a; 333]].concat();
    let mut frame = Vec::new();
    let builder = PacketBuilder::ethernet2([2; 6], [4; 6]);
    let builder = if v6 { builder.ipv6([1; 16], [2; 16], 64) } else { builder.ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64) };
    builder.write(&mut frame, 132.into(), &packet).unwrap();
    if tunnel {
        let vxlan = [&[8, 0, 0, 0, 0, 0, 9, 0][..], &frame].concat();
        frame.clear();
        let builder = PacketBuilder::ethernet2([2; 6], [4; 6]).ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64);
        builder.udp(1, 4789).write(&mut frame, &vxlan).unwrap();
    }
    let start = (frame.len() - packet.len()) as u16;
    (frame, start)
}

#[test]
fn a_checksum_of_sctp_is_completed_as_a_crc_also_within_a_tunnel_and_before_padding() {
    for (v6, tunnel, padding) in [(false, false, 0), (true, false, 0), (false, true, 0), (true, true, 0), (false, false, 5)] {
        let (mut frame, start) = sctp(v6, tunnel);
        let (at, end) = (usize::from(start), frame.len());
        frame.extend(vec![0x55; padding]);
        let header = header_of(&frame);
        let partial = Partial { start, offset: SCTP_CHECKSUM };
        let before = frame.clone();

        let settled = settle(&mut frame, &header, Offload { checksum: Some(partial), ..Offload::default() });

        assert_eq!(settled, Ok((Offload::default(), None)));
        assert_eq!(frame[at + 8..at + 12], crc32c(&before[at..end]).to_le_bytes(), "v6 {v6}, tunnel {tunnel}");
        assert_eq!((&frame[..at + 8], &frame[at + 12..]), (&before[..at + 8], &before[at + 12..]), "nothing else changed");
    }
}

#[test]
fn an_sctp_packet_that_is_cut_off_is_refused() {
    let (mut frame, start) = sctp(false, false);
    frame.truncate(100);
    let header = header_of(&frame);
    let checksum = Some(Partial { start, offset: SCTP_CHECKSUM });
    assert_eq!(settle(&mut frame, &header, Offload { checksum, ..Offload::default() }), Err(DropReason::Checksum));
}

#[test]
fn checksums_of_dhcp_are_completed_and_those_of_other_udp_are_carried_partial() {
    for (from, to, complete) in [(68, 67, true), (67, 68, true), (1067, 67, true), (53, 1068, false), (680, 670, false)] {
        let mut frame = Vec::new();
        let builder = PacketBuilder::ethernet2([2; 6], [4; 6]).ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64);
        builder.udp(from, to).write(&mut frame, &[7; 300]).unwrap();
        let right = frame[40..42].to_vec();
        let header = header_of(&frame);
        let transport = Transport::find(&frame, &header).unwrap();
        let pseudo = transport.pseudo(&frame, 308);
        put16(&mut frame, 40, pseudo);

        let checksum = Some(transport.checksum());
        let (offload, _) = settle(&mut frame, &header, Offload { checksum, ..Offload::default() }).unwrap();

        assert_eq!(offload.checksum.is_none(), complete, "{from} to {to}");
        assert_eq!(frame[40..42] == right, complete, "{from} to {to}");
    }
}
