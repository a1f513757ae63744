//! How data is protected between real switches: what is on the wire, plain ways, peers that roam, old versions. Needs root.
#![cfg(feature = "io")]

mod support;

use std::net::{SocketAddr, UdpSocket};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use support::bulk::there_and_back;
use support::site::{Site, host};
use support::{run, until, vni};
use violin_channel::tls::{Credentials, Timing};
use violin_channel::{frame, pki, quic};
use violin_common::api::switch::{PeerSeen, TroubleKind};
use violin_common::control::mesh::{Hello, Message};

const NETWORK: &str = "[[network]]\nvni = 5\n[[port]]\nkind = \"packet\"\nvni = 5\ninterface = \"g\"\n";

fn peer(site: &Site, at: usize, about: usize) -> PeerSeen {
    let found = site.peers(at).into_iter().find(|peer| peer.host == Some(host(about)));
    found.unwrap_or_else(|| panic!("h{at} does not know h{about}"))
}

/// Two hosts with guests; `extra` stands at the end of each one's own keys.
fn two_hosts(extra: [&str; 2]) -> Site {
    let mut site = Site::new(2);
    for number in [1, 2] {
        site.guest(number);
        site.extras.insert(number, extra[number - 1].to_owned());
        site.start_with(number, "pki", NETWORK);
    }
    until("both are connected", || (1..=2).all(|number| site.connected(number) == 1));
    site
}

/// Everything that is on the underlay while guest 1 sends a datagram with `words` in it to guest 2.
fn captured(site: &Site, words: &str) -> Vec<u8> {
    let file = site.directory.path().join("capture");
    let mut capture = Command::new("nsenter")
        .args([&format!("--net=/run/netns/{}", site.underlay()), "tcpdump", "-U", "-i", "u2", "-w"])
        .arg(&file)
        .args(["udp", "port", "7471"])
        .stderr(Stdio::null())
        .spawn()
        .expect("tcpdump runs");
    let size = || std::fs::metadata(&file).map_or(0, |file| file.len());
    until("the capture has begun", || size() > 24);
    let to = site.guests[&2].enter(|| UdpSocket::bind("192.168.5.2:9000").unwrap());
    let from = site.guests[&1].enter(|| UdpSocket::bind("192.168.5.1:0").unwrap());
    to.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let mut bytes = [0; 100];
    until("the words arrive", || {
        from.send_to(words.as_bytes(), "192.168.5.2:9000").is_ok() && to.recv(&mut bytes).is_ok_and(|len| len == words.len())
    });
    // Control is never silent for long: what was before it is in the file.
    let then = size();
    until("the capture goes on", || size() > then + 4096);
    let _ = capture.kill();
    let _ = capture.wait();
    std::fs::read(file).unwrap()
}

fn has(bytes: &[u8], words: &str) -> bool {
    bytes.windows(words.len()).any(|window| window == words.as_bytes())
}

#[test]
#[ignore = "needs root"]
fn data_is_sealed_by_itself_and_nobody_on_the_way_reads_it() {
    let site = two_hosts(["", ""]);
    for (at, about) in [(1, 2), (2, 1)] {
        let protection = peer(&site, at, about).protection.unwrap();
        assert!(protection.starts_with("aes-256-gcm (") || protection.starts_with("chacha20-poly1305 ("), "{protection}");
    }
    assert!(!has(&captured(&site, "nobody else reads this"), "nobody else reads this"));
    let (g1, g2) = (&site.guests[&1], &site.guests[&2]);
    assert_eq!(there_and_back(g1, g2, [192, 168, 5, 2].into(), 1 << 20), Ok(()));
}

#[test]
#[ignore = "needs root"]
fn one_end_s_cipher_and_library_are_taken_by_the_other() {
    let site = two_hosts(["aead = \"chacha20-poly1305\"\naead-library = \"aws-lc-rs\"\n", ""]);
    assert_eq!(peer(&site, 1, 2).protection.as_deref(), Some("chacha20-poly1305 (aws-lc-rs)"));
    assert!(peer(&site, 2, 1).protection.unwrap().starts_with("chacha20-poly1305 ("));
    let (g1, g2) = (&site.guests[&1], &site.guests[&2]);
    assert_eq!(there_and_back(g1, g2, [192, 168, 5, 2].into(), 1 << 20), Ok(()));
}

#[test]
#[ignore = "needs root"]
fn ends_without_a_common_cipher_refuse_each_other_in_words() {
    let mut site = Site::new(2);
    for (number, aead) in [(1, "aes-256-gcm"), (2, "chacha20-poly1305")] {
        site.extras.insert(number, format!("aead = \"{aead}\"\n"));
        site.start_with(number, "pki", "[[network]]\nvni = 5\n");
    }
    let why = |at: usize| {
        let troubles = site.peers(at).into_iter().flat_map(|peer| peer.troubles);
        troubles.filter(|trouble| trouble.kind == TroubleKind::Refused).map(|trouble| trouble.why).collect::<String>()
    };
    until("the caller says why", || why(2).contains("see `aead` at both ends"));
    assert!(why(2).contains("aes-256-gcm") && why(2).contains("chacha20-poly1305"), "{}", why(2));
}

