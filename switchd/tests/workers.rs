//! Workers joined in memory: no clock, no socket, no root.

use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use switchd::counters::Counters;
use switchd::drops::DropReason;
use switchd::fdb::Fdb;
use switchd::inbound::{Arrival, Merging};
use switchd::seal::cipher::{Choice, Library};
use switchd::seal::schedule::{SECRET_LEN, Secret};
use switchd::seal::sealing::Limits;
use switchd::seal::session::{Keys, Plain, Protection, Session};
use switchd::slice::Arena;
use switchd::tables::{Forwarding, Gate, Network, Owned, Peer, PeerSlot, Place, Port, PortSlot, SourceRule, WorkerEvent};
use switchd::virtio::{Offload, Partial};
use switchd::worker::{Delivered, Egress, Frame, Worker};
use violin_common::control::mesh::Aead;
use violin_common::wire::mesh::Segmentation;
use violin_common::{Instant, MacAddr, PortId, Vni};

const NOW: Instant = Instant(1_000_000_000);
const PORT: PortSlot = PortSlot(0);

#[derive(Default)]
struct Out {
    delivered: Vec<(PortSlot, Offload, Vec<u8>)>,
    /// Receiver, sender's slot for it, datagram.
    sent: Vec<(SocketAddr, Vec<u8>)>,
    events: Vec<WorkerEvent>,
    /// Has no room for events.
    deaf: bool,
    path_mtu: Option<u16>,
}

impl Egress for Out {
    fn deliver(
        &mut self,
        _: Instant,
        slot: PortSlot,
        _: &Port,
        offload: &Offload,
        parts: &[&[u8]],
    ) -> Result<Delivered, DropReason> {
        self.delivered.push((slot, *offload, parts.concat()));
        Ok(Delivered::Written)
    }

    fn path_mtu(&self, _: PortSlot) -> Option<u16> {
        self.path_mtu
    }

    fn send(&mut self, arena: &Arena) {
        for burst in arena.bursts() {
            let datagrams: Vec<_> = arena.bytes()[burst.start..burst.end].chunks(burst.segment).collect();
            assert_eq!(datagrams.len(), burst.count);
            assert!(burst.count <= 64 && burst.end - burst.start <= 65_507);
            self.sent.extend(datagrams.into_iter().map(|datagram| (burst.way.to, datagram.to_vec())));
        }
    }

    fn tell(&mut self, event: WorkerEvent) -> bool {
        if !self.deaf {
            self.events.push(event);
        }
        !self.deaf
    }
}

struct Host {
    worker: Worker,
    tables: Forwarding,
    counters: Arc<Counters>,
    out: Out,
}

fn address(host: usize) -> SocketAddr {
    format!("10.0.0.{host}:7471").parse().unwrap()
}

fn vni(value: u32) -> Vni {
    Vni::new(value).unwrap()
}

fn mac(last: u8) -> MacAddr {
    MacAddr([0x52, 0x54, 0, 0, 0, last])
}

/// `count` hosts with one port each in network 5, full mesh; slot of a peer = its number.
fn hosts(count: usize, mtu: u16, max_datagram: u16) -> Vec<Host> {
    (0..count).map(|me| host(me, count, mtu, max_datagram, sealed)).collect()
}

/// Likewise, and data is not sealed: what is spoilt on the way is read all the same, as from a member that means no good.
fn plain_hosts(count: usize, mtu: u16, max_datagram: u16) -> Vec<Host> {
    (0..count).map(|me| host(me, count, mtu, max_datagram, plain)).collect()
}

/// The index that host `at` gave host `other`.
fn index(at: usize, other: usize) -> u32 {
    (at * 100 + other) as u32
}

fn session(me: usize, other: usize, protection: Protection) -> Arc<Session> {
    Arc::new(Session { index: index(me, other), receiver: index(other, me), protection })
}

fn sealed(me: usize, other: usize) -> Arc<Session> {
    let choice = Choice { aead: Aead::Aes256Gcm, library: Library::Ring };
    let secret = Secret::new([(me.min(other) * 10 + me.max(other)) as u8; SECRET_LEN]);
    session(me, other, Protection::Sealed(Keys::new(&secret, me < other, (1, 1), choice)))
}

fn plain(me: usize, other: usize) -> Arc<Session> {
    let (ours, theirs) = (index(me, other).into(), index(other, me).into());
    session(me, other, Protection::Plain(Plain { ours, theirs, interface: 3 }))
}

fn host(me: usize, count: usize, mtu: u16, max_datagram: u16, session: impl Fn(usize, usize) -> Arc<Session>) -> Host {
    let others: Vec<_> = (0..count).filter(|&other| other != me).map(|other| PeerSlot(other as u16)).collect();
    let port = |id, vni| Port {
        id: PortId(id),
        vni,
        source: SourceRule::Learn,
        gate: Gate::Open,
        gateway: false,
        traffic: Arc::default(),
    };
    let network = |ports| Network {
        mtu,
        ageing: Duration::from_secs(300),
        ports,
        peers: others.clone(),
        owned: HashMap::new(),
        fdb: Arc::new(Fdb::default()),
    };
    let sessions: HashMap<usize, _> = others.iter().map(|other| usize::from(other.0)).map(|o| (o, session(me, o))).collect();
    let peer = |other: usize| Peer {
        host: format!("h{other}").parse().unwrap(),
        address: address(other),
        ours: None,
        session: Arc::clone(&sessions[&other]),
        max_datagram,
        networks: HashSet::from([vni(5)]),
        traffic: Arc::default(),
    };
    let tables = Forwarding {
        networks: HashMap::from([(vni(5), network(vec![PORT])), (vni(6), network(vec![PortSlot(1)]))]),
        ports: vec![Some(port(1, vni(5))), Some(port(2, vni(6)))],
        peers: (0..count).map(|other| (other != me).then(|| peer(other))).collect(),
        by_receiver: sessions
            .iter()
            .map(|(other, session)| (session.index, (PeerSlot(*other as u16), session.clone())))
            .collect(),
    };
    let counters = Arc::new(Counters::default());
    Host { worker: Worker::new(counters.clone(), Arc::default()), tables, counters, out: Out::default() }
}

