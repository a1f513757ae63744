//! `switchd.toml`.

use super::{ConfigError, Span, Tls, from_toml, must_be_socket};
use crate::control::mesh::Aead;
use crate::id::{INTERFACE_NAME, is_interface_name};
use crate::{DomainId, HostId, MacAddr, Vni};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Everything a switch is told at start. `configs/switchd.example.toml` documents each key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct SwitchConfig {
    /// Name of this host; must be the certificate's.
    pub host: HostId,
    /// Domain of this host; must be the certificate's.
    pub domain: DomainId,
    /// Address of the mesh port: control and data.
    pub listen: SocketAddr,
    /// Mesh ports of known members; empty: this is the first.
    #[serde(default)]
    pub join: Vec<SocketAddr>,
    /// Path of the local socket.
    #[serde(default = "default_socket")]
    pub socket: PathBuf,
    /// Certificate.
    pub tls: Tls,
    /// Which cipher seals data.
    #[serde(default)]
    pub aead: AeadChoice,
    /// Which library computes it.
    #[serde(default)]
    pub aead_library: LibraryChoice,
    /// Where data may go unsealed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub plain: Vec<PlainPath>,
    /// Largest packet the underlay between all members carries, in bytes; 1280 to 9216.
    #[serde(default = "default_underlay_mtu")]
    pub underlay_mtu: u16,
    /// Networks carried from the start.
    #[serde(default, rename = "network")]
    pub networks: Vec<NetworkConfig>,
    /// Ports made at the start.
    #[serde(default, rename = "port")]
    pub ports: Vec<PortConfig>,
}

fn default_socket() -> PathBuf {
    "/run/violin/switchd.sock".into()
}

const fn default_underlay_mtu() -> u16 {
    1500
}

/// Which cipher seals data between switches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "&'static str")]
pub enum AeadChoice {
    /// The one that the slower end of each pair is faster with, as both have measured at their start.
    #[default]
    Auto,
    /// This one only.
    Only(Aead),
}

impl From<AeadChoice> for &'static str {
    fn from(choice: AeadChoice) -> Self {
        match choice {
            AeadChoice::Auto => "auto",
            AeadChoice::Only(aead) => aead.name(),
        }
    }
}

impl TryFrom<String> for AeadChoice {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let one = Aead::ALL.into_iter().find(|aead| aead.name() == text).map(Self::Only);
        let want = "want `auto`, `aes-256-gcm` or `chacha20-poly1305`";
        match (text.as_str(), one) {
            ("auto", _) => Ok(Self::Auto),
            (_, Some(one)) => Ok(one),
            ("none", None) => Err(format!(
                "got `none`, {want}: data is sealed always, but where both ends trust the way between them and say \
                 `plain = [{{ domain = \"THE OTHER'S\", interface = \"UNDERLAY INTERFACE\" }}]`"
            )),
            _ => Err(format!("got `{text}`, {want}")),
        }
    }
}

/// Which library computes the cipher.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LibraryChoice {
    /// The faster one, as measured at the start.
    #[default]
    Auto,
    /// `ring`.
    Ring,
    /// `aws-lc-rs`.
    AwsLcRs,
}

/// A way on which data goes plain, if the other end says the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct PlainPath {
    /// Domain of the other end.
    pub domain: DomainId,
    /// Interface of the underlay that leads there; plain data leaves and is taken through no other.
    pub interface: String,
}

/// One network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct NetworkConfig {
    /// Identifier.
    pub vni: Vni,
    /// Largest layer-3 packet, in bytes; 576 to 9000.
    #[serde(default = "default_mtu")]
    pub mtu: u16,
    /// How long a silent learned MAC stays in the FDB; 10s to 1h.
    #[serde(default = "default_ageing")]
    pub ageing: Span,
}

const fn default_mtu() -> u16 {
    crate::wire::mesh::DEFAULT_MTU
}

const fn default_ageing() -> Span {
    Span::from_secs(300)
}

