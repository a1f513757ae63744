//! Single moves step by step, then random schedules against the safety invariant.

use super::*;
use proptest::prelude::*;
use violin_common::api::switch::Ownership::{Arriving, Here};

const MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
const NAMES: [&str; 3] = ["h1", "h2", "h3"];

fn key() -> Key {
    (Vni::new(7).unwrap(), MAC)
}

fn vm() -> VmId {
    "alpha-c1".parse().unwrap()
}

/// Three switches, their messages under way, and where the hypervisor really runs the VM.
struct World {
    now: Instant,
    switches: Vec<Option<Moves>>,
    /// From, to, message.
    wire: Vec<(usize, usize, Message)>,
    /// Where the VM runs; none while it is stopped between two hosts.
    runs: Option<usize>,
    /// Those that started anew and do not let their ports claim yet.
    unsettled: [bool; 3],
    next_port: u32,
    /// Who is cut off from the others.
    cut: Option<usize>,
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            now: Instant(1),
            switches: NAMES.iter().map(|name| Some(Moves::new(name.parse().unwrap()))).collect(),
            wire: Vec::new(),
            runs: Some(0),
            unsettled: [false; 3],
            next_port: 1,
            cut: None,
        };
        world.port(0, Here { epoch: Epoch::FIRST });
        world.deliver_all();
        world
    }

    fn at(&mut self, host: usize, event: impl FnOnce(&mut Moves, Instant)) {
        let Some(moves) = self.switches[host].as_mut() else { return };
        event(moves, self.now);
        for effect in moves.take_effects() {
            match effect {
                Effect::Send { to, message } => {
                    let to = NAMES.iter().position(|name| *name == to.as_str()).unwrap();
                    self.wire.push((host, to, message));
                }
                Effect::Announce { message, .. } => {
                    for to in (0..3).filter(|to| *to != host) {
                        self.wire.push((host, to, message.clone()));
                    }
                }
                Effect::Duplicate { .. } => {}
            }
        }
        self.wire.retain(|(from, to, _)| self.switches[*to].is_some() && self.cut != Some(*from) && self.cut != Some(*to));
    }

    /// Cuts a host off: connections to it end, and with them what is under way.
    fn cut(&mut self, host: usize) {
        self.heal();
        self.cut = Some(host);
        self.wire.retain(|(from, to, _)| *from != host && *to != host);
    }

    fn heal(&mut self) {
        let Some(host) = self.cut.take() else { return };
        for other in (0..3).filter(|other| *other != host) {
            self.reconnect(host, other);
        }
    }

    fn reachable(&self, a: usize, b: usize) -> bool {
        self.switches[b].is_some() && self.cut != Some(a) && self.cut != Some(b)
    }

    fn port(&mut self, host: usize, ownership: Ownership) {
        self.next_port += 1;
        let (port, settled) = (PortId(self.next_port), !self.unsettled[host]);
        self.at(host, |moves, now| drop(moves.port_added(now, key(), port, vm(), ownership, settled)));
    }

    fn deliver(&mut self, index: usize) {
        let (from, to, message) = self.wire.remove(index);
        let from: HostId = NAMES[from].parse().unwrap();
        let absent = [0, 1, 2].map(|other| !self.reachable(to, other));
        self.at(to, |moves, now| match message {
            Message::Owned { all, macs } => moves.owned_heard(now, &from, all, &macs, &|_| true),
            Message::Disowned(owned) => moves.disowned_heard(&from, owned),
            Message::Moved { owned, host } => {
                let absent = NAMES.iter().position(|name| *name == host.as_str()).is_some_and(|host| absent[host]);
                moves.moved_heard(now, &from, owned, host, absent);
            }
            Message::Move { owned, step } => moves.step_heard(now, &from, owned, step, true),
            other => panic!("moves sent {other:?}"),
        });
    }

    fn deliver_all(&mut self) {
        for _ in 0..200 {
            if self.wire.is_empty() {
                return;
            }
            self.deliver(0);
        }
        panic!("messages go round for ever: {:?}", self.wire);
    }

    fn reconnect(&mut self, a: usize, b: usize) {
        self.wire.retain(|(from, to, _)| !(*from == a && *to == b || *from == b && *to == a));
        for (one, other) in [(a, b), (b, a)] {
            if !self.reachable(one, other) {
                continue;
            }
            let name: HostId = NAMES[other].parse().unwrap();
            let macs = self.switches[one].as_ref().map(|moves| moves.ours(&|_| true));
            if let Some(macs) = macs {
                self.wire.push((one, other, Message::Owned { all: false, macs }));
            }
            self.at(one, |moves, now| moves.peer_up(now, &name));
        }
    }

    fn pass(&mut self, span: Duration) {
        self.now = self.now + span;
        let complete = self.switches.iter().all(Option::is_some) && self.cut.is_none() && self.wire.is_empty();
        for host in 0..3 {
            if std::mem::take(&mut self.unsettled[host]) {
                self.at(host, Moves::settle);
            }
            let up = [0, 1, 2].map(|other| self.reachable(host, other));
            self.at(host, |moves, now| {
                let reachable = |peer: &HostId| NAMES.iter().position(|name| *name == peer.as_str()).is_some_and(|peer| up[peer]);
                moves.tick(now, &reachable, complete);
            });
        }
    }

    fn state(&self, host: usize) -> Option<MoveState> {
        self.switches[host].as_ref()?.seen(key()).map(|seen| seen.state)
    }

    fn open(&self, host: usize) -> bool {
        let Some(moves) = &self.switches[host] else { return false };
        moves.views().any(|(_, view)| view.port.is_some() && view.open == Some(true))
    }

    fn check(&self) {
        let open: Vec<usize> = (0..3).filter(|host| self.open(*host)).collect();
        assert!(open.len() <= 1, "unfenced ports at {open:?}");
    }

    fn grant(&mut self, from: usize, to: usize) {
        let name: HostId = NAMES[to].parse().unwrap();
        self.at(from, |moves, now| drop(moves.grant(now, key(), &name)));
    }

    fn hypervisor_stops(&mut self) {
        if let Some(host) = self.runs.take() {
            self.at(host, |moves, now| drop(moves.stopped(now, key())));
        }
    }

    fn hypervisor_runs(&mut self, host: usize) {
        self.runs = Some(host);
        self.at(host, |moves, now| drop(moves.running(now, key())));
    }
}

