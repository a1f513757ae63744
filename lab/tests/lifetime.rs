//! Labs come and go whole, whatever happens half-way.

mod support;

use std::collections::BTreeSet;
use std::process::{Command, Stdio};
use std::time::Duration;
use support::{Standing, THREE, config, echoes, interrupted, name, options, relay_entry as relay, remains};
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
#[ignore = "needs root"]
fn nothing_is_left_of_a_lab() {
    let name = &name("gone");
    let lab = Standing::up(&config(name, THREE), &options(Layers::Net));
    assert!(status(name).unwrap().whole());
    assert!(remains(name).len() > 10);
    // Stray processes: one in a namespace, one in a guests' group and frozen there.
    let mut stray = netns::spawn_in(&lab.0.hosts[1].netns, "sleep").unwrap().arg("1000").spawn().unwrap();
    let mut guest = Command::new("sleep").arg("1000").spawn().unwrap();
    let group = format!("{}.partition", lab.0.hosts[0].cpu_group);
    let mut frozen = 0;
    for inner in violin_lab::cgroup::places(&group).iter().map(|dir| dir.join("guest")) {
        std::fs::create_dir(&inner).unwrap();
        let freezer = [("freezer.state", "FROZEN"), ("cgroup.freeze", "1")];
        // On v1 only the freezer's hierarchy matters here; others may take no process before they are set up.
        for (file, value) in freezer.map(|(file, value)| (inner.join(file), value)).iter().filter(|(file, _)| file.exists()) {
            std::fs::write(inner.join("cgroup.procs"), guest.id().to_string()).unwrap();
            std::fs::write(file, value).unwrap();
            frozen += 1;
        }
    }
    assert!(frozen > 0, "no hierarchy freezes");

    lab.down();

    assert_eq!(remains(name), BTreeSet::new());
    assert!(stray.wait().unwrap().code().is_none() && guest.wait().unwrap().code().is_none(), "not killed");
}

#[test]
#[ignore = "needs root"]
fn what_a_killed_up_left_is_removed_by_down() {
    let killed = name("kill");
    for phase in ["netns", "groups", "libvirtd"] {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["up_entry", "--exact", "--ignored"])
            .env(KILLED, &killed)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        wait_for("the lab to be half built", Duration::from_secs(180), None, || {
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
#[ignore = "needs root"]
fn a_namespace_that_is_mounted_once_more_goes_too() {
    let lab = Standing::up(&config(&name("busy"), THREE), &options(Layers::Net));
    // As by an `ip netns add` that outlived its caller: one try at removing does not do.
    let file = format!("/run/netns/{}", lab.0.hosts[0].netns);
    assert!(Command::new("mount").args(["--bind", &file, &file]).status().unwrap().success());

    lab.down();

    assert_eq!(remains(&name("busy")), BTreeSet::new());
}

#[test]
#[ignore = "needs root"]
fn two_labs_stand_side_by_side_and_one_goes_alone() {
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
#[ignore = "needs root"]
fn a_lab_is_replaced_when_its_owner_is_dead_and_not_before() {
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
#[ignore = "needs root"]
fn an_interrupted_up_leaves_nothing() {
    let name = name("int");
    let state = || LabState::load(&name).ok();
    let points: [(&str, Layers, &(dyn Fn() -> bool + Sync)); 4] = [
        ("before anything", Layers::Net, &|| true),
        ("namespaces", Layers::Net, &|| remains(&name).iter().any(|what| what.contains("vl-"))),
        ("relay", Layers::Net, &|| state().is_some_and(|state| state.relay.is_some())),
        ("libvirtd", Layers::Libvirt, &|| state().is_some_and(|state| state.hosts.iter().any(|host| host.libvirtd.is_some()))),
    ];
    for (point, layers, half_way) in points {
        let error = interrupted(&config(&name, THREE), options(layers), half_way).unwrap_err();

        assert!(matches!(error, LabError::Cancelled), "{point}: {error}");
        assert_eq!(remains(&name), BTreeSet::new(), "interrupted at {point}");
    }
}

#[test]
#[ignore = "needs root"]
fn of_many_who_build_one_lab_one_succeeds() {
    let name = name("many");
    let results: Vec<_> = std::thread::scope(|scope| {
        let build = || up(&config(&name, THREE), &options(Layers::Net), &mut |_| ());
        let builders: Vec<_> = (0..6).map(|_| scope.spawn(build)).collect();
        builders.into_iter().map(|builder| builder.join().unwrap()).collect()
    });

    let (built, refused): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
    for error in refused.into_iter().map(Result::unwrap_err) {
        assert!(matches!(error, LabError::AlreadyUp { .. } | LabError::Busy(_)), "{error}");
    }
    assert_eq!(built.len(), 1);
    assert!(status(&name).unwrap().whole());
    down(&name, &mut |_| ()).unwrap();
}
