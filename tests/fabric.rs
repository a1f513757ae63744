//! A mesh of real `switchd` processes in namespaces of their own, joined by a bridge.

use crate::netns::{Netns, ip};
use crate::wire::Wire;
use crate::{eventually, program};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;
use violin_common::api::Response;
use violin_common::api::switch::{NetworkSpec, OwnedMac, Ownership, PortKind, PortSpec, SwitchReply, SwitchRequest};
use violin_common::{Epoch, HostId, MacAddr, PortId, Vni};

/// Mesh port of every switch.
pub const MESH_PORT: u16 = 7471;

/// Several hosts, each with one switch.
#[derive(Debug)]
pub struct Fabric {
    /// The hosts, h1 first.
    pub hosts: Vec<Host>,
    /// The underlay's bridge.
    pub underlay: Netns,
    dir: tempfile::TempDir,
}

/// One host.
#[derive(Debug)]
pub struct Host {
    /// Its name: h1, h2, …
    pub name: HostId,
    /// Its namespace.
    pub netns: Netns,
    /// Its underlay address.
    pub address: String,
    /// Its switch.
    pub switch: Option<Child>,
    config: PathBuf,
    socket: PathBuf,
}

/// A guest: a namespace whose eth0 hangs at a packet port.
#[derive(Debug)]
pub struct Guest {
    /// Its namespace.
    pub netns: Netns,
    /// Its MAC.
    pub mac: MacAddr,
    /// Its port.
    pub port: PortId,
    /// Raw access to its eth0.
    pub wire: Wire,
    /// Name of the interface on the host.
    pub interface: String,
}

/// A network with the default MTU that ages quickly enough to be watched.
pub fn network(vni: u32) -> NetworkSpec {
    NetworkSpec { vni: Vni::new(vni).expect("a legal VNI"), mtu: 1400, ageing_s: 10 }
}

impl Fabric {
    /// Starts `count` hosts whose switches form a mesh, and waits until each sees all others.
    pub fn start(count: usize) -> Self {
        Self::start_all(Self::prepare(count), count)
    }

    /// The same, and data is not sealed, for tests that read the underlay.
    pub fn start_plain(count: usize) -> Self {
        let fabric = Self::prepare(count);
        for host in &fabric.hosts {
            let text = std::fs::read_to_string(&host.config).expect("it was written");
            let text = text.replace("[tls]", "plain = [{ domain = \"d1\", interface = \"wire\" }]\n[tls]");
            std::fs::write(&host.config, text).expect("a file is written");
        }
        Self::start_all(fabric, count)
    }

    fn start_all(mut fabric: Self, count: usize) -> Self {
        for index in 0..count {
            fabric.start_switch(index);
        }
        fabric.wait_mesh(crate::PATIENCE);
        fabric
    }