#[test]
fn a_move_ends_with_one_owner_and_a_tombstone() {
    let mut world = World::new();
    world.port(1, Arriving);

    world.grant(0, 1);
    world.deliver_all();
    assert_eq!((world.state(0), world.state(1)), (Some(MoveState::Granted), Some(MoveState::Prepared)));
    world.hypervisor_stops();
    assert_eq!(world.state(0), Some(MoveState::Fenced));
    world.deliver_all();
    world.hypervisor_runs(1);
    assert_eq!(world.state(1), Some(MoveState::Owned), "the source was fenced in time, so nothing was waited for");
    world.deliver_all();

    assert_eq!((world.state(0), world.state(2)), (Some(MoveState::Gone), Some(MoveState::Elsewhere)));
    let seen = world.switches[2].as_ref().unwrap().seen(key()).unwrap();
    assert_eq!((seen.epoch, seen.host.unwrap().as_str()), (Epoch::FIRST.after(1), "h2"));
    let (_, view) = world.switches[0].as_ref().unwrap().views().next().unwrap();
    assert!(view.forward_late && view.open == Some(false));
    world.at(0, |moves, now| moves.port_removed(now, key()));
    world.pass(TOMBSTONE);
    let (_, view) = world.switches[0].as_ref().unwrap().views().next().unwrap();
    assert!(!view.forward_late);
}

#[test]
fn a_destination_whose_vm_runs_has_the_source_fenced_first() {
    let mut world = World::new();
    world.port(1, Arriving);
    world.grant(0, 1);
    world.deliver_all();

    world.hypervisor_runs(1);
    assert_eq!(world.state(1), Some(MoveState::Prepared));
    world.deliver_all();

    assert_eq!((world.state(0), world.state(1)), (Some(MoveState::Gone), Some(MoveState::Owned)));
}

#[test]
fn an_aborted_grant_comes_back_and_the_next_one_is_a_new_one() {
    let mut world = World::new();
    world.port(1, Arriving);
    world.grant(0, 1);
    world.deliver_all();

    world.at(0, |moves, now| moves.abort(now, key()).unwrap());
    assert_eq!(world.state(0), Some(MoveState::Granted), "not before the destination has forgotten it");
    world.deliver_all();
    assert_eq!((world.state(0), world.state(1)), (Some(MoveState::Owned), Some(MoveState::Released)));
    world.grant(0, 1);
    world.deliver_all();

    assert_eq!(world.state(1), Some(MoveState::Prepared));
    assert_eq!(world.switches[1].as_ref().unwrap().seen(key()).unwrap().epoch, Epoch::FIRST.after(2));
}

