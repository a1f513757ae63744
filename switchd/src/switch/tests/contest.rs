//! Two switches with one certificate, and one that has only started anew.

use super::*;
use violin_common::api::switch::{PeerSeen, TroubleKind};

const NEWCOMER: LinkId = LinkId(900);

/// `h2`, connected with `h1`, and the HELLO of another boot of `h1`.
fn stage() -> (Mesh, LinkId, Hello) {
    let mesh = Mesh::new(2);
    let standing = mesh.switches[1].link_of(&name(1)).unwrap();
    (mesh, standing, Hello { boot: 77, ..hello(1) })
}

fn comes(mesh: &mut Mesh, link: LinkId, from: usize, hello: &Hello) -> Result<(), String> {
    let switch = &mut mesh.switches[1];
    switch.handle_connected(link, (name(1), "d1".parse().unwrap()), address(from), false, drawn(link.0));
    switch.handle_message(mesh.now, link, Message::Hello(hello.clone()))
}

fn peers(mesh: &mut Mesh) -> Vec<PeerSeen> {
    match mesh.ask(2, SwitchRequest::PeerList) {
        Ok(SwitchReply::Peers(peers)) => peers,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_second_switch_with_the_certificate_of_one_that_answers_is_refused() {
    let (mut mesh, standing, hello) = stage();
    comes(&mut mesh, NEWCOMER, 9, &hello).unwrap();
    let (now, switch) = (mesh.now, &mut mesh.switches[1]);
    let commands = switch.take_commands(now);
    assert!(commands.iter().any(|command| matches!(command, Command::Watch { link } if *link == standing)), "{commands:?}");
    assert_eq!(switch.link_of(&name(1)), Some(standing));

    switch.handle_answers(now, standing);

    let commands = switch.take_commands(now);
    let refused = commands.iter().find_map(|command| match command {
        Command::Close { link: NEWCOMER, why, refused: true } => Some(why.clone()),
        _ => None,
    });
    assert!(refused.is_some_and(|why| why.contains("certificate of h1 answers at 10.0.0.1:7471")), "{commands:?}");
    assert_eq!((switch.link_of(&name(1)), switch.refusals().twins), (Some(standing), 1));
    let peers = peers(&mut mesh);
    assert!(peers[0].connected && peers[0].troubles[0].kind == TroubleKind::Twin, "{peers:?}");
    assert!(peers[0].troubles[0].why.contains("10.0.0.9:7471"), "{peers:?}");
}

#[test]
fn a_switch_that_started_anew_elsewhere_takes_its_place_when_the_old_connection_breaks() {
    let (mut mesh, standing, hello) = stage();
    comes(&mut mesh, NEWCOMER, 9, &hello).unwrap();
    let (now, switch) = (mesh.now, &mut mesh.switches[1]);
    switch.handle_message(now, NEWCOMER, Message::Networks(vec![vni(5), vni(6)])).unwrap();

    switch.handle_closed(now, standing);

    assert_eq!((switch.link_of(&name(1)), switch.refusals().twins), (Some(NEWCOMER), 0));
    let peers = peers(&mut mesh);
    assert_eq!((peers[0].networks.as_slice(), peers[0].address), (&[vni(5), vni(6)][..], address(9)), "what it said is kept");
    assert!(peers[0].troubles.is_empty(), "{peers:?}");
}

#[test]
fn a_switch_that_started_anew_where_it_was_and_one_whose_address_moved_are_taken_at_once() {
    let (mut mesh, _, hello) = stage();
    comes(&mut mesh, NEWCOMER, 1, &hello).unwrap();
    assert_eq!(mesh.switches[1].link_of(&name(1)), Some(NEWCOMER), "another boot at the same port");

    let roaming = LinkId(902);
    comes(&mut mesh, roaming, 9, &hello).unwrap();
    assert_eq!(mesh.switches[1].link_of(&name(1)), Some(roaming), "the same boot at another address");
}

#[test]
fn a_short_loss_does_not_hand_the_place_to_the_refused_one_and_a_lasting_one_does() {
    let (mut mesh, standing, hello) = stage();
    comes(&mut mesh, NEWCOMER, 9, &hello).unwrap();
    mesh.switches[1].handle_answers(mesh.now, standing);
    mesh.switches[1].handle_closed(mesh.now, standing);

    mesh.now = mesh.now + Duration::from_secs(2);
    assert!(comes(&mut mesh, LinkId(901), 9, &hello).is_err_and(|why| why.contains("another switch")));
    assert_eq!(mesh.switches[1].refusals().twins, 2);
    mesh.now = mesh.now + Duration::from_secs(9);
    comes(&mut mesh, LinkId(902), 9, &hello).unwrap();
    assert_eq!(mesh.switches[1].link_of(&name(1)), Some(LinkId(902)));
}

#[test]
fn another_switch_with_our_own_name_is_refused_and_shown() {
    let (mut mesh, _, hello) = stage();
    let namesake = Hello { host: name(2), ..hello };
    let switch = &mut mesh.switches[1];
    switch.handle_connected(NEWCOMER, (name(2), "d1".parse().unwrap()), address(9), false, drawn(NEWCOMER.0));
    let refused = switch.handle_message(mesh.now, NEWCOMER, Message::Hello(namesake));

    assert!(refused.is_err_and(|why| why.contains("two switches are called h2")));
    let peers = peers(&mut mesh);
    let shown = peers.iter().find(|peer| peer.host == Some(name(2))).expect("listed");
    assert_eq!((shown.connected, shown.address, shown.troubles[0].kind), (false, address(9), TroubleKind::Twin));
}

#[test]
fn a_refused_switch_says_so_until_it_is_welcome() {
    let (mut mesh, standing, _) = stage();
    let (now, switch) = (mesh.now, &mut mesh.switches[1]);
    switch.handle_refused(now, standing, "another one has your place");
    switch.handle_closed(now, standing);
    comes(&mut mesh, NEWCOMER, 1, &hello(1)).unwrap();

    let seen = peers(&mut mesh);
    assert!(!seen[0].connected, "HELLO alone is no welcome: {seen:?}");
    assert_eq!(seen[0].troubles[0].kind, TroubleKind::Refused);
    assert!(seen[0].troubles[0].why.contains("another one has your place"));
    mesh.switches[1].handle_message(mesh.now, NEWCOMER, Message::Members(Vec::new())).unwrap();
    let seen = peers(&mut mesh);
    assert!(seen[0].connected && seen[0].troubles.is_empty(), "{seen:?}");
}
