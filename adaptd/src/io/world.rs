//! What the manager knows, and the one lock around it.

use crate::clocks::Clocks;
use crate::cycle::Settling;
use crate::io::clock;
use crate::io::journal::Journal;
use crate::io::progress::Progress;
use crate::io::strays::Stray;
use crate::model::{Doing, Environment, Failed, Host, Snapshot, Standing, Vm};
use crate::observe::{Held, Observer};
use crate::policy::Refusal;
use crate::records::{Goal, Life, Record, RecordV1, State};
use crate::score::high_count;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{broadcast, watch};
use violin_common::api::adapt::{Condition, Event, HostSeen, Mode, VmListed};
use violin_common::config::adapt::{AdaptConfig, Policy};
use violin_common::control::monitor::{Command, Hello, ImageDigest, VmState};
use violin_common::{EnvironmentId, HostId, Instant, VmId};

/// Difference in nanoseconds from which on the host's time was set, rather than its clocks drifted.
const CLOCK_SET: u64 = 1_000_000_000;

/// A host that said HELLO since this manager started.
#[derive(Debug)]
pub struct KnownHost {
    /// What it said.
    pub hello: Hello,
    /// Its connection, while there is one.
    pub connection: Option<quinn::Connection>,
    /// When its VMs were last compared with the journal.
    pub compared: Instant,
    /// Whether it has listed its VMs since it said that: before, anything may run there.
    pub listed: bool,
    /// Whether it was said that it could not.
    pub unlisted: bool,
}

/// A monitor that is refused because another one has its certificate.
#[derive(Debug)]
pub struct SecondMonitor {
    address: IpAddr,
    since: Instant,
    last: Instant,
    calls: u64,
}

/// A second monitor that has not called for so long is no longer told of.
const FORGET: Duration = Duration::from_secs(60);

/// Everything the manager knows.
#[derive(Debug)]
pub struct World {
    /// On disk.
    pub journal: Journal,
    /// What the journal adds up to.
    pub state: State,
    /// Figures.
    pub observer: Observer,
    /// What the cycle remembers.
    pub settling: Settling,
    /// What is done with decisions.
    pub mode: Mode,
    /// Hosts.
    pub hosts: BTreeMap<HostId, KnownHost>,
    /// Second monitors of hosts whose first one answers: from where, since when, when last, how often.
    pub second: BTreeMap<HostId, SecondMonitor>,
    /// How each VM was last seen, and where.
    pub seen: BTreeMap<VmId, (HostId, VmState)>,
    /// VMs that a monitor has been told to start and has not answered for: what is told of them is of earlier ones of that name.
    pub starting: BTreeSet<VmId>,
    /// VMs that run on a second host too, and which that is.
    pub twice: BTreeMap<VmId, HostId>,
    /// VMs that run on a host and that the journal knows nothing of, as when each host was last asked.
    pub strays: BTreeMap<HostId, BTreeMap<VmId, Stray>>,
    /// Hosts that are being compared with the journal, and whether they are to be once more afterwards.
    pub comparing: BTreeMap<HostId, bool>,
    /// What each of them is just being told to clear up: nothing that this would meet begins before the answer.
    pub clearing: BTreeMap<HostId, Command>,
    /// Environments that a call is ending.
    pub being_ended: BTreeSet<EnvironmentId>,
    /// Those of them, by name and public key, of which something is left that a task waits for.
    pub finishing: BTreeSet<(EnvironmentId, String)>,
    /// Environments that a call is about to record: their key pairs are being made.
    pub being_begun: BTreeSet<EnvironmentId>,
    /// Moves that an operator wants given up, by number; also of some that have ended since.
    pub giving_up: BTreeSet<u64>,
    /// What the last cycle refused.
    pub refusals: Vec<Refusal>,
    /// What was last written of that.
    pub refusals_written: (BTreeSet<Refusal>, Instant),
    /// Hosts' clocks.
    pub clocks: Clocks,
}

/// Shared by all tasks.
#[derive(Debug)]
pub struct Shared {
    /// Settings.
    pub config: AdaptConfig,
    world: Mutex<World>,
    /// What was last said of each environment that comes or goes.
    pub progress: Progress,
    /// What watchers are told.
    pub events: broadcast::Sender<Event>,
    /// VMs whose moves an operator wants given up; heard by whatever carries plans out.
    pub give_up: broadcast::Sender<VmId>,
    /// Counts up with every change of a VM or host.
    pub changes: watch::Sender<u64>,
    /// Set once with the reason why the manager must stop.
    pub fatal: watch::Sender<Option<String>>,
    /// Set once when the manager ends cleanly: what carries plans out stops where it is, for the next manager.
    pub ending: watch::Sender<bool>,
}