#[test]
fn a_vm_that_runs_on_at_its_fenced_source_is_owned_there_two_epochs_later() {
    let mut world = World::new();
    world.port(1, Arriving);
    world.grant(0, 1);
    world.deliver_all();
    world.hypervisor_stops();
    world.deliver_all();

    world.hypervisor_runs(0);
    assert!(!world.open(0));
    world.deliver_all();

    assert_eq!((world.state(0), world.state(1)), (Some(MoveState::Owned), Some(MoveState::Released)));
    assert_eq!(world.switches[2].as_ref().unwrap().seen(key()).unwrap().epoch, Epoch::FIRST.after(2));
}

#[test]
fn a_destination_without_a_waiting_port_refuses_the_grant() {
    let mut world = World::new();

    world.grant(0, 1);
    world.deliver_all();

    assert_eq!(world.state(0), Some(MoveState::Owned));
    let outcome = world.switches[0].as_ref().unwrap().outcome(key(), Until::Granted).unwrap();
    assert!(outcome.unwrap_err().contains("h2 has no port waiting"));
}

#[test]
fn a_destination_that_started_anew_is_granted_again_once_its_port_is_back() {
    for stopped_before in [true, false] {
        let mut world = World::new();
        world.port(1, Arriving);
        world.grant(0, 1);
        world.deliver_all();
        if stopped_before {
            world.hypervisor_stops();
            world.deliver_all();
        }
        world.switches[1] = Some(Moves::new(NAMES[1].parse().unwrap()));
        world.reconnect(0, 1);
        world.deliver_all();
        assert!(matches!(world.state(0), Some(MoveState::Granted | MoveState::Fenced)), "the VM may be on its way");

        world.port(1, Arriving);
        world.hypervisor_stops();
        world.hypervisor_runs(1);
        world.pass(REPEAT);
        world.deliver_all();

        assert_eq!((world.state(0), world.state(1)), (Some(MoveState::Gone), Some(MoveState::Owned)));
    }
}

#[test]
fn a_source_that_died_fenced_does_not_keep_the_vm_mute() {
    let mut world = World::new();
    world.port(1, Arriving);
    world.grant(0, 1);
    world.deliver_all();
    world.hypervisor_stops();
    world.wire.clear();
    world.switches[0] = None;

    world.hypervisor_runs(1);
    world.pass(Duration::from_secs(1));
    assert!(!world.open(1), "the source may only be slow");
    world.pass(PATIENCE);

    assert_eq!(world.state(1), Some(MoveState::Owned));
}

#[test]
fn an_aborted_move_whose_destination_died_is_taken_back_where_the_vm_runs() {
    for stopped in [true, false] {
        let mut world = World::new();
        world.port(1, Arriving);
        world.grant(0, 1);
        world.deliver_all();
        if stopped {
            world.hypervisor_stops();
            world.deliver_all();
        }
        world.cut(1);

        world.at(0, |moves, now| moves.abort(now, key()).unwrap());
        world.pass(PATIENCE * 2);
        assert_eq!(world.open(0), !stopped, "nobody has said that the VM runs here");
        assert_ne!(world.state(0), Some(MoveState::Owned));
        world.hypervisor_runs(0);
        world.pass(PATIENCE / 2);
        assert_ne!(world.state(0), Some(MoveState::Owned), "the destination may only be slow");
        world.pass(PATIENCE);
        assert_eq!(world.state(0), Some(MoveState::Owned));

        world.heal();
        world.deliver_all();
        assert_eq!(world.state(1), Some(MoveState::Released), "it has not kept what is over");
        world.grant(0, 1);
        world.deliver_all();
        assert_eq!((world.state(0), world.state(1)), (Some(MoveState::Granted), Some(MoveState::Prepared)));
    }
}

#[test]
fn a_source_that_started_anew_is_fenced_by_a_destination_it_has_forgotten() {
    let mut world = World::new();
    world.port(1, Arriving);
    world.grant(0, 1);
    world.deliver_all();
    world.switches[0] = Some(Moves::new(NAMES[0].parse().unwrap()));
    world.port(0, Here { epoch: Epoch::FIRST });
    world.reconnect(0, 1);
    world.deliver_all();
    assert!(world.open(0));

    world.hypervisor_stops();
    world.hypervisor_runs(1);
    world.deliver_all();

    assert_eq!((world.state(0), world.state(1)), (Some(MoveState::Gone), Some(MoveState::Owned)));
}

