//! Names of things, as operators write them.

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// A name was not acceptable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("got name {got:?}, want 1 to {max} characters of a-z, 0-9 and '-', starting with a letter")]
pub struct BadName {
    /// What was given.
    pub got: String,
    /// Longest name allowed, in bytes.
    pub max: usize,
}

fn check(name: &str, max: usize) -> Result<(), BadName> {
    let legal = name.len() <= max
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if legal { Ok(()) } else { Err(BadName { got: name.into(), max }) }
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $max:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Longest name allowed, in bytes.
            pub const MAX: usize = $max;

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = BadName;
            fn from_str(name: &str) -> Result<Self, BadName> {
                check(name, Self::MAX)?;
                Ok(Self(name.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = BadName;
            fn try_from(name: String) -> Result<Self, BadName> {
                check(&name, Self::MAX)?;
                Ok(Self(name))
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name!(
    /// A host; also the name of its switch as tunnel end (VTEP) and of its certificate.
    HostId, 32
);
name!(
    /// A network domain: hosts under one administration and one underlay network.
    DomainId, 32
);
name!(
    /// One user's virtual cluster.
    EnvironmentId, 16
);
name!(
    /// A virtual machine: `ENVIRONMENT-NODE`, for example `alpha-c1`. Also the name of its libvirt domain.
    VmId, 33
);

/// A port of one switch. Numbers are never reused during the life of a daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PortId(pub u32);

impl fmt::Display for PortId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "p{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_lower_case_and_start_with_a_letter() {
        assert!("alpha-c1".parse::<VmId>().is_ok());
        for bad in ["", "1a", "-a", "A", "a_b", "a/b", "a b", &"a".repeat(34)] {
            assert!(bad.parse::<VmId>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn a_bad_name_is_refused_on_deserialising_too() {
        assert!(serde_json::from_str::<HostId>("\"../x\"").is_err());
    }
}
