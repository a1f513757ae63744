//! The lab file: text → checked description. `configs/lab/*.toml` are examples.

use crate::topology::{Subnet, Topology};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::str::FromStr;
use violin_common::config::monitor::Accel;
use violin_common::config::{ConfigError, Span, from_toml};
use violin_common::{DomainId, HostId};

/// A lab as its file says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct LabConfig {
    /// Name, part of every name the lab makes on the machine.
    #[serde(default = "default_name")]
    pub name: LabName,
    /// What guests are.
    #[serde(default)]
    pub guests: Guests,
    /// How QEMU runs guest code.
    #[serde(default = "default_accel")]
    pub accel: Accel,
    /// Real cores per declared core.
    #[serde(default = "one")]
    pub scale: f64,
    /// Domains.
    #[serde(rename = "domain")]
    pub domains: Vec<Domain>,
    /// Hosts; all switches join through the first.
    #[serde(rename = "host")]
    pub hosts: Vec<Host>,
    /// What lies between the domains.
    #[serde(default)]
    pub wan: Wan,
    /// Time between a monitor's observations.
    #[serde(default = "default_monitor_period")]
    pub monitor_period: Span,
    /// Period of the guests' CPU quota.
    #[serde(default = "default_quota_period")]
    pub quota_period: Span,
    /// Keys of `adaptd.toml`, handed over as they are.
    #[serde(default)]
    pub manager: toml::Table,
}

fn default_name() -> LabName {
    LabName("demo".into())
}
const fn default_quota_period() -> Span {
    Span::from_millis(100)
}
const fn default_monitor_period() -> Span {
    Span::from_secs(1)
}
const fn default_accel() -> Accel {
    Accel::Tcg
}
const fn one() -> f64 {
    1.0
}

/// A lab's name: 1 to 16 characters of a-z, 0-9 and '-', starting with a letter.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LabName(String);

impl LabName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for LabName {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        // The same letters as an environment's name, which also keeps `..` and `/` out of paths.
        let checked: violin_common::EnvironmentId = name.parse().map_err(|error| format!("lab name: {error}"))?;
        Ok(Self(checked.as_str().to_owned()))
    }
}

impl TryFrom<String> for LabName {
    type Error = String;
    fn try_from(name: String) -> Result<Self, String> {
        name.parse()
    }
}

impl From<LabName> for String {
    fn from(name: LabName) -> Self {
        name.0
    }
}

impl std::fmt::Display for LabName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&self.0)
    }
}

/// What guests are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Guests {
    /// QEMU VMs under one libvirtd a host.
    #[default]
    Qemu,
    /// Network namespaces and control groups of this kernel.
    Sandbox,
}

/// One domain: a subnet behind a router.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Domain {
    /// Name.
    pub name: DomainId,
    /// Underlay; of the n-th domain 10.201.n.0/24 if not given.
    pub subnet: Option<Subnet>,
    /// How its links carry super-frames.
    #[serde(default)]
    pub wire: Wire,
}

/// How the links of a domain carry what a sender did not segment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wire {
    /// Whole, as between namespaces: fast. A kernel VXLAN device's bursts then reach a user-space socket unsegmented.
    #[default]
    Fast,
    /// In packets of the MTU with full checksums, as on a real wire.
    Segmented,
}

/// One host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Host {
    /// Name.
    pub name: HostId,
    /// Its domain.
    pub domain: DomainId,
    /// Cores as the manager counts them.
    pub cores: f64,
    /// Memory for guests, in MiB.
    pub memory_mib: u64,
}

/// What lies between the domains, in each direction.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Wan {
    /// Time a packet is under way; at most 10s.
    pub delay: Span,
    /// Packets lost, in percent; 0 to 100.
    pub loss: f64,
    /// Bits a second.
    pub rate: Rate,
    /// Seed of the losses.
    pub seed: u64,
}

impl Default for Wan {
    fn default() -> Self {
        Self { delay: Span::from_millis(5), loss: 0.0, rate: Rate(None), seed: 1 }
    }
}

/// `"unlimited"`, or a number with `kbit`, `mbit` or `gbit`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Rate(pub Option<u64>);

impl TryFrom<String> for Rate {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        if text == "unlimited" {
            return Ok(Self(None));
        }
        let wrong = || format!("got {text:?}, want \"unlimited\" or a whole number of kbit, mbit or gbit such as \"100mbit\"");
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| wrong())?;
        let factor = match unit {
            "kbit" => 1_000,
            "mbit" => 1_000_000,
            "gbit" => 1_000_000_000,
            _ => return Err(wrong()),
        };
        number.checked_mul(factor).filter(|&bits| bits > 0).map(|bits| Self(Some(bits))).ok_or_else(wrong)
    }
}

