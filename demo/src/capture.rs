//! What the underlay carries: a capture at a host's wire, read back frame by frame.

use crate::shell::{self, Held};
use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use violin_common::MacAddr;
use violin_common::wire::ethernet::{self, ethertype};
use violin_common::wire::mesh;
use violin_lab::HostState;

/// Bytes kept of each packet: outer headers, mesh headers, inner Ethernet header and a canary.
const SNAP: &str = "160";
/// KiB of the kernel's buffer: what it cannot hold is not looked at.
const BUFFER: &str = "16384";

/// What belongs inside the mesh: whatever else carries it is a leak.
#[derive(Debug, Clone, Default)]
pub(crate) struct Inside {
    /// The environments' networks.
    pub(crate) vnis: BTreeSet<u32>,
    /// First four octets of their guests' MACs; no host has such a one.
    prefixes: BTreeSet<[u8; 4]>,
}

impl Inside {
    /// Adds a network and its guests.
    pub(crate) fn add<'a>(&mut self, vni: u32, macs: impl IntoIterator<Item = &'a MacAddr>) {
        self.vnis.insert(vni);
        self.prefixes.extend(macs.into_iter().filter_map(|mac| mac.0.first_chunk().copied()));
    }

    fn is_guest(&self, mac: MacAddr) -> bool {
        mac.0.first_chunk().is_some_and(|prefix| self.prefixes.contains(prefix))
    }

    /// What tcpdump is to keep: the mesh, and whatever may have leaked from it.
    fn filter(&self, port: u16) -> String {
        let mut filter = format!("udp port {port} or ether proto 0x88b5");
        for prefix in &self.prefixes {
            let prefix = u32::from_be_bytes(*prefix);
            filter.push_str(&format!(" or ether[0:4] = {prefix:#010x} or ether[6:4] = {prefix:#010x}"));
        }
        filter
    }
}

/// A capture under way.
#[derive(Debug)]
pub(crate) struct Capture {
    child: Held,
    file: PathBuf,
    inside: Inside,
}

/// What a capture showed.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Seen {
    /// Datagrams of sealed data (or bursts of them) looked at.
    pub(crate) sealed: u64,
    /// Of these, what reads as a slice of an environment's network: not sealed, whatever it says.
    pub(crate) readable: u64,
    /// Datagrams of plain data.
    pub(crate) plain: u64,
    /// Frames outside the mesh format: from or to a guest's MAC, or experimental ones.
    pub(crate) bare: u64,
    /// Of these from or to a guest's MAC, of whatever EtherType.
    pub(crate) bare_of_guests: u64,
    /// Packets the kernel did not hand to tcpdump for want of room: they were not looked at.
    pub(crate) dropped: u64,
}

impl Capture {
    /// Starts capturing the mesh port, and any bare frame of guests, at a host's wire.
    pub(crate) fn start(host: &HostState, inside: &Inside, file: &Path) -> Result<Self> {
        let said = file.with_extension("txt");
        let said = std::fs::File::create(&said).with_context(|| format!("cannot write {}", said.display()))?;
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", host.netns_path()))
            .args(["--", "tcpdump", "-i", &host.underlay_interface, "-s", SNAP, "-B", BUFFER])
            .args(["--immediate-mode", "-U", "-n", "-w"])
            .arg(file);
        command.arg(inside.filter(host.mesh_port)).stdin(Stdio::null()).stdout(Stdio::null()).stderr(said);
        let child = Held::spawn(&mut command)?;
        // It writes the file's head once it listens.
        shell::wait_for("tcpdump to listen", Duration::from_secs(10), || {
            Ok(std::fs::metadata(file).is_ok_and(|meta| meta.len() >= 24))
        })?;
        Ok(Self { child, file: file.to_owned(), inside: inside.clone() })
    }

    /// Ends it and reads what it kept.
    pub(crate) fn finish(mut self) -> Result<Seen> {
        let id = nix::unistd::Pid::from_raw(i32::try_from(self.child.0.id()).context("a process id")?);
        let _ = nix::sys::signal::kill(id, nix::sys::signal::Signal::SIGINT);
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        while self.child.0.try_wait()?.is_none() && std::time::Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
        let bytes = std::fs::read(&self.file).with_context(|| format!("cannot read {}", self.file.display()))?;
        let said = std::fs::read_to_string(self.file.with_extension("txt")).unwrap_or_default();
        let mut seen = read(&bytes, &self.inside)?;
        seen.dropped = dropped(&said).with_context(|| format!("tcpdump did not say how many packets it missed: {said:?}"))?;
        Ok(seen)
    }
}

