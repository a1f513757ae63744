//! What the monitor does when it, or its switch, was started anew; with a hypervisor and a switch that are not real.
#![cfg(feature = "io")]

mod fake;

use fake::{Host, LIMIT, until};
use monitord::transaction::Standing;
use violin_common::control::monitor::VmState;

fn arriving() -> Standing {
    Standing::Arriving { uri: "fake:".into() }
}

#[test]
fn a_vm_on_its_way_gets_the_port_its_restarted_switch_has_lost() {
    let host = Host::new();
    let spec = host.left_behind(1, arriving(), VmState::Arriving);

    let _monitor = host.monitor();

    until("its port is there", LIMIT, || host.has_port(&spec));
}
