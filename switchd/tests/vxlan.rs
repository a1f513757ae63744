//! A gateway port talks to a Linux kernel VXLAN device. Needs root.
#![cfg(feature = "io")]

mod support;

use std::net::UdpSocket;
use std::time::Duration;
use support::bulk::there_and_back;
use support::{MTU, Namespace, guest, run, two_hosts, until, vni};
use violin_common::MacAddr;
use violin_common::api::switch::PortKind;

#[test]
#[ignore = "needs root"]
fn a_kernel_vxlan_device_and_our_guests_talk_both_ways() {
    let (mut a, mut b) = two_hosts(&[vni(5)], MTU);
    let g1 = guest(&a.ns, "p1", "10.5.0.1", MTU);
    let g2 = guest(&b.ns, "p1", "10.5.0.2", MTU);
    a.packet_port(vni(5), "p1", MTU);
    b.packet_port(vni(5), "p1", MTU);
    let foreign = Namespace::new("foreign");
    run(&format!("ip link add wan netns {} type veth peer name wan netns {}", a.ns.0, foreign.0));
    a.ns.run("ip addr add 10.98.0.1/24 dev wan && ip link set wan up");
    foreign.run("ip addr add 10.98.0.2/24 dev wan && ip link set wan up");
    // Its MTU is the kernel's own idea, larger than the network's.
    foreign.run("ip link add vx type vxlan id 77 remote 10.98.0.1 local 10.98.0.2 dstport 4789 dev wan");
    foreign.run("ip addr add 10.5.0.9/24 dev vx && ip link set vx up");
    let port = a.announce_port(vni(5), true);
    let (local, remote) = ("10.98.0.1:4789".parse().unwrap(), "10.98.0.2:4789".parse().unwrap());
    a.attach(port, &PortKind::Vxlan { local, remote, remote_vni: vni(77) }, MTU);

    for guest in [&g1, &g2] {
        foreign.run(&format!("busybox ping -c 2 -W 2 10.5.0.{}", if guest.0 == g1.0 { 1 } else { 2 }));
        guest.run("busybox ping -c 2 -W 2 -s 1372 10.5.0.9");
        let server = guest.start("iperf3 -s");
        until("iperf3 listens", || guest.run("ss -ltn").contains(":5201"));
        let address =
            guest.run("ip -o -4 addr show dev eth0").split_whitespace().nth(3).unwrap().split('/').next().unwrap().to_owned();
        println!("to the guest: {}", foreign.run(&format!("iperf3 -c {address} -t 1 -f m | grep receiver")));
        println!("from the guest: {}", foreign.run(&format!("iperf3 -c {address} -t 1 -f m -R | grep receiver")));
        drop(server);
    }
    println!("{:?} {:?}", a.drops(), b.drops());

    // A full-size packet of the foreign side is too big for the network: it is told, and then fits.
    foreign.run("ip link set vx mtu 1450");
    let answers = || a.counters.snapshot().iter().find(|c| c.name == "too-big-answers").unwrap().value;
    let before = answers();
    let _ = foreign.try_run("busybox ping -c 2 -W 1 -s 1422 10.5.0.2");
    assert!(answers() > before, "{:?}", a.drops());
    until("the path MTU is known", || foreign.run("ip route get 10.5.0.2").contains("mtu 1400"));
}

#[test]
#[ignore = "needs root"]
fn a_gateway_on_all_addresses_speaks_from_the_one_its_foreign_end_speaks_to() {
    let (mut a, _b) = two_hosts(&[vni(5)], MTU);
    let g1 = guest(&a.ns, "p1", "10.5.0.1", MTU);
    a.packet_port(vni(5), "p1", MTU);
    let foreign = Namespace::new("foreign");
    run(&format!("ip link add wan netns {} type veth peer name wan netns {}", a.ns.0, foreign.0));
    a.ns.run("ip addr add 10.98.0.1/24 dev wan && ip addr add 10.98.0.3/24 dev wan && ip link set wan up");
    foreign.run("ip addr add 10.98.0.2/24 dev wan && ip link set wan up");
    let port = a.announce_port(vni(5), true);
    let (local, remote) = ("0.0.0.0:4789".parse().unwrap(), "10.98.0.2:4789".parse().unwrap());
    a.attach(port, &PortKind::Vxlan { local, remote, remote_vni: vni(77) }, MTU);
    let end = foreign.enter(|| UdpSocket::bind("10.98.0.2:4789").unwrap());
    end.set_read_timeout(Some(Duration::from_secs(60))).unwrap();

    // A broadcast of a station behind it, and one of our guest afterwards: an ARP request.
    let vxlan = [8, 0, 0, 0, 0, 0, 77, 0];
    let frame = [&[0xff; 6][..], &[0x52, 0x54, 0, 0, 0, 9], &[0x88, 0xb5], &[7; 46]].concat();
    end.send_to(&[&vxlan[..], &frame].concat(), "10.98.0.3:4789").unwrap();
    let heard = |mac| a.tables.load().networks[&vni(5)].fdb.entries().iter().any(|row| row.mac == mac);
    until("the gateway has heard it", || heard(MacAddr([0x52, 0x54, 0, 0, 0, 9])));
    // What our guest said before that left from where the kernel chose.
    end.set_nonblocking(true).unwrap();
    while end.recv(&mut [0; 2000]).is_ok() {}
    end.set_nonblocking(false).unwrap();
    let _ = g1.try_run("busybox ping -c 1 -W 1 10.5.0.9");

    let (_, from) = end.recv_from(&mut [0; 2000]).unwrap();
    assert_eq!(from.ip().to_string(), "10.98.0.3");
}

#[test]
#[ignore = "needs root"]
fn stations_with_a_larger_mtu_speak_tcp_with_a_foreign_tunnel_end_that_takes_less() {
    let (mut a, mut b) = two_hosts(&[vni(5)], MTU);
    let (g1, g2) = (guest(&a.ns, "p1", "10.5.0.1", 1500), guest(&b.ns, "p1", "10.5.0.2", 1500));
    a.packet_port(vni(5), "p1", MTU);
    b.packet_port(vni(5), "p1", MTU);
    let foreign = Namespace::new("foreign");
    run(&format!("ip link add wan netns {} type veth peer name wan netns {}", a.ns.0, foreign.0));
    a.ns.run("ip addr add 10.98.0.1/24 dev wan && ip link set wan up");
    // To the foreign end less passes than from it, and nobody but the switch knows.
    a.ns.run("ip route change 10.98.0.0/24 dev wan src 10.98.0.1 mtu 1400");
    foreign.run("ip addr add 10.98.0.2/24 dev wan && ip link set wan up");
    foreign.run("ip link add vx type vxlan id 77 remote 10.98.0.1 local 10.98.0.2 dstport 4789 dev wan");
    foreign.run("ip addr add 10.5.0.9/24 dev vx && ip link set vx mtu 1450 up");
    let port = a.announce_port(vni(5), true);
    let (local, remote) = ("10.98.0.1:4789".parse().unwrap(), "10.98.0.2:4789".parse().unwrap());
    a.attach(port, &PortKind::Vxlan { local, remote, remote_vni: vni(77) }, MTU);

    for station in [&g1, &g2] {
        let carried = there_and_back(station, &foreign, [10, 5, 0, 9].into(), 1 << 20);
        assert_eq!(carried, Ok(()), "{:?} {:?}", a.drops(), b.drops());
    }
    assert!(a.drops().iter().any(|(name, _)| name == "drop.gateway-too-big"), "nothing was too big: {:?}", a.drops());
}
