//! What one cycle thinks about: hosts, VMs and environments at one instant, immutable, in ordered maps.
//!
//! A snapshot holds figures, never opinions: labels such as *high demand* are made by [`crate::score`] with the policy's
//! thresholds. The text form is for fixtures and for the journal; read [`crate::observe`] for where figures come from.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;
use violin_common::control::monitor::Role;
use violin_common::{DomainId, EnvironmentId, HostId, VmId};

/// Everything known at one instant.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Snapshot {
    /// Hosts ever heard of.
    pub hosts: BTreeMap<HostId, Host>,
    /// VMs of all environments that are up.
    pub vms: BTreeMap<VmId, Vm>,
    /// Environments.
    pub environments: BTreeMap<EnvironmentId, Environment>,
}

/// One host.
#[derive(Debug, Clone, PartialEq)]
pub struct Host {
    /// Its domain.
    pub domain: DomainId,
    /// Declared cores.
    pub cores: f64,
    /// Memory for guests, in MiB: as declared, or less when the host has less.
    pub memory_mib: u64,
    /// Driver of its hypervisor; VMs move between equal ones only.
    pub driver: String,
    /// Whether its figures can be trusted: connected, and observed recently enough.
    pub standing: Standing,
    /// Whether it is to be emptied: nothing starts or moves there.
    pub draining: bool,
}

/// Whether a host's figures can be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Connected, observed recently.
    Live,
    /// Connected, but the last observation is this old (none: never observed).
    Stale(Option<Duration>),
    /// Its monitor is not connected.
    Away,
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Live => f.write_str("was observed just now"),
            Self::Stale(Some(age)) => write!(f, "was last observed {} s ago", age.as_secs()),
            Self::Stale(None) => f.write_str("is connected and was not observed yet: that takes its monitor's period"),
            Self::Away => f.write_str("is away"),
        }
    }
}

/// One VM.
#[derive(Debug, Clone, PartialEq)]
pub struct Vm {
    /// Its environment.
    pub environment: EnvironmentId,
    /// What it is there.
    pub role: Role,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory it may use, in MiB.
    pub memory_mib: u64,
    /// Where it runs.
    pub host: HostId,
    /// Smoothed demand, as a fraction of its vCPUs; none: not observed for long enough.
    pub demand: Option<f64>,
    /// Whether its last observations say that its smoothed demand is on its way above the threshold.
    pub rising: bool,
    /// How long its smoothed demand has been above the threshold; none: it is not.
    pub high_for: Option<Duration>,
    /// What it is doing.
    pub doing: Doing,
    /// Time since its last move ended, if it ever moved.
    pub rested: Option<Duration>,
    /// By destination: moves there that were undone one after another.
    pub failed: BTreeMap<HostId, Failed>,
}

/// What a VM is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Doing {
    /// It runs: the only state in which it may be moved.
    Running,
    /// It starts; its vCPUs count as wanted in full.
    Booting,
    /// It is on its way to another host; its vCPUs count there too.
    Moving(HostId),
    /// It is paused, stopped or not seen.
    Halted,
}

/// One environment.
#[derive(Debug, Clone, PartialEq)]
pub struct Environment {
    /// Domain its head node stays in.
    pub home: DomainId,
    /// Time since its last move as a gang ended, if it ever moved so.
    pub rested: Option<Duration>,
    /// By destination: moves there, as a gang, that were undone one after another.
    pub failed: BTreeMap<DomainId, Failed>,
}

/// Moves to one destination that were undone one after another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failed {
    /// How many.
    pub count: u32,
    /// Time since the last of them ended.
    pub since: Duration,
}

impl Vm {
    /// Cores it is taken to want, in cores: smoothed demand × vCPUs; all its vCPUs as long as that is not known.
    pub fn wanted_cores(&self) -> f64 {
        match (&self.doing, self.demand) {
            (Doing::Halted, _) => 0.0,
            (Doing::Running | Doing::Moving(_), Some(demand)) => demand * f64::from(self.vcpus),
            _ => f64::from(self.vcpus),
        }
    }
}

