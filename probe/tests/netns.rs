//! The probe over real interfaces: two network namespaces joined by a veth pair.

use serde_json::Value;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const PROBE: &str = env!("CARGO_BIN_EXE_violin-probe");

/// Two namespaces, `eth0` in each, 10.9.0.1 and 10.9.0.2; the second one's service runs. Undone when dropped.
struct Pair {
    names: [String; 2],
    folder: tempfile::TempDir,
    service: Child,
}

fn ip(words: &str) {
    let done = Command::new("ip").args(words.split_whitespace()).output().unwrap();
    assert!(done.status.success(), "ip {words}: {}", String::from_utf8_lossy(&done.stderr));
}

fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(180);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited 15 s for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl Pair {
    fn new(test: &str) -> Self {
        let names = ["a", "b"].map(|end| format!("vprobe-{test}-{}-{end}", std::process::id()));
        for name in &names {
            ip(&format!("netns add {name}"));
        }
        link(&names);
        let folder = tempfile::tempdir().unwrap();
        let mut service = inside(&names[1]);
        service.args(["answer", "--tag", "7", "--socket"]).arg(folder.path().join("b.sock"));
        let service = service.spawn().unwrap();
        let pair = Self { names, folder, service };
        wait_for("the service", || pair.socket().exists().then_some(()));
        pair
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("b.sock")
    }

    fn run(&self, end: usize, words: &[&str]) -> Output {
        inside(&self.names[end]).args(words).output().unwrap()
    }

    fn json(&self, end: usize, words: &[&str]) -> Value {
        let done = self.run(end, words);
        assert!(done.status.success(), "{words:?}: {}", String::from_utf8_lossy(&done.stderr));
        let text = String::from_utf8(done.stdout).unwrap();
        serde_json::from_str(text.lines().last().unwrap()).unwrap()
    }

    fn ask(&self, words: &[&str]) -> Value {
        let socket = self.socket();
        self.json(1, &[words, &["--socket", socket.to_str().unwrap()]].concat())
    }

    fn send(&self, words: &[&str]) -> Value {
        let mac = "52:54:00:09:00:02";
        self.json(0, &[&["send-numbered", "--interface", "eth0", "--mac", mac], words].concat())["summary"].clone()
    }
}

fn link(names: &[String; 2]) {
    ip(&format!("-n {} link add eth0 type veth peer name eth0 netns {}", names[0], names[1]));
    for (number, name) in (1..).zip(names) {
        ip(&format!("-n {name} link set eth0 address 52:54:00:09:00:0{number} up"));
        ip(&format!("-n {name} address add 10.9.0.{number}/24 dev eth0"));
    }
}

fn inside(namespace: &str) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/run/netns/{namespace}")).arg("--").arg(PROBE);
    command
}

impl Drop for Pair {
    fn drop(&mut self) {
        let _ = self.service.kill();
        let _ = self.service.wait();
        for name in &self.names {
            let _ = Command::new("ip").args(["netns", "delete", name]).status();
        }
    }
}

#[test]
#[ignore = "needs root"]
fn a_whole_run_arrives_and_is_echoed() {
    let pair = Pair::new("whole");
    let summary = pair.send(&["--run", "3", "--duration", "500ms"]);
    let report = pair.ask(&["received", "--run", "3"]);
    let sent = summary["sent"].as_u64().unwrap();
    assert!((200..=251).contains(&sent), "{summary}");
    assert_eq!((report["received"].as_u64(), report["lost"].as_u64()), (Some(sent), Some(0)), "{report}");
    assert_eq!((report["reordered"].as_u64(), report["duplicated"].as_u64()), (Some(0), Some(0)), "{report}");
    assert_eq!(summary["echoed"].as_u64(), Some(sent), "{summary}");
    assert_eq!(report["ended"], true);
}

#[test]
#[ignore = "needs root"]
fn a_withheld_number_is_counted_lost() {
    let pair = Pair::new("withheld");
    pair.send(&["--run", "4", "--duration", "500ms", "--withhold", "100"]);
    let report = pair.ask(&["received", "--run", "4"]);
    assert_eq!(report["lost"], 1, "{report}");
    assert_eq!(report["lost_ranges"], serde_json::json!([[100, 100]]));
    assert!(!pair.run(1, &["received", "--run", "5", "--socket", pair.socket().to_str().unwrap()]).status.success());
}