const PLAIN: &str = "plain = [{ domain = \"d1\", interface = \"u0\" }]\n";

#[test]
#[ignore = "needs root"]
fn data_goes_plain_only_where_both_ends_say_so_for_this_domain_and_interface() {
    let site = two_hosts([PLAIN, PLAIN]);
    for (at, about) in [(1, 2), (2, 1)] {
        assert_eq!(peer(&site, at, about).protection.as_deref(), Some("plain"));
    }
    assert!(has(&captured(&site, "everybody reads this"), "everybody reads this"));
    let (g1, g2) = (&site.guests[&1], &site.guests[&2]);
    assert_eq!(there_and_back(g1, g2, [192, 168, 5, 2].into(), 1 << 20), Ok(()));
    assert_eq!(site.counter(1, "drop.bad-cookie") + site.counter(1, "drop.wrong-interface"), 0);
    drop(site);

    for other in
        ["", "plain = [{ domain = \"d2\", interface = \"u0\" }]\n", "plain = [{ domain = \"d1\", interface = \"lo\" }]\n"]
    {
        let site = two_hosts([PLAIN, other]);
        assert!(!has(&captured(&site, "nobody else reads this"), "nobody else reads this"), "{other}");
        let at_1 = peer(&site, 1, 2);
        assert_ne!(at_1.protection.as_deref(), Some("plain"), "{other}");
        let told = at_1.troubles.iter().find(|trouble| trouble.kind == TroubleKind::Plain);
        assert!(told.is_some_and(|told| told.why.contains("want `plain` at the other end")), "{:?}", at_1.troubles);
        assert_eq!(peer(&site, 2, 1).troubles, [], "{other}");
    }
}

