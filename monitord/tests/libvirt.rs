//! The libvirt driver against two real libvirtds and real QEMU guests (translated, so any machine will do).
//!
//! Needs root, libvirtd, QEMU, busybox-static and, once, Debian's package mirror for a kernel. Removes all it makes.

#[path = "libvirt/guest.rs"]
mod guest;
#[path = "libvirt/hosts.rs"]
mod hosts;

use hosts::{Host, Hosts, inside, qemus, sh, wait};
use monitord::hypervisor::{Change, Hypervisor, HypervisorError, ImageFiles, MoveStatistics};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};
use violin_common::api::switch::NetworkSpec;
use violin_common::control::monitor::{MigrationMode, Role, VmSpec, VmState};
use violin_common::{MacAddr, VmId, Vni};

const VM: &str = "vlt-c1";
const GUEST: &str = "10.99.78.2";
/// Patience with what must come: a limit costs only when a test fails.
const LIMIT: Duration = Duration::from_secs(180);

fn vm() -> VmId {
    VM.parse().unwrap()
}

fn spec() -> VmSpec {
    VmSpec {
        vm: vm(),
        environment: "vlt".parse().unwrap(),
        role: Role::Compute,
        network: NetworkSpec { vni: Vni::new(7).unwrap(), mtu: 1400, ageing_s: 300 },
        mac: MacAddr([0x52, 0x54, 0, 0x76, 0x6c, 1]),
        address: GUEST.parse().unwrap(),
        prefix_len: 24,
        vcpus: 1,
        memory_mib: 128,
        image: None,
        guest_config: "NAME=vlt-c1\nODD='a<b>&\"c\",d'\n".into(),
    }
}

/// Makes the VM's interface on a host, with an address on the host's side so that the guest can be pinged.
fn interface(host: &Host) -> String {
    let name = host.run(|driver| driver.make_interface(&spec(), false)).unwrap();
    sh(&format!("ip -n {} addr replace 10.99.78.1/24 dev {name}", host.name));
    name
}

/// The next event of this kind, with its time.
fn event(host: &Host, change: Change) -> violin_common::Instant {
    let events = host.events.lock().unwrap();
    let deadline = Instant::now() + LIMIT;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let event = events.recv_timeout(left).unwrap_or_else(|_| panic!("no event {change:?}"));
        assert_eq!(event.vm, vm());
        if event.change == change {
            return event.at;
        }
    }
}

/// Highest number the guest has counted to on this host.
fn ticks(host: &Host) -> u64 {
    let console = fs::read_to_string(host.driver.console(&vm())).unwrap_or_default();
    console.lines().rev().find_map(|line| line.trim().strip_prefix("tick ")?.parse().ok()).unwrap_or(0)
}

fn pings(host: &Host) -> bool {
    inside(host.name.as_str(), || {
        std::process::Command::new("busybox")
            .args(["ping", "-c1", "-W1", "-q", GUEST])
            .output()
            .is_ok_and(|ping| ping.status.success())
    })
}

/// Asserts that the VM runs here: by libvirt's word, by its console, by its network, and as the only QEMU there is.
fn runs_at(host: &Host) {
    let seen = host.driver.list().unwrap();
    assert!(seen.len() == 1 && seen[0].state == VmState::Running && !seen[0].leaving, "{}: {seen:?}", host.name);
    wait("one QEMU process", LIMIT, || (qemus(VM).len() == 1).then_some(()));
    let before = ticks(host);
    wait("the guest counts on", LIMIT, || (ticks(host) > before).then_some(()));
    wait("the guest answers a ping", LIMIT, || pings(host).then_some(()));
}

fn go(from: &Host, to: &Host, uri: &str, mode: MigrationMode) -> Result<MoveStatistics, HypervisorError> {
    let mut told: Vec<(Option<f64>, String)> = Vec::new();
    let moved =
        from.run(|driver| driver.migrate(&vm(), &to.name, uri, mode, &mut |part, what| told.push((part, what.to_owned()))));
    assert!(!told.is_empty(), "no progress was told");
    let switched = told.iter().any(|(_, what)| what.starts_with("runs at the destination"));
    assert_eq!(switched, mode == MigrationMode::PostCopy, "{told:?}");
    moved
}

