//! A lab with real QEMU guests, driven by the operator's command.

use crate::program;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use violin_lab::{HostState, LabState};

/// A lab, taken down when dropped.
#[derive(Debug)]
pub struct Lab {
    name: String,
}

impl Lab {
    /// Builds it from a file of configs/lab, with the image of `VIOLIN_IMAGE` or target/image.
    ///
    /// The lab is called by the first letters of `name` and this process's id, so that two runs do not meet.
    pub fn up(name: &str, config: &str) -> Self {
        Self::up_from(name, &format!("{}/../configs/lab/{config}", env!("CARGO_MANIFEST_DIR")))
    }

    /// The same from any lab file.
    pub fn up_from(name: &str, config: &str) -> Self {
        Self::up_with(name, config, "qemu")
    }

    /// The same with guests of that kind.
    pub fn up_with(name: &str, config: &str, guests: &str) -> Self {
        sweep();
        let name = own_name(name, std::process::id());
        let image = std::env::var("VIOLIN_IMAGE").unwrap_or_else(|_| format!("{}/../target/image", env!("CARGO_MANIFEST_DIR")));
        let mut command = Command::new(program("violin"));
        command.args(["lab", "up", "--config", config, "--name", &name, "--guests", guests]);
        if guests == "qemu" {
            command.args(["--image", &image]);
        }
        // An `up` that fails leaves nothing, and one that is refused must not take down what it found: there is no `Lab` before.
        crate::netns::must(command.stdin(Stdio::null()));
        Self { name }
    }

    /// `violin --lab NAME WORDS…`, not yet started.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(program("violin"));
        command.arg("--lab").arg(&self.name).args(words).stdin(Stdio::null());
        command
    }

    /// Runs it; its output. Panics with its complaint if it fails.
    pub fn must(&self, words: &[&str]) -> String {
        let output = self.command(words).output().expect("violin runs");
        assert!(output.status.success(), "violin {}: {}", words.join(" "), String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The host a VM runs on, as the manager says.
    pub fn host_of(&self, vm: &str) -> String {
        let vms: serde_json::Value = serde_json::from_str(&self.must(&["--json", "vm", "list"])).expect("JSON");
        let seen = vms.as_array().expect("a list").iter().find(|seen| seen["vm"] == vm).expect("the VM is listed");
        seen["host"].as_str().expect("it runs somewhere").to_owned()
    }

    /// All moves on record, as JSON.
    pub fn migrations(&self) -> Vec<serde_json::Value> {
        let output = self.command(&["--json", "migrations"]).output().expect("violin runs");
        let list = serde_json::from_slice::<serde_json::Value>(&output.stdout).ok();
        list.and_then(|all| all.as_array().cloned()).unwrap_or_default()
    }

    /// Waits until the move numbered `number` has ended; its outcome in words.
    pub fn outcome(&self, number: usize) -> String {
        let mut words = String::new();
        crate::eventually(&format!("move {number} has ended"), crate::PATIENCE, || {
            let all = self.migrations();
            let ended = all.get(number - 1).filter(|migration| !migration["ended-at"].is_null());
            words = ended.map(|migration| migration["outcome"].to_string()).unwrap_or_default();
            ended.is_some()
        });
        words
    }

    /// Waits until the VM runs exactly once, by QEMU processes, and answers.
    pub fn runs_once(&self, environment: &str, node: &str) {
        let vm = format!("{environment}-{node}");
        crate::eventually(&format!("{vm} runs exactly once"), crate::PATIENCE, || self.qemus(&vm) == 1);
        crate::eventually(&format!("{vm} answers from its place"), crate::PATIENCE, || {
            self.command(&["ssh", environment, node, "--", "true"]).output().is_ok_and(|output| output.status.success())
        });
    }

    /// QEMU processes that run this VM on any host of the lab.
    pub fn qemus(&self, vm: &str) -> usize {
        self.state().hosts.iter().map(|host| qemus_on(host, vm).len()).sum()
    }

    /// What lies in the log of a host's daemon, its end only.
    pub fn log(&self, host: &HostState, daemon: &str) -> String {
        let text = std::fs::read_to_string(host.dir.join(format!("{daemon}.log"))).unwrap_or_default();
        let mut last: Vec<_> = text.lines().rev().take(15).collect();
        last.reverse();
        format!("--- {daemon} of {}\n{}", host.host, last.join("\n"))
    }

    /// What the lab wrote down of itself.
    pub fn state(&self) -> LabState {
        LabState::load(&self.name).expect("the lab has a state")
    }

    /// A file of configs/environments.
    pub fn environment(name: &str) -> String {
        format!("{}/../configs/environments/{name}", env!("CARGO_MANIFEST_DIR"))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = self.command(&["lab", "down", &self.name]).output();
    }
}

/// A lab's name: as much of `name` as the limit of 16 characters leaves beside the id of the process that owns it.
fn own_name(name: &str, pid: u32) -> String {
    let pid = format!("-{pid}");
    format!("{name:.0$}{pid}", 16 - pid.len())
}

/// The process that owns a lab with a name of [`own_name`].
fn owner(lab: &str) -> Option<u32> {
    lab.strip_prefix("test-")?.rsplit_once('-')?.1.parse().ok()
}

/// Takes down the labs of test processes that are gone.
fn sweep() {
    let labs = std::fs::read_dir(violin_lab::LABS).into_iter().flatten().flatten();
    for lab in labs.filter_map(|entry| entry.file_name().into_string().ok()) {
        if owner(&lab).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            let _ = Command::new(program("violin")).args(["lab", "down", &lab]).stdin(Stdio::null()).output();
        }
    }
}

