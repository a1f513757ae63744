//! What commands and the hypervisor's events do to a VM; with a hypervisor and a switch that are not real.
#![cfg(feature = "io")]

mod fake;

use fake::{Host, ask};
use monitord::io::record::Records;
use violin_common::control::monitor::{Answer, Command, VmSeen, VmState};

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
