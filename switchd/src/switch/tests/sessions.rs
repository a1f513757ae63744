//! Sessions begin, take each other's place and end.

use super::*;
use crate::members::RENEW;
use crate::seal::OLD_KEY;
use crate::seal::opening::Opener;
use crate::seal::sealing::{Limits, Sealer};
use crate::seal::session::{Protection, Session};
use violin_common::config::switch::PlainPath;
use violin_common::wire::mesh::{Kind, OUTER_LEN, Outer, TAG_LEN};

/// The session that `from` (from 0) sends to `to` in.
fn sending(mesh: &Mesh, from: usize, to: usize) -> Arc<Session> {
    let slot = mesh.switches[from].members.slot(&name(to + 1)).expect("known");
    Arc::clone(&mesh.tables[from].peers[usize::from(slot.0)].as_ref().expect("connected").session)
}

/// Whether what `from` sends now is opened by `to`.
fn is_understood(mesh: &Mesh, from: usize, to: usize) -> bool {
    mesh.tables[to].by_receiver.contains_key(&sending(mesh, from, to).receiver)
}

fn all_understand(mesh: &Mesh) -> bool {
    let count = mesh.switches.len();
    (0..count).all(|from| (0..count).filter(|to| *to != from).all(|to| is_understood(mesh, from, to)))
}

#[test]
fn both_ends_derive_the_same_keys_for_each_direction() {
    let mesh = Mesh::new(2);
    let (ours, theirs) = (sending(&mesh, 0, 1), sending(&mesh, 1, 0));
    assert_eq!((ours.index, ours.receiver), (theirs.receiver, theirs.index));
    let (Protection::Sealed(ours), Protection::Sealed(theirs)) = (&ours.protection, &theirs.protection) else { panic!("plain") };
    for (from, to) in [(ours, theirs), (theirs, ours)] {
        let mut sealer = Sealer::new(mesh.now, from.take_sealing(0).unwrap(), Limits::default()).unwrap();
        let mut opener = Opener::new(to.take_opening(0).unwrap()).unwrap();
        let mut datagram = [7; OUTER_LEN + 3 + TAG_LEN];
        sealer.seal((mesh.now, 0), (Kind::Data, 0, 5), &mut datagram).unwrap();
        let outer = Outer::parse(&datagram).unwrap();
        assert_eq!(opener.open(mesh.now, &outer, &mut datagram).unwrap(), [7; 3]);
        assert!(from.take_sealing(0).is_none() && to.take_opening(0).is_none(), "handed out once");
    }
}

#[test]
fn a_session_is_renewed_before_it_is_broken_and_nothing_is_lost_by_it() {
    let mut mesh = Mesh::new(3);
    let before = [sending(&mesh, 0, 1), sending(&mesh, 1, 0), sending(&mesh, 1, 2)];
    let closed = mesh.closed;
    mesh.now = mesh.now + RENEW;
    // Step by step, each message by itself: at no time does anybody send what is not understood.
    for _ in 0..400 {
        mesh.now = mesh.now + Duration::from_millis(50);
        for at in 0..3 {
            mesh.switches[at].handle_timeout(mesh.now);
            mesh.carry_out(at);
            assert!(all_understand(&mesh));
        }
        while let Some((to, link, message)) = mesh.wire.pop_front() {
            mesh.switches[to].handle_message(mesh.now, link, message).unwrap();
            mesh.carry_out(to);
            assert!(all_understand(&mesh));
        }
    }
    let after = [sending(&mesh, 0, 1), sending(&mesh, 1, 0), sending(&mesh, 1, 2)];
    for (before, after) in before.iter().zip(&after) {
        assert_ne!(before.index, after.index, "not renewed");
    }
    assert_eq!(mesh.closed - closed, 3, "each pair's old connection, once");
    // The old ones are gone: one session for each pair.
    assert!(mesh.tables.iter().all(|tables| tables.by_receiver.len() == 2), "{:?}", mesh.tables[0].by_receiver.keys());
}

#[test]
fn ends_that_renew_at_once_agree_on_one_session() {
    let mut mesh = Mesh::new(2);
    mesh.now = mesh.now + RENEW + Duration::from_secs(61);
    for at in 0..2 {
        mesh.switches[at].handle_timeout(mesh.now);
    }
    for at in 0..2 {
        mesh.carry_out(at);
        assert!(all_understand(&mesh));
    }
    while let Some((to, link, message)) = mesh.wire.pop_front() {
        let _ = mesh.switches[to].handle_message(mesh.now, link, message);
        mesh.carry_out(to);
        assert!(all_understand(&mesh));
    }
    mesh.run(OLD_KEY + Duration::from_secs(1));
    let (ours, theirs) = (sending(&mesh, 0, 1), sending(&mesh, 1, 0));
    assert_eq!((ours.index, ours.receiver), (theirs.receiver, theirs.index));
    assert!(mesh.tables.iter().all(|tables| tables.by_receiver.len() == 1));
}

