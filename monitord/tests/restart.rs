//! What the monitor does when it, or its switch, was started anew; with a hypervisor and a switch that are not real.
#![cfg(feature = "io")]

mod fake;

use fake::{Host, LIMIT, ask, until};
use monitord::hypervisor::{Change, Hypervisor, HypervisorError, Whereabouts};
use monitord::io::record::Records;
use monitord::transaction::Standing;
use std::sync::atomic::Ordering;
use violin_common::api::switch::MoveState;
use violin_common::control::monitor::{Answer, Command, MigrationMode, VmSeen, VmState};

fn arriving() -> Standing {
    Standing::Arriving { uri: "fake:".into() }
}

fn leaving() -> Standing {
    Standing::Leaving { to: "h2".parse().unwrap(), uri: "fake:".into() }
}

#[test]
fn a_vm_on_its_way_gets_the_port_its_restarted_switch_has_lost() {
    let host = Host::new();
    let spec = host.left_behind(1, arriving(), VmState::Arriving);

    let _monitor = host.monitor();

    until("its port is there", LIMIT, || host.has_port(&spec));
}

#[test]
fn a_vm_gets_its_port_back_while_its_memory_is_copied() {
    let host = Host::new();
    let spec = host.left_behind(1, Standing::Here, VmState::Running);
    let monitor = host.monitor();
    until("its port is there", LIMIT, || host.has_port(&spec));
    let (vm, to) = (spec.vm.clone(), "h2".parse().unwrap());
    let migrate = Command::Migrate { vm, to, uri: "fake:".into(), mode: MigrationMode::PreCopy };
    let moving = std::thread::spawn(move || ask(&monitor, migrate));
    until("the switch has granted", LIMIT, || host.move_state(&spec) == Some(MoveState::Granted));

    host.switch.lock().unwrap().restart();

    until("its port is there again", LIMIT, || host.has_port(&spec));
    host.outcomes.send(Err(HypervisorError::NotHere(spec.vm.clone()))).unwrap();
    let Answer::Failed(words) = moving.join().unwrap() else { panic!("it moved") };
    assert!(words.contains("the VM runs on here"), "{words}");
}

#[test]
fn a_vm_that_arrives_while_its_switch_starts_anew_is_owned_in_the_end() {
    let host = Host::new();
    let spec = host.left_behind(1, arriving(), VmState::Arriving);
    let _monitor = host.monitor();
    until("its port is there", LIMIT, || host.has_port(&spec));

    // The switch hears that it runs, and loses that together with the port.
    let mut switch = host.switch.lock().unwrap();
    switch.restart();
    host.has(&spec, VmState::Running);
    host.tell(&spec, Change::Running);
    drop(switch);

    until("the switch owns its MAC", LIMIT, || host.move_state(&spec) == Some(MoveState::Owned));
}

#[test]
fn an_arrived_vm_that_was_not_owned_before_the_monitor_died_is_owned_in_the_end() {
    let host = Host::new();
    let spec = host.left_behind(1, Standing::Here, VmState::Running);
    let records = Records::open(&host.dir.path().join("run")).unwrap();
    let mut record = records.read_all().unwrap().remove(0);
    record.epoch = None;
    records.write(&record).unwrap();

    let _monitor = host.monitor();

    until("the switch owns its MAC", LIMIT, || host.move_state(&spec) == Some(MoveState::Owned));
}

#[test]
fn what_an_earlier_vm_of_that_name_said_is_not_taken_for_ready() {
    let host = Host::new();
    let monitor = host.monitor();
    let spec = fake::spec(1);
    let console = host.hypervisor.console(&spec.vm);
    std::fs::write(&console, "violin-guest: ready\n").unwrap();

    let answer = ask(&monitor, Command::Start { spec, epoch: violin_common::Epoch::FIRST, image_sources: Vec::new() });

    assert!(matches!(answer, Answer::Done), "{answer:?}");
    assert!(!console.exists());
}

#[test]
fn a_vm_whose_move_is_under_way_keeps_no_other_waiting() {
    let host = Host::new();
    host.left_behind(1, leaving(), VmState::Running);
    host.hypervisor.list.lock().unwrap()[0].leaving = true;
    let other = host.left_behind(2, Standing::Here, VmState::Running);

    let _monitor = host.monitor();

    until("the other's port is there", LIMIT, || host.has_port(&other));
}

