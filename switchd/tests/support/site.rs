//! Hosts in network namespaces, each with a real `switchd` process and a real certificate.

use super::{Namespace, run, until, vni};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use violin_channel::local::blocking::ask;
use violin_channel::pki;
use violin_common::api::switch::{
    MoveState, OwnedMac, Ownership, PeerSeen, PortConditionSeen, PortKind, PortSpec, SwitchReply, SwitchRequest,
};
use violin_common::{HostId, MacAddr};

pub const VNI: u32 = 5;

pub fn host(number: usize) -> HostId {
    format!("h{number}").parse().unwrap()
}

/// A daemon, killed with the value.
#[derive(Debug)]
pub struct Daemon(pub Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Daemon {
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.0.id()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }
}

/// Hosts `h1`, `h2`, ... on one underlay, each with a guest on its port `g`.
#[derive(Debug)]
pub struct Site {
    pub directory: tempfile::TempDir,
    _underlay: Namespace,
    pub hosts: BTreeMap<usize, Namespace>,
    pub guests: BTreeMap<usize, Namespace>,
    pub daemons: BTreeMap<usize, Daemon>,
    /// Hosts that listen on `[::]`.
    pub wildcards: BTreeSet<usize>,
    /// Where hosts listen that have another address than usual.
    pub listens: BTreeMap<usize, String>,
    /// Whom hosts join that do not join all others before them.
    pub joins: BTreeMap<usize, Vec<String>>,
    /// Hosts that have name and certificate of another one.
    pub copies: BTreeMap<usize, usize>,
    /// Further keys of a host's own.
    pub extras: BTreeMap<usize, String>,
}

impl Site {
    /// Namespaces and certificates for `count` hosts; nothing runs yet.
    pub fn new(count: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let names: Vec<_> = (1..=count).map(|number| (host(number), "d1".parse().unwrap())).collect();
        pki::write_pki(&directory.path().join("pki"), "test", &names).unwrap();
        pki::write_pki(&directory.path().join("other-pki"), "other", &names).unwrap();
        let underlay = Namespace::new("underlay");
        underlay.run("ip link add bridge0 type bridge && ip link set bridge0 up");
        let (hosts, guests, daemons) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let (listens, joins, copies, extras) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let wildcards = BTreeSet::new();
        let mut site = Self { directory, _underlay: underlay, hosts, guests, daemons, wildcards, listens, joins, copies, extras };
        for number in 1..=count {
            let ns = Namespace::new(&format!("h{number}"));
            let bridge = &site._underlay.0;
            run(&format!(
                "ip -n {} link add u0 mtu 1500 type veth peer name u{number} netns {bridge} && \
                 ip -n {bridge} link set u{number} master bridge0 up && \
                 ip -n {0} addr add 10.71.0.{number}/24 dev u0 && ip -n {0} link set u0 up",
                ns.0
            ));
            site.hosts.insert(number, ns);
        }
        site
    }

    /// Name of the namespace with the bridge (`bridge0`) between the hosts.
    pub fn underlay(&self) -> &str {
        &self._underlay.0
    }

    pub fn socket(&self, number: usize) -> PathBuf {
        self.directory.path().join(format!("h{number}.sock"))
    }

    pub fn log(&self, number: usize) -> String {
        std::fs::read_to_string(self.directory.path().join(format!("h{number}.log"))).unwrap_or_default()
    }

    /// A veth between a new namespace and the host; the guest's end has `mac` and 192.168.5.`number`.
    pub fn guest(&mut self, number: usize) {
        let ns = Namespace::new(&format!("g{number}"));
        run(&format!(
            "ip -n {} link add e0 mtu 1400 address {} type veth peer name g netns {} && \
             ip -n {0} addr add 192.168.5.{number}/24 dev e0 && ip -n {0} link set dev e0 up && ip -n {2} link set dev g up",
            ns.0,
            mac(number),
            self.hosts[&number].0
        ));
        self.guests.insert(number, ns);
    }

    pub fn config(&self, number: usize, pki_directory: &str, extra: &str) -> PathBuf {
        let directory = self.directory.path();
        let usual = || (1..number).map(|other| format!("10.71.0.{other}:7471")).collect();
        let join: Vec<_> = self.joins.get(&number).cloned().unwrap_or_else(usual);
        let join: Vec<_> = join.iter().map(|address| format!("{address:?}")).collect();
        let pki = directory.join(pki_directory);
        let listen = if self.wildcards.contains(&number) { "[::]".into() } else { format!("10.71.0.{number}") };
        let listen = self.listens.get(&number).cloned().unwrap_or(listen);
        let name = host(self.copies.get(&number).copied().unwrap_or(number));
        let text = format!(
            "host = \"{name}\"\ndomain = \"d1\"\nlisten = \"{listen}:7471\"\njoin = [{}]\nsocket = \"{}\"\n{}\
             [tls]\nca = \"{pki}/ca.pem\"\ncert = \"{pki}/{name}.pem\"\nkey = \"{pki}/{name}.key\"\n{extra}",
            join.join(", "),
            self.socket(number).display(),
            self.extras.get(&number).map_or("", String::as_str),
            pki = pki.display(),
        );
        let path = directory.join(format!("h{number}.toml"));
        std::fs::write(&path, text).unwrap();
        path
    }

