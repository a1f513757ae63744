//! Real `switchd` processes with real certificates, each in a network namespace of its own. Needs root.

mod support;

use std::time::{Duration, Instant};
use support::site::{Site, VNI, host, mac, moving_guest, owned, reaches};
use support::{try_run, until, vni};
use violin_common::api::switch::{FdbPlace, MoveState, Ownership, PortKind, PortSpec, SwitchReply, SwitchRequest, TroubleKind};
use violin_common::{Epoch, PortId};

#[test]
#[ignore = "needs root"]
fn a_mesh_forms_carries_frames_and_heals() {
    let mut site = Site::new(3);
    for number in [1, 3] {
        site.guest(number);
    }
    for number in 1..=3 {
        site.start(number);
    }
    for number in 1..=3 {
        until("everybody is connected with everybody", || site.connected(number) == 2);
    }
    assert!(site.peers(1).iter().all(|peer| peer.rtt_ms.is_some()));

    until("a datagram passes from h1 to h3", || site.reaches(1, 3));
    let Ok(SwitchReply::Fdb(fdb)) = site.ask(1, SwitchRequest::FdbList { vni: None }) else { panic!("no FDB") };
    let learned = fdb.iter().find(|entry| entry.mac == mac(3)).expect("learned");
    assert_eq!((&learned.place, learned.epoch), (&FdbPlace::Host(host(3)), None));

    site.daemons.remove(&3);
    let killed = Instant::now();
    until("others notice the death", || site.connected(1) == 1 && site.connected(2) == 1);
    println!("noticed after {:?}", killed.elapsed());
    assert!(killed.elapsed() < Duration::from_secs(8), "noticed after {:?}", killed.elapsed());
    site.start(3);
    let started = Instant::now();
    until("traffic resumes", || site.reaches(1, 3));
    println!("resumed after {:?}", started.elapsed());
    until("it has rejoined everywhere", || (1..=3).all(|number| site.connected(number) == 2));

    site.daemons[&2].signal(nix::sys::signal::Signal::SIGTERM);
    until("it leaves", || site.daemons.get_mut(&2).unwrap().0.try_wait().unwrap().is_some());
    let status = site.daemons.remove(&2).unwrap().0.wait().unwrap();
    assert!(status.success());
    assert!(site.peers(1).iter().all(|peer| peer.host != Some(host(2))), "who leaves is forgotten at once");
}

#[test]
#[ignore = "needs root"]
fn a_switch_that_listens_on_every_ipv6_address_has_ipv4_members() {
    let mut site = Site::new(3);
    site.wildcards = [2, 3].into();
    for number in 1..=3 {
        site.guest(number);
        site.start(number);
    }

    for number in 1..=3 {
        until("everybody is connected with everybody", || site.connected(number) == 2);
    }
    for (from, to) in [(1, 2), (2, 1), (2, 3)] {
        until("datagrams pass", || site.reaches(from, to));
    }
    assert!((1..=3).all(|number| site.counter(number, "drop.wrong-address") == 0));
    assert!((2..=3).all(|number| site.peers(number).iter().all(|peer| peer.address.is_ipv4())));
}

#[test]
#[ignore = "needs root"]
fn a_switch_of_another_authority_is_refused() {
    let mut site = Site::new(2);
    site.start(1);

    site.start_with(2, "other-pki", "[[network]]\nvni = 5\n");

    until("the caller is refused and counted", || site.counter(1, "control.refused-callers") > 0);
    assert!(site.peers(1).is_empty(), "who is not believed is not listed");
    let listed = || site.peers(2).first().map(|peer| (peer.connected, peer.host.clone(), peer.troubles.clone()));
    until("the caller is told why", || {
        listed().is_some_and(|(connected, host, troubles)| {
            !connected && host.is_none() && troubles[0].kind == TroubleKind::Refused && troubles[0].why.contains("certificate")
        })
    });
}

