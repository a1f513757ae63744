//! A lab with real QEMU guests, driven by the operator's command.

use crate::program;
use std::process::{Child, Command, Stdio};
use violin_lab::LabState;

/// A lab, taken down when dropped.
#[derive(Debug)]
pub struct Lab {
    name: String,
}

impl Lab {
    /// Builds it from a file of configs/lab, with the image of `VIOLIN_IMAGE` or target/image.
    pub fn up(name: &str, config: &str) -> Self {
        let lab = Self { name: name.to_owned() };
        let image = std::env::var("VIOLIN_IMAGE").unwrap_or_else(|_| format!("{}/../target/image", env!("CARGO_MANIFEST_DIR")));
        let config = format!("{}/../configs/lab/{config}", env!("CARGO_MANIFEST_DIR"));
        lab.must(&["lab", "up", "--config", &config, "--name", name, "--guests", "qemu", "--image", &image]);
        lab
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

/// QEMU processes that run this VM, counted in /proc.
pub fn qemus(vm: &str) -> usize {
    let name = format!("guest={vm},");
    std::fs::read_dir("/proc")
        .expect("/proc is there")
        .flatten()
        .filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok())
        .filter(|line| String::from_utf8_lossy(line).contains(&name))
        .count()
}

/// Closes a child's input and returns what it printed; panics if it failed.
pub fn finish(mut child: Child) -> String {
    drop(child.stdin.take());
    let output = child.wait_with_output().expect("a child ends");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