impl Shared {
    /// Starts from what the journal holds.
    pub fn new(config: AdaptConfig, journal: Journal, state: State, mode: Mode) -> Self {
        let world = World {
            journal,
            state,
            observer: Observer::default(),
            settling: Settling::default(),
            mode,
            hosts: BTreeMap::new(),
            second: BTreeMap::new(),
            seen: BTreeMap::new(),
            starting: BTreeSet::new(),
            twice: BTreeMap::new(),
            strays: BTreeMap::new(),
            comparing: BTreeMap::new(),
            clearing: BTreeMap::new(),
            being_ended: BTreeSet::new(),
            finishing: BTreeSet::new(),
            being_begun: BTreeSet::new(),
            giving_up: BTreeSet::new(),
            refusals: Vec::new(),
            refusals_written: (BTreeSet::new(), Instant(0)),
            clocks: Clocks::new(violin_channel::clock::name()),
        };
        let (events, changes, fatal) = (broadcast::channel(1024).0, watch::channel(0).0, watch::channel(None).0);
        let (give_up, ending) = (broadcast::channel(64).0, watch::channel(false).0);
        Self { config, world: Mutex::new(world), progress: Progress::default(), events, give_up, changes, fatal, ending }
    }

    /// Takes the lock. A task that died with it left whole records behind, so what it knew still holds.
    pub fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells watchers; nobody listening is fine.
    pub fn tell(&self, event: Event) {
        let _ = self.events.send(event);
    }

    /// Wakes those who wait for a VM or host.
    pub fn changed(&self) {
        self.changes.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// Writes a record and takes it in. Without its journal the manager must not act: a failure stops it.
    pub fn record(&self, world: &mut World, record: RecordV1) -> Result<(), String> {
        let record = Record::V1(record);
        if let Err(error) = world.journal.append(&record) {
            let words =
                format!("could not write the journal {}: {error:#}; nothing is done without it", self.config.journal.display());
            self.fatal.send_replace(Some(words.clone()));
            return Err(words);
        }
        world.state.apply(&record);
        Ok(())
    }

    /// Records what time it is on this manager's clock, if that was not said yet or is not so any more: the host's time may be set.
    pub fn record_time(&self, world: &mut World) -> Result<(), String> {
        let (at, utc) = (clock::now(), violin_channel::clock::utc());
        if world.state.times.utc(at).is_some_and(|known| known.0.abs_diff(utc.0) < CLOCK_SET) {
            return Ok(());
        }
        self.record(world, RecordV1::Clock { name: violin_channel::clock::name(), at, utc_ns: utc.0 })
    }
}

/// Whether a refusal tells what keeps a VM on a host that is to be emptied.
fn keeps(refusal: &Refusal, on: &HostId) -> bool {
    matches!(refusal, Refusal::CannotLeave { host, .. } if host == on)
}

impl World {
    /// The snapshot of this instant.
    pub fn snapshot(&self, now: Instant, config: &AdaptConfig) -> Snapshot {
        let policy = &config.policy;
        let hosts = self.hosts.iter().map(|(name, known)| {
            let age = self.observer.age(now, name);
            let standing = match (&known.connection, age) {
                (None, _) => Standing::Away,
                (Some(_), Some(age)) if age <= policy.max_age.0 => Standing::Live,
                (Some(_), age) => Standing::Stale(age),
            };
            let hello = &known.hello;
            let host = Host {
                domain: hello.domain.clone(),
                cores: hello.cores,
                memory_mib: self.memory_mib(now, name, hello.memory_mib, policy),
                driver: hello.driver.clone(),
                standing,
                draining: self.state.takes_nothing(name),
            };
            (name.clone(), host)
        });
        let environments = self.state.environments.iter().map(|(name, known)| {
            let rested = known.moved.map(|moved| now.since(moved));
            let mut environment = Environment { home: known.stored.home.clone(), rested, failed: BTreeMap::new() };
            for (goal, (count, last)) in &self.state.missed {
                if let Goal::Gang(missed, domain) = goal
                    && missed == name
                {
                    environment.failed.insert(domain.clone(), Failed { count: *count, since: now.since(*last) });
                }
            }
            (name.clone(), environment)
        });
        let vms = self.state.vms.iter().map(|(name, known)| {
            // Those of now and of here: a monitor whose hypervisor is dead goes on reporting, without its VMs.
            let figures = self.observer.vm(name).filter(|figures| figures.is_current(now, &known.host, policy));
            let life = self.state.environments.get(&known.environment).map(|environment| environment.life);
            let failed = self.state.missed.iter().filter_map(|(goal, (count, last))| match goal {
                Goal::Vm(missed, host) if missed == name => {
                    Some((host.clone(), Failed { count: *count, since: now.since(*last) }))
                }
                _ => None,
            });
            let vm = Vm {
                failed: failed.collect(),
                environment: known.environment.clone(),
                role: known.spec.role,
                vcpus: known.spec.vcpus,
                memory_mib: known.spec.memory_mib,
                host: known.host.clone(),
                demand: figures.and_then(|figures| figures.demand.mean()),
                rising: figures.is_some_and(|figures| figures.rising(policy)),
                high_for: figures.and_then(|figures| figures.high_since).map(|since| now.since(since)),
                doing: self.doing(name, life),
                rested: known.moved.map(|moved| now.since(moved)),
            };
            (name.clone(), vm)
        });
        Snapshot { hosts: hosts.collect(), vms: vms.collect(), environments: environments.collect() }
    }

