//! The state the records add up to: environments, VMs, decisions, moves.

use super::{KeptMode, Record, RecordV1, StoredEnvironment, Times};
use crate::plan::Plan;
use std::collections::{BTreeMap, BTreeSet};
use violin_common::api::adapt::{DecisionSeen, Migration, Outcome};
use violin_common::config::environment::Node;
use violin_common::control::monitor::VmSpec;
use violin_common::{DomainId, EnvironmentId, Epoch, HostId, Instant, MacAddr, VmId, Vni};

/// Most decisions, and most migrations of ended plans, held in memory; the journal holds more decisions and all moves.
pub const KEPT: usize = 1000;

/// How far an environment is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// Its VMs are being started.
    Starting,
    /// It is up.
    Up,
    /// It is being ended.
    Ending,
}

/// An environment in the state.
#[derive(Debug, Clone, PartialEq)]
pub struct KnownEnvironment {
    /// As stored.
    pub stored: StoredEnvironment,
    /// How far it is.
    pub life: Life,
    /// Where its access namespace is.
    pub access: Option<HostId>,
    /// When it last moved as a gang.
    pub moved: Option<Instant>,
}

/// A VM in the state.
#[derive(Debug, Clone, PartialEq)]
pub struct KnownVm {
    /// Its environment.
    pub environment: EnvironmentId,
    /// What a monitor needs to run it.
    pub spec: VmSpec,
    /// Where it runs, as far as the journal knows.
    pub host: HostId,
    /// Where it may run instead, since a move whose end nobody could tell.
    pub doubt: Option<HostId>,
    /// When it last moved.
    pub moved: Option<Instant>,
}

/// A plan that has not ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Unfinished {
    /// The plan.
    pub plan: Plan,
    /// Moves that take it back, if it returns, and why.
    pub back: Option<(Vec<crate::plan::PlannedMove>, String)>,
    /// The last step begun of each migration.
    pub steps: BTreeMap<u64, u32>,
}

/// What plans are about: the goal that may fail again and again.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Goal {
    /// A VM on a host.
    Vm(VmId, HostId),
    /// An environment's compute nodes in a domain.
    Gang(EnvironmentId, DomainId),
}

/// What may still be on a host that was given up: nothing waits for it, and it goes should that host ever come back.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Abandoned {
    /// VMs, and the networks they were in.
    pub vms: BTreeMap<VmId, Vni>,
    /// Access namespaces, and the networks they lead into.
    pub doors: BTreeMap<EnvironmentId, Vni>,
}

/// What the records add up to.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct State {
    /// Generation of the last manager.
    pub generation: u64,
    /// The mode an operator set last.
    pub mode: Option<KeptMode>,
    /// Environments.
    pub environments: BTreeMap<EnvironmentId, KnownEnvironment>,
    /// VMs of them.
    pub vms: BTreeMap<VmId, KnownVm>,
    /// VMs that must not run any more, wherever they turn up, and the networks they were in.
    pub ended: BTreeMap<VmId, Vni>,
    /// Those of them that may still run, and the hosts whose monitors have not said yet that they are stopped there.
    pub to_stop: BTreeMap<VmId, BTreeSet<HostId>>,
    /// Access namespaces that may be there, also of environments that are gone, and the networks they lead into.
    pub doors: BTreeMap<(EnvironmentId, HostId), Vni>,
    /// Hosts that an operator wants empty.
    pub draining: BTreeSet<HostId>,
    /// What was left on hosts that an operator has given up.
    pub abandoned: BTreeMap<HostId, Abandoned>,
    /// The last [`KEPT`] decisions, oldest first.
    pub decisions: Vec<DecisionSeen>,
    /// Migrations by number: all that are under way, and the last [`KEPT`].
    pub migrations: BTreeMap<u64, Migration>,
    /// The plan under way.
    pub unfinished: BTreeMap<u64, Unfinished>,
    /// Goals that were missed: how many times in a row, and when last.
    pub missed: BTreeMap<Goal, (u32, Instant)>,
    /// Highest plan number.
    pub plans: u64,
    /// Highest incarnation of every owned MAC ever started.
    pub incarnations: BTreeMap<(Vni, MacAddr), u32>,
    /// When moves and decisions were.
    pub times: Times,
}

