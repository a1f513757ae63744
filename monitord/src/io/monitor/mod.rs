//! The monitor's heart: what it knows of its VMs, and the commands it carries out.
//!
//! All calls block; the link gives each command a thread. Commands for one VM follow each other (but for giving up a move
//! and awaiting an arrival); what the hypervisor tells is handled at once beside them. Read [`start`], then [`moves`].

mod doubt;
mod events;
mod moves;
mod observe;
mod restart;
mod start;

use super::access::Accesses;
use super::cgroup::HostGroup;
use super::each::OneEach;
use super::images::Images;
use super::record::{Record, Records};
use super::switch::Switch;
use crate::hypervisor::Hypervisor;
use crate::transaction::Standing;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant as Clock;
use tokio::sync::broadcast;
use violin_common::api::switch::{Counter, OwnedMac, Ownership, PortKind, PortSpec, SwitchReply, SwitchRequest};
use violin_common::config::monitor::MonitorConfig;
use violin_common::control::monitor::{
    Answer, Command, DestinationFigures, Hello, PROTOCOL, Report, SourceFigures, VmSeen, VmState,
};
use violin_common::{HostId, Instant, VmId};

/// One monitor.
pub struct Monitor {
    config: MonitorConfig,
    hypervisor: Arc<dyn Hypervisor>,
    switch: Switch,
    images: Arc<Images>,
    group: Option<HostGroup>,
    records: Records,
    accesses: Accesses,
    reports: broadcast::Sender<Report>,
    vms: Mutex<BTreeMap<VmId, Vm>>,
    /// Told whenever `vms` changes in a way somebody may wait for.
    changed: Condvar,
    /// One command at a time for each VM.
    locks: OneEach<VmId>,
    /// Those that are being stopped, or are to be.
    stops: OneEach<VmId>,
    /// Moves away that are over, and when they were, for the manager that asks again.
    departed: Mutex<HashMap<VmId, (Clock, HostId, SourceFigures)>>,
    /// Whether the quota stands as it should.
    quota: Mutex<Option<Option<f64>>>,
}

impl std::fmt::Debug for Monitor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Monitor").field("host", &self.config.host).finish_non_exhaustive()
    }
}

/// What the monitor knows of one VM.
#[derive(Debug, Clone)]
struct Vm {
    record: Record,
    state: VmState,
    /// Since when its guest boots, and whether that has taken too long to wait for.
    booting: Option<Clock>,
    /// Whether its port was made; a switch that has lost it gets it again.
    attached: bool,
    /// The present move's times.
    stopped: Option<Instant>,
    arrival: DestinationFigures,
    /// Whether this switch owns its MAC after an arrival.
    owned: bool,
    /// Whether an earlier monitor left it and it has not been put right yet: its record may be wrong.
    left_behind: bool,
}

impl Vm {
    fn new(record: Record, state: VmState) -> Self {
        let (arrival, owned) = (DestinationFigures::default(), false);
        Self { record, state, booting: None, attached: false, stopped: None, arrival, owned, left_behind: false }
    }
}

/// What stopped a command, in words for the operator.
type Trouble = String;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Parts a monitor is put together from.
#[allow(missing_debug_implementations)] // Holds a driver, which need not be printable.
pub struct Parts {
    /// Configuration.
    pub config: MonitorConfig,
    /// Driver.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// Image store.
    pub images: Arc<Images>,
    /// The guests' CPU group, if there is one.
    pub group: Option<HostGroup>,
}

impl Monitor {
    /// Puts a monitor together and takes up what an earlier one left: see [`restart`].
    ///
    /// Errors: the run directory cannot be used.
    pub fn open(parts: Parts) -> std::io::Result<Arc<Self>> {
        let Parts { config, hypervisor, images, group } = parts;
        let switch = Switch::new(config.switch_socket.clone());
        let monitor = Arc::new(Self {
            images,
            group,
            records: Records::open(&config.run)?,
            accesses: Accesses::open(&config.run, &config.host, config.mark.as_deref(), switch.clone())?,
            reports: broadcast::channel(1024).0,
            vms: Mutex::default(),
            changed: Condvar::new(),
            locks: OneEach::default(),
            stops: OneEach::default(),
            departed: Mutex::default(),
            quota: Mutex::default(),
            config,
            hypervisor,
            switch,
        });
        monitor.take_up();
        monitor.follow_events();
        monitor.observe();
        Ok(monitor)
    }