/// Moves the VM and checks both ends' events and figures.
fn moves(from: &Host, to: &Host, image: &ImageFiles, mode: MigrationMode) -> MoveStatistics {
    let name = interface(to);
    let uri = to.run(|driver| driver.prepare_incoming(&spec(), &name, Some(image))).unwrap();
    let began = Instant::now();

    let statistics = go(from, to, &uri, mode).unwrap();

    let total = began.elapsed();
    let stopped = event(from, Change::Stopped);
    event(from, Change::Ended);
    let resumed = event(to, Change::Running);
    assert!(resumed > stopped, "{mode:?}: it ran at the destination {:?} before it stopped", stopped.since(resumed));
    let pause = resumed.since(stopped);
    assert!(pause < total, "{mode:?}: paused {pause:?} of {total:?}");
    println!("{mode:?}: total {total:?}, pause by events {pause:?}, by libvirt {:?} ms", statistics.downtime_ms);
    assert!(from.driver.list().unwrap().is_empty());
    assert!(matches!(from.driver.usage(&vm()), Err(HypervisorError::NotHere(_))));
    from.run(|driver| driver.remove_interface(&vm())).unwrap();
    runs_at(to);
    statistics
}

#[test]
#[ignore = "needs root, libvirtd and QEMU"]
fn a_vm_lives_moves_and_survives_failures() {
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("libvirt-test");
    let kernel = guest::kernel(&cache);
    let mut hosts = Hosts::start();
    let image_a = guest::image(&kernel, &hosts.a.dir.join("images"), GUEST);
    let image_b = guest::image(&kernel, &hosts.b.dir.join("images"), GUEST);

    starts(&hosts.a, &image_a);
    resizes(&hosts.a);

    let statistics = moves(&hosts.a, &hosts.b, &image_b, MigrationMode::PreCopy);
    assert!(statistics.copied_bytes.unwrap() > 0 && statistics.downtime_ms.is_some(), "{statistics:?}");
    moves(&hosts.b, &hosts.a, &image_a, MigrationMode::StopAndCopy);
    hosts.a.virsh(&format!("migrate-setspeed {VM} 30")); // so that the first copy leaves something to do
    let statistics = moves(&hosts.a, &hosts.b, &image_b, MigrationMode::PostCopy);
    assert!(statistics.verbatim.iter().any(|(name, _)| name == "memory_iteration"), "{statistics:?}");
    moves(&hosts.b, &hosts.a, &image_a, MigrationMode::PreCopy);

    refusals(&hosts, &image_b);
    aborted(&hosts, &image_b);
    destination_killed(&mut hosts, &image_b);
    libvirtd_restarts(&mut hosts.a);
    moves(&hosts.a, &hosts.b, &image_b, MigrationMode::PreCopy);
    ends(&hosts.b);

    starts(&hosts.a, &image_a);
    broken_postcopy(&hosts.a, &hosts.b, &image_b);
}

fn starts(host: &Host, image: &ImageFiles) {
    let name = interface(host);
    host.run(|driver| driver.start(&spec(), &name, Some(image))).unwrap();
    host.run(|driver| driver.start(&spec(), &name, Some(image))).expect("may be called again");
    event(host, Change::Running);

    let console = wait("the guest is ready", LIMIT, || {
        fs::read_to_string(host.driver.console(&vm())).ok().filter(|text| text.contains("violin-guest: ready"))
    });
    let lines: Vec<&str> = console.lines().map(str::trim_end).collect();
    assert!(lines.contains(&"config: NAME=vlt-c1") && lines.contains(&"config: ODD='a<b>&\"c\",d'"), "{console}");
    assert!(lines.contains(&"root: root-image"), "{console}");
    assert!(lines.contains(&"ufo: 0"), "VIRTIO_NET_F_HOST_UFO, bit 14: {console}");
    assert!(lines.contains(&"mtu: 1400"), "the network's, from the interface itself: {console}");
    runs_at(host);
}

