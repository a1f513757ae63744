//! The switch behaves as one Ethernet switch: facts after the kernel bridge's selftests `learning_test` and `flood_test`, and more.

use std::time::{Duration, Instant};
use violin_common::api::switch::{FdbPlace, PortKind, PortSpec, SwitchReply, SwitchRequest};
use violin_common::{MacAddr, Vni};
use violin_tests::eventually;
use violin_tests::fabric::{Fabric, Host, network};
use violin_tests::frames::{frame, has_label, labelled, zoo};

const A: &str = "02:00:00:00:00:0a";
const B: &str = "02:00:00:00:00:0b";
const C: &str = "02:00:00:00:00:0c";
const SOON: Duration = violin_tests::PATIENCE;
/// How long to look for what must not come, after something that must come has come.
const NEVER: Duration = Duration::from_millis(300);

fn mac(text: &str) -> MacAddr {
    text.parse().unwrap()
}

fn place(host: &Host, vni: u32, wanted: MacAddr) -> Option<FdbPlace> {
    match host.ask(SwitchRequest::FdbList { vni: Some(Vni::new(vni).unwrap()) }) {
        SwitchReply::Fdb(entries) => entries.into_iter().find(|entry| entry.mac == wanted).map(|entry| entry.place),
        other => panic!("got {other:?}, want the FDB"),
    }
}

#[test]
#[ignore = "needs root"]
fn unknown_unicast_floods_once_to_each_place() {
    let fabric = Fabric::start(3);
    fabric.carry(&network(7));
    let sender = fabric.hosts[0].guest(7, A);
    let others = [fabric.hosts[0].guest(7, B), fabric.hosts[1].guest(7, C), fabric.hosts[2].guest(7, "02:00:00:00:00:0d")];

    sender.wire.send(&labelled(mac("02:00:00:00:00:ee"), mac(A), "unknown"));

    for guest in &others {
        assert!(guest.wire.receive(SOON, |frame| has_label(frame, "unknown")).is_some(), "{} got no copy", guest.mac);
        assert_eq!(guest.wire.count(NEVER, |frame| has_label(frame, "unknown")), 0, "{} got a second copy", guest.mac);
    }
    assert_eq!(sender.wire.count(NEVER, |frame| has_label(frame, "unknown")), 0, "the sender got its own frame");
}

#[test]
#[ignore = "needs root"]
fn learned_unicast_goes_to_one_place_only() {
    let fabric = Fabric::start(3);
    fabric.carry(&network(7));
    let a = fabric.hosts[0].guest(7, A);
    let b = fabric.hosts[1].guest(7, B);
    let c = fabric.hosts[2].guest(7, C);
    let beside = fabric.hosts[1].guest(7, "02:00:00:00:00:0d");
    b.wire.send(&labelled(MacAddr::BROADCAST, mac(B), "here I am"));
    assert!(a.wire.receive(SOON, |frame| has_label(frame, "here I am")).is_some());

    a.wire.send(&labelled(mac(B), mac(A), "for b"));

    assert!(b.wire.receive(SOON, |frame| has_label(frame, "for b")).is_some());
    for guest in [&c, &beside] {
        assert_eq!(guest.wire.count(NEVER, |frame| has_label(frame, "for b")), 0, "{} got a frame for b", guest.mac);
    }
    assert_eq!(place(&fabric.hosts[0], 7, mac(B)), Some(FdbPlace::Host("h2".parse().unwrap())));
}

#[test]
#[ignore = "needs root"]
fn ageing_forgets() {
    let fabric = Fabric::start(2);
    fabric.carry(&network(7));
    let a = fabric.hosts[0].guest(7, A);
    let b = fabric.hosts[1].guest(7, B);
    a.wire.send(&labelled(MacAddr::BROADCAST, mac(A), "once"));
    assert!(b.wire.receive(SOON, |frame| has_label(frame, "once")).is_some());
    eventually("a is learned at h2", SOON, || place(&fabric.hosts[1], 7, mac(A)).is_some());

    let learned = Instant::now();
    eventually("a silent MAC is forgotten after its 10 s", Duration::from_secs(15), || {
        place(&fabric.hosts[1], 7, mac(A)).is_none()
    });
    assert!(learned.elapsed() > Duration::from_secs(8), "forgotten after {:?} already", learned.elapsed());
}

