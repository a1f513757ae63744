//! Demand of real processes behind a real quota. Needs root; `make test` runs it.
#![cfg(feature = "io")]

mod world;

use monitord::demand::{Demand, Load, Recent, demands};
use monitord::hypervisor::{Hypervisor, Usage};
use monitord::io::clock;
use monitord::io::netlink::inside;
use monitord::io::sandbox::Sandbox;
use monitord::sample::{At, load};
use std::fs::File;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use violin_common::control::monitor::VmSpec;
use world::{World, until};

const CORES: f64 = 3.0;
const SCALE: f64 = 0.11;
/// A rank that computes without end.
const RANK: &str = "while :; do :; done\n";
/// Periods measured, each of [`PERIOD`] as in the daemon.
const PERIODS: usize = 4;
const PERIOD: Duration = Duration::from_secs(1);

/// Wakes 500 times a second.
const WAKER: &str = "exec perl -e 'while (1) { select(undef, undef, undef, 0.002) }'\n";

/// What a host's guests may have, and how they are watched.
#[derive(Debug, Clone, Copy)]
struct Shape {
    cores: f64,
    scale: f64,
    quota_period: Duration,
    period: Duration,
}

const USUAL: Shape = Shape { cores: CORES, scale: SCALE, quota_period: Duration::from_millis(100), period: PERIOD };

/// A full host: guests that run these programs, behind its quota.
struct FullHost {
    driver: Sandbox,
    specs: Vec<VmSpec>,
    world: World,
    shape: Shape,
}

impl FullHost {
    fn new(tag: &str, shape: Shape, programs: &[&str]) -> Self {
        let world = World::new(tag);
        let driver = world.driver("h1");
        let spec = |(number, program): (usize, &&str)| {
            let mut spec = world.spec();
            spec.vm = format!("{}-c{number}", world.tag).parse().unwrap();
            spec.mac = format!("52:54:00:91:01:{number:02x}").parse().unwrap();
            spec.guest_config = (*program).into();
            spec
        };
        let specs: Vec<_> = programs.iter().enumerate().map(spec).collect();
        for spec in &specs {
            let interface = driver.make_interface(spec, false).unwrap();
            world.attach("h1", &interface);
            driver.start(spec, &interface, None).unwrap();
        }
        Self { driver, specs, world, shape }
    }

    /// Waits until all programs are past their start: each woke some times, or computed for longer than any start takes.
    fn await_programs(&self) {
        let at_work = |usage: Usage| usage.run_ns > 500_000_000 || usage.scheduled.is_some_and(|by| by.sleeps > 100);
        for spec in &self.specs {
            until("the guest's program runs", Duration::from_secs(180), || at_work(self.driver.usage(&spec.vm).unwrap()));
        }
    }

    /// Puts the guests behind the quota. Not before their programs are past their start: behind it that takes seconds, in
    /// which one that will merely wake computes.
    fn limit(&self) {
        let Shape { cores, scale, quota_period, .. } = self.shape;
        self.world.group("h1").clone().with_period(quota_period).set_quota(Some(cores * scale)).unwrap();
    }

    fn read(&self) -> Vec<At<Usage>> {
        self.specs.iter().map(|spec| At { at: clock::now(), value: self.driver.usage(&spec.vm).unwrap() }).collect()
    }

    /// Watches as the daemon does, which knows its guests since they were started.
    fn watch(&self) -> Watch<'_> {
        Watch { host: self, before: self.read(), recent: vec![Recent::default(); self.specs.len()] }
    }

    /// The ranks, all but the last guest, want all; the last, which waits too, wants little.
    fn assert_told_apart(&self, periods: &[Vec<(Load, Demand)>]) {
        let ranks = self.specs.len() - 1;
        let mean = |figure: fn(&Load) -> f64| periods.iter().map(|seen| figure(&seen[ranks].0)).sum::<f64>() / PERIODS as f64;
        // Within one period the share of time it waits varies from 0.4 to 0.85.
        let waited = mean(|load| load.wait);
        assert!(waited > 0.35, "it waited {waited:.2}: were waiting its demand, it would not be seen, so this proved nothing");
        assert!(periods.iter().all(|seen| seen[ranks].1.demand < 0.25), "{periods:?}");
        let last = periods.last().expect("some periods");
        assert!(last[..ranks].iter().all(|(_, demand)| demand.demand > 0.75), "{last:?}");
    }
}

/// What is known of a host's guests.
struct Watch<'a> {
    host: &'a FullHost,
    before: Vec<At<Usage>>,
    recent: Vec<Recent>,
}