fn resizes(host: &Host) {
    let usage = host.driver.usage(&vm()).unwrap();
    assert!(usage.run_ns > 100_000_000 && usage.wait_ns > 0 && usage.memory_bytes > 50 << 20, "{usage:?}");
    let scheduled = usage.scheduled.expect("how its vCPU came onto cores is told");
    assert!(scheduled.slices > 0 && scheduled.sleeps > 0, "{usage:?}");

    host.driver.set_cpu(&vm(), 512, Some(0.5)).unwrap();
    let parameters = host.virsh(&format!("schedinfo {VM}"));
    assert!(parameters.contains("cpu_shares     : 512") && parameters.contains("vcpu_quota     : 50000"), "{parameters}");
    host.driver.set_cpu(&vm(), 1024, None).unwrap();
    assert!(host.driver.set_cpu(&vm(), 1024, Some(0.0)).is_err());

    host.driver.set_memory(&vm(), 112).unwrap();
    wait("the balloon is filled", LIMIT, || {
        host.virsh(&format!("dommemstat {VM}")).contains(&format!("actual {}", 112 * 1024)).then_some(())
    });
    host.driver.set_memory(&vm(), 128).unwrap();
}

fn refusals(hosts: &Hosts, image_b: &ImageFiles) {
    let (a, b) = (&hosts.a, &hosts.b);
    let refused = b.run(|driver| driver.prepare_incoming(&spec(), "vt-vlt-c1", Some(image_b))).unwrap_err();
    assert!(refused.to_string().contains("no interface vt-vlt-c1"), "{refused}");
    let name = interface(b);
    let absent = ImageFiles { root: "/nowhere/root.img".into(), ..image_b.clone() };
    let refused = b.run(|driver| driver.prepare_incoming(&spec(), &name, Some(&absent))).unwrap_err();
    assert!(refused.to_string().contains("/nowhere/root.img"), "{refused}");
    let refused = a.run(|driver| driver.prepare_incoming(&spec(), &name, Some(image_b))).unwrap_err();
    assert!(refused.to_string().contains("here already"), "{refused}");
    let refused = a.run(|driver| driver.cancel_incoming(&vm())).unwrap_err();
    assert!(refused.to_string().contains("runs here"), "{refused}");

    let uri = b.run(|driver| driver.prepare_incoming(&spec(), &name, Some(image_b))).unwrap();
    // Prepared, then its image goes: QEMU at the destination cannot start.
    let gone = uri.replace("root.img", "gone.img");
    let refused = go(a, b, &gone, MigrationMode::PreCopy).unwrap_err();
    assert!(refused.to_string().contains("gone.img"), "{refused}");
    runs_at(a);

    b.run(|driver| driver.remove_interface(&vm())).unwrap();
    let refused = go(a, b, &uri, MigrationMode::PreCopy).unwrap_err();
    assert!(refused.to_string().contains("dev doesn't exist"), "{refused}");
    runs_at(a);

    let began = Instant::now();
    let nobody = uri.replace(&b.address, "10.99.77.99");
    let refused = go(a, b, &nobody, MigrationMode::PreCopy).unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(60), "{refused}");
    runs_at(a);
    b.run(|driver| driver.cancel_incoming(&vm())).unwrap();
    assert!(b.driver.list().unwrap().is_empty());

    // Prepared for, and stopped before it came: what the guest would have been told does not stay.
    let told = b.dir.join("violin/guest").join(VM);
    let name = interface(b);
    b.run(|driver| driver.prepare_incoming(&spec(), &name, Some(image_b))).unwrap();
    assert!(told.exists());
    b.run(|driver| driver.stop(&vm())).unwrap();
    assert!(!told.exists());
    b.run(|driver| driver.remove_interface(&vm())).unwrap();
}

/// Begins a move so slow that something can happen meanwhile, lets it happen, and returns what became of the move.
fn slow_move(from: &Host, to: &Host, uri: &str, meanwhile: impl FnOnce()) -> Result<MoveStatistics, HypervisorError> {
    from.virsh(&format!("migrate-setspeed {VM} 2"));
    std::thread::scope(|scope| {
        let moved = scope.spawn(|| go(from, to, uri, MigrationMode::PreCopy));
        wait("memory is being copied", LIMIT, || {
            let arriving = to.driver.list().ok()?.iter().any(|vm| vm.state == VmState::Arriving);
            let copying = from.virsh(&format!("domjobinfo {VM}")).contains("Memory processed");
            (arriving && copying && from.driver.list().ok()?[0].leaving).then_some(())
        });
        meanwhile();
        moved.join().unwrap()
    })
}