impl Host {
    fn speak(&mut self, port: PortSlot, offload: Offload, frame: &[u8]) {
        let mut bytes = frame.to_vec();
        let mut frames = [Frame { offload: Ok(offload), bytes: &mut bytes }];
        self.worker.outbound(NOW, &self.tables, port, &mut frames, &mut self.out);
    }

    fn hear(&mut self, from: SocketAddr, datagrams: &[Vec<u8>]) {
        let mut datagrams = datagrams.to_vec();
        let mut merging = Merging::default();
        for datagram in &mut datagrams {
            let arrival = Arrival { from, interface: 3 };
            self.worker.inbound(NOW, &self.tables, arrival, datagram, &mut merging, &mut self.out);
        }
        self.worker.inbound_end(NOW, &self.tables, merging, &mut self.out);
    }

    fn network(&mut self) -> &mut Network {
        self.tables.networks.get_mut(&vni(5)).unwrap()
    }
}

/// Carries all datagrams to where they go, until none is under way. Returns how many there were.
fn carry(hosts: &mut [Host]) -> usize {
    let mut total = 0;
    loop {
        let mut moved = 0;
        for from in 0..hosts.len() {
            for (to, datagram) in std::mem::take(&mut hosts[from].out.sent) {
                let to = (0..hosts.len()).find(|&host| address(host) == to).expect("datagrams go to hosts");
                hosts[to].hear(address(from), &[datagram]);
                moved += 1;
            }
        }
        total += moved;
        assert!(total < 10_000, "a loop");
        if moved == 0 {
            return total;
        }
    }
}

fn frame(to: MacAddr, from: MacAddr, len: usize) -> Vec<u8> {
    let mut frame = [&to.0[..], &from.0[..], &[0x88, 0xb5]].concat();
    frame.extend((0..len).map(|i| i as u8));
    frame
}

fn udp(payload: usize) -> (Offload, Vec<u8>) {
    let mut frame = Vec::new();
    let builder = etherparse::PacketBuilder::ethernet2(mac(1).0, mac(2).0).ipv4([10, 0, 0, 2], [10, 0, 0, 1], 64);
    let bytes: Vec<u8> = (0..payload).map(|i| (i / 3) as u8).collect();
    builder.udp(5, 6).write(&mut frame, &bytes).unwrap();
    let checksum = Some(Partial { start: 34, offset: 6 });
    (Offload { checksum, segmentation: Segmentation::Udp, segment_size: 1300, ecn: false, header_len: 42 }, frame)
}

fn tcp(payload: usize) -> (Offload, Vec<u8>) {
    let mut frame = Vec::new();
    let builder = etherparse::PacketBuilder::ethernet2(mac(1).0, mac(2).0).ipv4([10, 0, 0, 2], [10, 0, 0, 1], 64);
    let bytes: Vec<u8> = (0..payload).map(|i| (i / 3) as u8).collect();
    builder.tcp(5, 6, 1000, 4096).ack(77).psh().write(&mut frame, &bytes).unwrap();
    let checksum = Some(Partial { start: 34, offset: 16 });
    let offload = Offload { checksum, segmentation: Segmentation::Tcp4, segment_size: 1300, ecn: false, header_len: 54 };
    (offload, frame)
}

/// TCP sequence number → payload byte, of everything delivered.
fn stream(delivered: &[(PortSlot, Offload, Vec<u8>)]) -> HashMap<u32, u8> {
    let mut bytes = HashMap::new();
    for (_, offload, frame) in delivered {
        let parsed = etherparse::SlicedPacket::from_ethernet(frame).unwrap();
        let Some(etherparse::TransportSlice::Tcp(tcp)) = parsed.transport else { panic!("not TCP") };
        assert!(offload.is_super() == (tcp.payload().len() > 1300), "marked as super-frame when it is one");
        for (index, byte) in tcp.payload().iter().enumerate() {
            assert!(bytes.insert(tcp.sequence_number() + index as u32, *byte).is_none(), "a byte came twice");
        }
    }
    bytes
}

