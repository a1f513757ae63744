//! docs/quickstart.md, word for word, on two machines that are namespaces.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use violin_tests::netns::{Netns, ip};
use violin_tests::{eventually, program};

/// The shell blocks of the document, in order.
fn blocks() -> Vec<String> {
    let text = include_str!("../docs/quickstart.md");
    text.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next()).map(str::to_owned).collect()
}

struct Machine {
    netns: Netns,
    etc: PathBuf,
    run: PathBuf,
    tools: PathBuf,
    left: Vec<Child>,
}

impl Machine {
    fn new(name: &str, dir: &Path) -> Self {
        let (etc, run) = (dir.join(format!("{name}-etc")), dir.join(format!("{name}-run")));
        let tools = dir.join(format!("{name}-tools"));
        for folder in [&etc, &run, &tools] {
            std::fs::create_dir_all(folder).expect("a folder is made");
        }
        std::os::unix::fs::symlink("/bin/busybox", tools.join("ping")).expect("a link is made");
        Self { netns: Netns::new(name), etc, run, tools, left: Vec::new() }
    }

    /// A shell on this machine, for so many seconds, 0: without end. It has /etc/violin and /run/violin of its own, of which the
    /// real machine sees nothing, the programs in its path, the checkout as its folder.
    fn shell(&self, script: &str, limit_s: u32) -> Command {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        // A machine without a ping of its own has busybox's: it comes last.
        let path = format!(
            "{}:{}:{}",
            program("violin").parent().unwrap().display(),
            std::env::var("PATH").unwrap_or_default(),
            self.tools.display()
        );
        let (etc, run, root) = (self.etc.display(), self.run.display(), root.display());
        let private = format!(
            "set -e; mount -t tmpfs tmpfs /run; mkdir -p /run/violin /run/etc/new /run/etc/work
             mount -t overlay overlay -o lowerdir=/etc,upperdir=/run/etc/new,workdir=/run/etc/work /etc; mkdir -p /etc/violin
             mount --bind {etc} /etc/violin; mount --bind {run} /run/violin; cd {root}\n{script}"
        );
        let mut command = self.netns.command("timeout");
        command.args([&limit_s.to_string(), "unshare", "--mount", "--", "sh", "-c", &private]).env("PATH", path);
        command
    }

    fn must(&self, script: &str) {
        let output = self.shell(script, 60).output().expect("a shell runs");
        assert!(
            output.status.success(),
            "{script}\n{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// Runs a block that leaves a daemon behind, and waits until that is ready.
    fn start(&mut self, script: &str) {
        self.left.push(self.shell(&format!("{script}\nwait"), 0).spawn().expect("a shell runs"));
        let socket = self.run.join("switchd.sock");
        eventually("switchd is ready", violin_tests::PATIENCE, || std::os::unix::net::UnixStream::connect(&socket).is_ok());
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // The daemon is the shell's child: ending everything in the namespace ends it and nothing else.
        let pids = Command::new("ip")
            .args(["netns", "pids", self.netns.name()])
            .output()
            .map(|output| output.stdout)
            .unwrap_or_default();
        for pid in String::from_utf8_lossy(&pids).split_whitespace().filter_map(|pid| pid.parse().ok()) {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
        for child in &mut self.left {
            let _ = child.wait();
        }
    }
}

#[test]
#[ignore = "needs root"]
fn the_quick_start_works_word_for_word() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (mut a, mut b) = (Machine::new("a", dir.path()), Machine::new("b", dir.path()));
    ip(&format!("link add wire netns {} type veth peer name wire netns {}", a.netns.name(), b.netns.name()));
    for (machine, address) in [(&a, "192.0.2.1/24"), (&b, "192.0.2.2/24")] {
        machine.netns.ip(&format!("addr add {address} dev wire"));
        machine.netns.ip("link set wire up");
    }
    let blocks = blocks();
    let [certificates, start_a, address_a, start_b, ping_b] = blocks.as_slice() else {
        panic!("got {} blocks, want 5", blocks.len())
    };

    a.must(certificates);
    for file in ["ca.pem", "b.pem", "b.key"] {
        std::fs::copy(a.etc.join(file), b.etc.join(file)).expect("a file is copied");
    }
    a.start(start_a);
    a.must(address_a);
    b.start(start_b);
    b.must(ping_b);
}
