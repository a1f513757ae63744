//! A kernel VXLAN device as a foreign peer, through a gateway port, before and after our guest moves.

use violin_common::api::switch::{Ownership, PortKind, PortSpec, SwitchReply, SwitchRequest};
use violin_common::{MacAddr, Vni};
use violin_tests::eventually;
use violin_tests::fabric::{Fabric, network};
use violin_tests::netns::{Netns, ip};

const VNI: u32 = 7;
const FOREIGN_VNI: u32 = 99;
const MAC: &str = "02:00:00:00:00:0a";
const VM: &str = "alpha-c1";

fn reach(foreign: &Netns, guest: &Netns) {
    let ping =
        |from: &Netns, size: usize, to: &str| from.run("ping", &format!("-c 2 -i 0.2 -W 2 -s {size} {to}")).status.success();
    // Forgotten neighbours make both sides ask by ARP again.
    foreign.run("ip", "neigh flush all");
    guest.run("ip", "neigh flush all");
    assert!(ping(foreign, 56, "10.77.0.1"), "ARP and ping from the foreign peer");
    assert!(ping(guest, 56, "10.77.0.50"), "ARP and ping to the foreign peer");
    assert!(
        ping(foreign, 1372, "10.77.0.1") && ping(guest, 1372, "10.77.0.50"),
        "packets of the network's full MTU of 1400 bytes"
    );
    let (there, back) = (foreign.bulk(guest, "10.77.0.1", 1) / 1e6, guest.bulk(foreign, "10.77.0.50", 1) / 1e6);
    println!("kernel VXLAN to our guest {there:.0} Mbit/s, our guest to kernel VXLAN {back:.0} Mbit/s");
    assert!(there > 10.0 && back > 10.0, "{there} and {back} Mbit/s");
}

#[test]
#[ignore = "needs root"]
fn a_kernel_vxlan_device_reaches_our_guest_before_and_after_it_moved() {
    let fabric = Fabric::start(2);
    fabric.carry(&network(VNI));
    let foreign = Netns::new("f");
    ip(&format!("link add uf netns {} type veth peer name wire netns {}", fabric.underlay.name(), foreign.name()));
    fabric.underlay.ip("link set uf master br0 up");
    foreign.ip("addr add 10.99.0.50/24 dev wire");
    foreign.ip("link set wire up");
    foreign.ip(&format!("link add vx0 type vxlan id {FOREIGN_VNI} local 10.99.0.50 remote 10.99.0.1 dstport 4789 dev wire"));
    foreign.ip("link set vx0 mtu 1400");
    foreign.ip("addr add 10.77.0.50/24 dev vx0");
    foreign.ip("link set vx0 up");
    let gateway = PortKind::Vxlan {
        local: "10.99.0.1:4789".parse().unwrap(),
        remote: "10.99.0.50:4789".parse().unwrap(),
        remote_vni: Vni::new(FOREIGN_VNI).unwrap(),
    };
    let (vni, mac): (Vni, MacAddr) = (Vni::new(VNI).unwrap(), MAC.parse().unwrap());
    fabric.hosts[0].ask(SwitchRequest::PortAdd(PortSpec { vni, kind: gateway, owned: None }));

    let guest = fabric.hosts[0].owned_guest(VNI, MAC, VM);
    guest.address("10.77.0.1/24");
    reach(&foreign, &guest.netns);

    // The guest moves to h2: another namespace with the same MAC and address takes over.
    let arrived = fabric.hosts[1].guest_with(VNI, MAC, Some((VM, Ownership::Arriving)));
    fabric.hosts[0].ask(SwitchRequest::MoveGrant { vni, mac, to: "h2".parse().unwrap() });
    fabric.hosts[0].ask(SwitchRequest::MoveStopped { vni, mac });
    guest.netns.ip("link set eth0 down");
    arrived.address("10.77.0.1/24");
    fabric.hosts[1].ask(SwitchRequest::MoveRunning { vni, mac });
    eventually("h2 owns the MAC", violin_tests::PATIENCE, || {
        matches!(fabric.hosts[1].ask(SwitchRequest::MoveStatus { vni, mac }),
            SwitchReply::Move(seen) if seen.state == violin_common::api::switch::MoveState::Owned)
    });
    reach(&foreign, &arrived.netns);
}