proptest! {
    #[test]
    fn a_super_frame_arrives_bit_exact(payload in 1301usize..60_000) {
        let mut all = hosts(2, 1400, 1472);
        let (offload, bytes) = tcp(payload);
        all[0].speak(PORT, offload, &bytes);
        let datagrams: Vec<_> = std::mem::take(&mut all[0].out.sent).into_iter().map(|(_, datagram)| datagram).collect();
        prop_assert_eq!(datagrams.len(), payload.div_ceil(1300));
        all[1].hear(address(0), &datagrams);

        prop_assert_eq!(all[1].out.delivered.len(), 1);
        let (_, got, got_bytes) = &all[1].out.delivered[0];
        prop_assert_eq!(got, &offload);
        prop_assert_eq!(got_bytes, &bytes);
    }

    #[test]
    fn a_lost_datagram_costs_its_segment_only(payload in 2601usize..30_000, lost in any::<prop::sample::Index>()) {
        let mut all = hosts(2, 1400, 1472);
        let (offload, bytes) = tcp(payload);
        all[0].speak(PORT, offload, &bytes);
        let mut datagrams: Vec<_> = std::mem::take(&mut all[0].out.sent).into_iter().map(|(_, datagram)| datagram).collect();
        let lost = lost.index(datagrams.len());
        datagrams.remove(lost);
        all[1].hear(address(0), &datagrams);

        let got = stream(&all[1].out.delivered);
        for (index, byte) in bytes[54..].iter().enumerate() {
            let expected = (index / 1300 != lost).then_some(byte);
            prop_assert_eq!(got.get(&(1000 + index as u32)), expected);
        }
    }

    #[test]
    fn on_a_jumbo_path_a_datagram_takes_as_many_whole_segments_as_fit(
        payload in 1301usize..64_000, room in 1472u16..8973, size in 48u16..1301, lost in any::<prop::sample::Index>(), udp in any::<bool>(),
    ) {
        let (offload, bytes) = if udp { self::udp(payload) } else { tcp(payload) };
        let headers = usize::from(offload.header_len);
        let size = size.max(payload.div_ceil(1400) as u16);
        let whole = (usize::from(room) - 32 - 16 - headers) / usize::from(size);
        let said = || {
            let mut all = hosts(2, 1400, room);
            all[0].speak(PORT, Offload { segment_size: size, ..offload }, &bytes);
            let datagrams: Vec<_> = std::mem::take(&mut all[0].out.sent).into_iter().map(|(_, datagram)| datagram).collect();
            (all, datagrams)
        };
        let (mut all, mut datagrams) = said();
        prop_assert_eq!(datagrams.len(), payload.div_ceil(whole * usize::from(size)));
        prop_assert!(datagrams.iter().all(|datagram| datagram.len() <= usize::from(room)));
        all[1].hear(address(0), &datagrams);
        prop_assert_eq!(all[1].out.delivered.iter().map(|(_, _, got)| got).collect::<Vec<_>>(), [&bytes]);

        // Without one of them: the rest, and each piece in whole segments.
        (all, datagrams) = said();
        let lost = lost.index(datagrams.len());
        datagrams.remove(lost);
        all[1].hear(address(0), &datagrams);
        let mut got: usize = 0;
        for (_, offload, frame) in &all[1].out.delivered {
            let payload = frame.len() - headers;
            got += payload;
            prop_assert_eq!(offload.is_super(), payload > usize::from(size));
        }
        let step = whole * usize::from(size);
        prop_assert_eq!(got, payload - step.min(payload - lost * step));
    }

    #[test]
    fn jumbo_frames_cross_small_paths(len in 46usize..9001, room in 600u16..1500, mtu in 576u16..9001) {
        let mut all = hosts(2, mtu, room);
        let bytes = frame(mac(1), mac(2), len);
        all[0].speak(PORT, Offload::default(), &bytes);
        prop_assert!(all[0].out.sent.iter().all(|(_, datagram)| datagram.len() <= usize::from(room)));
        carry(&mut all);
        prop_assert_eq!(&all[1].out.delivered[0].2, &bytes);
    }

    #[test]
    fn tcp_super_frames_with_segments_larger_than_the_path_cross_as_one_with_smaller_ones(payload in 9000usize..40_000, mtu in 576u16..9001, size in 1460u16..8961, room in 1232u16..1473) {
        let mut all = hosts(2, mtu, room);
        let (offload, bytes) = tcp(payload);
        all[0].speak(PORT, Offload { segment_size: size, ..offload }, &bytes);
        let datagrams: Vec<_> = std::mem::take(&mut all[0].out.sent).into_iter().map(|(_, datagram)| datagram).collect();
        prop_assert!(datagrams.iter().all(|datagram| datagram.len() <= usize::from(room)));
        all[1].hear(address(0), &datagrams);

        prop_assert_eq!(all[1].out.delivered.len(), 1);
        let (_, got, got_bytes) = &all[1].out.delivered[0];
        prop_assert_eq!(got, &Offload { segment_size: room - 32 - 16 - 54, ..offload });
        prop_assert_eq!(got_bytes, &bytes);
    }

    #[test]
    fn udp_super_frames_with_datagrams_larger_than_the_path_cross_datagram_by_datagram(payload in 9000usize..40_000, mtu in 576u16..9001, size in 1460u16..8961) {
        let mut all = hosts(2, mtu, 1472);
        let (offload, bytes) = udp(payload);
        all[0].speak(PORT, Offload { segment_size: size, ..offload }, &bytes);
        carry(&mut all);

        let wanted: Vec<_> = bytes[42..].chunks(size.into()).collect();
        let got: Vec<_> = all[1].out.delivered.iter().map(|(_, _, frame)| &frame[42..]).collect();
        prop_assert_eq!(got, wanted);
    }

    #[test]
    fn no_datagram_panics(datagrams in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..120), 0..50), head in any::<bool>()) {
        let mut all = plain_hosts(2, 1400, 1472);
        let datagrams: Vec<_> = datagrams.into_iter().map(|mut bytes| {
            if head && bytes.len() > 20 {
                bytes[0] = 0x23;
                bytes[4..8].copy_from_slice(&100u32.to_be_bytes());
                bytes[8..14].copy_from_slice(&[0, 0, 0, 0, 0, 100]);
                bytes[16..19].copy_from_slice(&[0, 0, 5]);
                bytes[19] &= 0x37;
            }
            bytes
        }).collect();
        all[1].hear(address(0), &datagrams);
        let Host { worker, out, .. } = &mut all[1];
        worker.tick(NOW + Duration::from_secs(1), out);
    }
}

