//! What the journal has lost of an environment, put together again from what the monitors run of it.

use crate::records::{Keys, StoredEnvironment};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use violin_common::config::environment::{EnvironmentNetwork, EnvironmentSpec, Group};
use violin_common::control::monitor::{Role, VmSpec};
use violin_common::{DomainId, EnvironmentId, HostId, MacAddr};

/// A VM that a monitor runs: as it was started, and where.
pub type Found = (VmSpec, HostId);

/// The environment that these VMs are, all of them and of no other; `domain` knows each host's.
///
/// Errors: what of it is missing, or does not fit together.
pub fn adopted(
    name: &EnvironmentId,
    found: &[Found],
    domain: impl Fn(&HostId) -> Option<DomainId>,
) -> Result<StoredEnvironment, String> {
    let mut by_address: BTreeMap<Ipv4Addr, &Found> = BTreeMap::new();
    for vm in found {
        if let Some((other, at)) = by_address.insert(vm.0.address, vm) {
            return Err(format!(
                "{} has the address {} on {} and {} on {}; end the wrong one of them on its host first",
                other.vm, other.address, at, vm.0.vm, vm.1
            ));
        }
    }
    let Some((first, _)) = by_address.values().next() else { return Err("no VM of it is seen".into()) };
    let (config, prefix_len) = (Config::read(&first.guest_config), first.prefix_len);
    // Every guest is told of all of them, in order of their addresses.
    let missing: Vec<_> = config.hosts.iter().filter(|(address, _)| !by_address.contains_key(address)).collect();
    if !missing.is_empty() {
        let names: Vec<_> = missing.iter().map(|(address, node)| format!("{name}-{node} ({address})")).collect();
        return Err(format!("{} of it run on no host that is connected; bring their hosts' monitors back", names.join(", ")));
    }
    let mask = u32::MAX.checked_shl(32 - u32::from(prefix_len.min(32))).unwrap_or(0);
    let address = Ipv4Addr::from(u32::from(first.address) & mask);
    let place = u64::from(u32::from(first.address) - u32::from(address)).saturating_sub(1);
    let network = EnvironmentNetwork {
        vni: first.network.vni,
        address,
        prefix_len,
        first_mac: MacAddr::from_u64(first.mac.to_u64().saturating_sub(place)),
        mtu: first.network.mtu,
    };
    let group = |spec: &VmSpec| {
        let node = spec.vm.as_str().strip_prefix(name.as_str()).and_then(|rest| rest.strip_prefix('-'))?;
        Some(Group { name: node.into(), role: spec.role, count: 1, vcpus: spec.vcpus, memory_mib: spec.memory_mib })
    };
    let groups = by_address.values().map(|(spec, _)| {
        group(spec).ok_or_else(|| format!("got VM {} of environment {name}, want a name that begins with {name}-", spec.vm))
    });
    let head = by_address.values().find(|(spec, _)| spec.role == Role::Head);
    let (head, at) = head.ok_or_else(|| format!("no head node of {name} is seen"))?;
    let home = domain(at).ok_or_else(|| format!("the domain of {at}, where {} runs, is not known", head.vm))?;
    let spec = EnvironmentSpec { name: name.clone(), home: None, network, groups: groups.collect::<Result<_, _>>()? };
    let nodes = spec.nodes().map_err(|error| format!("what its monitors tell of {name} does not fit together: {error}"))?;
    for (node, (seen, at)) in nodes.iter().zip(by_address.values()) {
        if (&node.vm, node.mac, node.address) != (&seen.vm, seen.mac, seen.address) || seen.network != spec.network_spec() {
            return Err(format!(
                "what its monitors tell of {name} does not fit together: got {} with {} and {} in network {} on {at}, \
                 want {} with {} and {} in network {}",
                seen.vm, seen.mac, seen.address, seen.network.vni, node.vm, node.mac, node.address, spec.network.vni
            ));
        }
    }
    let placement = by_address.values().map(|(spec, host)| (spec.vm.clone(), host.clone())).collect();
    Ok(StoredEnvironment { spec, home, image: first.image.clone(), placement, keys: config.keys(name)? })
}

/// What a guest was told, as far as it is needed here; see [`crate::place::guest_config`].
#[derive(Default)]
struct Config {
    hosts: Vec<(Ipv4Addr, String)>,
    public: String,
    private: Option<Vec<u8>>,
}

