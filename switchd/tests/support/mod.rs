//! Network namespaces with a data plane in each, for tests that need root.
#![allow(dead_code, unreachable_pub)]

pub mod bulk;
pub mod site;

use arc_swap::ArcSwap;
use nix::sched::{CloneFlags, setns};
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::net::{SocketAddr, UdpSocket};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use switchd::counters::Counters;
use switchd::fdb::Fdb;
use switchd::io::dataplane::{DataPlane, QuicDatagram};
use switchd::io::nft::Keeping;
use switchd::seal::cipher::{Choice, Library};
use switchd::seal::schedule::{SECRET_LEN, Secret};
use switchd::seal::session::{Keys, Protection, Session};
use switchd::switch::{Expecting, Nic};
use switchd::tables::{Forwarding, Gate, Network, Peer, PeerSlot, Port, PortSlot, SourceRule, WorkerEvent};
use tokio::sync::mpsc;
use violin_common::api::switch::{PortConditionSeen, PortKind};
use violin_common::control::mesh::Aead;
use violin_common::{PortId, Vni};

pub const MTU: u16 = 1400;
pub const MESH: u16 = 7471;

pub fn vni(value: u32) -> Vni {
    Vni::new(value).unwrap()
}

/// An interface with that MTU.
pub fn nic(mtu: u16) -> Nic {
    Nic::new(&"h1".parse().unwrap(), vni(5), mtu, "t5")
}