#[test]
#[ignore = "needs root"]
fn a_prober_whose_input_closes_ends_its_run() {
    let pair = Pair::new("input");
    let mut prober = inside(&pair.names[0])
        .args(["send-numbered", "--interface", "eth0", "--mac", "52:54:00:09:00:02", "--run", "6", "--until-stdin-closes"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for("frames of the run", || {
        let done = pair.run(1, &["received", "--run", "6", "--socket", pair.socket().to_str().unwrap()]);
        serde_json::from_slice::<Value>(&done.stdout).ok().filter(|report| report["received"].as_u64() > Some(20))
    });
    drop(prober.stdin.take());
    let output = prober.wait_with_output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (summary, frames) = lines.split_last().unwrap();
    assert_eq!(frames.len() as u64, summary["summary"]["sent"].as_u64().unwrap());
    for (number, frame) in frames.iter().enumerate() {
        assert_eq!(frame["number"].as_u64(), Some(number as u64));
        // One kernel, one clock: sent before received before echoed.
        assert!(
            frame["sent_ns"].as_u64() <= frame["received_ns"].as_u64()
                && frame["received_ns"].as_u64() <= frame["echo_ns"].as_u64()
        );
    }
    assert_eq!(pair.ask(&["received", "--run", "6"])["ended"], true);
}

#[test]
#[ignore = "needs root"]
fn canaries_are_counted_by_tag() {
    let pair = Pair::new("canaries");
    let socket = pair.folder.path().join("a.sock");
    let mut other = inside(&pair.names[0]).args(["answer", "--tag", "7", "--socket"]).arg(&socket).spawn().unwrap();
    // Broadcast from both; unicast once a neighbour is known.
    let counts = wait_for("own canaries", || {
        let counts = pair.ask(&["counts"]);
        (counts["own"].as_u64() > Some(2) && counts["sent_unicast"].as_u64() > Some(0)).then_some(counts)
    });
    assert_eq!(counts["foreign"], 0, "{counts}");
    pair.json(0, &["plant-foreign", "--tag", "65000"]);
    let counts = wait_for("the planted canary", || Some(pair.ask(&["counts"])).filter(|counts| counts["foreign"] != 0));
    assert_eq!(counts["foreign_tags"], serde_json::json!({ "65000": 1 }));
    other.kill().unwrap();
    other.wait().unwrap();
}

#[test]
#[ignore = "needs root"]
fn the_service_outlives_its_interface() {
    let pair = Pair::new("rebind");
    pair.send(&["--run", "1", "--duration", "100ms"]);
    ip(&format!("-n {} link set eth0 down", pair.names[1]));
    ip(&format!("-n {} link set eth0 up", pair.names[1]));
    wait_for("frames after down and up", || {
        pair.send(&["--run", "2", "--duration", "50ms"])["echoed"].as_u64().filter(|echoed| *echoed > 0)
    });
    ip(&format!("-n {} link delete eth0", pair.names[1]));
    link(&pair.names);
    wait_for("frames over the new interface", || {
        pair.send(&["--run", "3", "--duration", "50ms"])["echoed"].as_u64().filter(|echoed| *echoed > 0)
    });
    let counts = wait_for("canaries over the new interface", || {
        let before = pair.ask(&["counts"])["sent"].as_u64();
        std::thread::sleep(Duration::from_millis(600));
        Some(pair.ask(&["counts"])).filter(|counts| counts["sent"].as_u64() > before)
    });
    assert!(counts["rebinds"].as_u64() > Some(0), "{counts}");
}

fn transfer(pair: &Pair, extra: &[&str]) -> (Value, Value) {
    let serve = inside(&pair.names[1]).args(["transfer-serve", "--port", "5001"]).stdout(Stdio::piped()).spawn().unwrap();
    let words = ["transfer-send", "--to", "10.9.0.2:5001", "--rate", "200000", "--duration", "1s"];
    let sent = pair.json(0, &[&words, extra].concat());
    let output = serve.wait_with_output().unwrap();
    assert!(output.status.success());
    (sent, serde_json::from_slice(&output.stdout).unwrap())
}

#[test]
#[ignore = "needs root"]
fn a_transfer_is_intact_and_keeps_its_rate() {
    let pair = Pair::new("transfer");
    let (sent, received) = transfer(&pair, &[]);
    assert_eq!((&received["intact"], &received["error"]), (&Value::Bool(true), &Value::Null), "{received}");
    assert_eq!(sent["bytes"], received["bytes"]);
    let bytes = received["bytes"].as_u64().unwrap();
    assert!((150_000..=210_000).contains(&bytes), "{received}");
}

#[test]
#[ignore = "needs root"]
fn a_corrupted_transfer_is_not_intact() {
    let pair = Pair::new("corrupt");
    let (sent, received) = transfer(&pair, &["--corrupt-at", "50000"]);
    assert_eq!(received["intact"], false, "{received}");
    assert!(received["error"].as_str().unwrap().contains("checksum"), "{received}");
    assert_eq!(sent["intact"], true, "the sender is not broken off: {sent}");
}

#[test]
#[ignore = "needs root"]
fn a_broken_connection_is_an_error_at_both_ends() {
    let pair = Pair::new("broken");
    let mut serve = inside(&pair.names[1]).args(["transfer-serve", "--port", "5001"]).stdout(Stdio::piped()).spawn().unwrap();
    let send = inside(&pair.names[0])
        .args(["transfer-send", "--to", "10.9.0.2:5001", "--rate", "200000", "--duration", "20s"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let established = || {
        let sockets = Command::new("ip").args(["netns", "exec", &pair.names[0], "ss", "-Htn"]).output().unwrap();
        String::from_utf8_lossy(&sockets.stdout).contains("ESTAB").then_some(())
    };
    wait_for("the connection", established);
    serve.kill().unwrap();
    serve.wait().unwrap();
    let output = send.wait_with_output().unwrap();
    assert!(!output.status.success());
    let sent: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(sent["intact"] == false && sent["error"].is_string(), "{sent}");
}
