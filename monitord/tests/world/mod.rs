//! Two hosts and a peer as network namespaces, joined by a hub; all of it goes when the value goes.
#![allow(dead_code)] // Each test program uses its part.
#![allow(unreachable_pub)] // A test program has no outside.

pub mod manager;

use monitord::hypervisor::Hypervisor;
use monitord::io::cgroup::{Hierarchies, HostGroup};
use monitord::io::netlink::inside;
use monitord::io::sandbox::{Sandbox, SandboxConfig};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use violin_common::api::switch::NetworkSpec;
use violin_common::control::monitor::{Role, VmSpec};

/// Runs `ip` and wants it to succeed.
pub fn ip(words: &str) {
    let output = Command::new("ip").args(words.split_ascii_whitespace()).output().expect("ip runs");
    assert!(output.status.success(), "ip {words}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Waits until `fact` holds.
pub fn until(what: &str, limit: Duration, mut fact: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !fact() {
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[derive(Debug)]
pub struct World {
    pub tag: String,
    pub dir: tempfile::TempDir,
    pub trees: Hierarchies,
    groups: Vec<HostGroup>,
}

/// A guest that configures its interface, says that it is ready, and echoes what the peer sends over one connection.
///
/// It connects without a limit of its own: the first ARP request is lost while the bridge has not seen the carrier yet,
/// the second follows after one second, and a guest that gave up just then would have its accepted connection reset.
const GUEST: &str = r#"#!/bin/sh
. "$3"
ip link set lo up
ip address add $ADDRESS dev eth0
ip link set eth0 up
echo "violin-guest: ready"
exec perl -e '
use IO::Socket::INET;
my $s;
until ($s = IO::Socket::INET->new(PeerAddr => $ARGV[0])) { select(undef, undef, undef, 0.05) }
$s->autoflush(1);
while (<$s>) { print $s $_ }
sleep 1000;
' "$PEER"
"#;

impl World {
    /// `tag`: at most three characters, for one test only. What a killed run left is another process's, by its names.
    pub fn new(tag: &str) -> Self {
        assert!(tag.len() <= 3, "interface names have 15 bytes");
        let trees = Hierarchies::detect().unwrap();
        sweep(&trees);
        let tag = format!("{}{tag}", prefix(std::process::id()));
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("guest.sh");
        std::fs::write(&program, GUEST).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let groups = ["h1", "h2"].map(|host| HostGroup::create(&trees, &format!("{tag}{host}")).unwrap()).to_vec();
        let world = Self { tag, dir, trees, groups };
        let hub = world.netns("hub");
        ip(&format!("netns add {hub}"));
        ip(&format!("-n {hub} link add name hub type bridge ageing_time 0"));
        ip(&format!("-n {hub} link set hub up"));
        ip(&format!("-n {hub} address add 10.91.0.254/24 dev hub"));
        for host in ["h1", "h2"] {
            let name = world.netns(host);
            ip(&format!("netns add {name}"));
            ip(&format!("-n {name} link add name br0 type bridge ageing_time 0"));
            ip(&format!("-n {name} link add name wire type veth peer name to{host} netns {hub}"));
            ip(&format!("-n {name} link set wire master br0"));
            ip(&format!("-n {hub} link set to{host} master hub"));
            for (netns, link) in [(&name, "br0"), (&name, "wire"), (&hub, &*format!("to{host}"))] {
                ip(&format!("-n {netns} link set {link} up"));
            }
        }
        world
    }

    pub fn netns(&self, host: &str) -> String {
        format!("{}-{host}", self.tag)
    }

    pub fn netns_path(&self, host: &str) -> PathBuf {
        PathBuf::from(format!("/run/netns/{}", self.netns(host)))
    }

    pub fn group(&self, host: &str) -> &HostGroup {
        &self.groups[usize::from(host == "h2")]
    }

    pub fn config(&self, host: &str) -> SandboxConfig {
        config(&self.tag, self.dir.path(), host)
    }

    pub fn driver(&self, host: &str) -> Sandbox {
        Sandbox::open(self.config(host)).unwrap()
    }

    /// What the switch would do with the guest's interface.
    pub fn attach(&self, host: &str, interface: &str) {
        ip(&format!("-n {} link set {interface} master br0", self.netns(host)));
    }

    pub fn interfaces(&self, host: &str) -> String {
        let output = Command::new("ip").args(["-n", &self.netns(host), "-o", "link"]).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// A listening socket of the peer.
    pub fn listen(&self) -> TcpListener {
        let netns = File::open(self.netns_path("hub")).unwrap();
        inside(netns, || TcpListener::bind("10.91.0.254:5000")).unwrap()
    }

    /// What a guest was told is on disk, and in no file that another user could read.
    pub fn keeps_to_itself(&self, spec: &VmSpec) {
        let holding = self.holding(spec);
        assert!(!holding.is_empty(), "nothing holds the guest's configuration: this proves nothing");
        for path in holding {
            for (path, want) in [(path.as_path(), 0o600), (path.parent().unwrap(), 0o700)] {
                let mode = path.metadata().unwrap().permissions().mode() & 0o777;
                assert_eq!(mode, want, "{} is {mode:o}, want {want:o}", path.display());
            }
        }
    }

    /// Files of all hosts that hold what a guest was told.
    pub fn holding(&self, spec: &VmSpec) -> Vec<PathBuf> {
        // A line without characters that JSON writes otherwise.
        let told = spec.guest_config.lines().next().unwrap();
        let (mut folders, mut holding) = (vec![self.dir.path().to_owned()], Vec::new());
        while let Some(folder) = folders.pop() {
            for path in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
                if path.is_dir() {
                    folders.push(path);
                } else if path.is_file() && String::from_utf8_lossy(&std::fs::read(&path).unwrap()).contains(told) {
                    holding.push(path);
                }
            }
        }
        holding
    }

    pub fn spec(&self) -> VmSpec {
        VmSpec {
            vm: format!("{}-c1", self.tag).parse().unwrap(),
            environment: self.tag.parse().unwrap(),
            role: Role::Compute,
            network: NetworkSpec { vni: 7.try_into().unwrap(), mtu: 1400, ageing_s: 300 },
            mac: "52:54:00:91:00:01".parse().unwrap(),
            address: "10.91.0.1".parse().unwrap(),
            prefix_len: 24,
            vcpus: 1,
            memory_mib: 64,
            image: None,
            guest_config: "ADDRESS=10.91.0.1/24\nPEER=10.91.0.254:5000\n".into(),
        }
    }
}

/// How names of this process's worlds begin: its number in five digits of base 36, enough for the kernel's largest.
fn prefix(pid: u32) -> String {
    let digits = [36u32.pow(4), 36u32.pow(3), 36 * 36, 36, 1].map(|place| char::from_digit(pid / place % 36, 36).unwrap());
    format!("t{}", String::from_iter(digits))
}

/// Whether a world of this tag was a process's that is gone.
fn is_dead(tag: &str) -> bool {
    let pid = tag.get(1..6).and_then(|digits| u32::from_str_radix(digits, 36).ok());
    pid.is_some_and(|pid| tag.starts_with(&prefix(pid)) && !Path::new(&format!("/proc/{pid}")).exists())
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Removes what a killed run left: namespaces, groups, and the guests, which outlive everything by design.
fn sweep(trees: &Hierarchies) {
    for name in names(Path::new("/run/netns")) {
        if name.split_once('-').is_some_and(|(tag, host)| ["h1", "h2", "hub"].contains(&host) && is_dead(tag)) {
            let _ = Command::new("ip").args(["netns", "delete", &name]).status();
        }
    }
    for root in trees.v1.values().chain(&trees.unified) {
        for name in names(root) {
            let Some(world) = name.strip_suffix("h1.partition").or_else(|| name.strip_suffix("h2.partition")) else { continue };
            if !(6..10).contains(&world.len()) || !is_dead(world) {
                continue;
            }
            let group = root.join(&name);
            for guest in names(&group).into_iter().map(|guest| group.join(guest)).filter(|guest| guest.is_dir()) {
                // The kernel makes even frozen processes of the unified tree end; version 1's wait for their driver.
                let pids = std::fs::read_to_string(guest.join("cgroup.procs")).unwrap_or_default();
                for pid in pids.lines().filter_map(|pid| pid.parse().ok()) {
                    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
                }
                // Refused until they have ended: the next run's.
                let _ = std::fs::remove_dir(guest);
            }
            let _ = std::fs::remove_dir(group);
        }
    }
}

/// What the driver of one host of a world is told.
pub fn config(tag: &str, dir: &Path, host: &str) -> SandboxConfig {
    SandboxConfig {
        host: host.parse().unwrap(),
        netns: PathBuf::from(format!("/run/netns/{tag}-{host}")),
        shared: dir.join("shared"),
        mark: None,
        pause: Duration::ZERO,
        guest_program: dir.join("guest.sh"),
        partition: Some(PathBuf::from(format!("{tag}{host}.partition"))),
        scale: 1.0,
        trees: Hierarchies::detect().unwrap(),
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // Guests that a failed test did not end: they outlive their monitors by design.
        for host in ["h1", "h2"] {
            let Ok(driver) = Sandbox::open(self.config(host)) else { continue };
            for seen in driver.list().unwrap_or_default() {
                let _ = driver.stop(&seen.vm);
            }
        }
        for host in ["h1", "h2", "hub"] {
            let _ = Command::new("ip").args(["netns", "delete", &self.netns(host)]).status();
        }
        // Access namespaces that a failed test did not close.
        for entry in std::fs::read_dir("/run/netns").into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("va-") && name.contains(&format!(".{}-", self.tag)) {
                let _ = Command::new("ip").args(["netns", "delete", &name]).status();
            }
        }
        for group in &self.groups {
            let _ = group.remove();
        }
    }
}

/// A connection whose other end echoes.
#[derive(Debug)]
pub struct Echo {
    stream: TcpStream,
    lines: BufReader<TcpStream>,
    count: u64,
}

impl Echo {
    pub fn accept(listener: &TcpListener) -> Self {
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(180))).unwrap();
        let lines = BufReader::new(stream.try_clone().unwrap());
        Self { stream, lines, count: 0 }
    }

    /// Sends a numbered line and wants it back.
    pub fn once(&mut self) {
        self.count += 1;
        writeln!(self.stream, "{}", self.count).unwrap();
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("the connection stands");
        assert_eq!(line.trim(), self.count.to_string());
    }
}