    /// What is said first to the manager.
    pub fn hello(&self) -> Hello {
        Hello {
            protocol: PROTOCOL,
            host: self.config.host.clone(),
            domain: self.config.domain.clone(),
            driver: self.hypervisor.name().into(),
            cores: self.config.capacity.cores,
            memory_mib: self.config.capacity.memory_mib,
            image_address: self.config.listen,
            images: self.images.list(),
            version: env!("CARGO_PKG_VERSION").into(),
        }
    }

    /// Reports from now on.
    pub fn reports(&self) -> broadcast::Receiver<Report> {
        self.reports.subscribe()
    }

    /// How every VM is, as far as known without asking the hypervisor.
    pub fn known(&self) -> Vec<VmSeen> {
        lock(&self.vms).values().map(seen).collect()
    }

    /// Whether a move away from this host is under way.
    pub fn is_moving(&self) -> bool {
        lock(&self.vms).values().any(|vm| seen(vm).leaving)
    }

    /// Carries out a command to its end; `progress` is told what is being done.
    pub fn execute(self: &Arc<Self>, command: Command, progress: &mut dyn FnMut(Answer)) -> Answer {
        let name = format!("{command:?}");
        tracing::debug!(command = %name.split([' ', '(']).next().unwrap_or_default(), "begun");
        let result = match command {
            Command::Start { spec, epoch, image_sources } => {
                let vm = spec.vm.clone();
                self.alone(&vm, || self.start(&spec, epoch, &image_sources, progress)).map(|()| Answer::Done)
            }
            Command::Stop { vm } => self.stop_once(&vm).map(|()| Answer::Done),
            Command::PrepareIncoming { spec, image_sources } => {
                let vm = spec.vm.clone();
                self.alone(&vm, || self.prepare(&spec, &image_sources, progress)).map(|uri| Answer::Prepared { uri })
            }
            Command::CancelIncoming { vm } => self.alone(&vm, || self.cancel(&vm)).map(|()| Answer::Done),
            Command::Migrate { vm, to, uri, mode } => {
                self.alone(&vm, || self.migrate(&vm, &to, &uri, mode, progress)).map(Answer::Migrated)
            }
            Command::AbortMigration { vm } => self.hypervisor.abort(&vm).map(|()| Answer::Done).map_err(|e| e.to_string()),
            Command::FinishIncoming { vm } => self.finish(&vm).map(Answer::Arrived),
            Command::AccessOpen { environment, network, address, prefix_len } => self
                .accesses
                .open_one(&environment, &network, address, prefix_len)
                .map(|netns| Answer::Access { netns })
                .map_err(|error| format!("opening the access namespace of {environment}: {error}")),
            Command::AccessClose { environment } => self
                .accesses
                .close(&environment)
                .map(|()| Answer::Done)
                .map_err(|error| format!("closing the access namespace of {environment}: {error}")),
            Command::NetworkRemove { vni } => {
                let removed = self.switch.tell(&SwitchRequest::NetworkRemove { vni });
                removed.map(|()| Answer::Done).map_err(|error| error.to_string())
            }
            Command::SetMemory { vm, memory_mib } => {
                self.hypervisor.set_memory(&vm, memory_mib).map(|()| Answer::Done).map_err(|e| e.to_string())
            }
            Command::SetCpu { vm, shares, cap } => {
                self.hypervisor.set_cpu(&vm, shares, cap).map(|()| Answer::Done).map_err(|e| e.to_string())
            }
            Command::List => self.list().map(Answer::Vms),
            Command::Describe { vm } => self.describe(&vm),
            Command::Clock => Ok(Answer::Clock { at: crate::io::clock::now(), name: violin_channel::clock::name() }),
            Command::Switch(request) => {
                let mut reply = self.switch.ask(&request).map_err(|error| error.to_string());
                // The monitor has no socket of its own: what it counts stands beside what its switch does.
                if let Ok(SwitchReply::Counters(counters)) = &mut reply {
                    let value = violin_channel::log::lines_lost();
                    counters.push(Counter { name: "monitor.log-lines-lost".into(), value });
                }
                Ok(Answer::Switch(reply))
            }
        };
        result.unwrap_or_else(|words| {
            tracing::warn!(command = %name.split([' ', '(']).next().unwrap_or_default(), %words, "failed");
            Answer::Failed(words)
        })
    }

    /// Runs `work` while no other command for this VM runs.
    fn alone<T>(&self, vm: &VmId, work: impl FnOnce() -> T) -> T {
        self.locks.alone(vm, work)
    }