/// A relay between h1 and h2 that h2 knows as h1, and that h1 sees as whatever address it has just now: a NAT that forgets.
struct Relay {
    outside: Arc<Mutex<Arc<UdpSocket>>>,
    ended: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Relay {
    const INSIDE: &str = "10.71.0.200:7471";

    fn socket(site: &Site, address: &str) -> UdpSocket {
        let namespace = format!("/run/netns/{}", site.underlay());
        let file = std::fs::File::open(namespace).unwrap();
        let socket = std::thread::scope(|scope| {
            let bound = scope.spawn(|| {
                nix::sched::setns(&file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
                UdpSocket::bind(address).unwrap()
            });
            bound.join().unwrap()
        });
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        socket
    }

    fn start(site: &Site) -> Self {
        run(&format!("ip -n {} addr add 10.71.0.200/24 dev bridge0", site.underlay()));
        let inside = Arc::new(Self::socket(site, Self::INSIDE));
        let outside = Arc::new(Mutex::new(Arc::new(Self::socket(site, "10.71.0.200:0"))));
        let (ended, host): (Arc<AtomicBool>, Arc<Mutex<Option<SocketAddr>>>) = Default::default();
        let mut threads = Vec::new();
        {
            let (inside, outside, ended, host) = (inside.clone(), outside.clone(), ended.clone(), host.clone());
            threads.push(std::thread::spawn(move || {
                let mut bytes = [0; 65_536];
                while !ended.load(Ordering::Relaxed) {
                    let Ok((len, from)) = inside.recv_from(&mut bytes) else { continue };
                    *host.lock().unwrap() = Some(from);
                    let outside = outside.lock().unwrap().clone();
                    let _ = outside.send_to(&bytes[..len], "10.71.0.1:7471");
                }
            }));
        }
        let (back, at, over) = (outside.clone(), host, ended.clone());
        threads.push(std::thread::spawn(move || {
            let mut bytes = [0; 65_536];
            while !over.load(Ordering::Relaxed) {
                let outside = back.lock().unwrap().clone();
                let Ok((len, _)) = outside.recv_from(&mut bytes) else { continue };
                if let Some(host) = *at.lock().unwrap() {
                    let _ = inside.send_to(&bytes[..len], host);
                }
            }
        }));
        Self { outside, ended, threads }
    }

    /// From now on h1 sees another address.
    fn rebind(&self, site: &Site) -> SocketAddr {
        let new = Arc::new(Self::socket(site, "10.71.0.200:0"));
        let address = new.local_addr().unwrap();
        *self.outside.lock().unwrap() = new;
        address
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

#[test]
#[ignore = "needs root"]
fn a_peer_behind_a_nat_that_forgets_is_followed_without_a_new_connection() {
    let mut site = Site::new(2);
    let relay = Relay::start(&site);
    site.joins.insert(2, vec![Relay::INSIDE.to_owned()]);
    for number in [1, 2] {
        site.guest(number);
        site.start(number);
    }
    until("both are connected", || (1..=2).all(|number| site.connected(number) == 1));
    until("a datagram passes", || site.reaches(1, 2));
    let connections = |at: usize| site.log(at).matches("peer connected").count();
    let before = [connections(1), connections(2)];

    for _ in 0..3 {
        let new = relay.rebind(&site);
        // Only h2 can tell h1 where it is now: what h1 sends goes to where nobody is.
        until("h1 sends to the new address", || {
            let _ = site.reaches(2, 1);
            peer(&site, 1, 2).address == new
        });
        until("a datagram passes both ways", || site.reaches(1, 2) && site.reaches(2, 1));
    }

    assert_eq!([connections(1), connections(2)], before, "the control connection was followed too");
    let (g1, g2) = (&site.guests[&1], &site.guests[&2]);
    assert_eq!(there_and_back(g2, g1, [192, 168, 5, 1].into(), 1 << 18), Ok(()));
}

#[test]
#[ignore = "needs root"]
fn what_a_stranger_sends_again_from_elsewhere_moves_no_peer() {
    let site = two_hosts(["", ""]);
    run(&format!("ip -n {} addr add 10.71.0.200/24 dev bridge0", site.underlay()));
    let capture = captured(&site, "to be sent again");
    let stranger = Relay::socket(&site, "10.71.0.200:0");
    // Whatever was captured, as it is: records behind the file's head of 24 bytes, each with a head of 16, Ethernet, IPv4, UDP.
    let mut rest = &capture[24..];
    let mut sent = 0;
    while let Some((head, behind)) = rest.split_first_chunk::<16>() {
        let len = u32::from_ne_bytes([head[8], head[9], head[10], head[11]]) as usize;
        let Some(packet) = behind.get(..len) else { break };
        if let Some(datagram) = packet.get(42..).filter(|datagram| datagram.first() == Some(&0x21)) {
            stranger.send_to(datagram, "10.71.0.1:7471").unwrap();
            stranger.send_to(datagram, "10.71.0.2:7471").unwrap();
            sent += 1;
        }
        rest = &behind[len..];
    }
    assert!(sent > 0, "no data was captured");
    let refused = |at: usize| site.counter(at, "drop.replayed") + site.counter(at, "drop.unknown-receiver");
    until("each has refused all", || (1..=2).all(|at| refused(at) >= sent));
    for (at, about) in [(1, 2), (2, 1)] {
        assert_eq!(peer(&site, at, about).address.to_string(), format!("10.71.0.{about}:7471"));
    }
    assert!(site.reaches(1, 2));
}

#[test]
#[ignore = "needs root"]
fn a_switch_of_version_1_is_refused_by_name_and_told_what_to_do() {
    let mut site = Site::new(2);
    site.start(1);
    let credentials = Arc::new(Credentials::load(&pki::paths(&site.directory.path().join("pki"), &host(2))).unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let endpoint = site.hosts[&2].enter(|| {
        let _inside = runtime.enter();
        quic::dialler("10.71.0.1:7471".parse().unwrap(), credentials, quic::alpn::MESH, Timing::BRISK).unwrap()
    });
    let hello = Hello {
        oldest: 1,
        newest: 1,
        features: 0,
        host: host(2),
        domain: "d1".parse().unwrap(),
        boot: 7,
        receiver: 9,
        reserved: 0,
        max_datagram: 1472,
        networks: vec![vni(5)],
        offer: None,
    };
    // As version 1 wrote it, which knew nothing of an offer.
    let mut bytes = postcard::to_stdvec(&Message::Hello(hello)).unwrap();
    assert_eq!(bytes.pop(), Some(0));

    let (theirs, words) = runtime.block_on(async {
        let (connection, _) = endpoint.connect("10.71.0.1:7471".parse().unwrap(), None).await.unwrap();
        let (mut out, mut inn) = connection.open_bi().await.unwrap();
        out.write_all(&[&u32::try_from(bytes.len()).unwrap().to_be_bytes(), &bytes[..]].concat()).await.unwrap();
        let theirs = frame::recv::<Message>(&mut inn).await.unwrap();
        connection.closed().await;
        (theirs, quic::refusal(&connection))
    });

    let words = words.expect("refused, not just closed");
    assert!(words.contains("got protocol 1 to 1, want one of 2 to 2: upgrade the older end"), "{words}");
    // And the older end can read as much of ours as it needs to say the same.
    let Some(Message::Hello(theirs)) = theirs else { panic!("{theirs:?}") };
    assert_eq!((theirs.oldest, theirs.newest, theirs.reserved), (2, 2, 0));
}
