//! What dies or cannot be reached is noticed, what comes back is taken back, what is nonsense is refused in words.

use std::net::UdpSocket;
use std::time::{Duration, Instant};
use violin_common::api::switch::{SwitchReply, SwitchRequest};
use violin_common::{MacAddr, Vni};
use violin_tests::eventually;
use violin_tests::fabric::{Fabric, Guest, MESH_PORT, network};
use violin_tests::frames::{has_label, labelled};

const A: &str = "02:00:00:00:00:0a";
const B: &str = "02:00:00:00:00:0b";
const SOON: Duration = violin_tests::PATIENCE;
/// Longer than the call of a switch that does not answer lasts, so that another one must find it.
const OUTAGE: Duration = Duration::from_secs(7);

fn peers(fabric: &Fabric, index: usize) -> usize {
    match fabric.hosts[index].ask(SwitchRequest::PeerList) {
        SwitchReply::Peers(peers) => peers.iter().filter(|peer| peer.connected).count(),
        other => panic!("got {other:?}, want peers"),
    }
}

#[test]
#[ignore = "needs root"]
fn a_killed_switch_is_noticed_and_the_mesh_heals_when_it_is_back() {
    let mut fabric = Fabric::start(3);
    fabric.carry(&network(7));
    let a = fabric.hosts[0].guest(7, A);

    fabric.hosts[2].kill_switch();
    let killed = Instant::now();
    eventually("the others notice", violin_tests::PATIENCE, || peers(&fabric, 0) == 1 && peers(&fabric, 1) == 1);
    println!("loss of a peer noticed after {:.2} s", killed.elapsed().as_secs_f64());

    fabric.start_switch(2);
    let back = Instant::now();
    fabric.wait_mesh(violin_tests::PATIENCE);
    fabric.carry(&network(7));
    let b = fabric.hosts[2].guest(7, B);
    eventually("traffic flows again", violin_tests::PATIENCE, || {
        a.wire.send(&labelled(MacAddr::BROADCAST, a.mac, "again"));
        b.wire.receive(Duration::from_millis(100), |frame| has_label(frame, "again")).is_some()
    });
    println!("mesh healed and traffic resumed {:.2} s after the restart", back.elapsed().as_secs_f64());
}

#[test]
#[ignore = "needs root"]
fn the_first_member_may_die_too() {
    let mut fabric = Fabric::start(3);
    fabric.hosts[0].kill_switch();
    eventually("h2 and h3 notice", violin_tests::PATIENCE, || peers(&fabric, 1) == 1 && peers(&fabric, 2) == 1);

    fabric.start_switch(0);

    fabric.wait_mesh(violin_tests::PATIENCE);
}

/// Gives one host's switch these addresses to join, whatever the harness wrote.
fn set_join(fabric: &Fabric, index: usize, addresses: &[&str]) {
    let path = fabric.dir().join(format!("h{}.toml", index + 1));
    let text = std::fs::read_to_string(&path).expect("the harness wrote it");
    let rest: Vec<&str> = text.lines().filter(|line| !line.starts_with("join")).collect();
    std::fs::write(path, format!("join = {addresses:?}\n{}\n", rest.join("\n"))).expect("a file is written");
}

/// Whether a frame gets from one guest to the other.
fn passes(from: &Guest, to: &Guest, label: &str) -> bool {
    from.wire.send(&labelled(to.mac, from.mac, label));
    to.wire.receive(Duration::from_millis(500), |frame| has_label(frame, label)).is_some()
}