#[test]
#[ignore = "needs root"]
fn group_source_is_never_learned() {
    let fabric = Fabric::start(2);
    fabric.carry(&network(7));
    let a = fabric.hosts[0].guest(7, A);
    let group = mac("03:00:00:00:00:01");
    let before = fabric.hosts[0].counter("drop.bad-source");

    a.wire.send(&labelled(MacAddr::BROADCAST, group, "forged"));

    eventually("the refusal is counted", SOON, || fabric.hosts[0].counter("drop.bad-source") > before);
    assert_eq!(place(&fabric.hosts[0], 7, group), None);
}

#[test]
#[ignore = "needs root"]
fn a_learned_mac_follows_its_first_frame() {
    let fabric = Fabric::start(3);
    fabric.carry(&network(7));
    let watcher = fabric.hosts[0].guest(7, C);
    let there = fabric.hosts[1].guest(7, A);
    let here = fabric.hosts[2].guest(7, B);
    let heard = fabric.hosts[0].counter("control.learned-heard");
    there.wire.send(&labelled(MacAddr::BROADCAST, mac(A), "first place"));
    assert!(watcher.wire.receive(SOON, |frame| has_label(frame, "first place")).is_some());
    // The announcement takes another way than the frame; one that comes after the next frame makes it a flood (SETTLE).
    eventually("h2's announcement is heard", SOON, || fabric.hosts[0].counter("control.learned-heard") > heard);

    here.wire.send(&labelled(MacAddr::BROADCAST, mac(A), "second place"));
    assert!(watcher.wire.receive(SOON, |frame| has_label(frame, "second place")).is_some());
    watcher.wire.send(&labelled(mac(A), mac(C), "after it"));

    assert!(here.wire.receive(SOON, |frame| has_label(frame, "after it")).is_some());
    assert_eq!(there.wire.count(NEVER, |frame| has_label(frame, "after it")), 0);
}

#[test]
#[ignore = "needs root"]
fn an_owned_mac_cannot_be_stolen() {
    let fabric = Fabric::start(3);
    fabric.carry(&network(7));
    let owner = fabric.hosts[0].owned_guest(7, A, "alpha-c1");
    let thief_afar = fabric.hosts[1].guest(7, B);
    let thief_near = fabric.hosts[0].guest(7, "02:00:00:00:00:0d");
    let peer = fabric.hosts[2].guest(7, C);
    eventually("h2 and h3 know the owner", SOON, || {
        [1, 2].iter().all(|&index: &usize| place(&fabric.hosts[index], 7, mac(A)) == Some(FdbPlace::Host("h1".parse().unwrap())))
    });

    thief_afar.wire.send(&labelled(MacAddr::BROADCAST, mac(A), "stolen afar"));
    thief_near.wire.send(&labelled(MacAddr::BROADCAST, mac(A), "stolen near"));
    eventually("both attempts are counted", SOON, || {
        fabric.hosts[1].counter("drop.stolen-mac") > 0 && fabric.hosts[0].counter("drop.stolen-mac") > 0
    });
    peer.wire.send(&labelled(mac(A), mac(C), "for the owner"));

    assert!(owner.wire.receive(SOON, |frame| has_label(frame, "for the owner")).is_some());
    assert_eq!(peer.wire.count(NEVER, |frame| has_label(frame, "stolen afar") || has_label(frame, "stolen near")), 0);
}

