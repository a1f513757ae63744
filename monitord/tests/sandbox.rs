//! The sandbox driver on real namespaces and control groups. Needs root; `make test` runs it.
#![cfg(feature = "io")]

mod world;

use monitord::hypervisor::{Change, Hypervisor, HypervisorEvent};
use monitord::io::sandbox::Sandbox;
use std::sync::mpsc::Receiver;
use std::time::Duration;
use violin_common::control::monitor::{MigrationMode, VmState};
use world::{Echo, World, until};

const LIMIT: Duration = Duration::from_secs(180);

fn wait_for(events: &Receiver<HypervisorEvent>, change: Change) -> HypervisorEvent {
    loop {
        let event = events.recv_timeout(LIMIT).unwrap_or_else(|_| panic!("no {change:?} within {LIMIT:?}"));
        if event.change == change {
            return event;
        }
    }
}

#[test]
#[ignore = "needs root"]
fn a_guest_moves_between_hosts_with_its_connection_open_and_leaves_nothing() {
    let world = World::new("mv");
    let (h1, h2) = (world.driver("h1"), world.driver("h2"));
    let (events1, events2) = (h1.events().unwrap(), h2.events().unwrap());
    let spec = world.spec();
    let vm = &spec.vm;
    let listener = world.listen();

    let interface = h1.make_interface(&spec, false).unwrap();
    world.attach("h1", &interface);
    h1.start(&spec, &interface, None).unwrap();
    wait_for(&events1, Change::Running);
    assert_eq!(h1.list().unwrap()[0].state, VmState::Running);
    assert!(h2.list().unwrap().is_empty());
    let mut echo = Echo::accept(&listener);
    let ready = || std::fs::read_to_string(h1.console(vm)).unwrap().lines().any(|line| line == "violin-guest: ready");
    until("the console says ready", LIMIT, ready);
    for _ in 0..100 {
        echo.once();
    }
    assert!(h1.usage(vm).unwrap().memory_bytes > 100_000);
    assert!(h1.usage(vm).unwrap().run_ns > 100_000);

    assert_eq!(h2.make_interface(&spec, true).unwrap(), interface);
    let uri = h2.prepare_incoming(&spec, &interface, None).unwrap();
    assert_eq!(h2.list().unwrap()[0].state, VmState::Arriving);
    let statistics = h1.migrate(vm, &"h2".parse().unwrap(), &uri, MigrationMode::StopAndCopy, &mut |_, _| {}).unwrap();
    let stopped = wait_for(&events1, Change::Stopped);
    let running = wait_for(&events2, Change::Running);
    world.attach("h2", &interface);
    wait_for(&events1, Change::Ended);
    println!("pause {:?}, {statistics:?}", running.at.since(stopped.at));
    assert!(running.at > stopped.at && statistics.downtime_ms.unwrap() < 500.0);
    for _ in 0..100 {
        echo.once();
    }
    assert!(h1.list().unwrap().is_empty());
    assert_eq!(h2.list().unwrap()[0].state, VmState::Running);
    assert!(!world.interfaces("h1").contains(&interface));
    h2.usage(vm).unwrap();

    h2.stop(vm).unwrap();
    h2.stop(vm).unwrap();
    wait_for(&events2, Change::Ended);
    assert!(h2.list().unwrap().is_empty());
    assert!(!world.interfaces("h2").contains(&interface));
    assert_eq!(std::fs::read_dir(world.dir.path().join("shared")).unwrap().count(), 0);
    world.group("h1").remove().unwrap();
    world.group("h2").remove().unwrap();
}

#[test]
#[ignore = "needs root"]
fn a_guest_offered_to_nobody_comes_back_and_runs_on() {
    let world = World::new("bk");
    let h1 = world.driver("h1");
    let events = h1.events().unwrap();
    let spec = world.spec();
    let listener = world.listen();
    let interface = h1.make_interface(&spec, false).unwrap();
    world.attach("h1", &interface);
    h1.start(&spec, &interface, None).unwrap();
    wait_for(&events, Change::Running);
    let mut echo = Echo::accept(&listener);
    echo.once();

    let uri = format!("sandbox:netns={};partition={}", world.netns_path("h2").display(), world.group("h2").path().display());
    let error = h1.migrate(&spec.vm, &"h2".parse().unwrap(), &uri, MigrationMode::PreCopy, &mut |_, _| {}).unwrap_err();

    assert!(error.to_string().contains("did not take it"), "{error}");
    wait_for(&events, Change::Stopped);
    wait_for(&events, Change::Running);
    world.attach("h1", &interface);
    echo.once();
    h1.stop(&spec.vm).unwrap();
    world.group("h2").remove().unwrap();
}

#[test]
#[ignore = "needs root"]
fn a_guest_that_ends_by_itself_is_told_once() {
    let world = World::new("end");
    let h1 = world.driver("h1");
    let events = h1.events().unwrap();
    let mut spec = world.spec();
    // The shell reads its configuration as a script.
    spec.guest_config = "sleep 0.2; exit 0\n".into();
    let interface = h1.make_interface(&spec, false).unwrap();

    h1.start(&spec, &interface, None).unwrap();

    wait_for(&events, Change::Ended);
    assert_eq!(h1.list().unwrap()[0].state, VmState::Stopped);
    h1.stop(&spec.vm).unwrap();
    assert!(h1.list().unwrap().is_empty());
    assert!(events.recv_timeout(Duration::from_millis(100)).is_err());
}

