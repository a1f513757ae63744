//! TAPs outlive their switch, and go with their port. Needs root.
#![cfg(feature = "io")]

mod support;

use nix::sys::signal::Signal;
use std::net::UdpSocket;
use std::time::Duration;
use support::site::Site;
use support::{Namespace, until, vni};
use violin_common::api::switch::{PortCondition, PortKind, PortSpec, SwitchReply, SwitchRequest};

const NETWORK: &str = "[[network]]\nvni = 5\n";

fn tap(interface: &str, netns: Option<&str>) -> String {
    let netns = netns.map(|netns| format!("netns = \"/run/netns/{netns}\"\n")).unwrap_or_default();
    format!("[[port]]\nkind = \"tap\"\nvni = 5\ninterface = \"{interface}\"\n{netns}")
}

/// What an operator sees of an interface, counters left out.
fn shown(at: &Namespace, interface: &str) -> String {
    let shown =
        at.run(&format!("ip -brief address show {interface}; ip -brief link show {interface}; ip route show dev {interface}"));
    // The kernel says UNKNOWN of a TAP that has never been without a switch.
    shown.replace("UNKNOWN", "UP     ")
}

fn exists(at: &Namespace, interface: &str) -> bool {
    at.try_run(&format!("ip link show {interface}")).status.success()
}

fn attached(site: &Site, number: usize) -> usize {
    site.conditions(number).iter().filter(|seen| seen.condition == PortCondition::Attached).count()
}

fn why(site: &Site) -> String {
    site.conditions(1).into_iter().find_map(|seen| seen.what).unwrap_or_default()
}

/// A datagram from 192.168.5.1 to 192.168.5.2 over the TAPs of hosts 1 and 2.
fn reaches(site: &Site) -> bool {
    let to = site.hosts[&2].enter(|| UdpSocket::bind("192.168.5.2:9000").unwrap());
    to.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let from = site.hosts[&1].enter(|| UdpSocket::bind("192.168.5.1:0").unwrap());
    from.send_to(b"there?", "192.168.5.2:9000").is_ok() && to.recv_from(&mut [0; 9]).is_ok()
}

#[test]
#[ignore = "needs root"]
fn a_restarted_switch_takes_up_its_taps_with_bridge_addresses_routes_and_mac() {
    let elsewhere = Namespace::new("else");
    let mut site = Site::new(2);
    let config = [NETWORK.into(), tap("t5", None), tap("t6", None), tap("t7", Some(&elsewhere.0))].concat();
    site.start_with(1, "pki", &config);
    site.start_with(2, "pki", &[NETWORK.into(), tap("t5", None)].concat());
    until("all are attached", || attached(&site, 1) == 3 && attached(&site, 2) == 1);
    site.hosts[&1].run("ip addr add 192.168.5.1/24 dev t5 && ip route add 10.9.0.0/16 via 192.168.5.2 dev t5");
    site.hosts[&1].run("ip link add b0 type bridge && ip link set t6 master b0");
    site.hosts[&2].run("ip addr add 192.168.5.2/24 dev t5");
    elsewhere.run("ip addr add 192.168.5.7/24 dev t7");
    let all = |site: &Site| {
        let bridge = site.hosts[&1].run("ip -o link show master b0 | cut -d: -f2");
        [shown(&site.hosts[&1], "t5"), shown(&site.hosts[&1], "t6"), shown(&elsewhere, "t7"), bridge]
    };
    until("the networks are connected", || reaches(&site));
    // From here on the other host asks nobody for an address.
    let mac = |site: &Site| site.hosts[&1].try_run("ip -o link show t5 | grep -o \"ether [^ ]*\"").stdout;
    let first = mac(&site);
    site.hosts[&2].run(&format!(
        "ip neigh replace 192.168.5.1 lladdr {} dev t5",
        String::from_utf8_lossy(&first).trim().trim_start_matches("ether ")
    ));
    let link_local = |all: &[String; 4]| all[..3].iter().all(|shown| shown.contains("fe80::") && !shown.contains("DOWN"));
    until("IPv6 has settled", || link_local(&all(&site)));
    let before = all(&site);

    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        let mut daemon = site.daemons.remove(&1).unwrap();
        daemon.signal(signal);
        daemon.0.wait().unwrap();
        assert!(exists(&site.hosts[&1], "t5"), "gone by {signal}");
        site.start_with(1, "pki", &config);

        until("all are attached", || attached(&site, 1) == 3);
        until("all are up again", || all(&site) == before);
        until("it works again", || reaches(&site));
    }

    site.hosts[&1].run("ip link del t5");
    until("it is made anew", || mac(&site) == first);
}