#[test]
#[ignore = "needs root"]
fn an_owned_port_speaks_with_its_own_mac_only() {
    let fabric = Fabric::start(2);
    fabric.carry(&network(7));
    let owner = fabric.hosts[0].owned_guest(7, A, "alpha-c1");
    let peer = fabric.hosts[1].guest(7, B);

    owner.wire.send(&labelled(MacAddr::BROADCAST, mac("02:00:00:00:00:77"), "another name"));
    owner.wire.send(&labelled(MacAddr::BROADCAST, mac(A), "own name"));

    assert!(peer.wire.receive(SOON, |frame| has_label(frame, "own name")).is_some());
    assert_eq!(peer.wire.count(NEVER, |frame| has_label(frame, "another name")), 0);
    assert!(fabric.hosts[0].counter("drop.foreign-source") > 0);
}

#[test]
#[ignore = "needs root"]
fn networks_never_mix_and_reuse_addresses_freely() {
    let fabric = Fabric::start(2);
    fabric.carry(&network(7));
    fabric.carry(&network(8));
    let a7 = fabric.hosts[0].guest(7, A);
    let a8 = fabric.hosts[0].guest(8, A);
    let b7 = fabric.hosts[1].guest(7, B);
    let b8 = fabric.hosts[1].guest(8, B);

    a7.wire.send(&labelled(MacAddr::BROADCAST, mac(A), "in seven"));
    a8.wire.send(&labelled(MacAddr::BROADCAST, mac(A), "in eight"));
    a7.wire.send(&labelled(mac(B), mac(A), "seven to b"));

    assert!(b7.wire.receive(SOON, |frame| has_label(frame, "seven to b")).is_some());
    assert!(b8.wire.receive(SOON, |frame| has_label(frame, "in eight")).is_some());
    assert_eq!(b8.wire.count(NEVER, |frame| has_label(frame, "in seven") || has_label(frame, "seven to b")), 0);
    assert_eq!(a8.wire.count(NEVER, |frame| has_label(frame, "in seven")), 0);
}

#[test]
#[ignore = "needs root"]
fn a_flood_reaches_no_host_that_does_not_carry_the_network() {
    let fabric = Fabric::start(3);
    for host in &fabric.hosts[..2] {
        host.ask(SwitchRequest::NetworkAdd(network(7)));
    }
    let a = fabric.hosts[0].guest(7, A);
    let b = fabric.hosts[1].guest(7, B);
    let datagrams = |to: &str| match fabric.hosts[0].ask(SwitchRequest::PeerList) {
        SwitchReply::Peers(peers) => {
            peers
                .into_iter()
                .find(|peer| peer.host.as_ref().is_some_and(|host| host.as_str() == to))
                .expect("h1 knows both others")
                .datagrams_out
        }
        other => panic!("got {other:?}, want peers"),
    };
    eventually("h1 knows that h2 carries the network", SOON, || {
        a.wire.send(&labelled(MacAddr::BROADCAST, mac(A), "probe"));
        b.wire.receive(NEVER, |frame| has_label(frame, "probe")).is_some()
    });

    for _ in 0..20 {
        a.wire.send(&labelled(MacAddr::BROADCAST, mac(A), "flood"));
    }

    for _ in 0..20 {
        assert!(b.wire.receive(SOON, |frame| has_label(frame, "flood")).is_some());
    }
    assert_eq!(datagrams("h3"), 0, "h1 sent data to h3, which does not carry the network");
    assert!(datagrams("h2") >= 20, "the counter that says 0 for h3 says {} for h2", datagrams("h2"));
}

#[test]
#[ignore = "needs root"]
fn what_came_from_a_tunnel_never_enters_a_tunnel() {
    let fabric = Fabric::start(3);
    fabric.carry(&network(7));
    let a = fabric.hosts[0].guest(7, A);
    let c = fabric.hosts[2].guest(7, C);

    for _ in 0..10 {
        a.wire.send(&labelled(MacAddr::BROADCAST, mac(A), "flood"));
    }

    for _ in 0..10 {
        assert!(c.wire.receive(SOON, |frame| has_label(frame, "flood")).is_some());
    }
    assert_eq!(c.wire.count(NEVER, |frame| has_label(frame, "flood")), 0, "h2 sent on what it had from h1");
}