impl State {
    /// Takes in one record.
    pub fn apply(&mut self, record: &Record) {
        let Record::V1(record) = record;
        self.times.apply(record);
        match record {
            RecordV1::Generation { generation, at } => {
                self.generation = *generation;
                // After a restart of the machine its clock starts anew: what lies in the future was before that.
                let past = |moved: &mut Option<Instant>| *moved = moved.filter(|moved| moved <= at);
                self.vms.values_mut().for_each(|vm| past(&mut vm.moved));
                self.environments.values_mut().for_each(|environment| past(&mut environment.moved));
                self.missed.values_mut().for_each(|(_, last)| *last = (*last).min(*at));
                // What such a plan has moved already ended before this start; a later time would rest for ever.
                let Self { unfinished, migrations, .. } = self;
                for seen in migrations.values_mut().filter(|seen| unfinished.values().any(|plan| plan.has(seen.number))) {
                    seen.ended = seen.ended.map(|ended| ended.min(*at));
                }
            }
            RecordV1::EnvironmentBegins(stored) => self.begin(stored),
            RecordV1::VmStarts { vm, epoch } => {
                if let Some(vm) = self.vms.get(vm) {
                    self.incarnations.insert((vm.spec.network.vni, vm.spec.mac), epoch.incarnation);
                }
            }
            RecordV1::EnvironmentReady(name) => {
                if let Some(environment) = self.environments.get_mut(name) {
                    environment.life = Life::Up;
                }
            }
            RecordV1::EnvironmentEnds(name) => {
                if let Some(environment) = self.environments.get_mut(name) {
                    environment.life = Life::Ending;
                }
                let ended = self.vms.iter().filter(|(_, vm)| vm.environment == *name);
                let hosts = |vm, known: &KnownVm| {
                    let all = [Some(&known.host), known.doubt.as_ref(), self.moving_to(vm)];
                    all.into_iter().flatten().cloned().collect()
                };
                let ended = ended.map(|(vm, known)| (vm.clone(), known.spec.network.vni, hosts(vm, known)));
                let ended: Vec<(VmId, Vni, Vec<HostId>)> = ended.collect();
                for (vm, vni, hosts) in ended {
                    self.ended.insert(vm.clone(), vni);
                    self.to_stop.entry(vm).or_default().extend(hosts);
                }
            }
            RecordV1::EnvironmentGone(name) => {
                self.environments.remove(name);
                self.vms.retain(|_, vm| vm.environment != *name);
                let Self { vms, environments, missed, .. } = self;
                missed.retain(|goal, _| match goal {
                    Goal::Vm(vm, _) => vms.contains_key(vm),
                    Goal::Gang(environment, _) => environments.contains_key(environment),
                });
            }
            RecordV1::VmFound { vm, host } => {
                if let Some(vm) = self.vms.get_mut(vm) {
                    vm.host = host.clone();
                    vm.doubt = None;
                }
            }
            RecordV1::MoveInDoubt { vm, host } => {
                if let Some(vm) = self.vms.get_mut(vm) {
                    vm.doubt = Some(host.clone());
                }
            }
            RecordV1::VmStopped { vm, host } => {
                if let Some(hosts) = self.to_stop.get_mut(vm) {
                    hosts.remove(host);
                }
                self.to_stop.retain(|_, hosts| !hosts.is_empty());
                let gone = !self.to_stop.contains_key(vm);
                let Self { vms, environments, .. } = self;
                let ending = |name| environments.get(name).is_some_and(|known: &KnownEnvironment| known.life == Life::Ending);
                if gone && vms.get(vm).is_some_and(|known| ending(&known.environment)) {
                    vms.remove(vm);
                }
                self.abandoned.entry(host.clone()).or_default().vms.remove(vm);
                self.abandoned.retain(|_, left| *left != Abandoned::default());
            }
            RecordV1::Decided { decision, .. } => {
                self.decisions.push((**decision).clone());
                let excess = self.decisions.len().saturating_sub(KEPT);
                self.decisions.drain(..excess);
                self.forget_old_times();
            }
            RecordV1::PlanBegins { plan, migrations } => {
                self.plans = self.plans.max(plan.number);
                self.migrations.extend(migrations.iter().map(|migration| (migration.number, migration.clone())));
                let unfinished = Unfinished { plan: (**plan).clone(), back: None, steps: BTreeMap::new() };
                self.unfinished.insert(plan.number, unfinished);
            }
            RecordV1::StepBegins { migration, step, at } => {
                if let Some(seen) = self.migrations.get_mut(migration) {
                    seen.began.get_or_insert(*at);
                }
                for unfinished in self.unfinished.values_mut().filter(|unfinished| unfinished.has(*migration)) {
                    unfinished.steps.insert(*migration, *step);
                }
            }
            RecordV1::PlanReturns { plan, back, migrations, why } => {
                self.migrations.extend(migrations.iter().map(|migration| (migration.number, migration.clone())));
                if let Some(unfinished) = self.unfinished.get_mut(plan) {
                    unfinished.back = Some((back.clone(), why.clone()));
                }
            }
            RecordV1::MoveEnded(migration) => self.move_ended(migration),
            RecordV1::PlanEnded { plan } => {
                if let Some(ended) = self.unfinished.remove(plan) {
                    self.count_missed(&ended.plan);
                    let at = ended.plan.moves.iter().filter_map(|moved| self.migrations.get(&moved.migration)?.ended).max();
                    self.forget_old_migrations();
                    self.forget_old_times();
                    if let Some(environment) = ended.plan.gang.and_then(|name| self.environments.get_mut(&name)) {
                        environment.moved = at.or(environment.moved);
                    }
                }
            }
            RecordV1::AccessOpens { environment, host } => {
                if let Some(environment) = self.environments.get_mut(environment) {
                    environment.access = Some(host.clone());
                    let door = (environment.stored.spec.name.clone(), host.clone());
                    self.doors.insert(door, environment.stored.spec.network.vni);
                }
            }
            RecordV1::AccessClosed { environment, host } => {
                self.doors.remove(&(environment.clone(), host.clone()));
                self.abandoned.entry(host.clone()).or_default().doors.remove(environment);
                self.abandoned.retain(|_, left| *left != Abandoned::default());
            }
            RecordV1::HostDrains { host, on: true } => drop(self.draining.insert(host.clone())),
            RecordV1::HostDrains { host, on: false } => drop(self.draining.remove(host)),
            RecordV1::HostForgotten(host) => self.abandon(host),
            RecordV1::ModeSet(kept) => self.mode = Some(*kept),
            RecordV1::Clock { .. } | RecordV1::Measured { .. } => {}
        }
    }

