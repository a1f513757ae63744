//! The sandbox driver: a guest is a set of processes in namespaces and control groups of this kernel.
//!
//! It makes, freezes, thaws, hands over and ends them; it never speaks to the switch. A guest outlives the monitor: all that
//! is known of it lies in the [`store`], and [`Sandbox::open`] brings every guest of this host back to a running state.
//! Read [`store`] first (whose a guest is), then [`handover`] (how it changes hands).

mod handover;
mod link;
mod spawn;
mod store;

use super::cgroup::{GuestGroup, Hierarchies};
use super::netlink::Netlink;
use super::{clock, private, proc};
use crate::hypervisor::{
    Change, Hypervisor, HypervisorError, HypervisorEvent, ImageFiles, MoveStatistics, Scheduled, Usage, Whereabouts,
};
use std::collections::{HashMap, HashSet};
use std::fmt::Display;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
pub(crate) use store::fnv as short_hash;
use store::{End, Guest, Marker, Place, Store};
use violin_common::control::monitor::{MigrationMode, VmSeen, VmSpec, VmState};
use violin_common::{HostId, VmId};

/// What the driver is told.
#[derive(Debug, Clone)]
pub struct SandboxConfig {
    /// This host.
    pub host: HostId,
    /// Path of its network namespace, by which other monitors open it too.
    pub netns: PathBuf,
    /// Directory shared by the monitors of one machine.
    pub shared: PathBuf,
    /// Part of the name of the control group above all its guests'; none: one taken from the directory's path.
    pub mark: Option<String>,
    /// Extra pause while a guest moves.
    pub pause: Duration,
    /// Program run as a guest's first process.
    pub guest_program: PathBuf,
    /// The host's CPU group below each tree's root ([`super::cgroup::HostGroup::path`]).
    pub partition: Option<PathBuf>,
    /// Real cores per declared one: caps are told in declared ones.
    pub scale: f64,
    /// What control groups are mounted.
    pub trees: Hierarchies,
}

/// The driver. Clones are the same driver.
#[derive(Debug, Clone)]
pub struct Sandbox(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: SandboxConfig,
    store: Store,
    netlink: Netlink,
    netns: File,
    events: Sender<HypervisorEvent>,
    receiver: Mutex<Option<Receiver<HypervisorEvent>>>,
    state: Mutex<State>,
}

/// What only this process knows; losing it loses no guest.
#[derive(Debug, Default)]
struct State {
    /// Network namespaces made for guests not yet started.
    netns: HashMap<VmId, OwnedFd>,
    /// Arrivals prepared.
    arrivals: HashSet<VmId>,
    /// Moves away under way, each with its request to give up.
    leaving: HashMap<VmId, Arc<AtomicBool>>,
    /// Guests whose end is awaited, with their first process.
    watched: HashMap<VmId, i32>,
    /// CPU accounts.
    accounts: HashMap<VmId, Account>,
}

/// A guest's waiting time, kept while its threads come and go.
#[derive(Debug, Default)]
struct Account {
    last: HashMap<i32, proc::TaskTime>,
    total: proc::TaskTime,
    begun: bool,
}

fn refused<E: Display>(asked: impl Into<String>) -> impl FnOnce(E) -> HypervisorError {
    let asked = asked.into();
    move |error| HypervisorError::Refused { asked, said: error.to_string() }
}

