//! Three real `switchd` processes with real certificates, each in a network namespace of its own. Needs root.

mod support;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use support::{Namespace, run, try_run, until, vni};
use violin_channel::local::blocking::ask;
use violin_channel::pki;
use violin_common::api::switch::{
    FdbPlace, MoveState, OwnedMac, Ownership, PeerSeen, PortKind, PortSpec, SwitchReply, SwitchRequest,
};
use violin_common::{Epoch, HostId, MacAddr, PortId};

const VNI: u32 = 5;

fn host(number: usize) -> HostId {
    format!("h{number}").parse().unwrap()
}

/// A daemon, killed with the value.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Daemon {
    fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.0.id()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }
}

/// Hosts `h1`, `h2`, ... on one underlay, each with a guest on its port `g`.
struct Site {
    directory: tempfile::TempDir,
    _underlay: Namespace,
    hosts: BTreeMap<usize, Namespace>,
    guests: BTreeMap<usize, Namespace>,
    daemons: BTreeMap<usize, Daemon>,
}

impl Site {
    /// Namespaces and certificates for `count` hosts; nothing runs yet.
    fn new(count: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let names: Vec<_> = (1..=count).map(|number| (host(number), "d1".parse().unwrap())).collect();
        pki::write_pki(&directory.path().join("pki"), "test", &names).unwrap();
        pki::write_pki(&directory.path().join("other-pki"), "other", &names).unwrap();
        let underlay = Namespace::new("underlay");
        underlay.run("ip link add bridge0 type bridge && ip link set bridge0 up");
        let mut site =
            Self { directory, _underlay: underlay, hosts: BTreeMap::new(), guests: BTreeMap::new(), daemons: BTreeMap::new() };
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

    fn socket(&self, number: usize) -> PathBuf {
        self.directory.path().join(format!("h{number}.sock"))
    }

    /// A veth between a new namespace and the host; the guest's end has `mac` and 192.168.5.`number`.
    fn guest(&mut self, number: usize) {
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

    fn config(&self, number: usize, pki_directory: &str, extra: &str) -> PathBuf {
        let directory = self.directory.path();
        let join: Vec<_> = (1..number).map(|other| format!("\"10.71.0.{other}:7471\"")).collect();
        let pki = directory.join(pki_directory);
        let text = format!(
            "host = \"h{number}\"\ndomain = \"d1\"\nlisten = \"10.71.0.{number}:7471\"\njoin = [{}]\nsocket = \"{}\"\n\
             [tls]\nca = \"{pki}/ca.pem\"\ncert = \"{pki}/h{number}.pem\"\nkey = \"{pki}/h{number}.key\"\n{extra}",
            join.join(", "),
            self.socket(number).display(),
            pki = pki.display(),
        );
        let path = directory.join(format!("h{number}.toml"));
        std::fs::write(&path, text).unwrap();
        path
    }

    fn start_with(&mut self, number: usize, pki_directory: &str, extra: &str) {
        let config = self.config(number, pki_directory, extra);
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.directory.path().join(format!("h{number}.log")))
            .unwrap();
        let child = Command::new("nsenter")
            .arg(format!("--net={}", self.hosts[&number].path()))
            .args([env!("CARGO_BIN_EXE_switchd"), "--config"])
            .arg(config)
            .env("RUST_LOG", "info,switchd=debug")
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.daemons.insert(number, Daemon(child));
        until("the switch answers", || ask::<_, SwitchReply>(&self.socket(number), &SwitchRequest::Status).is_ok());
    }

    /// Starts a switch that carries the network and has the guest's port.
    fn start(&mut self, number: usize) {
        let port = "[[port]]\nkind = \"packet\"\nvni = 5\ninterface = \"g\"\n";
        let port = if self.guests.contains_key(&number) { port } else { "" };
        self.start_with(number, "pki", &format!("[[network]]\nvni = 5\n{port}"));
    }

    fn ask(&self, number: usize, request: SwitchRequest) -> Result<SwitchReply, String> {
        ask(&self.socket(number), &request)
    }

    fn peers(&self, number: usize) -> Vec<PeerSeen> {
        match self.ask(number, SwitchRequest::PeerList) {
            Ok(SwitchReply::Peers(peers)) => peers,
            other => panic!("{other:?}"),
        }
    }

    fn connected(&self, number: usize) -> usize {
        self.peers(number).iter().filter(|peer| peer.connected && peer.networks == [vni(VNI)]).count()
    }

    fn reaches(&self, from: usize, to: usize) -> bool {
        reaches(&self.guests[&from], &self.guests[&to], to)
    }

    fn counter(&self, number: usize, name: &str) -> u64 {
        match self.ask(number, SwitchRequest::Counters) {
            Ok(SwitchReply::Counters(all)) => all.iter().find(|counter| counter.name == name).expect("exists").value,
            other => panic!("{other:?}"),
        }
    }

    fn state(&self, number: usize, mac: MacAddr) -> Option<MoveState> {
        match self.ask(number, SwitchRequest::MoveStatus { vni: vni(VNI), mac }) {
            Ok(SwitchReply::Move(seen)) => Some(seen.state),
            _ => None,
        }
    }
}

/// Whether a datagram gets from one guest to 192.168.5.`number` of another and back (no `ping` is needed for it).
fn reaches(from: &Namespace, to: &Namespace, number: usize) -> bool {
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
                let log = self.directory.path().join(format!("h{number}.log"));
                if let Ok(SwitchReply::Counters(all)) = self.ask(*number, SwitchRequest::Counters) {
                    let counted: Vec<_> = all.iter().filter(|counter| counter.value > 0).collect();
                    eprintln!("--- h{number} counted {counted:?}");
                }
                eprintln!("--- h{number} ports {:?}", self.ask(*number, SwitchRequest::PortList));
                eprintln!("--- h{number}\n{}", std::fs::read_to_string(log).unwrap_or_default());
            }
        }
    }
}

