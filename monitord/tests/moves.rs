//! Monitors, switches and a sandbox guest that moves between two hosts. Needs root and a built switchd; `make test` runs it.
#![cfg(feature = "io")]

mod world;

use monitord::io::netlink::inside;
use std::fs::File;
use std::net::TcpListener;
use std::time::Duration;
use violin_common::api::switch::{MoveSeen, MoveState, SwitchReply, SwitchRequest};
use violin_common::control::monitor::{Answer, Command, MigrationMode, Report, VmSeen, VmSpec, VmState};
use violin_common::{Epoch, HostId};
use world::manager::{Daemon, Line, Manager, ask, monitord, switchd};
use world::{Echo, World, until};

const LIMIT: Duration = Duration::from_secs(180);

/// A running deployment of two hosts with one guest on h1 and a connection from an access namespace to it.
struct Stage {
    manager: Manager,
    h1: Line,
    h2: Line,
    daemons: Vec<Daemon>,
    echo: Echo,
    spec: VmSpec,
    world: World,
}

impl Stage {
    fn new(tag: &str, pause: &str) -> Self {
        let world = World::new(tag);
        let manager = Manager::new(&world);
        let mut daemons = vec![switchd(&world, "h1"), switchd(&world, "h2")];
        daemons.push(monitord(&world, "h1", pause));
        let h1 = manager.line();
        daemons.push(monitord(&world, "h2", pause));
        let h2 = manager.line();
        let mut spec = world.spec();
        spec.address = "10.92.0.1".parse().unwrap();
        spec.guest_config = "ADDRESS=10.92.0.1/24\nPEER=10.92.0.254:5000\n".into();
        let switches = || {
            ["h1", "h2"]
                .iter()
                .all(|host| std::os::unix::net::UnixStream::connect(world.dir.path().join(format!("{host}.sock"))).is_ok())
        };
        until("both switches listen", LIMIT, switches);
        let access = Command::AccessOpen {
            environment: spec.environment.clone(),
            network: spec.network.clone(),
            address: "10.92.0.254".parse().unwrap(),
            prefix_len: 24,
        };
        let Answer::Access { netns } = manager.ask(&h1, &access) else { panic!("no access") };
        let Answer::Access { netns: again } = manager.ask(&h1, &access) else { panic!("no access") };
        assert_eq!(netns, again);
        let listener = inside(File::open(netns).unwrap(), || TcpListener::bind("10.92.0.254:5000")).unwrap();
        let start = Command::Start { spec: spec.clone(), epoch: Epoch::FIRST, image_sources: vec![] };
        assert_eq!(manager.ask(&h1, &start), Answer::Done);
        assert_eq!(manager.ask(&h1, &start), Answer::Done);
        let echo = Echo::accept(&listener);
        world.keeps_to_itself(&spec);
        Self { manager, h1, h2, daemons, echo, spec, world }
    }

    fn list(&self, line: &Line) -> Vec<VmSeen> {
        match self.manager.ask(line, &Command::List) {
            Answer::Vms(vms) => vms,
            other => panic!("{other:?}"),
        }
    }

    fn runs_on(&self, line: &Line) -> bool {
        self.list(line).iter().any(|seen| seen.vm == self.spec.vm && seen.state == VmState::Running)
    }

    fn wait_ready(&mut self) {
        let vm = self.spec.vm.clone();
        loop {
            match self.manager.report(&mut self.h1) {
                Report::Vm(seen) if seen.vm == vm && seen.state == VmState::Running => return,
                _ => {}
            }
        }
    }

    fn prepare(&self, line: &Line) -> String {
        let prepare = Command::PrepareIncoming { spec: self.spec.clone(), image_sources: vec![] };
        match self.manager.ask(line, &prepare) {
            Answer::Prepared { uri } => uri,
            other => panic!("{other:?}"),
        }
    }

    fn migrate(&self, to: &str, uri: String) -> Command {
        Command::Migrate { vm: self.spec.vm.clone(), to: to.parse::<HostId>().unwrap(), uri, mode: MigrationMode::PreCopy }
    }

    fn status(&self, line: &Line) -> MoveSeen {
        let request = SwitchRequest::MoveStatus { vni: self.spec.network.vni, mac: self.spec.mac };
        match self.manager.ask(line, &Command::Switch(request)) {
            Answer::Switch(Ok(SwitchReply::Move(seen))) => seen,
            other => panic!("{other:?}"),
        }
    }

    fn state(&self, line: &Line) -> MoveState {
        self.status(line).state
    }

    fn end(self) {
        for line in [&self.h2, &self.h1] {
            assert_eq!(self.manager.ask(line, &Command::Stop { vm: self.spec.vm.clone() }), Answer::Done);
        }
        assert_eq!(self.world.holding(&self.spec), [""; 0].map(std::path::PathBuf::from), "what it was told is gone with it");
        self.end_at_h1();
    }

    /// Where h2 is dead.
    fn end_at_h1(self) {
        assert_eq!(self.manager.ask(&self.h1, &Command::Stop { vm: self.spec.vm.clone() }), Answer::Done);
        let environment = self.spec.environment.clone();
        assert_eq!(self.manager.ask(&self.h1, &Command::AccessClose { environment }), Answer::Done);
        for host in ["h1", "h2"] {
            let interfaces = self.world.interfaces(host);
            assert!(!interfaces.contains("vg-") && !interfaces.contains(": va"), "{interfaces}");
        }
    }
}