    /// What the hypervisor has, with what only the monitor knows: whether a guest still boots, whether it leaves, and what is
    /// prepared for. A hypervisor need not know of an arrival before it comes, and one nobody is told of is never cancelled.
    fn list(&self) -> Result<Vec<VmSeen>, Trouble> {
        let mut list = self.hypervisor.list().map_err(|error| error.to_string())?;
        let vms = lock(&self.vms);
        for seen in &mut list {
            if let Some(vm) = vms.get(&seen.vm) {
                seen.leaving |= self::seen(vm).leaving;
                if seen.state == VmState::Running && vm.state == VmState::Booting {
                    seen.state = VmState::Booting;
                }
            }
        }
        let unnamed: Vec<_> = vms
            .values()
            .filter(|vm| matches!(vm.record.standing, Standing::Arriving { .. }))
            .map(|vm| vm.record.spec.vm.clone())
            .filter(|vm| list.iter().all(|seen| &seen.vm != vm))
            .collect();
        list.extend(unnamed.into_iter().map(|vm| VmSeen { vm, state: VmState::Arriving, leaving: false }));
        Ok(list)
    }

    /// How a VM was started, for a manager that has lost its journal.
    fn describe(&self, vm: &VmId) -> Result<Answer, Trouble> {
        let vms = lock(&self.vms);
        let known = vms.get(vm).ok_or_else(|| format!("got VM {vm}, of which this monitor has no record"))?;
        Ok(Answer::Described { spec: Box::new(known.record.spec.clone()), epoch: known.record.epoch })
    }

    /// Changes what is known of a VM, keeps it on disk and wakes who waits; `None`: it is not known.
    fn change<T>(&self, vm: &VmId, work: impl FnOnce(&mut Vm) -> T) -> Option<T> {
        let mut vms = lock(&self.vms);
        let known = vms.get_mut(vm)?;
        let (record, before) = (known.record.clone(), seen(known));
        let result = work(known);
        if record != known.record
            && let Err(error) = self.records.write(&known.record)
        {
            tracing::error!(vm = %vm, %error, "the record was not written; a restart would know the old one");
        }
        let after = seen(known);
        drop(vms);
        self.changed.notify_all();
        if before != after {
            self.report(after);
        }
        Some(result)
    }

    /// Begins to know a VM.
    fn remember(&self, vm: Vm) -> Result<(), Trouble> {
        self.records.write(&vm.record).map_err(|error| format!("writing the VM's record: {error}"))?;
        let seen = seen(&vm);
        lock(&self.vms).insert(vm.record.spec.vm.clone(), vm);
        self.report(seen);
        Ok(())
    }

    /// Forgets a VM.
    fn forget(&self, vm: &VmId) {
        if let Err(error) = self.records.remove(vm) {
            tracing::error!(vm = %vm, %error, "the record was not removed; a restart would look for this VM");
        }
        lock(&self.vms).remove(vm);
        self.changed.notify_all();
    }

    fn report(&self, seen: VmSeen) {
        // Nobody listening: the manager asks for a list when it is back.
        let _ = self.reports.send(Report::Vm(seen));
    }

    /// Makes a VM's network and port at the switch.
    fn attach(&self, record: &Record) -> Result<(), Trouble> {
        let ownership = match (&record.standing, record.epoch) {
            (Standing::Here | Standing::Leaving { .. }, Some(epoch)) => Ownership::Here { epoch },
            _ => Ownership::Arriving,
        };
        let spec = &record.spec;
        let owned = Some(OwnedMac { mac: spec.mac, vm: spec.vm.clone(), ownership });
        let kind = PortKind::Packet { interface: record.interface.clone() };
        self.switch.tell(&SwitchRequest::NetworkAdd(spec.network.clone())).map_err(|error| error.to_string())?;
        self.switch
            .add_port(PortSpec { vni: spec.network.vni, kind, owned })
            .map_err(|error| format!("adding the port of {}: {error}", spec.vm))?;
        self.change(&spec.vm, |vm| vm.attached = true);
        Ok(())
    }

    fn remove_interface(&self, vm: &VmId) -> Result<(), Trouble> {
        self.hypervisor.remove_interface(vm).map_err(|error| error.to_string())
    }
}

/// A VM as it is told to the manager.
fn seen(vm: &Vm) -> VmSeen {
    let leaving = matches!(vm.record.standing, Standing::Leaving { .. });
    VmSeen { vm: vm.record.spec.vm.clone(), state: vm.state, leaving }
}
