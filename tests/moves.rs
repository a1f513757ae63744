//! Owned MACs that change their host while others speak to them, driven through the local API of real switches.

use std::time::Duration;
use violin_common::api::switch::{FdbPlace, Ownership, SwitchReply, SwitchRequest};
use violin_common::wire::mesh::{OUTER_LEN, Slice, mark};
use violin_common::{HostId, MacAddr, Vni};
use violin_tests::eventually;
use violin_tests::fabric::{Fabric, Guest, Host, MESH_PORT, network};
use violin_tests::frames::{has_label, labelled};
use violin_tests::wire::Wire;

const X: &str = "02:00:00:00:00:0a";
const Y: &str = "02:00:00:00:00:0b";
const OBSERVER: &str = "02:00:00:00:00:0c";
const SOON: Duration = violin_tests::PATIENCE;
/// How long to look for what must not come, after something that must come has come.
const NEVER: Duration = Duration::from_millis(300);
/// Ethernet, IPv4 and UDP headers of a datagram on the underlay.
const HEADERS: usize = 14 + 20 + 8;

fn vni() -> Vni {
    Vni::new(7).expect("a legal VNI")
}

fn mac(text: &str) -> MacAddr {
    text.parse().expect("a legal MAC")
}

fn place(host: &Host, wanted: MacAddr) -> Option<HostId> {
    let SwitchReply::Fdb(entries) = host.ask(SwitchRequest::FdbList { vni: Some(vni()) }) else { panic!("want the FDB") };
    entries.into_iter().find(|entry| entry.mac == wanted).map(|entry| match entry.place {
        FdbPlace::Port(_) => host.name.clone(),
        FdbPlace::Host(host) => host,
    })
}

fn arriving(host: &Host, mac: &str, vm: &str) -> Guest {
    host.guest_with(7, mac, Some((vm, Ownership::Arriving)))
}

/// Whether bytes on the underlay are a datagram of data of the mesh.
fn is_data(frame: &[u8]) -> bool {
    frame.len() > HEADERS + OUTER_LEN
        && frame[12..14] == [8, 0]
        && frame[23] == 17
        && frame[36..38] == MESH_PORT.to_be_bytes()
        && frame[HEADERS] == 0x23
}

fn marks(frame: &[u8]) -> u8 {
    Slice::parse(&frame[HEADERS + OUTER_LEN..]).expect("a slice").marks
}

#[test]
#[ignore = "needs root"]
fn a_late_frame_is_marked_and_forwarded_once() {
    let fabric = Fabric::start_plain(3);
    fabric.carry(&network(7));
    let [h1, h2, h3] = fabric.hosts.as_slice() else { panic!("three hosts") };
    let here = h1.owned_guest(7, X, "alpha-c1");
    let there = arriving(h3, X, "alpha-c1");
    let sender = h2.guest(7, OBSERVER);
    eventually("h2 knows the owner", SOON, || place(h2, mac(X)) == Some(h1.name.clone()));
    let (from_h1, from_h2) = (Wire::open(&fabric.underlay, "u1"), Wire::open(&fabric.underlay, "u2"));
    let (vni, mac) = (vni(), mac(X));
    h1.ask(SwitchRequest::MoveGrant { vni, mac, to: h3.name.clone() });
    h1.ask(SwitchRequest::MoveStopped { vni, mac });

    sender.wire.send(&labelled(mac, sender.mac, "late"));

    assert!(there.wire.receive(SOON, |frame| has_label(frame, "late")).is_some(), "the late frame is lost");
    for guest in [&here, &there, &sender] {
        assert_eq!(guest.wire.count(NEVER, |frame| has_label(frame, "late")), 0, "another copy came");
    }
    assert_eq!((h1.counter("late-forwards"), h3.counter("late-forwards")), (1, 0));
    let sent = from_h2.receive(SOON, is_data).expect("h2 sent it");
    let forwarded = from_h1.receive(SOON, is_data).expect("h1 forwarded it");
    assert_eq!((marks(&sent) & mark::MOVED, marks(&forwarded) & mark::MOVED), (0, mark::MOVED));
    assert_eq!(from_h1.count(NEVER, is_data), 0, "it was forwarded twice");

    // The same frame, already marked, comes to the source again: once is enough.
    let mut again = sent;
    again[HEADERS + OUTER_LEN + 3] |= mark::MOVED;
    // No UDP checksum, so that it need not be computed anew (RFC 768).
    again[40..42].fill(0);
    let before = h1.counter("drop.split-horizon");
    from_h1.send(&again);
    eventually("a marked frame is refused by name", SOON, || h1.counter("drop.split-horizon") == before + 1);
    assert_eq!((h1.counter("late-forwards"), from_h1.count(NEVER, is_data)), (1, 0));

    h3.ask(SwitchRequest::MoveRunning { vni, mac });
    eventually("h2 knows the new owner", SOON, || place(h2, mac) == Some(h3.name.clone()));
    sender.wire.send(&labelled(mac, sender.mac, "direct"));
    assert!(there.wire.receive(SOON, |frame| has_label(frame, "direct")).is_some());
    assert_eq!(h1.counter("late-forwards"), 1, "a frame took the way round although its sender knew better");
}

