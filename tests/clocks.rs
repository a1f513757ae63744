//! No clock of one host is compared with another's, and what was is told as UTC, over restarts too.

use serde_json::Value;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};
use violin_common::Utc;
use violin_lab::{HostState, ProcessId};
use violin_tests::eventually;
use violin_tests::guests::{Lab, Restarted, kill};

const VM: &str = "three-c1";
/// Longer than anything else in a move of a sandbox guest.
const PAUSE_MS: f64 = 1500.0;

const LAB: &str = "
name = \"clocks\"
guests = \"sandbox\"
[[domain]]
name = \"d1\"
[[host]]
name = \"h1\"
domain = \"d1\"
cores = 2
memory-mib = 2048
[[host]]
name = \"h2\"
domain = \"d1\"
cores = 2
memory-mib = 2048
[manager]
mode = \"observe\"
";

fn utc(value: &Value) -> Utc {
    value.as_str().unwrap_or_else(|| panic!("got {value}, want a time")).parse().unwrap()
}

fn now() -> Utc {
    Utc(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos().try_into().unwrap())
}

/// Starts a host's monitor anew, as on a machine that was booted so many seconds earlier, with a pause in each move from there.
fn restart(lab: &Lab, restarted: &mut Restarted, host: &HostState, earlier_s: &str) {
    let file = host.dir.join("monitord.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    let slow = text.replace("pause = \"0s\"", &format!("pause = \"{PAUSE_MS:.0}ms\""));
    assert_ne!(slow, text, "the lab's file has another form: {text}");
    std::fs::write(&file, slow).unwrap();
    kill(pid(host.monitord.as_ref()));
    eventually("its manager misses it", violin_tests::PATIENCE, || !connected(lab, host));
    let through = ["unshare", "--time", "--monotonic", earlier_s, "--fork", "--kill-child", "--"];
    restarted.start_through(&through, &host.netns_path(), "monitord", &host.dir);
    eventually("it is back", violin_tests::PATIENCE, || connected(lab, host));
}

fn pid(process: Option<&ProcessId>) -> u32 {
    process.expect("the lab runs it").pid
}

fn connected(lab: &Lab, host: &HostState) -> bool {
    let hosts: Value = serde_json::from_str(&lab.must(&["--json", "host"])).expect("JSON");
    let hosts = hosts.as_array().expect("a list").clone();
    hosts.iter().any(|seen| seen["host"] == host.host.as_str() && seen["connected"] == true)
}

/// Numbers that only a clock's raw nanoseconds are as large as.
fn raw(value: &Value) -> Vec<u64> {
    match value {
        Value::Array(all) => all.iter().flat_map(raw).collect(),
        Value::Object(fields) => fields.values().flat_map(raw).collect(),
        Value::Number(number) => number.as_u64().filter(|number| *number > 1_000_000_000).into_iter().collect(),
        _ => Vec::new(),
    }
}

#[test]
#[ignore = "needs root"]
fn a_move_between_hosts_booted_at_different_times_has_a_true_pause_and_utc_over_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("lab.toml");
    std::fs::write(&config, LAB).unwrap();
    let lab = Lab::up_with("test-clocks", config.to_str().unwrap(), "sandbox");
    let state = lab.state();
    let (h1, h2) = (state.host("h1").unwrap(), state.host("h2").unwrap());
    let mut restarted = Restarted::default();
    lab.must(&["env", "up", &Lab::environment("three.toml"), "--place", "head=h1", "--place", "c1=h1", "--place", "c2=h1"]);
    // Both clocks differ from the manager's and from each other.
    restart(&lab, &mut restarted, h1, "100000");
    restart(&lab, &mut restarted, h2, "5000");

    let mut spans = Vec::new();
    for to in ["h2", "h1"] {
        let began = now();
        let moved: Value = serde_json::from_str(&lab.must(&["--json", "vm", "migrate", VM, "--to", to])).unwrap();
        let ended = now();
        let moved = &moved[0];
        println!("{moved:#}");
        let (pause, error) = (moved["pause"]["ms"].as_f64().unwrap(), moved["pause"]["error-ms"].as_f64().unwrap());
        let total = moved["total-ms"].as_f64().unwrap();
        assert!(pause + error >= PAUSE_MS && pause - error <= total, "a pause of {pause} ms +-{error}, the move took {total}");
        assert!(error > 0.0 && error < PAUSE_MS / 3.0, "{error}: nothing is known of it");
        let times = ["announced-at", "began-at", "ended-at"].map(|key| utc(&moved[key]));
        assert!(Utc(began.0 / 1_000_000 * 1_000_000) <= times[0] && times[0] <= times[1] && times[1] < times[2], "{times:?}");
        assert!(times[2] <= ended, "{times:?} {ended}");
        assert!(raw(moved).is_empty(), "{moved:#}");
        spans.push((moved["pause"].clone(), moved["ended-at"].clone()));
    }
    let decided = |lab: &Lab| lab.must(&["--json", "migrations"]);
    let before = decided(&lab);
    let table = lab.must(&["migrations"]);
    assert!(table.contains(before.split("\"began-at\": \"").nth(1).unwrap().split('"').next().unwrap()), "{table}");
    assert!(table.contains(" ms ±"), "{table}");

    kill(pid(state.adaptd.process.as_ref()));
    restarted.start(&state.adaptd.netns_path(), "adaptd", Path::new(&state.adaptd.dir));
    eventually("the manager answers", violin_tests::PATIENCE, || {
        lab.command(&["--json", "migrations"]).output().is_ok_and(|output| output.status.success())
    });

    assert_eq!(decided(&lab), before);
    let why = lab.must(&["why", VM]);
    assert!(why.contains(spans[1].1.as_str().unwrap()), "{why}");
}
