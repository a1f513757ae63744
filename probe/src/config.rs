//! What a guest is told: `KEY=VALUE` lines (docs/guest.md). Text in, checked values out.

use std::net::Ipv4Addr;

/// A guest's configuration was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadConfig {
    /// Key.
    pub key: String,
    /// What was given.
    pub got: String,
    /// What is wanted.
    pub wanted: &'static str,
}

impl std::fmt::Display for BadConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "guest configuration, key {}: got {:?}, want {}", self.key, self.got, self.wanted)
    }
}

impl std::error::Error for BadConfig {}

/// Everything a guest is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestConfig {
    /// Host name.
    pub name: String,
    /// Name of the VM.
    pub vm: String,
    /// Environment.
    pub environment: String,
    /// Address of eth0.
    pub address: Ipv4Addr,
    /// Length of its prefix, in bits.
    pub prefix_len: u8,
    /// MAC of eth0, if told.
    pub mac: Option<[u8; 6]>,
    /// MTU of eth0, if told.
    pub mtu: Option<u16>,
    /// Names of the environment.
    pub hosts: Vec<(Ipv4Addr, String)>,
    /// Tag of the environment's canaries.
    pub canary: u64,
    /// Key that opens root, as a line of authorized_keys.
    pub ssh_public: String,
    /// Its private half, the text of the file.
    pub ssh_private: Vec<u8>,
}

impl GuestConfig {
    /// Reads the lines. Unknown keys are ignored, so that an older guest boots under a newer manager.
    ///
    /// Errors: a key missing or its value of the wrong form.
    pub fn parse(text: &str) -> Result<Self, BadConfig> {
        let find = |key: &str| text.lines().find_map(|line| line.trim().strip_prefix(key)?.strip_prefix('='));
        let need = |key: &str, wanted| find(key).ok_or_else(|| bad(key, "nothing", wanted));
        let name = need("VIOLIN_NAME", "a host name")?;
        if name.is_empty() || name.len() > 63 || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
            return Err(bad("VIOLIN_NAME", name, "1 to 63 characters of a-z, 0-9 and '-'"));
        }
        let address_text = need("VIOLIN_ADDRESS", "an address with prefix length, such as 10.77.0.2/24")?;
        let (address, prefix_len) = address_text
            .split_once('/')
            .and_then(|(address, prefix)| Some((address.parse().ok()?, prefix.parse().ok().filter(|bits| *bits <= 32)?)))
            .ok_or_else(|| bad("VIOLIN_ADDRESS", address_text, "an address with prefix length, such as 10.77.0.2/24"))?;
        let mac = match find("VIOLIN_MAC") {
            Some(mac) => Some(
                crate::frame::parse_mac(mac)
                    .map_err(|_| bad("VIOLIN_MAC", mac, "six pairs of digits such as 52:54:00:77:00:02"))?,
            ),
            None => None,
        };
        let mtu = match find("VIOLIN_MTU") {
            Some(mtu) => Some(
                mtu.parse().ok().filter(|mtu| (576..=9000).contains(mtu)).ok_or_else(|| bad("VIOLIN_MTU", mtu, "576 to 9000"))?,
            ),
            None => None,
        };
        let wanted = "an integer below 2^32";
        let canary = need("VIOLIN_CANARY", wanted)?;
        let canary: u32 = canary.parse().map_err(|_| bad("VIOLIN_CANARY", canary, wanted))?;
        let wanted = "a private key's file in base 64";
        let private = need("VIOLIN_SSH_PRIVATE", wanted)?;
        let ssh_private = base64(private).ok_or_else(|| bad("VIOLIN_SSH_PRIVATE", "something else", wanted))?;
        Ok(Self {
            name: name.to_owned(),
            vm: find("VIOLIN_VM").unwrap_or(name).to_owned(),
            environment: find("VIOLIN_ENVIRONMENT").unwrap_or_default().to_owned(),
            address,
            prefix_len,
            mac,
            mtu,
            hosts: hosts(find("VIOLIN_HOSTS").unwrap_or_default())?,
            canary: u64::from(canary),
            ssh_public: need("VIOLIN_SSH_PUBLIC", "a public key's line")?.to_owned(),
            ssh_private,
        })
    }

    /// The text of /etc/hosts.
    pub fn hosts_file(&self) -> String {
        let mut text = String::from("127.0.0.1 localhost\n");
        for (address, name) in &self.hosts {
            text.push_str(&format!("{address} {name}\n"));
        }
        if !self.hosts.iter().any(|(_, name)| *name == self.name) {
            text.push_str(&format!("{} {}\n", self.address, self.name));
        }
        text
    }
}

