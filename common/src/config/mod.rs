//! Configuration files: TOML text → checked values. Daemons read the file, this module never does.
//!
//! Unknown keys are refused. An error names the key, what was got and what is wanted.

pub mod adapt;
pub mod environment;
pub mod monitor;
pub mod switch;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

/// A configuration was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not TOML, a key unknown or missing, or a value of the wrong type or unit.
    #[error("{0}")]
    Toml(String),
    /// A value outside its range, or clashing with another.
    #[error("key `{key}`: got {got}, want {wanted}")]
    Value {
        /// Key with its path, for example `port[2].mac`.
        key: String,
        /// What was given.
        got: String,
        /// What is possible.
        wanted: String,
    },
}

impl ConfigError {
    /// A refusal of one key's value.
    pub fn value(key: impl Into<String>, got: impl fmt::Display, wanted: impl Into<String>) -> Self {
        Self::Value { key: key.into(), got: got.to_string(), wanted: wanted.into() }
    }
}

/// Longest path of a Unix socket, in bytes (unix(7), without the final zero).
const LONGEST_SOCKET: usize = 107;

/// Refuses a path that nothing can be at.
pub(crate) fn must_be_path(key: &str, path: &Path) -> Result<(), ConfigError> {
    match path.file_name() {
        Some(_) => Ok(()),
        None => Err(ConfigError::value(key, format!("{:?}", path.display().to_string()), "the path of a file or folder")),
    }
}

/// Refuses a path that no Unix socket can be at.
pub(crate) fn must_be_socket(key: &str, path: &Path) -> Result<(), ConfigError> {
    must_be_path(key, path)?;
    match path.as_os_str().len() {
        len if len > LONGEST_SOCKET => {
            let got = format!("a path of {len} bytes ({})", path.display());
            Err(ConfigError::value(key, got, format!("the path of a socket: at most {LONGEST_SOCKET} bytes")))
        }
        _ => Ok(()),
    }
}

/// Reads TOML into a type; unknown keys are refused by the type itself (`deny_unknown_fields`).
pub fn from_toml<T: DeserializeOwned>(text: &str) -> Result<T, ConfigError> {
    toml::from_str(text).map_err(|error| ConfigError::Toml(error.to_string()))
}

/// A span of time in a file: a number and a unit, `"300s"`, `"5ms"`, `"2m"`, `"1h"`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Span(pub Duration);

impl Span {
    /// A span of whole seconds.
    pub const fn from_secs(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }

    /// A span of milliseconds.
    pub const fn from_millis(milliseconds: u64) -> Self {
        Self(Duration::from_millis(milliseconds))
    }
}

impl FromStr for Span {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("got {text:?}, want a whole number and a unit of us, ms, s, m or h, such as \"300s\"");
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| wrong())?;
        let micros = match unit {
            "us" => 1,
            "ms" => 1_000,
            "s" => 1_000_000,
            "m" => 60_000_000,
            "h" => 3_600_000_000,
            _ => return Err(wrong()),
        };
        number.checked_mul(micros).map(|total| Self(Duration::from_micros(total))).ok_or_else(wrong)
    }
}

impl TryFrom<String> for Span {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Span> for String {
    fn from(span: Span) -> Self {
        span.to_string()
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let micros = self.0.as_micros();
        match micros {
            0 => write!(f, "0s"),
            n if n % 3_600_000_000 == 0 => write!(f, "{}h", n / 3_600_000_000),
            n if n % 60_000_000 == 0 => write!(f, "{}m", n / 60_000_000),
            n if n % 1_000_000 == 0 => write!(f, "{}s", n / 1_000_000),
            n if n % 1_000 == 0 => write!(f, "{}ms", n / 1_000),
            n => write!(f, "{n}us"),
        }
    }
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Where a daemon finds its certificate: made by `violin lab` or by the operator's own authority.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Tls {
    /// Certificate of the authority both ends trust, PEM.
    pub ca: PathBuf,
    /// This daemon's certificate, PEM: common name = host, organisational unit = domain, DNS name = host.
    pub cert: PathBuf,
    /// Its private key, PEM.
    pub key: PathBuf,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_where_nothing_can_be_are_refused_by_key() {
        let said = |path: &str| must_be_socket("socket", Path::new(path)).map_err(|error| error.to_string());

        assert_eq!(said("").unwrap_err(), "key `socket`: got \"\", want the path of a file or folder");
        assert!(said("/").is_err() && said("/run/..").is_err());
        assert!(said(&format!("/{}", "x".repeat(106))).is_ok());
        let long = said(&format!("/{}", "x".repeat(107))).unwrap_err();
        assert!(long.contains("got a path of 108 bytes") && long.contains("at most 107 bytes"), "{long}");
    }

    #[test]
    fn spans_round_trip_and_want_a_unit() {
        for text in ["5ms", "301s", "2m", "1h", "7us", "0s"] {
            assert_eq!(text.parse::<Span>().unwrap().to_string(), text);
        }
        for bad in ["", "5", "ms", "5 s", "-1s", "1.5s", "5days", "99999999999999999999s"] {
            assert!(bad.parse::<Span>().is_err(), "{bad}");
        }
    }
}
