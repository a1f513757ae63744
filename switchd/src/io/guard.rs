//! A packet port owns its interface: the host's own stack neither hears nor speaks there.
//!
//! An nft `netdev` chain with policy *drop* stops what comes in before the stack sees it; packet sockets are asked earlier
//! and still get every frame. IPv6 is off, IPv4 addresses are gone, so the stack has nothing to say either; should it get an
//! address later, another chain drops what it says (Linux 5.16). Our own frames pass there too, PACKET_QDISC_BYPASS or not, and
//! are known by their mark. The chains outlive the daemon (fail closed) and are taken over by the next one.

use crate::io::link;
use std::io::{self, Write};
use std::process::{Command, Stdio};

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

fn nft(script: &str) -> Result<(), String> {
    let mut child = ["nft", "/usr/sbin/nft"]
        .iter()
        .find_map(|program| {
            let mut command = Command::new(program);
            command.args(["-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().ok()
        })
        .ok_or("nft cannot be started: install nftables")?;
    let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(script.as_bytes()));
    let output = child.wait_with_output().map_err(|error| error.to_string())?;
    if output.status.success() && written.is_ok() {
        return Ok(());
    }
    Err(format!("nft: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

/// Puts the drop chain in place. Doing it again is fine. From Linux 6.16 on the interface need not exist: the chain takes
/// hold the moment one of that name appears, so not even its first frame reaches the host's stack. Before, that is an error.
pub fn drop_all(interface: &str) -> Result<(), String> {
    let table = table(interface);
    let chain = |hook: &str| {
        format!(
            "add chain netdev {table} {hook} {{ type filter hook {hook} device \"{interface}\" priority -500; policy drop; }}\n"
        )
    };
    let ingress = format!("add table netdev {table}\n{}", chain("ingress"));
    let ours = format!("flush chain netdev {table} egress\nadd rule netdev {table} egress meta mark {MARK:#x} accept\n");
    // Kernels before 5.16 have no egress hook.
    nft(&format!("{ingress}{}{ours}", chain("egress"))).or_else(|why| {
        nft(&ingress)?;
        tracing::debug!(interface, why, "no egress hook");
        Ok(())
    })
}

/// Closes an existing interface to the host's stack, but for its addresses: see [`strip`]. Doing it again is fine. `ahead`:
/// [`drop_all`] was done when the interface did not exist yet, and holds.
pub fn close(interface: &str, ahead: bool) -> Result<(), String> {
    if !ahead {
        drop_all(interface)?;
    }
    set_ipv6_disabled(interface, "1").map_err(|error| format!("disable_ipv6: {error}"))
}

/// Takes the interface's IPv4 addresses away, for good.
pub fn strip(interface: &str) -> Result<(), String> {
    link::flush_addresses(interface).map_err(|error| format!("flushing addresses: {error}"))
}

/// Gives the interface back. One that has gone leaves its table behind, which is removed too.
pub fn open(interface: &str) {
    let table = table(interface);
    if let Err(why) = nft(&format!("add table netdev {table}\ndelete table netdev {table}\n")) {
        tracing::warn!(interface, why, "could not remove the guard: the interface stays closed to the host");
        return;
    }
    let default = std::fs::read_to_string("/proc/sys/net/ipv6/conf/default/disable_ipv6");
    let _ = set_ipv6_disabled(interface, default.as_deref().unwrap_or("0").trim());
}

fn set_ipv6_disabled(interface: &str, value: &str) -> io::Result<()> {
    match std::fs::write(format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6"), value) {
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
