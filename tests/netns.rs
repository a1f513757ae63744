//! Network namespaces, made and removed.

use nix::sched::{CloneFlags, setns};
use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

const PREFIX: &str = "vt-";
/// Beginnings of the names that tests give namespaces, here, in switchd/tests and in probe/tests.
const SWEPT: [&str; 3] = [PREFIX, "vsw-", "vprobe-"];

/// A named network namespace, removed when dropped.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

/// Runs a command and panics with its complaint if it fails.
pub fn must(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    assert!(output.status.success(), "{command:?} failed: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// `ip WORDS…`, words separated by blanks.
pub fn ip(words: &str) {
    must(Command::new("ip").args(words.split_whitespace()));
}

impl Netns {
    /// Makes a namespace whose name begins with this process's id and ends with `what`; its loopback is up.
    pub fn new(what: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        sweep();
        let name = format!("{PREFIX}{}-{}-{what}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        ip(&format!("netns add {name}"));
        let netns = Self { name };
        netns.ip("link set lo up");
        netns
    }

    /// Its name under /run/netns.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its path.
    pub fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }

    /// `ip WORDS…` inside.
    pub fn ip(&self, words: &str) {
        ip(&format!("-n {} {words}", self.name));
    }

    /// A command that will run inside. /sys stays the host's (`ip netns exec` would hide cgroups).
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let file = File::open(self.path()).expect("the namespace exists as long as self");
        let mut command = Command::new(program);
        // SAFETY: between fork and exec only setns is called, which is async-signal-safe.
        unsafe {
            command.pre_exec(move || setns(&file, CloneFlags::CLONE_NEWNET).map_err(Into::into));
        }
        command
    }

    /// Runs `program WORDS…` inside and returns its output, whatever its status.
    pub fn run(&self, program: &str, words: &str) -> Output {
        self.command(program)
            .args(words.split_whitespace())
            .output()
            .unwrap_or_else(|error| panic!("cannot run {program}: {error}"))
    }

    /// Whether an interface is there, up, and has its carrier.
    pub fn is_up(&self, interface: &str) -> bool {
        let output = self.run("ip", &format!("-o link show {interface}"));
        String::from_utf8_lossy(&output.stdout).contains("state UP")
    }

    /// Bulk TCP to `address` inside `to` by iperf3, in bits per second; panics with its complaint if there is no figure.
    pub fn bulk(&self, to: &Self, address: &str, seconds: u32) -> f64 {
        let mut server = to.command("iperf3");
        server.args(["-s", "-1", "-B", address]).stdout(Stdio::null()).stderr(Stdio::null());
        let mut server = server.spawn().expect("iperf3 starts");
        // Only looked at: a bind to see whether the port is taken may take it from iperf3.
        let listens = || String::from_utf8_lossy(&to.run("ss", "-ltn").stdout).contains(&format!("{address}:5201"));
        crate::eventually("iperf3 listens", crate::PATIENCE, listens);
        let output = self.run("iperf3", &format!("-c {address} -t {seconds} -J"));
        // It ends by itself only after a client that came through.
        let _ = server.kill();
        let _ = server.wait();
        let result: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let rate = result["end"]["sum_received"]["bits_per_second"].as_f64().filter(|&rate| rate > 0.0);
        rate.unwrap_or_else(|| panic!("iperf3 to {address} measured nothing: {}", String::from_utf8_lossy(&output.stdout)))
    }

    /// Calls `inside` in a thread that is in this namespace.
    pub fn enter<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> T {
        let file = File::open(self.path()).expect("the namespace exists as long as self");
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(&file, CloneFlags::CLONE_NEWNET).expect("root may enter namespaces");
                    inside()
                })
                .join()
                .expect("the closure does not panic")
        })
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).output();
    }
}

/// Removes namespaces of test processes that are gone, with what still runs inside.
fn sweep() {
    let Ok(entries) = std::fs::read_dir("/run/netns") else { return };
    for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        if owner(&name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            let pids = Command::new("ip").args(["netns", "pids", &name]).output().map(|output| output.stdout);
            for pid in String::from_utf8_lossy(&pids.unwrap_or_default()).split_whitespace().filter_map(|pid| pid.parse().ok()) {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
            }
            let _ = Command::new("ip").args(["netns", "del", &name]).output();
        }
    }
}

/// The process that made a namespace: the first number among the words of its name, after the prefix.
fn owner(name: &str) -> Option<u32> {
    let rest = SWEPT.iter().find_map(|prefix| name.strip_prefix(prefix))?;
    rest.split('-').find_map(|word| word.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_namespaces_tell_their_process() {
        let owners = ["vt-77-0-h1", "vsw-77-3-left", "vprobe-echo-77-a", "vl-demo-h1", "vt-alpha"].map(owner);
        assert_eq!(owners, [Some(77), Some(77), Some(77), None, None]);
    }

    #[test]
    #[ignore = "needs root"]
    fn what_a_dead_test_left_is_swept() {
        let mut dead = Command::new("true").spawn().unwrap();
        dead.wait().unwrap();
        let name = format!("vsw-{}-0-left", dead.id());
        ip(&format!("netns add {name}"));
        let left = Netns { name };
        let mut inside = left.command("sleep").arg("1000").spawn().unwrap();

        sweep();

        assert!(!Path::new(&left.path()).exists());
        assert!(inside.wait().unwrap().code().is_none(), "it was not killed");
    }
}