impl Config {
    fn read(text: &str) -> Self {
        let mut config = Self::default();
        for (key, value) in text.lines().filter_map(|line| line.strip_prefix("VIOLIN_")?.split_once('=')) {
            match key {
                "HOSTS" => {
                    let hosts = value.split(';').filter_map(|host| host.split_once(' '));
                    config.hosts = hosts.filter_map(|(at, node)| Some((at.parse().ok()?, node.to_owned()))).collect();
                }
                "SSH_PUBLIC" => value.clone_into(&mut config.public),
                "SSH_PRIVATE" => config.private = BASE64_STANDARD.decode(value.trim()).ok(),
                _ => {}
            }
        }
        config
    }

    fn keys(self, name: &EnvironmentId) -> Result<Keys, String> {
        let private = self.private.and_then(|bytes| String::from_utf8(bytes).ok());
        match private.filter(|_| !self.public.is_empty()) {
            Some(private) => Ok(Keys { public: self.public, private }),
            None => Err(format!("the guests of {name} were not told its key pair")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::vm_spec;

    fn stored() -> StoredEnvironment {
        let spec = EnvironmentSpec::parse(include_str!("../../configs/environments/alpha.toml")).unwrap();
        let nodes = spec.nodes().unwrap();
        let host = |index: usize| format!("h{}", index % 3 + 1).parse().unwrap();
        let placement = nodes.into_iter().enumerate().map(|(index, node)| (node.vm, host(index))).collect();
        let keys = Keys { public: "ssh-ed25519 AAAA violin-alpha".into(), private: "-----BEGIN\nabc\n-----END\n".into() };
        StoredEnvironment { spec, home: "d1".parse().unwrap(), image: None, placement, keys }
    }

    fn found() -> Vec<Found> {
        let stored = stored();
        let nodes = stored.spec.nodes().unwrap();
        // In another order than that of the file.
        nodes.iter().rev().map(|node| (vm_spec(&stored, node), stored.placement[&node.vm].clone())).collect()
    }

    fn adopted_of(found: &[Found]) -> Result<StoredEnvironment, String> {
        adopted(&"alpha".parse().unwrap(), found, |_| Some("d1".parse().unwrap()))
    }

    #[test]
    fn an_environment_is_put_together_again_as_it_was() {
        let lost = stored();

        let again = adopted_of(&found()).unwrap();

        assert_eq!(again.spec.nodes(), lost.spec.nodes());
        assert_eq!((&again.placement, &again.home, again.keys == lost.keys), (&lost.placement, &lost.home, true));
        let specs = |stored: &StoredEnvironment| {
            stored.spec.nodes().unwrap().iter().map(|node| vm_spec(stored, node)).collect::<Vec<_>>()
        };
        assert_eq!(specs(&again), specs(&lost));
    }

    #[test]
    fn what_is_missing_or_does_not_fit_is_named() {
        let change = |change: &dyn Fn(&mut Vec<Found>)| {
            let mut found = found();
            change(&mut found);
            adopted_of(&found).unwrap_err()
        };
        // The last found is the head node.
        assert!(change(&|found| drop(found.remove(0))).contains("alpha-c4 (10.77.0.5) of it run on no host"));
        assert!(change(&|found| drop(found.pop())).contains("alpha-head (10.77.0.1) of it run on no host"));
        assert!(change(&Vec::clear).contains("no VM of it is seen"));
        let twice = change(&|found| found.push((found[0].0.clone(), "h9".parse().unwrap())));
        assert!(twice.contains("alpha-c4 has the address 10.77.0.5 on h2 and alpha-c4 on h9"), "{twice}");
        assert!(change(&|found| found[0].0.mac = MacAddr([2; 6])).contains("does not fit together"));
        assert!(change(&|found| found[0].0.network.vni = violin_common::Vni::new(9).unwrap()).contains("in network 9"));
        assert!(change(&|found| found[0].0.vm = "beta-c4".parse().unwrap()).contains("begins with alpha-"));
        assert!(change(&|found| found[4].0.role = Role::Compute).contains("no head node"));
        let told = change(&|found| found[4].0.guest_config = found[4].0.guest_config.replace("SSH_PRIVATE=", "SSH_PRIVATE=!"));
        assert!(told.contains("not told its key pair"), "{told}");
    }
}