impl Snapshot {
    /// VMs whose memory and cores `host` must hold: those on it and those on their way to it.
    pub fn held_by<'a>(&'a self, host: &'a HostId) -> impl Iterator<Item = (&'a VmId, &'a Vm)> {
        self.vms.iter().filter(move |(_, vm)| vm.host == *host || matches!(&vm.doing, Doing::Moving(to) if to == host))
    }

    /// Declared cores minus the cores wanted by all VMs of a host; negative on an overloaded one. Units: cores.
    pub fn free_cores(&self, host: &HostId) -> f64 {
        let cores = self.hosts.get(host).map_or(0.0, |host| host.cores);
        cores - self.held_by(host).map(|(_, vm)| vm.wanted_cores()).sum::<f64>()
    }

    /// Memory not promised to any VM, in MiB.
    pub fn free_memory_mib(&self, host: &HostId) -> u64 {
        let memory = self.hosts.get(host).map_or(0, |host| host.memory_mib);
        memory.saturating_sub(self.held_by(host).map(|(_, vm)| vm.memory_mib).sum())
    }

    /// Hosts of a domain whose figures can be trusted, in order of name.
    pub fn live_hosts<'a>(&'a self, domain: &'a DomainId) -> impl Iterator<Item = &'a HostId> {
        self.hosts.iter().filter(move |(_, host)| host.domain == *domain && host.standing == Standing::Live).map(|(name, _)| name)
    }

    /// Domain of a host, if it is known.
    pub fn domain(&self, host: &HostId) -> Option<&DomainId> {
        self.hosts.get(host).map(|host| &host.domain)
    }

    /// Compute nodes of an environment, in order of name.
    pub fn compute_nodes<'a>(&'a self, environment: &'a EnvironmentId) -> impl Iterator<Item = (&'a VmId, &'a Vm)> {
        self.vms.iter().filter(move |(_, vm)| vm.environment == *environment && vm.role == Role::Compute)
    }

    /// The snapshot as it would be with a VM on another host.
    #[must_use]
    pub fn with_move(&self, vm: &VmId, to: &HostId) -> Self {
        let mut moved = self.clone();
        if let Some(vm) = moved.vms.get_mut(vm) {
            vm.host = to.clone();
        }
        moved
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, host) in &self.hosts {
            write!(f, "host {name} {} cores {} memory {} driver {}", host.domain, host.cores, host.memory_mib, host.driver)?;
            if host.draining {
                write!(f, " draining")?;
            }
            match host.standing {
                Standing::Live => writeln!(f)?,
                Standing::Stale(_) => writeln!(f, " stale")?,
                Standing::Away => writeln!(f, " away")?,
            }
        }
        for (name, environment) in &self.environments {
            write!(f, "env {name} home {}", environment.home)?;
            for (domain, failed) in &environment.failed {
                write!(f, " failed {domain} {} {}", failed.count, failed.since.as_secs())?;
            }
            match environment.rested {
                Some(rested) => writeln!(f, " rested {}", rested.as_secs())?,
                None => writeln!(f)?,
            }
        }
        for (name, vm) in &self.vms {
            let role = if vm.role == Role::Head { "head" } else { "compute" };
            write!(f, "vm {name} {role} {} vcpus {} memory {}", vm.host, vm.vcpus, vm.memory_mib)?;
            if let Some(demand) = vm.demand {
                write!(f, " demand {demand:.3}")?;
            }
            if vm.rising {
                write!(f, " rising")?;
            }
            if let Some(high_for) = vm.high_for {
                write!(f, " high-for {}", high_for.as_secs())?;
            }
            match &vm.doing {
                Doing::Running => {}
                Doing::Booting => write!(f, " booting")?,
                Doing::Moving(to) => write!(f, " moving {to}")?,
                Doing::Halted => write!(f, " halted")?,
            }
            for (host, failed) in &vm.failed {
                write!(f, " failed {host} {} {}", failed.count, failed.since.as_secs())?;
            }
            match vm.rested {
                Some(rested) => writeln!(f, " rested {}", rested.as_secs())?,
                None => writeln!(f)?,
            }
        }
        Ok(())
    }
}

/// A snapshot's text was not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "line {line}: {what}, want `host NAME DOMAIN cores N memory N`, `env NAME home DOMAIN` or `vm NAME ROLE HOST [demand N]`"
)]
pub struct BadSnapshot {
    /// Line, from 1.
    pub line: usize,
    /// What is wrong.
    pub what: String,
}

impl std::str::FromStr for Snapshot {
    type Err = BadSnapshot;

