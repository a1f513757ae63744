//! Environments: one user's virtual cluster in one TOML file (after MLN: Begnum 2006).

use super::{ConfigError, from_toml};
use crate::api::switch::NetworkSpec;
use crate::control::monitor::Role;
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
        spec.nodes()?;
        Ok(spec)
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

    /// All nodes, in the file's order. Errors: what makes the file wrong.
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
