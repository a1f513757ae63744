//! Two hosts and the wire between them, and what contenders build on that.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use violin_tests::netns::{Netns, ip, must};
use violin_tests::{PATIENCE, eventually};

/// MTU of every guest, on every wire.
pub(crate) const INNER_MTU: u32 = 1400;
/// The guests' addresses.
pub(crate) const GUESTS: [&str; 2] = ["10.77.0.1", "10.77.0.2"];
/// The hosts'; each in a subnet of its own, should a relay lie between them.
pub(crate) const HOSTS: [&str; 2] = ["10.88.0.1", "10.88.0.9"];

/// What the underlay is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WireKind {
    /// veth as it is: super-frames pass whole.
    Whole,
    /// Segmentation and tunnel offloads off: packets of 1500 bytes, as a NIC puts them on a cable.
    Segmented,
    /// The same with packets of 9000 bytes.
    Jumbo,
}

impl WireKind {
    pub(crate) const ALL: [Self; 3] = [Self::Whole, Self::Segmented, Self::Jumbo];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Whole => "whole",
            Self::Segmented => "segmented",
            Self::Jumbo => "jumbo",
        }
    }

    pub(crate) const fn mtu(self) -> u32 {
        match self {
            Self::Whole | Self::Segmented => 1500,
            Self::Jumbo => 9000,
        }
    }
}

/// Has an interface pass packets only, as a cable does.
pub(crate) fn segment(netns: &Netns, interface: &str) {
    let off = "tso off gso off tx-udp-segmentation off tx-udp_tnl-segmentation off tx-udp_tnl-csum-segmentation off";
    let output = netns.run("ethtool", &format!("-K {interface} {off}"));
    assert!(output.status.success(), "ethtool: {}", String::from_utf8_lossy(&output.stderr));
}

/// Makes a cable between two namespaces.
pub(crate) fn cable((left, a): (&Netns, &str), (right, b): (&Netns, &str), mtu: u32) {
    ip(&format!("link add {a} netns {} mtu {mtu} type veth peer name {b} netns {}", left.name(), right.name()));
    right.ip(&format!("link set {b} mtu {mtu} up"));
    left.ip(&format!("link set {a} up"));
    for (netns, end) in [(left, a), (right, b)] {
        eventually(&format!("{end} is up"), PATIENCE, || netns.is_up(end));
    }
}

/// Two hosts joined by a wire, each with a guest (or being one itself), and what runs on them.
#[derive(Debug)]
pub(crate) struct Site {
    pub(crate) hosts: [Netns; 2],
    pub(crate) guests: Option<[Netns; 2]>,
    pub(crate) directory: tempfile::TempDir,
    running: Vec<Child>,
}

impl Site {
    /// Hosts with their wire, whose MTU is `extra` bytes more than usual.
    pub(crate) fn new(wire: WireKind, extra: u32) -> Self {
        let hosts = [Netns::new("a"), Netns::new("b")];
        cable((&hosts[0], "under"), (&hosts[1], "under"), wire.mtu() + extra);
        for (host, address) in hosts.iter().zip(HOSTS) {
            host.ip(&format!("addr add {address}/24 dev under"));
            if wire != WireKind::Whole {
                segment(host, "under");
            }
        }
        Self { hosts, guests: None, directory: tempfile::tempdir().expect("a temporary folder"), running: Vec::new() }
    }

    /// Two guests joined by the wire alone.
    pub(crate) fn bare(wire: WireKind) -> Self {
        let guests = [Netns::new("ga"), Netns::new("gb")];
        cable((&guests[0], "eth0"), (&guests[1], "eth0"), INNER_MTU);
        for (guest, address) in guests.iter().zip(GUESTS) {
            guest.ip(&format!("addr add {address}/24 dev eth0"));
            if wire != WireKind::Whole {
                segment(guest, "eth0");
            }
        }
        let (hosts, directory) = ([Netns::new("a"), Netns::new("b")], tempfile::tempdir().expect("a temporary folder"));
        Self { hosts, guests: Some(guests), directory, running: Vec::new() }
    }

    /// Gives each host a guest on a veth whose other end is `port`.
    pub(crate) fn add_guests(&mut self) {
        let guests = [Netns::new("ga"), Netns::new("gb")];
        for ((guest, host), address) in guests.iter().zip(&self.hosts).zip(GUESTS) {
            cable((guest, "eth0"), (host, "port"), INNER_MTU);
            guest.ip(&format!("addr add {address}/24 dev eth0"));
        }
        self.guests = Some(guests);
    }

    /// Joins each host's guest with the interface of an overlay by a bridge.
    pub(crate) fn bridge(&mut self, overlay: &str) {
        self.add_guests();
        for host in &self.hosts {
            host.ip("link add br0 type bridge");
            for interface in [overlay, "port"] {
                host.ip(&format!("link set {interface} master br0 up"));
            }
            host.ip("link set br0 up");
        }
    }

    /// Starts a program on a host; it ends with the value. Its output goes to a file beside its configuration.
    pub(crate) fn start(&mut self, host: usize, program: impl Into<PathBuf>, arguments: &[&str], environment: &[(&str, &str)]) {
        let program = program.into();
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let log = std::fs::File::create(self.directory.path().join(format!("{name}-{host}.log"))).expect("a log");
        let mut command = self.hosts[host].command(&program);
        command.args(arguments).envs(environment.iter().copied()).stdin(Stdio::null());
        command.stdout(log.try_clone().expect("a log")).stderr(log);
        self.running.push(command.spawn().unwrap_or_else(|error| panic!("cannot run {}: {error}", program.display())));
    }

    /// The ends that are measured.
    pub(crate) fn pair(&self) -> crate::tools::Pair<'_> {
        let [from, to] = self.guests.as_ref().unwrap_or(&self.hosts);
        crate::tools::Pair { from, to, address: GUESTS[1], back: GUESTS[0] }
    }

    /// Waits until a datagram passes both ways.
    pub(crate) fn wait(&self, name: &str) {
        let pair = self.pair();
        eventually(&format!("{name} carries packets (logs in {})", self.directory.path().display()), PATIENCE, || {
            pair.from.run("ping", &format!("-c 1 -W 1 {}", pair.address)).status.success()
        });
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for child in &mut self.running {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Runs a command on the machine and panics if it fails.
pub(crate) fn shell(words: &str) -> String {
    must(Command::new("sh").args(["-c", words]))
}
