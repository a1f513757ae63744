//! A generated list of odd frames through each kind of port: bit-exact at the far end, or refused by name. Needs root.
#![cfg(feature = "io")]

mod support;

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};
use support::{Host, MTU, Namespace, guest, run, two_hosts, vni};
use switchd::io::sys;
use violin_common::api::switch::PortKind;

const HEADROOM: usize = 4;
/// Larger than what crosses, so that the switch and not the guest's interface refuses.
const GUEST_MTU: u16 = 9500;
/// Packets larger than that are refused, though the network's MTU is smaller.
const LARGEST: usize = violin_common::wire::mesh::LARGEST_PACKET as usize;

/// A raw socket on a guest's interface.
struct Station {
    socket: OwnedFd,
    batch: sys::Batch,
}

impl Station {
    fn on(ns: &Namespace, interface: &str) -> Self {
        let socket = ns.enter(|| {
            let socket = sys::packet_socket().unwrap();
            sys::set_option(socket.as_fd(), libc::SOL_PACKET, libc::PACKET_AUXDATA, 1i32).unwrap();
            // PACKET_IGNORE_OUTGOING
            sys::set_option(socket.as_fd(), libc::SOL_PACKET, 23, 1i32).unwrap();
            sys::bind_packet(socket.as_fd(), switchd::io::link::index(interface).unwrap()).unwrap();
            socket
        });
        Self { socket, batch: sys::Batch::new(64, 70_000, HEADROOM) }
    }

    fn say(&self, frame: &[u8]) {
        assert_eq!(nix::unistd::write(&self.socket, frame), Ok(frame.len()), "{frame:02x?}");
    }

    /// What has come since, tags put back.
    fn heard(&mut self) -> Vec<Vec<u8>> {
        if self.batch.receive(self.socket.as_fd(), false, 64).is_err() {
            return Vec::new();
        }
        let restore = |(received, bytes): (&sys::Received, &[u8])| {
            let mut frame = bytes.to_vec();
            if let Some((tci, protocol)) = received.vlan {
                let tag = [protocol.to_be_bytes(), tci.to_be_bytes()].concat();
                frame.splice(12..12, tag);
            }
            frame
        };
        self.batch.messages().map(restore).collect()
    }
}

