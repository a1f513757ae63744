//! Interfaces that the host itself needs are no ports by accident. Needs root.
#![cfg(feature = "io")]

mod support;

use nix::sys::signal::Signal;
use support::site::Site;
use support::{until, vni};
use violin_common::api::switch::{PortCondition, PortKind, PortSpec, SwitchReply, SwitchRequest};

const NETWORK: &str = "[[network]]\nvni = 5\n";

fn port(interface: &str, more: &str) -> String {
    format!("[[port]]\nkind = \"packet\"\nvni = 5\ninterface = \"{interface}\"\n{more}")
}

/// What is said to somebody who asks for a port.
fn asked(site: &Site, interface: &str) -> Result<SwitchReply, String> {
    let kind = PortKind::Packet { interface: interface.into() };
    site.ask(1, SwitchRequest::PortAdd(PortSpec { vni: vni(5), kind, owned: None }))
}

#[test]
#[ignore = "needs root"]
fn a_port_on_what_the_host_itself_needs_is_refused() {
    let mut site = Site::new(2);
    let h1 = &site.hosts[&1];
    // A way out of its own, and legs of what carries it.
    for (name, far) in [("d0", "d1"), ("d2", "d3"), ("free", "f1")] {
        h1.run(&format!("ip link add {name} type veth peer name {far} && ip link set {name} up && ip link set {far} up"));
    }
    h1.run("ip addr add 192.0.2.1/24 dev d0 && ip route add default via 192.0.2.254");
    h1.run(
        "ip link add b6 type bridge && ip link set b6 up && ip link set d2 master b6 && ip addr add 2001:db8::1/64 dev b6 nodad",
    );
    h1.run("ip -6 route add default via 2001:db8::2 dev b6");
    h1.run("ip addr add 198.51.100.1/24 dev free");
    site.start_with(2, "pki", NETWORK);
    site.start_with(1, "pki", &format!("{NETWORK}{}", port("u0", "")));

    until("the file's port is refused", || site.log(1).contains("interface u0 is needed by the host itself"));
    assert!(site.log(1).contains("it carries 10.71.0.1, by which this switch is reached"), "{}", site.log(1));
    for (interface, why) in [
        ("u0", "it carries 10.71.0.1"),
        ("lo", "it is the loopback"),
        ("d0", "it carries the default route"),
        ("d2", "b6, on top of it, carries the default route"),
    ] {
        let refused = asked(&site, interface).unwrap_err();
        assert!(refused.contains(why) && refused.contains("`take-over = true`"), "{interface}: {refused}");
    }
    assert!(matches!(asked(&site, "free"), Ok(SwitchReply::Port(_))), "an address alone is no need");
    site.config(1, "pki", &format!("{NETWORK}{}", port("d0", "")));
    site.daemons[&1].signal(Signal::SIGHUP);
    until("a reload is refused it too", || site.log(1).contains("interface d0 is needed by the host itself"));
    until("the hosts are connected", || site.connected(1) == 1);
    let h1 = &site.hosts[&1];
    assert!(h1.run("ip addr show dev u0").contains("10.71.0.1") && h1.run("ip addr show dev d0").contains("192.0.2.1"));
    assert!(!["violin_u0", "violin_lo", "violin_d0", "violin_d2"].iter().any(|table| h1.run("nft list tables").contains(table)));

    site.config(1, "pki", &format!("{NETWORK}{}", port("d0", "take-over = true\n")));
    site.daemons[&1].signal(Signal::SIGHUP);

    until("it is taken when that is meant", || !site.hosts[&1].run("ip addr show dev d0").contains("192.0.2.1"));
    until("and works", || site.conditions(1).iter().filter(|seen| seen.condition == PortCondition::Attached).count() == 2);
}

#[test]
#[ignore = "needs root"]
fn a_switch_that_listens_everywhere_keeps_off_what_leads_to_its_members() {
    let mut site = Site::new(2);
    site.wildcards.insert(2);
    site.joins.insert(2, vec!["10.71.0.1:7471".into()]);
    site.start_with(1, "pki", NETWORK);
    site.start_with(2, "pki", &format!("{NETWORK}{}", port("u0", "")));

    until("the file's port is refused", || site.log(2).contains("it carries 10.71.0.2, by which this switch is reached"));
    until("the hosts are connected", || site.connected(2) == 1);
}

#[test]
#[ignore = "needs root"]
fn an_interface_that_comes_back_with_the_default_route_is_not_taken_again() {
    let mut site = Site::new(1);
    site.guest(1);
    site.start(1);
    until("the port works", || site.conditions(1).first().is_some_and(|seen| seen.condition == PortCondition::Attached));
    // Held while its interface is another's.
    site.daemons[&1].signal(Signal::SIGSTOP);
    site.hosts[&1].run("ip link del g && ip link add g type veth peer name gg && ip link set g up && ip link set gg up");
    site.hosts[&1].run("ip addr add 192.0.2.1/24 dev g && ip route add default via 192.0.2.254");

    site.daemons[&1].signal(Signal::SIGCONT);

    until("the port is refused", || site.conditions(1)[0].condition == PortCondition::Refused);
    let seen = site.conditions(1).remove(0);
    assert!(seen.what.as_ref().is_some_and(|why| why.contains("it carries the default route")), "{seen:?}");
    assert!(!site.hosts[&1].run("nft list tables").contains("violin_g"), "its guard cuts the host off");
    assert!(site.hosts[&1].run("ip addr show dev g").contains("192.0.2.1"));

    site.hosts[&1].run("ip route del default");
    site.daemons[&1].signal(Signal::SIGHUP);
    until("the port works again", || site.conditions(1)[0].condition == PortCondition::Attached);
}