    /// Gives up whatever is recorded on a host. Incarnations stay: what comes back is older than what was started since.
    fn abandon(&mut self, host: &HostId) {
        self.draining.remove(host);
        let mut left = self.abandoned.remove(host).unwrap_or_default();
        for (vm, known) in &mut self.vms {
            if known.host == *host || known.doubt.as_ref() == Some(host) {
                left.vms.insert(vm.clone(), known.spec.network.vni);
            }
            known.doubt = known.doubt.take().filter(|doubt| doubt != host);
        }
        self.vms.retain(|_, known| known.host != *host);
        for (vm, hosts) in &mut self.to_stop {
            if let (true, Some(vni)) = (hosts.remove(host), self.ended.get(vm)) {
                left.vms.insert(vm.clone(), *vni);
            }
        }
        self.to_stop.retain(|_, hosts| !hosts.is_empty());
        self.doors.retain(|(environment, at), vni| {
            if at == host {
                left.doors.insert(environment.clone(), *vni);
            }
            at != host
        });
        for environment in self.environments.values_mut() {
            environment.access = environment.access.take().filter(|at| at != host);
        }
        let Self { vms, missed, .. } = self;
        missed.retain(|goal, _| match goal {
            Goal::Vm(vm, to) => vms.contains_key(vm) && to != host,
            Goal::Gang(..) => true,
        });
        if left != Abandoned::default() {
            self.abandoned.insert(host.clone(), left);
        }
    }

