//! Stations that leave a host with their interface and appear, silently, at another. Needs root.
#![cfg(feature = "io")]

mod support;

use std::net::UdpSocket;
use std::time::Duration;
use support::site::{Site, mac};
use support::{Namespace, run, until, vni};
use violin_common::api::switch::{FdbPlace, PortKind, PortSpec, SwitchReply, SwitchRequest};

/// Where switch `number` thinks the first guest is.
fn place(site: &Site, number: usize) -> Option<FdbPlace> {
    match site.ask(number, SwitchRequest::FdbList { vni: None }) {
        Ok(SwitchReply::Fdb(entries)) => entries.into_iter().find(|entry| entry.mac == mac(1)).map(|entry| entry.place),
        other => panic!("{other:?}"),
    }
}

#[test]
#[ignore = "needs root"]
fn a_station_whose_interface_is_gone_is_found_where_it_appears_although_it_is_silent() {
    let mut site = Site::new(3);
    site.guest(1);
    site.guest(2);
    for number in 1..=3 {
        site.start(number);
    }
    until("all are connected", || (1..=3).all(|number| site.connected(number) == 2));
    until("the guests reach each other", || site.reaches(1, 2));
    until("its place is known", || place(&site, 2) == Some(FdbPlace::Host("h1".parse().unwrap())));
    site.guests[&2].run(&format!("ip neigh replace 192.168.5.1 lladdr {} dev e0", mac(1)));

    site.hosts[&1].run("ip link del g");

    until("nobody thinks it is there", || (1..=2).all(|number| place(&site, number).is_none()));
    let moved = Namespace::new("moved");
    // Without IPv6 nothing makes it speak.
    moved.run("echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6");
    run(&format!(
        "ip -n {} link add e0 address {} type veth peer name m netns {} && ip -n {0} addr add 192.168.5.1/24 dev e0 && \
         ip -n {0} link set e0 mtu 1400 up && ip -n {2} link set dev m up",
        moved.0,
        mac(1),
        site.hosts[&3].0
    ));
    let kind = PortKind::Packet { interface: "m".into() };
    site.ask(3, SwitchRequest::PortAdd(PortSpec { vni: vni(5), kind, owned: None })).unwrap();
    let listener = moved.enter(|| UdpSocket::bind("192.168.5.1:9000").unwrap());
    listener.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let sender = site.guests[&2].enter(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    assert_eq!(place(&site, 2), None, "it has spoken: the test proves nothing");

    until("it is reached at its new place", || {
        sender.send_to(b"are you there?", "192.168.5.1:9000").unwrap();
        listener.recv_from(&mut [0; 20]).is_ok()
    });
}
