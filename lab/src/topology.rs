//! Hosts, domains and their addresses as data: everything about a lab that follows from its file alone.

use crate::config::{LabConfig, Wire};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;
use violin_common::config::ConfigError;
use violin_common::{DomainId, HostId};

/// An IPv4 network: first address and prefix length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Subnet {
    first: u32,
    prefix_len: u8,
}

impl Subnet {
    /// Length of the prefix, in bits; 8 to 29.
    pub const fn prefix_len(self) -> u8 {
        self.prefix_len
    }

    const fn size(self) -> u32 {
        1 << (32 - self.prefix_len)
    }

    /// The `number`-th address after the first; none outside, and none for the last, which is broadcast.
    pub fn address(self, number: u32) -> Option<Ipv4Addr> {
        (number < self.size() - 1).then(|| Ipv4Addr::from(self.first + number))
    }

    /// Whether the address lies inside.
    pub fn contains(self, address: Ipv4Addr) -> bool {
        u32::from(address) & !(self.size() - 1) == self.first
    }

    const fn overlaps(self, other: Self) -> bool {
        self.first < other.first + other.size() && other.first < self.first + self.size()
    }
}

impl FromStr for Subnet {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("got subnet {text:?}, want its first address and a prefix of 8 to 29, such as \"10.201.1.0/24\"");
        let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let first = u32::from(address.parse::<Ipv4Addr>().map_err(|_| wrong())?);
        let prefix_len = prefix.parse().ok().filter(|bits| (8..=29).contains(bits)).ok_or_else(wrong)?;
        let subnet = Self { first, prefix_len };
        if first & (subnet.size() - 1) == 0 && first.checked_add(subnet.size()).is_some() { Ok(subnet) } else { Err(wrong()) }
    }
}

impl TryFrom<String> for Subnet {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Subnet> for String {
    fn from(subnet: Subnet) -> Self {
        subnet.to_string()
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", Ipv4Addr::from(self.first), self.prefix_len)
    }
}

/// The place of a domain's router.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Router {
    /// Domain it serves.
    pub domain: DomainId,
    /// Its network namespace. The `.` keeps it apart from every host's: names of hosts have none.
    pub netns: String,
    /// Underlay of the domain.
    pub subnet: Subnet,
    /// Its address there.
    pub address: Ipv4Addr,
    /// How the domain's links carry super-frames.
    pub wire: Wire,
}

/// A namespace on a domain's underlay: a host, or the manager.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Station {
    /// Network namespace.
    pub netns: String,
    /// Place of its domain in [`Topology::routers`].
    pub router: usize,
    /// Underlay address.
    pub address: Ipv4Addr,
}

/// All places of a lab.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    /// A router for each domain, in the file's order.
    pub routers: Vec<Router>,
    /// Hosts with their stations, in the file's order.
    pub hosts: Vec<(HostId, Station)>,
    /// The manager, in the first domain.
    pub manager: Station,
}

/// Number of the manager's address in its subnet; the router has 1, the n-th host of the lab 10 + n.
const MANAGER: u32 = 2;

impl Topology {
    /// Lays out a lab. Errors: subnets that overlap or are too small.
    pub fn of(config: &LabConfig) -> Result<Self, ConfigError> {
        let mut routers: Vec<Router> = Vec::new();
        for (index, domain) in config.domains.iter().enumerate() {
            let key = format!("domain[{index}].subnet");
            let subnet = match domain.subnet {
                Some(subnet) => subnet,
                None => format!("10.201.{}.0/24", index + 1)
                    .parse()
                    .map_err(|error: String| ConfigError::value(&key, error, "one"))?,
            };
            if let Some(other) = routers.iter().find(|router| router.subnet.overlaps(subnet)) {
                return Err(ConfigError::value(key, subnet, format!("no overlap with {} of {}", other.subnet, other.domain)));
            }
            let address = subnet.address(1).ok_or_else(|| ConfigError::value(&key, subnet, "room for a router"))?;
            let netns = format!("vl-{}-r.{}", config.name, domain.name);
            routers.push(Router { domain: domain.name.clone(), netns, subnet, address, wire: domain.wire });
        }
        let station = |router: usize, name: &str, number: u32| {
            let subnet = routers[router].subnet;
            let too_small =
                || ConfigError::value(format!("domain[{router}].subnet"), subnet, format!("room for {number} addresses"));
            let address = subnet.address(number).ok_or_else(too_small)?;
            Ok(Station { netns: format!("vl-{}-{name}", config.name), router, address })
        };
        let mut hosts = Vec::new();
        for (number, host) in (11..).zip(&config.hosts) {
            let router = config.domains.iter().position(|domain| domain.name == host.domain);
            let router = router.ok_or_else(|| ConfigError::value("host.domain", &host.domain, "a [[domain]] of this file"))?;
            hosts.push((host.name.clone(), station(router, host.name.as_str(), number)?));
        }
        if routers.is_empty() {
            return Err(ConfigError::value("domain", "none", "at least one"));
        }
        let manager = station(0, "m", MANAGER)?;
        Ok(Self { manager, hosts, routers })
    }

    /// All network namespaces.
    pub fn namespaces(&self) -> impl Iterator<Item = &str> {
        let stations = self.hosts.iter().map(|(_, station)| station).chain([&self.manager]);
        self.routers.iter().map(|router| router.netns.as_str()).chain(stations.map(|station| station.netns.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subnet_contains_its_addresses_only() {
        let subnet: Subnet = "10.201.1.0/24".parse().unwrap();

        assert_eq!(subnet.address(11), Some(Ipv4Addr::new(10, 201, 1, 11)));
        assert_eq!(subnet.address(255), None);
        assert!(subnet.contains(Ipv4Addr::new(10, 201, 1, 255)));
        assert!(!subnet.contains(Ipv4Addr::new(10, 201, 2, 0)));
        for bad in ["10.201.1.1/24", "10.201.1.0", "10.201.1.0/30", "0.0.0.0/0", "x/24"] {
            assert!(bad.parse::<Subnet>().is_err(), "{bad}");
        }
    }

    #[test]
    fn hosts_of_two_domains_lie_in_two_subnets() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/lab/three-hosts.toml");
        let config = LabConfig::parse(&std::fs::read_to_string(path).unwrap()).unwrap();

        let topology = Topology::of(&config).unwrap();

        let addresses: Vec<_> = topology.hosts.iter().map(|(_, station)| station.address.to_string()).collect();
        assert_eq!(addresses, ["10.201.1.11", "10.201.1.12", "10.201.2.13"]);
        assert_eq!(topology.namespaces().count(), 6);
    }
}