#[test]
#[ignore = "needs root"]
fn a_guest_moves_there_and_back_under_an_open_connection() {
    let mut stage = Stage::new("mvd", "0s");
    stage.wait_ready();
    stage.echo.once();

    for (source, destination) in [("h1", "h2"), ("h2", "h1")] {
        let lines = if source == "h1" { (&stage.h1, &stage.h2) } else { (&stage.h2, &stage.h1) };
        let uri = stage.prepare(lines.1);
        assert_eq!(uri, stage.prepare(lines.1));
        let (migrate, finish) = (stage.migrate(destination, uri), Command::FinishIncoming { vm: stage.spec.vm.clone() });
        let (left, arrived) = stage.manager.runtime.block_on(async {
            // Something to read for the guest, as soon as it runs there.
            tokio::join!(ask(&lines.0.connection, &migrate), ask(&lines.1.connection, &finish))
        });
        let Answer::Migrated(left) = left else { panic!("{left:?}") };
        let Answer::Arrived(arrived) = arrived else { panic!("{arrived:?}") };
        println!("{left:#?}\n{arrived:#?}");
        assert!(left.granted < left.stopped && left.stopped < arrived.resumed && arrived.resumed <= left.done);
        assert_eq!(arrived.fabric.unwrap().state, MoveState::Owned);
        assert!(stage.runs_on(lines.1) && !stage.runs_on(lines.0));
        // Asked again, it answers the same.
        assert!(matches!(stage.manager.ask(lines.0, &migrate), Answer::Migrated(again) if again == left));
        for _ in 0..20 {
            stage.echo.once();
        }
    }
    stage.end();
}

#[test]
#[ignore = "needs root"]
fn a_move_whose_destination_does_not_take_it_is_undone() {
    let mut stage = Stage::new("mvu", "0s");
    stage.wait_ready();
    let uri = stage.prepare(&stage.h2);
    stage.daemons[3].kill();

    let Answer::Failed(words) = stage.manager.ask(&stage.h1, &stage.migrate("h2", uri)) else { panic!("it moved") };

    println!("{words}");
    assert!(words.contains("the VM runs on here"), "{words}");
    assert!(stage.runs_on(&stage.h1));
    assert_eq!(stage.state(&stage.h1), MoveState::Owned);
    stage.echo.once();
    stage.daemons[3] = monitord(&stage.world, "h2", "0s");
    stage.h2 = stage.manager.line();
    let cancel = Command::CancelIncoming { vm: stage.spec.vm.clone() };
    assert_eq!(stage.manager.ask(&stage.h2, &cancel), Answer::Done);
    stage.end();
}

#[test]
#[ignore = "needs root"]
fn a_move_whose_destination_dies_for_good_after_the_grant_is_taken_back() {
    let mut stage = Stage::new("mvl", "3s");
    stage.wait_ready();
    stage.echo.once();
    let before = stage.status(&stage.h1).epoch;
    let uri = stage.prepare(&stage.h2);
    let migrate = stage.migrate("h2", uri);
    let connection = stage.h1.connection.clone();
    let moving = stage.manager.runtime.spawn(async move { ask(&connection, &migrate).await });
    until("the source is fenced", LIMIT, || stage.state(&stage.h1) == MoveState::Fenced);

    // Nobody is left who could release the grant; monitord/tests/restart.rs has the same with a VM that never stopped.
    stage.daemons[1].kill();
    stage.daemons[3].kill();

    let Answer::Failed(words) = stage.manager.runtime.block_on(moving).unwrap() else { panic!("it moved") };
    assert!(words.ends_with("the VM runs on here"), "{words}");
    let status = stage.status(&stage.h1);
    assert_eq!((status.state, status.epoch), (MoveState::Owned, before.after(2)));
    let here = VmSeen { vm: stage.spec.vm.clone(), state: VmState::Running, leaving: false };
    assert_eq!(stage.list(&stage.h1), [here]);
    assert!(!stage.world.interfaces("h2").contains("vg-"), "{}", stage.world.interfaces("h2"));
    // A muted port would let its answers go nowhere.
    for _ in 0..20 {
        stage.echo.once();
    }
    stage.end_at_h1();
}

#[test]
#[ignore = "needs root"]
fn a_source_killed_in_the_pause_brings_its_guest_back() {
    let mut stage = Stage::new("mvk", "3s");
    stage.wait_ready();
    let uri = stage.prepare(&stage.h2);
    let migrate = stage.migrate("h2", uri);
    let connection = stage.h1.connection.clone();
    stage.manager.runtime.spawn(async move { ask(&connection, &migrate).await });
    until("the source is fenced", LIMIT, || stage.state(&stage.h1) == MoveState::Fenced);
    stage.daemons[2].kill();
    stage.daemons[2] = monitord(&stage.world, "h1", "0s");
    stage.h1 = stage.manager.line();

    until("the switch owns it again", LIMIT, || stage.state(&stage.h1) == MoveState::Owned);
    assert!(stage.runs_on(&stage.h1));
    stage.echo.once();
    let cancel = Command::CancelIncoming { vm: stage.spec.vm.clone() };
    assert_eq!(stage.manager.ask(&stage.h2, &cancel), Answer::Done);
    stage.end();
}

#[test]
#[ignore = "needs root"]
fn a_killed_switch_gets_its_ports_back() {
    let mut stage = Stage::new("mvs", "0s");
    stage.wait_ready();
    stage.echo.once();
    stage.daemons[0].kill();
    stage.daemons[0] = switchd(&stage.world, "h1");

    let ports = || match stage.manager.ask(&stage.h1, &Command::Switch(SwitchRequest::PortList)) {
        Answer::Switch(Ok(SwitchReply::Ports(ports))) => ports.len(),
        _ => 0,
    };
    until("guest's and access port are there", LIMIT, || ports() == 2);
    // It claims first, and waits a moment for an objection.
    until("it owns the MAC", LIMIT, || stage.state(&stage.h1) == MoveState::Owned);
    stage.echo.once();
    stage.end();
}