#[test]
fn a_restarted_owner_that_claims_too_low_an_epoch_is_told_and_raises_it() {
    let mut world = World::new();
    world.port(1, Arriving);
    world.grant(0, 1);
    world.deliver_all();
    world.hypervisor_stops();
    world.hypervisor_runs(1);
    world.deliver_all();
    world.switches[1] = Some(Moves::new(NAMES[1].parse().unwrap()));

    world.port(1, Here { epoch: Epoch::FIRST });
    world.deliver_all();

    assert_eq!(world.state(1), Some(MoveState::Owned));
    assert_eq!(world.switches[2].as_ref().unwrap().seen(key()).unwrap().epoch, Epoch::FIRST.after(2));
}

/// The owner dies before anybody has heard of it; its source, fenced, grants again to a port that waits to claim.
#[test]
fn a_restarted_owner_that_nobody_heard_of_takes_the_grant_for_its_claim() {
    for epoch in [Epoch::FIRST, Epoch::FIRST.after(1)] {
        let mut world = World::new();
        world.port(1, Arriving);
        world.grant(0, 1);
        world.deliver_all();
        world.hypervisor_stops();
        world.deliver_all();
        world.hypervisor_runs(1);
        world.wire.clear();

        world.switches[1] = Some(Moves::new(NAMES[1].parse().unwrap()));
        world.unsettled[1] = true;
        world.port(1, Here { epoch });
        world.reconnect(0, 1);
        world.deliver_all();
        assert!(!world.open(1), "not before it has heard everybody");
        world.pass(Duration::from_millis(50));
        world.deliver_all();

        assert_eq!((world.state(0), world.state(1)), (Some(MoveState::Gone), Some(MoveState::Owned)));
    }
}

#[test]
fn a_vm_that_runs_where_nobody_was_granted_is_adopted_when_nobody_owns_it() {
    let mut world = World::new();
    world.port(1, Arriving);
    world.grant(0, 1);
    world.deliver_all();
    world.hypervisor_stops();
    for (switch, name) in world.switches.iter_mut().zip(NAMES) {
        *switch = Some(Moves::new(name.parse().unwrap()));
    }
    world.wire.clear();

    world.port(1, Arriving);
    world.hypervisor_runs(1);
    assert!(!world.open(1));
    world.pass(PATIENCE);

    assert_eq!(world.state(1), Some(MoveState::Owned));
}

#[test]
fn the_second_claim_of_the_same_epoch_is_muted() {
    let mut world = World::new();

    world.port(2, Here { epoch: Epoch::FIRST });

    assert_eq!((world.state(0), world.state(2)), (Some(MoveState::Owned), Some(MoveState::Released)));
    world.check();
}

#[test]
fn a_muted_port_speaks_again_when_the_other_owner_has_ended() {
    // Muted as it claimed, or by a later claim.
    for (epoch, muted, other) in [(Epoch::FIRST, 2, 0), (Epoch::FIRST.after(5), 0, 2)] {
        let mut world = World::new();
        world.port(2, Here { epoch });
        world.deliver_all();
        world.pass(PATIENCE);
        world.deliver_all();
        assert!(world.open(other) && !world.open(muted));

        world.at(other, |moves, now| moves.port_removed(now, key()));
        world.deliver_all();
        world.pass(PATIENCE);
        world.deliver_all();

        assert!(world.open(muted), "muted at {muted}");
        let seen = world.switches[1].as_ref().unwrap().seen(key()).unwrap();
        assert_eq!(seen.host.unwrap().as_str(), NAMES[muted]);
    }
}

#[test]
fn the_next_life_of_a_mac_may_begin_at_the_first_epoch_again() {
    let mut world = World::new();
    world.port(1, Arriving);
    world.grant(0, 1);
    world.deliver_all();
    world.hypervisor_stops();
    world.hypervisor_runs(1);
    world.deliver_all();
    world.at(0, |moves, now| moves.port_removed(now, key()));

    world.at(1, |moves, now| moves.port_removed(now, key()));
    world.deliver_all();
    world.port(2, Here { epoch: Epoch::FIRST });
    world.deliver_all();
    world.port(0, Arriving);
    world.grant(2, 0);
    world.deliver_all();

    assert_eq!((world.state(2), world.state(0)), (Some(MoveState::Granted), Some(MoveState::Prepared)));
}

