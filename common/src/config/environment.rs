//! Environments: one user's virtual cluster in one TOML file (after MLN: Begnum 2006).

use super::{ConfigError, from_toml};
use crate::api::switch::NetworkSpec;
use crate::control::monitor::Role;
use crate::id::{LABEL, is_label};
use crate::{DomainId, EnvironmentId, MacAddr, VmId, Vni};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::net::Ipv4Addr;

/// An environment as its file says. `configs/environments/*.toml` are examples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct EnvironmentSpec {
    /// Its name.
    pub name: EnvironmentId,
    /// Domain its head node stays in; none: wherever it is placed first.
    pub home: Option<DomainId>,
    /// Its network.
    pub network: EnvironmentNetwork,
    /// Its VMs, the head node first.
    #[serde(rename = "group")]
    pub groups: Vec<Group>,
}

/// The network of an environment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct EnvironmentNetwork {
    /// Identifier, not shared with any other environment.
    pub vni: Vni,
    /// First address of the network, for example 10.77.0.0; nodes get `.1`, `.2`, …; the access namespace the last one.
    pub address: Ipv4Addr,
    /// Length of its prefix, in bits; 16 to 29.
    pub prefix_len: u8,
    /// MAC of the first node; the last octet counts up.
    pub first_mac: MacAddr,
    /// Largest layer-3 packet, in bytes.
    #[serde(default = "default_mtu")]
    pub mtu: u16,
}

const fn default_mtu() -> u16 {
    crate::wire::mesh::DEFAULT_MTU
}

/// VMs of one kind.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Group {
    /// Name of its node (`count` 1) or of its nodes with a number behind it, from 1.
    pub name: String,
    /// What its nodes are.
    pub role: Role,
    /// How many.
    #[serde(default = "one")]
    pub count: u32,
    /// Virtual CPUs of each.
    #[serde(default = "one")]
    pub vcpus: u32,
    /// Memory of each, in MiB.
    pub memory_mib: u64,
}

/// What an address is for, if not for a host. Source: RFC 6890 §2.2.2, RFC 5771 §3.
const fn not_for_hosts(address: Ipv4Addr) -> Option<&'static str> {
    match address.octets()[0] {
        0 => Some("\"this network\""),
        127 => Some("which is loopback"),
        224..=239 => Some("which is for multicast"),
        240..=255 => Some("which is reserved"),
        _ => None,
    }
}

const fn one() -> u32 {
    1
}

/// One node of an environment, spelled out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Name inside the environment: `head`, `c1`.
    pub name: String,
    /// Name of its VM: `alpha-c1`.
    pub vm: VmId,
    /// What it is.
    pub role: Role,
    /// MAC.
    pub mac: MacAddr,
    /// Address.
    pub address: Ipv4Addr,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// MiB.
    pub memory_mib: u64,
}