impl From<Rate> for String {
    fn from(rate: Rate) -> Self {
        rate.0.map_or_else(|| "unlimited".to_owned(), |bits| format!("{}kbit", bits / 1_000))
    }
}

impl LabConfig {
    /// Reads and checks a file's text.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let config: Self = from_toml(text)?;
        config.check()?;
        Ok(config)
    }

    /// Checks what the types cannot: counts, ranges, names that exist.
    pub fn check(&self) -> Result<(), ConfigError> {
        let value = |key: String, got: String, wanted: String| ConfigError::value(key, got, wanted);
        if !(1..=200).contains(&self.domains.len()) {
            return Err(value("domain".into(), self.domains.len().to_string(), "1 to 200 domains".to_owned()));
        }
        if !(1..=200).contains(&self.hosts.len()) {
            return Err(value("host".into(), self.hosts.len().to_string(), "1 to 200 hosts".to_owned()));
        }
        if !(self.scale > 0.0 && self.scale <= 64.0) {
            return Err(value("scale".into(), self.scale.to_string(), "more than 0, at most 64".to_owned()));
        }
        if !(0.0..=100.0).contains(&self.wan.loss) {
            return Err(value("wan.loss".into(), self.wan.loss.to_string(), "0 to 100 (percent)".to_owned()));
        }
        if self.wan.delay > Span::from_secs(10) {
            return Err(value("wan.delay".into(), self.wan.delay.to_string(), "at most 10s".to_owned()));
        }
        let mut domains = BTreeSet::new();
        for (index, domain) in self.domains.iter().enumerate() {
            if !domains.insert(&domain.name) {
                return Err(value(format!("domain[{index}].name"), domain.name.to_string(), "each domain once".to_owned()));
            }
        }
        let mut hosts = BTreeSet::new();
        for (index, host) in self.hosts.iter().enumerate() {
            let key = |name: &str| format!("host[{index}].{name}");
            // The manager's namespace is called `m`; `adaptd`, `pki` and `sandbox` are folders beside the hosts'.
            if ["m", "adaptd", "pki", "sandbox"].contains(&host.name.as_str()) || !hosts.insert(&host.name) {
                let wanted = "each host once, and none called m, adaptd, pki or sandbox";
                return Err(value(key("name"), host.name.to_string(), wanted.to_owned()));
            }
            if !domains.contains(&host.domain) {
                return Err(value(key("domain"), host.domain.to_string(), "the name of a [[domain]] in this file".to_owned()));
            }
            if !(host.cores > 0.0 && host.cores <= 4096.0) {
                return Err(value(key("cores"), host.cores.to_string(), "more than 0, at most 4096".to_owned()));
            }
            if host.memory_mib == 0 {
                return Err(value(key("memory-mib"), "0".to_owned(), "at least 1".to_owned()));
            }
        }
        Topology::of(self).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = "[[domain]]\nname = \"d1\"\n[[host]]\nname = \"h1\"\ndomain = \"d1\"\ncores = 1\nmemory-mib = 1\n";

    #[test]
    fn shipped_files_parse() {
        for file in ["three-hosts", "two-hosts"] {
            let path = format!("{}/../configs/lab/{file}.toml", env!("CARGO_MANIFEST_DIR"));
            LabConfig::parse(&std::fs::read_to_string(path).unwrap()).unwrap();
        }
    }

    #[test]
    fn unknown_keys_and_bad_values_are_refused_by_name() {
        for (extra, named) in [
            ("[wan]\nlag = \"1ms\"", "lag"),
            ("[wan]\nloss = 101.0", "wan.loss"),
            ("[wan]\nrate = \"100\"", "100mbit"),
            ("[wan]\ndelay = \"11s\"", "wan.delay"),
            ("[[host]]\nname = \"m\"\ndomain = \"d1\"\ncores = 1\nmemory-mib = 1", "host[1].name"),
            ("[[host]]\nname = \"h2\"\ndomain = \"d9\"\ncores = 1\nmemory-mib = 1", "host[1].domain"),
            ("[[domain]]\nname = \"d2\"\nsubnet = \"10.201.1.0/25\"", "domain[1].subnet"),
        ] {
            let error = LabConfig::parse(&format!("{SMALL}{extra}")).unwrap_err().to_string();
            assert!(error.contains(named), "{extra}: {error}");
        }
    }
}