/// What a real sender sent, with bytes changed, cut off, sent twice or in another order: most of it gets as far as genuine
/// slices do.
#[test]
fn no_spoiled_slice_panics() {
    let spoil = (any::<prop::sample::Index>(), 0u8..4, 0usize..100, any::<u8>());
    let cases = (600usize..8900, 401usize..9000, proptest::collection::vec(spoil, 0..8));
    let (reached, delivered) = (Cell::new([0u64; DropReason::ALL.len()]), Cell::new([0; 3]));
    let played = TestRunner::new(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() }).run(
        &cases,
        |(len, payload, spoils)| {
            let mut all = plain_hosts(2, 9000, 600);
            let (offload, super_frame) = tcp(payload);
            let ordinary = frame(mac(2), mac(1), len);
            all[0].speak(PORT, Offload::default(), &ordinary);
            all[0].speak(PORT, Offload { segment_size: 400, ..offload }, &super_frame);
            let mut datagrams: Vec<_> = std::mem::take(&mut all[0].out.sent).into_iter().map(|(_, datagram)| datagram).collect();
            for (which, how, at, value) in spoils {
                let which = which.index(datagrams.len());
                match how {
                    0 => datagrams[which].get_mut(at).into_iter().for_each(|byte| *byte = value),
                    1 => datagrams[which].truncate(usize::from(value) * 3),
                    2 => datagrams.push(datagrams[which].clone()),
                    _ => {
                        let other = at % datagrams.len();
                        datagrams.swap(which, other);
                    }
                }
            }
            all[1].hear(address(0), &datagrams);
            let Host { worker, counters, out, .. } = &mut all[1];
            worker.tick(NOW + Duration::from_secs(1), out);

            let mut seen = reached.get();
            DropReason::ALL.iter().for_each(|reason| seen[*reason as usize] += counters.drops.of(*reason));
            reached.set(seen);
            let mut got = delivered.get();
            for (_, _, bytes) in &out.delivered {
                got[if *bytes == ordinary {
                    0
                } else if *bytes == super_frame {
                    1
                } else {
                    2
                }] += 1;
            }
            delivered.set(got);
            Ok(())
        },
    );
    played.unwrap();
    assert!(delivered.get().iter().all(|count| *count > 20), "put together, merged, in parts: {:?}", delivered.get());
    use DropReason::{BadDatagram, BadSlice, ReassemblyOverlap, ReassemblyTimeout, UnknownReceiver};
    for reason in [BadDatagram, BadSlice, ReassemblyOverlap, ReassemblyTimeout, UnknownReceiver] {
        assert!(reached.get()[reason as usize] > 0, "never met {}", reason.name());
    }
}

#[test]
fn frames_larger_than_the_network_s_mtu_are_carried_counted_and_told_once() {
    let mut all = hosts(2, 1400, 1472);
    let (offload, super_frame) = tcp(20_000);
    let counted = |host: &Host| {
        let all = host.counters.snapshot();
        let counted = all.into_iter().find(|counter| counter.name == "oversize-carried").map(|counter| counter.value);
        (counted, host.tables.ports[0].as_ref().unwrap().traffic.snapshot().oversize)
    };
    all[0].speak(PORT, Offload::default(), &frame(mac(2), mac(1), 1400));
    assert_eq!(counted(&all[0]), (Some(0), 0));

    all[0].speak(PORT, Offload::default(), &frame(mac(2), mac(1), 9000));
    all[0].speak(PORT, Offload { segment_size: 8960, ..offload }, &super_frame);
    carry(&mut all);

    // Carried one by one here, so nothing is put together again.
    assert_eq!(all[1].out.delivered.len(), 2 + 20_000usize.div_ceil(1472 - 32 - 54));
    assert_eq!(counted(&all[0]), (Some(2), 2));
    let learned = WorkerEvent::Learned { vni: vni(5), vid: 0, mac: mac(1), port: PORT };
    assert_eq!(all[0].out.events, [learned, WorkerEvent::Oversize { port: PORT, len: 9000 }]);
}

#[test]
fn an_event_that_found_no_room_is_told_with_the_next_oversize_frame() {
    let mut all = hosts(2, 1400, 1472);
    all[0].out.deaf = true;
    all[0].speak(PORT, Offload::default(), &frame(mac(2), mac(1), 1500));
    all[0].out.deaf = false;
    all[0].speak(PORT, Offload::default(), &frame(mac(2), mac(1), 1501));
    assert_eq!(all[0].out.events, [WorkerEvent::Oversize { port: PORT, len: 1501 }]);
}

#[test]
fn what_a_gateway_brings_and_is_larger_than_the_network_s_mtu_is_refused_and_answered() {
    let mut all = hosts(2, 1400, 1472);
    all[0].tables.ports[0].as_mut().unwrap().gateway = true;
    let mut big = Vec::new();
    let builder = etherparse::PacketBuilder::ethernet2(mac(1).0, mac(2).0).ipv6([1; 16], [2; 16], 9);
    builder.udp(7, 9).write(&mut big, &[7; 1400]).unwrap();

    all[0].speak(PORT, Offload::default(), &big);

    assert_eq!((carry(&mut all), all[0].counters.drops.of(DropReason::TooBig)), (0, 1));
    assert_eq!(all[0].out.delivered.len(), 1, "the answer");
}

