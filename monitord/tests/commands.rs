//! What commands and the hypervisor's events do to a VM; with a hypervisor and a switch that are not real.
#![cfg(feature = "io")]

mod fake;

use fake::{Host, LIMIT, ask, until};
use monitord::hypervisor::{Change, HypervisorError};
use monitord::io::monitor::Monitor;
use monitord::io::record::Records;
use monitord::transaction::Standing;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use violin_common::VmId;
use violin_common::api::switch::MoveState;
use violin_common::control::monitor::{Answer, Command, MigrationMode, VmSeen, VmState};

/// Gives a command on a thread of its own.
fn beside(monitor: &Arc<Monitor>, command: Command) -> JoinHandle<Answer> {
    let monitor = Arc::clone(monitor);
    std::thread::spawn(move || ask(&monitor, command))
}

fn migrate(vm: &VmId) -> Command {
    Command::Migrate { vm: vm.clone(), to: "h2".parse().unwrap(), uri: "fake:".into(), mode: MigrationMode::PreCopy }
}

fn refused() -> HypervisorError {
    HypervisorError::Refused { asked: "moving it".into(), said: "it does not run".into() }
}

fn records(host: &Host) -> usize {
    Records::open(&host.dir.path().join("run")).unwrap().read_all().unwrap().len()
}

#[test]
fn a_prepared_arrival_is_listed_though_the_hypervisor_has_nothing_of_it() {
    let host = Host::new();
    let monitor = host.monitor();
    let spec = fake::spec(1);
    let prepare = Command::PrepareIncoming { spec: spec.clone(), image_sources: Vec::new() };
    assert_eq!(ask(&monitor, prepare), Answer::Prepared { uri: "fake:".into() });

    let arriving = VmSeen { vm: spec.vm.clone(), state: VmState::Arriving, leaving: false };
    assert_eq!(ask(&monitor, Command::List), Answer::Vms(vec![arriving]));

    assert_eq!(ask(&monitor, Command::CancelIncoming { vm: spec.vm.clone() }), Answer::Done);
    assert_eq!(ask(&monitor, Command::List), Answer::Vms(Vec::new()));
    assert!(!host.has_port(&spec));
    assert_eq!(records(&host), 0);
}

#[test]
fn an_arrival_the_hypervisor_names_is_listed_once_and_as_it_says() {
    let host = Host::new();
    let monitor = host.monitor();
    let spec = fake::spec(1);
    ask(&monitor, Command::PrepareIncoming { spec: spec.clone(), image_sources: Vec::new() });
    host.has(&spec, VmState::Running);

    let comes = VmSeen { vm: spec.vm, state: VmState::Running, leaving: false };
    assert_eq!(ask(&monitor, Command::List), Answer::Vms(vec![comes]));
}

#[test]
fn a_vm_that_ends_as_its_move_begins_is_cleared_away() {
    let host = Host::new();
    let spec = host.left_behind(1, Standing::Here, VmState::Running);
    let monitor = host.monitor();
    until("its port is there", LIMIT, || host.has_port(&spec));
    let moving = beside(&monitor, migrate(&spec.vm));
    until("the switch has granted", LIMIT, || host.move_state(&spec) == Some(MoveState::Granted));

    host.hypervisor.list.lock().unwrap().clear();
    host.tell(&spec, Change::Ended);
    until("its end was heard", LIMIT, || host.move_state(&spec) == Some(MoveState::Fenced));
    host.outcomes.send(Err(refused())).unwrap();

    let Answer::Failed(words) = moving.join().unwrap() else { panic!("it moved") };
    assert!(words.ends_with("the VM has ended by itself"), "{words}");
    assert!(monitor.known().is_empty());
    assert!(!host.has_port(&spec));
    assert_eq!(records(&host), 0);
}

#[test]
fn a_hypervisor_that_is_away_is_not_taken_for_a_vm_that_ended() {
    let host = Host::new();
    let spec = host.left_behind(1, Standing::Here, VmState::Running);
    let monitor = host.monitor();
    until("its port is there", LIMIT, || host.has_port(&spec));

    host.hypervisor.away.store(true, Ordering::SeqCst);
    host.tell(&spec, Change::Ended);
    until("the hypervisor was asked twice", LIMIT, || host.hypervisor.asked_in_vain.load(Ordering::SeqCst) > 1);
    assert_eq!(monitor.known().len(), 1);
    assert!(host.has_port(&spec));

    host.hypervisor.list.lock().unwrap().clear();
    host.hypervisor.away.store(false, Ordering::SeqCst);
    until("it is known no more", LIMIT, || monitor.known().is_empty());
    assert_eq!(records(&host), 0);
}

#[test]
fn a_vm_whose_move_outlived_its_monitor_can_be_stopped() {
    let host = Host::new();
    let standing = Standing::Leaving { to: "h2".parse().unwrap(), uri: "fake:".into() };
    let spec = host.left_behind(1, standing, VmState::Running);
    // It is not put right before that is over, which is never.
    host.hypervisor.list.lock().unwrap()[0].leaving = true;
    let monitor = host.monitor();

    let stopping = beside(&monitor, Command::Stop { vm: spec.vm.clone() });

    until("it is stopped", LIMIT, || stopping.is_finished());
    assert_eq!(stopping.join().unwrap(), Answer::Done);
    assert!(monitor.known().is_empty());
    assert_eq!(records(&host), 0);
}

#[test]
fn an_arrival_left_behind_is_neither_prepared_nor_cancelled_on_trust() {
    let host = Host::new();
    let spec = host.left_behind(1, Standing::Arriving { uri: "old:".into() }, VmState::Running);
    host.hypervisor.away.store(true, Ordering::SeqCst);
    let monitor = host.monitor();

    let prepare = Command::PrepareIncoming { spec: spec.clone(), image_sources: Vec::new() };
    for command in [prepare, Command::CancelIncoming { vm: spec.vm.clone() }] {
        let asked = beside(&monitor, command);
        until("it is answered", LIMIT, || asked.is_finished());
        let Answer::Failed(words) = asked.join().unwrap() else { panic!("done on trust") };
        assert!(words.contains("try again"), "{words}");
    }

    host.hypervisor.away.store(false, Ordering::SeqCst);
    let runs = VmSeen { vm: spec.vm.clone(), state: VmState::Running, leaving: false };
    until("it is known to run here", LIMIT, || monitor.known() == [runs.clone()]);
}

#[test]
fn a_second_stop_is_refused_while_the_first_waits() {
    let host = Host::new();
    let spec = host.left_behind(1, Standing::Here, VmState::Running);
    let monitor = host.monitor();
    until("its port is there", LIMIT, || host.has_port(&spec));
    let moving = beside(&monitor, migrate(&spec.vm));
    until("the switch has granted", LIMIT, || host.move_state(&spec) == Some(MoveState::Granted));
    let stop = Command::Stop { vm: spec.vm.clone() };
    let first = beside(&monitor, stop.clone());
    until("the move is to be given up", LIMIT, || host.hypervisor.aborts.load(Ordering::SeqCst) == 1);

    let Answer::Failed(words) = ask(&monitor, stop.clone()) else { panic!("stopped while it moves") };
    assert!(words.contains("is being stopped already"), "{words}");

    host.outcomes.send(Err(refused())).unwrap();
    assert!(matches!(moving.join().unwrap(), Answer::Failed(_)));
    assert_eq!(first.join().unwrap(), Answer::Done);
    assert_eq!(ask(&monitor, stop), Answer::Done);
}