impl Sandbox {
    /// Opens the shared directory and brings back to life what belongs to this host: a guest left frozen in the middle of a
    /// move by a killed monitor runs on where it belongs.
    ///
    /// Errors: the directory, the network namespace or the control groups cannot be used.
    pub fn open(config: SandboxConfig) -> Result<Self, HypervisorError> {
        let asked = |what: &str| refused::<std::io::Error>(format!("opening {what}"));
        let store = Store::open(&config.shared).map_err(asked("the shared directory"))?;
        let netns = File::open(&config.netns).map_err(asked("the host's network namespace"))?;
        let netlink = Netlink::open(&config.netns).map_err(asked("rtnetlink"))?;
        let (events, receiver) = channel();
        let receiver = Mutex::new(Some(receiver));
        let driver = Self(Arc::new(Inner { config, store, netlink, netns, events, receiver, state: Mutex::default() }));
        driver.recover().map_err(asked("guests left behind"))?;
        Ok(driver)
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn groups(&self, vm: &VmId) -> GuestGroup {
        self.groups_below(vm, self.config.partition.as_deref())
    }

    fn groups_below(&self, vm: &VmId, partition: Option<&std::path::Path>) -> GuestGroup {
        let own = PathBuf::from(self.store.group(self.config.mark.as_deref())).join(vm.as_str());
        GuestGroup::new(&self.config.trees, partition, vm.as_str(), &own)
    }

    fn end(&self) -> End {
        End { host: self.config.host.clone(), netns: self.config.netns.clone() }
    }

    fn here(&self) -> Place {
        Place::At(self.config.host.clone())
    }

    /// Whether an offered guest is this host's until another takes it.
    fn offered_from_here(&self, vm: &VmId, place: &Place) -> bool {
        self.store.marker(vm, place).is_ok_and(|marker| marker.from.host == self.config.host)
    }

    /// The event, at the present moment.
    fn tell(&self, vm: &VmId, change: Change) {
        let event = HypervisorEvent { vm: vm.clone(), at: clock::now(), change };
        tracing::debug!(vm = %vm, ?change, "guest");
        // Nobody listening means that the daemon is ending.
        let _ = self.events.send(event);
    }

    /// The guest, if it is this host's.
    fn mine(&self, vm: &VmId) -> Result<Guest, HypervisorError> {
        let look = || Ok::<_, std::io::Error>((self.store.place(vm)?, self.store.guest(vm)?));
        match look().map_err(refused(format!("looking up {vm}")))? {
            (Some(place), Some(guest)) if place == self.here() => Ok(guest),
            _ => Err(HypervisorError::NotHere(vm.clone())),
        }
    }

    /// Kills every process of a guest and removes all that was made for it. Safe to do again.
    fn destroy(&self, vm: &VmId) -> std::io::Result<()> {
        use nix::sys::signal::{Signal, kill};
        let groups = self.groups(vm);
        let init = self.store.guest(vm)?.filter(Guest::is_alive).map(|guest| guest.init);
        for pid in init.into_iter().chain(groups.processes()?) {
            let _ = kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
        }
        // A frozen process takes its signal only when thawed (v1).
        if let Err(error) = groups.thaw()
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(vm = %vm, %error, "thawing a guest that ends");
        }
        if let Some(init) = init
            && !spawn::wait_end(init, Some(Duration::from_secs(5)))?
        {
            return Err(std::io::Error::other(format!("process {init} did not end within 5s of SIGKILL")));
        }
        groups.remove()?;
        self.netlink.delete(&link::name(vm))?;
        let mut state = self.state();
        state.netns.remove(vm);
        state.accounts.remove(vm);
        self.store.remove(vm)
    }

    fn launch(&self, spec: &VmSpec, interface: &str, netns: &OwnedFd) -> std::io::Result<Guest> {
        let dir = self.store.dir(&spec.vm);
        private::folder(&dir)?;
        // Killed from here on, the next start finds this file and ends whatever runs.
        fs::write(dir.join(format!("starting.{}", self.config.host)), "")?;
        let config = dir.join("guest.conf");
        private::write(&config, &spec.guest_config)?;
        let console = self.store.console(&spec.vm);
        File::create(&console)?;
        let groups = self.groups(&spec.vm).create()?;
        let program = &self.config.guest_program;
        let init = spawn::spawn(&spawn::Launch { program, config: &config, console: &console, netns, groups: &groups })?;
        let started = proc::start_time(init).ok_or_else(|| {
            let said = fs::read_to_string(&console).unwrap_or_default();
            std::io::Error::other(format!("{} ended at once; its console says {said:?}", program.display()))
        })?;
        let guest = Guest { spec: spec.clone(), init, started, interface: interface.to_owned() };
        self.store.add(&guest, &Marker::running(self.end(), clock::now()))?;
        fs::remove_file(dir.join(format!("starting.{}", self.config.host)))?;
        Ok(guest)
    }
}