#[test]
fn a_lost_connection_takes_its_sessions_along() {
    let mut mesh = Mesh::new(2);
    let link = mesh.switches[0].link_of(&name(2)).unwrap();
    mesh.close(0, link);
    for at in 0..2 {
        mesh.carry_out(at);
        assert!(mesh.tables[at].by_receiver.is_empty() && mesh.tables[at].peers.iter().all(Option::is_none));
    }
}

#[test]
fn the_peer_hears_of_new_keys_of_its_own_and_of_no_other() {
    let mut mesh = Mesh::new(3);
    let (session, other) = (sending(&mesh, 1, 0), sending(&mesh, 2, 0));
    mesh.switches[0].handle_worker(mesh.now, WorkerEvent::Opened { session: session.receiver, queue: 0, epoch: 4 });
    mesh.switches[0].handle_worker(mesh.now, WorkerEvent::Opened { session: 12345, queue: 0, epoch: 9 });
    mesh.settle();
    let acknowledged = |session: &Session| match &session.protection {
        Protection::Sealed(keys) => keys.acknowledged(0),
        Protection::Plain(_) => panic!("plain"),
    };
    assert_eq!((acknowledged(&session), acknowledged(&other)), (4, 0));
}

#[test]
fn a_peer_moves_only_when_it_answers_where_it_was_asked() {
    let mut mesh = Mesh::new(2);
    let session = sending(&mesh, 0, 1).index;
    let at = |mesh: &Mesh| mesh.tables[0].peers[0].as_ref().unwrap().address;
    let answered = |mesh: &mut Mesh, token, from| {
        let now = mesh.now;
        mesh.switches[0].handle_worker(now, WorkerEvent::Answered { session, token, from });
        mesh.settle();
    };
    mesh.switches[0].handle_worker(mesh.now, WorkerEvent::Roamed { session, from: address(9) });
    let asked = mesh.switches[0].take_commands(mesh.now);
    assert!(matches!(asked[..], [Command::Challenge { session: of, to }] if (of, to) == (session, address(9))), "{asked:?}");
    mesh.switches[0].handle_challenged(mesh.now, session, address(9), 77);

    // A guessed token, another place, and nobody asked.
    for (token, from) in [(78, address(9)), (77, address(8))] {
        answered(&mut mesh, token, from);
        assert_eq!(at(&mesh), address(2));
    }
    answered(&mut mesh, 77, address(9));
    assert_eq!(at(&mesh), address(9));
    answered(&mut mesh, 77, address(9));

    // Too late.
    mesh.switches[0].handle_challenged(mesh.now, session, address(7), 79);
    mesh.run(Duration::from_secs(4));
    answered(&mut mesh, 79, address(7));
    assert_eq!(at(&mesh), address(9));
}

#[test]
fn indices_that_collide_are_told_apart() {
    let mut mesh = Mesh::new(2);
    let taken = sending(&mesh, 0, 1).index;
    let switch = &mut mesh.switches[0];
    let own = |switch: &Switch, link| switch.members.link(LinkId(link)).unwrap().index;
    for link in [500, 501] {
        let drawn = Drawn { index: taken, cookie: 0 };
        switch.handle_connected(LinkId(link), (name(link as usize), "d1".parse().unwrap()), address(9), false, drawn);
    }
    assert_eq!([own(switch, 500), own(switch, 501)], [taken + 1, taken + 2]);
}

#[test]
fn plain_needs_both_configurations_the_domain_and_the_interface() {
    let path = |domain: &str, interface: &str| vec![PlainPath { domain: domain.parse().unwrap(), interface: interface.into() }];
    let via = |name: &str| Some(crate::members::Via { name: name.into(), index: 3 });
    for (ours, theirs, way, plain) in [
        (path("d1", "eth1"), path("d1", "eth1"), "eth1", true),
        (path("d1", "eth1"), path("d1", "eth1"), "eth0", false),
        (path("d1", "eth1"), path("d2", "eth1"), "eth1", false),
        (path("d1", "eth1"), vec![], "eth1", false),
    ] {
        let mut mesh = Mesh::new(2);
        for (at, plain) in [(0, ours), (1, theirs)] {
            mesh.switches[at].nature.plain = plain;
        }
        let (a, b) = (LinkId(700), LinkId(701));
        mesh.links.insert((0, 700), (1, 701));
        mesh.links.insert((1, 701), (0, 700));
        let ends = |number| Ends { theirs: address(number), ours: None, via: via(way) };
        mesh.switches[0].handle_connected(a, (name(2), "d1".parse().unwrap()), ends(2), true, drawn(700));
        mesh.switches[1].handle_connected(b, (name(1), "d1".parse().unwrap()), ends(1), false, drawn(701));
        mesh.settle();
        let (ours, theirs) = (sending(&mesh, 0, 1), sending(&mesh, 1, 0));
        assert!(is_understood(&mesh, 0, 1) && is_understood(&mesh, 1, 0));
        match (&ours.protection, &theirs.protection) {
            (Protection::Plain(ours), Protection::Plain(theirs)) if plain => {
                assert_eq!((ours.ours, ours.theirs, ours.interface), (theirs.theirs, theirs.ours, 3));
            }
            (Protection::Sealed(_), Protection::Sealed(_)) if !plain => {}
            other => panic!("{other:?}"),
        }
    }
}