#[test]
#[ignore = "needs root"]
fn any_datagram_is_survived_and_counted() {
    let mut site = Site::new(2);
    site.start(1);

    let mut sent = 0;
    let refused = || ["bad-datagram", "unknown-receiver"].map(|name| site.counter(1, &format!("drop.{name}")));
    site.hosts[&2].enter(|| {
        let socket = std::net::UdpSocket::bind("10.71.0.2:0").unwrap();
        for first in [0x00, 0x11, 0x21, 0x22, 0x23, 0x40, 0x80, 0xc0, 0xff] {
            for len in (0..64).chain([100, 1199, 1200, 1201, 1400, 1472]) {
                let mut datagram: Vec<u8> = (0..len).map(|i: usize| (i * 37 % 251) as u8).collect();
                if let Some(byte) = datagram.first_mut() {
                    *byte = first;
                }
                socket.send_to(&datagram, "10.71.0.1:7471").unwrap();
                // What looks like QUIC's is QUIC's to refuse.
                sent += u64::from(first & 0x40 == 0 || len == 0);
            }
        }
    });

    assert_eq!(sent, 6 * 70 + 3);
    until("they are counted, every one", || refused().iter().sum::<u64>() >= sent);
    assert!(site.ask(1, SwitchRequest::Status).is_ok());
    site.start(2);
    until("members still get through", || site.connected(1) == 1);
}

#[test]
#[ignore = "needs root"]
fn an_owned_mac_moves_with_its_vm_and_back_when_aborted() {
    let mut site = Site::new(3);
    site.guest(2);
    for number in 1..=3 {
        site.start(number);
    }
    until("the mesh stands", || (1..=3).all(|number| site.connected(number) == 2));
    let (here, there) = (moving_guest(&site, 1), moving_guest(&site, 3));
    let key = |to: Option<usize>| match to {
        Some(to) => SwitchRequest::MoveGrant { vni: vni(VNI), mac: mac(9), to: host(to) },
        None => SwitchRequest::MoveStopped { vni: vni(VNI), mac: mac(9) },
    };
    let running = || SwitchRequest::MoveRunning { vni: vni(VNI), mac: mac(9) };
    let abort = || SwitchRequest::MoveAbort { vni: vni(VNI), mac: mac(9) };

    here.run("ip link set dev e0 up");
    assert_eq!(site.ask(1, owned("m", Ownership::Here { epoch: Epoch::FIRST })), Ok(SwitchReply::Port(PortId(1))));
    until("the VM is reached at h1", || reaches(&site.guests[&2], &here, 9));
    let refused = site.ask(1, key(Some(3))).unwrap_err();
    assert!(refused.contains("no port waiting"), "{refused}");
    assert_eq!(site.ask(3, owned("m", Ownership::Arriving)), Ok(SwitchReply::Port(PortId(1))));
    assert_eq!(site.ask(1, key(Some(3))), Ok(SwitchReply::Done));
    assert_eq!((site.state(1, mac(9)), site.state(3, mac(9))), (Some(MoveState::Granted), Some(MoveState::Prepared)));
    assert_eq!(site.ask(1, abort()), Ok(SwitchReply::Done));
    assert_eq!((site.state(1, mac(9)), site.state(3, mac(9))), (Some(MoveState::Owned), Some(MoveState::Released)));
    assert!(reaches(&site.guests[&2], &here, 9));

    assert_eq!(site.ask(1, key(Some(3))), Ok(SwitchReply::Done));
    here.run("ip link set dev e0 down");
    assert_eq!(site.ask(1, key(None)), Ok(SwitchReply::Done));
    there.run("ip link set dev e0 up");
    assert_eq!(site.ask(3, running()), Ok(SwitchReply::Done));
    until("the VM is reached at h3", || reaches(&site.guests[&2], &there, 9));
    until("the source knows", || site.state(1, mac(9)) == Some(MoveState::Gone));
    let Ok(SwitchReply::Fdb(fdb)) = site.ask(2, SwitchRequest::FdbList { vni: None }) else { panic!("no FDB") };
    let entry = fdb.iter().find(|entry| entry.mac == mac(9)).expect("owned");
    assert_eq!(
        (&entry.place, entry.epoch),
        (&FdbPlace::Host(host(3)), Some(Epoch::FIRST.after(3))),
        "a refused and an aborted grant count"
    );

    // The old place comes to life again: nothing of it enters the network.
    here.run("ip link set dev e0 up");
    let before = site.counter(1, "drop.gate-closed");
    assert!(!reaches(&here, &site.guests[&2], 2));
    assert!(site.counter(1, "drop.gate-closed") > before);
    assert!(reaches(&site.guests[&2], &there, 9));

    // The owner's switch is killed and its port put back with what its monitor knew: others still find the VM.
    site.daemons.remove(&3);
    until("h1 notices", || site.connected(1) == 1);
    site.start(3);
    assert!(matches!(site.ask(3, owned("m", Ownership::Here { epoch: Epoch::FIRST })), Ok(SwitchReply::Port(_))));
    until("the VM is reached again", || reaches(&site.guests[&2], &there, 9));
    assert_eq!(site.state(1, mac(9)), Some(MoveState::Gone));
}

