//! What measures: iperf3, sockperf, a sender of small datagrams, the machine's processor time.

use nix::sys::socket::sockopt::RcvBuf;
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrIn, recvmmsg, sendmmsg, setsockopt};
use std::io::{IoSlice, IoSliceMut};
use std::net::{SocketAddrV4, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use violin_tests::netns::Netns;

/// Datagrams in one system call.
const BATCH: usize = 64;
/// Bytes of UDP payload in a small datagram.
const SMALL: usize = 64;

/// Two guests and the address of the second.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pair<'a> {
    pub(crate) from: &'a Netns,
    pub(crate) to: &'a Netns,
    pub(crate) address: &'a str,
    pub(crate) back: &'a str,
}

impl Pair<'_> {
    pub(crate) fn turned(self) -> Self {
        Pair { from: self.to, to: self.from, address: self.back, back: self.address }
    }
}

/// A server that ends with the value.
struct Serving(Child);

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve(mut command: Command, listens: impl FnMut() -> bool) -> Serving {
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let serving = Serving(child.unwrap_or_else(|error| panic!("cannot run {command:?}: {error}")));
    violin_tests::eventually("a server listens", violin_tests::PATIENCE, listens);
    serving
}

fn listens(netns: &Netns, kind: &str, at: &str) -> bool {
    String::from_utf8_lossy(&netns.run("ss", &format!("-l{kind}n")).stdout).contains(at)
}

/// What a bulk transfer gave.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bulk {
    pub(crate) gbps: f64,
    /// Of the whole machine, for each 10^9 bytes that arrived.
    pub(crate) cpu_s_per_gb: f64,
}

/// TCP in `streams` streams.
pub(crate) fn tcp(pair: Pair<'_>, streams: u32, seconds: f64) -> Result<Bulk, String> {
    let mut server = pair.to.command("iperf3");
    server.args(["-s", "-1", "-B", pair.address]);
    let _server = serve(server, || listens(pair.to, "t", &format!("{}:5201", pair.address)));
    let before = cpu_seconds();
    let words = format!("-c {} -t {seconds} -P {streams} -J", pair.address);
    let output = pair.from.run("iperf3", &words);
    let cpu = cpu_seconds() - before;
    let result: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let received = &result["end"]["sum_received"];
    match (received["bits_per_second"].as_f64(), received["bytes"].as_f64()) {
        (Some(rate), Some(bytes)) if rate > 0.0 && bytes > 0.0 => {
            Ok(Bulk { gbps: rate / 1e9, cpu_s_per_gb: cpu / (bytes / 1e9) })
        }
        _ => Err(format!("iperf3: {}", result["error"].as_str().unwrap_or("no figure"))),
    }
}

/// Round-trip times, in microseconds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rtt {
    pub p50: f64,
    pub p99: f64,
}

/// Ping-pong of small datagrams.
pub(crate) fn rtt(pair: Pair<'_>, seconds: f64) -> Result<Rtt, String> {
    let mut server = pair.to.command("sockperf");
    server.args(["server", "-i", pair.address, "-p", "11111"]);
    let _server = serve(server, || listens(pair.to, "u", &format!("{}:11111", pair.address)));
    let words = format!("ping-pong -i {} -p 11111 -t {} --full-rtt", pair.address, seconds.ceil());
    let output = pair.from.run("sockperf", &words);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let percentile = |which: &str| {
        let line = text.lines().find(|line| line.contains(&format!("percentile {which}")))?;
        line.split('=').nth(1)?.trim().parse::<f64>().ok()
    };
    match (percentile("50.000"), percentile("99.000")) {
        (Some(p50), Some(p99)) => Ok(Rtt { p50, p99 }),
        _ => Err(format!("sockperf: {}", text.lines().last().unwrap_or("no answer"))),
    }
}

/// The same while a TCP stream fills the way.
pub(crate) fn loaded_rtt(pair: Pair<'_>, seconds: f64) -> Result<Rtt, String> {
    let mut server = pair.to.command("iperf3");
    server.args(["-s", "-1", "-B", pair.address]);
    let _server = serve(server, || listens(pair.to, "t", &format!("{}:5201", pair.address)));
    let mut client = pair.from.command("iperf3");
    client.args(["-c", pair.address, "-t", &(seconds + 30.0).to_string()]);
    let _client = serve(client, || {
        let output = pair.from.run("ss", "-tn");
        String::from_utf8_lossy(&output.stdout).contains(&format!("{}:5201", pair.address))
    });
    rtt(pair, seconds)
}

