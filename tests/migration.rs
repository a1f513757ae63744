//! Real QEMU guests under real libvirt: one is moved by command under a TCP stream, there and back.

use std::process::Stdio;
use std::time::Duration;
use violin_tests::guests::{Lab, finish, qemus};

#[test]
#[ignore = "needs root"]
fn a_vm_moves_there_and_back_under_a_tcp_stream() {
    let lab = Lab::up("test-move", "two-hosts.toml");
    lab.must(&["env", "up", &Lab::environment("three.toml"), "--place", "head=h1", "--place", "c1=h1", "--place", "c2=h1"]);
    let mut serve = lab.command(&["ssh", "three", "c2", "--", "violin-probe transfer-serve --port 5001"]);
    let server = serve.stdout(Stdio::piped()).spawn().expect("ssh runs");
    let mut send = lab.command(&[
        "ssh",
        "three",
        "c1",
        "--",
        "violin-probe transfer-send --to 10.78.0.3:5001 --rate 200000 --until-stdin-closes",
    ]);
    let sender = send.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("ssh runs");

    for (to, from) in [("h2", "h1"), ("h1", "h2")] {
        assert_eq!(lab.host_of("three-c1"), from);
        lab.must(&["vm", "migrate", "three-c1", "--to", to]);
        assert_eq!(lab.host_of("three-c1"), to);
        assert_eq!(qemus("three-c1"), 1, "the VM must run exactly once");
    }

    finish(sender);
    let transfer: serde_json::Value = serde_json::from_str(finish(server).trim()).expect("the receiver prints JSON");
    println!("TCP over two moves: {transfer}");
    assert_eq!(transfer["intact"], true, "{transfer}");
    assert!(transfer["bytes"].as_u64().unwrap_or(0) > 100_000, "{transfer}");
    lab.must(&["env", "down", "three"]);
    violin_tests::eventually("no QEMU of the environment is left", Duration::from_secs(10), || {
        ["three-head", "three-c1", "three-c2"].iter().all(|vm| qemus(vm) == 0)
    });
}