#[test]
fn no_slice_makes_room_for_a_frame_larger_than_what_crosses() {
    let mut all = plain_hosts(2, 9000, 1472);
    all[0].speak(PORT, Offload::default(), &frame(mac(2), mac(1), 9000));
    let mut first = all[0].out.sent.remove(0).1;
    // The whole frame's length: 9000, a header and two tags is the largest.
    first[27..30].copy_from_slice(&9023u32.to_be_bytes()[1..]);
    all[1].hear(address(0), &[first.clone()]);
    assert_eq!(all[1].counters.drops.of(DropReason::TooBig), 1);

    first[27..30].copy_from_slice(&9022u32.to_be_bytes()[1..]);
    all[1].hear(address(0), &[first]);
    assert_eq!(all[1].counters.drops.total(), 1);
}

/// A guest's VXLAN super-frame as a packet socket reports it: TCP, with a checksum far inside.
fn vxlan(payload: usize) -> (Offload, Vec<u8>) {
    let (_, inner) = tcp(payload);
    let tunnelled = [&[8, 0, 0, 0, 0, 0, 9, 0][..], &inner].concat();
    let mut bytes = Vec::new();
    let builder = etherparse::PacketBuilder::ethernet2(mac(1).0, mac(2).0).ipv4([10, 5, 0, 1], [10, 5, 0, 2], 9);
    builder.udp(7, 4789).write(&mut bytes, &tunnelled).unwrap();
    // No checksum, as VXLAN over IPv4 has none.
    bytes[40..42].fill(0);
    let checksum = Some(Partial { start: 50 + 34, offset: 16 });
    (Offload { checksum, segmentation: Segmentation::Tcp4, segment_size: 1300, ecn: false, header_len: 104 }, bytes)
}

#[test]
fn a_tunnels_super_frame_is_cut_and_stays_between_its_neighbours() {
    let mut all = hosts(2, 1400, 1472);
    let (offload, mut bytes) = vxlan(3000);
    let (mut before, mut behind) = (frame(mac(2), mac(1), 50), frame(mac(2), mac(1), 60));
    let Host { worker, tables, out, .. } = &mut all[0];
    let mut frames = [
        Frame { offload: Ok(Offload::default()), bytes: &mut before },
        Frame { offload: Ok(offload), bytes: &mut bytes },
        Frame { offload: Ok(Offload::default()), bytes: &mut behind },
    ];

    worker.outbound(NOW, tables, PORT, &mut frames, out);
    carry(&mut all);

    let lens: Vec<_> = all[1].out.delivered.iter().map(|(_, _, frame)| frame.len()).collect();
    assert_eq!(lens, [64, 50 + 54 + 1300, 50 + 54 + 1300, 50 + 54 + 400, 74]);
    assert!(all[1].out.delivered.iter().all(|(_, offload, _)| *offload == Offload::default()), "nothing is left to do");
    let counted = all[0].counters.snapshot();
    assert_eq!(counted.iter().find(|counter| counter.name == "software-segmentations").map(|counter| counter.value), Some(1));
    let port = all[0].tables.ports[0].as_ref().unwrap().traffic.snapshot();
    assert_eq!((port.frames_in, port.bytes_in), (3, 64 + 3104 + 74), "frames count as the guest sent them");
}

#[test]
fn a_tunnels_super_frame_that_was_on_hold_is_cut_when_the_gate_opens() {
    let mut all = hosts(2, 1400, 1472);
    all[0].tables.ports[0].as_mut().unwrap().gate = Gate::Hold;
    let (offload, bytes) = vxlan(3000);
    all[0].speak(PORT, offload, &bytes);
    assert_eq!(carry(&mut all), 0);

    all[0].tables.ports[0].as_mut().unwrap().gate = Gate::Open;
    let Host { worker, tables, out, .. } = &mut all[0];
    worker.tables_changed(NOW, tables, out);
    carry(&mut all);
    assert_eq!(all[1].out.delivered.len(), 3);
}

#[test]
fn a_super_frame_of_more_parts_than_one_write_takes_arrives_in_two() {
    // A path that takes one segment in a datagram.
    let mut all = hosts(2, 1400, 32 + 16 + 54 + 99);
    let (offload, bytes) = tcp(60_000);
    all[0].speak(PORT, Offload { segment_size: 50, ..offload }, &bytes);
    let datagrams: Vec<_> = std::mem::take(&mut all[0].out.sent).into_iter().map(|(_, datagram)| datagram).collect();
    assert_eq!(datagrams.len(), 1200);
    all[1].hear(address(0), &datagrams);

    let got: Vec<u8> = all[1].out.delivered.iter().flat_map(|(_, _, frame)| frame[54..].to_vec()).collect();
    assert_eq!(got, bytes[54..]);
    // IOV_MAX is 1024, and the headers are a part too.
    assert!(all[1].out.delivered.iter().all(|(_, _, frame)| (frame.len() - 54) / 50 < 1000));
}

#[test]
fn unknown_unicast_floods_once_to_each_place_and_learned_goes_to_one() {
    let mut all = hosts(3, 1400, 1472);
    all[0].speak(PORT, Offload::default(), &frame(mac(2), mac(1), 50));
    assert_eq!(carry(&mut all), 2);
    assert_eq!([0, 1, 2].map(|host: usize| all[host].out.delivered.len()), [0, 1, 1]);

    all[1].speak(PORT, Offload::default(), &frame(mac(1), mac(2), 50));
    assert_eq!(carry(&mut all), 1);
    all[0].speak(PORT, Offload::default(), &frame(mac(2), mac(1), 50));
    assert_eq!(carry(&mut all), 1);
    assert_eq!([0, 1, 2].map(|host: usize| all[host].out.delivered.len()), [1, 2, 1]);
}