/// The QEMU processes of a VM on one host, known by the host's control group.
fn qemus_on(host: &HostState, vm: &str) -> Vec<u32> {
    let (name, group) = (format!("guest={vm},"), format!("/{}.partition/", host.cpu_group));
    let pids = std::fs::read_dir("/proc").expect("/proc is there").flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        let read = |file: &str| std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        String::from_utf8_lossy(&read("cmdline")).contains(&name) && String::from_utf8_lossy(&read("cgroup")).contains(&group)
    })
    .collect()
}

/// The first of them.
pub fn qemu_on(host: &HostState, vm: &str) -> Option<u32> {
    qemus_on(host, vm).first().copied()
}

/// SIGKILL to a process of the lab; returns when it is dead.
pub fn kill(pid: u32) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), nix::sys::signal::Signal::SIGKILL)
        .expect("the lab's own process can be killed");
    crate::eventually("the process is gone, its other threads too", crate::PATIENCE, || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
        stat.is_empty() || (stat.contains(") Z ") && threads <= 1)
    });
}

/// Daemons that a test started again; they end with it.
#[derive(Debug, Default)]
pub struct Restarted(Vec<Child>);

impl Restarted {
    /// Starts a daemon again as the lab had started it: in that namespace, with the configuration in `dir`.
    pub fn start(&mut self, netns: &str, name: &str, dir: &Path) -> u32 {
        self.start_through(&[], netns, name, dir)
    }

    /// The same by a command that takes the daemon's.
    pub fn start_through(&mut self, through: &[&str], netns: &str, name: &str, dir: &Path) -> u32 {
        let log = std::fs::File::options().create(true).append(true).open(dir.join(format!("{name}.log"))).expect("a log");
        let child = Command::new("nsenter")
            .arg(format!("--net={netns}"))
            .arg("--")
            .args(through)
            .arg(program(name))
            .arg("--config")
            .arg(dir.join(format!("{name}.toml")))
            .env("RUST_LOG", "info")
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log"))
            .stderr(log)
            .spawn()
            .expect("nsenter runs");
        let pid = child.id();
        self.0.push(child);
        pid
    }
}

impl Drop for Restarted {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Closes a child's input and returns what it printed; panics if it failed.
pub fn finish(mut child: Child) -> String {
    drop(child.stdin.take());
    let output = child.wait_with_output().expect("a child ends");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_labs_name_fits_and_tells_its_owner() {
        for (name, pid, wanted) in [("test-manager", 7, "test-manager-7"), ("test-manager", 4_194_303, "test-man-4194303")] {
            assert_eq!(own_name(name, pid), wanted);
            assert!(own_name(name, pid).len() <= 16);
            assert_eq!(owner(wanted), Some(pid));
        }
        assert_eq!(owner("demo-7"), None);
    }
}