#[test]
fn a_vm_started_anew_where_its_last_move_began_does_not_wait_for_a_dead_destination() {
    let mut world = World::new();
    world.port(1, Arriving);
    world.grant(0, 1);
    world.deliver_all();
    world.hypervisor_stops();
    world.deliver_all();
    world.cut(1);
    world.at(0, |moves, now| moves.port_removed(now, key()));
    let next = Epoch { incarnation: Epoch::FIRST.incarnation + 1, ..Epoch::FIRST };

    world.at(0, |moves, now| {
        let again = moves.port_added(now, key(), PortId(70), vm(), Here { epoch: Epoch::FIRST }, true);
        assert!(again.unwrap_err().contains("has not ended"), "the VM may run at its destination");
        moves.port_added(now, key(), PortId(71), vm(), Here { epoch: next }, true).unwrap();
    });
    assert!(world.open(0));
    world.heal();
    world.deliver_all();

    assert_eq!((world.state(0), world.state(1)), (Some(MoveState::Owned), Some(MoveState::Released)));
    assert_eq!(world.switches[2].as_ref().unwrap().seen(key()).unwrap().epoch, next);
    world.grant(0, 1);
    world.deliver_all();
    assert_eq!(world.state(1), Some(MoveState::Prepared));
}

#[test]
fn one_peer_cannot_use_up_the_room_for_the_macs_of_others() {
    let mut moves = Moves::new(NAMES[0].parse().unwrap());
    let (greedy, modest): (HostId, HostId) = (NAMES[1].parse().unwrap(), NAMES[2].parse().unwrap());
    let numbered = |number: usize| MacAddr([2, 1, 0, (number >> 16) as u8, (number >> 8) as u8, number as u8]);
    let named = |number| at((key().0, numbered(number)), Epoch::FIRST);
    let macs: Vec<OwnedAt> = (0..SHARE - 2).map(named).collect();

    moves.owned_heard(Instant(1), &greedy, false, &macs, &|_| true);
    moves.step_heard(Instant(1), &greedy, named(SHARE), Step::Release, true);
    for number in SHARE + 1..SHARE + 4 {
        moves.step_heard(Instant(1), &greedy, named(number), Step::Fence, true);
        moves.owned_heard(Instant(1), &greedy, false, &[named(number + 100)], &|_| true);
    }
    assert_eq!((moves.entries.len(), moves.macs_refused), (SHARE, 5));
    moves.owned_heard(Instant(1), &modest, false, &[named(SHARE + 200)], &|_| true);
    assert_eq!(moves.entries.len(), SHARE + 1);

    // What is forgotten makes room.
    moves.disowned_heard(&greedy, named(7));
    moves.tick(Instant(2), &|_| true, true);
    moves.owned_heard(Instant(2), &greedy, false, &macs, &|_| true);
    assert_eq!((moves.entries.len(), moves.macs_refused), (SHARE + 1, 5));
}

#[derive(Debug, Clone)]
enum Act {
    Deliver(usize),
    Lose(usize),
    Repeat(usize),
    Reconnect(usize, usize),
    Grant(usize),
    Abort,
    Stop,
    Arrive(usize),
    Resume,
    /// The monitor says again that the VM runs where it runs.
    Again,
    RemovePort(usize),
    Crash(usize, bool),
    PutBack(usize),
    Pass(u64),
    Cut(usize),
    Heal,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        12 => (0usize..64).prop_map(Act::Deliver),
        2 => (0usize..64).prop_map(Act::Lose),
        2 => (0usize..64).prop_map(Act::Repeat),
        2 => (0usize..3, 0usize..3).prop_map(|(a, b)| Act::Reconnect(a, b)),
        4 => (0usize..3).prop_map(Act::Grant),
        1 => Just(Act::Abort),
        3 => Just(Act::Stop),
        3 => (0usize..3).prop_map(Act::Arrive),
        1 => Just(Act::Resume),
        1 => Just(Act::Again),
        1 => (0usize..3).prop_map(Act::RemovePort),
        1 => (0usize..3, any::<bool>()).prop_map(|(host, at_once)| Act::Crash(host, at_once)),
        1 => (0usize..3).prop_map(Act::PutBack),
        1 => (0u64..4000).prop_map(Act::Pass),
        1 => (0usize..3).prop_map(Act::Cut),
        1 => Just(Act::Heal),
    ]
}

