//! A sandbox monitor killed in the middle of a move: the guest runs exactly once. Needs root; `make test` runs it.
#![cfg(feature = "io")]

mod world;

use monitord::hypervisor::Hypervisor;
use monitord::io::sandbox::Sandbox;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::Duration;
use violin_common::control::monitor::{MigrationMode, VmState};
use world::{Echo, World, until};

const LIMIT: Duration = Duration::from_secs(180);

/// Not a test by itself: the process that is killed. It moves the guest from h1 to h2, where nobody waits for it.
#[test]
#[ignore = "run by the tests of this file"]
fn source_process() {
    let Ok(tag) = std::env::var("MONITORD_TEST_TAG") else { return };
    let dir = PathBuf::from(std::env::var("MONITORD_TEST_DIR").unwrap());
    let mut config = world::config(&tag, &dir, "h1");
    config.pause = Duration::from_millis(std::env::var("MONITORD_TEST_PAUSE").unwrap().parse().unwrap());
    let driver = Sandbox::open(config).unwrap();
    let vm = format!("{tag}-c1").parse().unwrap();
    let uri = format!("sandbox:netns=/run/netns/{tag}-h2;partition={tag}h2.partition");
    let _ = driver.migrate(&vm, &"h2".parse().unwrap(), &uri, MigrationMode::PreCopy, &mut |_, _| {});
}

fn source(world: &World, pause_ms: u64) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "source_process"])
        .env("MONITORD_TEST_TAG", &world.tag)
        .env("MONITORD_TEST_DIR", world.dir.path())
        .env("MONITORD_TEST_PAUSE", pause_ms.to_string())
        .spawn()
        .unwrap()
}

/// A running guest with an open connection, started by a driver that is gone.
fn guest(world: &World) -> Echo {
    let listener = world.listen();
    let h1 = world.driver("h1");
    let interface = h1.make_interface(&world.spec(), false).unwrap();
    world.attach("h1", &interface);
    h1.start(&world.spec(), &interface, None).unwrap();
    let mut echo = Echo::accept(&listener);
    echo.once();
    echo
}

fn interface(world: &World) -> String {
    format!("vg-{}-c1", world.tag)
}

fn is_frozen(world: &World) -> bool {
    // As the kernel sees it, asking no driver: opening one would thaw the guest.
    let guest = std::fs::read(world.dir.path().join(format!("shared/{0}-c1/guest.json", world.tag))).unwrap();
    let init = serde_json::from_slice::<serde_json::Value>(&guest).unwrap()["init"].to_string();
    let groups = std::fs::read_to_string(format!("/proc/{init}/cgroup")).unwrap();
    // cgroups(7): `NUMBER:CONTROLLERS:/PATH` of each tree, the unified one without controllers.
    let own = |mark: &str| groups.lines().find_map(|line| line.split_once(mark)).expect("a group in each tree").1.to_owned();
    let (trees, read) = (&world.trees, |path: PathBuf| std::fs::read_to_string(path).unwrap());
    match (trees.v1.get("freezer"), &trees.unified) {
        (Some(root), _) => read(root.join(own(":freezer:/")).join("freezer.state")).trim() == "FROZEN",
        (None, Some(root)) => read(root.join(own("0::/")).join("cgroup.events")).contains("frozen 1"),
        (None, None) => panic!("no tree freezes"),
    }
}

/// The file that says that the guest is offered to h2.
fn offer(world: &World) -> PathBuf {
    world.dir.path().join(format!("shared/{}-c1/to.h2", world.tag))
}

#[test]
#[ignore = "needs root"]
fn killed_before_the_offer_the_guest_runs_on_at_the_source() {
    let world = World::new("ka");
    let mut echo = guest(&world);
    let mut process = source(&world, 60_000);
    until("the guest is frozen", LIMIT, || is_frozen(&world));
    process.kill().unwrap();
    process.wait().unwrap();
    assert!(is_frozen(&world));

    let h1 = world.driver("h1");

    assert_eq!(h1.list().unwrap()[0].state, VmState::Running);
    echo.once();
    h1.stop(&world.spec().vm).unwrap();
    // Its start clears away the group the source had made there.
    world.driver("h2");
}

#[test]
#[ignore = "needs root"]
fn killed_after_the_offer_the_destination_takes_the_guest() {
    let world = World::new("kb");
    let mut echo = guest(&world);
    let mut process = source(&world, 0);
    let offer = offer(&world);
    until("the guest is offered", LIMIT, || offer.exists());
    process.kill().unwrap();
    process.wait().unwrap();

    let h2 = world.driver("h2");

    assert_eq!(h2.list().unwrap()[0].state, VmState::Running);
    assert!(world.driver("h1").list().unwrap().is_empty());
    world.attach("h2", &interface(&world));
    echo.once();
    h2.stop(&world.spec().vm).unwrap();
}

#[test]
#[ignore = "needs root"]
fn killed_after_an_offer_nobody_takes_the_guest_comes_back() {
    let world = World::new("kc");
    let mut echo = guest(&world);
    let mut process = source(&world, 0);
    let offer = offer(&world);
    until("the guest is offered", LIMIT, || offer.exists());
    process.kill().unwrap();
    process.wait().unwrap();

    let h1 = world.driver("h1");

    // Not gone: a monitor that thought so would clear away its port before it is back.
    let seen = h1.list().unwrap();
    assert!(matches!(seen.as_slice(), [one] if one.state == VmState::Paused && one.leaving), "{seen:?}");
    let runs = || h1.list().unwrap().iter().any(|seen| seen.state == VmState::Running);
    until("it was taken back", LIMIT, runs);
    world.attach("h1", &interface(&world));
    echo.once();
    h1.stop(&world.spec().vm).unwrap();
    // Its start clears away the group the source had made there.
    world.driver("h2");
}
