//! Bulk TCP between two guests on two hosts over the fabric, as a ratio to a bare veth pair in the same run.
//!
//! Interleaved (raw, fabric, raw, fabric, …), medians, JSON on standard output. No CPU quotas. The machine is shared and
//! noisy: only the ratio means something.

use serde_json::json;
use std::process::ExitCode;
use violin_tests::fabric::{Fabric, network};
use violin_tests::netns::{Netns, ip};

const ROUNDS: usize = 3;
const SECONDS: u32 = 3;
/// The best user-space rival measured on such machines reaches this; a first floor.
const FLOOR: f64 = 0.08;

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
    let ping = a.netns.run("ping", "-c 3 -W 1 10.77.0.2");
    assert!(ping.status.success(), "the guests do not reach each other");

    let (mut raw, mut over) = (Vec::new(), Vec::new());
    for round in 1..=ROUNDS {
        raw.push(left.bulk(&right, "10.88.0.2", SECONDS) / 1e9);
        over.push(a.netns.bulk(&b.netns, "10.77.0.2", SECONDS) / 1e9);
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