    /// Hosts, certificates and configurations; no switch runs yet.
    pub fn prepare(count: usize) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let underlay = Netns::new("u");
        underlay.ip("link add br0 type bridge");
        underlay.ip("link set br0 up");
        let domain: violin_common::DomainId = "d1".parse().expect("a legal name");
        let names: Vec<HostId> = (1..=count).map(|index| format!("h{index}").parse().expect("a legal name")).collect();
        let pki = dir.path().join("pki");
        let members: Vec<_> = names.iter().map(|name| (name.clone(), domain.clone())).collect();
        violin_channel::pki::write_pki(&pki, "test", &members).expect("certificates are made");
        let mut hosts = Vec::new();
        for (index, name) in (1..).zip(names) {
            let netns = Netns::new(name.as_str());
            let address = format!("10.99.0.{index}");
            let outer = format!("u{index}");
            ip(&format!("link add {outer} netns {} type veth peer name wire netns {}", underlay.name(), netns.name()));
            underlay.ip(&format!("link set {outer} master br0 up"));
            netns.ip(&format!("addr add {address}/24 dev wire"));
            netns.ip("link set wire up");
            let tls = violin_channel::pki::paths(&pki, &name);
            let place = |suffix: &str| dir.path().join(format!("{name}{suffix}"));
            let join = if index == 1 { String::new() } else { format!("join = [\"10.99.0.1:{MESH_PORT}\"]\n") };
            let text = format!(
                "host = \"{name}\"\ndomain = \"d1\"\nlisten = \"{address}:{MESH_PORT}\"\n{join}socket = {:?}\n\
                 [tls]\nca = {:?}\ncert = {:?}\nkey = {:?}\n",
                place(".sock"),
                tls.ca,
                tls.cert,
                tls.key,
            );
            std::fs::write(place(".toml"), text).expect("a file is written");
            hosts.push(Host { config: place(".toml"), socket: place(".sock"), name, netns, address, switch: None });
        }
        Self { hosts, underlay, dir }
    }

    /// The folder with all files.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Starts one host's switch and waits for its socket.
    pub fn start_switch(&mut self, index: usize) {
        let host = &mut self.hosts[index];
        let log = std::fs::File::options().create(true).append(true).open(host.config.with_extension("log")).expect("a log");
        let mut command = host.netns.command(program("switchd"));
        command.arg("--config").arg(&host.config).stdin(Stdio::null()).stdout(log.try_clone().expect("a log")).stderr(log);
        host.switch = Some(command.spawn().expect("switchd starts"));
        let host = &self.hosts[index];
        eventually(&format!("switchd of {} answers (log: {})", host.name, host.log()), crate::PATIENCE, || {
            host.try_ask(&SwitchRequest::Status).is_ok()
        });
    }

    /// Waits until every running switch is connected to every other.
    pub fn wait_mesh(&self, limit: Duration) {
        let running = self.hosts.iter().filter(|host| host.switch.is_some()).count();
        for host in self.hosts.iter().filter(|host| host.switch.is_some()) {
            eventually(&format!("{} has {} peers (log: {})", host.name, running - 1, host.log()), limit, || {
                matches!(host.try_ask(&SwitchRequest::PeerList),
                    Ok(SwitchReply::Peers(peers)) if peers.iter().filter(|peer| peer.connected).count() == running - 1)
            });
        }
    }

    /// Adds a network on all hosts and waits until all know who carries it.
    pub fn carry(&self, spec: &NetworkSpec) {
        for host in &self.hosts {
            host.ask(SwitchRequest::NetworkAdd(spec.clone()));
        }
        for host in &self.hosts {
            eventually(&format!("{} knows who carries {:?}", host.name, spec.vni), crate::PATIENCE, || {
                matches!(host.ask(SwitchRequest::PeerList),
                    SwitchReply::Peers(peers) if peers.iter().filter(|peer| peer.networks.contains(&spec.vni)).count() == self.hosts.len() - 1)
            });
        }
    }
}

