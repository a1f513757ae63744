//! What concerns our switch alone: idle, memory, order, a flood beside others, a lossy path, the price of sealing.

use crate::contenders::Contender;
use crate::report::median;
use crate::site::{GUESTS, INNER_MTU, Site, WireKind, cable};
use crate::tools::{self, Pair};
use serde_json::{Value, json};
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use switchd::io::ciphers;
use violin_common::config::switch::{AeadChoice, LibraryChoice};
use violin_tests::fabric::{Fabric, network};

/// Four switches of which nobody wants anything; processor time and memory of one.
pub(crate) fn idle(seconds: u64) -> Value {
    let mut fabric = Fabric::start(4);
    fabric.carry(&network(7));
    let guest = fabric.hosts[0].guest(7, "02:00:00:00:00:0a");
    // What starting has left to do is done by then.
    std::thread::sleep(Duration::from_secs(3));
    let pid = fabric.hosts[0].switch.as_mut().map_or(0, |switch| switch.id());
    let before = tools::process(pid);
    let began = Instant::now();
    std::thread::sleep(Duration::from_secs(seconds));
    let after = tools::process(pid);
    drop(guest);
    match (before, after) {
        (Some((before, _)), Some((after, rss))) => json!({
            "idle_cpu_percent": (after - before) / began.elapsed().as_secs_f64() * 100.0, "rss_mib": rss, "peers": 3,
        }),
        _ => json!("failed: the switch has ended"),
    }
}

/// Round trips of one pair of guests while another pair's guest sends small datagrams as fast as it can.
pub(crate) fn flood(seconds: f64) -> Result<Value, String> {
    let mut fabric = Fabric::start(2);
    fabric.carry(&network(7));
    fabric.carry(&network(8));
    let guests = [(0, 7, "0a"), (1, 7, "0b"), (0, 8, "0c"), (1, 8, "0d")];
    let guests = guests.map(|(host, vni, mac)| fabric.hosts[host].guest(vni, &format!("02:00:00:00:00:{mac}")));
    for (index, guest) in guests.iter().enumerate() {
        guest.netns.ip(&format!("addr add {}/24 dev eth0", GUESTS[index % 2]));
    }
    let pair = |at: usize| Pair { from: &guests[at].netns, to: &guests[at + 1].netns, address: GUESTS[1], back: GUESTS[0] };
    let quiet = tools::rtt(pair(0), seconds)?;
    let (loud, over) = (pair(2), AtomicBool::new(false));
    let _sink = loud.to.enter(|| UdpSocket::bind((GUESTS[1], 9000))).map_err(|error| error.to_string())?;
    let from = loud.from.enter(|| UdpSocket::bind("0.0.0.0:0")).map_err(|error| error.to_string())?;
    let target = format!("{}:9000", GUESTS[1]).parse().map_err(|_| "an address")?;
    let (flooded, lost) = std::thread::scope(|scope| {
        scope.spawn(|| tools::flood(&from, target, &over));
        let flooded = tools::rtt(pair(0), seconds);
        let pings = pair(0).from.run("ping", &format!("-q -i 0.01 -c 200 -W 2 {}", GUESTS[1]));
        over.store(true, Ordering::Relaxed);
        let text = String::from_utf8_lossy(&pings.stdout).into_owned();
        let lost = text
            .split(", ")
            .find_map(|part| part.split('%').next().filter(|_| part.contains("packet loss"))?.parse::<f64>().ok());
        (flooded, lost)
    });
    let flooded = flooded?;
    fabric.hosts.clear();
    Ok(json!({
        "quiet_rtt_p99_ms": quiet.p99 / 1e3, "flood_rtt_p50_ms": flooded.p50 / 1e3, "flood_rtt_p99_ms": flooded.p99 / 1e3,
        "flood_ping_loss_percent": lost,
    }))
}

/// TCP over 50 ms and a path that loses, through a relay that carries packets as a wire does.
pub(crate) fn goodput(
    contenders: &[Contender],
    losses: &[f64],
    rounds: usize,
    seconds: f64,
    mut say: impl FnMut(&str),
) -> Vec<Value> {
    let mut out = Vec::new();
    for &loss in losses {
        let mut sites = Vec::new();
        for &contender in contenders {
            match lossy(contender, loss) {
                Ok(site) => sites.push((contender, site, Vec::new())),
                Err(why) => out.push(json!({ "loss_percent": loss, "contender": contender.name(), "failed": why })),
            }
        }
        for round in 1..=rounds {
            for (contender, (site, _relay), samples) in &mut sites {
                match tools::tcp(site.pair(), 1, seconds) {
                    Ok(bulk) => {
                        say(&format!("loss {loss} %, round {round}: {} {:.3} Gbit/s", contender.name(), bulk.gbps));
                        samples.push(bulk.gbps);
                    }
                    Err(why) => say(&format!("loss {loss} %, round {round}: {}: {why}", contender.name())),
                }
            }
        }
        for (contender, _, samples) in sites {
            let gbps = median(&samples);
            out.push(json!({
                "loss_percent": loss, "delay_ms": 50, "contender": contender.name(), "samples": samples, "gbps": gbps,
            }));
        }
    }
    out
}