/// Frames of every kind we could think of, and why the switch should refuse them, if it should. `largest`: packet that passes.
fn odd_frames(largest: usize) -> Vec<(Vec<u8>, Option<&'static str>)> {
    let mut all: Vec<(Vec<u8>, Option<&'static str>)> = Vec::new();
    let station = [0x52, 0x54, 0, 0, 1, 1];
    let head = |to: [u8; 6], rest: &[u8]| [&to[..], &station, rest].concat();
    let body = |len: usize, seed: usize| (0..len).map(|i| (i * 7 + seed) as u8).collect::<Vec<u8>>();
    let (unicast, broadcast) = ([0x52, 0x54, 0, 0, 9, 9], [0xff; 6]);
    // EtherTypes: below 0x600 is a length (LLC), the rest are protocols, known or not, IP ones with nonsense inside.
    for (seed, ethertype) in
        [0x0000u16, 0x0026, 0x05dc, 0x0600, 0x0800, 0x0806, 0x8035, 0x809b, 0x8137, 0x86dd, 0x8808, 0x8847, 0x8863]
            .into_iter()
            .chain([0x8864, 0x888e, 0x88a2, 0x88b5, 0x88b6, 0x88cc, 0x88e5, 0x88f7, 0x8906, 0x9000, 0xfefe, 0xffff])
            .enumerate()
    {
        for (to, len) in [(unicast, 46), (broadcast, 46), (unicast, 1), (unicast, 1400)] {
            all.push(([head(to, &ethertype.to_be_bytes()), body(len, seed)].concat(), None));
        }
    }
    for len in [0, 1, 2, 17, 45, 46, 47, 500, 1399, 1400] {
        all.push(([head(unicast, &[0x88, 0xb5]), body(len, 1)].concat(), None));
    }
    for len in [1401, 1500, 4000, 8999, 9000, 9001, 9100] {
        let refused = (len > largest).then_some("too-big");
        all.push(([head(unicast, &[0x88, 0xb5]), body(len, 1)].concat(), refused));
    }
    for tag in [0x8100u16, 0x88a8] {
        for tci in [0x0000u16, 0x0001, 0x0fff, 0x6005, 0xf123] {
            for (to, len) in [(unicast, 46), (broadcast, 1400)] {
                let tag = [tag.to_be_bytes(), tci.to_be_bytes(), [0x88, 0xb5]].concat();
                all.push(([head(to, &tag), body(len, 2)].concat(), None));
            }
            // QinQ, and three tags, of which the third counts as payload.
            let two = [tag.to_be_bytes(), tci.to_be_bytes(), [0x81, 0], [0, 7], [0x08, 0]].concat();
            all.push(([head(unicast, &two), body(60, 3)].concat(), None));
            let three = [tag.to_be_bytes(), tci.to_be_bytes(), [0x81, 0], [0, 7], [0x81, 0], [0, 8], [0x88, 0xb5]].concat();
            all.push(([head(unicast, &three), body(60, 3)].concat(), None));
        }
    }
    // ARP: request, reply, gratuitous, probe, reverse, unknown operation and hardware, cut off.
    for operation in 0..12u8 {
        let mut arp = vec![0, 1, 8, 0, 6, 4, 0, operation];
        arp.extend([&station[..], &[10, 5, 0, 1], &[0; 6], &[10, 5, 0, operation]].concat());
        all.push(([head(broadcast, &[8, 6]), arp.clone()].concat(), None));
        arp[1] = 6;
        arp.truncate(20);
        all.push(([head(unicast, &[8, 6]), arp].concat(), None));
    }
    for multicast in
        [[1, 0, 0x5e, 0, 0, 1], [1, 0, 0x5e, 0x7f, 0xff, 0xfa], [0x33, 0x33, 0, 0, 0, 1], [1, 0, 0x0c, 0xcc, 0xcc, 0xcd]]
    {
        for len in [20, 300, 1400] {
            all.push(([head(multicast, &[0x86, 0xdd]), body(len, 4)].concat(), None));
        }
    }
    for last in 0..16 {
        all.push(([head([1, 0x80, 0xc2, 0, 0, last], &[0, 38]), body(38, 5)].concat(), Some("link-local")));
    }
    all.push(([head([1, 0x80, 0xc2, 0, 0, 0x10], &[0, 38]), body(38, 5)].concat(), None));
    for source in [[1, 0, 0, 0, 0, 1], [0xff; 6], [0; 6]] {
        all.push(([&unicast[..], &source, &[0x88, 0xb5], &body(46, 6)].concat(), Some("bad-source")));
    }
    // Real packets, fragments among them, with right and wrong checksums.
    for (size, wrong) in [(0, 0), (1, 0), (1000, 0), (1000, 1)] {
        for v6 in [false, true] {
            let builder = || {
                let builder = etherparse::PacketBuilder::ethernet2(station, unicast);
                if v6 { builder.ipv6([1; 16], [2; 16], 9) } else { builder.ipv4([10, 5, 0, 1], [10, 5, 0, 2], 9) }
            };
            let (mut udp, mut tcp) = (Vec::new(), Vec::new());
            builder().udp(7, 9).write(&mut udp, &body(size, 7)).unwrap();
            builder().tcp(7, 9, 1, 1).write(&mut tcp, &body(size, 8)).unwrap();
            for mut frame in [udp, tcp] {
                let end = frame.len() - 1;
                frame[end] ^= wrong;
                all.push((frame.clone(), None));
                if !v6 {
                    frame[20] = 0x20;
                    all.push((frame, None));
                }
            }
        }
    }
    all
}

/// A kernel's VXLAN device drops what calls itself IP and has no whole header (vxlan_rcv, pskb_inet_may_pull).
fn cut_off_ip(frame: &[u8]) -> bool {
    let header = violin_common::wire::ethernet::Header::parse(frame).unwrap();
    matches!((header.ethertype, frame.len() - header.payload), (0x0800, 0..20) | (0x86dd, 0..40))
}

/// Says every frame at `from`; it must be heard unchanged at `to`, or be refused under its name. `kernel`: one end is a
/// kernel's VXLAN device. `largest`: packet that passes.
fn conform(from: &Station, to: &mut Station, switches: [&Host; 2], kernel: bool, largest: usize) {
    let refusals = |reason: &str| -> u64 {
        let name = format!("drop.{reason}");
        switches.iter().flat_map(|host| host.counters.snapshot()).filter(|c| c.name == name).map(|c| c.value).sum()
    };
    let frames = odd_frames(largest);
    assert!(frames.len() >= 200, "{}", frames.len());
    for (frame, refused) in frames {
        if kernel && cut_off_ip(&frame) {
            continue;
        }
        let before = refused.map(refusals);
        from.say(&frame);
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let heard = to.heard().contains(&frame);
            assert!(!(heard && refused.is_some()), "{refused:?} came through: {frame:02x?}");
            if heard || refused.map(refusals) > before {
                break;
            }
            let drops = switches.map(Host::drops);
            assert!(Instant::now() < deadline, "want {refused:?}, lost {} bytes {frame:02x?}: {drops:?}", frame.len());
            std::thread::yield_now();
        }
    }
}

