//! The host and the underlay are out of a guest's reach, and the guest out of theirs.

use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;
use violin_common::MacAddr;
use violin_tests::eventually;
use violin_tests::fabric::{Fabric, Host, MESH_PORT, network};
use violin_tests::frames::{frame, has_label, labelled};
use violin_tests::netns::{Netns, ip};
use violin_tests::wire::Wire;

const A: &str = "02:00:00:00:00:0a";
const B: &str = "02:00:00:00:00:0b";
/// The address guests give themselves.
const FORGED: [u8; 4] = [10, 99, 0, 77];
/// Address of the host's underlay, where the switch listens.
const UNDERLAY: [u8; 4] = [10, 99, 0, 1];
/// Another address of the host, on a link of its own.
const BESIDE: [u8; 4] = [10, 99, 1, 1];
/// Where a process of the host listens on every address.
const OPEN_PORT: u16 = 9999;
const SOON: Duration = violin_tests::PATIENCE;

fn mac(text: &str) -> MacAddr {
    text.parse().unwrap()
}

fn interface_mac(host: &Host, interface: &str) -> MacAddr {
    let output = host.netns.run("ip", &format!("-j link show {interface}"));
    let links: serde_json::Value = serde_json::from_slice(&output.stdout).expect("ip prints JSON");
    links[0]["address"].as_str().expect("a link has an address").parse().expect("a legal MAC")
}

/// An ARP request for `target`.
fn who_has(mac: MacAddr, target: [u8; 4]) -> Vec<u8> {
    let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 1];
    arp.extend(mac.0);
    arp.extend(FORGED);
    arp.extend([0; 6]);
    arp.extend(target);
    frame(MacAddr::BROADCAST, mac, 0x0806, &arp)
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum: u32 = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// An IPv4 packet with a right header.
fn ipv4(destination: MacAddr, source: MacAddr, to: [u8; 4], protocol: u8, payload: &[u8]) -> Vec<u8> {
    let total = 20 + payload.len();
    let mut ip = vec![0x45, 0, (total >> 8) as u8, total as u8, 0, 1, 0, 0, 64, protocol, 0, 0];
    ip.extend(FORGED);
    ip.extend(to);
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum);
    ip.extend(payload);
    frame(destination, source, 0x0800, &ip)
}

/// A UDP datagram; a checksum of 0 says that there is none.
fn udp(destination: MacAddr, source: MacAddr, to: [u8; 4], port: u16, payload: &[u8]) -> Vec<u8> {
    let mut udp = [port.to_be_bytes(), port.to_be_bytes(), ((8 + payload.len()) as u16).to_be_bytes(), [0, 0]].concat();
    udp.extend(payload);
    ipv4(destination, source, to, 17, &udp)
}

/// An echo request.
fn ping(destination: MacAddr, source: MacAddr, to: [u8; 4]) -> Vec<u8> {
    let mut echo = vec![8, 0, 0, 0, 0x12, 0x34, 0, 1];
    echo.extend([0x5a; 32]);
    let sum = checksum(&echo);
    echo[2..4].copy_from_slice(&sum);
    ipv4(destination, source, to, 1, &echo)
}

fn is_arp_reply(frame: &[u8]) -> bool {
    frame[12..14] == [0x08, 0x06] && frame[20..22] == [0, 2]
}

fn is_echo_reply(frame: &[u8]) -> bool {
    frame[12..14] == [0x08, 0x00] && frame[23] == 1 && frame[34] == 0
}

/// Everything by which a guest could reach the host behind its interface, at each of its addresses.
fn tries(host_end: MacAddr, guest: MacAddr) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    for target in [UNDERLAY, BESIDE] {
        frames.push(who_has(guest, target));
        frames.push(ping(host_end, guest, target));
        frames.push(udp(host_end, guest, target, OPEN_PORT, b"forged"));
    }
    frames.push(udp(host_end, guest, UNDERLAY, MESH_PORT, &[0x11; 64]));
    // To all: only what the stack takes from a broadcast of the link.
    frames.push(udp(MacAddr::BROADCAST, guest, [255; 4], OPEN_PORT, b"forged"));
    frames
}