    /// What a host can hold, in MiB: what it declared, or what its VMs were promised and what is really free beside them.
    fn memory_mib(&self, now: Instant, host: &HostId, declared: u64, policy: &Policy) -> u64 {
        let room = self.observer.room_mib(now, host, &self.held(host), policy);
        room.map_or(declared, |room| declared.min(room))
    }

    /// What the journal has on a host. A monitor counts what arrives as promised, so it is counted here too.
    pub fn held(&self, host: &HostId) -> Held {
        let mut held = Held::default();
        for (vm, known) in &self.state.vms {
            let to = self.state.moving_to(vm);
            let (here, comes) = (known.host == *host, to == Some(host));
            held.moving |= to.is_some() && (here || comes);
            if here || comes {
                held.mib.insert(vm.clone(), known.spec.memory_mib);
                if self.state.environments.get(&known.environment).is_some_and(|known| known.life == Life::Starting) {
                    held.starting.insert(vm.clone());
                }
            }
        }
        held
    }

    fn doing(&self, vm: &VmId, life: Option<Life>) -> Doing {
        if let Some(to) = self.state.moving_to(vm) {
            return Doing::Moving(to.clone());
        }
        if self.twice.contains_key(vm) {
            return Doing::Booting;
        }
        match (life, self.seen.get(vm).map(|(_, state)| *state)) {
            (Some(Life::Up), Some(VmState::Running)) => Doing::Running,
            (Some(Life::Up | Life::Ending), Some(VmState::Stopped | VmState::Paused)) => Doing::Halted,
            // Starting, being ended, not seen yet or (above) running twice: its cores are spoken for, and it is left alone.
            _ => Doing::Booting,
        }
    }

    /// A second monitor with this host's certificate has called.
    pub fn second_monitor(&mut self, now: Instant, host: &HostId, address: SocketAddr) {
        let address = address.ip().to_canonical();
        let known = self.second.get(host).filter(|known| now.since(known.last) < FORGET);
        let (since, calls) = known.map_or((now, 1), |known| (known.since, known.calls + 1));
        self.second.insert(host.clone(), SecondMonitor { address, since, last: now, calls });
    }

    fn troubles(&self, now: Instant, host: &HostId) -> Vec<String> {
        let second = self.second.get(host).filter(|known| now.since(known.last) < FORGET);
        let words = second.map(|second| {
            format!(
                "a second monitor with this host's certificate calls from {} and is refused (for {} s, {} calls): want a certificate \
                 of its own on each host (`violin pki host`)",
                second.address,
                now.since(second.since).as_secs(),
                second.calls
            )
        });
        words.into_iter().collect()
    }

    /// A connected host's connection.
    pub fn connection(&self, host: &HostId) -> Option<quinn::Connection> {
        self.hosts.get(host)?.connection.clone()
    }

    /// Hosts that are connected.
    pub fn connected(&self) -> Vec<HostId> {
        self.hosts.iter().filter(|(_, host)| host.connection.is_some()).map(|(name, _)| name.clone()).collect()
    }

    /// Where an image can be fetched, other than from `host` itself.
    pub fn image_sources(&self, image: Option<&ImageDigest>, host: &HostId) -> Vec<std::net::SocketAddr> {
        let Some(image) = image else { return Vec::new() };
        self.hosts
            .iter()
            .filter(|(name, known)| *name != host && known.connection.is_some() && known.hello.images.contains(image))
            .map(|(_, known)| known.hello.image_address)
            .collect()
    }

    /// Remembers that a host has an image now.
    pub fn has_image(&mut self, image: Option<&ImageDigest>, host: &HostId) {
        if let (Some(image), Some(known)) = (image, self.hosts.get_mut(host))
            && !known.hello.images.contains(image)
        {
            known.hello.images.push(image.clone());
        }
    }

