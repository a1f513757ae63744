//! Admission: where the VMs of a new environment start, or why it is refused; and what its guests are told.

use crate::model::{Snapshot, Standing};
use crate::records::StoredEnvironment;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use violin_common::config::ConfigError;
use violin_common::config::environment::{EnvironmentSpec, Node};
use violin_common::control::monitor::Role;
use violin_common::{DomainId, EnvironmentId, HostId, VmId, Vni};

/// Why an environment was not admitted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotAdmitted {
    /// Its file is wrong.
    #[error(transparent)]
    Spec(#[from] ConfigError),
    /// There is one of that name.
    #[error("environment {0} exists; end it first with `violin env down {0}`, or choose another name")]
    Duplicate(EnvironmentId),
    /// Its VNI is taken.
    #[error("key `network.vni`: got {vni}, which environment {other} uses; want one no other environment has")]
    VniTaken {
        /// Which.
        vni: Vni,
        /// By whom.
        other: EnvironmentId,
    },
    /// A placement names a node that is not in the file.
    #[error("placement: got node {0:?}, want a node of the environment")]
    UnknownNode(String),
    /// A placement names a host that is not there.
    #[error("placement of {node}: got host {host}, want a connected one of: {known}")]
    UnknownHost {
        /// Node.
        node: String,
        /// Host.
        host: HostId,
        /// Hosts there are.
        known: String,
    },
    /// A placement names a host that takes nothing.
    #[error("placement of {node}: got host {host}, which is being drained; want another, or `violin host undrain {host}` first")]
    Draining {
        /// Node.
        node: String,
        /// Host.
        host: HostId,
    },
    /// Its home is nowhere.
    #[error("key `home`: got domain {home}, want one with a host whose monitor has called since the manager started: {known}")]
    UnknownHome {
        /// Which.
        home: DomainId,
        /// Domains there are.
        known: String,
    },
    /// A placement takes the head node out of its home domain.
    #[error("placement of {node}: {host} is in domain {domain}, want a host of the home domain {home}")]
    HeadAway {
        /// Node.
        node: String,
        /// Host.
        host: HostId,
        /// Its domain.
        domain: DomainId,
        /// Home.
        home: DomainId,
    },
    /// No host has room.
    #[error("no host for {vm}: it needs {wanted_mib} MiB; {free}")]
    NoRoom {
        /// Which.
        vm: VmId,
        /// What it needs.
        wanted_mib: u64,
        /// What there is.
        free: String,
    },
}

/// Where its VMs start and where its home is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// Domain its head node stays in.
    pub home: DomainId,
    /// Host of each VM.
    pub hosts: BTreeMap<VmId, HostId>,
}

/// Finds a host for every VM of an environment.
///
/// Asked-for hosts are kept. The others go, in the file's order, to the host with the most cores not yet promised (counting
/// every VM's vCPUs in full, since nobody knows yet what it will want), of the home domain as long as memory lasts there,
/// then of any other; a head node to its home domain only.
pub fn place(
    snapshot: &Snapshot,
    taken: &BTreeMap<EnvironmentId, Vni>,
    spec: &EnvironmentSpec,
    asked: &BTreeMap<String, HostId>,
) -> Result<Placed, NotAdmitted> {
    let nodes = spec.nodes()?;
    if taken.contains_key(&spec.name) {
        return Err(NotAdmitted::Duplicate(spec.name.clone()));
    }
    let vni = spec.network.vni;
    if let Some((other, _)) = taken.iter().find(|(_, used)| **used == vni) {
        return Err(NotAdmitted::VniTaken { vni, other: other.clone() });
    }
    if let Some(name) = asked.keys().find(|name| nodes.iter().all(|node| node.name != **name)) {
        return Err(NotAdmitted::UnknownNode(name.clone()));
    }
    if let Some(home) = &spec.home
        && !snapshot.hosts.is_empty()
        && snapshot.hosts.values().all(|host| host.domain != *home)
    {
        return Err(NotAdmitted::UnknownHome { home: home.clone(), known: domains(snapshot) });
    }
    let mut room = Room::of(snapshot);
    let mut home = spec.home.clone();
    let mut hosts = BTreeMap::new();
    // Asked-for places first, so that the others see what is left.
    for node in &nodes {
        let Some(host) = asked.get(&node.name) else { continue };
        if room.draining.contains(host) {
            return Err(NotAdmitted::Draining { node: node.name.clone(), host: host.clone() });
        }
        let Some(domain) = room.domain(host) else {
            let known = room.hosts.keys().map(ToString::to_string).collect::<Vec<_>>().join(" ");
            let known = if known.is_empty() { "(none)".into() } else { known };
            return Err(NotAdmitted::UnknownHost { node: node.name.clone(), host: host.clone(), known });
        };
        if node.role == Role::Head {
            let home = home.get_or_insert_with(|| domain.clone()).clone();
            if home != domain {
                return Err(NotAdmitted::HeadAway { node: node.name.clone(), host: host.clone(), domain, home });
            }
        }
        room.take(node, host)?;
        hosts.insert(node.vm.clone(), host.clone());
    }
    for node in nodes.iter().filter(|node| !asked.contains_key(&node.name)) {
        let host = room.best(node, home.as_ref()).ok_or_else(|| room.none_for(node, home.as_ref()))?;
        if home.is_none() {
            home = room.domain(&host);
        }
        room.take(node, &host)?;
        hosts.insert(node.vm.clone(), host);
    }
    let home = home.ok_or_else(|| ConfigError::value("group", "none", "at least a head node"))?;
    Ok(Placed { home, hosts })
}