/// One port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", tag = "kind")]
pub enum PortConfig {
    /// An existing interface.
    #[serde(rename_all = "kebab-case")]
    Packet {
        /// Network.
        vni: Vni,
        /// Interface.
        interface: String,
        /// Owned MAC with its VM's name; none: sources are learned.
        mac: Option<MacAddr>,
        /// Whether it is taken although the host itself needs it.
        #[serde(default)]
        take_over: bool,
    },
    /// A TAP made by the switch.
    #[serde(rename_all = "kebab-case")]
    Tap {
        /// Network.
        vni: Vni,
        /// Interface.
        interface: String,
        /// Network namespace it is moved into.
        netns: Option<String>,
    },
    /// A gateway to a foreign VXLAN tunnel end.
    #[serde(rename_all = "kebab-case")]
    Vxlan {
        /// Network.
        vni: Vni,
        /// Local address and port.
        local: SocketAddr,
        /// Foreign address and port.
        remote: SocketAddr,
        /// Identifier on the foreign side.
        remote_vni: Vni,
    },
}

impl PortConfig {
    /// The network it belongs to.
    pub const fn vni(&self) -> Vni {
        match self {
            Self::Packet { vni, .. } | Self::Tap { vni, .. } | Self::Vxlan { vni, .. } => *vni,
        }
    }
}

