//! A switch is killed around a move: the VM is reached at exactly one place afterwards. Needs root.

mod support;

use std::time::Instant;
use support::site::{Site, VNI, host, mac, moving_guest, owned, reaches};
use support::{Namespace, until, vni};
use violin_common::Epoch;
use violin_common::api::switch::{FdbPlace, MoveState, Ownership, SwitchReply, SwitchRequest};

const FIRST: Ownership = Ownership::Here { epoch: Epoch::FIRST };

/// A VM that runs at h1 and is to move to h3; the guest of h2 looks for it.
struct Stage {
    site: Site,
    vm: [Namespace; 2],
}

/// Where the VM can be.
const PLACES: [usize; 2] = [1, 3];

impl Stage {
    fn new() -> Self {
        let mut site = Site::new(3);
        site.guest(2);
        for number in 1..=3 {
            site.start(number);
        }
        until("the mesh stands", || (1..=3).all(|number| site.connected(number) == 2));
        let vm = PLACES.map(|number| moving_guest(&site, number));
        vm[0].run("ip link set dev e0 up");
        site.ask(1, owned("m", FIRST)).unwrap();
        let stage = Self { site, vm };
        until("the VM is reached at h1", || stage.reached(0));
        stage
    }

    fn reached(&self, place: usize) -> bool {
        reaches(&self.site.guests[&2], &self.vm[place], 9)
    }

    fn state(&self, number: usize) -> Option<MoveState> {
        self.site.state(number, mac(9))
    }

    fn grant(&self) {
        self.site.ask(3, owned("m", Ownership::Arriving)).unwrap();
        self.site.ask(1, SwitchRequest::MoveGrant { vni: vni(VNI), mac: mac(9), to: host(3) }).unwrap();
    }

    fn stop(&self) {
        self.vm[0].run("ip link set dev e0 down");
        // A source that started anew without its port has nothing to stop.
        let _ = self.site.ask(1, SwitchRequest::MoveStopped { vni: vni(VNI), mac: mac(9) });
    }

    fn run(&self) {
        self.vm[1].run("ip link set dev e0 up");
        let began = Instant::now();
        self.site.ask(3, SwitchRequest::MoveRunning { vni: vni(VNI), mac: mac(9) }).unwrap();
        println!("owned {:?} after the VM ran", began.elapsed());
    }

    /// As `kill -9` does; the switch starts anew without the VM's port.
    fn kill(&mut self, number: usize) {
        self.site.daemons.remove(&number);
        self.site.start(number);
    }

    /// What the monitor does with a port that its switch has lost.
    fn put_back(&self, number: usize, ownership: Ownership) {
        self.site.ask(number, owned("m", ownership)).unwrap();
    }

    fn cable(&self, number: usize, to: &str) {
        self.site.hosts[&number].run(&format!("ip link set dev u0 {to}"));
    }

    /// Where each switch says that the MAC is, its owner's own word included.
    fn places(&self) -> Vec<Option<usize>> {
        let place = |number: usize| {
            let Ok(SwitchReply::Fdb(fdb)) = self.site.ask(number, SwitchRequest::FdbList { vni: None }) else { return None };
            match &fdb.iter().find(|entry| entry.mac == mac(9))?.place {
                FdbPlace::Port(_) => Some(number),
                FdbPlace::Host(name) => (1..=3).find(|number| host(*number) == *name),
            }
        };
        (1..=3).map(place).collect()
    }

    /// The VM is reached at that place, all switches agree on it, and what comes to life at the other place stays mute.
    fn only_at(&self, place: usize, since: Instant) {
        until("the VM is reached", || self.reached(place));
        println!("reached {:?} after the switch was killed", since.elapsed());
        let number = PLACES[place];
        until("all agree", || self.places() == [Some(number); 3]);
        let owners = || -> Vec<usize> {
            let owns = |number: &usize| matches!(self.state(*number), Some(MoveState::Owned | MoveState::Granted));
            (1..=3).filter(owns).collect()
        };
        assert_eq!(owners(), [number]);
        for number in 1..=3 {
            assert!(!self.site.log(number).contains("claimed by two places"), "h{number} warns of what was in order");
        }

        let other = &self.vm[1 - place];
        other.run("ip link set dev e0 up");
        assert!(!reaches(other, &self.site.guests[&2], 2), "the other place speaks");
        assert!(!self.reached(1 - place), "the other place is reached");
        other.run("ip link set dev e0 down");
        assert!(self.reached(place));
        assert_eq!(owners(), [number]);
    }
}