impl Watch<'_> {
    /// Loads and demands of some periods, found as the daemon finds them.
    fn measure(&mut self, periods: usize) -> Vec<Vec<(Load, Demand)>> {
        let Shape { cores, scale, period, .. } = self.host.shape;
        let one = || {
            // Time to run is what is measured here.
            std::thread::sleep(period);
            let after = self.host.read();
            let loads = self.before.iter().zip(&after).map(|(before, after)| load(1, scale, *before, *after).unwrap());
            let judged: Vec<_> = loads.zip(&mut self.recent).map(|(load, past)| past.judge(load)).collect();
            self.before = after;
            let demands = demands(cores, &judged);
            let seen: Vec<_> = judged.into_iter().map(|vm| vm.load).zip(demands).collect();
            for (load, demand) in &seen {
                println!("run {:.3} wait {:.3} demand {:.3} {:?}", load.run, load.wait, demand.demand, load.bursts);
            }
            println!();
            seen
        };
        std::iter::repeat_with(one).take(periods).collect()
    }
}

impl Drop for FullHost {
    fn drop(&mut self) {
        // Behind a quota ending takes seconds, too.
        let _ = self.world.group("h1").set_quota(None);
    }
}

#[test]
#[ignore = "needs root"]
fn on_a_full_host_a_guest_that_merely_wakes_wants_little_and_starved_ones_all() {
    let host = FullHost::new("dm", USUAL, &[RANK, RANK, RANK, WAKER]);
    host.await_programs();
    let mut watch = host.watch();
    watch.measure(1);
    host.limit();

    host.assert_told_apart(&watch.measure(PERIODS));
}

#[test]
#[ignore = "needs root"]
fn however_cores_scale_periods_and_guests_are_starved_ones_want_all_and_those_that_wake_little() {
    let ms = Duration::from_millis;
    let mut wrong = Vec::new();
    for (cores, burners) in [(1u32, 1), (1, 2), (2, 4), (3, 4), (3, 5), (3, 6)] {
        for (scale, quota_period, period) in [(0.1, 20, 250), (0.15, 20, 250), (0.15, 100, 250), (0.3, 100, 250)] {
            let shape = Shape { cores: f64::from(cores), scale, quota_period: ms(quota_period), period: ms(period) };
            let programs: Vec<_> = [RANK].repeat(burners).into_iter().chain([WAKER]).collect();
            let host = FullHost::new("dx", shape, &programs);
            host.await_programs();
            let mut watch = host.watch();
            watch.measure(2);
            host.limit();

            // A host that has just become full is judged by the last few periods, of which some lay before.
            let seen = watch.measure(12).split_off(4);

            for (guest, program) in programs.iter().enumerate() {
                let demands: Vec<f64> = seen.iter().map(|period| period[guest].1.demand).collect();
                let right = |demand: &f64| if *program == RANK { *demand > 0.75 } else { *demand < 0.25 };
                if !demands.iter().all(right) {
                    let kind = if *program == RANK { "loop" } else { "waker" };
                    wrong.push(format!("{shape:?}, {burners} loops, guest {guest} ({kind}): {demands:.2?}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Receives datagrams and says each hundredth.
const RECEIVER: &str = r#"ip address add 10.91.0.9/24 dev eth0
ip link set eth0 up
exec perl -e '
use IO::Socket::INET;
$| = 1;
my $s = IO::Socket::INET->new(LocalPort => 9000, Proto => "udp") or die;
setsockopt($s, SOL_SOCKET, SO_RCVBUF, 1 << 20);
my $n = 0;
while (defined $s->recv(my $data, 2000)) { print "$n\n" if ++$n % 100 == 0 }
'
"#;

#[test]
#[ignore = "needs root"]
fn on_a_full_host_a_guest_that_receives_500_frames_a_second_wants_little_and_starved_ranks_all() {
    let host = FullHost::new("dr", USUAL, &[RANK, RANK, RANK, RECEIVER]);
    let console = host.driver.console(&host.specs[3].vm);
    let received = || -> u32 {
        let text = std::fs::read_to_string(&console).unwrap();
        text.lines().rev().find_map(|line| line.parse().ok()).unwrap_or(0)
    };
    let sender = inside(File::open(host.world.netns_path("hub")).unwrap(), || UdpSocket::bind("10.91.0.254:0")).unwrap();
    let done = AtomicBool::new(false);

    let (measured, got, seconds) = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut next = Instant::now();
            while !done.load(Ordering::Relaxed) {
                // Refused while the guest has no socket yet.
                let _ = sender.send_to(&[0; 256], "10.91.0.9:9000");
                next += Duration::from_millis(2);
                std::thread::sleep(next.saturating_duration_since(Instant::now()));
            }
        });
        let measured = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            until("the guest receives", Duration::from_secs(180), || received() > 0);
            let mut watch = host.watch();
            watch.measure(1);
            host.limit();
            let (before, began) = (received(), Instant::now());
            (watch.measure(PERIODS), received() - before, began.elapsed().as_secs_f64())
        }));
        done.store(true, Ordering::Relaxed);
        measured.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });

    let rate = f64::from(got) / seconds;
    println!("{rate:.0} frames a second were received by the guest's process");
    assert!((400.0..600.0).contains(&rate), "{rate} frames a second, want 500");
    host.assert_told_apart(&measured);
}
