//! Names of things, as operators write them.

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// A name was not acceptable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("got name {got:?}, want 1 to {max} characters of a-z, 0-9 and '-', starting with a letter{}", hint(got, *max))]
pub struct BadName {
    /// What was given.
    pub got: String,
    /// Longest name allowed, in bytes.
    pub max: usize,
}

fn is_legal(name: &str, max: usize) -> bool {
    name.len() <= max
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

fn check(name: &str, max: usize) -> Result<(), BadName> {
    if is_legal(name, max) { Ok(()) } else { Err(BadName { got: name.into(), max }) }
}

/// What to take for a name with a domain's dots or capitals, as `hostname` says it: all names here are one lower-case word.
fn hint(name: &str, max: usize) -> String {
    let short = name.split('.').next().unwrap_or_default().to_ascii_lowercase();
    let rfc1123 = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.".contains(&b));
    if rfc1123 && is_legal(&short, max) { format!("; {short:?} would do") } else { String::new() }
}

/// What [`is_label`] wants, in words.
pub const LABEL: &str = "a-z, 0-9 and '-', a letter or digit first and last, no number, not \"localhost\"";

/// Whether a name can be a host's in its own network: one label of a host name that nothing takes for an address or for the host
/// itself. Source: RFC 1123 §2.1; what inet_aton(3) takes for an address ("10", "0x1f") resolvers never look up.
pub fn is_label(name: &str) -> bool {
    let bytes = name.as_bytes();
    let inner = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let ends = bytes.first().is_some_and(inner) && bytes.last().is_some_and(inner);
    let hexadecimal = name.strip_prefix("0x").is_some_and(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()));
    let number = bytes.iter().all(u8::is_ascii_digit) || hexadecimal;
    name.len() <= 63 && ends && bytes.iter().all(|byte| inner(byte) || *byte == b'-') && !number && name != "localhost"
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

/// What [`is_interface_name`] wants, in words.
pub const INTERFACE_NAME: &str = "1 to 15 characters of letters, digits, '-', '_', '.' and '@', other than \".\" and \"..\"";

/// Whether a network interface can have this name everywhere it goes: in the kernel (15 bytes), in paths below `/proc` and
/// `/sys`, in nftables' rules. The kernel alone would take more.
pub fn is_interface_name(name: &str) -> bool {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.@".contains(&byte);
    (1..=15).contains(&name.len()) && name.bytes().all(legal) && name != "." && name != ".."
}

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
    fn a_name_with_dots_or_capitals_is_refused_with_one_that_would_do() {
        for (bad, wanted) in
            [("H1", "\"h1\" would do"), ("Node7.example.org", "\"node7\" would do"), ("h1.d1", "\"h1\" would do")]
        {
            let words = bad.parse::<HostId>().unwrap_err().to_string();
            assert!(words.contains(wanted) && words.contains(bad), "{words}");
        }
        for bad in ["h_1", "1.2.3.4", "", "-"] {
            assert!(!bad.parse::<HostId>().unwrap_err().to_string().contains("would do"), "{bad}");
        }
    }

    #[test]
    fn a_label_is_no_number_and_begins_and_ends_with_a_letter_or_digit() {
        for good in ["head", "c1", "1a", "a-b", "0xyz"] {
            assert!(is_label(good), "{good:?} was refused");
        }
        for bad in ["", "-", "c-", "-c", "10", "0x1f", "localhost", "C1", "a.b", "a_b", "\u{e4}", &"a".repeat(64)] {
            assert!(!is_label(bad), "{bad:?} was accepted");
        }
    }

    #[test]
    fn interface_names_are_what_kernel_paths_and_nftables_take() {
        for good in ["eth0", "vg-alpha-c1", "br0.42", "veth0@if3", "a.b_c", "...", "123456789012345"] {
            assert!(is_interface_name(good), "{good:?} was refused");
        }
        for bad in ["", ".", "..", "a/b", "a b", "a:1", "a\"b", "a\0", "tap\n", "\u{e4}", "1234567890123456", "\u{e9}\u{e9}"] {
            assert!(!is_interface_name(bad), "{bad:?} was accepted");
        }
    }

    proptest::proptest! {
        #[test]
        fn an_accepted_interface_name_is_one_short_word_and_one_path_component(name in "\\PC{0,17}|[ -~]{0,17}|[a-z.@/:-]{0,17}") {
            let component = std::path::Path::new(&name);
            let one = component.components().count() == 1 && component.file_name().is_some_and(|file| file == name.as_str());
            if is_interface_name(&name) {
                proptest::prop_assert!(one && name.len() <= 15 && name.bytes().all(|byte| byte.is_ascii_graphic()));
                let quoting = name.contains(['"', '\'', '\\', ':', '/', '*', '{', '}', ';', '#', '$']);
                proptest::prop_assert!(!quoting);
            }
        }
    }

    #[test]
    fn a_bad_name_is_refused_on_deserialising_too() {
        assert!(serde_json::from_str::<HostId>("\"../x\"").is_err());
    }
}