    /// What the journal has on a host, in words: VMs that run there or may, and what is owed there of ended environments.
    pub fn recorded_on(&self, host: &HostId) -> Vec<String> {
        let runs = self.vms.iter().filter(|(_, known)| known.host == *host || known.doubt.as_ref() == Some(host));
        let owed = self.to_stop.iter().filter(|(vm, hosts)| hosts.contains(host) && !self.vms.contains_key(*vm));
        let doors = self.doors.keys().filter(|(environment, at)| at == host && !self.environments.contains_key(environment));
        runs.map(|(vm, _)| vm.to_string())
            .chain(owed.map(|(vm, _)| format!("{vm} (of an ended environment)")))
            .chain(doors.map(|(environment, _)| format!("the access namespace of {environment}, which has ended")))
            .collect()
    }

    /// Whether nothing may be brought to a host: an operator wants it empty, or what it was given up with is still there.
    pub fn takes_nothing(&self, host: &HostId) -> bool {
        self.draining.contains(host) || self.abandoned.contains_key(host)
    }

    fn begin(&mut self, stored: &StoredEnvironment) {
        let name = stored.spec.name.clone();
        // A file that was accepted once reads the same again; a journal that says otherwise has no VMs to tell of.
        for node in stored.spec.nodes().unwrap_or_default() {
            let Some(host) = stored.placement.get(&node.vm) else { continue };
            let spec = vm_spec(stored, &node);
            self.ended.remove(&node.vm);
            self.to_stop.remove(&node.vm);
            self.vms.insert(node.vm, KnownVm { environment: name.clone(), spec, host: host.clone(), doubt: None, moved: None });
        }
        let known = KnownEnvironment { stored: stored.clone(), life: Life::Starting, access: None, moved: None };
        self.environments.insert(name, known);
    }

    fn move_ended(&mut self, migration: &Migration) {
        if let Some(vm) = self.vms.get_mut(&migration.vm) {
            // An undone move rests too: what failed a moment ago is not tried again at once.
            vm.moved = migration.ended;
            match migration.outcome {
                Outcome::Done => {
                    vm.host = migration.to.clone();
                    vm.doubt = None;
                }
                Outcome::Undone(_) => vm.host = migration.from.clone(),
                Outcome::Running => {}
            }
        }
        self.migrations.insert(migration.number, migration.clone());
    }

    /// Those of unfinished plans are needed however old they are.
    fn forget_old_migrations(&mut self) {
        let excess = self.migrations.len().saturating_sub(KEPT);
        let over = |(number, seen): &(&u64, &Migration)| {
            seen.outcome != Outcome::Running && !self.unfinished.values().any(|unfinished| unfinished.has(**number))
        };
        let old: Vec<u64> = self.migrations.iter().filter(over).map(|(number, _)| *number).take(excess).collect();
        self.migrations.retain(|number, _| !old.contains(number));
    }

    fn count_missed(&mut self, plan: &Plan) {
        let moves: Vec<_> = plan.moves.iter().filter_map(|moved| self.migrations.get(&moved.migration)).collect();
        let Some(first) = moves.first() else { return };
        let goal = match &plan.gang {
            Some(environment) => Goal::Gang(environment.clone(), first.to_domain.clone()),
            None => Goal::Vm(first.vm.clone(), first.to.clone()),
        };
        let last = moves.iter().filter(|seen| seen.outcome != Outcome::Done).map(|seen| seen.ended.unwrap_or(Instant(0))).max();
        match last {
            None => {
                self.missed.remove(&goal);
            }
            Some(last) => {
                let count = self.missed.get(&goal).map_or(0, |(count, _)| *count).saturating_add(1);
                self.missed.insert(goal, (count, last));
            }
        }
    }

    /// Whether an environment is there that was begun with this public key. Each has its own: not a later one of the same name.
    pub fn is_begun(&self, name: &EnvironmentId, public: &str) -> bool {
        self.environments.get(name).is_some_and(|known| known.stored.keys.public == public)
    }

