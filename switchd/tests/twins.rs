//! Two hosts with copies of one certificate, and hosts that only started anew. Needs root.
#![cfg(feature = "io")]

mod support;

use nix::sys::signal::Signal;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use support::site::{Site, host};
use support::until;
use violin_common::api::switch::{PeerSeen, TroubleKind};

const REFUSED: &str = "control.twins-refused";

fn site() -> Site {
    let mut site = Site::new(3);
    for number in 1..=3 {
        site.guest(number);
    }
    site.copies.insert(3, 1);
    for number in [1, 2] {
        site.start(number);
    }
    until("both are connected", || (1..=2).all(|number| site.connected(number) == 1));
    site
}

fn trouble(site: &Site, at: usize, about: usize, kind: TroubleKind) -> Option<(PeerSeen, String)> {
    let peer = site.peers(at).into_iter().find(|peer| peer.host == Some(host(about)))?;
    let why = peer.troubles.iter().find(|trouble| trouble.kind == kind)?.why.clone();
    Some((peer, why))
}

/// Sends a datagram every 2 ms from guest 1 to guest 2 while `work` goes on; returns how many were sent and how many came.
fn meanwhile(site: &Site, work: impl FnOnce()) -> (u32, u32) {
    let to = site.guests[&2].enter(|| UdpSocket::bind("192.168.5.2:9000").unwrap());
    let from = site.guests[&1].enter(|| UdpSocket::bind("192.168.5.1:0").unwrap());
    to.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let (mut bytes, done) = ([0; 4], AtomicBool::new(false));
    until("the way is known", || from.send_to(&[0; 4], "192.168.5.2:9000").is_ok() && to.recv(&mut bytes).is_ok());
    std::thread::scope(|scope| {
        let sent = scope.spawn(|| {
            let mut sent = 0_u32;
            while !done.load(Ordering::Relaxed) {
                sent += 1;
                from.send_to(&sent.to_be_bytes(), "192.168.5.2:9000").unwrap();
                std::thread::sleep(Duration::from_millis(2));
            }
            sent
        });
        let came = scope.spawn(|| {
            let (mut came, mut bytes) = (0, [0; 4]);
            while to.recv(&mut bytes).is_ok() {
                came += u32::from(bytes != [0; 4]);
            }
            came
        });
        work();
        done.store(true, Ordering::Relaxed);
        (sent.join().unwrap(), came.join().unwrap())
    })
}

#[test]
#[ignore = "needs root"]
fn of_two_hosts_with_one_certificate_the_second_is_refused_and_the_first_loses_nothing() {
    let mut site = site();
    site.start(3);
    let site = site;

    let (sent, came) = meanwhile(&site, || {
        until("the copy is refused again and again", || site.counter(2, REFUSED) >= 2 && site.counter(1, REFUSED) >= 1);
    });

    assert_eq!(came, sent, "datagrams of the first");
    let (seen, why) = trouble(&site, 2, 1, TroubleKind::Twin).expect("shown");
    assert!(seen.connected && seen.address.to_string() == "10.71.0.1:7471" && why.contains("10.71.0.3:7471"), "{seen:?}");
    let warned = site.log(2).lines().filter(|line| line.contains("two switches with one certificate")).count();
    assert_eq!(warned, 1, "h2 says so once");
    assert!(site.log(2).contains("the one at 10.71.0.1:7471 stays, the one at 10.71.0.3:7471 is refused"));
    let (seen, why) = trouble(&site, 3, 2, TroubleKind::Refused).expect("the copy shows who refuses it");
    assert!(!seen.connected && why.contains("certificate of h1 answers at 10.71.0.1:7471"), "{seen:?}");
    let warned = site.log(3).lines().filter(|line| line.contains("WARN") && line.contains("the peer refuses us")).count();
    assert!((1..=2).contains(&warned), "the copy says once of each that refuses it: {warned}");
    let (seen, _) = trouble(&site, 1, 1, TroubleKind::Twin).expect("the first shows its namesake");
    assert_eq!(seen.address.to_string(), "10.71.0.3:7471");
}

#[test]
#[ignore = "needs root"]
fn a_host_killed_and_started_anew_is_back_at_once_and_elsewhere_when_the_old_one_is_seen_to_be_dead() {
    let mut site = site();
    site.daemons[&1].signal(Signal::SIGKILL);
    let began = Instant::now();
    site.start(1);
    until("it is back", || site.connected(2) == 1 && site.reaches(1, 2));
    println!("back at its address after {:?}", began.elapsed());

    site.daemons[&1].signal(Signal::SIGKILL);
    let began = Instant::now();
    site.start(3);
    until("it is back elsewhere", || site.connected(2) == 1 && site.reaches(3, 2));
    println!("back at another address after {:?}", began.elapsed());
    assert_eq!(site.counter(2, REFUSED), 0);
    assert_eq!(site.peers(2)[0].address.to_string(), "10.71.0.3:7471");
}