/// Plays one schedule. The hypervisor is sound: the VM runs at one place, stops before it runs elsewhere, and arrives only
/// where a port was prepared. Everything else may go wrong.
fn play(acts: Vec<Act>) {
    let mut world = World::new();
    let mut left: Option<usize> = None;
    let mut asked: Option<usize> = None;
    let mut destination: Option<usize> = None;
    for act in acts {
        match act {
            Act::Deliver(index) if !world.wire.is_empty() => world.deliver(index % world.wire.len()),
            Act::Lose(index) if !world.wire.is_empty() => drop(world.wire.remove(index % world.wire.len())),
            Act::Repeat(index) if !world.wire.is_empty() && world.wire.len() < 40 => {
                let copy = world.wire[index % world.wire.len()].clone();
                world.wire.push(copy);
            }
            Act::Reconnect(a, b) if a != b => world.reconnect(a, b),
            Act::Grant(to) => {
                if let Some(from) = world.runs.filter(|from| *from != to) {
                    world.port(to, Arriving);
                    world.grant(from, to);
                    asked = Some(to);
                }
            }
            Act::Abort => {
                if let Some(host) = world.runs {
                    world.at(host, |moves, now| drop(moves.abort(now, key())));
                }
            }
            Act::Stop => {
                let acknowledged = world.runs.is_some_and(|host| {
                    let outcome = world.switches[host].as_ref().and_then(|moves| moves.outcome(key(), Until::Granted));
                    outcome == Some(Ok(()))
                });
                destination = asked.take().filter(|_| acknowledged);
                left = world.runs.or(left);
                world.hypervisor_stops();
            }
            // The monitor starts a migration only after the grant was acknowledged.
            Act::Arrive(host) if world.runs.is_none() && destination == Some(host) && left.is_some() => {
                world.hypervisor_runs(host);
                destination = None;
            }
            Act::Resume if world.runs.is_none() => {
                if let Some(host) = left {
                    destination = None;
                    world.hypervisor_runs(host);
                }
            }
            Act::Again => {
                if let Some(host) = world.runs {
                    world.hypervisor_runs(host);
                }
            }
            Act::RemovePort(host) if world.runs != Some(host) && left != Some(host) => {
                world.at(host, |moves, now| moves.port_removed(now, key()));
            }
            Act::Crash(host, at_once) => crash(&mut world, host, destination, at_once),
            Act::PutBack(host) => put_back(&mut world, host, destination),
            Act::Pass(ms) => world.pass(Duration::from_millis(ms)),
            Act::Cut(host) => world.cut(host),
            Act::Heal => world.heal(),
            _ => {}
        }
        world.check();
    }
}

/// The monitor puts a lost port back as far as it knows: here, arriving or not at all.
fn put_back(world: &mut World, host: usize, destination: Option<usize>) {
    if world.runs == Some(host) {
        world.port(host, Here { epoch: Epoch::FIRST });
    } else if destination == Some(host) {
        world.port(host, Arriving);
    }
}

/// The switch is killed and starts anew; its ports are put back at once or later.
/// It is connected with everybody before its ports claim, as `Switch` sees to it.
fn crash(world: &mut World, host: usize, destination: Option<usize>, at_once: bool) {
    world.wire.retain(|(from, to, _)| *from != host && *to != host);
    world.switches[host] = Some(Moves::new(NAMES[host].parse().unwrap()));
    world.unsettled[host] = true;
    // While it is cut off it claims alone, after a while.
    let others: Vec<usize> = (0..3).filter(|other| *other != host && world.reachable(host, *other)).collect();
    for other in others {
        let macs = world.switches[other].as_ref().map(|moves| moves.ours(&|_| true)).unwrap_or_default();
        let name: HostId = NAMES[other].parse().unwrap();
        world.at(host, |moves, now| moves.owned_heard(now, &name, true, &macs, &|_| true));
    }
    if at_once {
        put_back(world, host, destination);
    }
    for other in (0..3).filter(|other| *other != host) {
        world.reconnect(host, other);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_schedule_opens_two_ports(acts in proptest::collection::vec(act(), 1..120)) {
        play(acts);
    }
}