#[test]
fn a_vm_left_paused_in_a_move_is_called_running_by_nobody_until_it_runs() {
    let host = Host::new();
    let spec = host.left_behind(1, leaving(), VmState::Paused);
    let monitor = host.monitor();
    until("the destination was asked twice", LIMIT, || host.hypervisor.looks.load(Ordering::SeqCst) > 1);
    assert!(!host.switch.lock().unwrap().was_told_running());
    let vm = spec.vm.clone();
    let doubtful = VmSeen { vm: vm.clone(), state: VmState::Paused, leaving: true };
    assert_eq!(ask(&monitor, Command::List), Answer::Vms(vec![doubtful.clone()]));
    assert_eq!(monitor.known(), [doubtful]);

    host.has(&spec, VmState::Running);
    *host.hypervisor.whereabouts.lock().unwrap() = Whereabouts::Here;

    let runs = VmSeen { vm, state: VmState::Running, leaving: false };
    until("it is known to run here", LIMIT, || monitor.known() == [runs.clone()]);
    assert!(host.switch.lock().unwrap().was_told_running());
}

/// The hypervisor gave up before it stopped the VM: no event of its own comes that says that it runs.
#[test]
fn a_vm_whose_destination_dies_for_good_while_its_memory_is_copied_is_owned_again() {
    let host = Host::new();
    let spec = host.left_behind(1, Standing::Here, VmState::Running);
    let monitor = host.monitor();
    until("its port is there", LIMIT, || host.has_port(&spec));
    let (vm, to) = (spec.vm.clone(), "h2".parse().unwrap());
    let migrate = Command::Migrate { vm: vm.clone(), to, uri: "fake:".into(), mode: MigrationMode::PreCopy };
    let moving = {
        let monitor = std::sync::Arc::clone(&monitor);
        std::thread::spawn(move || ask(&monitor, migrate))
    };
    until("the switch has granted", LIMIT, || host.move_state(&spec) == Some(MoveState::Granted));
    host.switch.lock().unwrap().peers_lost = true;

    let broke = HypervisorError::Refused { asked: "moving it".into(), said: "the destination hung up".into() };
    host.outcomes.send(Err(broke)).unwrap();

    let Answer::Failed(words) = moving.join().unwrap() else { panic!("it moved") };
    assert!(words.ends_with("the VM runs on here"), "{words}");
    assert_eq!(host.move_state(&spec), Some(MoveState::Owned));
    assert_eq!(monitor.known(), [VmSeen { vm, state: VmState::Running, leaving: false }]);
}

#[test]
fn a_vm_whose_move_ended_in_doubt_is_cleared_away_when_it_runs_there() {
    let host = Host::new();
    let spec = host.left_behind(1, Standing::Here, VmState::Running);
    let monitor = host.monitor();
    until("its port is there", LIMIT, || host.has_port(&spec));
    let migrate =
        Command::Migrate { vm: spec.vm.clone(), to: "h2".parse().unwrap(), uri: "fake:".into(), mode: MigrationMode::PreCopy };
    host.outcomes.send(Err(HypervisorError::Doubtful("nobody knows".into()))).unwrap();
    assert_eq!(ask(&monitor, migrate.clone()), Answer::Failed("nobody knows".into()));
    assert!(!host.switch.lock().unwrap().was_told_running());
    assert_eq!(monitor.known(), [VmSeen { vm: spec.vm.clone(), state: VmState::Paused, leaving: true }]);

    *host.hypervisor.whereabouts.lock().unwrap() = Whereabouts::There;
    host.gone_elsewhere(&spec);

    until("it is no longer known here", LIMIT, || monitor.known().is_empty());
    assert!(!host.has_port(&spec));
    assert!(matches!(ask(&monitor, migrate), Answer::Migrated(_)));
}

/// A manager that has lost its journal asks for it.
#[test]
fn a_vm_is_described_as_it_was_started_also_by_the_next_monitor() {
    let host = Host::new();
    let spec = host.left_behind(1, Standing::Here, VmState::Running);
    let monitor = host.monitor();

    let Answer::Described { spec: told, epoch } = ask(&monitor, Command::Describe { vm: spec.vm.clone() }) else { panic!() };

    assert_eq!((*told, epoch.is_some()), (spec, true));
    let other = ask(&monitor, Command::Describe { vm: "alpha-c9".parse().unwrap() });
    assert!(matches!(&other, Answer::Failed(words) if words.contains("got VM alpha-c9")), "{other:?}");
}