#[test]
fn what_was_learned_at_a_peer_that_stopped_carrying_the_network_is_flooded() {
    let mut all = hosts(3, 1400, 1472);
    all[0].network().fdb.learn(NOW, 0, mac(9), Place::Peer(PeerSlot(1)));
    all[0].tables.peers[1].as_mut().unwrap().networks.clear();
    all[0].network().peers.retain(|peer| *peer != PeerSlot(1));
    all[0].speak(PORT, Offload::default(), &frame(mac(9), mac(1), 50));
    assert_eq!(carry(&mut all), 1);
    assert_eq!((all[2].out.delivered.len(), all[0].counters.drops.of(DropReason::Gone)), (1, 0));
}

#[test]
fn too_big_is_not_said_in_the_name_of_a_mac_that_nobody_has_heard() {
    let mut all = hosts(2, 1400, 1472);
    all[1].tables.ports[0].as_mut().unwrap().gateway = true;
    all[1].out.path_mtu = Some(1000);
    let mut big = Vec::new();
    let builder = etherparse::PacketBuilder::ethernet2(mac(1).0, mac(9).0).ipv6([1; 16], [2; 16], 9);
    builder.udp(7, 9).write(&mut big, &[7; 1200]).unwrap();
    let told = |all: &[Host]| {
        let told = all[1].counters.snapshot().into_iter().find(|counter| counter.name == "too-big-answers");
        (all[1].counters.drops.of(DropReason::GatewayTooBig), told.unwrap().value)
    };
    all[0].speak(PORT, Offload::default(), &big);
    carry(&mut all);
    assert_eq!(told(&all), (1, 0));

    all[1].network().fdb.learn(NOW, 0, mac(9), Place::Port(PORT));
    all[0].speak(PORT, Offload::default(), &big);
    carry(&mut all);
    assert_eq!(told(&all), (2, 1));
}

#[test]
fn a_flood_reaches_no_other_network() {
    let mut all = hosts(2, 1400, 1472);
    all[0].speak(PORT, Offload::default(), &frame(MacAddr::BROADCAST, mac(1), 50));
    carry(&mut all);
    assert!(all.iter().all(|host| host.out.delivered.iter().all(|(slot, _, _)| *slot == PORT)));

    // Network 6 is carried by both, but neither knows it of the other.
    all[0].speak(PortSlot(1), Offload::default(), &frame(MacAddr::BROADCAST, mac(1), 50));
    assert_eq!((carry(&mut all), all[0].counters.drops.of(DropReason::Gone)), (0, 1));
    all[0].tables.peers[1].as_mut().unwrap().networks.insert(vni(6));
    all[0].speak(PortSlot(1), Offload::default(), &frame(MacAddr::BROADCAST, mac(1), 50));
    carry(&mut all);
    assert_eq!(all[1].out.delivered.len(), 1);
    assert_eq!(all[1].counters.drops.of(DropReason::ForeignNetwork), 1);
}

#[test]
fn a_stranger_is_refused_by_index_and_a_plain_one_by_address_interface_and_cookie() {
    let mut all = plain_hosts(2, 1400, 1472);
    all[0].speak(PORT, Offload::default(), &frame(mac(2), mac(1), 50));
    let (_, datagram) = all[0].out.sent.remove(0);
    let with = |at: usize| {
        let mut forged = datagram.clone();
        forged[at] ^= 1;
        forged
    };
    all[1].hear("10.0.0.66:7471".parse().unwrap(), std::slice::from_ref(&datagram));
    all[1].hear(address(0), &[with(7)]);
    all[1].hear(address(0), &[with(8)]);
    all[1].hear(address(0), &[with(13)]);
    let (arrival, mut other_way) = (Arrival { from: address(0), interface: 4 }, datagram.clone());
    let Host { worker, tables, out, .. } = &mut all[1];
    worker.inbound(NOW, tables, arrival, &mut other_way, &mut Merging::default(), out);
    let mut as_sealed = datagram.clone();
    as_sealed[0] = 0x21;
    all[1].hear(address(0), &[as_sealed]);

    assert!(all[1].out.delivered.is_empty());
    let drops = |reason| all[1].counters.drops.of(reason);
    use DropReason::{BadCookie, UnknownReceiver, WrongAddress, WrongInterface, WrongProtection};
    assert_eq!([WrongAddress, UnknownReceiver, BadCookie, WrongInterface, WrongProtection].map(drops), [1, 1, 2, 1, 1]);
    assert_eq!(all[1].tables.peers[0].as_ref().unwrap().traffic.snapshot().datagrams_in, 0);

    // The counter behind the cookie is the sender's own.
    all[1].hear(address(0), &[with(15)]);
    assert_eq!(all[1].out.delivered.len(), 1);
}

#[test]
fn a_sealed_datagram_is_taken_once_unspoilt_and_of_its_session_only() {
    let mut all = hosts(3, 1400, 1472);
    all[0].speak(PORT, Offload::default(), &frame(mac(2), mac(1), 50));
    let (_, datagram) = all[0].out.sent.remove(0);
    for at in 0..datagram.len() {
        let mut spoilt = datagram.clone();
        spoilt[at] ^= 1;
        all[1].hear(address(0), &[spoilt]);
        all[1].hear(address(0), &[datagram[..at].to_vec()]);
    }
    // As if a member sent it that has learned the index.
    all[2].hear(address(0), std::slice::from_ref(&datagram));
    let mut plain = datagram.clone();
    plain[0] = 0x23;
    all[1].hear(address(0), &[plain]);

    assert!(all[1].out.delivered.is_empty() && all[2].out.delivered.is_empty());
    assert_eq!(all[1].tables.peers[0].as_ref().unwrap().traffic.snapshot().datagrams_in, 0, "nothing counts before it opens");
    assert_eq!(all[1].counters.drops.total(), 2 * datagram.len() as u64 + 1, "each refusal has a name");

    let replayed = all[1].counters.drops.of(DropReason::Replayed);
    for _ in 0..3 {
        all[1].hear(address(0), std::slice::from_ref(&datagram));
    }
    assert_eq!((all[1].out.delivered.len(), all[1].counters.drops.of(DropReason::Replayed)), (1, replayed + 2));
    assert!(!datagram.windows(12).any(|bytes| *bytes == frame(mac(2), mac(1), 50)[..12]), "no address can be read on the way");
}