    /// Reads the text form. What is left out is: 1 vCPU, 256 MiB, driver `sandbox`, running, demand 0.02, never moved.
    fn from_str(text: &str) -> Result<Self, BadSnapshot> {
        let mut snapshot = Self::default();
        for (index, line) in text.lines().enumerate() {
            let wrong = |what: String| BadSnapshot { line: index + 1, what };
            let line = line.split('#').next().unwrap_or_default();
            let mut words = line.split_whitespace();
            let Some(kind) = words.next() else { continue };
            let mut next = |what: &str| words.next().ok_or_else(|| wrong(format!("{what} is missing")));
            let name = next("a name")?;
            match kind {
                "host" => {
                    let domain = parse(next("a domain")?).map_err(wrong)?;
                    let host = parse_host(domain, words).map_err(wrong)?;
                    snapshot.hosts.insert(parse(name).map_err(wrong)?, host);
                }
                "env" => {
                    next("`home`")?;
                    let home = parse(next("a domain")?).map_err(wrong)?;
                    let environment = parse_environment(home, words).map_err(wrong)?;
                    snapshot.environments.insert(parse(name).map_err(wrong)?, environment);
                }
                "vm" => {
                    let role = if next("a role")? == "head" { Role::Head } else { Role::Compute };
                    let host = parse(next("a host")?).map_err(wrong)?;
                    let vm = parse_vm(name, role, host, words).map_err(wrong)?;
                    snapshot.vms.insert(parse(name).map_err(wrong)?, vm);
                }
                other => return Err(wrong(format!("got {other:?}"))),
            }
        }
        Ok(snapshot)
    }
}

fn parse<T: std::str::FromStr>(word: &str) -> Result<T, String>
where
    T::Err: fmt::Display,
{
    word.parse().map_err(|error: T::Err| format!("{word:?}: {error}"))
}

fn seconds(word: Option<&str>) -> Result<Duration, String> {
    Ok(Duration::from_secs(parse(word.unwrap_or_default())?))
}

fn parse_environment<'a>(home: DomainId, mut words: impl Iterator<Item = &'a str>) -> Result<Environment, String> {
    let mut environment = Environment { home, rested: None, failed: BTreeMap::new() };
    while let Some(key) = words.next() {
        match key {
            "rested" => environment.rested = Some(seconds(words.next())?),
            "failed" => {
                let domain = parse(words.next().unwrap_or_default())?;
                environment.failed.insert(domain, parse_failed(&mut words)?);
            }
            other => return Err(format!("got {other:?}")),
        }
    }
    Ok(environment)
}

fn parse_failed<'a>(words: &mut impl Iterator<Item = &'a str>) -> Result<Failed, String> {
    Ok(Failed { count: parse(words.next().unwrap_or_default())?, since: seconds(words.next())? })
}

fn parse_host<'a>(domain: DomainId, mut words: impl Iterator<Item = &'a str>) -> Result<Host, String> {
    let mut host =
        Host { domain, cores: 1.0, memory_mib: 8192, driver: "sandbox".into(), standing: Standing::Live, draining: false };
    while let Some(key) = words.next() {
        match key {
            "cores" => host.cores = parse(words.next().unwrap_or_default())?,
            "memory" => host.memory_mib = parse(words.next().unwrap_or_default())?,
            "driver" => host.driver = words.next().unwrap_or_default().to_owned(),
            "stale" => host.standing = Standing::Stale(None),
            "away" => host.standing = Standing::Away,
            "draining" => host.draining = true,
            other => return Err(format!("got {other:?}")),
        }
    }
    Ok(host)
}

fn parse_vm<'a>(name: &str, role: Role, host: HostId, mut words: impl Iterator<Item = &'a str>) -> Result<Vm, String> {
    let environment = parse(name.rsplit_once('-').map_or(name, |(environment, _)| environment))?;
    let mut vm = Vm {
        environment,
        role,
        vcpus: 1,
        memory_mib: 256,
        host,
        demand: Some(0.02),
        rising: false,
        high_for: None,
        doing: Doing::Running,
        rested: None,
        failed: BTreeMap::new(),
    };
    while let Some(key) = words.next() {
        match key {
            "vcpus" => vm.vcpus = parse(words.next().unwrap_or_default())?,
            "memory" => vm.memory_mib = parse(words.next().unwrap_or_default())?,
            "demand" => vm.demand = Some(parse(words.next().unwrap_or_default())?),
            "unknown" => vm.demand = None,
            "rising" => vm.rising = true,
            "high-for" => vm.high_for = Some(seconds(words.next())?),
            "booting" => vm.doing = Doing::Booting,
            "halted" => vm.doing = Doing::Halted,
            "moving" => vm.doing = Doing::Moving(parse(words.next().unwrap_or_default())?),
            "rested" => vm.rested = Some(seconds(words.next())?),
            "failed" => {
                let host = parse(words.next().unwrap_or_default())?;
                vm.failed.insert(host, parse_failed(&mut words)?);
            }
            other => return Err(format!("got {other:?}")),
        }
    }
    Ok(vm)
}
