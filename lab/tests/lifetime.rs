//! Labs come and go whole, whatever happens half-way.

mod support;

use std::collections::BTreeSet;
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use support::{Standing, THREE, config, echoes, name, options, relay_entry as relay, remains, root};
use violin_lab::{LabError, LabState, Layers, ProcessId, down, netns, status, up, wait_for};

#[test]
#[ignore = "not a test: the relay of the labs below"]
fn relay_entry() {
    relay();
}

/// Tells [`up_entry`] the name of the lab it is to build.
const KILLED: &str = "VIOLIN_LAB_UP_ENTRY";

#[test]
#[ignore = "not a test: an `up` to be killed"]
fn up_entry() {
    if let Ok(name) = std::env::var(KILLED) {
        up(&config(&name, THREE), &options(Layers::Libvirt), &mut |_| ()).unwrap();
    }
}

#[test]
fn nothing_is_left_of_a_lab() {
    if !root() {
        return;
    }
    let name = &name("gone");
    let lab = Standing::up(&config(name, THREE), &options(Layers::Net));
    assert!(status(name).unwrap().whole());
    assert!(remains(name).len() > 10);
    // Stray processes: one in a namespace, one in a guests' group and frozen there.
    let mut stray = netns::spawn_in(&lab.0.hosts[1].netns, "sleep").unwrap().arg("1000").spawn().unwrap();
    let mut guest = Command::new("sleep").arg("1000").spawn().unwrap();
    let group = format!("{}.partition", lab.0.hosts[0].cpu_group);
    for tree in ["cpu", "freezer"] {
        let inner = format!("/sys/fs/cgroup/{tree}/{group}/guest");
        if std::fs::create_dir(&inner).is_ok() {
            std::fs::write(format!("{inner}/cgroup.procs"), guest.id().to_string()).unwrap();
        }
    }
    let _ = std::fs::write(format!("/sys/fs/cgroup/freezer/{group}/guest/freezer.state"), "FROZEN");

    lab.down();

    assert_eq!(remains(name), BTreeSet::new());
    assert!(stray.wait().unwrap().code().is_none() && guest.wait().unwrap().code().is_none(), "not killed");
}

#[test]
fn what_a_killed_up_left_is_removed_by_down() {
    if !root() {
        return;
    }
    let killed = name("kill");
    for phase in ["netns", "groups", "libvirtd"] {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["up_entry", "--exact", "--ignored"])
            .env(KILLED, &killed)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        wait_for("the lab to be half built", Duration::from_secs(30), None, || {
            let found = remains(&killed);
            Ok(match phase {
                "netns" => found.iter().any(|what| what.contains("vl-")),
                "groups" => found.iter().any(|what| what.contains(".partition")),
                _ => LabState::load(&killed).is_ok_and(|state| state.hosts.iter().any(|host| host.libvirtd.is_some())),
            })
        })
        .unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_ne!(remains(&killed), BTreeSet::new());

        down(&killed, &mut |_| ()).unwrap();

        assert_eq!(remains(&killed), BTreeSet::new(), "killed in phase {phase}");
    }
}

#[test]
fn two_labs_stand_side_by_side_and_one_goes_alone() {
    if !root() {
        return;
    }
    // One name begins like the other: taking the first down must not touch the second.
    let (first, second) = (name("two"), format!("{}-b", name("two")));
    let one = Standing::up(&config(&first, THREE), &options(Layers::Net));
    let two = Standing::up(&config(&second, THREE), &options(Layers::Net));
    let before = remains(&second);

    one.down();

    assert_eq!(remains(&second), before);
    let (_, lost) = echoes(&two.0.hosts[0], &two.0.hosts[2], 3, Duration::from_millis(50), 100);
    assert_eq!(lost, 0.0);
    two.down();
    assert_eq!(remains(&first), BTreeSet::new());
}

#[test]
fn a_lab_is_replaced_when_its_owner_is_dead_and_not_before() {
    if !root() {
        return;
    }
    let name = &name("own");
    let mut owner = Command::new("sleep").arg("1000").spawn().unwrap();
    let mut first = options(Layers::Net);
    first.owner = ProcessId::of(owner.id());
    let lab = Standing::up(&config(name, THREE), &first);

    let refused = up(&config(name, THREE), &options(Layers::Net), &mut |_| ()).unwrap_err();
    assert!(matches!(refused, LabError::AlreadyUp { .. }), "{refused}");
    owner.kill().unwrap();
    owner.wait().unwrap();
    let again = up(&config(name, THREE), &options(Layers::Net), &mut |_| ()).unwrap();

    assert_ne!(again.relay, lab.0.relay);
    assert!(status(name).unwrap().whole());
    lab.down();
    assert_eq!(remains(name), BTreeSet::new());
}

#[test]
fn an_interrupted_up_leaves_nothing() {
    if !root() {
        return;
    }
    static CANCELLED: AtomicBool = AtomicBool::new(true);
    let mut interrupted = options(Layers::Net);
    interrupted.cancelled = Some(&CANCELLED);

    let error = up(&config(&name("int"), THREE), &interrupted, &mut |_| ()).unwrap_err();

    assert!(matches!(error, LabError::Cancelled), "{error}");
    assert_eq!(remains(&name("int")), BTreeSet::new());
}
