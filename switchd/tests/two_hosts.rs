//! Two data planes in two network namespaces joined by a cable. Needs root.
#![cfg(feature = "io")]

mod support;

use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use support::{MTU, guest, nic, two_hosts, until, vni};
use switchd::drops::DropReason;
use switchd::io::sys::set_option;
use switchd::tables::Place;
use violin_common::PortId;

#[test]
#[ignore = "needs root"]
fn guests_on_two_hosts_ping_and_speak_tcp() {
    let (mut a, mut b) = two_hosts(&[vni(5)], MTU);
    let g1 = guest(&a.ns, "p1", "10.5.0.1", MTU);
    let g2 = guest(&b.ns, "p1", "10.5.0.2", MTU);
    a.packet_port(vni(5), "p1", MTU);
    b.packet_port(vni(5), "p1", MTU);

    g1.run("busybox ping -c 3 -W 2 10.5.0.2");
    g1.run("busybox ping -c 2 -W 2 -s 1372 10.5.0.2");
    let _server = g2.start("iperf3 -s -1");
    until("iperf3 listens", || g2.run("ss -ltn").contains(":5201"));
    let report = g1.run("iperf3 -c 10.5.0.2 -t 2 -J");

    let rate =
        report.split("\"bits_per_second\":").last().and_then(|rest| rest.trim().split([',', '\n']).next()).unwrap().to_owned();
    println!("{rate} bit/s; {:?} {:?}", a.drops(), b.drops());
}

#[test]
#[ignore = "needs root"]
fn the_hosts_own_stack_neither_hears_nor_speaks_on_a_packet_port() {
    let (mut a, _b) = two_hosts(&[vni(5)], MTU);
    let g1 = guest(&a.ns, "p1", "10.99.0.77", MTU);
    a.ns.run("ip addr add 192.0.2.1/24 dev p1");
    let port = a.packet_port(vni(5), "p1", MTU);

    // The host's underlay address is what the guest would forge its way to.
    let ping = g1.try_run("busybox ping -c 1 -W 1 10.99.0.1");
    assert!(!ping.status.success(), "the host answered");
    assert!(!g1.run("ip neigh").contains("lladdr"), "the host answered ARP: {}", g1.run("ip neigh"));
    assert_eq!(a.ns.run("ip -o addr show dev p1"), "", "addresses were left");
    assert!(a.ns.run("nft list table netdev violin_p1").contains("policy drop"));

    // Killed, the guard stays: the interface is closed although nobody serves it.
    drop(a.plane.take());
    assert!(a.ns.run("nft list table netdev violin_p1").contains("policy drop"));
    assert!(!g1.try_run("busybox ping -c 1 -W 1 10.99.0.1").status.success(), "open after a kill");

    // The next daemon takes it over and gives it back when it lets go.
    let mut again = support::Host::start(std::mem::replace(&mut a.ns, support::Namespace::new("x")), "10.99.0.1");
    again.network(vni(5), MTU);
    let (slot, id) = again.packet_port(vni(5), "p1", MTU);
    assert_eq!(slot, port.0);
    again.ns.enter(|| again.plane().detach(slot, id, false));
    assert!(!again.ns.run("nft list tables").contains("violin_p1"));
}

#[test]
#[ignore = "needs root"]
fn a_vanished_interface_is_no_error_and_is_found_again() {
    let (mut a, mut b) = two_hosts(&[vni(5)], MTU);
    let g1 = guest(&a.ns, "p1", "10.5.0.1", MTU);
    let g2 = guest(&b.ns, "p1", "10.5.0.2", MTU);
    let (slot, id) = a.packet_port(vni(5), "p1", MTU);
    b.packet_port(vni(5), "p1", MTU);
    g1.run("busybox ping -c 1 -W 2 10.5.0.2");

    a.ns.run("ip link del p1");
    drop(g1);
    let g1 = guest(&a.ns, "p1", "10.5.0.1", MTU);
    until("the new interface is served", || g1.try_run("busybox ping -c 1 -W 1 10.5.0.2").status.success());

    a.ns.run("ip link set p1 down");
    until("a downed interface comes up again", || a.ns.run("ip -o link show p1").contains(",UP"));
    g1.run("ip link set eth0 up");
    until("and is served", || g1.try_run("busybox ping -c 1 -W 1 10.5.0.2").status.success());

    a.ns.run("ip link del p1");
    a.ns.enter(|| a.plane().detach(slot, id, false));
    drop(g2);
}

