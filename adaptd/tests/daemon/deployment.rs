//! A real adaptd process and monitors that stand in for real ones: they speak the real protocol over real QUIC, and their
//! hypervisors are a table. Any command can be held or failed, so that the manager can be killed in the middle of it.

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant as Wall};
use tokio::task::JoinHandle;
use violin_channel::quic::{self, alpn};
use violin_channel::tls::{Credentials, Timing};
use violin_channel::{frame, local};
use violin_common::api::adapt::{AdaptReply, AdaptRequest, MigrationSeen, Outcome};
use violin_common::config::Tls;
use violin_common::control::monitor::{
    Answer, Command, DestinationFigures, Hello, HostSample, Observation, PROTOCOL, Report, SourceFigures, VmSample, VmSeen,
    VmSpec, VmState,
};
use violin_common::{Epoch, HostId, Instant, VmId};

/// What the table of hypervisors holds.
#[derive(Debug, Default)]
pub(crate) struct Table {
    /// VMs by host, with the order in which they may leave.
    pub(crate) vms: BTreeMap<HostId, BTreeMap<VmId, (VmState, bool)>>,
    /// Demand of a VM; 0.02 if not here.
    pub(crate) demand: BTreeMap<VmId, f64>,
    /// Memory really free on a host; 4096 if not here.
    pub(crate) memory_free_mib: BTreeMap<HostId, u64>,
    /// Hosts that observe none of their VMs.
    pub(crate) blind: BTreeSet<HostId>,
    /// Hosts that observe nothing at all, their connection up.
    pub(crate) mute: BTreeSet<HostId>,
    /// Commands held: (host, kind). They wait until they are taken out.
    pub(crate) held: BTreeSet<(String, String)>,
    /// Commands that arrived while held.
    pub(crate) reached: BTreeSet<(String, String)>,
    /// Commands that fail: (host, kind, VM).
    pub(crate) failing: BTreeSet<(String, String, String)>,
    /// How each VM was last started, and its epoch.
    pub(crate) specs: BTreeMap<VmId, (VmSpec, Epoch)>,
    /// Hosts whose monitors do not know of descriptions.
    pub(crate) old: BTreeSet<HostId>,
    /// Observations told, by host.
    pub(crate) observed: BTreeMap<HostId, u32>,
    /// Every command seen, as `HOST KIND VM`, `HOST list`, `HOST close ENVIRONMENT` or `HOST remove network VNI`.
    pub(crate) log: Vec<String>,
}

pub(crate) struct Deployment {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) table: Arc<Mutex<Table>>,
    manager: Option<Child>,
    monitors: BTreeMap<String, tokio::task::JoinHandle<()>>,
    address: SocketAddr,
}

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority() -> Authority {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "authority of a test");
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

fn certificate(directory: &Path, authority: &Authority, host: &str, domain: &str) -> Tls {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec![host.to_owned()]).unwrap();
    params.distinguished_name.push(DnType::CommonName, host);
    params.distinguished_name.push(DnType::OrganizationalUnitName, domain);
    let certificate = params.signed_by(&key, authority).unwrap();
    let path = |end: &str| directory.join(format!("{host}{end}"));
    let tls = Tls { ca: path("-ca.pem"), cert: path(".pem"), key: path(".key") };
    std::fs::write(&tls.ca, authority.pem()).unwrap();
    std::fs::write(&tls.cert, certificate.pem()).unwrap();
    std::fs::write(&tls.key, key.serialize_pem()).unwrap();
    tls
}

pub(crate) const HOSTS: [(&str, &str, f64); 3] = [("h1", "d1", 3.0), ("h2", "d1", 3.0), ("h3", "d2", 4.0)];

impl Deployment {
    /// Three hosts in two domains and a manager in this mode.
    pub(crate) async fn new(mode: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let authority = authority();
        let path = directory.path();
        let address = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let tls = certificate(path, &authority, "manager", "d0");
        let config = format!(
            "listen = \"{address}\"\nsocket = {:?}\njournal = {:?}\nmode = {mode:?}\nperiod = \"100ms\"\nready-timeout = \"20s\"\n\
             [tls]\nca = {:?}\ncert = {:?}\nkey = {:?}\n[policy]\nhalf-life = \"200ms\"\ncooldown = \"1s\"\nmax-age = \"3s\"\n",
            path.join("adaptd.sock"),
            path.join("journal.redb"),
            tls.ca,
            tls.cert,
            tls.key
        );
        std::fs::write(path.join("adaptd.toml"), config).unwrap();
        let table = Arc::default();
        let mut deployment = Self { directory, table, manager: None, monitors: BTreeMap::new(), address };
        for (host, domain, _) in HOSTS {
            certificate(deployment.directory.path(), &authority, host, domain);
            deployment.start_monitor(host);
        }
        deployment.start();
        deployment.until("three hosts are connected", |deployment| deployment.connected() == 3).await;
        deployment
    }