#[test]
fn keys_follow_each_other_without_a_lost_frame_and_never_faster_than_the_peer() {
    let limits = Limits { after: Duration::from_secs(120), small: 8, large: 4 };
    let mut all = hosts(2, 1400, 1472);
    let idle = || Worker::new(Arc::default(), Arc::default());
    all[0].worker = std::mem::replace(&mut all[0].worker, idle()).with_limits(limits);
    let send = |all: &mut Vec<Host>| {
        all[0].speak(PORT, Offload::default(), &frame(mac(2), mac(1), 50));
        all[0].out.sent.drain(..).map(|(_, datagram)| datagram).collect::<Vec<_>>()
    };
    let hear = |all: &mut Vec<Host>, datagrams: &[Vec<u8>]| all[1].hear(address(0), datagrams);
    let opened = |all: &mut Vec<Host>| {
        let opened = all[1].out.events.extract_if(.., |event| matches!(event, WorkerEvent::Opened { .. })).collect::<Vec<_>>();
        opened.into_iter().map(|event| match event {
            WorkerEvent::Opened { session, queue, epoch } => (session, queue, epoch),
            _ => unreachable!("only those were taken"),
        })
    };

    // Half the limit under the first key, then the second: nobody has to be asked for that.
    let mut under_way = Vec::new();
    for count in 0..12 {
        let datagrams = send(&mut all);
        assert_eq!(datagrams[0][1], u8::from(count >= 4), "epoch of datagram {count}");
        under_way.extend(datagrams);
    }
    // All that the second may seal, unheard: refused by name, and no number is used twice.
    assert_eq!(send(&mut all), Vec::<Vec<u8>>::new());
    assert_eq!(all[0].counters.drops.of(DropReason::KeyExhausted), 1);

    // What overtook the change of keys is opened all the same.
    under_way.swap(2, 5);
    hear(&mut all, &under_way);
    assert_eq!(all[1].out.delivered.len(), 12);
    assert_eq!(opened(&mut all).collect::<Vec<_>>(), [(index(1, 0), 0, 1)]);

    // Told, the sender goes on.
    let Protection::Sealed(keys) = &all[0].tables.peers[1].as_ref().unwrap().session.protection else { unreachable!() };
    keys.acknowledge(0, 1);
    let datagrams = send(&mut all);
    assert_eq!(datagrams[0][1], 2);
    all[1].out.deaf = true;
    hear(&mut all, &datagrams);
    // What found no room is told with the next look at the clock.
    all[1].out.deaf = false;
    let Host { worker, out, .. } = &mut all[1];
    worker.tick(NOW, out);
    assert_eq!(opened(&mut all).collect::<Vec<_>>(), [(index(1, 0), 0, 2)]);
    assert_eq!((all[1].out.delivered.len(), all[1].counters.drops.total()), (13, 0));
    // The key of epoch 0 has gone.
    hear(&mut all, &under_way[..1]);
    assert_eq!(all[1].counters.drops.of(DropReason::UnknownEpoch), 1);
}

#[test]
fn a_session_is_begun_once_whatever_becomes_of_the_tables() {
    let mut all = hosts(2, 1400, 1472);
    all[0].speak(PORT, Offload::default(), &frame(mac(2), mac(1), 50));
    let whole = all[0].tables.clone();
    let Host { worker, tables, out, .. } = &mut all[0];
    (tables.peers[1], tables.by_receiver) = (None, Default::default());
    worker.tables_changed(NOW, tables, out);
    all[0].tables = whole;
    all[0].out.sent.clear();

    all[0].speak(PORT, Offload::default(), &frame(mac(2), mac(1), 50));

    assert!(all[0].out.sent.is_empty(), "the first packet number would have been used twice");
    assert_eq!(all[0].counters.drops.of(DropReason::NoKey), 1);
}

#[test]
fn a_peer_that_speaks_from_elsewhere_is_heard_told_of_and_answers_a_challenge_there() {
    let mut all = hosts(2, 1400, 1472);
    let (new, session) = ("10.0.0.66:9999".parse().unwrap(), index(1, 0));
    all[0].speak(PORT, Offload::default(), &frame(mac(2), mac(1), 50));
    let (_, datagram) = all[0].out.sent.remove(0);

    all[1].hear(new, std::slice::from_ref(&datagram));
    assert_eq!(all[1].out.delivered.len(), 1);
    assert_eq!(all[1].out.events.last(), Some(&WorkerEvent::Roamed { session, from: new }));
    // Data goes where it went, until the peer has answered.
    all[1].speak(PORT, Offload::default(), &frame(mac(1), mac(2), 50));
    assert_eq!(all[1].out.sent.remove(0).0, address(0));

    let Host { worker, tables, out, .. } = &mut all[1];
    worker.challenge(NOW, tables, session, (new, 77), out);
    let (to, challenge) = all[1].out.sent.remove(0);
    assert_eq!(to, new);
    all[0].hear(address(1), &[challenge]);
    let (to, answer) = all[0].out.sent.remove(0);
    assert_eq!(to, address(1));
    all[1].hear(new, &[answer]);
    assert_eq!(all[1].out.events.last(), Some(&WorkerEvent::Answered { session, token: 77, from: new }));
}

