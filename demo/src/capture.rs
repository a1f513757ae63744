//! What the underlay carries: a capture at one host's wire, read back frame by frame.

use crate::shell::{self, Held};
use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use violin_common::wire::ethernet::{self, ethertype};
use violin_common::wire::mesh;
use violin_probe::frame::Probe;

/// Bytes kept of each packet: outer headers, mesh headers, inner Ethernet header and a canary.
const SNAP: &str = "160";

/// A capture under way.
#[derive(Debug)]
pub(crate) struct Capture {
    child: Held,
    file: PathBuf,
}

/// What a capture showed.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Seen {
    /// Mesh data datagrams (or bursts of them) read.
    pub(crate) datagrams: u64,
    /// Datagrams per VNI.
    pub(crate) by_vni: BTreeMap<u32, u64>,
    /// Canaries whose tag was not the VNI's.
    pub(crate) canaries_in_wrong_network: u64,
    /// Canaries seen.
    pub(crate) canaries: u64,
    /// Experimental frames outside the mesh format.
    pub(crate) bare: u64,
}

impl Capture {
    /// Starts capturing the mesh port, and any bare canary, in a host's namespace.
    pub(crate) fn start(netns: &str, interface: &str, port: u16, file: &Path) -> Result<Self> {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={netns}"))
            .args(["--", "tcpdump", "-i", interface, "-s", SNAP, "--immediate-mode", "-U", "-n", "-w"])
            .arg(file);
        command
            .arg(format!("udp port {port} or ether proto 0x88b5"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = Held::spawn(&mut command)?;
        // It writes the file's head once it listens.
        shell::wait_for("tcpdump to listen", Duration::from_secs(10), || {
            Ok(std::fs::metadata(file).is_ok_and(|meta| meta.len() >= 24))
        })?;
        Ok(Self { child, file: file.to_owned() })
    }

    /// Ends it and reads what it kept.
    pub(crate) fn finish(mut self) -> Result<Seen> {
        let id = nix::unistd::Pid::from_raw(i32::try_from(self.child.0.id()).context("a process id")?);
        let _ = nix::sys::signal::kill(id, nix::sys::signal::Signal::SIGINT);
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        while self.child.0.try_wait()?.is_none() && std::time::Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
        read(&std::fs::read(&self.file).with_context(|| format!("cannot read {}", self.file.display()))?)
    }
}

/// Reads a pcap file (microsecond, little-endian, Ethernet), as tcpdump writes it here.
fn read(bytes: &[u8]) -> Result<Seen> {
    let Some((head, mut rest)) = bytes.split_at_checked(24) else { bail!("the capture is empty: was tcpdump allowed to run?") };
    if head[..4] != [0xd4, 0xc3, 0xb2, 0xa1] {
        bail!("got a capture with magic {:02x?}, want pcap d4c3b2a1", &head[..4]);
    }
    let mut seen = Seen::default();
    while let Some((record, tail)) = rest.split_at_checked(16) {
        let kept = u32::from_le_bytes([record[8], record[9], record[10], record[11]]) as usize;
        let Some((packet, next)) = tail.split_at_checked(kept) else { break };
        rest = next;
        look(packet, &mut seen);
    }
    Ok(seen)
}

fn look(packet: &[u8], seen: &mut Seen) {
    let Ok(outer) = ethernet::Header::parse(packet) else { return };
    if outer.ethertype == ethertype::EXPERIMENTAL {
        seen.bare += 1;
        return;
    }
    let Some(ip) = packet.get(outer.payload..).filter(|ip| outer.ethertype == ethertype::IPV4 && ip.len() > 20) else { return };
    let header = usize::from(ip[0] & 0x0f) * 4;
    let Some(datagram) = ip.get(header + 8..) else { return };
    if datagram.first().is_none_or(|&first| mesh::is_quic(first)) || mesh::Outer::parse(datagram).is_err() {
        return;
    }
    let Ok(slice) = mesh::Slice::parse(&datagram[mesh::OUTER_LEN..]) else { return };
    seen.datagrams += 1;
    *seen.by_vni.entry(slice.vni.value()).or_default() += 1;
    let frame = datagram.get(mesh::OVERHEAD..).unwrap_or_default();
    if let Some((_, Probe::Canary { tag, .. })) = violin_probe::frame::decode(frame) {
        seen.canaries += 1;
        seen.canaries_in_wrong_network += u64::from(tag != u64::from(slice.vni.value()));
    }
}