#[test]
#[ignore = "needs root"]
fn an_arriving_port_waits_for_its_interface() {
    let mut site = Site::new(1);
    site.start(1);

    let Ok(SwitchReply::Port(port)) = site.ask(1, owned("m", Ownership::Arriving)) else { panic!("refused") };
    let missing = site.ask(
        1,
        SwitchRequest::PortAdd(PortSpec { vni: vni(VNI), kind: PortKind::Packet { interface: "none".into() }, owned: None }),
    );
    assert!(missing.unwrap_err().contains("interface none is not there"));
    let _guest = moving_guest(&site, 1);
    until("the host's stack is kept off the interface", || {
        String::from_utf8_lossy(&try_run(&format!("nsenter --net={} nft list ruleset", site.hosts[&1].path())).stdout)
            .contains("\"m\"")
    });
    assert_eq!(site.ask(1, SwitchRequest::PortRemove { port }), Ok(SwitchReply::Done));
    until("the guard is undone", || {
        !String::from_utf8_lossy(&try_run(&format!("nsenter --net={} nft list ruleset", site.hosts[&1].path())).stdout)
            .contains("\"m\"")
    });
}

#[test]
#[ignore = "needs root"]
fn an_interface_that_could_not_be_taken_is_left_as_it_was() {
    let mut site = Site::new(1);
    site.start(1);
    let h1 = &site.hosts[&1];
    // Cannot be set up: somebody has its port.
    let _holder = h1.enter(|| std::net::UdpSocket::bind("0.0.0.0:4790")).unwrap();
    h1.run("ip link add v5 type vxlan id 5 dstport 4790 && ip addr add 192.0.2.1/24 dev v5");
    let ipv6 = || h1.run("cat /proc/sys/net/ipv6/conf/v5/disable_ipv6");
    let before = ipv6();

    let kind = PortKind::Packet { interface: "v5".into() };
    let refused = site.ask(1, SwitchRequest::PortAdd(PortSpec { vni: vni(VNI), kind, owned: None })).unwrap_err();

    assert!(refused.contains("could not set v5 up"), "{refused}");
    until("the guard is undone", || !h1.run("nft list ruleset").contains("v5"));
    until("IPv6 is as before", || ipv6() == before);
    assert!(h1.run("ip addr show dev v5").contains("192.0.2.1/24"));
}

#[test]
#[ignore = "needs root"]
fn a_reload_adds_and_removes_ports_and_networks() {
    let mut site = Site::new(1);
    site.guest(1);
    site.start(1);
    let ports = |site: &Site| match site.ask(1, SwitchRequest::PortList) {
        Ok(SwitchReply::Ports(ports)) => ports.len(),
        other => panic!("{other:?}"),
    };
    let networks = |site: &Site| match site.ask(1, SwitchRequest::NetworkList) {
        Ok(SwitchReply::Networks(networks)) => networks.len(),
        other => panic!("{other:?}"),
    };
    until("the port is made", || ports(&site) == 1);

    site.config(1, "pki", "[[network]]\nvni = 5\n[[network]]\nvni = 6\n");
    site.daemons[&1].signal(nix::sys::signal::Signal::SIGHUP);

    until("the port is gone and the network there", || ports(&site) == 0 && networks(&site) == 2);
    site.config(1, "pki", "[[network]]\nvni = 5\nwrong = 1\n");
    site.daemons[&1].signal(nix::sys::signal::Signal::SIGHUP);
    until("the error is logged", || site.log(1).contains("unknown field `wrong`"));
    assert_eq!(networks(&site), 2);
}