    /// Whether that one is still being started.
    pub fn is_starting(&self, name: &EnvironmentId, public: &str) -> bool {
        self.is_begun(name, public) && self.environments.get(name).is_some_and(|known| known.life == Life::Starting)
    }

    /// Whether the environment of this name is being ended.
    pub fn is_ending(&self, name: &EnvironmentId) -> bool {
        self.environments.get(name).is_some_and(|known| known.life == Life::Ending)
    }

    /// VMs of an environment.
    pub fn vms_of<'a>(&'a self, name: &'a EnvironmentId) -> impl Iterator<Item = &'a VmId> {
        self.vms.iter().filter(move |(_, known)| known.environment == *name).map(|(vm, _)| vm)
    }

    /// Epoch with which a VM is to be started next.
    pub fn next_epoch(&self, spec: &VmSpec) -> Epoch {
        match self.incarnations.get(&(spec.network.vni, spec.mac)) {
            None => Epoch::FIRST,
            Some(incarnation) => Epoch { incarnation: incarnation.saturating_add(1), ..Epoch::FIRST },
        }
    }

    /// Number for the next migration.
    pub fn next_migration(&self) -> u64 {
        self.migrations.keys().next_back().map_or(1, |last| last + 1)
    }

    /// Number for the next decision.
    pub fn next_decision(&self) -> u64 {
        self.decisions.last().map_or(1, |last| last.number + 1)
    }

    /// Whether an ended VM is still to be stopped on a host.
    pub fn is_owed(&self, vm: &VmId, host: &HostId) -> bool {
        self.to_stop.get(vm).is_some_and(|hosts| hosts.contains(host))
    }

    /// Where a VM is moving to, if it is.
    pub fn moving_to(&self, vm: &VmId) -> Option<&HostId> {
        self.move_of(vm).map(|migration| &migration.to)
    }

    /// The move of a VM that is under way, if one is.
    pub fn move_of(&self, vm: &VmId) -> Option<&Migration> {
        self.migrations.values().rev().find(|migration| migration.vm == *vm && migration.outcome == Outcome::Running)
    }

    /// What giving up a move that is under way waits for, in words. Errors: it comes too late, or is none that is given up.
    pub fn giving_up(&self, migration: &Migration) -> Result<String, String> {
        let Migration { number, vm, from, to, .. } = migration;
        let back =
            |unfinished: &Unfinished| unfinished.back.iter().any(|(moves, _)| moves.iter().any(|m| m.migration == *number));
        if self.unfinished.values().any(back) {
            return Err(format!("{vm} is being taken back to {to} because its gang failed: such a move is not given up"));
        }
        let waits = match self.unfinished.values().find_map(|unfinished| unfinished.steps.get(number)) {
            None => "it has not begun to leave".into(),
            Some(0) => format!("{to} is preparing for it and is heard out, then that is taken back"),
            Some(1) => format!("the hypervisor of {from} is told to keep it"),
            Some(_) => {
                return Err(format!(
                    "it comes too late: {vm} has left {from} and is taken in on {to}; `violin vm migrate {vm} --to {from}` takes \
                     it back when it is there"
                ));
            }
        };
        Ok(format!("move {number} of {vm} from {from} to {to} is being given up: {waits}"))
    }
}

impl Unfinished {
    fn has(&self, migration: u64) -> bool {
        let back = self.back.iter().flat_map(|(moves, _)| moves);
        self.plan.moves.iter().chain(back).any(|moved| moved.migration == migration)
    }
}

/// What a monitor needs to run one node of an environment.
pub fn vm_spec(stored: &StoredEnvironment, node: &Node) -> VmSpec {
    VmSpec {
        vm: node.vm.clone(),
        environment: stored.spec.name.clone(),
        role: node.role,
        network: stored.spec.network_spec(),
        mac: node.mac,
        address: node.address,
        prefix_len: stored.spec.network.prefix_len,
        vcpus: node.vcpus,
        memory_mib: node.memory_mib,
        image: stored.image.clone(),
        guest_config: crate::place::guest_config(stored, node),
    }
}