fn mac(number: usize) -> MacAddr {
    MacAddr([0x52, 0x54, 0, 0, 5, u8::try_from(number).unwrap()])
}

#[test]
#[ignore = "needs root"]
fn a_mesh_forms_carries_frames_and_heals() {
    let mut site = Site::new(3);
    for number in [1, 3] {
        site.guest(number);
    }
    for number in 1..=3 {
        site.start(number);
    }
    for number in 1..=3 {
        until("everybody is connected with everybody", || site.connected(number) == 2);
    }
    assert!(site.peers(1).iter().all(|peer| peer.rtt_ms.is_some()));

    until("a datagram passes from h1 to h3", || site.reaches(1, 3));
    let Ok(SwitchReply::Fdb(fdb)) = site.ask(1, SwitchRequest::FdbList { vni: None }) else { panic!("no FDB") };
    let learned = fdb.iter().find(|entry| entry.mac == mac(3)).expect("learned");
    assert_eq!((&learned.place, learned.epoch), (&FdbPlace::Host(host(3)), None));

    site.daemons.remove(&3);
    let killed = Instant::now();
    until("others notice the death", || site.connected(1) == 1 && site.connected(2) == 1);
    println!("noticed after {:?}", killed.elapsed());
    assert!(killed.elapsed() < Duration::from_secs(4), "noticed after {:?}", killed.elapsed());
    site.start(3);
    let started = Instant::now();
    until("traffic resumes", || site.reaches(1, 3));
    println!("resumed after {:?}", started.elapsed());
    until("it has rejoined everywhere", || (1..=3).all(|number| site.connected(number) == 2));

    site.daemons[&2].signal(nix::sys::signal::Signal::SIGTERM);
    until("it leaves", || site.daemons.get_mut(&2).unwrap().0.try_wait().unwrap().is_some());
    let status = site.daemons.remove(&2).unwrap().0.wait().unwrap();
    assert!(status.success());
    assert!(site.peers(1).iter().all(|peer| peer.host != host(2)), "who leaves is forgotten at once");
}

#[test]
#[ignore = "needs root"]
fn a_switch_of_another_authority_is_refused() {
    let mut site = Site::new(2);
    site.start(1);

    site.start_with(2, "other-pki", "[[network]]\nvni = 5\n");

    until("the caller is refused and counted", || site.counter(1, "control.refused-callers") > 0);
    assert!(site.peers(1).is_empty() && site.peers(2).is_empty());
}

