//! `monitord.toml`.

use super::{ConfigError, Span, Tls, from_toml, must_be_path, must_be_socket};
use crate::{DomainId, EnvironmentId, HostId};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

/// Everything a monitor is told at start. `configs/monitord.example.toml` documents each key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct MonitorConfig {
    /// Name of this host; must be the certificate's.
    pub host: HostId,
    /// Domain of this host; must be the certificate's.
    pub domain: DomainId,
    /// Where the manager listens.
    pub manager: SocketAddr,
    /// Where other monitors fetch images.
    pub listen: SocketAddr,
    /// The switch's local socket.
    #[serde(default = "default_switch_socket")]
    pub switch_socket: PathBuf,
    /// Certificate.
    pub tls: Tls,
    /// Time between observations; 100ms to 60s.
    #[serde(default = "default_period")]
    pub period: Span,
    /// Image store.
    #[serde(default = "default_images")]
    pub images: PathBuf,
    /// Files made while running: consoles, sockets, guest state.
    #[serde(default = "default_run")]
    pub run: PathBuf,
    /// What the namespaces and control groups made here bear in their names, for whoever cleans up by names; the same for all
    /// monitors that share sandbox guests. None: one taken from the folders' paths, which tells monitors on one machine apart.
    pub mark: Option<String>,
    /// What guests may use.
    pub capacity: Capacity,
    /// How guests are run.
    pub driver: Driver,
}

fn default_switch_socket() -> PathBuf {
    "/run/violin/switchd.sock".into()
}
const fn default_period() -> Span {
    Span::from_secs(1)
}
fn default_images() -> PathBuf {
    "/var/lib/violin/images".into()
}
fn default_run() -> PathBuf {
    "/run/violin/monitord".into()
}

/// What guests of this host may use together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Capacity {
    /// Cores, as the manager counts them.
    pub cores: f64,
    /// Real cores per declared core; the guests' CPU group gets `cores × scale` of quota once no guest boots.
    #[serde(default = "one")]
    pub scale: f64,
    /// Memory, in MiB.
    pub memory_mib: u64,
    /// Name of the guests' CPU group under every mounted cgroup controller (`NAME.partition`); none: no group, no quota.
    pub cpu_group: Option<String>,
    /// Period of that quota; 10ms to 1s. Short ones share more evenly, but VMs that boot under a short one may hang.
    #[serde(default = "default_quota_period")]
    pub quota_period: Span,
}

const fn default_quota_period() -> Span {
    Span::from_millis(100)
}

const fn one() -> f64 {
    1.0
}

/// How guests are run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", tag = "kind")]
pub enum Driver {
    /// QEMU under libvirt.
    #[serde(rename_all = "kebab-case")]
    Libvirt {
        /// For example `qemu:///system` or `qemu+unix:///system?socket=PATH`.
        uri: String,
        /// How sources reach this host's libvirtd: `qemu+tcp://ADDRESS/system`.
        incoming_uri: String,
        /// Address to which the memory of arriving VMs is sent.
        migrate_address: IpAddr,
        /// `kvm` or `tcg`.
        accel: Accel,
    },
    /// Network namespaces and cgroups on this kernel.
    #[serde(rename_all = "kebab-case")]
    Sandbox {
        /// Extra pause while a guest moves.
        #[serde(default = "zero")]
        pause: Span,
        /// Directory shared by the monitors of one machine, through which guests are handed over.
        shared: PathBuf,
        /// Program run as the guest's first process: `violin-probe`.
        guest_program: PathBuf,
    },
}

const fn zero() -> Span {
    Span::from_secs(0)
}

/// How QEMU runs guest code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accel {
    /// Hardware virtualisation.
    Kvm,
    /// Translation: slow, works everywhere.
    Tcg,
}

impl MonitorConfig {
    /// Reads and checks a file's text.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let config: Self = from_toml(text)?;
        must_be_socket("switch-socket", &config.switch_socket)?;
        must_be_path("images", &config.images)?;
        must_be_path("run", &config.run)?;
        if let Driver::Sandbox { shared, guest_program, .. } = &config.driver {
            must_be_path("driver.shared", shared)?;
            must_be_path("driver.guest-program", guest_program)?;
        }
        if config.period < Span::from_millis(100) || config.period > Span::from_secs(60) {
            return Err(ConfigError::value("period", config.period, "100ms to 60s"));
        }
        if config.capacity.quota_period < Span::from_millis(10) || config.capacity.quota_period > Span::from_secs(1) {
            return Err(ConfigError::value("capacity.quota-period", config.capacity.quota_period, "10ms to 1s"));
        }
        // Other monitors are told this address; they would fetch from themselves.
        if config.listen.ip().is_unspecified() {
            let wanted = "an address of this host that other hosts reach";
            return Err(ConfigError::value("listen", config.listen, wanted));
        }
        for (key, value) in [("capacity.cores", config.capacity.cores), ("capacity.scale", config.capacity.scale)] {
            if !(value > 0.0 && value <= 4096.0) {
                return Err(ConfigError::value(key, value, "more than 0, at most 4096"));
            }
        }
        if let Some(Err(_)) = config.mark.as_ref().map(|mark| mark.parse::<EnvironmentId>()) {
            let wanted = "the letters of an environment's name: a-z, 0-9 and -, a letter first";
            return Err(ConfigError::value("mark", config.mark.unwrap_or_default(), wanted));
        }
        if config.capacity.memory_mib == 0 {
            return Err(ConfigError::value("capacity.memory-mib", config.capacity.memory_mib, "at least 1"));
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../../../configs/monitord.example.toml");

    #[test]
    fn errors_name_key_got_and_wanted() {
        assert!(MonitorConfig::parse(EXAMPLE).is_ok());
        let bad = [
            ("192.0.2.11:7473", "0.0.0.0:7473", "key `listen`: got 0.0.0.0:7473, want an address of this host"),
            ("192.0.2.11:7473", "[::]:7473", "key `listen`: got [::]:7473, want an address of this host"),
            ("cores = 4.0", "cores = 0.0", "key `capacity.cores`: got 0, want more than 0, at most 4096"),
            ("# mark = \"lab1\"", "mark = \"a.b\"", "key `mark`: got a.b, want the letters of an environment's name"),
            ("# period = \"1s\"", "period = \"1ms\"", "key `period`: got 1ms, want 100ms to 60s"),
        ];
        for (from, to, want) in bad {
            let text = EXAMPLE.replacen(from, to, 1);
            assert_ne!(text, EXAMPLE, "{from}");
            let said = MonitorConfig::parse(&text).unwrap_err().to_string();
            assert!(said.contains(want), "{said}");
        }
    }
}