#[test]
#[ignore = "needs root"]
fn a_stopped_guest_is_expected_no_longer() {
    let world = World::new("ex");
    let h2 = world.driver("h2");
    let spec = world.spec();
    let interface = h2.make_interface(&spec, true).unwrap();
    h2.prepare_incoming(&spec, &interface, None).unwrap();
    assert_eq!(h2.list().unwrap()[0].state, VmState::Arriving);

    h2.stop(&spec.vm).unwrap();

    assert!(h2.list().unwrap().is_empty());
}

#[test]
#[ignore = "needs root"]
fn a_guest_that_cannot_be_taken_up_keeps_no_other_from_running() {
    let world = World::new("tu");
    let spec = world.spec();
    let listener = world.listen();
    let h1 = world.driver("h1");
    let interface = h1.make_interface(&spec, false).unwrap();
    world.attach("h1", &interface);
    h1.start(&spec, &interface, None).unwrap();
    let mut echo = Echo::accept(&listener);
    drop(h1);
    // One sorts before the guest and one behind, and a file is among them.
    let shared = world.dir.path().join("shared");
    for name in ["a-c1", "z-c1"] {
        std::fs::create_dir(shared.join(name)).unwrap();
        std::fs::write(shared.join(name).join("at.h1"), "{").unwrap();
        std::fs::write(shared.join(name).join("guest.json"), "{").unwrap();
    }
    std::fs::write(shared.join("b-c1"), "").unwrap();

    let h1 = Sandbox::open(world.config("h1")).unwrap();

    let events = h1.events().unwrap();
    assert_eq!(wait_for(&events, Change::Running).vm, spec.vm);
    let runs = h1.list().unwrap().iter().any(|seen| seen.vm == spec.vm && seen.state == VmState::Running);
    assert!(runs, "{:?}", h1.list());
    echo.once();
    h1.stop(&spec.vm).unwrap();
}

#[test]
#[ignore = "needs root"]
fn the_real_guest_program_gets_ready_and_answers_before_and_after_a_move() {
    // Beside the monitor, or what VIOLIN_PROBE names.
    let beside = || std::path::PathBuf::from(env!("CARGO_BIN_EXE_monitord")).with_file_name("violin-probe");
    let program = std::env::var_os("VIOLIN_PROBE").map_or_else(beside, Into::into);
    assert!(program.exists(), "{} is not there: cargo build -p violin-probe", program.display());
    let world = World::new("pr");
    let open = |host: &str| {
        let mut config = world.config(host);
        config.guest_program.clone_from(&program);
        Sandbox::open(config).unwrap()
    };
    let (h1, h2) = (open("h1"), open("h2"));
    let mut spec = world.spec();
    let key = world.dir.path().join("key");
    let shell = format!("ssh-keygen -q -t ed25519 -N '' -f {0} && base64 -w0 {0}", key.display());
    let private = std::process::Command::new("sh").args(["-c", &shell]).output().unwrap().stdout;
    let (private, public) = (String::from_utf8(private).unwrap(), std::fs::read_to_string(key.with_extension("pub")).unwrap());
    spec.guest_config = "VIOLIN_NAME=c1\nVIOLIN_VM=pr-c1\nVIOLIN_ENVIRONMENT=pr\nVIOLIN_ADDRESS=10.91.0.1/24\n\
        VIOLIN_MAC=52:54:00:91:00:01\nVIOLIN_MTU=1400\nVIOLIN_HOSTS=10.91.0.1 c1\nVIOLIN_CANARY=7001\n"
        .into();
    spec.guest_config += &format!("VIOLIN_SSH_PRIVATE={private}\nVIOLIN_SSH_PUBLIC={public}");
    let interface = h1.make_interface(&spec, false).unwrap();
    world.attach("h1", &interface);
    h1.start(&spec, &interface, None).unwrap();
    let ready = || std::fs::read_to_string(h1.console(&spec.vm)).unwrap().lines().any(|line| line == "violin-guest: ready");
    until("the guest says that it is ready", LIMIT, ready);
    let ssh = || {
        let netns = std::fs::File::open(world.netns_path("hub")).unwrap();
        let connect = || std::net::TcpStream::connect_timeout(&"10.91.0.1:22".parse().unwrap(), Duration::from_secs(1));
        monitord::io::netlink::inside(netns, connect).is_ok()
    };
    until("its ssh server answers", LIMIT, ssh);

    let uri = h2.prepare_incoming(&spec, &interface, None).unwrap();
    h1.migrate(&spec.vm, &"h2".parse().unwrap(), &uri, MigrationMode::PreCopy, &mut |_, _| {}).unwrap();
    world.attach("h2", &interface);

    until("its ssh server answers at the destination", LIMIT, ssh);
    h2.stop(&spec.vm).unwrap();
}