#[test]
#[ignore = "needs root"]
fn a_join_address_where_nobody_answers_hinders_nobody_and_is_tried_until_somebody_does() {
    let mut fabric = Fabric::prepare(3);
    // No host, no program, no route, and a switch that comes later and knows nobody.
    set_join(&fabric, 0, &["10.99.0.77:7471", "10.99.0.1:9999", "192.0.2.1:7471", "10.99.0.3:7471"]);
    set_join(&fabric, 2, &[]);
    fabric.start_switch(0);
    fabric.start_switch(1);
    fabric.wait_mesh(SOON);
    for host in &fabric.hosts[..2] {
        host.ask(SwitchRequest::NetworkAdd(network(7)));
    }
    let a = fabric.hosts[0].owned_guest(7, A, "alpha-a");
    let b = fabric.hosts[1].guest(7, B);
    let asked = Instant::now();
    eventually("frames pass both ways", violin_tests::PATIENCE, || passes(&a, &b, "there") && passes(&b, &a, "back"));
    println!("beside dead addresses an owned guest was heard after {:.2} s", asked.elapsed().as_secs_f64());

    fabric.start_switch(2);
    let started = Instant::now();
    fabric.wait_mesh(violin_tests::PATIENCE);
    println!("the late switch was found after {:.2} s", started.elapsed().as_secs_f64());
}

/// h3 behind a path that `cut` cuts and `mend` mends, both at the underlay's bridge; h1 and h2 go on.
fn unreachable_and_back(what: &str, cut: &str, mend: &str) {
    let fabric = Fabric::start(3);
    fabric.carry(&network(7));
    let a = fabric.hosts[0].guest(7, A);
    let b = fabric.hosts[1].guest(7, B);
    let learned = fabric.hosts[2].guest(7, "02:00:00:00:00:0c");
    let owned = fabric.hosts[2].owned_guest(7, "02:00:00:00:00:0d", "alpha-d");
    for guest in [&b, &learned, &owned] {
        eventually("frames pass both ways", SOON, || passes(&a, guest, "there") && passes(guest, &a, "back"));
    }

    fabric.underlay.ip(cut);
    let began = Instant::now();
    let (mut others, mut noticed) = (0, None);
    eventually("the loss is noticed on either side and calls have failed", OUTAGE * 2, || {
        assert!(passes(&a, &b, &format!("during {others}.")), "{what}: frame {others} between others was lost");
        others += 1;
        if (0..3).all(|index| peers(&fabric, index) == usize::from(index < 2)) {
            noticed.get_or_insert_with(|| began.elapsed());
        }
        noticed.is_some() && began.elapsed() >= OUTAGE
    });
    println!("{what}: noticed after {:.2?}; {others} of {others} frames passed between others", noticed.unwrap_or_default());
    let SwitchReply::Peers(seen) = fabric.hosts[0].ask(SwitchRequest::PeerList) else { panic!("want peers") };
    assert!(
        seen.iter().any(|peer| peer.host.as_ref().is_some_and(|host| host.as_str() == "h3") && !peer.connected),
        "{what}: h3 is not listed: {seen:?}"
    );

    b.wire.drain();
    let refused = fabric.hosts[0].counter("drop.owner-unreachable");
    for _ in 0..20 {
        a.wire.send(&labelled(owned.mac, a.mac, "to the owned"));
    }
    eventually("each is dropped by name", SOON, || fabric.hosts[0].counter("drop.owner-unreachable") == refused + 20);
    // Frames of one guest stay in order: had those to the owned MAC been flooded, they would have come before this one.
    a.wire.send(&labelled(learned.mac, a.mac, "to the learned"));
    let first = b.wire.receive(SOON, |frame| has_label(frame, "to the")).expect("who was learned is looked for everywhere");
    assert!(has_label(&first, "to the learned"), "{what}: a frame for an owned MAC was flooded");

    fabric.underlay.ip(mend);
    let mended = Instant::now();
    fabric.wait_mesh(violin_tests::PATIENCE);
    for guest in [&learned, &owned] {
        eventually("frames pass again", SOON, || passes(&a, guest, "there again") && passes(guest, &a, "back again"));
    }
    println!("{what}: healed {:.2} s after the path was back", mended.elapsed().as_secs_f64());
}

#[test]
#[ignore = "needs root"]
fn a_peer_whose_datagrams_vanish_hinders_nobody_and_is_back_with_its_path() {
    unreachable_and_back("silence", "link set u3 nomaster", "link set u3 master br0");
}