/// Domains of all hosts, in words.
pub fn domains(snapshot: &Snapshot) -> String {
    let all: BTreeSet<_> = snapshot.hosts.values().map(|host| host.domain.to_string()).collect();
    if all.is_empty() { "(none)".into() } else { all.into_iter().collect::<Vec<_>>().join(" ") }
}

/// What is left on each live host.
struct Room {
    hosts: BTreeMap<HostId, Left>,
    draining: BTreeSet<HostId>,
}

struct Left {
    domain: DomainId,
    memory_mib: u64,
    cores: f64,
}

impl Room {
    fn of(snapshot: &Snapshot) -> Self {
        // A host that is connected but was not observed yet may well start a VM: its capacity is known from its HELLO.
        let there = || snapshot.hosts.iter().filter(|(_, host)| host.standing != Standing::Away);
        let draining = there().filter(|(_, host)| host.draining).map(|(name, _)| name.clone()).collect();
        let there = there().filter(|(_, host)| !host.draining);
        let hosts = there.map(|(name, host)| {
            let promised: u32 = snapshot.held_by(name).map(|(_, vm)| vm.vcpus).sum();
            let left = Left {
                domain: host.domain.clone(),
                memory_mib: snapshot.free_memory_mib(name),
                cores: host.cores - f64::from(promised),
            };
            (name.clone(), left)
        });
        Self { hosts: hosts.collect(), draining }
    }

    fn domain(&self, host: &HostId) -> Option<DomainId> {
        self.hosts.get(host).map(|left| left.domain.clone())
    }

    fn best(&self, node: &Node, home: Option<&DomainId>) -> Option<HostId> {
        let fits = |left: &&Left| left.memory_mib >= node.memory_mib;
        let at_home = |left: &Left| home.is_none_or(|home| *home == left.domain);
        let mut fitting: Vec<_> =
            self.hosts.iter().filter(|(_, left)| fits(left) && (node.role == Role::Compute || at_home(left))).collect();
        fitting.sort_by(|(name_a, a), (name_b, b)| {
            at_home(b).cmp(&at_home(a)).then(b.cores.total_cmp(&a.cores)).then_with(|| name_a.cmp(name_b))
        });
        fitting.first().map(|(name, _)| (*name).clone())
    }

    fn take(&mut self, node: &Node, host: &HostId) -> Result<(), NotAdmitted> {
        if self.hosts.get(host).is_none_or(|left| left.memory_mib < node.memory_mib) {
            return Err(self.none_for(node, None));
        }
        if let Some(left) = self.hosts.get_mut(host) {
            left.memory_mib -= node.memory_mib;
            left.cores -= f64::from(node.vcpus);
        }
        Ok(())
    }

    fn none_for(&self, node: &Node, home: Option<&DomainId>) -> NotAdmitted {
        let free = match self.hosts.is_empty() {
            true if self.draining.is_empty() => "no host is connected".to_owned(),
            true => "all hosts that are connected are being drained".to_owned(),
            false if node.role == Role::Head && home.is_some_and(|home| self.hosts.values().all(|left| left.domain != *home)) => {
                format!(
                    "no host of its home domain {} is connected and not being drained",
                    home.map(ToString::to_string).unwrap_or_default()
                )
            }
            // A head node may not go to the others, whatever they have.
            false => self
                .hosts
                .iter()
                .filter(|(_, left)| node.role == Role::Compute || home.is_none_or(|home| *home == left.domain))
                .map(|(host, left)| format!("{host} has {} MiB free", left.memory_mib))
                .collect::<Vec<_>>()
                .join(", "),
        };
        NotAdmitted::NoRoom { vm: node.vm.clone(), wanted_mib: node.memory_mib, free }
    }
}