impl Hypervisor for Sandbox {
    fn name(&self) -> &'static str {
        "sandbox"
    }

    fn make_interface(&self, spec: &VmSpec, arriving: bool) -> Result<String, HypervisorError> {
        let name = link::name(&spec.vm);
        if arriving || self.0.mine(&spec.vm).is_ok_and(|guest| guest.is_alive()) {
            return Ok(name);
        }
        let netns = self.0.make_link(spec).map_err(refused(format!("making interface {name}")))?;
        self.0.state().netns.insert(spec.vm.clone(), netns);
        Ok(name)
    }

    fn remove_interface(&self, vm: &VmId) -> Result<(), HypervisorError> {
        self.0.state().netns.remove(vm);
        self.0.netlink.delete(&link::name(vm)).map_err(refused(format!("removing interface {}", link::name(vm))))
    }

    fn start(&self, spec: &VmSpec, interface: &str, _image: Option<&ImageFiles>) -> Result<(), HypervisorError> {
        let vm = &spec.vm;
        let asked = format!("starting {vm}");
        let old = self.0.store.guest(vm).map_err(refused(&asked))?;
        if old.is_some_and(|guest| guest.is_alive()) {
            let place = self.0.store.place(vm).map_err(refused(&asked))?;
            return if place == Some(self.0.here()) {
                Ok(())
            } else {
                Err(refused(asked)(format!("it lives already, {place:?} in the shared directory")))
            };
        }
        let Some(netns) = self.0.state().netns.remove(vm) else {
            return Err(refused(asked)("no interface was made for it by this monitor, make one first"));
        };
        self.0.store.remove(vm).map_err(refused(&asked))?;
        let guest = self.0.launch(spec, interface, &netns).map_err(|error| {
            if let Err(left) = self.0.destroy(vm) {
                tracing::warn!(vm = %vm, error = %left, "clearing away a guest that did not start");
            }
            refused(asked)(error)
        })?;
        self.watch(vm, guest.init);
        self.0.tell(vm, Change::Running);
        Ok(())
    }

    fn stop(&self, vm: &VmId) -> Result<(), HypervisorError> {
        let asked = format!("stopping {vm}");
        // Whoever looks for an offer of it looks no longer.
        self.0.state().arrivals.remove(vm);
        match self.0.store.place(vm).map_err(refused(&asked))? {
            Some(Place::To(other)) => {
                // Only a guest nobody else has taken may be ended here.
                let taken = self.0.store.pass(vm, &Place::To(other), &self.0.here()).map_err(refused(&asked))?;
                if !taken {
                    return Ok(());
                }
            }
            Some(Place::At(host)) if host != self.0.config.host => return Ok(()),
            _ => {}
        }
        let was_known = self.0.state().watched.remove(vm).is_some();
        self.0.destroy(vm).map_err(refused(asked))?;
        if was_known {
            self.0.tell(vm, Change::Ended);
        }
        Ok(())
    }

    fn list(&self) -> Result<Vec<VmSeen>, HypervisorError> {
        let all = self.0.store.all().map_err(refused("listing guests"))?;
        let host = &self.0.config.host;
        let mut seen = Vec::new();
        for (vm, place) in all {
            let state = match &place {
                Place::At(at) if at == host => {
                    let alive = self.0.store.guest(&vm).ok().flatten().is_some_and(|guest| guest.is_alive());
                    match self.0.groups(&vm).is_frozen() {
                        _ if !alive => VmState::Stopped,
                        Ok(true) => VmState::Paused,
                        _ => VmState::Running,
                    }
                }
                Place::To(to) if to == host => VmState::Arriving,
                // Also when an earlier monitor offered it: it comes back here if nobody takes it.
                Place::To(_) if self.0.offered_from_here(&vm, &place) => VmState::Paused,
                _ => continue,
            };
            let leaving = state == VmState::Paused && matches!(place, Place::To(_)) || self.0.state().leaving.contains_key(&vm);
            seen.push(VmSeen { vm, state, leaving });
        }
        for vm in &self.0.state().arrivals {
            if !seen.iter().any(|other| &other.vm == vm) {
                seen.push(VmSeen { vm: vm.clone(), state: VmState::Arriving, leaving: false });
            }
        }
        Ok(seen)
    }

    fn console(&self, vm: &VmId) -> PathBuf {
        self.0.store.console(vm)
    }

    fn prepare_incoming(&self, spec: &VmSpec, _interface: &str, _image: Option<&ImageFiles>) -> Result<String, HypervisorError> {
        Ok(self.expect(&spec.vm))
    }

    fn cancel_incoming(&self, vm: &VmId) -> Result<(), HypervisorError> {
        self.0.state().arrivals.remove(vm);
        // An offer not taken stays the source's, which takes it back.
        Ok(())
    }

    fn migrate(
        &self,
        vm: &VmId,
        to: &HostId,
        uri: &str,
        _mode: MigrationMode,
        progress: &mut dyn FnMut(Option<f64>, &str),
    ) -> Result<MoveStatistics, HypervisorError> {
        self.hand_over(vm, to, uri, progress)
    }

    fn settle(&self, vm: &VmId, _uri: &str) -> Result<Whereabouts, HypervisorError> {
        let place = self.0.store.place(vm).map_err(refused(format!("finding out where {vm} is")))?;
        Ok(match place {
            None => Whereabouts::Nowhere,
            Some(Place::At(host)) if host != self.0.config.host => Whereabouts::There,
            Some(Place::To(host)) => Whereabouts::Unclear(format!("it is offered to {host}")),
            Some(Place::At(_)) if self.0.groups(vm).is_frozen().unwrap_or(false) => Whereabouts::Unclear("it is frozen".into()),
            Some(Place::At(_)) => Whereabouts::Here,
        })
    }

    fn abort(&self, vm: &VmId) -> Result<(), HypervisorError> {
        if let Some(give_up) = self.0.state().leaving.get(vm) {
            give_up.store(true, std::sync::atomic::Ordering::Relaxed);
        }
        Ok(())
    }

    fn usage(&self, vm: &VmId) -> Result<Usage, HypervisorError> {
        self.0.mine(vm)?;
        let groups = self.0.groups(vm);
        let processes = groups.processes().map_err(refused(format!("reading usage of {vm}")))?;
        let memory_bytes = processes.iter().map(|pid| proc::resident_bytes(*pid)).sum();
        let tasks: HashMap<_, _> = processes.iter().flat_map(|pid| proc::tasks(*pid)).collect();
        let mut state = self.0.state();
        let account = state.accounts.entry(vm.clone()).or_default();
        account.add(tasks);
        let total = account.total;
        let scheduled = Some(Scheduled { slices: total.slices, sleeps: total.sleeps, ready: total.ready });
        Ok(Usage { run_ns: groups.cpu_ns().unwrap_or(total.run_ns), wait_ns: total.wait_ns, scheduled, memory_bytes })
    }

    fn set_memory(&self, vm: &VmId, memory_mib: u64) -> Result<(), HypervisorError> {
        self.0.mine(vm)?;
        let asked = format!("giving {vm} {memory_mib} MiB");
        self.0.groups(vm).set_memory(memory_mib << 20).map_err(refused(asked))
    }

    fn set_cpu(&self, vm: &VmId, shares: u64, cap: Option<f64>) -> Result<(), HypervisorError> {
        self.0.mine(vm)?;
        let asked = format!("giving {vm} weight {shares}, cap {cap:?}");
        self.0.groups(vm).set_cpu(shares, cap.map(|cap| cap * self.0.config.scale)).map_err(refused(asked))
    }

    fn events(&self) -> Option<Receiver<HypervisorEvent>> {
        self.0.receiver.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Account {
    /// Takes a new reading of all threads. Of a thread new since the last reading all its time counts, of one that ended
    /// the part after its last reading is lost.
    fn add(&mut self, tasks: HashMap<i32, proc::TaskTime>) {
        for (tid, now) in &tasks {
            let grown = match self.last.get(tid) {
                // A smaller figure is another thread under a number used again.
                Some(last) => now.since(*last).unwrap_or(*now),
                None if !self.begun => proc::TaskTime::default(),
                None => *now,
            };
            self.total.add(grown);
        }
        self.total.ready = tasks.values().map(|task| task.ready).sum();
        self.last = tasks;
        self.begun = true;
    }
}