    /// Hosts as listed.
    pub fn list_hosts(&self, now: Instant, config: &AdaptConfig) -> Vec<HostSeen> {
        let snapshot = self.snapshot(now, config);
        let list = self.hosts.iter().map(|(name, known)| {
            let hello = &known.hello;
            let live = snapshot.hosts.get(name).is_some_and(|host| host.standing == Standing::Live);
            HostSeen {
                host: name.clone(),
                domain: hello.domain.clone(),
                connected: known.connection.is_some(),
                driver: hello.driver.clone(),
                cores: hello.cores,
                demand_cores: live.then(|| hello.cores - snapshot.free_cores(name)),
                score: live.then(|| f64::from(high_count(&snapshot, name, &config.policy)) / hello.cores),
                memory_mib: hello.memory_mib,
                memory_free_mib: live.then(|| snapshot.free_memory_mib(name)),
                age_s: self.observer.age(now, name).map(|age| age.as_secs_f64()),
                vms: snapshot.vms.iter().filter(|(_, vm)| vm.host == *name).map(|(vm, _)| vm.clone()).collect(),
                draining: self.state.takes_nothing(name),
                staying: self.refusals.iter().filter(|refusal| keeps(refusal, name)).map(ToString::to_string).collect(),
                troubles: self.troubles(now, name),
            }
        });
        list.collect()
    }

    /// What is known of a VM at present, as far as the policy too would act on it. What a dead monitor or hypervisor said last
    /// is no longer how the VM is.
    pub fn condition(&self, now: Instant, name: &VmId, config: &AdaptConfig) -> Condition {
        let Some(known) = self.state.vms.get(name) else { return Condition::Unknown };
        let seen = self.seen.get(name).filter(|(at, _)| *at == known.host);
        // A move has just ended there with the word of that host; its next observation is still to come.
        let arrived = known.moved.is_some_and(|moved| now.since(moved) <= config.policy.max_age.0);
        if seen.is_none() && arrived && self.seen.contains_key(name) && self.connection(&known.host).is_some() {
            return Condition::Running;
        }
        let Some((at, state)) = seen else {
            // Nobody has told of it yet: that is known of those only that are just being started.
            let starting = self.state.environments.get(&known.environment).is_some_and(|env| env.life == Life::Starting);
            return if starting { Condition::Booting } else { Condition::Unknown };
        };
        let heard = self.observer.age(now, at).is_some_and(|age| age <= config.policy.max_age.0);
        let live = heard && self.connection(at).is_some();
        // Its host tells, but not of this VM any more: its hypervisor does not answer.
        let figures = self.observer.vm(name);
        let missed = *state == VmState::Running
            && figures.is_some_and(|figures| figures.host == *at && !figures.is_current(now, at, &config.policy));
        if live && !missed { (*state).into() } else { Condition::Unknown }
    }

    /// How long ago a VM was last told of where it is recorded; none: not since this manager started.
    pub fn heard_of(&self, now: Instant, name: &VmId) -> Option<std::time::Duration> {
        let host = &self.state.vms.get(name)?.host;
        match self.observer.vm(name).filter(|figures| figures.host == *host) {
            Some(figures) => Some(now.since(figures.at)),
            None => self.seen.get(name).filter(|(at, _)| at == host).and_then(|_| self.observer.age(now, host)),
        }
    }

    /// VMs as listed; of one environment, or all.
    pub fn list_vms(&self, now: Instant, config: &AdaptConfig, only: Option<&EnvironmentId>) -> Vec<VmListed> {
        let wanted = self.state.vms.iter().filter(|(_, known)| only.is_none_or(|only| known.environment == *only));
        let list = wanted.map(|(name, known)| {
            let state = self.condition(now, name, config);
            let current = self.observer.vm(name).filter(|figures| figures.is_current(now, &known.host, &config.policy));
            let figures = current.filter(|_| state != Condition::Unknown);
            let last = self.seen.get(name).filter(|(at, _)| *at == known.host);
            VmListed {
                vm: name.clone(),
                environment: known.environment.clone(),
                role: known.spec.role,
                address: known.spec.address,
                host: Some(known.host.clone()),
                state,
                last_state: last.map(|(_, state)| (*state).into()),
                seen_s: self.heard_of(now, name).map(|age| age.as_secs_f64()),
                run: figures.map(|figures| figures.last.run),
                wait: figures.map(|figures| figures.last.wait),
                demand: figures.map(|figures| figures.last.demand),
                smoothed_demand: figures.map(|figures| figures.demand.so_far()),
                moving_to: self.state.moving_to(name).cloned(),
                giving_up: self.state.move_of(name).is_some_and(|moving| self.giving_up.contains(&moving.number)),
            }
        });
        list.collect()
    }
}