#[test]
#[ignore = "needs root"]
fn a_port_removed_while_its_interface_vanishes_leaves_no_guard_and_the_next_one_has_its_own() {
    let (mut a, _b) = two_hosts(&[vni(5)], MTU);
    for round in 0..24u64 {
        a.ns.run("ip link add p1 type veth peer name p2");
        let (slot, id) = a.packet_port(vni(5), "p1", MTU);
        assert!(a.ns.run("nft list ruleset").contains("policy drop"), "round {round}: the port is open without its guard");

        a.ns.run("ip link del p1");
        // From at once to when the lost interface has been looked for: the moments differ from round to round.
        std::thread::sleep(Duration::from_millis(round % 12));
        a.ns.enter(|| a.plane().detach(slot, id, false));

        assert!(!a.ns.run("nft list tables").contains("violin_p1"), "round {round}: the guard was left behind");
    }
}

/// Whether this kernel lets a chain name an interface that is still to come.
fn guards_ahead(ns: &support::Namespace) -> bool {
    ns.run("nft add table netdev probe");
    let chain = "nft \"add chain netdev probe c { type filter hook ingress device still-to-come priority 0; }\"";
    let can = ns.try_run(chain).status.success();
    ns.run("nft delete table netdev probe");
    can
}

#[test]
#[ignore = "needs root"]
fn frames_for_an_interface_that_is_still_on_its_way_wait_for_it() {
    let (mut a, mut b) = two_hosts(&[vni(5)], MTU);
    let g1 = guest(&a.ns, "p1", "10.5.0.1", MTU);
    a.packet_port(vni(5), "p1", MTU);
    let port = b.announce_port(vni(5), false);
    let kind = violin_common::api::switch::PortKind::Packet { interface: "p1".into() };
    let missing = b.ns.enter(|| b.plane().attach(port.0, port.1, &kind, nic(MTU), switchd::switch::Expecting::Arrival));
    assert!(matches!(missing, Err(switchd::io::dataplane::AttachError::NotThere(_))), "{missing:?}");
    // Where the kernel can do it (6.16) the guard is there first: from its first frame on the guest is alone with the switch.
    let ahead = guards_ahead(&b.ns);
    assert_eq!(b.ns.run("nft list tables").contains("violin_p1"), ahead, "the guard and what the kernel can do");
    let g2 = guest(&b.ns, "p1", "10.5.0.2", MTU);
    if ahead {
        b.ns.run("ip addr add 10.5.0.99/24 dev p1 && ip link set p1 up");
        let ping = g2.try_run("busybox ping -c 1 -W 1 10.5.0.99");
        assert!(!ping.status.success(), "the host answered before the port was attached");
    } else {
        println!("this kernel guards no interface ahead: not tested");
    }
    g2.run("ip link set eth0 address 52:54:00:00:00:02");
    g1.run("ip neigh add 10.5.0.2 lladdr 52:54:00:00:00:02 dev eth0");
    let socket = g2.enter(|| UdpSocket::bind("10.5.0.2:9000").unwrap());
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();

    // Sent before the port is attached.
    let sender = g1.enter(|| UdpSocket::bind("10.5.0.1:0").unwrap());
    for number in 0..100u8 {
        sender.send_to(&[number], "10.5.0.2:9000").unwrap();
    }
    b.attach(port, &kind, MTU);

    for number in 0..100u8 {
        let mut byte = [0];
        socket.recv(&mut byte).expect("every datagram arrives");
        assert_eq!(byte, [number], "in order");
    }
}

#[test]
#[ignore = "needs root"]
fn a_guest_that_sends_more_than_the_underlay_takes_does_not_keep_the_mesh_port_from_being_read() {
    let (mut a, mut b) = two_hosts(&[vni(5)], MTU);
    let g1 = guest(&a.ns, "p1", "10.5.0.1", MTU);
    let _g2 = guest(&b.ns, "p1", "10.5.0.2", MTU);
    a.packet_port(vni(5), "p1", MTU);
    b.packet_port(vni(5), "p1", MTU);
    g1.run("busybox ping -c 1 -W 2 10.5.0.2");
    a.ns.run("tc qdisc add dev under root tbf rate 20mbit burst 64kb limit 64mb");
    let stop = AtomicBool::new(false);
    let flooding = g1.enter(|| UdpSocket::bind("10.5.0.1:0").unwrap());
    set_option(flooding.as_fd(), libc::SOL_UDP, libc::UDP_SEGMENT, 1300i32).unwrap();
    let peer = b.ns.enter(|| UdpSocket::bind("10.99.0.2:0").unwrap());

    let took = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // Super-frames of 40 segments; what finds no room is not waited for.
                let _ = flooding.send_to(&[7; 52_000], "10.5.0.2:9");
            }
        });
        let full = || a.counters.drops.of(DropReason::TunnelBusy) > 0;
        let deadline = Instant::now() + Duration::from_secs(120);
        while !full() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        let began = Instant::now();
        for number in 0..8u8 {
            peer.send_to(&[0x40, number], a.address).unwrap();
            while a.quic.try_recv().is_err() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        stop.store(true, Ordering::Relaxed);
        full().then(|| began.elapsed())
    });

    println!("eight datagrams one after the other were heard within {took:?}");
    assert!(took.expect("the mesh port's buffer is full") < Duration::from_secs(10), "heard within {took:?}");
}