/// The `KEY=VALUE` lines a guest is told.
pub fn guest_config(stored: &StoredEnvironment, node: &Node) -> String {
    let spec = &stored.spec;
    let hosts = spec.nodes().unwrap_or_default();
    let hosts = hosts.iter().map(|node| format!("{} {}", node.address, node.name)).collect::<Vec<_>>().join(";");
    let mut text = String::new();
    let lines = [
        ("NAME", node.name.clone()),
        ("VM", node.vm.to_string()),
        ("ENVIRONMENT", spec.name.to_string()),
        ("ADDRESS", format!("{}/{}", node.address, spec.network.prefix_len)),
        ("MAC", node.mac.to_string()),
        ("MTU", spec.network.mtu.to_string()),
        ("HOSTS", hosts),
        ("CANARY", spec.network.vni.to_string()),
        ("SSH_PUBLIC", stored.keys.public.trim().to_owned()),
        ("SSH_PRIVATE", BASE64_STANDARD.encode(&stored.keys.private)),
    ];
    for (key, value) in lines {
        let _ = writeln!(text, "VIOLIN_{key}={value}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOSTS: &str = "host h1 d1 cores 3\nhost h2 d1 cores 3\nhost h3 d2 cores 4\n";

    fn alpha() -> EnvironmentSpec {
        EnvironmentSpec::parse(include_str!("../../configs/environments/alpha.toml")).unwrap()
    }

    fn placed(hosts: &str, asked: &[(&str, &str)]) -> Result<Placed, NotAdmitted> {
        let asked = asked.iter().map(|(node, host)| ((*node).to_owned(), host.parse().unwrap())).collect();
        place(&hosts.parse().unwrap(), &BTreeMap::new(), &alpha(), &asked)
    }

    #[test]
    fn an_environment_is_spread_over_its_home_domain() {
        let placed = placed(HOSTS, &[]).unwrap();

        let on = |host: &str| placed.hosts.values().filter(|at| at.as_str() == host).count();
        assert_eq!((on("h1"), on("h2"), on("h3")), (3, 2, 0));
    }

    #[test]
    fn what_home_cannot_hold_starts_elsewhere_but_never_the_head() {
        let small = "host h1 d1 cores 3 memory 600\nhost h2 d1 cores 3 memory 300\nhost h3 d2 cores 4\n";

        let placed = placed(small, &[]).unwrap();

        assert_eq!(placed.hosts[&"alpha-head".parse().unwrap()].as_str(), "h1");
        assert_eq!(placed.hosts.values().filter(|at| at.as_str() == "h3").count(), 2);
    }

    #[test]
    fn asked_for_hosts_are_kept() {
        let placed = placed(HOSTS, &[("c1", "h3"), ("head", "h2")]).unwrap();

        assert_eq!(placed.hosts[&"alpha-c1".parse().unwrap()].as_str(), "h3");
        assert_eq!(placed.hosts[&"alpha-head".parse().unwrap()].as_str(), "h2");
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let words = |hosts: &str, asked: &[(&str, &str)]| placed(hosts, asked).unwrap_err().to_string();

        assert!(words(HOSTS, &[("c1", "h9")]).contains("h9"));
        assert!(words(HOSTS, &[("c9", "h1")]).contains("c9"));
        assert!(words(HOSTS, &[("head", "h3")]).contains("home domain d1"));
        assert!(words("", &[]).contains("no host is connected"));
        let elsewhere = HOSTS.replace(" d1 ", " d3 ");
        let said = words(&elsewhere, &[]);
        assert!(
            said.contains("key `home`: got domain d1, want one with") && said.contains("d2 d3") && !said.contains("MiB"),
            "{said}"
        );
        let away = HOSTS.replace("cores 3", "cores 3 away");
        assert!(words(&away, &[]).contains("no host of its home domain d1 is connected and not"), "{}", words(&away, &[]));
        let full = HOSTS.replace("cores 3", "cores 3 memory 100");
        assert!(!words(&full, &[]).contains("h3 has"), "{}", words(&full, &[]));
        assert!(words("host h1 d1 cores 3 memory 100", &[]).contains("256 MiB"));
        let draining = HOSTS.replacen("cores 3", "cores 3 draining", 1);
        assert!(words(&draining, &[("c1", "h1")]).contains("got host h1, which is being drained"));
        assert!(placed(&draining, &[]).unwrap().hosts.values().all(|host| host.as_str() != "h1"));
        let taken = BTreeMap::from([("beta".parse().unwrap(), alpha().network.vni)]);
        let clash = place(&HOSTS.parse().unwrap(), &taken, &alpha(), &BTreeMap::new()).unwrap_err().to_string();
        assert!(clash.contains("network.vni") && clash.contains("beta"), "{clash}");
        let taken = BTreeMap::from([("alpha".parse().unwrap(), Vni::new(9).unwrap())]);
        assert!(matches!(place(&HOSTS.parse().unwrap(), &taken, &alpha(), &BTreeMap::new()), Err(NotAdmitted::Duplicate(_))));
    }
}