impl SwitchConfig {
    /// Reads and checks a file's text.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let config: Self = from_toml(text)?;
        must_be_socket("socket", &config.socket)?;
        if !(1280..=9216).contains(&config.underlay_mtu) {
            return Err(ConfigError::value("underlay-mtu", config.underlay_mtu, "1280 to 9216"));
        }
        if config.host.as_str().ends_with('-') {
            return Err(ConfigError::value("host", &config.host, "a name that ends with a letter or digit"));
        }
        for (index, path) in config.plain.iter().enumerate() {
            if !is_interface_name(&path.interface) {
                return Err(ConfigError::value(format!("plain[{index}].interface"), &path.interface, INTERFACE_NAME));
            }
        }
        let mut vnis = BTreeSet::new();
        for (index, network) in config.networks.iter().enumerate() {
            if !vnis.insert(network.vni) {
                return Err(ConfigError::value(format!("network[{index}].vni"), network.vni, "each network once"));
            }
            if !(576..=9000).contains(&network.mtu) {
                return Err(ConfigError::value(format!("network[{index}].mtu"), network.mtu, "576 to 9000"));
            }
            if network.ageing < Span::from_secs(10) || network.ageing > Span::from_secs(3600) {
                return Err(ConfigError::value(format!("network[{index}].ageing"), network.ageing, "10s to 1h"));
            }
        }
        let mut macs = BTreeSet::new();
        let mut interfaces = BTreeSet::new();
        for (index, port) in config.ports.iter().enumerate() {
            if !vnis.contains(&port.vni()) {
                return Err(ConfigError::value(
                    format!("port[{index}].vni"),
                    port.vni(),
                    "the vni of a [[network]] in this file",
                ));
            }
            if let PortConfig::Packet { vni, mac: Some(mac), .. } = port
                && (mac.is_group() || *mac == MacAddr([0; 6]) || !macs.insert((*vni, *mac)))
            {
                return Err(ConfigError::value(format!("port[{index}].mac"), mac, "an individual address, once a network"));
            }
            if let PortConfig::Packet { interface, .. } | PortConfig::Tap { interface, .. } = port
                && (!is_interface_name(interface) || !interfaces.insert(interface))
            {
                return Err(ConfigError::value(
                    format!("port[{index}].interface"),
                    interface,
                    format!("{INTERFACE_NAME}; each interface once"),
                ));
            }
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../../../configs/switchd.example.toml");

    #[test]
    fn the_example_parses_and_its_commented_lines_are_the_defaults() {
        let given = SwitchConfig::parse(EXAMPLE).unwrap();
        let uncomment = |line: &str| match line.strip_prefix("# ") {
            Some(rest)
                if rest.split_once(" = ").is_some_and(|(key, _)| key.bytes().all(|b| b.is_ascii_lowercase() || b == b'-')) =>
            {
                rest.to_owned()
            }
            _ => line.to_owned(),
        };
        let optional = |line: &&str| !line.contains("no default");
        let text: Vec<String> = EXAMPLE.lines().filter(optional).map(uncomment).collect();

        assert_eq!(SwitchConfig::parse(&text.join("\n")).unwrap(), given);
        for key in ["socket", "aead", "aead-library", "plain", "underlay-mtu", "mtu", "ageing"] {
            assert!(text.iter().any(|line| line.starts_with(&format!("{key} = "))), "{key} is not explained");
        }
        let with_optional: Vec<String> = EXAMPLE.lines().map(uncomment).collect();
        assert!(SwitchConfig::parse(&with_optional.join("\n")).is_ok());
    }

    #[test]
    fn errors_name_key_got_and_wanted() {
        let cases = [
            ("vni = 42 ", "vni = 0 ", "got VNI 0, want 1 to 16777215"),
            ("vni = 42 ", "vni = 16777216 ", "got VNI 16777216"),
            ("# mtu = 1400 ", "mtu = 100 ", "key `network[0].mtu`: got 100, want 576 to 9000"),
            ("# ageing = \"300s\"", "ageing = \"300\"", "got \"300\", want a whole number and a unit"),
            ("# ageing = \"300s\"", "ageing = \"1s\"", "key `network[0].ageing`: got 1s, want 10s to 1h"),
            ("# aead = \"auto\"", "aead = \"rot13\"", "got `rot13`, want `auto`, `aes-256-gcm` or `chacha20-poly1305`"),
            ("# aead = \"auto\"", "aead = \"none\"", "and say `plain = [{ domain = \"THE OTHER'S\", interface = \"UND"),
            ("# aead-library = \"auto\"", "aead-library = \"openssl\"", "unknown variant `openssl`"),
            ("# plain = []", "plain = [{ domain = \"d2\", interface = \"eth/1\" }]", "key `plain[0].interface`: got eth/1, want"),
            ("# plain = []", "plain = [{ domain = \"d2\" }]", "missing field `interface`"),
            ("# underlay-mtu = 1500", "underlay-mtu = 500", "key `underlay-mtu`: got 500, want 1280 to 9216"),
            ("host = \"h1\"", "hots = \"h1\"", "unknown field `hots`"),
            ("host = \"h1\"", "host = \"H1.example.org\"", "got name \"H1.example.org\", want 1 to 32 characters"),
            ("host = \"h1\"", "host = \"h1-\"", "key `host`: got h1-, want a name that ends"),
            ("interface = \"tap42\"", "interface = \"veth42\"", "key `port[1].interface`: got veth42, want"),
            ("# mac = \"52:54:00:00:00:2a\"", "mac = \"53:54:00:00:00:2a\"", "key `port[0].mac`: got 53:54:00:00:00:2a, want"),
            ("interface = \"tap42\"", "interface = \"tap/42\"", "key `port[1].interface`: got tap/42, want 1 to 15 characters"),
            ("# netns", "unknown-key", "unknown field `unknown-key`"),
        ];
        for (from, to, wanted) in cases {
            assert!(EXAMPLE.contains(from), "{from}");
            let error = SwitchConfig::parse(&EXAMPLE.replacen(from, to, 1)).unwrap_err().to_string();
            assert!(error.contains(wanted), "{to}: {error}");
        }
    }

    #[test]
    fn an_owned_mac_may_not_be_used_twice_in_one_network() {
        let twice = EXAMPLE.replace("# mac = \"52", "mac = \"52").replace(
            "[[port]]\nkind = \"tap\"",
            "[[port]]\nkind = \"packet\"\nvni = 42\ninterface = \"other\"\nmac = \"52:54:00:00:00:2a\"\n[[port]]\nkind = \"tap\"",
        );

        let error = SwitchConfig::parse(&twice).unwrap_err().to_string();

        assert!(
            error.contains("key `port[1].mac`: got 52:54:00:00:00:2a, want an individual address, once a network"),
            "{error}"
        );
    }
}
