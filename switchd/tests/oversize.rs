//! Stations with a larger MTU than their network's. Needs root.
#![cfg(feature = "io")]

mod support;

use support::bulk::there_and_back;
use support::site::Site;
use support::{Host, MTU, Namespace, guest, two_hosts, until, vni};
use switchd::tables::WorkerEvent;

/// Bytes that cross each way: thousands of segments.
const BYTES: usize = 3 << 20;

fn station(host: &mut Host, number: u8, mtu: u16) -> Namespace {
    let station = guest(&host.ns, "p1", &format!("10.5.0.{number}"), mtu);
    station.run(&format!("ip addr add fd05::{number}/64 dev eth0 nodad"));
    host.packet_port(vni(5), "p1", MTU);
    station
}

fn counter(host: &Host, name: &str) -> u64 {
    host.counters.snapshot().into_iter().find(|counter| counter.name == name).map_or(0, |counter| counter.value)
}

#[test]
#[ignore = "needs root"]
fn tcp_of_stations_with_a_larger_mtu_than_their_network_s_moves_every_byte() {
    for (mtu, other_mtu) in [(1500, 1500), (9000, 9000), (9000, 1500)] {
        let (mut a, mut b) = two_hosts(&[vni(5)], MTU);
        let (g1, g2) = (station(&mut a, 1, mtu), station(&mut b, 2, other_mtu));
        for offloads in ["on", "off"] {
            for station in [&g1, &g2] {
                station.run(&format!("ethtool -K eth0 tx {offloads} rx {offloads} tso {offloads} gso {offloads} gro {offloads}"));
            }
            for address in ["10.5.0.2", "fd05::2"] {
                let carried = there_and_back(&g1, &g2, address.parse().unwrap(), BYTES);

                let drops = (a.drops(), b.drops());
                assert_eq!(carried, Ok(()), "MTUs {mtu} and {other_mtu}, offloads {offloads}, {address}: {drops:?}");
            }
        }
        for host in [&a, &b] {
            assert_eq!(counter(host, "drop.too-big"), 0);
            assert!(counter(host, "oversize-carried") > 0);
        }
    }
}

#[test]
#[ignore = "needs root"]
fn an_interface_whose_mtu_somebody_lowered_takes_larger_frames_again() {
    let (mut a, mut b) = two_hosts(&[vni(5)], MTU);
    let (g1, _g2) = (station(&mut a, 1, 1500), station(&mut b, 2, 1500));
    b.ns.run("ip link set p1 mtu 1400");

    g1.run("busybox ping -c 1 -W 5 -s 1472 10.5.0.2");

    assert_eq!(counter(&b, "drop.too-big"), 0);
}

#[test]
#[ignore = "needs root"]
fn that_a_stations_packets_are_larger_than_the_network_s_is_counted_and_told_once() {
    let (mut a, mut b) = two_hosts(&[vni(5)], MTU);
    let (g1, _g2) = (station(&mut a, 1, 1500), station(&mut b, 2, 1500));

    g1.run("busybox ping -c 3 -W 5 -s 1472 10.5.0.2");

    assert_eq!((counter(&a, "oversize-carried"), counter(&b, "oversize-carried")), (3, 3));
    let port = a.tables.load().ports[1].clone().expect("its port");
    assert_eq!(port.traffic.snapshot().oversize, 3);
    let mut told = Vec::new();
    while let Ok(event) = a.events.try_recv() {
        told.extend(matches!(event, WorkerEvent::Oversize { .. }).then_some(event));
    }
    assert_eq!(told, [WorkerEvent::Oversize { port: switchd::tables::PortSlot(1), len: 1500 }]);
}

#[test]
#[ignore = "needs root"]
fn the_log_says_once_what_an_operator_can_set() {
    let mut site = Site::new(2);
    for number in [1, 2] {
        site.guest(number);
        site.guests[&number].run("ip link set e0 mtu 1500");
        site.start(number);
    }
    until("both are connected", || (1..=2).all(|number| site.connected(number) == 1));

    site.guests[&1].run("busybox ping -c 3 -W 5 -s 1472 192.168.5.2");

    let said = |number| site.log(number).lines().filter(|line| line.contains("want the station's MTU at 1400")).count();
    until("the log has it", || said(1) > 0 && said(2) > 0);
    assert_eq!((said(1), said(2)), (1, 1));
    assert!(site.log(1).lines().any(|line| line.contains("WARN") && line.contains("1400") && line.contains("interface: \"g\"")));
}