/// A socket of the host that everybody may send to, at both its addresses.
fn open_port(host: &Host) -> UdpSocket {
    host.netns.ip("link add other type bridge");
    host.netns.ip("addr add 10.99.1.1/24 dev other");
    host.netns.ip("link set other up");
    host.netns.enter(|| UdpSocket::bind(("0.0.0.0", OPEN_PORT)).expect("a free port"))
}

/// The host's way to the forged address: silence must not be for want of one.
fn way_back(host: &Host, interface: &str) {
    let forged = Ipv4Addr::from(FORGED);
    host.netns.ip(&format!("route add {forged}/32 dev {interface}"));
    host.netns.ip(&format!("neigh add {forged} lladdr {A} dev {interface}"));
}

/// How many datagrams of a guest have come to the open port, once no more come.
fn arrived(listener: &UdpSocket) -> usize {
    listener.set_read_timeout(Some(Duration::from_millis(500))).expect("a legal timeout");
    std::iter::from_fn(|| listener.recv_from(&mut [0; 100]).ok()).count()
}

/// What the switch's mesh port made of datagrams that are not of its peers.
fn refused(host: &Host) -> u64 {
    host.counter("drop.bad-datagram") + host.counter("drop.unknown-receiver")
}

/// Without the guard each of the tries gets through: the positive control of the test below.
#[test]
#[ignore = "needs root"]
fn an_unguarded_interface_lets_everything_through() {
    let fabric = Fabric::start(2);
    let host = &fabric.hosts[0];
    let listener = open_port(host);
    let guest = Netns::new("g");
    ip(&format!("link add bare netns {} type veth peer name eth0 address {A} netns {}", host.netns.name(), guest.name()));
    host.netns.ip("link set bare up");
    way_back(host, "bare");
    guest.ip("link set eth0 up");
    eventually("the control's link is up", SOON, || host.netns.is_up("bare"));
    let wire = Wire::open(&guest, "eth0");
    let before = refused(host);

    for frame in tries(interface_mac(host, "bare"), mac(A)) {
        wire.send(&frame);
    }

    let mut answers = (0, 0);
    while let Some(frame) = wire.receive(Duration::from_secs(1), |frame| is_arp_reply(frame) || is_echo_reply(frame)) {
        answers = if is_arp_reply(&frame) { (answers.0 + 1, answers.1) } else { (answers.0, answers.1 + 1) };
    }
    assert_eq!(answers, (2, 2), "(ARP, echo) replies");
    assert_eq!(arrived(&listener), 3, "datagrams at the open port");
    eventually("the mesh port gets its datagram", SOON, || refused(host) == before + 1);
}

#[test]
#[ignore = "needs root"]
fn the_host_answers_a_guest_nothing() {
    let fabric = Fabric::start(2);
    fabric.carry(&network(7));
    let host = &fabric.hosts[0];
    let listener = open_port(host);
    let guest = host.guest(7, A);
    let peer = fabric.hosts[1].guest(7, B);
    way_back(host, &guest.interface);
    let before = refused(host);

    for frame in tries(interface_mac(host, &guest.interface), guest.mac) {
        guest.wire.send(&frame);
    }
    guest.wire.send(&labelled(MacAddr::BROADCAST, guest.mac, "after all"));

    assert!(peer.wire.receive(SOON, |frame| has_label(frame, "after all")).is_some(), "the fabric itself must work");
    assert_eq!(guest.wire.count(Duration::from_secs(1), |frame| frame[6..12] != peer.mac.0), 0, "something answered the guest");
    assert_eq!(arrived(&listener), 0, "a forged datagram reached a socket of the host");
    assert_eq!(refused(host), before, "a forged datagram reached the mesh port");
}