/// What arrived of as many small datagrams as one thread can send.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Small {
    /// Thousands a second.
    pub(crate) kpps: f64,
    /// Behind one with a higher number.
    pub(crate) reordered: u64,
}

/// Sends small datagrams as fast as they go and counts those that arrive.
pub(crate) fn small(pair: Pair<'_>, seconds: f64) -> Result<Small, String> {
    let (address, span) = (format!("{}:9000", pair.address), Duration::from_secs_f64(seconds));
    let to = pair.to.enter(|| UdpSocket::bind(&address)).map_err(|error| error.to_string())?;
    let from = pair.from.enter(|| UdpSocket::bind("0.0.0.0:0")).map_err(|error| error.to_string())?;
    to.set_read_timeout(Some(Duration::from_millis(100))).map_err(|error| error.to_string())?;
    let _ = setsockopt(&to, RcvBuf, &(4 << 20));
    let (target, over) = (address.parse::<SocketAddrV4>().map_err(|error| error.to_string())?, AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| flood(&from, target, &over));
        // Not the first moments, in which ways are learned.
        count(&to, Duration::from_millis(300));
        let began = Instant::now();
        let (frames, reordered) = count(&to, span);
        let took = began.elapsed();
        over.store(true, Ordering::Relaxed);
        if frames == 0 {
            return Err("no small datagram arrived".to_owned());
        }
        Ok(Small { kpps: frames as f64 / took.as_secs_f64() / 1e3, reordered })
    })
}

/// Sends numbered datagrams until told that it is over.
pub(crate) fn flood(from: &UdpSocket, to: SocketAddrV4, over: &AtomicBool) {
    let mut number = 0u64;
    let mut bytes = [[0u8; SMALL]; BATCH];
    let mut headers = MultiHeaders::<SockaddrIn>::preallocate(BATCH, None);
    while !over.load(Ordering::Relaxed) {
        for datagram in &mut bytes {
            datagram[..8].copy_from_slice(&number.to_be_bytes());
            number += 1;
        }
        let slices: Vec<_> = bytes.iter().map(|datagram| [IoSlice::new(datagram)]).collect();
        let addresses = [Some(SockaddrIn::from(to)); BATCH];
        let _ = sendmmsg(from.as_raw_fd(), &mut headers, &slices, addresses, [], MsgFlags::empty());
    }
}

fn count(to: &UdpSocket, span: Duration) -> (u64, u64) {
    let until = Instant::now() + span;
    let (mut frames, mut reordered, mut last) = (0, 0, 0u64);
    let mut bytes = [[0u8; SMALL]; BATCH];
    let mut headers = MultiHeaders::<SockaddrIn>::preallocate(BATCH, None);
    while Instant::now() < until {
        let mut slices: Vec<_> = bytes.iter_mut().map(|datagram| [IoSliceMut::new(datagram)]).collect();
        let got = match recvmmsg(to.as_raw_fd(), &mut headers, &mut slices, MsgFlags::MSG_WAITFORONE, None) {
            Ok(got) => got.count(),
            Err(_) => continue,
        };
        frames += got as u64;
        for datagram in &bytes[..got] {
            let number = u64::from_be_bytes(*datagram.first_chunk().unwrap_or(&[0; 8]));
            reordered += u64::from(number < last);
            last = last.max(number);
        }
    }
    (frames, reordered)
}

/// Seconds that all processors have worked since the start of the machine.
pub(crate) fn cpu_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let fields: Vec<f64> = text.lines().next().unwrap_or_default().split_whitespace().skip(1).flat_map(str::parse).collect();
    // user, nice, system, idle, iowait, irq, softirq, ...
    let busy: f64 =
        fields.iter().enumerate().filter(|(index, _)| !matches!(index, 3 | 4) && *index < 7).map(|(_, ticks)| ticks).sum();
    busy / 100.0
}

/// Seconds that one process has worked, and its resident memory in MiB.
pub(crate) fn process(pid: u32) -> Option<(f64, f64)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit(')').next()?.split_whitespace().collect();
    let ticks: f64 = fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?;
    let pages: f64 = fields.get(21)?.parse().ok()?;
    Some((ticks / 100.0, pages * 4096.0 / f64::from(1 << 20)))
}
