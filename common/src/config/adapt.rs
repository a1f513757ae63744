//! `adaptd.toml`.

use super::{ConfigError, Span, Tls, from_toml, must_be_path, must_be_socket};
use crate::api::adapt::Mode;
use crate::control::monitor::MigrationMode;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;

/// Everything the manager is told at start. `configs/adaptd.example.toml` documents each key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct AdaptConfig {
    /// Where monitors connect.
    pub listen: SocketAddr,
    /// Path of the local socket.
    #[serde(default = "default_socket")]
    pub socket: PathBuf,
    /// The journal, an embedded database.
    #[serde(default = "default_journal")]
    pub journal: PathBuf,
    /// Certificate.
    pub tls: Tls,
    /// What is done with decisions.
    #[serde(default = "default_mode")]
    pub mode: Mode,
    /// Time between cycles.
    #[serde(default = "default_period")]
    pub period: Span,
    /// Time between announcing a move and its first step.
    #[serde(default = "default_notice")]
    pub notice: Span,
    /// Moves of one gang under way at once; 1 to 8.
    #[serde(default = "default_parallel")]
    pub parallel: u32,
    /// How VMs are moved.
    #[serde(default = "default_migration")]
    pub migration: MigrationMode,
    /// Longest time from starting an environment to its last VM being ready; 1s to 1h.
    #[serde(default = "default_ready_timeout")]
    pub ready_timeout: Span,
    /// The policy that acts.
    #[serde(default)]
    pub policy: Policy,
}

fn default_socket() -> PathBuf {
    "/run/violin/adaptd.sock".into()
}
fn default_journal() -> PathBuf {
    "/var/lib/violin/adaptd.redb".into()
}
const fn default_mode() -> Mode {
    Mode::Act
}
const fn default_period() -> Span {
    Span::from_secs(1)
}
const fn default_notice() -> Span {
    Span::from_secs(0)
}
const fn default_parallel() -> u32 {
    1
}
const fn default_migration() -> MigrationMode {
    MigrationMode::PreCopy
}
const fn default_ready_timeout() -> Span {
    Span::from_secs(300)
}

/// Settings of the `violin` policy (Ruth et al. 2011 §2.2.2).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Policy {
    /// Smoothed demand above this is high; 0 to 1.
    pub high_demand: f64,
    /// Smoothed demand below this is low; 0 to 1, below `high-demand`.
    pub low_demand: f64,
    /// Time after which an observation counts half.
    pub half_life: Span,
    /// Least fall of the spread of host scores that is worth a move.
    pub min_gain: f64,
    /// Time after a VM's move, or an environment's, in which it is not moved again.
    pub cooldown: Span,
    /// Observations older than this make a host unknown: nothing moves from or to it.
    pub max_age: Span,
    /// Cycles in a row in which the same VMs must be in high demand before a move is decided; 1 to 1000.
    pub settle: u32,
    /// Part of a host's cores by which its low-demand VMs may exceed them when they make room for another VM; 0 to 1.
    pub overcommit: f64,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            high_demand: 0.75,
            low_demand: 0.25,
            half_life: Span::from_secs(10),
            min_gain: 0.02,
            cooldown: Span::from_secs(60),
            max_age: Span::from_secs(10),
            settle: 3,
            overcommit: 0.25,
        }
    }
}

impl AdaptConfig {
    /// Reads and checks a file's text.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let config: Self = from_toml(text)?;
        must_be_socket("socket", &config.socket)?;
        must_be_path("journal", &config.journal)?;
        let policy = &config.policy;
        if !(policy.high_demand > 0.0 && policy.high_demand <= 1.0) {
            return Err(ConfigError::value("policy.high-demand", policy.high_demand, "more than 0, at most 1"));
        }
        if !(policy.low_demand >= 0.0 && policy.low_demand < policy.high_demand) {
            return Err(ConfigError::value("policy.low-demand", policy.low_demand, "at least 0, below high-demand"));
        }
        if !(policy.min_gain > 0.0 && policy.min_gain.is_finite()) {
            return Err(ConfigError::value("policy.min-gain", policy.min_gain, "more than 0"));
        }
        if !(1..=1000).contains(&policy.settle) {
            return Err(ConfigError::value("policy.settle", policy.settle, "1 to 1000"));
        }
        if !(0.0..=1.0).contains(&policy.overcommit) {
            return Err(ConfigError::value("policy.overcommit", policy.overcommit, "0 to 1"));
        }
        if policy.half_life < Span::from_millis(100) {
            return Err(ConfigError::value("policy.half-life", policy.half_life, "at least 100ms"));
        }
        if !(1..=8).contains(&config.parallel) {
            return Err(ConfigError::value("parallel", config.parallel, "1 to 8"));
        }
        if config.ready_timeout < Span::from_secs(1) || config.ready_timeout > Span::from_secs(3600) {
            return Err(ConfigError::value("ready-timeout", config.ready_timeout, "1s to 1h"));
        }
        if config.period < Span::from_millis(100) || config.period > Span::from_secs(3600) {
            return Err(ConfigError::value("period", config.period, "100ms to 1h"));
        }
        Ok(config)
    }
}
