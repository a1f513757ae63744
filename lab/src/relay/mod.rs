//! The WAN: a process that carries IP packets between the domains' routers, with delay, loss and rate.
//!
//! Each router has a TUN interface whose other end this process holds. A TUN without `vnet_hdr` takes no super-frames: the
//! router's kernel segments them and fills in checksums, so that what is delayed, lost and counted here are packets as on
//! a real wire. One thread reads each TUN; one thread a direction writes, and sleeps on the clock with the finest slack.
#![allow(unsafe_code)]

mod link;

use crate::error::{Doing, Result};
use crate::netns;
use crate::topology::Subnet;
use link::{Fate, Link};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Name of the TUN interface in each router.
pub(crate) const INTERFACE: &str = "wan0";
/// Bytes a direction may hold; more is dropped, so that a fast sender and a long delay cannot eat the machine.
const HELD_BYTES: usize = 64 << 20;

/// What the relay is told: `relay.json` in the lab's folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RelayPlan {
    /// Routers.
    pub ends: Vec<End>,
    /// Time under way, in nanoseconds.
    pub delay_ns: u64,
    /// Packets lost, in percent.
    pub loss_percent: f64,
    /// Bits a second, in each direction.
    pub bits_per_s: Option<u64>,
    /// Seed of the losses.
    pub seed: u64,
    /// File made once packets are carried.
    pub ready: PathBuf,
}

/// One router's end.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct End {
    /// Network namespace.
    pub netns: String,
    /// What lies behind it.
    pub subnet: Subnet,
}