#[test]
#[ignore = "needs root"]
fn two_crossing_moves_make_no_loop() {
    const FRAMES: u64 = 20;
    let fabric = Fabric::start(3);
    fabric.carry(&network(7));
    let [h1, h2, h3] = fabric.hosts.as_slice() else { panic!("three hosts") };
    let (vni, x, y) = (vni(), mac(X), mac(Y));
    let (x_old, y_old) = (h1.owned_guest(7, X, "alpha-c1"), h2.owned_guest(7, Y, "alpha-c2"));
    let (x_new, y_new) = (arriving(h2, X, "alpha-c1"), arriving(h1, Y, "alpha-c2"));
    let observer = h3.guest(7, OBSERVER);
    eventually("h3 knows both owners", SOON, || place(h3, x) == Some(h1.name.clone()) && place(h3, y) == Some(h2.name.clone()));
    let both = |one: (&Host, SwitchRequest), other: (&Host, SwitchRequest)| {
        std::thread::scope(|scope| {
            scope.spawn(|| one.0.ask(one.1));
            scope.spawn(|| other.0.ask(other.1));
        });
    };
    both(
        (h1, SwitchRequest::MoveGrant { vni, mac: x, to: h2.name.clone() }),
        (h2, SwitchRequest::MoveGrant { vni, mac: y, to: h1.name.clone() }),
    );
    both((h1, SwitchRequest::MoveStopped { vni, mac: x }), (h2, SwitchRequest::MoveStopped { vni, mac: y }));

    // Both on their way: h1 sends on to h2 what is for x, h2 to h1 what is for y.
    for _ in 0..FRAMES {
        observer.wire.send(&labelled(x, observer.mac, "on the way"));
        observer.wire.send(&labelled(y, observer.mac, "on the way"));
    }
    for guest in [&x_new, &y_new] {
        for number in 0..FRAMES {
            let got = guest.wire.receive(SOON, |frame| has_label(frame, "on the way") && frame[..6] == guest.mac.0);
            assert!(got.is_some(), "{} lacks frame {number}", guest.mac);
        }
    }
    for guest in [&x_new, &y_new, &x_old, &y_old, &observer] {
        assert_eq!(guest.wire.count(NEVER, |frame| has_label(frame, "on the way")), 0, "another copy came to {}", guest.mac);
    }
    assert_eq!((h1.counter("late-forwards"), h2.counter("late-forwards")), (FRAMES, FRAMES));

    both((h2, SwitchRequest::MoveRunning { vni, mac: x }), (h1, SwitchRequest::MoveRunning { vni, mac: y }));
    for host in &fabric.hosts {
        eventually("all know the new owners", SOON, || {
            place(host, x) == Some(h2.name.clone()) && place(host, y) == Some(h1.name.clone())
        });
    }
    x_new.wire.send(&labelled(y, x, "to each other"));
    y_new.wire.send(&labelled(x, y, "to each other"));
    let all_hear = |label: &str| {
        for guest in [&x_new, &y_new] {
            assert!(guest.wire.receive(SOON, |frame| has_label(frame, label)).is_some(), "{} misses {label:?}", guest.mac);
        }
    };
    all_hear("to each other");
    // Said only now: frames of two senders come in any order.
    observer.wire.send(&labelled(MacAddr::BROADCAST, observer.mac, "to all"));
    all_hear("to all");
    let wires = ["u1", "u2", "u3"].map(|interface| Wire::open(&fabric.underlay, interface));
    for wire in &wires {
        assert_eq!(wire.count(NEVER, is_data), 0, "something goes round");
    }
    assert_eq!((h1.counter("late-forwards"), h2.counter("late-forwards")), (FRAMES, FRAMES));
}
