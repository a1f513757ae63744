//! A packet port owns its interface: the host's own stack neither hears nor speaks there.
//!
//! An nft `netdev` chain with policy *drop* stops what comes in before the stack sees it; packet sockets are asked earlier
//! and still get every frame. IPv6 is off, IPv4 addresses are gone, so the stack has nothing to say either; should it get an
//! address later, another chain drops what it says (Linux 5.16). Our own frames pass there too, PACKET_QDISC_BYPASS or not, and
//! are known by their mark. The chains outlive the daemon (fail closed) and are taken over by the next one. That nobody else
//! takes them away, or not for long: see `nft.rs` and `ports.rs`.

use crate::io::link;
use crate::io::nft::{Keeping, Nft};
use std::collections::HashMap;
use std::io;
use violin_channel::kernel;

/// The mark (SO_MARK) of what the switch itself sends to a guest: "viol".
pub const MARK: u32 = 0x7669_6f6c;

/// The nft table of an interface; characters nft does not take in names are written in hexadecimal.
pub fn table(interface: &str) -> String {
    let mut name = String::from("violin_");
    for byte in interface.bytes() {
        if byte.is_ascii_alphanumeric() { name.push(char::from(byte)) } else { name.push_str(&format!("_{byte:02x}")) }
    }
    name
}

/// The guards of one network namespace.
#[derive(Debug)]
pub struct Guards {
    /// Why it cannot be spoken with is said when a guard is wanted: a switch without packet ports needs none.
    nft: Result<Nft, String>,
    /// Those in place, by table.
    interfaces: HashMap<String, String>,
    /// Interfaces whose guard was put in place before they existed.
    ahead: HashMap<String, bool>,
}

impl Guards {
    /// None yet.
    pub fn new(keeping: Keeping) -> Self {
        let nft = Nft::open(keeping).map_err(|error| error.to_string());
        Self { nft, interfaces: HashMap::new(), ahead: HashMap::new() }
    }

    /// See [`Nft::port`].
    pub fn port(&self) -> u32 {
        self.nft.as_ref().map_or(0, Nft::port)
    }

    /// Interfaces that are guarded.
    pub fn interfaces(&self) -> Vec<String> {
        self.interfaces.values().cloned().collect()
    }

    /// The interface that a table guards.
    pub fn interface_of(&self, table: &str) -> Option<String> {
        self.interfaces.get(table).cloned()
    }

    /// Puts the drop chains in place. Doing it again is fine, and makes good what somebody changed. From Linux 6.16 on the
    /// interface need not exist: the chains take hold the moment one of that name appears, so not even its first frame reaches
    /// the host's stack. Before, that is an error.
    pub fn drop_all(&mut self, interface: &str) -> Result<(), String> {
        let (nft, table) = (self.nft.as_mut().map_err(|why| why.clone())?, table(interface));
        nft.guard(&table, interface, MARK).map_err(|error| format!("nf_tables: {error}"))?;
        self.interfaces.insert(table, interface.into());
        Ok(())
    }

    /// Puts the guard in place although the interface is not there, where the kernel can do that, the first time it is asked.
    pub fn ahead(&mut self, interface: &str) {
        if !self.ahead.contains_key(interface) {
            let holds = self.drop_all(interface);
            tracing::debug!(interface, ?holds, "guard ahead of the interface");
            self.ahead.insert(interface.into(), holds.is_ok());
        }
    }

    /// Whether an interface's guard stands.
    pub fn stands(&mut self, interface: &str) -> bool {
        self.nft.as_mut().is_ok_and(|nft| nft.stands(&table(interface)))
    }

    /// The guard was found missing: it is not taken for being there when its interface comes back.
    pub fn distrust(&mut self, interface: &str) {
        self.ahead.remove(interface);
    }

    /// Closes an existing interface to the host's stack, but for its addresses: see [`strip`]. Doing it again is fine.
    pub fn close(&mut self, interface: &str) -> Result<(), String> {
        if self.ahead.get(interface) != Some(&true) {
            self.drop_all(interface)?;
        }
        set_ipv6_disabled(interface, "1").map_err(|error| error.to_string())
    }

    /// Gives the interface back. One that has gone leaves its table behind, which is removed too.
    pub fn open(&mut self, interface: &str) {
        let table = table(interface);
        self.ahead.remove(interface);
        self.interfaces.remove(&table);
        let removed = self.nft.as_mut().map_err(|why| why.clone()).and_then(|nft| nft.remove(&table).map_err(|e| e.to_string()));
        if let Err(why) = removed {
            tracing::warn!(interface, why, "could not remove the guard: the interface stays closed to the host");
            return;
        }
        let default = std::fs::read_to_string("/proc/sys/net/ipv6/conf/default/disable_ipv6");
        let _ = set_ipv6_disabled(interface, default.as_deref().unwrap_or("0").trim());
    }
}

/// Takes the interface's IPv4 addresses away, for good.
pub fn strip(interface: &str) -> Result<(), String> {
    link::flush_addresses(interface).map_err(|error| format!("flushing addresses: {error}"))
}

fn set_ipv6_disabled(interface: &str, value: &str) -> io::Result<()> {
    match kernel::set(&format!("net/ipv6/conf/{interface}/disable_ipv6"), value) {
        // A kernel without IPv6, or an interface that has gone: nothing to disable.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_interface_has_a_table_of_its_own() {
        assert_ne!(table("a-b"), table("a.b"));
    }
}