/// Runs a command to its end; panics with its output when it fails.
pub fn run(command: &str) -> String {
    let output = try_run(command);
    assert!(output.status.success(), "`{command}`: {}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

pub fn try_run(command: &str) -> Output {
    Command::new("sh").args(["-c", command]).output().expect("sh runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Asks until the answer is yes; panics after three minutes: a limit costs only when a test fails, and a crowded machine is several
/// times slower.
pub fn until(what: &str, mut yes: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(180);
    while !yes() {
        assert!(Instant::now() < deadline, "waited three minutes: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A session of two hosts that need no handshake: each end's index is enough.
pub fn sealed(ours: u32, theirs: u32) -> Arc<Session> {
    let mut secret = [0; SECRET_LEN];
    secret[..4].copy_from_slice(&ours.min(theirs).to_be_bytes());
    secret[4..8].copy_from_slice(&ours.max(theirs).to_be_bytes());
    let choice = Choice { aead: Aead::Aes256Gcm, library: Library::Ring };
    let keys = Keys::new(&Secret::new(secret), ours < theirs, (1, 1), choice);
    Arc::new(Session { index: ours, receiver: theirs, protection: Protection::Sealed(keys) })
}

/// A network namespace, deleted with the value.
#[derive(Debug)]
pub struct Namespace(pub String);

impl Namespace {
    pub fn new(name: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("vsw-{}-{number}-{name}", std::process::id());
        run(&format!("ip netns add {name} && ip -n {name} link set lo up"));
        Self(name)
    }

    pub fn path(&self) -> String {
        format!("/run/netns/{}", self.0)
    }

    /// Runs a shell command in it.
    pub fn run(&self, command: &str) -> String {
        run(&format!("nsenter --net={} sh -c '{command}'", self.path()))
    }

    pub fn try_run(&self, command: &str) -> Output {
        try_run(&format!("nsenter --net={} sh -c '{command}'", self.path()))
    }

    /// Starts a program in it that is killed with the value.
    pub fn start(&self, command: &str) -> Running {
        let mut words = command.split(' ');
        let mut process = Command::new("nsenter");
        process.arg(format!("--net={}", self.path())).args(&mut words).stdout(Stdio::null()).stderr(Stdio::null());
        Running(process.spawn().expect("nsenter runs"))
    }

    /// Runs code on a thread in it.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let file = File::open(self.path()).unwrap();
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&file, CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            thread.join().unwrap()
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = try_run(&format!("ip netns del {}", self.0));
    }
}

#[derive(Debug)]
pub struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A host: namespace, data plane, tables.
#[derive(Debug)]
pub struct Host {
    pub plane: Option<DataPlane>,
    pub tables: Arc<ArcSwap<Forwarding>>,
    pub counters: Arc<Counters>,
    pub events: mpsc::Receiver<WorkerEvent>,
    pub quic: mpsc::Receiver<QuicDatagram>,
    pub address: SocketAddr,
    pub ns: Namespace,
    next_port: u32,
}

impl Host {
    /// A host whose mesh port is `address`, which an interface of `ns` must have.
    pub fn start(ns: Namespace, address: &str) -> Self {
        Self::start_keeping(Keeping::Owned, ns, address)
    }

    /// Likewise, and says how guards are to be kept.
    pub fn start_keeping(keeping: Keeping, ns: Namespace, address: &str) -> Self {
        let address: SocketAddr = format!("{address}:{MESH}").parse().unwrap();
        let tables = Arc::new(ArcSwap::from_pointee(Forwarding::default()));
        let counters = Arc::new(Counters::default());
        let (events_in, events) = mpsc::channel(1024);
        let (quic_in, quic) = mpsc::channel(64);
        let plane = ns.enter(|| {
            let socket = UdpSocket::bind(address).unwrap();
            DataPlane::start_keeping(keeping, socket, tables.clone(), counters.clone(), events_in, quic_in).unwrap()
        });
        Self { plane: Some(plane), tables, counters, events, quic, address, ns, next_port: 0 }
    }

    pub fn plane(&self) -> &DataPlane {
        self.plane.as_ref().expect("started")
    }

    /// Publishes changed tables.
    pub fn change(&self, change: impl FnOnce(&mut Forwarding)) {
        let mut tables = Forwarding::clone(&self.tables.load_full());
        change(&mut tables);
        self.tables.store(Arc::new(tables));
        self.plane().wake();
    }

    pub fn network(&self, vni: Vni, mtu: u16) {
        self.change(|tables| {
            let network = Network {
                mtu,
                ageing: Duration::from_secs(300),
                ports: Vec::new(),
                peers: Vec::new(),
                owned: HashMap::new(),
                fdb: Arc::new(Fdb::default()),
            };
            tables.networks.insert(vni, network);
        });
    }

    /// Makes `other` a peer that carries `vnis`; indices are our slot numbers plus a host's own thousand.
    pub fn peer(&self, slot: u16, other: SocketAddr, ours: u32, theirs: u32, vnis: &[Vni]) {
        let session = sealed(ours, theirs);
        self.change(|tables| {
            let slot = PeerSlot(slot);
            let peer = Peer {
                host: format!("h{}", slot.0).parse().unwrap(),
                address: other,
                ours: None,
                session: Arc::clone(&session),
                max_datagram: 1472,
                networks: HashSet::from_iter(vnis.iter().copied()),
                traffic: Arc::default(),
            };
            if tables.peers.len() <= usize::from(slot.0) {
                tables.peers.resize(usize::from(slot.0) + 1, None);
            }
            tables.peers[usize::from(slot.0)] = Some(peer);
            tables.by_receiver.insert(ours, (slot, session));
            for vni in vnis {
                if let Some(network) = tables.networks.get_mut(vni) {
                    network.peers.push(slot);
                }
            }
        });
    }

    /// Puts a port into the tables without attaching it.
    pub fn announce_port(&mut self, vni: Vni, gateway: bool) -> (PortSlot, PortId) {
        self.next_port += 1;
        let (slot, id) = (PortSlot(self.next_port as u16), PortId(self.next_port));
        let port = Port { id, vni, source: SourceRule::Learn, gate: Gate::Open, gateway, traffic: Arc::default() };
        self.change(|tables| {
            if tables.ports.len() <= usize::from(slot.0) {
                tables.ports.resize(usize::from(slot.0) + 1, None);
            }
            tables.ports[usize::from(slot.0)] = Some(port);
            tables.networks.get_mut(&vni).unwrap().ports.push(slot);
        });
        (slot, id)
    }

    pub fn attach(&self, (slot, id): (PortSlot, PortId), kind: &PortKind, mtu: u16) {
        self.ns.enter(|| self.plane().attach(slot, id, kind, nic(mtu), Expecting::Now).unwrap());
    }

    /// A port on an interface of this host.
    pub fn packet_port(&mut self, vni: Vni, interface: &str, mtu: u16) -> (PortSlot, PortId) {
        let port = self.announce_port(vni, false);
        self.attach(port, &PortKind::Packet { interface: interface.into() }, mtu);
        port
    }

    pub fn condition(&self, port: (PortSlot, PortId)) -> PortConditionSeen {
        self.plane().conditions().into_iter().find(|seen| seen.port == port.1).expect("known")
    }

    pub fn drops(&self) -> Vec<(String, u64)> {
        self.counters.snapshot().into_iter().filter(|c| c.value > 0).map(|c| (c.name, c.value)).collect()
    }
}

/// Two hosts joined by a veth cable, with one network each carried by both.
pub fn two_hosts(vnis: &[Vni], mtu: u16) -> (Host, Host) {
    let (a, b) = (Namespace::new("a"), Namespace::new("b"));
    run(&format!("ip link add under netns {} type veth peer name under netns {}", a.0, b.0));
    a.run("ip addr add 10.99.0.1/24 dev under && ip link set under up");
    b.run("ip addr add 10.99.0.2/24 dev under && ip link set under up");
    let (a, b) = (Host::start(a, "10.99.0.1"), Host::start(b, "10.99.0.2"));
    for host in [&a, &b] {
        vnis.iter().for_each(|vni| host.network(*vni, mtu));
    }
    a.peer(0, b.address, 1001, 2001, vnis);
    b.peer(0, a.address, 2001, 1001, vnis);
    (a, b)
}

/// A guest: a namespace with `eth0`, whose cable ends at `host` as `interface`.
pub fn guest(host: &Namespace, interface: &str, address: &str, mtu: u16) -> Namespace {
    let guest = Namespace::new("guest");
    run(&format!("ip link add {interface} netns {} type veth peer name eth0 netns {}", host.0, guest.0));
    guest.run(&format!("ip link set eth0 mtu {mtu} up && ip addr add {address}/24 dev eth0"));
    guest
}