fn quiet(ns: &Namespace, interface: &str) {
    ns.run(&format!("sysctl -qw net.ipv6.conf.{interface}.disable_ipv6=1; ip addr flush dev {interface}"));
}

#[test]
#[ignore = "needs root"]
fn odd_frames_cross_packet_and_tap_ports_bit_exact_or_are_refused_by_name() {
    let (mut a, mut b) = two_hosts(&[vni(5)], MTU);
    let g1 = guest(&a.ns, "p1", "10.5.0.1", GUEST_MTU);
    a.packet_port(vni(5), "p1", MTU);
    let g2 = Namespace::new("tap");
    let port = b.announce_port(vni(5), false);
    b.attach(port, &PortKind::Tap { interface: "eth0".into(), netns: Some(g2.path()) }, MTU);
    g2.run(&format!("ip link set eth0 mtu {GUEST_MTU}"));
    quiet(&g1, "eth0");
    quiet(&g2, "eth0");
    let (mut packet, mut tap) = (Station::on(&g1, "eth0"), Station::on(&g2, "eth0"));

    conform(&packet, &mut tap, [&a, &b], false, LARGEST);
    // The stations' addresses move to the other side: forget them first.
    for host in [&a, &b] {
        host.tables.load().networks[&vni(5)].fdb.flush();
    }
    conform(&tap, &mut packet, [&a, &b], false, LARGEST);
}

#[test]
#[ignore = "needs root"]
fn odd_frames_cross_a_gateway_bit_exact_or_are_refused_by_name() {
    let (mut a, mut b) = two_hosts(&[vni(5)], MTU);
    let foreign = Namespace::new("foreign");
    run(&format!("ip link add wan netns {} type veth peer name wan netns {}", a.ns.0, foreign.0));
    a.ns.run("ip addr add 10.98.0.1/24 dev wan && ip link set wan mtu 10000 up");
    foreign.run("ip addr add 10.98.0.2/24 dev wan && ip link set wan mtu 10000 up");
    foreign.run("ip link add vx type vxlan id 77 remote 10.98.0.1 local 10.98.0.2 dstport 4789 dev wan");
    foreign.run(&format!("ip link set vx mtu {GUEST_MTU} up"));
    let port = a.announce_port(vni(5), true);
    let (local, remote) = ("10.98.0.1:4789".parse().unwrap(), "10.98.0.2:4789".parse().unwrap());
    a.attach(port, &PortKind::Vxlan { local, remote, remote_vni: vni(77) }, MTU);
    let g2 = guest(&b.ns, "p1", "10.5.0.2", GUEST_MTU);
    b.packet_port(vni(5), "p1", MTU);
    quiet(&g2, "eth0");
    quiet(&foreign, "vx");
    let (mut gateway, mut packet) = (Station::on(&foreign, "vx"), Station::on(&g2, "eth0"));

    conform(&packet, &mut gateway, [&a, &b], true, LARGEST);
    for host in [&a, &b] {
        host.tables.load().networks[&vni(5)].fdb.flush();
    }
    // A foreign tunnel end is told what the network's MTU is.
    conform(&gateway, &mut packet, [&a, &b], true, MTU.into());
}