/// Reads `12 packets dropped by kernel` out of what tcpdump says at its end.
fn dropped(said: &str) -> Option<u64> {
    let line = said.lines().find(|line| line.contains("dropped by kernel"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Reads a pcap file (microsecond, little-endian, Ethernet), as tcpdump writes it here.
fn read(bytes: &[u8], inside: &Inside) -> Result<Seen> {
    let Some((head, mut rest)) = bytes.split_at_checked(24) else { bail!("the capture is empty: was tcpdump allowed to run?") };
    if head[..4] != [0xd4, 0xc3, 0xb2, 0xa1] {
        bail!("got a capture with magic {:02x?}, want pcap d4c3b2a1", &head[..4]);
    }
    let mut seen = Seen::default();
    while let Some((record, tail)) = rest.split_at_checked(16) {
        let kept = u32::from_le_bytes([record[8], record[9], record[10], record[11]]) as usize;
        let Some((packet, next)) = tail.split_at_checked(kept) else { break };
        rest = next;
        look(packet, inside, &mut seen);
    }
    Ok(seen)
}

fn look(packet: &[u8], inside: &Inside, seen: &mut Seen) {
    let Ok(outer) = ethernet::Header::parse(packet) else { return };
    if inside.is_guest(outer.source) || inside.is_guest(outer.destination) {
        seen.bare += 1;
        seen.bare_of_guests += 1;
        return;
    }
    if outer.ethertype == ethertype::EXPERIMENTAL {
        seen.bare += 1;
        return;
    }
    let Some(ip) = packet.get(outer.payload..).filter(|ip| outer.ethertype == ethertype::IPV4 && ip.len() > 20) else { return };
    let header = usize::from(ip[0] & 0x0f) * 4;
    let Some(datagram) = ip.get(header + 8..) else { return };
    let Ok(outer) = mesh::Outer::parse(datagram) else { return };
    let slice = mesh::Slice::parse(&datagram[mesh::OUTER_LEN..]);
    match outer.kind {
        mesh::Kind::Data => {
            seen.sealed += 1;
            seen.readable += u64::from(slice.is_ok_and(|slice| inside.vnis.contains(&slice.vni.value())));
        }
        mesh::Kind::Plain => seen.plain += 1,
        mesh::Kind::Probe => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use violin_common::Vni;
    use violin_probe::frame::Probe;

    const HOST: [u8; 6] = [0x02, 0, 0, 0, 0, 1];
    const GUEST: [u8; 6] = [0x52, 0x54, 0, 0x77, 0, 3];

    fn inside() -> Inside {
        let mut inside = Inside::default();
        inside.add(7001, [&MacAddr(GUEST)]);
        inside
    }

    fn frame(destination: [u8; 6], source: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
        [&destination[..], &source, &kind.to_be_bytes(), payload].concat()
    }

    fn seen(packet: &[u8]) -> Seen {
        let mut seen = Seen::default();
        look(packet, &inside(), &mut seen);
        seen
    }

    fn datagram(kind: mesh::Kind, vni: u32, tag: u64) -> Vec<u8> {
        let outer = mesh::Outer { kind, key_epoch: 0, queue: 0, receiver: 1, packet_number: 1 };
        let canary = violin_probe::frame::encode([0xff; 6], GUEST, &Probe::Canary { tag, sequence: 0 });
        let slice = mesh::Slice {
            vni: Vni::new(vni).unwrap(),
            marks: 0,
            segmentation: mesh::Segmentation::None,
            frame_id: 0,
            offset: 0,
            total: 60,
            segment_size: 0,
        };
        let ip = [&[0x45][..], &[0; 19], &[0; 8], &outer.emit(), &slice.emit(), &canary].concat();
        frame(HOST, HOST, ethertype::IPV4, &ip)
    }

    #[test]
    fn any_frame_from_or_to_a_guest_outside_the_mesh_is_bare() {
        for (destination, source) in [(HOST, GUEST), (GUEST, HOST), ([0xff; 6], GUEST)] {
            let seen = seen(&frame(destination, source, ethertype::ARP, &[0; 46]));
            assert_eq!((seen.bare, seen.bare_of_guests), (1, 1));
        }
        let seen = seen(&frame([0xff; 6], HOST, ethertype::EXPERIMENTAL, &[0; 46]));
        assert_eq!((seen.bare, seen.bare_of_guests), (1, 0));
        assert_eq!(self::seen(&frame([0xff; 6], HOST, ethertype::ARP, &[0; 46])).bare, 0);
    }

    #[test]
    fn what_can_be_read_on_the_way_is_counted() {
        let counts = |kind, vni, spoil: u8| {
            let mut packet = datagram(kind, vni, 7);
            packet[14 + 20 + 8 + mesh::OUTER_LEN..].iter_mut().for_each(|byte| *byte ^= spoil);
            let seen = seen(&packet);
            (seen.sealed, seen.readable, seen.plain)
        };
        assert_eq!(counts(mesh::Kind::Data, 7001, 0xa5), (1, 0, 0));
        assert_eq!(counts(mesh::Kind::Data, 7001, 0), (1, 1, 0));
        assert_eq!(counts(mesh::Kind::Plain, 7001, 0), (0, 0, 1));
        assert_eq!(counts(mesh::Kind::Probe, 7001, 0), (0, 0, 0));
    }

    #[test]
    fn tcpdump_keeps_what_may_have_leaked() {
        let filter = inside().filter(4799);
        assert_eq!(filter, "udp port 4799 or ether proto 0x88b5 or ether[0:4] = 0x52540077 or ether[6:4] = 0x52540077");
    }

    #[test]
    fn what_tcpdump_missed_is_read_from_its_last_words() {
        let said = "tcpdump: listening on u0\n25 packets captured\n26 packets received by filter\n1 packet dropped by kernel\n";
        assert_eq!(dropped(said), Some(1));
        assert_eq!(dropped("tcpdump: listening on u0\n"), None);
    }
}