impl EnvironmentSpec {
    /// Reads and checks a file's text.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let spec: Self = from_toml(text)?;
        spec.check()?;
        Ok(spec)
    }

    /// All nodes of a file that may be started. Errors: what makes the file wrong; also names and networks that nothing in a
    /// guest could work with. Those only here: what a journal has of an earlier version goes on.
    pub fn check(&self) -> Result<Vec<Node>, ConfigError> {
        if self.name.as_str().ends_with('-') {
            return Err(ConfigError::value("name", &self.name, "a name that ends with a letter or digit"));
        }
        if let Some(what) = not_for_hosts(self.network.address) {
            let wanted = "addresses that hosts can have, such as 10.0.0.0 to 10.255.255.255";
            return Err(ConfigError::value("network.address", format!("{}, {what}", self.network.address), wanted));
        }
        // The longest name made of it is the VM's.
        let longest = VmId::MAX - self.name.as_str().len() - 1;
        for (index, group) in self.groups.iter().enumerate() {
            let last = if group.count == 1 { group.name.clone() } else { format!("{}{}", group.name, group.count) };
            let key = || format!("group[{index}].name");
            let what = if group.count == 1 { "" } else { "with each node's number behind it " };
            if !is_label(&last) || group.name.is_empty() {
                return Err(ConfigError::value(key(), format!("{:?}", group.name), format!("{what}a host name: {LABEL}")));
            }
            if last.len() > longest {
                let wanted = format!("{what}at most {longest} characters, so that the VM {}-{last} has {}", self.name, VmId::MAX);
                return Err(ConfigError::value(key(), format!("{:?}", group.name), wanted));
            }
        }
        self.nodes()
    }

    /// Its network as a switch carries it.
    pub const fn network_spec(&self) -> NetworkSpec {
        NetworkSpec { vni: self.network.vni, mtu: self.network.mtu, ageing_s: 300 }
    }

    /// Address of the access namespace: the last host address of the network.
    pub fn access_address(&self) -> Ipv4Addr {
        let hosts = 1u32.checked_shl(32 - u32::from(self.network.prefix_len)).unwrap_or(u32::MAX);
        Ipv4Addr::from(u32::from(self.network.address) | hosts.saturating_sub(2))
    }

    /// All nodes, in the file's order. Errors: what makes the file wrong, but see [`EnvironmentSpec::check`].
    pub fn nodes(&self) -> Result<Vec<Node>, ConfigError> {
        let network = &self.network;
        if !(16..=29).contains(&network.prefix_len) {
            return Err(ConfigError::value("network.prefix-len", network.prefix_len, "16 to 29"));
        }
        let hosts = 1u32 << (32 - u32::from(network.prefix_len));
        let base = u32::from(network.address);
        if base % hosts != 0 {
            return Err(ConfigError::value(
                "network.address",
                network.address,
                format!("the first address of a /{}", network.prefix_len),
            ));
        }
        if !(576..=9000).contains(&network.mtu) {
            return Err(ConfigError::value("network.mtu", network.mtu, "576 to 9000"));
        }
        if network.first_mac.is_group() || network.first_mac == MacAddr([0; 6]) {
            return Err(ConfigError::value("network.first-mac", network.first_mac, "an individual address"));
        }
        let mut nodes = Vec::new();
        let mut names = BTreeSet::new();
        for (index, group) in self.groups.iter().enumerate() {
            if group.count == 0 || group.count > 200 {
                return Err(ConfigError::value(format!("group[{index}].count"), group.count, "1 to 200"));
            }
            if group.vcpus == 0 || group.vcpus > 255 {
                return Err(ConfigError::value(format!("group[{index}].vcpus"), group.vcpus, "1 to 255"));
            }
            if group.memory_mib == 0 {
                return Err(ConfigError::value(format!("group[{index}].memory-mib"), group.memory_mib, "at least 1"));
            }
            for number in 1..=group.count {
                let name = if group.count == 1 { group.name.clone() } else { format!("{}{number}", group.name) };
                let vm = format!("{}-{name}", self.name).parse().map_err(|error| {
                    ConfigError::value(format!("group[{index}].name"), &name, format!("a short name ({error})"))
                })?;
                if !names.insert(name.clone()) {
                    return Err(ConfigError::value(format!("group[{index}].name"), &name, "each node name once"));
                }
                let position = u32::try_from(nodes.len()).unwrap_or(u32::MAX);
                let mac = MacAddr::from_u64(network.first_mac.to_u64() + u64::from(position));
                if position + 3 >= hosts || mac.0[..5] != network.first_mac.0[..5] {
                    return Err(ConfigError::value(
                        format!("group[{index}].count"),
                        group.count,
                        "no more nodes than the network has addresses and the last octet of `first-mac` has room for",
                    ));
                }
                nodes.push(Node {
                    name,
                    vm,
                    role: group.role,
                    mac,
                    address: Ipv4Addr::from(base + position + 1),
                    vcpus: group.vcpus,
                    memory_mib: group.memory_mib,
                });
            }
        }
        let heads = nodes.iter().filter(|node| node.role == Role::Head).count();
        if heads != 1 {
            return Err(ConfigError::value("group[].role", format!("{heads} head nodes"), "exactly one node with role \"head\""));
        }
        Ok(nodes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALPHA: &str = include_str!("../../../configs/environments/alpha.toml");

    #[test]
    fn what_no_guest_could_work_with_is_refused_by_key() {
        let group = |name: &str| ALPHA.replacen("name = \"head\"", &format!("name = {name:?}"), 1);
        let nodes = |name: &str| ALPHA.replacen("name = \"c\"", &format!("name = {name:?}"), 1);
        let network = |address: &str| ALPHA.replacen("10.77.0.0", address, 1);
        let cases = [
            (group("10"), "key `group[0].name`: got \"10\", want a host name"),
            (group("-"), "key `group[0].name`: got \"-\", want a host name"),
            (group(""), "key `group[0].name`: got \"\", want a host name"),
            (group("localhost"), "key `group[0].name`: got \"localhost\", want a host name"),
            (group("Head"), "key `group[0].name`: got \"Head\", want a host name"),
            (group("head.alpha"), "key `group[0].name`: got \"head.alpha\", want a host name"),
            (group(&"h".repeat(28)), "want at most 27 characters, so that the VM alpha-"),
            (nodes(""), "key `group[1].name`: got \"\", want with each node's number behind it a host name"),
            (nodes("1"), "key `group[1].name`: got \"1\", want with each node's number behind it a host name"),
            (ALPHA.replacen("count = 4", "count = 0", 1), "key `group[1].count`: got 0, want 1 to 200"),
            (network("127.5.0.0"), "key `network.address`: got 127.5.0.0, which is loopback, want addresses that hosts can have"),
            (network("224.1.0.0"), "key `network.address`: got 224.1.0.0, which is for multicast"),
            (network("239.255.255.0"), "key `network.address`: got 239.255.255.0, which is for multicast"),
            (network("0.7.0.0"), "key `network.address`: got 0.7.0.0, \"this network\""),
            (network("255.255.255.0"), "key `network.address`: got 255.255.255.0, which is reserved"),
            (ALPHA.replacen("prefix-len = 24", "prefix-len = 29", 1).replacen("count = 4", "count = 6", 1), "`group[1].count`"),
            (ALPHA.replacen("\"alpha\"", "\"alpha-\"", 1), "key `name`: got alpha-"),
        ];
        for (text, wanted) in cases {
            assert_ne!(text, ALPHA, "{wanted}");
            let words =
                EnvironmentSpec::parse(&text).map(|_| wanted.to_owned() + " was accepted").map_err(|error| error.to_string());
            assert!(words.as_ref().is_err_and(|words| words.contains(wanted)), "{words:?}");
        }
    }

    #[test]
    fn unusual_names_and_networks_that_work_are_taken() {
        for (from, to) in
            [("name = \"head\"", "name = \"1a\""), ("10.77.0.0", "100.64.0.0"), ("10.77.0.0", "169.254.0.0"), ("\"c\"", "\"c-\"")]
        {
            let text = ALPHA.replacen(from, to, 1);
            assert!(EnvironmentSpec::parse(&text).is_ok(), "{to}: {:?}", EnvironmentSpec::parse(&text));
        }
    }

    /// A journal of an earlier version may hold it: its VMs must not be lost at the next start.
    #[test]
    fn what_was_accepted_once_still_has_its_nodes() {
        let text = ALPHA.replacen("name = \"head\"", "name = \"10\"", 1).replacen("10.77.0.0", "127.5.0.0", 1);
        let spec: EnvironmentSpec = from_toml(&text).unwrap();

        assert!(spec.check().is_err());
        assert_eq!(spec.nodes().unwrap().len(), 5);
    }
}
