//! What dies around a move of a real VM: the manager in the middle of it, the destination's libvirtd before it.
//! VMs are counted by QEMU processes, not by our own journal.

use std::process::{Command, Stdio};
use std::time::Duration;
use violin_lab::LabState;
use violin_tests::guests::{Lab, qemus};
use violin_tests::{eventually, program};

const VM: &str = "three-c1";

fn kill(pid: u32) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), nix::sys::signal::Signal::SIGKILL)
        .expect("the lab's own process can be killed");
    eventually("the process is gone", Duration::from_secs(5), || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.is_empty() || stat.contains(") Z ")
    });
}

/// Starts a daemon again as the lab had started it.
fn restart(netns: &str, name: &str, dir: &std::path::Path) -> std::process::Child {
    let log = std::fs::File::options().create(true).append(true).open(dir.join(format!("{name}.log"))).expect("a log");
    Command::new("nsenter")
        .arg(format!("--net={netns}"))
        .arg("--")
        .arg(program(name))
        .arg("--config")
        .arg(dir.join(format!("{name}.toml")))
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("a log"))
        .stderr(log)
        .spawn()
        .expect("nsenter runs")
}

fn migrations(lab: &Lab) -> Vec<serde_json::Value> {
    let output = lab.command(&["--json", "migrations"]).output().expect("violin runs");
    serde_json::from_slice::<serde_json::Value>(&output.stdout).ok().and_then(|all| all.as_array().cloned()).unwrap_or_default()
}

fn pid(state: &LabState, what: fn(&LabState) -> Option<&violin_lab::ProcessId>) -> u32 {
    what(state).expect("the lab runs it").pid
}

/// Waits until a move numbered `number` has ended; its outcome in words.
fn outcome(lab: &Lab, number: usize) -> String {
    let mut words = String::new();
    eventually(&format!("move {number} has ended"), Duration::from_secs(90), || {
        let all = migrations(lab);
        let ended = all.get(number - 1).filter(|migration| !migration["ended"].is_null());
        words = ended.map(|migration| migration["outcome"].to_string()).unwrap_or_default();
        ended.is_some()
    });
    words
}

/// The VM runs exactly once, where the manager says, and answers.
fn runs_once(lab: &Lab) {
    eventually("the VM runs exactly once", Duration::from_secs(30), || qemus(VM) == 1);
    eventually("it answers from its place", Duration::from_secs(30), || {
        lab.command(&["ssh", "three", "c1", "--", "true"]).status().is_ok_and(|status| status.success())
    });
}

#[test]
#[ignore = "needs root"]
fn whatever_dies_in_a_move_the_vm_runs_exactly_once() {
    let lab = Lab::up("test-recover", "two-hosts.toml");
    let state = lab.state();
    let (h1, h2) = (&state.hosts[0], &state.hosts[1]);
    lab.must(&["env", "up", &Lab::environment("three.toml"), "--place", "head=h1", "--place", "c1=h1", "--place", "c2=h1"]);
    let mut restarted = Vec::new();

    // The manager dies while the VM is on its way.
    let mut moving = lab
        .command(&["vm", "migrate", VM, "--to", "h2"])
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .expect("violin runs");
    eventually("the move has begun", Duration::from_secs(20), || {
        migrations(&lab).first().is_some_and(|first| !first["began"].is_null())
    });
    kill(pid(&state, |state| state.adaptd.process.as_ref()));
    let _ = moving.wait();
    restarted.push(restart(&state.adaptd.netns_path(), "adaptd", &state.adaptd.dir));
    eventually("the manager answers again", Duration::from_secs(20), || !migrations(&lab).is_empty());
    println!("adaptd killed in a move: {}", outcome(&lab, 1));
    runs_once(&lab);
    let here = lab.host_of(VM);
    let (there, other) = if here == "h1" { ("h2", h2) } else { ("h1", h1) };

    eventually("the restarted manager has heard of all hosts", Duration::from_secs(30), || {
        let hosts: serde_json::Value = serde_json::from_str(&lab.must(&["--json", "host"])).expect("JSON");
        hosts.as_array().is_some_and(|hosts| hosts.iter().all(|host| host["connected"] == true && !host["age-s"].is_null()))
    });

    // The destination's libvirtd is dead: nothing moves, and the decision says why.
    kill(other.libvirtd.as_ref().expect("the lab runs it").pid);
    let output = lab.command(&["vm", "migrate", VM, "--to", there]).output().expect("violin runs");
    assert!(!output.status.success(), "a move to a host without hypervisor was called done");
    assert!(migrations(&lab).len() > 1, "the move was refused: {}", String::from_utf8_lossy(&output.stderr));
    let said = outcome(&lab, 2);
    println!("destination's libvirtd dead: {said}");
    assert!(said.contains("undone") && (said.contains("hypervisor") || said.contains("libvirt")), "{said}");
    assert_eq!(lab.host_of(VM), here);
    runs_once(&lab);
    let tail = |path: std::path::PathBuf| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines().rev().take(15).collect::<Vec<_>>().join("\n")
    };
    let ports = lab.must(&["--json", "port", "--host", there]);
    let log = tail(other.dir.join("monitord.log")) + "\n--- adaptd\n" + &tail(state.adaptd.dir.join("adaptd.log"));
    assert!(!ports.contains(VM), "a port of the VM is left at the destination: {ports}\n{log}");

    drop(lab);
    for mut child in restarted {
        let _ = child.kill();
        let _ = child.wait();
    }
}