#[test]
#[ignore = "needs root"]
fn a_tap_goes_with_its_port_and_one_that_its_operator_made_stays() {
    let elsewhere = Namespace::new("else");
    let mut site = Site::new(1);
    site.hosts[&1].run("ip tuntap add mode tap name own");
    let config = [NETWORK.into(), tap("t5", None), tap("own", None), tap("t7", Some(&elsewhere.0))].concat();
    site.start_with(1, "pki", &config);
    until("all are attached", || attached(&site, 1) == 3);
    let add = PortSpec { vni: vni(5), kind: PortKind::Tap { interface: "t8".into(), netns: None }, owned: None };
    let Ok(SwitchReply::Port(port)) = site.ask(1, SwitchRequest::PortAdd(add)) else { panic!("refused") };
    assert!(exists(&site.hosts[&1], "t8"));

    site.ask(1, SwitchRequest::PortRemove { port }).unwrap();
    until("it went with its port", || !exists(&site.hosts[&1], "t8"));

    site.config(1, "pki", NETWORK);
    site.daemons[&1].signal(Signal::SIGHUP);
    until("they went with their ports", || !exists(&site.hosts[&1], "t5") && !exists(&elsewhere, "t7"));
    until("no port is left", || site.conditions(1).is_empty());
    assert!(exists(&site.hosts[&1], "own"), "what its operator made was removed");
}

#[test]
#[ignore = "needs root"]
fn an_interface_that_is_not_the_port_s_to_take_is_named_and_left_alone() {
    let mut site = Site::new(1);
    site.hosts[&1].run("ip link add t5 type veth peer name far");
    site.start_with(1, "pki", &[NETWORK.into(), tap("t5", None)].concat());
    until("it says why it waits", || why(&site).contains("interface t5 is there and is no TAP with one queue: remove it"));

    site.hosts[&1].run("ip link del t5");
    until("it is attached", || attached(&site, 1) == 1);

    // A second switch of the same host, by another name.
    let first = site.daemons.remove(&1).unwrap();
    site.listens.insert(1, "127.0.0.2".into());
    std::fs::remove_file(site.socket(1)).unwrap();
    site.start_with(1, "pki", &[NETWORK.into(), tap("t5", None)].concat());
    until("it says why it waits", || why(&site).contains("interface t5 is there and another program holds it"));
    // Wanted for another network it is said once, too.
    site.config(1, "pki", &[NETWORK.into(), tap("t5", None)].concat().replace("vni = 5", "vni = 6"));
    site.daemons[&1].signal(Signal::SIGHUP);
    let others = |site: &Site| site.log(1).matches("another program holds it").count();
    let before = others(&site);
    until("it is wanted for the other network", || others(&site) > before);
    let said = others(&site);
    until("it was looked for many times more", || site.conditions(1).iter().any(|seen| seen.since_s >= 2));
    assert_eq!(others(&site), said, "{}", site.log(1));
    drop(first);
    until("it is made anew", || attached(&site, 1) == 1);
}

#[test]
#[ignore = "needs root"]
fn a_tap_left_by_a_port_of_another_network_is_made_anew() {
    let mut site = Site::new(1);
    site.start_with(1, "pki", &[NETWORK.into(), tap("t5", None)].concat());
    until("it is attached", || attached(&site, 1) == 1);
    site.hosts[&1].run("ip addr add 192.168.5.1/24 dev t5");
    drop(site.daemons.remove(&1));

    let config = [NETWORK.into(), tap("t5", None)].concat().replace("vni = 5", "vni = 6");
    site.start_with(1, "pki", &config);

    until("it is attached", || attached(&site, 1) == 1);
    assert!(!shown(&site.hosts[&1], "t5").contains("192.168.5.1"), "who was in network 5 is in network 6");
}