#[test]
#[ignore = "needs root"]
fn any_datagram_is_survived_and_counted() {
    let mut site = Site::new(2);
    site.start(1);

    let refused = || ["bad-datagram", "unknown-kind", "unknown-receiver"].map(|name| site.counter(1, &format!("drop.{name}")));
    site.hosts[&2].enter(|| {
        let socket = std::net::UdpSocket::bind("10.71.0.2:0").unwrap();
        for first in [0x00, 0x11, 0x12, 0x40, 0x80, 0xc0, 0xff] {
            for len in (0..64).chain([100, 1199, 1200, 1201, 1400, 1472]) {
                let mut datagram: Vec<u8> = (0..len).map(|i: usize| (i * 37 % 251) as u8).collect();
                if let Some(byte) = datagram.first_mut() {
                    *byte = first;
                }
                socket.send_to(&datagram, "10.71.0.1:7471").unwrap();
            }
        }
    });

    until("they are counted", || refused().iter().sum::<u64>() > 100);
    assert!(site.ask(1, SwitchRequest::Status).is_ok());
    site.start(2);
    until("members still get through", || site.connected(1) == 1);
}

#[test]
#[ignore = "needs root"]
fn malformed_messages_of_a_member_cost_it_its_connection_only() {
    let mut site = Site::new(2);
    site.start(1);
    let tls = pki::paths(&site.directory.path().join("pki"), &host(2));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();

    site.hosts[&2].enter(|| {
        runtime.block_on(async {
            use violin_channel::{frame, quic, tls::Credentials, tls::Timing};
            let credentials = std::sync::Arc::new(Credentials::load(&tls).unwrap());
            for len in [0usize, 1, 2, 3, 5, 17, 200, 70_000] {
                let address = "10.71.0.1:7471".parse().unwrap();
                let dialler = quic::dialler(address, credentials.clone(), quic::alpn::MESH, Timing::BRISK);
                let (connection, _) = dialler.unwrap().connect(address, None).await.unwrap();
                let (mut out, _inn) = connection.open_bi().await.unwrap();
                let mut bytes = u32::try_from(len).unwrap().to_be_bytes().to_vec();
                bytes.extend((0..len).map(|i| 0xf0 | (i % 16) as u8));
                let _ = out.write_all(&bytes).await;
                let _ = out.finish();
                tokio::time::timeout(Duration::from_secs(5), connection.closed()).await.expect("it is closed");
            }
            let address = "10.71.0.1:7471".parse().unwrap();
            let dialler = quic::dialler(address, credentials, quic::alpn::MESH, Timing::BRISK).unwrap();
            let (connection, _) = dialler.connect(address, None).await.unwrap();
            let (mut out, _inn) = connection.open_bi().await.unwrap();
            out.write_all(&u32::MAX.to_be_bytes()).await.unwrap();
            connection.closed().await;
            let (connection, _) = dialler.connect(address, None).await.unwrap();
            let (mut out, _inn) = connection.open_bi().await.unwrap();
            frame::send(&mut out, &violin_common::control::mesh::Message::Leave).await.unwrap();
            connection.closed().await;
        });
    });

    assert!(site.counter(1, "control.malformed") >= 8);
    assert_eq!(site.counter(1, "control.protocol-errors"), 1);
    site.start(2);
    until("it is welcome when it speaks properly", || site.connected(1) == 1);
}

fn owned(interface: &str, ownership: Ownership) -> SwitchRequest {
    SwitchRequest::PortAdd(PortSpec {
        vni: vni(VNI),
        kind: PortKind::Packet { interface: interface.into() },
        owned: Some(OwnedMac { mac: mac(9), vm: "alpha-c1".parse().unwrap(), ownership }),
    })
}

