//! The daemon itself, in a host's namespace, with this test as its manager. Needs root; `make test` runs it.
#![cfg(feature = "io")]

mod world;

use std::time::Duration;
use violin_common::Epoch;
use violin_common::api::switch::{SwitchReply, SwitchRequest};
use violin_common::control::monitor::{Answer, Command, Report};
use world::manager::{Daemon, Manager, monitord, monitord_logging, switchd};
use world::{World, until};

#[test]
#[ignore = "needs root"]
fn the_daemon_reports_answers_undoes_and_calls_again() {
    let world = World::new("dn");
    let manager = Manager::new(&world);
    let mut daemon = monitord(&world, "h1", "0s");
    let mut line = manager.line();
    assert_eq!((line.hello.driver.as_str(), line.hello.cores), ("sandbox", 2.0));

    // Observations say what could not be read: there is no switch.
    let Report::Observation(observation) = manager.report(&mut line) else { panic!("want an observation") };
    assert!(observation.missing.iter().any(|words| words.contains("switchd")), "{observation:?}");
    assert_eq!(observation.host.memory_free_mib, 1024);

    // Without a switch no VM starts, and nothing is left of the attempt.
    let start = Command::Start { spec: world.spec(), epoch: Epoch::FIRST, image_sources: vec![] };
    let Answer::Failed(words) = manager.ask(&line, &start) else { panic!("want a failure") };
    assert!(words.contains("is switchd running?"), "{words}");
    assert!(!world.interfaces("h1").contains("vg-"), "{}", world.interfaces("h1"));
    assert_eq!(manager.ask(&line, &Command::List), Answer::Vms(vec![]));

    // A lost manager is called again.
    line.connection.close(quinn::VarInt::from_u32(0), b"test");
    let line = manager.line();
    assert_eq!(manager.ask(&line, &Command::List), Answer::Vms(vec![]));

    ends_when_told(&mut daemon);
}

fn ends_when_told(daemon: &mut Daemon) {
    let pid = nix::unistd::Pid::from_raw(daemon.0.id().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    let mut status = None;
    until("the daemon ends", Duration::from_secs(180), || {
        status = daemon.0.try_wait().unwrap();
        status.is_some()
    });
    assert!(status.unwrap().success());
}

#[test]
#[ignore = "needs root"]
fn a_log_that_goes_nowhere_neither_ends_nor_holds_up_the_monitor() {
    let world = World::new("dl");
    let manager = Manager::new(&world);
    let _switch = switchd(&world, "h1");

    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let mut daemon = monitord_logging(&world, "h1", "0s", full.into());
    let mut line = manager.line();
    let mut lost = 0;
    until("the switch answers, and the monitor's lines are counted as lost", Duration::from_secs(180), || {
        if let Answer::Switch(Ok(SwitchReply::Counters(counters))) = manager.ask(&line, &Command::Switch(SwitchRequest::Counters))
        {
            lost = counters.iter().find(|counter| counter.name == "monitor.log-lines-lost").expect("it is counted").value;
        }
        lost > 0
    });
    let _ = manager.report(&mut line);
    ends_when_told(&mut daemon);

    let (_reader, mut writer) = std::io::pipe().unwrap();
    std::io::Write::write_all(&mut writer, &[b'\n'; 1 << 16]).unwrap(); // as much as a pipe takes
    let mut daemon = monitord_logging(&world, "h1", "0s", writer.into());
    let mut line = manager.line();
    assert_eq!(manager.ask(&line, &Command::List), Answer::Vms(vec![]));
    let _ = manager.report(&mut line);
    ends_when_told(&mut daemon);
}
