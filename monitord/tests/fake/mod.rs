//! A switch and a hypervisor that say what a test wants, and a monitor between them. Needs no root.
#![allow(dead_code)] // Each test program uses its part.
#![allow(unreachable_pub)] // A test program has no outside.

use monitord::hypervisor::{
    Change, Hypervisor, HypervisorError, HypervisorEvent, ImageFiles, MoveStatistics, Usage, Whereabouts,
};
use monitord::io::images::Images;
use monitord::io::monitor::{Monitor, Parts};
use monitord::io::record::{Record, Records};
use monitord::transaction::Standing;
use std::collections::{HashMap, HashSet};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use violin_common::api::Response;
use violin_common::api::switch::{
    MoveSeen, MoveState, NetworkSpec, Ownership, PortSeen, PortTraffic, SwitchReply, SwitchRequest,
};
use violin_common::config::monitor::MonitorConfig;
use violin_common::control::monitor::{Answer, Command, MigrationMode, Role, VmSeen, VmSpec, VmState};
use violin_common::{Epoch, HostId, MacAddr, PortId, VmId};

pub const LIMIT: Duration = Duration::from_secs(180);

/// Waits until `fact` holds.
pub fn until(what: &str, limit: Duration, mut fact: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !fact() {
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What a fake switch knows and was told.
#[derive(Debug, Default)]
pub struct SwitchState {
    pub ports: Vec<PortSeen>,
    moves: HashMap<MacAddr, MoveState>,
    /// MACs another switch owns, whatever happens here.
    elsewhere: HashSet<MacAddr>,
    /// Destinations are lost for good: of a move that was granted, only a word said after its abort takes the MAC back.
    pub peers_lost: bool,
    /// MACs whose grant was aborted and that nobody released.
    aborted: HashSet<MacAddr>,
    pub told: Vec<SwitchRequest>,
}

impl SwitchState {
    /// As after a kill and a start.
    pub fn restart(&mut self) {
        self.ports.clear();
        self.moves.clear();
    }

    pub fn was_told_running(&self) -> bool {
        self.told.iter().any(|request| matches!(request, SwitchRequest::MoveRunning { .. }))
    }

    fn answer(&mut self, request: SwitchRequest) -> Response<SwitchReply> {
        self.told.push(request.clone());
        let no_port = || Response::Error("no port of this host has that MAC: make one first".into());
        let mut step = |mac: MacAddr, state| match self.moves.get_mut(&mac) {
            Some(old) => {
                *old = state;
                Response::Ok(SwitchReply::Done)
            }
            None => no_port(),
        };
        if self.peers_lost {
            match &request {
                SwitchRequest::MoveAbort { mac, .. } => {
                    self.aborted.insert(*mac);
                    return Response::Ok(SwitchReply::Done);
                }
                SwitchRequest::MoveRunning { mac, .. } if !self.aborted.contains(mac) => return Response::Ok(SwitchReply::Done),
                _ => {}
            }
        }
        match request {
            SwitchRequest::PortList => Response::Ok(SwitchReply::Ports(self.ports.clone())),
            SwitchRequest::Traffic => Response::Ok(SwitchReply::Traffic(Vec::new())),
            SwitchRequest::PortAdd(spec) => {
                let port = PortId(1 + u32::try_from(self.ports.len()).unwrap());
                let owned = spec.owned.clone().unwrap();
                let state = if owned.ownership == Ownership::Arriving { MoveState::Absent } else { MoveState::Owned };
                self.moves.insert(owned.mac, state);
                let traffic = PortTraffic::default();
                self.ports.push(PortSeen { port, spec, state: Some(state), epoch: None, traffic });
                Response::Ok(SwitchReply::Port(port))
            }
            SwitchRequest::PortRemove { port } => {
                self.ports.retain(|seen| seen.port != port);
                Response::Ok(SwitchReply::Done)
            }
            SwitchRequest::MoveGrant { mac, .. } => step(mac, MoveState::Granted),
            SwitchRequest::MoveStopped { mac, .. } => step(mac, MoveState::Fenced),
            SwitchRequest::MoveRunning { mac, .. } | SwitchRequest::MoveAbort { mac, .. } => step(mac, MoveState::Owned),
            SwitchRequest::MoveStatus { mac, .. } => match self.moves.get(&mac) {
                Some(state) => Response::Ok(SwitchReply::Move(MoveSeen {
                    state: if self.elsewhere.contains(&mac) { MoveState::Gone } else { *state },
                    epoch: Epoch::FIRST,
                    host: None,
                    entered: Vec::new(),
                })),
                None => no_port(),
            },
            _ => Response::Ok(SwitchReply::Done),
        }
    }
}

fn serve(stream: &UnixStream, state: &Mutex<SwitchState>) {
    let mut line = String::new();
    if BufReader::new(stream).read_line(&mut line).is_ok_and(|read| read > 0) {
        let answer = state.lock().unwrap().answer(serde_json::from_str(&line).unwrap());
        let mut writer = stream;
        let _ = writeln!(writer, "{}", serde_json::to_string(&answer).unwrap());
    }
}

/// A hypervisor that has what the test says.
#[derive(Debug)]
pub struct Fake {
    pub list: Mutex<Vec<VmSeen>>,
    /// Cannot be reached: nothing is listed.
    pub away: AtomicBool,
    /// How often it was asked for its list meanwhile.
    pub asked_in_vain: AtomicUsize,
    /// How often a move was to be given up.
    pub aborts: AtomicUsize,
    /// Answer to `settle`.
    pub whereabouts: Mutex<Whereabouts>,
    /// How often that was asked for.
    pub looks: AtomicUsize,
    /// Answers to `migrate`, which blocks until there is one.
    outcomes: Mutex<Receiver<Result<MoveStatistics, HypervisorError>>>,
    events: Mutex<Option<Receiver<HypervisorEvent>>>,
    dir: PathBuf,
}

impl Hypervisor for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }
    fn make_interface(&self, _: &VmSpec, _: bool) -> Result<String, HypervisorError> {
        Ok("fake0".into())
    }
    fn remove_interface(&self, _: &VmId) -> Result<(), HypervisorError> {
        Ok(())
    }
    fn start(&self, _: &VmSpec, _: &str, _: Option<&ImageFiles>) -> Result<(), HypervisorError> {
        Ok(())
    }
    fn stop(&self, vm: &VmId) -> Result<(), HypervisorError> {
        self.list.lock().unwrap().retain(|seen| &seen.vm != vm);
        Ok(())
    }
    fn list(&self) -> Result<Vec<VmSeen>, HypervisorError> {
        if self.away.load(Ordering::SeqCst) {
            self.asked_in_vain.fetch_add(1, Ordering::SeqCst);
            return Err(HypervisorError::Unreachable("as the test has it".into()));
        }
        Ok(self.list.lock().unwrap().clone())
    }
    fn console(&self, vm: &VmId) -> PathBuf {
        self.dir.join(vm.as_str())
    }
    fn prepare_incoming(&self, _: &VmSpec, _: &str, _: Option<&ImageFiles>) -> Result<String, HypervisorError> {
        Ok("fake:".into())
    }
    fn cancel_incoming(&self, _: &VmId) -> Result<(), HypervisorError> {
        Ok(())
    }
    fn migrate(
        &self,
        _: &VmId,
        _: &HostId,
        _: &str,
        _: MigrationMode,
        _: &mut dyn FnMut(Option<f64>, &str),
    ) -> Result<MoveStatistics, HypervisorError> {
        self.outcomes.lock().unwrap().recv_timeout(LIMIT).expect("the test says how the move ends")
    }
    fn settle(&self, _: &VmId, uri: &str) -> Result<Whereabouts, HypervisorError> {
        assert_eq!(uri, "fake:");
        self.looks.fetch_add(1, Ordering::SeqCst);
        Ok(self.whereabouts.lock().unwrap().clone())
    }
    fn abort(&self, _: &VmId) -> Result<(), HypervisorError> {
        self.aborts.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn usage(&self, _: &VmId) -> Result<Usage, HypervisorError> {
        Ok(Usage::default())
    }
    fn set_memory(&self, _: &VmId, _: u64) -> Result<(), HypervisorError> {
        Ok(())
    }
    fn set_cpu(&self, _: &VmId, _: u64, _: Option<f64>) -> Result<(), HypervisorError> {
        Ok(())
    }
    fn events(&self) -> Option<Receiver<HypervisorEvent>> {
        self.events.lock().unwrap().take()
    }
}

/// One host without a monitor yet.
#[derive(Debug)]
pub struct Host {
    pub switch: Arc<Mutex<SwitchState>>,
    pub hypervisor: Arc<Fake>,
    pub outcomes: Sender<Result<MoveStatistics, HypervisorError>>,
    events: Sender<HypervisorEvent>,
    pub dir: tempfile::TempDir,
}

impl Host {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let switch = Arc::new(Mutex::new(SwitchState::default()));
        let listener = UnixListener::bind(dir.path().join("switch")).unwrap();
        let state = Arc::clone(&switch);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                serve(&stream.unwrap(), &state);
            }
        });
        let (events, receiver) = channel();
        let (outcomes, ends) = channel();
        let hypervisor = Arc::new(Fake {
            list: Mutex::default(),
            away: AtomicBool::new(false),
            asked_in_vain: AtomicUsize::new(0),
            aborts: AtomicUsize::new(0),
            whereabouts: Mutex::new(Whereabouts::Unclear("as the test has it".into())),
            looks: AtomicUsize::new(0),
            outcomes: Mutex::new(ends),
            events: Mutex::new(Some(receiver)),
            dir: dir.path().to_owned(),
        });
        Self { switch, hypervisor, outcomes, events, dir }
    }

    /// Leaves a record as an earlier monitor would, and lets the hypervisor have the VM.
    pub fn left_behind(&self, number: u8, standing: Standing, state: VmState) -> VmSpec {
        let spec = spec(number);
        let epoch = (!matches!(standing, Standing::Arriving { .. })).then_some(Epoch::FIRST);
        let record = Record { spec: spec.clone(), interface: format!("fake{number}"), epoch, ready: true, standing };
        Records::open(&self.dir.path().join("run")).unwrap().write(&record).unwrap();
        self.has(&spec, state);
        spec
    }

    /// The hypervisor has this VM from now on.
    pub fn has(&self, spec: &VmSpec, state: VmState) {
        let mut list = self.hypervisor.list.lock().unwrap();
        list.retain(|seen| seen.vm != spec.vm);
        list.push(VmSeen { vm: spec.vm.clone(), state, leaving: false });
    }

    pub fn tell(&self, spec: &VmSpec, change: Change) {
        let at = monitord::io::clock::now();
        self.events.send(HypervisorEvent { vm: spec.vm.clone(), at, change }).unwrap();
    }

    /// The destination's switch owns its MAC.
    pub fn gone_elsewhere(&self, spec: &VmSpec) {
        self.switch.lock().unwrap().elsewhere.insert(spec.mac);
    }

    /// Starts the monitor.
    pub fn monitor(&self) -> Arc<Monitor> {
        let dir = self.dir.path().display();
        let config = MonitorConfig::parse(&format!(
            r#"
            host = "h1"
            domain = "d1"
            manager = "192.0.2.1:7472"
            listen = "192.0.2.2:7473"
            switch-socket = "{dir}/switch"
            period = "100ms"
            images = "{dir}/images"
            run = "{dir}/run"
            tls = {{ ca = "ca", cert = "cert", key = "key" }}
            capacity = {{ cores = 2.0, memory-mib = 1024 }}
            driver = {{ kind = "sandbox", shared = "{dir}", guest-program = "none" }}
            "#
        ));
        let images = Arc::new(Images::open(&self.dir.path().join("images"), None).unwrap());
        let hypervisor: Arc<dyn Hypervisor> = self.hypervisor.clone();
        Monitor::open(Parts { config: config.unwrap(), hypervisor, images, group: None }).unwrap()
    }

    pub fn has_port(&self, spec: &VmSpec) -> bool {
        let switch = self.switch.lock().unwrap();
        switch.ports.iter().any(|port| port.spec.owned.as_ref().is_some_and(|owned| owned.vm == spec.vm))
    }

    pub fn move_state(&self, spec: &VmSpec) -> Option<MoveState> {
        self.switch.lock().unwrap().moves.get(&spec.mac).copied()
    }
}

/// Gives a command and waits for its end.
pub fn ask(monitor: &Arc<Monitor>, command: Command) -> Answer {
    monitor.execute(command, &mut |_| {})
}

pub fn spec(number: u8) -> VmSpec {
    VmSpec {
        vm: format!("fake-c{number}").parse().unwrap(),
        environment: "fake".parse().unwrap(),
        role: Role::Compute,
        network: NetworkSpec { vni: violin_common::Vni::new(5).unwrap(), mtu: 1400, ageing_s: 300 },
        mac: format!("52:54:00:05:00:{number:02x}").parse().unwrap(),
        address: std::net::Ipv4Addr::new(10, 5, 0, number),
        prefix_len: 24,
        vcpus: 1,
        memory_mib: 64,
        image: None,
        guest_config: String::new(),
    }
}