/// Carries packets until killed, or until a TUN is gone. `plan` is the path of a [`RelayPlan`] in JSON.
pub fn run(plan: &Path) -> Result<()> {
    let text = fs::read_to_string(plan).doing(|| format!("reading {}", plan.display()))?;
    let plan: RelayPlan =
        serde_json::from_str(&text).map_err(io::Error::from).doing(|| format!("understanding {}", plan.display()))?;
    let mut ends = Vec::new();
    for end in &plan.ends {
        ends.push(netns::inside(&end.netns, || open_tun(INTERFACE))?);
    }
    let clock = Instant::now();
    let mut threads = Vec::new();
    outrank_others();
    for (from, tun) in ends.iter().enumerate() {
        let mut directions = Vec::new();
        for (to, end) in plan.ends.iter().enumerate().filter(|(to, _)| *to != from) {
            // Every direction loses by a sequence of its own.
            let seed = plan.seed.wrapping_mul(0x1_0001).wrapping_add((from * plan.ends.len() + to) as u64);
            let link = Link::new(plan.delay_ns, plan.loss_percent, plan.bits_per_s, seed);
            let queue = Arc::new(Queue::default());
            directions.push((end.subnet, link, Arc::clone(&queue)));
            let out = ends[to].try_clone().doing(|| "sharing a TUN".to_owned())?;
            threads.push(std::thread::spawn(move || write_when_due(&queue, out, clock)));
        }
        let tun = tun.try_clone().doing(|| "sharing a TUN".to_owned())?;
        threads.push(std::thread::spawn(move || read_all(tun, directions, clock)));
    }
    fs::write(&plan.ready, "").doing(|| format!("writing {}", plan.ready.display()))?;
    // The first to end tells why: a TUN that is gone takes the lab's WAN with it.
    loop {
        if let Some(index) = threads.iter().position(std::thread::JoinHandle::is_finished) {
            let result = threads.swap_remove(index).join();
            return result.unwrap_or_else(|_| Err(io::Error::other("a thread panicked"))).doing(|| "carrying packets".to_owned());
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Puts this process before all ordinary ones: a wire does not wait for a CPU. Threads started later inherit it.
///
/// Best effort: where real-time scheduling is not to be had, delays grow with the machine's load.
fn outrank_others() {
    let parameter = libc::sched_param { sched_priority: 1 };
    // SAFETY: `parameter` is a sched_param that outlives the call; 0 is this thread.
    if unsafe { libc::sched_setscheduler(0, libc::SCHED_RR, &raw const parameter) } < 0 {
        // A log on a full disk is no reason to end: `eprintln!` would.
        let error = io::Error::last_os_error();
        let _ = writeln!(io::stderr(), "no real-time scheduling ({error}): delays will grow with load");
        // SAFETY: takes numbers only.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -20) };
    }
}

/// Packets under way in one direction, in order of arrival.
#[derive(Debug, Default)]
struct Queue {
    held: Mutex<Held>,
    filled: Condvar,
}

#[derive(Debug, Default)]
struct Held {
    packets: VecDeque<(u64, Vec<u8>)>,
    bytes: usize,
}

impl Queue {
    fn held(&self) -> MutexGuard<'_, Held> {
        // A panicked holder leaves at worst a wrong byte count behind.
        self.held.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn push(&self, at_ns: u64, packet: &[u8]) {
        let mut held = self.held();
        if held.bytes + packet.len() > HELD_BYTES {
            return;
        }
        held.bytes += packet.len();
        held.packets.push_back((at_ns, packet.to_vec()));
        drop(held);
        self.filled.notify_one();
    }
}

fn nanoseconds(clock: Instant) -> u64 {
    u64::try_from(clock.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

fn read_all(mut tun: File, mut directions: Vec<(Subnet, Link, Arc<Queue>)>, clock: Instant) -> io::Result<()> {
    let mut buffer = vec![0; 65_536];
    loop {
        let length = match tun.read(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            result => result?,
        };
        let packet = &buffer[..length];
        let Some(destination) = ipv4_destination(packet) else { continue };
        let Some((_, link, queue)) = directions.iter_mut().find(|(subnet, ..)| subnet.contains(destination)) else { continue };
        if let Fate::Arrives(at) = link.offer(nanoseconds(clock), length) {
            queue.push(at, packet);
        }
    }
}

/// Destination of an IPv4 packet; none for anything else. Source: RFC 791 §3.1.
fn ipv4_destination(packet: &[u8]) -> Option<Ipv4Addr> {
    let header = packet.first_chunk::<20>()?;
    let [.., a, b, c, d] = *header;
    (header[0] >> 4 == 4).then(|| Ipv4Addr::new(a, b, c, d))
}

fn write_when_due(queue: &Queue, mut tun: File, clock: Instant) -> io::Result<()> {
    // The default slack of 50 us would be added to every delay.
    nix::sys::prctl::set_timerslack(1)?;
    let mut due = Vec::new();
    loop {
        let wait = {
            let mut held = queue.held();
            while held.packets.is_empty() {
                held = queue.filled.wait(held).unwrap_or_else(std::sync::PoisonError::into_inner);
            }
            let now = nanoseconds(clock);
            while held.packets.front().is_some_and(|(at, _)| *at <= now) {
                let Some((_, packet)) = held.packets.pop_front() else { break };
                held.bytes -= packet.len();
                due.push(packet);
            }
            held.packets.front().map(|(at, _)| at.saturating_sub(now))
        };
        for packet in due.drain(..) {
            match tun.write(&packet) {
                Ok(_) => {}
                // The interface is down, or refuses this one packet: a wire would lose it too.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL | libc::ENOBUFS | libc::EINTR)) => {}
                Err(error) => return Err(error),
            }
        }
        if let Some(wait) = wait.filter(|&wait| wait > 0) {
            // Nothing later can be due earlier, so new packets need not wake us.
            std::thread::sleep(Duration::from_nanos(wait));
        }
    }
}

/// Takes the descriptor side of a TUN interface that exists in the namespace of this thread.
fn open_tun(interface: &str) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_TUN | libc::IFF_NO_PI).unwrap_or_default();
    // SAFETY: the descriptor is open and `request` is an ifreq that outlives the call, as TUNSETIFF wants.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(file) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ipv4_has_a_destination_here() {
        let mut packet = [0; 28];
        packet[0] = 0x45;
        packet[16..20].copy_from_slice(&[10, 201, 2, 13]);

        assert_eq!(ipv4_destination(&packet), Some(Ipv4Addr::new(10, 201, 2, 13)));
        assert_eq!(ipv4_destination(&packet[..19]), None);
        packet[0] = 0x65;
        assert_eq!(ipv4_destination(&packet), None);
    }
}
