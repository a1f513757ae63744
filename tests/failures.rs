//! What dies is noticed, what comes back is taken back, what is nonsense is refused in words.

use std::net::UdpSocket;
use std::time::{Duration, Instant};
use violin_common::api::switch::{SwitchReply, SwitchRequest};
use violin_common::{MacAddr, Vni};
use violin_tests::fabric::{Fabric, MESH_PORT, network};
use violin_tests::frames::{has_label, labelled};
use violin_tests::{eventually, program};

const A: &str = "02:00:00:00:00:0a";
const B: &str = "02:00:00:00:00:0b";
/// Patience with what must come, on a slow machine too.
const SOON: Duration = Duration::from_secs(10);

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
    eventually("the others notice", Duration::from_secs(10), || peers(&fabric, 0) == 1 && peers(&fabric, 1) == 1);
    println!("loss of a peer noticed after {:.2} s", killed.elapsed().as_secs_f64());

    fabric.start_switch(2);
    let back = Instant::now();
    fabric.wait_mesh(Duration::from_secs(15));
    fabric.carry(&network(7));
    let b = fabric.hosts[2].guest(7, B);
    eventually("traffic flows again", Duration::from_secs(5), || {
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
    eventually("h2 and h3 notice", Duration::from_secs(10), || peers(&fabric, 1) == 1 && peers(&fabric, 2) == 1);

    fabric.start_switch(0);

    fabric.wait_mesh(Duration::from_secs(15));
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
            if stranger.send_to(&bytes, format!("10.99.0.1:{MESH_PORT}")).is_ok() && first & 0x40 == 0 && len > 0 {
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

    eventually("the refusal is in the log", Duration::from_secs(10), || {
        fabric.hosts[0].log().contains("certificate") || fabric.hosts[1].log().contains("certificate")
    });
    assert_eq!((peers(&fabric, 0), peers(&fabric, 1)), (0, 0));
}

#[test]
#[ignore = "needs root"]
fn wrong_configurations_are_refused_with_key_got_and_wanted() {
    let fabric = Fabric::prepare(1);
    let good = std::fs::read_to_string(fabric.dir().join("h1.toml")).expect("the harness wrote it");
    let network = "[[network]]\nvni = 7\n";
    let port = |mac: &str, interface: &str| {
        format!("[[port]]\nkind = \"packet\"\nvni = 7\ninterface = \"{interface}\"\nmac = \"{mac}\"\n")
    };
    let cases = [
        ("an unknown key", format!("colour = \"blue\"\n{good}"), vec!["colour"]),
        ("a wrong unit", format!("{good}[[network]]\nvni = 7\nageing = \"300\"\n"), vec!["ageing", "300", "unit"]),
        ("a VNI out of range", format!("{good}[[network]]\nvni = 16777216\n"), vec!["vni", "16777216", "16777215"]),
        ("an MTU out of range", format!("{good}[[network]]\nvni = 7\nmtu = 100\n"), vec!["network[0].mtu", "100", "576"]),
        ("a clashing MAC", format!("{good}{network}{}{}", port(A, "x1"), port(A, "x2")), vec!["port[1].mac", A, "once"]),
        ("a network twice", format!("{good}{network}{network}"), vec!["network[1].vni", "7", "once"]),
        ("a port of no network", format!("{good}{}", port(A, "x1")), vec!["port[0].vni", "7"]),
        ("a missing file", good.replace("h1.pem", "missing.pem"), vec!["missing.pem"]),
    ];
    for (what, text, words) in cases {
        let path = fabric.dir().join("wrong.toml");
        std::fs::write(&path, text).expect("a file is written");
        let output = std::process::Command::new(program("switchd"))
            .arg("--config")
            .arg(&path)
            .arg("--check")
            .output()
            .expect("switchd runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{what} was accepted");
        for word in words {
            assert!(said.contains(word), "{what}: {word:?} is not in {said:?}");
        }
    }
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
        assert!(line.len() > 1_000_000 || answer.contains("error"), "{line:.40?} was answered {answer:?}");
    }
    let missing = fabric.hosts[0].try_ask(&SwitchRequest::NetworkRemove { vni: Vni::new(9).unwrap() });
    assert!(missing.is_ok() || missing.unwrap_err().contains('9'));
    assert!(fabric.hosts[0].try_ask(&SwitchRequest::Status).is_ok(), "the switch is not well any more");
}
