//! The host and the underlay are out of a guest's reach, and the guest out of theirs.

use std::time::Duration;
use violin_common::MacAddr;
use violin_tests::eventually;
use violin_tests::fabric::{Fabric, Guest, Host, MESH_PORT, network};
use violin_tests::frames::{frame, has_label, labelled};
use violin_tests::wire::Wire;

const A: &str = "02:00:00:00:00:0a";
const B: &str = "02:00:00:00:00:0b";
/// Patience with what must come, on a slow machine too.
const SOON: Duration = Duration::from_secs(10);

fn mac(text: &str) -> MacAddr {
    text.parse().unwrap()
}

fn interface_mac(host: &Host, interface: &str) -> MacAddr {
    let output = host.netns.run("ip", &format!("-j link show {interface}"));
    let links: serde_json::Value = serde_json::from_slice(&output.stdout).expect("ip prints JSON");
    links[0]["address"].as_str().expect("a link has an address").parse().expect("a legal MAC")
}

/// An ARP request for `target`.
fn who_has(guest: &Guest, target: [u8; 4]) -> Vec<u8> {
    let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 1];
    arp.extend(guest.mac.0);
    arp.extend([10, 99, 0, 77]);
    arp.extend([0; 6]);
    arp.extend(target);
    frame(MacAddr::BROADCAST, guest.mac, 0x0806, &arp)
}

/// An IPv4 UDP datagram with a right header checksum.
fn udp(destination: MacAddr, source: MacAddr, from: [u8; 4], to: [u8; 4], port: u16, payload: &[u8]) -> Vec<u8> {
    let total = 28 + payload.len();
    let mut ip = vec![0x45, 0, (total >> 8) as u8, total as u8, 0, 1, 0, 0, 64, 17, 0, 0];
    ip.extend(from);
    ip.extend(to);
    let mut sum: u32 = ip.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    ip[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    ip.extend(port.to_be_bytes());
    ip.extend(port.to_be_bytes());
    ip.extend(((8 + payload.len()) as u16).to_be_bytes());
    ip.extend([0, 0]);
    ip.extend(payload);
    frame(destination, source, 0x0800, &ip)
}

/// Without the guard the host answers: the positive control of the tests below.
#[test]
#[ignore = "needs root"]
fn an_unguarded_interface_lets_the_host_answer() {
    let fabric = Fabric::prepare(1);
    let host = &fabric.hosts[0];
    let guest = violin_tests::netns::Netns::new("g");
    violin_tests::netns::ip(&format!(
        "link add bare netns {} type veth peer name eth0 address {A} netns {}",
        host.netns.name(),
        guest.name()
    ));
    host.netns.ip("link set bare up");
    guest.ip("link set eth0 up");
    let wire = Wire::open(&guest, "eth0");
    let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 1];
    arp.extend(mac(A).0);
    arp.extend([10, 99, 0, 77, 0, 0, 0, 0, 0, 0, 10, 99, 0, 1]);

    wire.send(&frame(MacAddr::BROADCAST, mac(A), 0x0806, &arp));

    assert!(wire.receive(SOON, |frame| frame[12..14] == [0x08, 0x06] && frame[20..22] == [0, 2]).is_some(), "the control failed");
}

#[test]
#[ignore = "needs root"]
fn the_host_answers_a_guest_nothing() {
    let fabric = Fabric::start(2);
    fabric.carry(&network(7));
    let guest = fabric.hosts[0].guest(7, A);
    let peer = fabric.hosts[1].guest(7, B);
    let host_end = interface_mac(&fabric.hosts[0], &guest.interface);
    let listener = fabric.hosts[0].netns.enter(|| std::net::UdpSocket::bind("0.0.0.0:9999").expect("a free port"));
    listener.set_read_timeout(Some(Duration::from_millis(500))).expect("a legal timeout");
    let unknown = fabric.hosts[0].counter("drop.bad-datagram") + fabric.hosts[0].counter("drop.unknown-receiver");

    for target in [[10, 99, 0, 1], [10, 99, 0, 2], [127, 0, 0, 1]] {
        guest.wire.send(&who_has(&guest, target));
        for destination in [host_end, MacAddr::BROADCAST] {
            guest.wire.send(&udp(destination, guest.mac, [10, 99, 0, 77], target, 9999, b"forged"));
            guest.wire.send(&udp(destination, guest.mac, [10, 99, 0, 2], target, MESH_PORT, &[0x11; 64]));
            let mut echo = vec![8, 0, 0xf7, 0xff, 0, 0, 0, 0];
            echo.resize(40, 0);
            let mut ping = udp(destination, guest.mac, [10, 99, 0, 77], target, 0, &echo);
            ping[23] = 1;
            guest.wire.send(&ping);
        }
    }
    guest.wire.send(&labelled(MacAddr::BROADCAST, guest.mac, "after all"));

    assert!(peer.wire.receive(SOON, |frame| has_label(frame, "after all")).is_some(), "the fabric itself must work");
    assert_eq!(guest.wire.count(Duration::from_secs(1), |frame| frame[6..12] != peer.mac.0), 0, "something answered the guest");
    assert!(listener.recv_from(&mut [0; 100]).is_err(), "a forged datagram reached a socket of the host");
    let after = fabric.hosts[0].counter("drop.bad-datagram") + fabric.hosts[0].counter("drop.unknown-receiver");
    assert_eq!(after, unknown, "a forged datagram reached the mesh port");
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
    let fabric = Fabric::start(2);
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
    let mut inner = 0;
    while let Some(frame) = underlay.receive(Duration::from_millis(300), |_| true) {
        assert!(frame[6..12] != a.mac.0 && frame[6..12] != b.mac.0, "a guest's frame is bare on the underlay: {frame:02x?}");
        let labels = frame.windows(5).filter(|bytes| bytes == b"inner").count();
        let mesh = frame.len() > 42 && frame[12..14] == [8, 0] && frame[23] == 17 && frame[36..38] == MESH_PORT.to_be_bytes();
        assert!(labels == 0 || mesh && frame[42] == 0x11, "an inner frame is outside the mesh format: {frame:02x?}");
        inner += labels;
    }
    assert!(inner >= 50, "only {inner} frames were seen: the capture proves nothing");
}

#[test]
#[ignore = "needs root"]
fn the_guard_outlives_a_kill_and_goes_with_a_clean_exit() {
    let mut fabric = Fabric::start(1);
    fabric.carry(&network(7));
    let guest = fabric.hosts[0].guest(7, A);

    fabric.hosts[0].kill_switch();
    guest.wire.drain();
    guest.wire.send(&who_has(&guest, [10, 99, 0, 1]));
    assert_eq!(
        guest.wire.count(Duration::from_secs(1), |frame| frame[12..14] == [0x08, 0x06]),
        0,
        "after a kill the host answered"
    );

    fabric.start_switch(0);
    fabric.carry(&network(7));
    let again = fabric.hosts[0].guest(7, B);
    again.wire.send(&who_has(&again, [10, 99, 0, 1]));
    assert_eq!(again.wire.count(Duration::from_secs(1), |frame| frame[12..14] == [0x08, 0x06] && frame[20..22] == [0, 2]), 0);

    assert!(fabric.hosts[0].stop_switch().success(), "SIGTERM ends with status 0");
    eventually("the guard of the live port is undone", SOON, || {
        let tables = fabric.hosts[0].netns.run("nft", "list tables").stdout;
        !String::from_utf8_lossy(&tables).contains(&again.interface)
    });
}
