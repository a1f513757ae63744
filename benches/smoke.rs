//! Bulk TCP between two guests on two hosts over the fabric, as a ratio to a bare veth pair in the same run.
//!
//! Interleaved (raw, fabric, raw, fabric, …), medians, JSON on standard output. No CPU quotas. The machine is shared and
//! noisy: only the ratio means something.

use serde_json::{Value, json};
use std::net::TcpListener;
use std::process::{ExitCode, Stdio};
use std::time::Duration;
use violin_tests::eventually;
use violin_tests::fabric::{Fabric, network};
use violin_tests::netns::{Netns, ip};

const ROUNDS: usize = 3;
const SECONDS: u32 = 3;
/// The best user-space rival measured on such machines reaches this; a first floor.
const FLOOR: f64 = 0.08;

/// Gbit/s of one iperf3 run from `from` to `to` at `address`.
fn bulk(from: &Netns, to: &Netns, address: &str) -> f64 {
    let mut server = to.command("iperf3");
    server.args(["-s", "-1", "-B", address]).stdout(Stdio::null()).stderr(Stdio::null());
    let mut server = server.spawn().expect("iperf3 starts");
    eventually("iperf3 listens", Duration::from_secs(5), || to.enter(|| TcpListener::bind((address, 5201)).is_err()));
    let output = from.run("iperf3", &format!("-c {address} -t {SECONDS} -J"));
    let _ = server.wait();
    let result: Value = serde_json::from_slice(&output.stdout).expect("iperf3 prints JSON");
    result["end"]["sum_received"]["bits_per_second"].as_f64().unwrap_or(0.0) / 1e9
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// Measures; whether the floor is reached. Everything made is removed when this returns.
fn measure() -> bool {
    let (left, right) = (Netns::new("l"), Netns::new("r"));
    ip(&format!("link add raw netns {} type veth peer name raw netns {}", left.name(), right.name()));
    for (netns, address) in [(&left, "10.88.0.1/24"), (&right, "10.88.0.2/24")] {
        netns.ip(&format!("addr add {address} dev raw"));
        netns.ip("link set raw up");
    }
    let fabric = Fabric::start(2);
    fabric.carry(&network(7));
    let a = fabric.hosts[0].guest(7, "02:00:00:00:00:0a");
    let b = fabric.hosts[1].guest(7, "02:00:00:00:00:0b");
    a.address("10.77.0.1/24");
    b.address("10.77.0.2/24");
    assert!(a.pings("10.77.0.2"), "the guests do not reach each other");

    let (mut raw, mut over) = (Vec::new(), Vec::new());
    for round in 1..=ROUNDS {
        raw.push(bulk(&left, &right, "10.88.0.2"));
        over.push(bulk(&a.netns, &b.netns, "10.77.0.2"));
        eprintln!("round {round}: raw veth {:.2} Gbit/s, fabric {:.2} Gbit/s", raw[round - 1], over[round - 1]);
    }
    let ratio = median(&over) / median(&raw);
    let result = json!({
        "bench": "bulk-tcp", "aead": "none", "rounds": ROUNDS, "seconds": SECONDS,
        "raw_veth_gbit_s": raw, "fabric_gbit_s": over, "ratio": ratio, "floor": FLOOR, "holds": ratio >= FLOOR,
    });
    println!("{}", serde_json::to_string_pretty(&result).expect("JSON can be written"));
    ratio >= FLOOR
}

fn main() -> ExitCode {
    if measure() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
