//! Guards of packet ports that somebody takes away, as `nft flush ruleset` does. Needs root.
#![cfg(feature = "io")]

mod support;

use std::io::Write;
use std::net::UdpSocket;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::site::Site;
use support::{Host, MTU, Namespace, guest, nic, two_hosts, until, vni};
use switchd::io::dataplane::DataPlane;
use switchd::io::nft::Keeping;
use switchd::switch::Expecting;
use switchd::tables::PortSlot;
use tokio::sync::mpsc;
use violin_common::PortId;
use violin_common::api::switch::{PortCondition, PortKind};

const OPEN: u16 = 9999;

/// What a guest can make the host behind its port do: answer its ARP for `address`, take its datagrams to that address.
fn host_hears(host: &Namespace, interface: &str, guest: &Namespace, eth: &str, address: &str) -> (bool, bool) {
    let listener = host.enter(|| UdpSocket::bind(("0.0.0.0", OPEN)).unwrap());
    listener.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let sender = guest.enter(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    guest.run(&format!("ip route replace {address}/32 dev {eth}; ip neigh del {address} dev {eth} 2>/dev/null; true"));
    let _ = sender.send_to(b"asks", (address, OPEN));
    let _ = listener.recv_from(&mut [0; 8]);
    let answered = guest.run(&format!("ip neigh show {address} dev {eth}")).contains("lladdr");
    let mac = host.run(&format!("ip -o link show {interface}"));
    let mac = mac.split("link/ether ").nth(1).and_then(|rest| rest.split(' ').next()).expect("a MAC").to_owned();
    guest.run(&format!("ip neigh replace {address} lladdr {mac} dev {eth}"));
    let _ = sender.send_to(b"told", (address, OPEN));
    let heard = std::iter::from_fn(|| listener.recv_from(&mut [0; 8]).ok()).count() > 0;
    (answered, heard)
}

/// `nft` that reads commands, and holds what it owns until its input ends.
#[derive(Debug)]
struct Nft(Child);

impl Nft {
    fn start(ns: &Namespace) -> Self {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", ns.path())).args(["nft", "-i"]).stdin(Stdio::piped()).stdout(Stdio::null());
        Self(command.spawn().expect("nft runs"))
    }

    fn say(&mut self, line: &str) {
        writeln!(self.0.stdin.as_mut().unwrap(), "{line}").unwrap();
    }
}

impl Drop for Nft {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "needs root"]
fn a_guard_outlives_the_flush_of_all_nft_rules() {
    let mut site = Site::new(2);
    for number in [1, 2] {
        site.guest(number);
    }
    let (h1, g1) = (&site.hosts[&1], &site.guests[&1]);
    h1.run("ip route add 192.168.5.1/32 dev g");
    assert_eq!(host_hears(h1, "g", g1, "e0", "10.71.0.1"), (true, true), "control: without a guard the host hears its guest");
    for number in [1, 2] {
        site.start(number);
    }
    until("both are connected", || (1..=2).all(|number| site.connected(number) == 1));
    until("the guests reach each other", || site.reaches(1, 2));
    let (h1, g1) = (&site.hosts[&1], &site.guests[&1]);
    assert_eq!(host_hears(h1, "g", g1, "e0", "10.71.0.1"), (false, false));

    h1.run("nft flush ruleset");

    until("the guard stands", || h1.run("nft list tables").contains("violin_g"));
    assert_eq!(host_hears(h1, "g", g1, "e0", "10.71.0.1"), (false, false), "after the flush the host hears its guest");
    assert!(site.reaches(1, 2) && site.reaches(2, 1), "the port itself works on");
    assert_eq!(site.conditions(1)[0].condition, PortCondition::Attached);

    // A switch that was killed left it without an owner; the next one takes it over.
    site.daemons.remove(&1);
    site.start(1);
    until("both are connected again", || site.connected(1) == 1);
    site.hosts[&1].run("nft flush ruleset");
    until("the guard stands", || site.hosts[&1].run("nft list tables").contains("violin_g"));
    assert_eq!(host_hears(&site.hosts[&1], "g", &site.guests[&1], "e0", "10.71.0.1"), (false, false));
}

/// A host whose guards anybody may remove, as on kernels before 6.9, and its guest on `p1`, who may reach 10.99.0.1.
fn watched() -> (Host, Namespace, (PortSlot, PortId)) {
    let ns = Namespace::new("w");
    ns.run("ip link add under type dummy 2>/dev/null || ip link add under type bridge");
    ns.run("ip addr add 10.99.0.1/24 dev under && ip link set under up");
    let mut host = Host::start_keeping(Keeping::Watched, ns, "10.99.0.1");
    host.network(vni(5), MTU);
    let guest = guest(&host.ns, "p1", "10.5.0.1", MTU);
    host.ns.run("ip link set p1 up && ip route add 10.5.0.1/32 dev p1");
    assert_eq!(host_hears(&host.ns, "p1", &guest, "eth0", "10.99.0.1"), (true, true), "control");
    let port = host.packet_port(vni(5), "p1", MTU);
    assert_eq!(host_hears(&host.ns, "p1", &guest, "eth0", "10.99.0.1"), (false, false));
    (host, guest, port)
}

#[test]
#[ignore = "needs root"]
fn a_guard_that_somebody_removed_is_put_back_at_once() {
    let (host, guest, port) = watched();

    for (times, harm) in [
        "nft flush ruleset",
        "nft delete table netdev violin_p1",
        "nft add rule netdev violin_p1 ingress accept",
        "nft flush chain netdev violin_p1 egress",
        "nft \"add chain netdev violin_p1 ingress { policy accept; }\"",
    ]
    .iter()
    .enumerate()
    {
        host.ns.run(harm);
        let begun = Instant::now();
        until("it is noticed", || host.condition(port).guard_losses as usize > times);
        // A hundred milliseconds are promised, and printed; a machine with other work may need more.
        println!("{harm}: put back {:?} after nft had ended", begun.elapsed());
        assert!(begun.elapsed() < Duration::from_secs(5));

        let rules = host.ns.run("nft list table netdev violin_p1");
        assert_eq!(rules.matches("policy drop").count(), 2, "after {harm}: {rules}");
        assert_eq!(rules.matches("accept").count(), 1, "after {harm}: {rules}");
        assert_eq!(host_hears(&host.ns, "p1", &guest, "eth0", "10.99.0.1"), (false, false), "after {harm}");
        assert_eq!(host.condition(port).condition, PortCondition::Attached);
    }
}

#[test]
#[ignore = "needs root"]
fn a_port_whose_guard_cannot_be_put_back_is_shut_until_it_can() {
    let (host, guest, port) = watched();
    let mut nft = Nft::start(&host.ns);

    // Its name belongs to another program from the moment it is gone.
    nft.say("flush ruleset; add table netdev violin_p1 { flags owner; }");

    until("the loss is seen", || host.condition(port).condition == PortCondition::GuardLost);
    let seen = host.condition(port);
    assert!(seen.what.as_ref().is_some_and(|why| why.contains("violin_p1 belongs to another program")), "{seen:?}");
    assert_eq!(seen.guard_losses, 1);
    assert!(!host.ns.run("ip -o link show p1").contains("UP"), "the interface is up, and without a guard");
    // A link that was down and up again loses its route.
    let sender = guest.enter(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    let listener = host.ns.enter(|| UdpSocket::bind(("0.0.0.0", OPEN)).unwrap());
    listener.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let _ = sender.send_to(b"told", ("10.99.0.1", OPEN));
    assert!(listener.recv_from(&mut [0; 8]).is_err(), "the host hears its guest");
    drop((listener, nft));

    until("the port works again", || host.condition(port).condition == PortCondition::Attached);
    assert_eq!(host.ns.run("nft list table netdev violin_p1").matches("policy drop").count(), 2);
    host.ns.run("ip route replace 10.5.0.1/32 dev p1");
    assert_eq!(host_hears(&host.ns, "p1", &guest, "eth0", "10.99.0.1"), (false, false));
}

#[test]
#[ignore = "needs root"]
fn a_switch_leaves_the_guards_of_another_alone() {
    let (mut a, _b) = two_hosts(&[vni(5)], MTU);
    let _guests = [guest(&a.ns, "p1", "10.5.0.1", MTU), guest(&a.ns, "p2", "10.5.0.2", MTU)];
    let port = a.packet_port(vni(5), "p1", MTU);
    let (events, quic) = (mpsc::channel(16).0, mpsc::channel(16).0);
    let other = a.ns.enter(|| {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        DataPlane::start_keeping(Keeping::Watched, socket, Arc::default(), Arc::default(), events, quic).unwrap()
    });
    let attach = |number: u16, interface: &str| {
        let kind = PortKind::Packet { interface: interface.into() };
        a.ns.enter(|| other.attach(PortSlot(number), PortId(number.into()), &kind, nic(MTU), Expecting::Now))
    };
    attach(2, "p2").unwrap();
    let handle = || {
        let all = a.ns.run("nft -a list tables");
        all.lines().find(|line| line.contains("violin_p1")).map(str::to_owned).expect("there")
    };
    let before = handle();

    a.ns.run("nft delete table netdev violin_p2");
    until("it is noticed", || other.conditions()[0].guard_losses == 1);
    let refused = attach(1, "p1").unwrap_err().to_string();

    assert!(refused.contains("violin_p1 belongs to another program"), "{refused}");
    assert_eq!(handle(), before, "the guard of the other switch was made anew");
    assert_eq!(a.condition(port).guard_losses, 0);
}