#[test]
fn what_came_from_a_tunnel_never_enters_one() {
    let mut all = hosts(3, 1400, 1472);
    all[1].network().fdb.learn(NOW, 0, mac(9), Place::Peer(PeerSlot(2)));
    all[0].network().fdb.learn(NOW, 0, mac(9), Place::Peer(PeerSlot(1)));
    all[0].speak(PORT, Offload::default(), &frame(mac(9), mac(1), 50));
    assert_eq!(carry(&mut all), 1);
    assert_eq!(all[1].counters.drops.of(DropReason::SplitHorizon), 1);
}

#[test]
fn a_late_frame_is_forwarded_once_and_crossing_moves_make_no_loop() {
    let mut all = hosts(3, 1400, 1472);
    let owned = |at| Owned { at: Place::Peer(PeerSlot(at)), arriving: None, forward_late: true };
    all[0].network().owned.insert(mac(9), owned(1));
    all[1].network().owned.insert(mac(9), owned(2));
    all[2].network().owned.insert(mac(9), owned(1));
    all[0].speak(PORT, Offload::default(), &frame(mac(9), mac(1), 50));

    assert_eq!(carry(&mut all), 2);

    assert_eq!(all[2].counters.drops.of(DropReason::SplitHorizon), 1);
    assert!(all[2].network().fdb.is_empty(), "a marked frame taught something");

    all[2].network().owned.insert(mac(9), Owned { at: Place::Peer(PeerSlot(1)), arriving: Some(PORT), forward_late: false });
    let (offload, bytes) = tcp(5000);
    let bytes = [&mac(9).0[..], &bytes[6..]].concat();
    all[0].speak(PORT, offload, &bytes);
    carry(&mut all);
    let got: Vec<u8> = all[2].out.delivered.iter().flat_map(|(_, _, frame)| frame[54..].to_vec()).collect();
    assert_eq!(got, bytes[54..], "a late super-frame arrives whole");
}

#[test]
fn an_owned_mac_cannot_be_stolen_or_relearned() {
    let mut all = hosts(2, 1400, 1472);
    all[0].network().owned.insert(mac(9), Owned { at: Place::Peer(PeerSlot(1)), arriving: None, forward_late: false });
    for _ in 0..3 {
        all[0].speak(PORT, Offload::default(), &frame(mac(2), mac(9), 50));
    }
    assert_eq!(carry(&mut all), 0);
    assert_eq!(all[0].out.events, [WorkerEvent::Stolen { vni: vni(5), mac: mac(9), port: PORT }]);
    assert_eq!(all[0].counters.drops.of(DropReason::StolenMac), 3);
    assert!(all[0].network().fdb.is_empty());
}

#[test]
fn odd_frames_are_refused_by_name() {
    let mut all = hosts(2, 1400, 1472);
    let mut refused = |bytes: &[u8], reason| {
        all[0].speak(PORT, Offload::default(), bytes);
        assert_eq!(all[0].counters.drops.of(reason), 1, "{reason:?}");
    };
    refused(&[0; 13], DropReason::Runt);
    refused(&frame(mac(1), MacAddr([1, 0, 0, 0, 0, 1]), 50), DropReason::BadSource);
    refused(&frame(MacAddr([1, 0x80, 0xc2, 0, 0, 3]), mac(1), 50), DropReason::LinkLocal);
    refused(&frame(mac(2), mac(1), 9001), DropReason::TooBig);
    assert_eq!(carry(&mut all), 0);
}

#[test]
fn what_is_said_on_hold_leaves_in_order_when_the_gate_opens() {
    let mut all = hosts(2, 1400, 1472);
    all[0].tables.ports[0].as_mut().unwrap().gate = Gate::Hold;
    for len in [50, 60, 70] {
        all[0].speak(PORT, Offload::default(), &frame(mac(2), mac(1), len));
    }
    assert_eq!(carry(&mut all), 0);

    all[0].tables.ports[0].as_mut().unwrap().gate = Gate::Open;
    let Host { worker, tables, out, .. } = &mut all[0];
    worker.tables_changed(NOW, tables, out);
    carry(&mut all);
    assert_eq!(all[1].out.delivered.iter().map(|(_, _, frame)| frame.len()).collect::<Vec<_>>(), [64, 74, 84]);

    all[0].tables.ports[0].as_mut().unwrap().gate = Gate::Hold;
    all[0].speak(PORT, Offload::default(), &frame(mac(2), mac(1), 50));
    all[0].tables.ports[0].as_mut().unwrap().gate = Gate::Closed;
    let Host { worker, tables, out, .. } = &mut all[0];
    worker.tables_changed(NOW, tables, out);
    assert_eq!((carry(&mut all), all[0].counters.drops.of(DropReason::GateClosed)), (0, 1));
}

#[test]
fn what_a_removed_port_had_on_hold_is_counted_when_its_slot_has_another() {
    let mut all = hosts(2, 1400, 1472);
    all[0].tables.ports[0].as_mut().unwrap().gate = Gate::Hold;
    for id in [1, 2] {
        all[0].tables.ports[0].as_mut().unwrap().id = PortId(id);
        all[0].speak(PORT, Offload::default(), &frame(mac(2), mac(1), 50));
    }
    assert_eq!(all[0].counters.drops.of(DropReason::GateClosed), 1);
}
