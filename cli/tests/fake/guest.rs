//! A real guest behind a real ssh server, in namespaces of its own; the manager is still a fake. Needs root.

use super::{ALPHA, Manager};
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

static GUESTS: AtomicU32 = AtomicU32::new(0);

#[derive(Debug)]
pub struct Guest {
    pub manager: Manager,
    names: [String; 2],
    process: Option<Child>,
}

/// Waits for a fact, at most a minute.
pub fn until(what: &str, mut fact: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !fact() {
        assert!(Instant::now() < deadline, "not within a minute: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn run(command: &str) {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    assert!(output.status.success(), "`{command}`: {}", super::said(&output));
}

/// The probe: beside the command, or where VIOLIN_BIN says.
fn probe() -> PathBuf {
    let beside = || PathBuf::from(env!("CARGO_BIN_EXE_violin")).with_file_name("violin-probe");
    let program = std::env::var_os("VIOLIN_BIN").map_or_else(beside, |folder| PathBuf::from(folder).join("violin-probe"));
    assert!(program.exists(), "{} is not there: cargo build -p violin-probe", program.display());
    program
}

impl Guest {
    /// The head node of an alpha whose one compute node, of two vCPUs, is this guest, too.
    pub fn head() -> Self {
        let number = GUESTS.fetch_add(1, Ordering::Relaxed);
        let names = ["out", "in"].map(|end| format!("vcli-{}-{number}-{end}", std::process::id()));
        let alpha = ALPHA.replace("count = 4\nvcpus = 1", "count = 1\nvcpus = 2");
        let manager = Manager::of(&alpha, &format!("/run/netns/{}", names[0]));
        fs::remove_file(manager.path("nsenter")).unwrap();
        let mut guest = Self { manager, names, process: None };
        let [outside, inside] = &guest.names;
        run(&format!(
            "ip netns add {outside} && ip netns add {inside} && \
             ip -n {inside} link add eth0 type veth peer name eth0 netns {outside} && ip -n {inside} link set lo up && \
             ip -n {outside} address add 10.77.0.254/24 dev eth0 && ip -n {outside} link set eth0 up"
        ));
        let key = guest.manager.path("keys/alpha");
        let conf = guest.manager.path("guest.conf");
        fs::create_dir(guest.manager.path("keys")).unwrap();
        run(&format!("ssh-keygen -q -t ed25519 -N '' -f {}", key.display()));
        let coded = Command::new("base64").arg("-w0").arg(&key).output().unwrap().stdout;
        let config = format!(
            "VIOLIN_NAME=head\nVIOLIN_VM=alpha-head\nVIOLIN_ENVIRONMENT=alpha\nVIOLIN_ADDRESS=10.77.0.1/24\n\
             VIOLIN_MAC=52:54:00:77:00:01\nVIOLIN_MTU=1400\nVIOLIN_CANARY=7\n\
             VIOLIN_HOSTS=10.77.0.1 head;10.77.0.1 c\n\
             VIOLIN_SSH_PUBLIC={}\nVIOLIN_SSH_PRIVATE={}\n",
            fs::read_to_string(key.with_extension("pub")).unwrap().trim(),
            String::from_utf8(coded).unwrap(),
        );
        fs::write(&conf, config).unwrap();
        let console = fs::File::create(guest.manager.path("console")).unwrap();
        let mut process = Command::new("nsenter");
        process.arg(format!("--net=/run/netns/{inside}")).args(["unshare", "-muipf", "--kill-child", "--mount-proc"]);
        process.arg(probe()).args(["guest", "--config"]).arg(&conf).env("VIOLIN_SANDBOX", "1");
        process.stdin(std::process::Stdio::null()).stdout(console.try_clone().unwrap()).stderr(console);
        guest.process = Some(process.spawn().unwrap());
        let console = guest.manager.path("console");
        until("the guest is ready", || fs::read_to_string(&console).unwrap().lines().any(|line| line == "violin-guest: ready"));
        guest
    }

    /// Processes on this machine, guests' included, that are a `sleep` of so many seconds.
    pub fn running(mark: &str) -> Vec<i32> {
        let mut pids = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            if words == format!("sleep\0{mark}\0").as_bytes() {
                pids.push(pid);
            }
        }
        pids
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            let _ = process.kill();
            let _ = process.wait();
        }
        for name in &self.names {
            let _ = Command::new("ip").args(["netns", "delete", name]).status();
        }
    }
}