/// A guest of `number` that answers as 192.168.5.9 with the MAC of the moving VM.
fn moving_guest(site: &Site, number: usize) -> Namespace {
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

#[test]
#[ignore = "needs root"]
fn an_owned_mac_moves_with_its_vm_and_back_when_aborted() {
    let mut site = Site::new(3);
    site.guest(2);
    for number in 1..=3 {
        site.start(number);
    }
    until("the mesh stands", || (1..=3).all(|number| site.connected(number) == 2));
    let (here, there) = (moving_guest(&site, 1), moving_guest(&site, 3));
    let key = |to: Option<usize>| match to {
        Some(to) => SwitchRequest::MoveGrant { vni: vni(VNI), mac: mac(9), to: host(to) },
        None => SwitchRequest::MoveStopped { vni: vni(VNI), mac: mac(9) },
    };
    let running = || SwitchRequest::MoveRunning { vni: vni(VNI), mac: mac(9) };
    let abort = || SwitchRequest::MoveAbort { vni: vni(VNI), mac: mac(9) };

    here.run("ip link set dev e0 up");
    assert_eq!(site.ask(1, owned("m", Ownership::Here { epoch: Epoch::FIRST })), Ok(SwitchReply::Port(PortId(1))));
    until("the VM is reached at h1", || reaches(&site.guests[&2], &here, 9));
    let refused = site.ask(1, key(Some(3))).unwrap_err();
    assert!(refused.contains("no port waiting"), "{refused}");
    assert_eq!(site.ask(3, owned("m", Ownership::Arriving)), Ok(SwitchReply::Port(PortId(1))));
    assert_eq!(site.ask(1, key(Some(3))), Ok(SwitchReply::Done));
    assert_eq!((site.state(1, mac(9)), site.state(3, mac(9))), (Some(MoveState::Granted), Some(MoveState::Prepared)));
    assert_eq!(site.ask(1, abort()), Ok(SwitchReply::Done));
    assert_eq!((site.state(1, mac(9)), site.state(3, mac(9))), (Some(MoveState::Owned), Some(MoveState::Released)));
    assert!(reaches(&site.guests[&2], &here, 9));

    assert_eq!(site.ask(1, key(Some(3))), Ok(SwitchReply::Done));
    here.run("ip link set dev e0 down");
    assert_eq!(site.ask(1, key(None)), Ok(SwitchReply::Done));
    there.run("ip link set dev e0 up");
    assert_eq!(site.ask(3, running()), Ok(SwitchReply::Done));
    until("the VM is reached at h3", || reaches(&site.guests[&2], &there, 9));
    until("the source knows", || site.state(1, mac(9)) == Some(MoveState::Gone));
    let Ok(SwitchReply::Fdb(fdb)) = site.ask(2, SwitchRequest::FdbList { vni: None }) else { panic!("no FDB") };
    let entry = fdb.iter().find(|entry| entry.mac == mac(9)).expect("owned");
    assert_eq!(
        (&entry.place, entry.epoch),
        (&FdbPlace::Host(host(3)), Some(Epoch::FIRST.after(3))),
        "a refused and an aborted grant count"
    );

    // The old place comes to life again: nothing of it enters the network.
    here.run("ip link set dev e0 up");
    let before = site.counter(1, "drop.gate-closed");
    assert!(!reaches(&here, &site.guests[&2], 2));
    assert!(site.counter(1, "drop.gate-closed") > before);
    assert!(reaches(&site.guests[&2], &there, 9));

    // The owner's switch is killed and its port put back with what its monitor knew: others still find the VM.
    site.daemons.remove(&3);
    until("h1 notices", || site.connected(1) == 1);
    site.start(3);
    assert!(matches!(site.ask(3, owned("m", Ownership::Here { epoch: Epoch::FIRST })), Ok(SwitchReply::Port(_))));
    until("the VM is reached again", || reaches(&site.guests[&2], &there, 9));
    assert_eq!(site.state(1, mac(9)), Some(MoveState::Gone));
}

/// The VM moves from h1 to h3 while one of their switches is killed in that state of the source or destination.
fn moves_although_killed(killed: usize, state: MoveState) {
    let mut site = Site::new(3);
    site.guest(2);
    for number in 1..=3 {
        site.start(number);
    }
    until("the mesh stands", || (1..=3).all(|number| site.connected(number) == 2));
    let (here, there) = (moving_guest(&site, 1), moving_guest(&site, 3));
    let (vni, mac) = (vni(VNI), mac(9));
    here.run("ip link set dev e0 up");
    site.ask(1, owned("m", Ownership::Here { epoch: Epoch::FIRST })).unwrap();
    until("the VM is reached at h1", || reaches(&site.guests[&2], &here, 9));
    site.ask(3, owned("m", Ownership::Arriving)).unwrap();
    site.ask(1, SwitchRequest::MoveGrant { vni, mac, to: host(3) }).unwrap();
    let kill = |site: &mut Site, now: &[MoveState]| {
        if now.contains(&state) {
            site.daemons.remove(&killed);
            site.start(killed);
            if killed == 3 {
                site.ask(3, owned("m", Ownership::Arriving)).unwrap();
            }
        }
    };

    kill(&mut site, &[MoveState::Granted, MoveState::Prepared]);
    here.run("ip link set dev e0 down");
    // A source that started anew without its port has nothing to stop.
    let _ = site.ask(1, SwitchRequest::MoveStopped { vni, mac });
    kill(&mut site, &[MoveState::Fenced]);
    there.run("ip link set dev e0 up");
    let began = Instant::now();
    site.ask(3, SwitchRequest::MoveRunning { vni, mac }).unwrap();
    println!("h{killed} killed in {state:?}: owned after {:?}", began.elapsed());
    kill(&mut site, &[MoveState::Gone]);

    until("the VM is reached at h3", || reaches(&site.guests[&2], &there, 9));
    assert_eq!(site.state(3, mac), Some(MoveState::Owned));
    until("the source knows its place", || matches!(site.state(1, mac), Some(MoveState::Gone | MoveState::Elsewhere)));
}

#[test]
#[ignore = "needs root"]
fn a_move_survives_the_death_of_its_source_when_granted() {
    moves_although_killed(1, MoveState::Granted);
}

#[test]
#[ignore = "needs root"]
fn a_move_survives_the_death_of_its_source_when_fenced() {
    moves_although_killed(1, MoveState::Fenced);
}

#[test]
#[ignore = "needs root"]
fn a_move_survives_the_death_of_its_source_when_gone() {
    moves_although_killed(1, MoveState::Gone);
}

#[test]
#[ignore = "needs root"]
fn a_move_survives_the_death_of_its_destination_when_prepared() {
    moves_although_killed(3, MoveState::Prepared);
}

#[test]
#[ignore = "needs root"]
fn an_arriving_port_waits_for_its_interface() {
    let mut site = Site::new(1);
    site.start(1);

    let Ok(SwitchReply::Port(port)) = site.ask(1, owned("m", Ownership::Arriving)) else { panic!("refused") };
    let missing = site.ask(
        1,
        SwitchRequest::PortAdd(PortSpec { vni: vni(VNI), kind: PortKind::Packet { interface: "none".into() }, owned: None }),
    );
    assert!(missing.unwrap_err().contains("interface none is not there"));
    let _guest = moving_guest(&site, 1);
    until("the host's stack is kept off the interface", || {
        String::from_utf8_lossy(&try_run(&format!("nsenter --net={} nft list ruleset", site.hosts[&1].path())).stdout)
            .contains("\"m\"")
    });
    assert_eq!(site.ask(1, SwitchRequest::PortRemove { port }), Ok(SwitchReply::Done));
    until("the guard is undone", || {
        !String::from_utf8_lossy(&try_run(&format!("nsenter --net={} nft list ruleset", site.hosts[&1].path())).stdout)
            .contains("\"m\"")
    });
}

#[test]
#[ignore = "needs root"]
fn a_reload_adds_and_removes_ports_and_networks() {
    let mut site = Site::new(1);
    site.guest(1);
    site.start(1);
    let ports = |site: &Site| match site.ask(1, SwitchRequest::PortList) {
        Ok(SwitchReply::Ports(ports)) => ports.len(),
        other => panic!("{other:?}"),
    };
    let networks = |site: &Site| match site.ask(1, SwitchRequest::NetworkList) {
        Ok(SwitchReply::Networks(networks)) => networks.len(),
        other => panic!("{other:?}"),
    };
    until("the port is made", || ports(&site) == 1);

    site.config(1, "pki", "[[network]]\nvni = 5\n[[network]]\nvni = 6\n");
    site.daemons[&1].signal(nix::sys::signal::Signal::SIGHUP);

    until("the port is gone and the network there", || ports(&site) == 0 && networks(&site) == 2);
    site.config(1, "pki", "[[network]]\nvni = 5\nwrong = 1\n");
    site.daemons[&1].signal(nix::sys::signal::Signal::SIGHUP);
    until("the error is logged", || {
        std::fs::read_to_string(site.directory.path().join("h1.log")).unwrap().contains("unknown field `wrong`")
    });
    assert_eq!(networks(&site), 2);
}