impl Host {
    /// What its switch wrote to its log.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.config.with_extension("log")).unwrap_or_default()
    }

    /// Asks its switch.
    pub fn try_ask(&self, request: &SwitchRequest) -> Result<SwitchReply, String> {
        let words = |error: std::io::Error| error.to_string();
        let mut stream = UnixStream::connect(&self.socket).map_err(words)?;
        stream.set_read_timeout(Some(Duration::from_secs(10))).map_err(words)?;
        let mut line = serde_json::to_string(request).expect("requests can be written");
        line.push('\n');
        stream.write_all(line.as_bytes()).map_err(words)?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).map_err(words)?;
        serde_json::from_str::<Response<SwitchReply>>(&answer).map_err(|error| format!("{error} in {answer:?}"))?.into()
    }

    /// Asks its switch for something it must grant.
    pub fn ask(&self, request: SwitchRequest) -> SwitchReply {
        self.try_ask(&request).unwrap_or_else(|error| panic!("{}: {request:?}: {error}", self.name))
    }

    /// Value of a counter, 0 if it is not there.
    pub fn counter(&self, name: &str) -> u64 {
        match self.ask(SwitchRequest::Counters) {
            SwitchReply::Counters(counters) => {
                counters.iter().find(|counter| counter.name == name).map_or(0, |counter| counter.value)
            }
            other => panic!("got {other:?}, want counters"),
        }
    }

    /// Sum of all drops.
    pub fn drops(&self) -> u64 {
        match self.ask(SwitchRequest::Counters) {
            SwitchReply::Counters(counters) => {
                counters.iter().filter(|counter| counter.name.starts_with("drop.")).map(|counter| counter.value).sum()
            }
            other => panic!("got {other:?}, want counters"),
        }
    }

    /// A guest at a packet port of this host; its sources are learned.
    pub fn guest(&self, vni: u32, mac: &str) -> Guest {
        self.guest_with(vni, mac, None)
    }

    /// A guest whose MAC is owned here.
    pub fn owned_guest(&self, vni: u32, mac: &str, vm: &str) -> Guest {
        self.guest_with(vni, mac, Some((vm, Ownership::Here { epoch: Epoch::FIRST })))
    }

    /// A guest with or without an owned MAC.
    pub fn guest_with(&self, vni: u32, mac: &str, owned: Option<(&str, Ownership)>) -> Guest {
        let mac: MacAddr = mac.parse().expect("a legal MAC");
        let netns = Netns::new("g");
        // A guest says what the test says and nothing else: no neighbour or router solicitation of its own.
        netns.enter(|| std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").expect("a namespace has its own"));
        let interface = format!("g{}", netns.name().rsplit('-').nth(1).unwrap_or("0"));
        ip(&format!(
            "link add {interface} netns {} type veth peer name eth0 address {mac} netns {}",
            self.netns.name(),
            netns.name()
        ));
        netns.ip("link set eth0 mtu 1400");
        netns.ip("link set eth0 up");
        let owned = owned.map(|(vm, ownership)| OwnedMac { mac, vm: vm.parse().expect("a legal name"), ownership });
        let spec =
            PortSpec { vni: Vni::new(vni).expect("a legal VNI"), kind: PortKind::Packet { interface: interface.clone() }, owned };
        let SwitchReply::Port(port) = self.ask(SwitchRequest::PortAdd(spec)) else { panic!("want a port") };
        for (netns, end) in [(&netns, "eth0"), (&self.netns, interface.as_str())] {
            // Until the kernel has seen the carrier, a packet socket's frames vanish without an error.
            eventually(&format!("{end} is up"), crate::PATIENCE, || netns.is_up(end));
        }
        let wire = Wire::open(&netns, "eth0");
        Guest { netns, mac, port, wire, interface }
    }

    /// Kills its switch as `kill -9` does.
    pub fn kill_switch(&mut self) {
        if let Some(mut child) = self.switch.take() {
            child.kill().expect("our own child can be killed");
            child.wait().expect("our own child can be waited for");
        }
    }

    /// Ends its switch by SIGTERM; its exit status.
    pub fn stop_switch(&mut self) -> std::process::ExitStatus {
        let mut child = self.switch.take().expect("the switch runs");
        let pid = nix::unistd::Pid::from_raw(child.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("our own child can be signalled");
        child.wait().expect("our own child can be waited for")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.kill_switch();
        if std::thread::panicking() {
            eprintln!("--- log of switchd on {}\n{}", self.name, self.log());
        }
    }
}

impl Guest {
    /// Gives its eth0 an address.
    pub fn address(&self, address: &str) {
        self.netns.ip(&format!("addr add {address} dev eth0"));
    }

    /// Whether a ping gets through; three tries.
    pub fn pings(&self, address: &str) -> bool {
        self.netns.run("busybox", &format!("ping -c 3 -W 1 {address}")).status.success()
    }
}