/// A contender whose underlay is the lab's relay.
fn lossy(contender: Contender, loss: f64) -> Result<(Site, Relay), String> {
    let relay = Relay::prepare();
    let site = contender.set_up_over(WireKind::Segmented, |site| relay.join(site, loss))?;
    Ok((site, relay))
}

/// Two routers and the relay process between them.
pub(crate) struct Relay {
    routers: [violin_tests::netns::Netns; 2],
    directory: tempfile::TempDir,
    process: std::cell::RefCell<Option<std::process::Child>>,
}

impl Relay {
    fn prepare() -> Self {
        let routers = [violin_tests::netns::Netns::new("ra"), violin_tests::netns::Netns::new("rb")];
        Self { routers, directory: tempfile::tempdir().expect("a temporary folder"), process: Default::default() }
    }

    /// Puts the relay between a site's hosts, whose cable is taken away.
    fn join(&self, site: &Site, loss: f64) {
        site.hosts[0].ip("link del under");
        let subnets = ["10.88.1", "10.88.2"];
        for (index, subnet) in subnets.into_iter().enumerate() {
            let (host, router) = (&site.hosts[index], &self.routers[index]);
            cable((host, "under"), (router, "under"), 1500);
            host.ip(&format!("addr add {subnet}.2/24 dev under"));
            router.ip(&format!("addr add {subnet}.1/24 dev under"));
            // The addresses every contender is configured with.
            host.ip(&format!("addr add {}/32 dev lo", crate::site::HOSTS[index]));
            let (ours, via) = (crate::site::HOSTS[index], format!("{subnet}.1"));
            host.ip(&format!("route add {} via {via} src {ours}", crate::site::HOSTS[1 - index]));
            router.ip(&format!("route add {ours} via {subnet}.2"));
            router.enter(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").expect("a router forwards"));
            crate::site::segment(host, "under");
            crate::site::segment(router, "under");
        }
        let ready = self.directory.path().join("ready");
        let behind = ["10.88.0.0/29", "10.88.0.8/29"];
        let end = |index: usize| json!({ "netns": self.routers[index].name(), "subnet": behind[index].to_owned() });
        let plan = json!({
            "ends": [end(0), end(1)], "delay_ns": 25_000_000u64, "loss_percent": loss, "bits_per_s": null, "seed": 7, "ready": ready,
        });
        let file = self.directory.path().join("relay.json");
        std::fs::write(&file, plan.to_string()).expect("a file is written");
        let program = std::env::current_exe().expect("this program has a path");
        let child = std::process::Command::new(program).arg("relay").arg(&file).spawn().expect("the relay starts");
        *self.process.borrow_mut() = Some(child);
        violin_tests::eventually("the relay is ready", violin_tests::PATIENCE, || ready.exists());
        for index in 0..2 {
            self.routers[index].ip("link set wan0 up");
            self.routers[index].ip(&format!("route add {} dev wan0", crate::site::HOSTS[1 - index]));
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if let Some(mut child) = self.process.borrow_mut().take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What sealing and opening must cost: nanoseconds for a datagram of a full segment by the library alone, as seconds a 10^9 bytes.
pub(crate) fn aead_seconds_per_gb() -> (Value, f64) {
    let abilities = ciphers::abilities(AeadChoice::Auto, LibraryChoice::Auto);
    let best = abilities.iter().min_by_key(|can| can.ns);
    let ns = best.map_or(0.0, |can| f64::from(can.ns));
    // Sealed at one end, opened at the other.
    let seconds = 2.0 * ns / f64::from(INNER_MTU) * 1e9 / 1e9;
    let name = best.map(|can| format!("{} ({})", can.choice.aead.name(), can.choice.library.name()));
    (json!({ "aead": name, "ns_per_1400_bytes": ns, "seal_and_open_s_per_gb": seconds }), seconds)
}