fn bad(key: &str, got: &str, wanted: &'static str) -> BadConfig {
    BadConfig { key: key.to_owned(), got: got.to_owned(), wanted }
}

fn hosts(text: &str) -> Result<Vec<(Ipv4Addr, String)>, BadConfig> {
    let one = |entry: &str| {
        let (address, name) = entry.trim().split_once(' ')?;
        Some((address.parse().ok()?, name.trim().to_owned()))
    };
    let entries = text.split(';').filter(|entry| !entry.trim().is_empty());
    let wanted = "addresses and names such as 10.77.0.1 head;10.77.0.2 c1";
    entries.map(|entry| one(entry).ok_or_else(|| bad("VIOLIN_HOSTS", entry, wanted))).collect()
}

/// Reads base 64 with padding. Source: RFC 4648 §4. `None` if it is something else.
fn base64(text: &str) -> Option<Vec<u8>> {
    let text = text.trim().as_bytes();
    if text.is_empty() || !text.len().is_multiple_of(4) {
        return None;
    }
    let padding = text.iter().rev().take_while(|byte| **byte == b'=').count();
    let digits = text.get(..text.len().checked_sub(padding).filter(|_| padding <= 2)?)?;
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    for group in digits.chunks(4) {
        let mut bits = 0u32;
        for digit in group {
            let value = match digit {
                b'A'..=b'Z' => digit - b'A',
                b'a'..=b'z' => digit - b'a' + 26,
                b'0'..=b'9' => digit - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                _ => return None,
            };
            bits = bits << 6 | u32::from(value);
        }
        let missing = 4 - group.len();
        let whole = (bits << (6 * missing)).to_be_bytes();
        bytes.extend_from_slice(&whole[1..4 - missing]);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "VIOLIN_NAME=c1\nVIOLIN_VM=alpha-c1\nVIOLIN_ENVIRONMENT=alpha\nVIOLIN_ADDRESS=10.77.0.2/24\n\
        VIOLIN_MAC=52:54:00:77:00:02\nVIOLIN_MTU=1400\nVIOLIN_HOSTS=10.77.0.1 head;10.77.0.2 c1\nVIOLIN_CANARY=7001\n\
        VIOLIN_SSH_PUBLIC=ssh-ed25519 AAAA= alpha\nVIOLIN_SSH_PRIVATE=cHJpdmF0ZQo=\nVIOLIN_LATER=1\n";

    #[test]
    fn a_whole_configuration_is_read_and_unknown_keys_do_no_harm() {
        let config = GuestConfig::parse(TEXT).unwrap();
        assert_eq!((config.name.as_str(), config.vm.as_str(), config.environment.as_str()), ("c1", "alpha-c1", "alpha"));
        assert_eq!((config.address, config.prefix_len), (Ipv4Addr::new(10, 77, 0, 2), 24));
        assert_eq!((config.mac, config.mtu, config.canary), (Some([0x52, 0x54, 0, 0x77, 0, 2]), Some(1400), 7001));
        assert_eq!(config.ssh_public, "ssh-ed25519 AAAA= alpha");
        assert_eq!(config.ssh_private, b"private\n");
        assert_eq!(config.hosts_file(), "127.0.0.1 localhost\n10.77.0.1 head\n10.77.0.2 c1\n");
    }

    #[test]
    fn a_wrong_value_is_named_with_its_key() {
        for (key, from, to) in [
            ("VIOLIN_NAME", "NAME=c1", "NAME=c 1"),
            ("VIOLIN_ADDRESS", "0.2/24", "0.2/33"),
            ("VIOLIN_MAC", "00:02\n", "00\n"),
            ("VIOLIN_MTU", "1400", "100"),
            ("VIOLIN_HOSTS", "10.77.0.1 head", "head"),
            ("VIOLIN_CANARY", "7001", "alpha"),
            ("VIOLIN_SSH_PRIVATE", "cHJpdmF0ZQo=", "cHJ"),
            ("VIOLIN_SSH_PUBLIC", "VIOLIN_SSH_PUBLIC", "OTHER"),
        ] {
            assert_eq!(GuestConfig::parse(&TEXT.replace(from, to)).unwrap_err().key, key);
        }
    }

    #[test]
    fn base64_matches_the_vectors_of_its_standard() {
        for (plain, coded) in [("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(coded).unwrap(), plain.as_bytes());
        }
        for wrong in ["", "Zg", "====", "Z===", "Zm 8", "Zm8=Zm8="] {
            assert_eq!(base64(wrong), None, "{wrong}");
        }
    }
}