fn aborted(hosts: &Hosts, image_b: &ImageFiles) {
    let (a, b) = (&hosts.a, &hosts.b);
    let name = interface(b);
    let uri = b.run(|driver| driver.prepare_incoming(&spec(), &name, Some(image_b))).unwrap();

    let ended = slow_move(a, b, &uri, || a.driver.abort(&vm()).unwrap()).unwrap_err();

    assert!(ended.to_string().contains("given up as asked"), "{ended}");
    runs_at(a);
    b.run(|driver| driver.cancel_incoming(&vm())).unwrap();
    b.run(|driver| driver.remove_interface(&vm())).unwrap();
}

fn destination_killed(hosts: &mut Hosts, image_b: &ImageFiles) {
    let name = interface(&hosts.b);
    let uri = hosts.b.run(|driver| driver.prepare_incoming(&spec(), &name, Some(image_b))).unwrap();
    let Hosts { a, b, .. } = &mut *hosts;
    let pid = b.daemon_pid();

    let began = Instant::now();
    let ended = slow_move(a, b, &uri, || nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap()).unwrap_err();

    assert!(began.elapsed() < Duration::from_secs(180), "{ended}");
    wait("the driver notices", LIMIT, || matches!(b.driver.list(), Err(HypervisorError::Unreachable(_))).then_some(()));
    b.kill();
    b.restart();
    wait("the driver is connected again", LIMIT, || b.driver.list().ok());
    b.run(|driver| driver.cancel_incoming(&vm())).unwrap();
    b.run(|driver| driver.remove_interface(&vm())).unwrap();
    runs_at(a);
}

fn libvirtd_restarts(host: &mut Host) {
    while host.events.lock().unwrap().try_recv().is_ok() {}
    host.kill();
    wait("the driver notices", LIMIT, || host.driver.list().is_err().then_some(()));
    let began = Instant::now();
    assert!(matches!(host.driver.usage(&vm()), Err(HypervisorError::Unreachable(_))));
    assert!(began.elapsed() < Duration::from_secs(5), "an unreachable libvirtd is told at once");
    let qemu = qemus(VM)[0];
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(qemu), None).expect("QEMU goes on");
    host.restart();
    wait("the driver is connected again", LIMIT, || host.driver.list().ok());
    assert_eq!(qemus(VM), [qemu]);
    runs_at(host);
}

fn broken_postcopy(a: &Host, b: &Host, image_b: &ImageFiles) {
    let name = interface(b);
    let uri = b.run(|driver| driver.prepare_incoming(&spec(), &name, Some(image_b))).unwrap();
    a.virsh(&format!("migrate-setspeed {VM} 30"));
    a.virsh(&format!("migrate-setspeed {VM} 3 --postcopy"));

    std::thread::scope(|scope| {
        let moved = scope.spawn(|| go(a, b, &uri, MigrationMode::PostCopy));
        wait("it runs at the destination", LIMIT, || {
            b.driver.list().ok()?.iter().any(|vm| vm.state == VmState::Running).then_some(())
        });
        a.virsh(&format!("qemu-monitor-command {VM} '{{\"execute\":\"migrate-pause\"}}'"));
        let ended = moved.join().unwrap().unwrap_err();
        assert!(ended.to_string().contains("DOES NOT RUN HERE: part of its memory"), "{ended}");
    });

    for host in [a, b] {
        host.driver.stop(&vm()).unwrap();
        host.run(|driver| driver.remove_interface(&vm())).unwrap();
    }
    wait("no QEMU process", LIMIT, || qemus(VM).is_empty().then_some(()));
}

fn ends(host: &Host) {
    while host.events.lock().unwrap().try_recv().is_ok() {}
    host.driver.stop(&vm()).unwrap();
    host.driver.stop(&vm()).expect("may be called again");
    event(host, Change::Ended);
    assert!(host.driver.list().unwrap().is_empty());
    wait("no QEMU process", LIMIT, || qemus(VM).is_empty().then_some(()));
    host.run(|driver| driver.remove_interface(&vm())).unwrap();
    host.run(|driver| driver.remove_interface(&vm())).expect("may be called again");
    assert!(!sh(&format!("ip -n {} -br link", host.name)).contains("vt-"));
}
