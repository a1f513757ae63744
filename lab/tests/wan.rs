//! Namespaces and the WAN between them.

mod support;

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use support::{Standing, THREE, config, echoes, name, options, relay_entry as relay};
use violin_lab::{Layers, netns};

#[test]
#[ignore = "not a test: the relay of the labs below"]
fn relay_entry() {
    relay();
}

/// What is sent in bulk.
const BYTES: u64 = 64 << 20;

#[test]
#[ignore = "needs root"]
fn a_round_trip_between_domains_takes_twice_the_delay_and_little_more() {
    let lab = Standing::up(&config(&name("rtt"), THREE), &options(Layers::Net));

    let [h1, h2, h3] = lab.0.hosts.as_slice() else { panic!("three hosts") };
    let (mut far, lost) = echoes(h1, h3, 50, Duration::from_millis(20), 100);
    let (mut near, _) = echoes(h1, h2, 20, Duration::from_millis(20), 100);

    far.sort_by(f64::total_cmp);
    near.sort_by(f64::total_cmp);
    eprintln!("RTT ms: far min {} median {} max {}; near median {}", far[0], far[25], far[49], near[10]);
    assert_eq!(lost, 0.0);
    assert!(far[0] >= 10.0, "faster than the delay allows: {far:?}");
    // The fastest: the threads of this program and of the relay wait for a CPU when the machine is busy.
    assert!(far[0] < 13.0, "{far:?}");
    assert!(near[0] < 3.0, "{near:?}");
    lab.down();
}

#[test]
#[ignore = "needs root"]
fn loss_and_rate_of_the_wan_are_what_the_file_says() {
    let wan = "[wan]\ndelay = \"1ms\"\nloss = 10.0\nrate = \"8mbit\"\n";
    let lab = Standing::up(&config(&name("loss"), &format!("{THREE}{wan}")), &options(Layers::Net));

    let [h1, _, h3] = lab.0.hosts.as_slice() else { panic!("three hosts") };
    let (_, lost) = echoes(h1, h3, 1000, Duration::from_millis(1), 100);
    // 1000 bytes take 1 ms at 8 Mbit/s, in each direction.
    let (times, _) = echoes(h1, h3, 20, Duration::from_millis(50), 972);

    // 1 - 0.9², over 1000 echoes: standard deviation 1.2 %.
    assert!((13.0..25.0).contains(&lost), "{lost} % lost, want 19 %");
    let fastest = times.iter().copied().fold(f64::INFINITY, f64::min);
    assert!((4.0..7.0).contains(&fastest), "{fastest} ms, want 2 × (1 ms delay + 1 ms at 8 Mbit/s): {times:?}");
    lab.down();
}

#[test]
#[ignore = "needs root"]
fn super_frames_cross_the_wan_as_packets_of_the_mtu() {
    let lab = Standing::up(&config(&name("mtu"), THREE), &options(Layers::Net));
    // In a router all packets from the relay, on their way to h3, have crossed a wire.
    let router = lab.0.routers.iter().find(|router| router.domain.as_str() == "d2").unwrap();
    let counted = |word: &str| -> u64 {
        let text = netns::run(Command::new("ip").args(["-n", &router.netns, "-s", "-j", "link", "show", "wan0"])).unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        value[0]["stats64"]["rx"][word].as_u64().unwrap()
    };
    let [h1, _, h3] = lab.0.hosts.as_slice() else { panic!("three hosts") };
    let listener = netns::inside(&h3.netns, || TcpListener::bind((h3.address, 0))).unwrap();
    let address = listener.local_addr().unwrap();
    let limit = Duration::from_secs(120);
    let mut sender = netns::inside(&h1.netns, || TcpStream::connect_timeout(&address, limit)).unwrap();
    sender.set_write_timeout(Some(limit)).unwrap();
    let (mut receiver, _) = listener.accept().unwrap();
    receiver.set_read_timeout(Some(limit)).unwrap();

    let began = Instant::now();
    let sending = std::thread::spawn(move || {
        for _ in 0..BYTES / (64 << 10) {
            sender.write_all(&[7; 64 << 10]).unwrap();
        }
    });
    let received = std::io::copy(&mut receiver, &mut std::io::sink()).unwrap();
    sending.join().unwrap();

    let (bytes, packets) = (counted("bytes"), counted("packets"));
    let rate = received as f64 * 8.0 / began.elapsed().as_secs_f64() / 1e9;
    eprintln!("TCP over the WAN: {rate:.2} Gbit/s, {} bytes a packet", bytes / packets);
    assert_eq!(received, BYTES);
    assert!(bytes > BYTES, "{bytes} bytes crossed");
    assert!(bytes / packets <= 1500, "{bytes} bytes in {packets} packets");
    lab.down();
}
