//! Real QEMU guests under real libvirt: one is moved by command under a TCP stream, there and back.

use std::process::Stdio;
use violin_tests::eventually;
use violin_tests::guests::{Lab, finish};

/// Bytes that the receiver's host, h1, has written to its port.
fn arrived(lab: &Lab) -> u64 {
    let ports: serde_json::Value = serde_json::from_str(&lab.must(&["--json", "port", "--host", "h1"])).expect("JSON");
    let port = ports.as_array().expect("a list").iter().find(|port| port["spec"]["owned"]["vm"] == "three-c2");
    port.expect("c2 has a port on h1")["traffic"]["bytes-out"].as_u64().expect("a number")
}

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
        // A new stretch of the stream before each move, so that one that never began or came to rest is seen here.
        let before = arrived(&lab);
        eventually("the stream flows", violin_tests::PATIENCE, || arrived(&lab) > before + 50_000);
        lab.must(&["vm", "migrate", "three-c1", "--to", to]);
        assert_eq!(lab.host_of("three-c1"), to);
        assert_eq!(lab.qemus("three-c1"), 1, "the VM must run exactly once");
    }

    finish(sender);
    let transfer: serde_json::Value = serde_json::from_str(finish(server).trim()).expect("the receiver prints JSON");
    println!("TCP over two moves: {transfer}");
    assert_eq!(transfer["intact"], true, "{transfer}");
    assert!(transfer["bytes"].as_u64().unwrap_or(0) > 100_000, "{transfer}");
    lab.must(&["env", "down", "three"]);
    eventually("no QEMU of the environment is left", violin_tests::PATIENCE, || {
        ["three-head", "three-c1", "three-c2"].iter().all(|vm| lab.qemus(vm) == 0)
    });
}