#[test]
#[ignore = "needs root"]
fn link_local_groups_stay_on_their_link() {
    let fabric = Fabric::start(2);
    fabric.carry(&network(7));
    let a = fabric.hosts[0].guest(7, A);
    let b = fabric.hosts[1].guest(7, B);

    for last in 0..16 {
        a.wire.send(&labelled(MacAddr([0x01, 0x80, 0xc2, 0, 0, last]), mac(A), "link local"));
    }
    a.wire.send(&labelled(MacAddr::BROADCAST, mac(A), "after"));

    assert!(b.wire.receive(SOON, |frame| has_label(frame, "after")).is_some());
    assert_eq!(b.wire.count(NEVER, |frame| has_label(frame, "link local")), 0);
    assert_eq!(fabric.hosts[0].counter("drop.link-local"), 16);
}

#[test]
#[ignore = "needs root"]
fn every_frame_of_the_zoo_arrives_bit_exact_through_packet_ports() {
    let fabric = Fabric::start(2);
    fabric.carry(&network(7));
    let a = fabric.hosts[0].guest(7, A);
    let b = fabric.hosts[1].guest(7, B);
    b.wire.send(&labelled(MacAddr::BROADCAST, mac(B), "here I am"));
    assert!(a.wire.receive(SOON, |frame| has_label(frame, "here I am")).is_some());

    for (what, bytes) in zoo(mac(B), mac(A), 1400) {
        a.wire.send(&bytes);
        let arrived = b.wire.receive(SOON, |frame| frame[6..12] == mac(A).0);
        assert_eq!(arrived.as_deref(), Some(bytes.as_slice()), "{what}: sent left, arrived right, as bytes");
    }
}

#[test]
#[ignore = "needs root"]
fn frames_over_9000_bytes_are_refused_by_name() {
    let fabric = Fabric::start(2);
    fabric.carry(&network(7));
    let a = fabric.hosts[0].guest(7, A);
    let b = fabric.hosts[1].guest(7, B);
    a.netns.ip("link set eth0 mtu 20000");
    fabric.hosts[0].netns.ip(&format!("link set {} mtu 20000", a.interface));
    let before = fabric.hosts[0].counter("drop.too-big");

    for len in [9001, 9100, 12_000] {
        a.wire.send(&frame(MacAddr::BROADCAST, mac(A), 0x88b5, &vec![1; len]));
    }

    eventually("the jumbo frames are counted", SOON, || fabric.hosts[0].counter("drop.too-big") == before + 3);
    assert_eq!(b.wire.count(NEVER, |frame| frame.len() > 1300), 0);
}

/// Only a gateway can bring a runt: the kernel lets none onto a veth or TAP.
#[test]
#[ignore = "needs root"]
fn runts_are_refused_by_name() {
    let fabric = Fabric::start(2);
    fabric.carry(&network(7));
    let b = fabric.hosts[1].guest(7, B);
    fabric.underlay.ip("addr add 10.99.0.250/24 dev br0");
    let foreign = fabric.underlay.enter(|| std::net::UdpSocket::bind("10.99.0.250:4789").expect("a free port"));
    let address = |text: &str| text.parse().expect("a legal address");
    let (local, remote) = (address("10.99.0.1:4789"), address("10.99.0.250:4789"));
    let vni = Vni::new(7).unwrap();
    let kind = PortKind::Vxlan { local, remote, remote_vni: Vni::new(77).unwrap() };
    fabric.hosts[0].ask(SwitchRequest::PortAdd(PortSpec { vni, kind, owned: None }));
    let say = |inner: &[u8]| {
        let datagram = [&[8, 0, 0, 0, 0, 0, 77, 0], inner].concat();
        foreign.send_to(&datagram, local).expect("the underlay takes it");
    };

    let before = fabric.hosts[0].counter("drop.runt");
    for len in 0..14 {
        say(&[2; 14][..len]);
    }
    say(&labelled(MacAddr::BROADCAST, mac(A), "whole"));

    assert!(b.wire.receive(SOON, |frame| has_label(frame, "whole")).is_some(), "the gateway is dead");
    assert_eq!(fabric.hosts[0].counter("drop.runt"), before + 14);
}