#[test]
#[ignore = "needs root"]
fn no_frame_of_the_host_reaches_a_guest() {
    let fabric = Fabric::start(1);
    fabric.carry(&network(7));
    let guest = fabric.hosts[0].guest(7, A);

    // What makes a host speak: link changes, and an address that somebody (DHCP) adds later, with a subnet to ask around in.
    let host = &fabric.hosts[0];
    host.netns.run("ip", &format!("link set {} down", guest.interface));
    host.netns.run("ip", &format!("link set {} up", guest.interface));
    host.netns.ip(&format!("addr add 192.0.2.1/24 dev {}", guest.interface));
    let route = host.netns.run("ip", "route get 192.0.2.2").stdout;
    assert!(String::from_utf8_lossy(&route).contains(&guest.interface), "the host would speak elsewhere");
    host.netns.run("busybox", "ping -c 2 -W 1 192.0.2.2");

    assert_eq!(guest.wire.count(Duration::from_secs(1), |_| true), 0, "the host spoke to the guest");

    let other = host.guest(7, B);
    other.wire.send(&labelled(MacAddr::BROADCAST, other.mac, "control"));
    assert!(guest.wire.receive(SOON, |frame| has_label(frame, "control")).is_some(), "nothing at all reaches this guest");
}

#[test]
#[ignore = "needs root"]
fn no_inner_frame_appears_bare_on_the_underlay() {
    // Where data is plain the capture shows that it sees what there is; where it is sealed nothing of a frame can be read.
    for (fabric, kind, wanted) in [(Fabric::start_plain(2), 0x23, 50..=usize::MAX), (Fabric::start(2), 0x21, 0..=0)] {
        fabric.carry(&network(7));
        let a = fabric.hosts[0].guest(7, A);
        let b = fabric.hosts[1].guest(7, B);
        let underlay = Wire::open(&fabric.underlay, "u1");

        for _ in 0..50 {
            a.wire.send(&labelled(MacAddr::BROADCAST, a.mac, "inner"));
            b.wire.send(&labelled(a.mac, b.mac, "inner"));
        }
        assert!(b.wire.receive(SOON, |frame| has_label(frame, "inner")).is_some());

        // A burst goes over a veth as one packet, so frames are counted, not packets.
        let (mut inner, mut data) = (0, 0);
        while let Some(frame) = underlay.receive(Duration::from_millis(300), |_| true) {
            assert!(frame[6..12] != a.mac.0 && frame[6..12] != b.mac.0, "a guest's frame is bare on the underlay: {frame:02x?}");
            let labels = frame.windows(5).filter(|bytes| bytes == b"inner").count();
            let mesh = frame.len() > 42 && frame[12..14] == [8, 0] && frame[23] == 17 && frame[36..38] == MESH_PORT.to_be_bytes();
            let is_data = mesh && frame[42] == kind;
            assert!(labels == 0 || is_data, "an inner frame is outside the mesh format: {frame:02x?}");
            inner += labels;
            data += usize::from(is_data);
        }
        assert!(wanted.contains(&inner) && data > 0, "{inner} frames were seen in {data} packets of data, want {wanted:?}");
    }
}

#[test]
#[ignore = "needs root"]
fn the_guard_outlives_a_kill_and_goes_with_a_clean_exit() {
    let mut fabric = Fabric::start(1);
    fabric.carry(&network(7));
    let guest = fabric.hosts[0].guest(7, A);

    fabric.hosts[0].kill_switch();
    guest.wire.drain();
    guest.wire.send(&who_has(guest.mac, UNDERLAY));
    assert_eq!(
        guest.wire.count(Duration::from_secs(1), |frame| frame[12..14] == [0x08, 0x06]),
        0,
        "after a kill the host answered"
    );

    fabric.start_switch(0);
    fabric.carry(&network(7));
    let again = fabric.hosts[0].guest(7, B);
    again.wire.send(&who_has(again.mac, UNDERLAY));
    assert_eq!(again.wire.count(Duration::from_secs(1), is_arp_reply), 0);

    assert!(fabric.hosts[0].stop_switch().success(), "SIGTERM ends with status 0");
    eventually("the guard of the live port is undone", SOON, || {
        let tables = fabric.hosts[0].netns.run("nft", "list tables").stdout;
        !String::from_utf8_lossy(&tables).contains(&again.interface)
    });
}