/// The VM moves from h1 to h3 while one of their switches is killed in that state of the source or destination.
fn moves_although_killed(killed: usize, state: MoveState) {
    let mut stage = Stage::new();
    stage.grant();
    let mut since = Instant::now();
    let mut kill = |stage: &mut Stage, now: &[MoveState]| {
        if now.contains(&state) {
            since = Instant::now();
            stage.kill(killed);
            if killed == 3 {
                stage.put_back(3, Ownership::Arriving);
            }
        }
    };

    kill(&mut stage, &[MoveState::Granted, MoveState::Prepared]);
    stage.stop();
    kill(&mut stage, &[MoveState::Fenced]);
    stage.run();
    kill(&mut stage, &[MoveState::Gone]);

    until("the source knows its place", || matches!(stage.state(1), Some(MoveState::Gone | MoveState::Elsewhere)));
    stage.only_at(1, since);
}

#[test]
#[ignore = "needs root"]
fn a_move_survives_the_death_of_its_source_when_granted() {
    moves_although_killed(1, MoveState::Granted);
}

#[test]
#[ignore = "needs root"]
fn a_move_survives_the_death_of_its_source_when_fenced() {
    moves_although_killed(1, MoveState::Fenced);
}

#[test]
#[ignore = "needs root"]
fn a_move_survives_the_death_of_its_source_when_gone() {
    moves_although_killed(1, MoveState::Gone);
}

#[test]
#[ignore = "needs root"]
fn a_move_survives_the_death_of_its_destination_when_prepared() {
    moves_although_killed(3, MoveState::Prepared);
}

#[test]
#[ignore = "needs root"]
fn an_owner_killed_before_any_grant_is_reached_again_and_its_vm_can_move() {
    let mut stage = Stage::new();

    let since = Instant::now();
    stage.kill(1);
    stage.put_back(1, FIRST);

    stage.only_at(0, since);
    stage.vm[0].run("ip link set dev e0 up");
    stage.grant();
    stage.stop();
    stage.run();
    stage.only_at(1, since);
}

#[test]
#[ignore = "needs root"]
fn a_destination_killed_after_an_abort_leaves_the_vm_at_its_source_and_takes_the_next_grant() {
    let mut stage = Stage::new();
    stage.grant();
    stage.site.ask(1, SwitchRequest::MoveAbort { vni: vni(VNI), mac: mac(9) }).unwrap();
    assert_eq!((stage.state(1), stage.state(3)), (Some(MoveState::Owned), Some(MoveState::Released)));

    let since = Instant::now();
    stage.kill(3);
    stage.put_back(3, Ownership::Arriving);

    until("the mesh stands again", || (1..=3).all(|number| stage.site.connected(number) == 2));
    stage.only_at(0, since);
    stage.grant();
    stage.stop();
    stage.run();
    stage.only_at(1, since);
}

#[test]
#[ignore = "needs root"]
fn a_destination_killed_as_owner_is_reached_again_when_its_source_is_gone() {
    let mut stage = Stage::new();
    stage.grant();
    stage.stop();
    stage.run();
    until("the source knows", || stage.state(1) == Some(MoveState::Gone));

    let since = Instant::now();
    stage.kill(3);
    stage.put_back(3, Ownership::Here { epoch: Epoch::FIRST.after(1) });

    stage.only_at(1, since);
}

/// The destination becomes owner while nobody hears it, and dies: its source is fenced and waits for it.
fn killed_as_owner_unheard() -> (Stage, Instant) {
    let mut stage = Stage::new();
    stage.grant();
    stage.stop();
    stage.cable(3, "down");
    stage.run();
    assert_eq!((stage.state(1), stage.state(3)), (Some(MoveState::Fenced), Some(MoveState::Owned)));
    let since = Instant::now();
    stage.kill(3);
    (stage, since)
}

#[test]
#[ignore = "needs root"]
fn a_destination_killed_as_owner_unheard_is_reached_when_its_port_is_back_before_its_peers() {
    for epoch in [Epoch::FIRST.after(1), Epoch::FIRST] {
        let (stage, since) = killed_as_owner_unheard();

        stage.put_back(3, Ownership::Here { epoch });
        stage.cable(3, "up");

        stage.only_at(1, since);
    }
}

#[test]
#[ignore = "needs root"]
fn a_destination_killed_as_owner_unheard_is_reached_when_its_port_is_back_behind_its_peers() {
    for epoch in [Epoch::FIRST.after(1), Epoch::FIRST] {
        let (stage, since) = killed_as_owner_unheard();

        stage.cable(3, "up");
        until("the source has been reached", || stage.site.connected(3) == 2);
        stage.put_back(3, Ownership::Here { epoch });

        stage.only_at(1, since);
    }
}