#[test]
#[ignore = "needs root"]
fn a_tap_in_a_namespace_is_a_station() {
    let (mut a, mut b) = two_hosts(&[vni(5)], MTU);
    let g1 = support::Namespace::new("tap");
    let port = a.announce_port(vni(5), false);
    let kind = violin_common::api::switch::PortKind::Tap { interface: "access".into(), netns: Some(g1.path()) };
    a.attach(port, &kind, MTU);
    g1.run("ip addr add 10.5.0.1/24 dev access");
    let g2 = guest(&b.ns, "p1", "10.5.0.2", MTU);
    b.packet_port(vni(5), "p1", MTU);

    g1.run("busybox ping -c 2 -W 2 10.5.0.2");
    let _server = g1.start("iperf3 -s -1");
    until("iperf3 listens", || g1.run("ss -ltn").contains(":5201"));
    let report = g2.run("iperf3 -c 10.5.0.1 -t 1 -f m");
    println!("{report}");
    a.plane().detach(port.0, port.1, false);
    assert!(!g1.run("ip -o link").contains("access"), "a detached TAP is gone");
}

#[test]
#[ignore = "needs root"]
fn jumbo_frames_cross_an_ordinary_underlay() {
    let (mut a, mut b) = two_hosts(&[vni(5)], 9000);
    let g1 = guest(&a.ns, "p1", "10.5.0.1", 9000);
    let g2 = guest(&b.ns, "p1", "10.5.0.2", 9000);
    a.packet_port(vni(5), "p1", 9000);
    b.packet_port(vni(5), "p1", 9000);

    g1.run("busybox ping -c 2 -W 2 -s 8972 10.5.0.2");
    let _server = g2.start("iperf3 -s -1");
    until("iperf3 listens", || g2.run("ss -ltn").contains(":5201"));
    g1.run("iperf3 -c 10.5.0.2 -t 1");
}

#[test]
#[ignore = "needs root"]
fn networks_do_not_mix() {
    let (mut a, mut b) = two_hosts(&[vni(5), vni(6)], MTU);
    let g1 = guest(&a.ns, "p1", "10.5.0.1", MTU);
    let g2 = guest(&b.ns, "p1", "10.5.0.2", MTU);
    a.packet_port(vni(5), "p1", MTU);
    b.packet_port(vni(6), "p1", MTU);

    assert!(!g1.try_run("busybox ping -c 2 -W 1 10.5.0.2").status.success());
    assert!(!g2.try_run("busybox ping -c 2 -W 1 10.5.0.1").status.success());
}

#[test]
#[ignore = "needs root"]
fn a_removed_port_does_not_speak_for_the_next_one_of_its_slot() {
    let (mut a, _b) = two_hosts(&[vni(5), vni(6)], MTU);
    let g1 = guest(&a.ns, "p1", "10.5.0.1", MTU);
    let (slot, id) = a.packet_port(vni(5), "p1", MTU);

    // Its successor is in the tables, and the detach is still on its way.
    a.change(|tables| {
        let port = tables.ports[usize::from(slot.0)].as_mut().unwrap();
        (port.id, port.vni) = (PortId(id.0 + 1), vni(6));
    });
    g1.try_run("busybox ping -c 1 -W 1 10.5.0.2");

    until("its frames are counted", || a.counters.drops.of(DropReason::NoNetwork) > 0);
    let learned = a.tables.load().networks[&vni(6)].fdb.entries();
    assert!(learned.iter().all(|row| row.place != Place::Port(slot)), "it spoke: {learned:?}");
}