    pub(crate) fn connected(&self) -> usize {
        match self.ask_blocking(&AdaptRequest::HostList) {
            Ok(AdaptReply::Hosts(hosts)) => hosts.iter().filter(|host| host.connected && host.age_s.is_some()).count(),
            _ => 0,
        }
    }

    /// Starts the manager anew with another setting.
    pub(crate) async fn with_setting(&mut self, was: &str, now: &str) {
        self.kill();
        let path = self.directory.path().join("adaptd.toml");
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(was), "{text}");
        std::fs::write(&path, text.replace(was, now)).unwrap();
        self.start();
        self.until("all are back", |deployment| deployment.connected() == 3).await;
    }

    /// Files of the manager that hold these words, wherever in them, by their paths below its folder.
    pub(crate) fn files_with(&self, words: &str) -> Vec<String> {
        fn look(folder: &Path, top: &Path, words: &str, found: &mut Vec<String>) {
            for path in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
                if path.is_dir() {
                    look(&path, top, words, found);
                } else if path.is_file()
                    && std::fs::read(&path).unwrap().windows(words.len()).any(|window| window == words.as_bytes())
                {
                    found.push(path.strip_prefix(top).unwrap().display().to_string());
                }
            }
        }
        let mut found = Vec::new();
        look(self.directory.path(), self.directory.path(), words, &mut found);
        found.sort();
        found
    }

    pub(crate) fn journal(&self) -> PathBuf {
        self.directory.path().join("journal.redb")
    }

    /// Kills the manager, takes its journal away and starts it again.
    pub(crate) async fn lose_the_journal(&mut self) {
        self.kill();
        std::fs::remove_file(self.journal()).unwrap();
        self.start();
        self.until("all are back", |deployment| deployment.connected() == 3).await;
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("adaptd.sock")
    }

    pub(crate) fn start_monitor(&mut self, host: &str) {
        let (_, domain, cores) = HOSTS.into_iter().find(|(name, _, _)| *name == host).unwrap();
        let path = |end: &str| self.directory.path().join(format!("{host}{end}"));
        let tls = Tls { ca: path("-ca.pem"), cert: path(".pem"), key: path(".key") };
        let (address, table) = (self.address, Arc::clone(&self.table));
        let task = tokio::spawn(monitor(host.parse().unwrap(), domain.to_owned(), cores, tls, address, table));
        self.monitors.insert(host.into(), task);
    }

    /// Starts a second monitor with a host's certificate.
    pub(crate) fn start_second_monitor(&mut self, host: &str) {
        let first = self.monitors.remove(host).unwrap();
        self.start_monitor(host);
        let second = self.monitors.insert(host.into(), first).unwrap();
        self.monitors.insert(format!("{host}, the second"), second);
    }

    /// Has a host's monitor run on a thread of its own until `freeze` is heard from: then it hangs, and its connection stands.
    pub(crate) fn freeze_monitor(&mut self, host: &str) -> tokio::sync::oneshot::Sender<()> {
        self.kill_monitor(host);
        let (_, domain, cores) = HOSTS.into_iter().find(|(name, _, _)| *name == host).unwrap();
        let path = |end: &str| self.directory.path().join(format!("{host}{end}"));
        let tls = Tls { ca: path("-ca.pem"), cert: path(".pem"), key: path(".key") };
        let (address, table, host) = (self.address, Arc::clone(&self.table), host.parse().unwrap());
        let (freeze, frozen) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let running = monitor(host, domain.to_owned(), cores, tls, address, table);
                tokio::pin!(running);
                tokio::select! { () = &mut running => {}, _ = frozen => {} }
                // Nothing of it is dropped, and nobody looks after its socket any more.
                loop {
                    std::thread::park();
                }
            });
        });
        freeze
    }

    /// Ends a monitor as SIGKILL would: its connection, not its VMs.
    pub(crate) fn kill_monitor(&mut self, host: &str) {
        self.monitors.remove(host).unwrap().abort();
    }

    /// Starts the manager's process.
    pub(crate) fn start(&mut self) {
        let log = std::fs::File::options().create(true).append(true).open(self.directory.path().join("log")).unwrap();
        self.start_logging(log.into());
    }

    /// The same with another standard error.
    pub(crate) fn start_logging(&mut self, log: Stdio) {
        let child = Process::new(env!("CARGO_BIN_EXE_adaptd"))
            .arg("--config")
            .arg(self.directory.path().join("adaptd.toml"))
            .env("VIOLIN_LOG", "adaptd=debug")
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.manager = Some(child);
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        let mut child = self.manager.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// SIGTERM; returns whether it ended cleanly.
    pub(crate) fn terminate(&mut self) -> bool {
        let mut child = self.manager.take().unwrap();
        assert!(Process::new("kill").arg(child.id().to_string()).status().unwrap().success());
        child.wait().unwrap().success()
    }

    pub(crate) fn ask_blocking(&self, request: &AdaptRequest) -> Result<AdaptReply, String> {
        local::blocking::ask(&self.socket(), request)
    }

    /// Asks what may never be answered, since the manager is killed meanwhile.
    pub(crate) fn spawn_ask(&self, request: AdaptRequest) -> JoinHandle<Result<AdaptReply, String>> {
        let socket = self.socket();
        tokio::spawn(async move { local::ask(&socket, &request).await })
    }

    /// Asks and skips progress.
    pub(crate) async fn ask(&self, request: AdaptRequest) -> Result<AdaptReply, String> {
        last_answer(&self.socket(), &request).await
    }

    /// Starts an environment from its shipped file.
    pub(crate) async fn up(&self, name: &str, placement: &[(&str, &str)]) {
        let answer = self.try_up(name, placement).await;
        assert_eq!(answer, Ok(AdaptReply::Done), "{}", self.log());
    }

    /// The same, where it may be refused.
    pub(crate) async fn try_up(&self, name: &str, placement: &[(&str, &str)]) -> Result<AdaptReply, String> {
        self.ask(self.env_up(name, placement)).await
    }

    /// What asks for that.
    #[allow(clippy::unused_self)] // Reads as what it belongs to.
    pub(crate) fn env_up(&self, name: &str, placement: &[(&str, &str)]) -> AdaptRequest {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../configs/environments/{name}.toml"));
        let spec = violin_common::config::environment::EnvironmentSpec::parse(&std::fs::read_to_string(path).unwrap()).unwrap();
        let placement = placement.iter().map(|(node, host)| ((*node).to_owned(), host.parse().unwrap())).collect();
        AdaptRequest::EnvUp { spec, placement, image: None }
    }

    /// Starts one like that of a shipped file, by another name and with a changed text.
    pub(crate) async fn try_up_as(
        &self,
        file: &str,
        name: &str,
        change: impl FnOnce(String) -> String,
    ) -> Result<AdaptReply, String> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../configs/environments/{file}.toml"));
        let text = std::fs::read_to_string(path).unwrap().replace(&format!("name = {file:?}"), &format!("name = {name:?}"));
        let spec = violin_common::config::environment::EnvironmentSpec::parse(&change(text)).unwrap();
        self.ask(AdaptRequest::EnvUp { spec, placement: BTreeMap::new(), image: None }).await
    }

    pub(crate) fn busy(&self, vms: &[&str]) {
        let mut table = self.table.lock().unwrap();
        table.demand.extend(vms.iter().map(|vm| (vm.parse().unwrap(), 0.98)));
    }

    pub(crate) fn hold(&self, host: &str, kind: &str) {
        self.table.lock().unwrap().held.insert((host.into(), kind.into()));
    }

    pub(crate) fn release(&self) {
        self.table.lock().unwrap().held.clear();
    }

    pub(crate) fn release_one(&self, host: &str, kind: &str) {
        self.table.lock().unwrap().held.remove(&(host.into(), kind.into()));
    }

    pub(crate) fn fail(&self, host: &str, kind: &str, vm: &str) {
        self.table.lock().unwrap().failing.insert((host.into(), kind.into(), vm.into()));
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// Hosts on which a VM runs, by the hypervisors' own account.
    pub(crate) fn running(&self, vm: &str) -> Vec<String> {
        let table = self.table.lock().unwrap();
        let vm: VmId = vm.parse().unwrap();
        let on = table.vms.iter().filter(|(_, vms)| vms.get(&vm).is_some_and(|(state, _)| *state == VmState::Running));
        on.map(|(host, _)| host.to_string()).collect()
    }

    /// VMs that are half somewhere.
    pub(crate) fn halves(&self) -> Vec<String> {
        let table = self.table.lock().unwrap();
        let all =
            table.vms.iter().flat_map(|(host, vms)| vms.iter().map(move |(vm, (state, leaving))| (host, vm, state, leaving)));
        all.filter(|(_, _, state, leaving)| **state != VmState::Running || **leaving)
            .map(|(host, vm, state, leaving)| format!("{vm} on {host}: {state:?}, leaving: {leaving}"))
            .collect()
    }

    pub(crate) fn migrations(&self) -> Vec<MigrationSeen> {
        match self.ask_blocking(&AdaptRequest::MigrationList) {
            Ok(AdaptReply::Migrations(list)) => list,
            _ => Vec::new(),
        }
    }

    /// `VM FROM TO` of the moves that were done.
    pub(crate) fn moved(&self) -> Vec<String> {
        let done = self.migrations().into_iter().filter(|seen| seen.outcome == Outcome::Done);
        done.map(|seen| format!("{} {} {}", seen.vm, seen.from, seen.to)).collect()
    }

    pub(crate) fn nothing_moves(&self) -> bool {
        matches!(self.ask_blocking(&AdaptRequest::Status), Ok(AdaptReply::Status(status)) if status.moving == 0)
    }

    /// Waits for a fact, at most 30 s.
    pub(crate) async fn until(&self, what: &str, mut fact: impl FnMut(&Self) -> bool) {
        let end = Wall::now() + Duration::from_secs(180);
        while !fact(self) {
            let table = self.table.lock().unwrap();
            assert!(Wall::now() < end, "not within 30 s: {what}\n{:#?}\n{}", table.log, self.log());
            drop(table);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until a held command has arrived.
    pub(crate) async fn until_reached(&self, host: &str, kind: &str) {
        let wanted = (host.to_owned(), kind.to_owned());
        self.until(&format!("{kind} reaches {host}"), |deployment| deployment.table.lock().unwrap().reached.contains(&wanted))
            .await;
    }
}

/// Asks and skips progress.
pub(crate) async fn last_answer(socket: &Path, request: &AdaptRequest) -> Result<AdaptReply, String> {
    let mut lines = local::watch::<_, AdaptReply>(socket, request).await?;
    loop {
        match lines.next().await {
            Some(Ok(AdaptReply::Progress(_))) => {}
            Some(answer) => return answer,
            None => return Err("no answer".into()),
        }
    }
}

impl Drop for Deployment {
    fn drop(&mut self) {
        if let Some(mut child) = self.manager.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// One monitor: connects, reports, obeys; connects again when the manager is gone.
async fn monitor(host: HostId, domain: String, cores: f64, tls: Tls, manager: SocketAddr, table: Arc<Mutex<Table>>) {
    let credentials = Arc::new(Credentials::load(&tls).unwrap());
    let endpoint = quic::dialler(manager, credentials, alpn::MONITOR, Timing::BRISK).unwrap();
    table.lock().unwrap().vms.entry(host.clone()).or_default();
    loop {
        let Ok((connection, _)) = endpoint.connect(manager, None).await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let mut reports = connection.open_uni().await.unwrap();
        let hello = Report::Hello(Hello {
            protocol: PROTOCOL,
            host: host.clone(),
            domain: domain.parse().unwrap(),
            driver: "table".into(),
            cores,
            memory_mib: 4096,
            image_address: "127.0.0.1:1".parse().unwrap(),
            images: Vec::new(),
            version: "0".into(),
        });
        if frame::send(&mut reports, &hello).await.is_err() {
            continue;
        }
        loop {
            tokio::select! {
                stream = connection.accept_bi() => {
                    let Ok((mut send, mut recv)) = stream else { break };
                    let (host, table) = (host.clone(), Arc::clone(&table));
                    tokio::spawn(async move {
                        let Ok(Some(command)) = frame::recv::<Command>(&mut recv).await else { return };
                        let answer = obey(&host, command, &table).await;
                        let _ = frame::send(&mut send, &answer).await;
                        let _ = send.finish();
                        let _ = send.stopped().await;
                    });
                }
                () = tokio::time::sleep(Duration::from_millis(50)) => {
                    if table.lock().unwrap().mute.contains(&host) {
                        continue;
                    }
                    let report = Report::Observation(observe(&host, &table));
                    if frame::send(&mut reports, &report).await.is_err() {
                        break;
                    }
                }
            }
        }
    }
}

fn observe(host: &HostId, table: &Mutex<Table>) -> Observation {
    let mut table = table.lock().unwrap();
    *table.observed.entry(host.clone()).or_default() += 1;
    // As a real monitor does it: what arrives is listed, not observed.
    let seen = table.vms[host].iter().filter(|(_, (state, _))| *state != VmState::Arriving && !table.blind.contains(host));
    let vms = seen.map(|(vm, (state, _))| {
        let demand = table.demand.get(vm).copied().unwrap_or(0.02);
        VmSample { vm: vm.clone(), state: *state, run: demand, wait: 0.0, demand, memory_mib: 256, net_in: 0.0, net_out: 0.0 }
    });
    let memory_free_mib = table.memory_free_mib.get(host).copied().unwrap_or(4096);
    let sample = HostSample { guest_cores: 0.0, memory_free_mib, cpu_pressure: None, memory_pressure: None };
    Observation { at: Instant(0), host: sample, vms: vms.collect(), traffic: Vec::new(), missing: Vec::new() }
}

async fn obey(host: &HostId, command: Command, table: &Mutex<Table>) -> Answer {
    let (kind, vm) = match &command {
        Command::Start { spec, .. } => ("start", Some(&spec.vm)),
        Command::Stop { vm } => ("stop", Some(vm)),
        Command::PrepareIncoming { spec, .. } => ("prepare", Some(&spec.vm)),
        Command::CancelIncoming { vm } => ("cancel", Some(vm)),
        Command::Migrate { vm, .. } => ("migrate", Some(vm)),
        Command::FinishIncoming { vm } => ("finish", Some(vm)),
        Command::List => ("list", None),
        _ => ("other", None),
    };
    let vm = vm.cloned();
    if let Command::AccessClose { environment } = &command {
        table.lock().unwrap().log.push(format!("{host} close {environment}"));
    }
    if command == Command::List {
        table.lock().unwrap().log.push(format!("{host} list"));
    }
    if let Command::NetworkRemove { vni } = &command {
        table.lock().unwrap().log.push(format!("{host} remove network {vni}"));
    }
    if let Some(vm) = &vm {
        let mut table = table.lock().unwrap();
        table.log.push(format!("{host} {kind} {vm}"));
        if kind == "migrate" {
            table.vms.get_mut(host).unwrap().insert(vm.clone(), (VmState::Running, true));
        }
    }
    let gate = (host.to_string(), kind.to_owned());
    while table.lock().unwrap().held.contains(&gate) {
        table.lock().unwrap().reached.insert(gate.clone());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut table = table.lock().unwrap();
    if let Some(vm) = &vm
        && table.failing.contains(&(host.to_string(), kind.to_owned(), vm.to_string()))
    {
        if kind == "migrate" {
            table.vms.get_mut(host).unwrap().insert(vm.clone(), (VmState::Running, false));
        }
        return Answer::Failed(format!("{kind} of {vm} was made to fail"));
    }
    let here = table.vms.get_mut(host).unwrap();
    match command {
        Command::Start { spec, epoch, .. } => {
            here.insert(spec.vm.clone(), (VmState::Running, false));
            table.specs.insert(spec.vm.clone(), (spec, epoch));
            Answer::Done
        }
        Command::Describe { vm } => match table.specs.get(&vm).filter(|_| !table.old.contains(host)) {
            Some((spec, epoch)) => Answer::Described { spec: Box::new(spec.clone()), epoch: Some(*epoch) },
            None => Answer::Failed(format!("got VM {vm}, of which this monitor has no record")),
        },
        Command::Stop { vm } => {
            here.remove(&vm);
            Answer::Done
        }
        Command::PrepareIncoming { spec, .. } => {
            here.insert(spec.vm, (VmState::Arriving, false));
            Answer::Prepared { uri: "table".into() }
        }
        Command::CancelIncoming { vm } => match here.get(&vm) {
            Some((VmState::Running, _)) => Answer::Failed(format!("{vm} runs here")),
            _ => {
                here.remove(&vm);
                Answer::Done
            }
        },
        Command::Migrate { vm, to, .. } => {
            here.remove(&vm);
            table.vms.get_mut(&to).unwrap().insert(vm, (VmState::Running, false));
            Answer::Migrated(SourceFigures::default())
        }
        Command::FinishIncoming { vm } => match here.get(&vm) {
            Some((VmState::Running, _)) => Answer::Arrived(DestinationFigures::default()),
            other => Answer::Failed(format!("{vm} does not run here: {other:?}")),
        },
        Command::List => {
            let seen = here.iter().map(|(vm, (state, leaving))| VmSeen { vm: vm.clone(), state: *state, leaving: *leaving });
            Answer::Vms(seen.collect())
        }
        Command::AccessOpen { .. } => Answer::Access { netns: "/run/netns/table".into() },
        _ => Answer::Done,
    }
}