#[test]
#[ignore = "needs root"]
fn a_peer_whose_cable_is_pulled_hinders_nobody_and_is_back_with_it() {
    unreachable_and_back("cable", "link set u3 down", "link set u3 up");
}

#[test]
#[ignore = "needs root"]
fn malformed_datagrams_of_every_length_are_counted_and_do_no_harm() {
    let fabric = Fabric::start(2);
    fabric.carry(&network(7));
    let a = fabric.hosts[0].guest(7, A);
    let b = fabric.hosts[1].guest(7, B);
    let stranger = fabric.underlay.enter(|| UdpSocket::bind("0.0.0.0:0").expect("a free port"));
    fabric.underlay.ip("addr add 10.99.0.250/24 dev br0");
    let before = fabric.hosts[0].drops();

    let mut sent = 0;
    for first in [0x00u8, 0x11, 0x12, 0x13, 0x21, 0x3f, 0x80, 0x91, 0xbf, 0x40, 0x5a, 0xc0, 0xff] {
        for len in (0..=300).chain([1472]) {
            let bytes: Vec<u8> = (0..len).map(|i| if i == 0 { first } else { (i * 37 + len) as u8 }).collect();
            if stranger.send_to(&bytes, format!("10.99.0.1:{MESH_PORT}")).is_ok() && (first & 0x40 == 0 || len == 0) {
                sent += 1;
            }
        }
    }

    eventually("most are counted (UDP may lose some)", SOON, || fabric.hosts[0].drops() - before > sent * 8 / 10);
    b.wire.drain();
    a.wire.send(&labelled(MacAddr::BROADCAST, a.mac, "alive"));
    assert!(b.wire.receive(SOON, |frame| has_label(frame, "alive")).is_some(), "the switch is not well any more");
    assert_eq!(peers(&fabric, 0), 1);
}

#[test]
#[ignore = "needs root"]
fn a_switch_of_another_authority_is_refused() {
    let mut fabric = Fabric::prepare(2);
    fabric.start_switch(0);
    let foreign = Fabric::prepare(2);
    let pki = fabric.dir().join("pki");
    for name in ["h2.pem", "h2.key", "ca.pem"] {
        std::fs::copy(foreign.dir().join("pki").join(name), pki.join(name)).expect("a file is copied");
    }
    fabric.start_switch(1);

    eventually("the refusal is in the log", violin_tests::PATIENCE, || {
        fabric.hosts[0].log().contains("certificate") || fabric.hosts[1].log().contains("certificate")
    });
    assert_eq!((peers(&fabric, 0), peers(&fabric, 1)), (0, 0));
}

#[test]
#[ignore = "needs root"]
fn local_requests_that_are_nonsense_are_answered_in_words() {
    use std::io::{BufRead as _, Write as _};
    let fabric = Fabric::start(1);
    for line in ["{}", "nonsense", "{\"port-remove\":{}}", "[1,2", "\"no-such-request\"", &"x".repeat(2_000_000)] {
        let mut stream = std::os::unix::net::UnixStream::connect(fabric.dir().join("h1.sock")).expect("the socket is there");
        stream.set_read_timeout(Some(Duration::from_secs(5))).expect("a legal timeout");
        let _ = stream.write_all(line.as_bytes()).and_then(|()| stream.write_all(b"\n"));
        let mut answer = String::new();
        let _ = std::io::BufReader::new(stream).read_line(&mut answer);
        assert!(answer.contains("error"), "{line:.40?} was answered {answer:?}");
    }
    // Idempotent: what is not there is removed already.
    let missing = fabric.hosts[0].try_ask(&SwitchRequest::NetworkRemove { vni: Vni::new(9).unwrap() });
    assert_eq!(missing, Ok(SwitchReply::Done));
    assert!(fabric.hosts[0].try_ask(&SwitchRequest::Status).is_ok(), "the switch is not well any more");
}