    pub fn start_with(&mut self, number: usize, pki_directory: &str, extra: &str) {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.directory.path().join(format!("h{number}.log")))
            .unwrap();
        self.launch(number, pki_directory, extra, "info,switchd=debug", log.into());
        until("the switch answers", || ask::<_, SwitchReply>(&self.socket(number), &SwitchRequest::Status).is_ok());
    }

    /// Starts a switch with this log, and waits for nothing.
    pub fn launch(&mut self, number: usize, pki_directory: &str, extra: &str, level: &str, log: Stdio) {
        let config = self.config(number, pki_directory, extra);
        let child = Command::new("nsenter")
            .arg(format!("--net={}", self.hosts[&number].path()))
            .args([env!("CARGO_BIN_EXE_switchd"), "--config"])
            .arg(config)
            .env("RUST_LOG", level)
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.daemons.insert(number, Daemon(child));
    }

    /// Starts a switch that carries the network and has the guest's port.
    pub fn start(&mut self, number: usize) {
        let port = "[[port]]\nkind = \"packet\"\nvni = 5\ninterface = \"g\"\n";
        let port = if self.guests.contains_key(&number) { port } else { "" };
        self.start_with(number, "pki", &format!("[[network]]\nvni = 5\n{port}"));
    }

    pub fn ask(&self, number: usize, request: SwitchRequest) -> Result<SwitchReply, String> {
        ask(&self.socket(number), &request)
    }

    pub fn peers(&self, number: usize) -> Vec<PeerSeen> {
        match self.ask(number, SwitchRequest::PeerList) {
            Ok(SwitchReply::Peers(peers)) => peers,
            other => panic!("{other:?}"),
        }
    }

    pub fn conditions(&self, number: usize) -> Vec<PortConditionSeen> {
        match self.ask(number, SwitchRequest::PortConditions) {
            Ok(SwitchReply::PortConditions(seen)) => seen,
            other => panic!("{other:?}"),
        }
    }

    pub fn connected(&self, number: usize) -> usize {
        self.peers(number).iter().filter(|peer| peer.connected && peer.networks == [vni(VNI)]).count()
    }

    pub fn reaches(&self, from: usize, to: usize) -> bool {
        reaches(&self.guests[&from], &self.guests[&to], to)
    }

    pub fn counter(&self, number: usize, name: &str) -> u64 {
        match self.ask(number, SwitchRequest::Counters) {
            Ok(SwitchReply::Counters(all)) => all.iter().find(|counter| counter.name == name).expect("exists").value,
            other => panic!("{other:?}"),
        }
    }

    pub fn state(&self, number: usize, mac: MacAddr) -> Option<MoveState> {
        match self.ask(number, SwitchRequest::MoveStatus { vni: vni(VNI), mac }) {
            Ok(SwitchReply::Move(seen)) => Some(seen.state),
            _ => None,
        }
    }
}

/// Whether a datagram gets from one guest to 192.168.5.`number` of another and back (no `ping` is needed for it).
pub fn reaches(from: &Namespace, to: &Namespace, number: usize) -> bool {
    let there = format!("192.168.5.{number}:0");
    let Ok(answering) = to.enter(|| std::net::UdpSocket::bind(&there)) else { return false };
    let asking = from.enter(|| std::net::UdpSocket::bind("0.0.0.0:0")).unwrap();
    for socket in [&answering, &asking] {
        socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    }
    let mut bytes = [0; 4];
    if asking.send_to(b"ping", answering.local_addr().unwrap()).is_err() {
        return false;
    }
    let Ok((4, back)) = answering.recv_from(&mut bytes) else { return false };
    answering.send_to(b"pong", back).is_ok() && asking.recv_from(&mut bytes).is_ok_and(|_| bytes == *b"pong")
}

impl Drop for Site {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for number in self.hosts.keys() {
                if let Ok(SwitchReply::Counters(all)) = self.ask(*number, SwitchRequest::Counters) {
                    let counted: Vec<_> = all.iter().filter(|counter| counter.value > 0).collect();
                    eprintln!("--- h{number} counted {counted:?}");
                }
                eprintln!("--- h{number} ports {:?}", self.ask(*number, SwitchRequest::PortList));
                eprintln!("--- h{number}\n{}", self.log(*number));
            }
        }
    }
}

pub fn mac(number: usize) -> MacAddr {
    MacAddr([0x52, 0x54, 0, 0, 5, u8::try_from(number).unwrap()])
}

pub fn owned(interface: &str, ownership: Ownership) -> SwitchRequest {
    SwitchRequest::PortAdd(PortSpec {
        vni: vni(VNI),
        kind: PortKind::Packet { interface: interface.into() },
        owned: Some(OwnedMac { mac: mac(9), vm: "alpha-c1".parse().unwrap(), ownership }),
    })
}

/// A guest of `number` that answers as 192.168.5.9 with the MAC of the moving VM.
pub fn moving_guest(site: &Site, number: usize) -> Namespace {
    let ns = Namespace::new(&format!("m{number}"));
    run(&format!(
        "ip -n {} link add e0 mtu 1400 address {} type veth peer name m netns {} && \
         ip -n {0} addr add 192.168.5.9/24 dev e0 && ip -n {2} link set dev m up",
        ns.0,
        mac(9),
        site.hosts[&number].0
    ));
    ns
}
