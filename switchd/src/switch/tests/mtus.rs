//! MTUs that differ are said at both ends.

use super::*;
use violin_common::api::switch::{PeerTrouble, TroubleKind};

fn spec(number: u32, mtu: u16) -> NetworkSpec {
    NetworkSpec { vni: vni(number), mtu, ageing_s: 300 }
}

/// What switch `at` says of its peer.
fn troubles(mesh: &mut Mesh, at: usize) -> Vec<PeerTrouble> {
    match mesh.ask(at, SwitchRequest::PeerList) {
        Ok(SwitchReply::Peers(peers)) => peers.into_iter().flat_map(|peer| peer.troubles).collect(),
        other => panic!("{other:?}"),
    }
}

fn told(mesh: &mut Mesh, at: usize) -> Vec<String> {
    let all = troubles(mesh, at);
    assert!(all.iter().all(|trouble| trouble.kind == TroubleKind::Mtu), "{all:?}");
    all.into_iter().map(|trouble| trouble.why.split(':').next().unwrap().to_owned()).collect()
}

#[test]
fn both_ends_say_which_networks_differ_and_since_when() {
    let mut mesh = Mesh::new(2);
    assert!(told(&mut mesh, 1).is_empty() && told(&mut mesh, 2).is_empty());

    mesh.switches[0].network_add(spec(6, 1400)).unwrap();
    mesh.switches[1].network_add(spec(6, 1300)).unwrap();
    mesh.settle();
    assert_eq!(told(&mut mesh, 1), ["network 6 has MTU 1400 here and 1300 there"]);
    assert_eq!(told(&mut mesh, 2), ["network 6 has MTU 1300 here and 1400 there"]);

    // Another one, and a new connection, do not begin it anew.
    mesh.switches[1].network_add(spec(5, 1500)).unwrap();
    mesh.run(Duration::from_secs(5));
    let first = *mesh.links.keys().next().unwrap();
    mesh.close(first.0, LinkId(first.1));
    mesh.run(Duration::from_secs(5));
    for at in [1, 2] {
        let all = troubles(&mut mesh, at);
        assert_eq!(all.len(), 1, "{all:?}");
        assert!(all[0].for_s >= 10 && all[0].why.contains("network 5 has") && all[0].why.contains("network 6 has"), "{all:?}");
    }

    mesh.switches[1].network_add(spec(5, 1400)).unwrap();
    mesh.switches[1].network_remove(vni(6)).unwrap();
    mesh.settle();
    assert!(told(&mut mesh, 1).is_empty() && told(&mut mesh, 2).is_empty());
}

#[test]
fn of_many_that_differ_some_are_named() {
    let mut mesh = Mesh::new(2);
    for number in 10..20 {
        mesh.switches[0].network_add(spec(number, 1400)).unwrap();
        mesh.switches[1].network_add(spec(number, 1300)).unwrap();
    }
    mesh.settle();

    let told = told(&mut mesh, 1);

    assert!(told[0].contains("network 12 has") && told[0].ends_with(", and so 7 more"), "{told:?}");
}

#[test]
fn a_peer_tells_only_of_networks_it_carries_and_an_older_one_is_told_nothing() {
    let mut mesh = Mesh::new(1);
    mesh.switches[0].handle_connected(LinkId(2), (name(2), "d1".parse().unwrap()), address(2), false, drawn(2));
    mesh.switches[0].handle_message(mesh.now, LinkId(2), Message::Hello(hello(2))).unwrap();
    mesh.switches[0].handle_message(mesh.now, LinkId(2), Message::Mtus(vec![(vni(5), 9000)])).unwrap();

    mesh.switches[0].network_add(spec(6, 1400)).unwrap();

    let sent = mesh.switches[0].take_commands(mesh.now);
    let told = |command: &Command| matches!(command, Command::Send { message: Message::Mtus(_), .. });
    assert!(!sent.iter().any(told), "{sent:?}");
    assert!(troubles(&mut mesh, 1).is_empty());
}
