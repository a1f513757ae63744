//! The guest's interface, set up by one call of `ip`.

use crate::config::GuestConfig;
use crate::frame::show_mac;
use crate::io::packet::PacketSocket;
use anyhow::{Context, Result, bail};
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Name of a guest's one interface.
pub const INTERFACE: &str = "eth0";

/// Waits for the interface to be there.
///
/// Errors: it is not after `limit`.
pub fn wait(limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    while let Err(error) = PacketSocket::open(INTERFACE, Duration::from_secs(1)) {
        if Instant::now() > deadline {
            return Err(error).with_context(|| format!("no interface {INTERFACE} within {} s", limit.as_secs()));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Sets MAC, MTU and address and brings interface and loopback up. May be called again.
///
/// Errors: what `ip` says.
pub fn set_up(config: &GuestConfig) -> Result<()> {
    let mut batch = String::from("link set lo up\n");
    if let Some(mac) = config.mac
        && PacketSocket::open(INTERFACE, Duration::from_secs(1)).is_ok_and(|socket| socket.mac != mac)
    {
        batch.push_str(&format!("link set {INTERFACE} down\nlink set {INTERFACE} address {}\n", show_mac(mac)));
    }
    if let Some(mtu) = config.mtu {
        batch.push_str(&format!("link set {INTERFACE} mtu {mtu}\n"));
    }
    batch.push_str(&format!("link set {INTERFACE} up\n"));
    batch.push_str(&format!("address replace {}/{} dev {INTERFACE}\n", config.address, config.prefix_len));
    let mut ip = Command::new("ip")
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run ip (package iproute2)")?;
    ip.stdin.take().context("ip's input")?.write_all(batch.as_bytes())?;
    let done = match ip.wait_with_output() {
        // As first process we reap every child, this one too if it ends at the wrong moment.
        Err(error) if error.raw_os_error() == Some(libc::ECHILD) => return Ok(()),
        done => done?,
    };
    if !done.status.success() {
        bail!("ip refused {batch:?}: {}", String::from_utf8_lossy(&done.stderr).trim());
    }
    Ok(())
}
