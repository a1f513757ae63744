//! All schedules of a small world, looked through by a model checker on the real [`Moves`]: three switches, one MAC, two moves, two
//! crashes, one abort, at most four messages under way, each of which may be lost or overtaken. Time is ages relative to now.
//!
//! The hypervisor is sound: the VM runs at one place at a time, and elsewhere only where a grant was taken. What is shown: at most one
//! port is open in any state; and from any state, once switches run, all are connected and messages arrive, the VM is reached.

use super::*;
use stateright::{Checker, Model, Property};
use violin_common::api::switch::Ownership::{Arriving, Here};

const HOSTS: usize = 3;
const WIRE: usize = 4;
/// "Now" of every state: what was before is an age, what is to come a rest.
const NOW: Instant = Instant(1_000_000_000_000);

fn key() -> Key {
    (Vni::new(7).unwrap(), MacAddr([2, 0, 0, 0, 0, 1]))
}

fn name(host: usize) -> HostId {
    ["h1", "h2", "h3"][host].parse().unwrap()
}

fn number(name: &HostId) -> usize {
    (0..HOSTS).find(|host| self::name(*host) == *name).unwrap()
}

/// Where the hypervisor has the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Vm {
    Runs(usize),
    /// Stopped at the first; runs next at the second, or again at the first.
    Between(usize, Option<usize>),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    switches: [Option<Moves>; HOSTS],
    /// From, to, what; in a stated order, and each once: which of two equal ones arrives makes no difference.
    wire: Vec<(usize, usize, Message)>,
    vm: Vm,
    /// The destination of the move that has been asked for.
    asked: Option<usize>,
    moves: u8,
    crashes: u8,
    aborts: u8,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Act {
    Deliver(usize),
    Lose(usize),
    Move(usize),
    Abort,
    Stop,
    Run(usize),
    Crash(usize),
    Restart(usize),
    Pass(Duration),
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            switches: std::array::from_fn(|host| Some(Moves::new(name(host)))),
            wire: Vec::new(),
            vm: Vm::Runs(0),
            asked: None,
            moves: 2,
            crashes: 2,
            aborts: 1,
        };
        world.port(0, Here { epoch: Epoch::FIRST }, true);
        assert!(world.deliver_all());
        world.settle_times();
        world
    }

    fn at<T>(&mut self, host: usize, event: impl FnOnce(&mut Moves) -> T) -> Option<T> {
        let moves = self.switches[host].as_mut()?;
        let result = event(moves);
        for effect in moves.take_effects() {
            match effect {
                Effect::Send { to, message } => self.push(host, number(&to), message),
                Effect::Announce { message, .. } => {
                    (0..HOSTS).filter(|to| *to != host).for_each(|to| self.push(host, to, message.clone()));
                }
                Effect::Duplicate { .. } => {}
            }
        }
        Some(result)
    }

    fn push(&mut self, from: usize, to: usize, message: Message) {
        if self.switches[to].is_some() && !self.wire.contains(&(from, to, message.clone())) {
            self.wire.push((from, to, message));
        }
    }

    fn port(&mut self, host: usize, ownership: Ownership, settled: bool) {
        let vm = "alpha-c1".parse().unwrap();
        self.at(host, |moves| drop(moves.port_added(NOW, key(), PortId(host as u32 + 1), vm, ownership, settled)));
    }

    fn deliver(&mut self, index: usize) {
        let (from, to, message) = self.wire.remove(index);
        let absent: [bool; HOSTS] = std::array::from_fn(|host| self.switches[host].is_none());
        let from = name(from);
        self.at(to, |moves| match message {
            Message::Owned { all, macs } => moves.owned_heard(NOW, &from, all, &macs, &|_| true),
            Message::Disowned(owned) => moves.disowned_heard(&from, owned),
            Message::Moved { owned, host } => {
                let absent = absent[number(&host)];
                moves.moved_heard(NOW, &from, owned, host, absent);
            }
            Message::Move { owned, step } => moves.step_heard(NOW, &from, owned, step, true),
            other => panic!("moves sent {other:?}"),
        });
    }

    /// `false`: messages go round for ever.
    fn deliver_all(&mut self) -> bool {
        for _ in 0..500 {
            if self.wire.is_empty() {
                return true;
            }
            self.deliver(0);
        }
        false
    }

    /// A connection stands (again): each tells what it owns, then what has not ended.
    fn connect(&mut self, a: usize, b: usize) {
        for (one, other) in [(a, b), (b, a)] {
            if self.switches[one].is_none() || self.switches[other].is_none() {
                continue;
            }
            let macs = self.switches[one].as_ref().map(|moves| moves.ours(&|_| true)).unwrap_or_default();
            self.at(other, |moves| moves.owned_heard(NOW, &name(one), false, &macs, &|_| true));
            self.at(one, |moves| moves.peer_up(NOW, &name(other)));
        }
    }

    fn restart(&mut self, host: usize) {
        self.switches[host] = Some(Moves::new(name(host)));
        for other in (0..HOSTS).filter(|other| *other != host) {
            self.at(other, |moves| moves.peer_restarted(&name(host)));
            let macs = self.switches[other].as_ref().map(|moves| moves.ours(&|_| true)).unwrap_or_default();
            self.at(host, |moves| moves.owned_heard(NOW, &name(other), true, &macs, &|_| true));
        }
        // As its monitor knows it.
        match self.vm {
            Vm::Runs(at) if at == host => self.port(host, Here { epoch: Epoch::FIRST }, false),
            Vm::Between(_, Some(to)) if to == host => self.port(host, Arriving, false),
            _ if self.asked == Some(host) => self.port(host, Arriving, false),
            _ => {}
        }
        (0..HOSTS).filter(|other| *other != host).for_each(|other| self.connect(host, other));
        self.at(host, |moves| moves.settle(NOW));
    }

    fn pass(&mut self, span: Duration) {
        let up: [bool; HOSTS] = std::array::from_fn(|host| self.switches[host].is_some());
        let complete = up.iter().all(|up| *up) && self.wire.is_empty();
        for host in 0..HOSTS {
            if let Some(moves) = self.switches[host].as_mut() {
                moves.entries.values_mut().for_each(|entry| entry.age(span));
            }
            self.at(host, |moves| moves.tick(NOW, &|peer| up[number(peer)], complete));
        }
    }

    /// What makes no difference to what can happen is the same in every state.
    fn settle_times(&mut self) {
        for moves in self.switches.iter_mut().flatten() {
            moves.told.clear();
            moves.macs_refused = 0;
            for entry in moves.entries.values_mut() {
                entry.entered.clear();
                entry.refusal = None;
                entry.expires = entry.expires.map(|_| NOW + TOMBSTONE);
                entry.told_by = None;
            }
        }
        self.wire.sort_by_key(|message| format!("{message:?}"));
    }

    fn open(&self) -> impl Iterator<Item = usize> {
        (0..HOSTS).filter(|host| {
            let views = self.switches[*host].iter().flat_map(|moves| moves.views());
            views.into_iter().any(|(_, view)| view.port.is_some() && view.open == Some(true))
        })
    }

    fn acknowledged(&self, host: usize) -> bool {
        let outcome = self.switches[host].as_ref().and_then(|moves| moves.outcome(key(), Until::Granted));
        outcome == Some(Ok(()))
    }

    /// What comes of it once nothing goes wrong any more: switches run, all are connected, messages arrive, the VM runs where its
    /// migration led or again where it was, and its monitor says so as often as it is not believed. The second: whether messages came
    /// to an end.
    fn healed(&self) -> (Self, bool) {
        let mut world = self.clone();
        (0..HOSTS).filter(|host| self.switches[*host].is_none()).for_each(|host| world.restart(host));
        for (a, b) in [(0, 1), (0, 2), (1, 2)] {
            world.connect(a, b);
        }
        if let Vm::Between(from, to) = world.vm {
            world.run(to.unwrap_or(from));
        }
        let mut ended = true;
        for _ in 0..12 {
            ended &= world.deliver_all();
            world.pass(REPEAT);
            if let Vm::Runs(at) = world.vm {
                world.say_running(at);
            }
        }
        ended &= world.deliver_all();
        (world, ended)
    }

    /// Whether the one open port is where the VM runs, and what anybody sends arrives there.
    fn is_reached(&self) -> bool {
        let Vm::Runs(at) = self.vm else { return false };
        let view = |host: usize| self.switches[host].iter().flat_map(|moves| moves.views()).next().map(|(_, view)| view);
        // There, to everybody, or to who forwards it there: once, as late frames are.
        let leads = |host: usize| {
            let Some(to) = view(host).and_then(|view| view.host).map(|to| number(&to)) else { return true };
            to == at || view(to).is_some_and(|next| next.forward_late && next.host == Some(name(at)))
        };
        self.open().eq([at]) && (0..HOSTS).filter(|host| *host != at).all(leads)
    }

    fn run(&mut self, host: usize) {
        self.vm = Vm::Runs(host);
        self.say_running(host);
    }

    /// The monitor of the host where the VM runs says so; a port that its switch has lost it makes anew first.
    fn say_running(&mut self, host: usize) {
        let has_port = |moves: &Moves| moves.entries.get(&key()).is_some_and(|entry| entry.port.is_some());
        if self.switches[host].as_ref().is_some_and(|moves| !has_port(moves)) {
            self.port(host, Here { epoch: Epoch::FIRST }, true);
        }
        self.at(host, |moves| drop(moves.running(NOW, key())));
    }
}

impl Entry {
    /// Time has passed: what was becomes older, up to where that makes no more difference.
    fn age(&mut self, span: Duration) {
        let older = |instant: &mut Instant| {
            let age = (NOW.since(*instant) + span).min(PATIENCE);
            *instant = Instant(NOW.0 - age.as_nanos() as u64);
        };
        self.running.as_mut().into_iter().for_each(older);
        self.given.as_mut().into_iter().for_each(|given| older(&mut given.told));
        if let Some(got) = &mut self.got {
            older(&mut got.since);
            older(&mut got.told);
        }
    }
}

struct Schedules;

impl Model for Schedules {
    type State = World;
    type Action = Act;

    fn init_states(&self) -> Vec<World> {
        vec![World::new()]
    }

    fn actions(&self, world: &World, acts: &mut Vec<Act>) {
        acts.extend((0..world.wire.len()).flat_map(|index| [Act::Deliver(index), Act::Lose(index)]));
        let up = |host: usize| world.switches[host].is_some();
        match world.vm {
            Vm::Runs(at) => {
                if world.moves > 0 && up(at) && world.asked.is_none() {
                    acts.extend((0..HOSTS).filter(|to| *to != at && up(*to)).map(Act::Move));
                }
                if world.asked.is_some() {
                    acts.push(Act::Stop);
                    acts.extend((world.aborts > 0 && up(at)).then_some(Act::Abort));
                }
            }
            Vm::Between(from, to) => acts.extend(to.into_iter().chain([from]).map(Act::Run)),
        }
        for host in 0..HOSTS {
            match up(host) {
                true if world.crashes > 0 => acts.push(Act::Crash(host)),
                true => {}
                false => acts.push(Act::Restart(host)),
            }
        }
        acts.extend([REPEAT, PATIENCE].map(Act::Pass));
    }

    fn next_state(&self, before: &World, act: Act) -> Option<World> {
        let mut world = before.clone();
        match act {
            Act::Deliver(index) => world.deliver(index),
            Act::Lose(index) => drop(world.wire.remove(index)),
            Act::Move(to) => {
                let Vm::Runs(from) = world.vm else { return None };
                world.moves -= 1;
                world.port(to, Arriving, true);
                match world.at(from, |moves| moves.grant(NOW, key(), &name(to))) {
                    Some(Ok(())) => world.asked = Some(to),
                    // Refused: what was prepared is taken back.
                    _ => drop(world.at(to, |moves| moves.port_removed(NOW, key()))),
                }
            }
            Act::Abort => {
                let Vm::Runs(from) = world.vm else { return None };
                world.aborts -= 1;
                world.asked = None;
                world.at(from, |moves| drop(moves.abort(NOW, key())));
            }
            Act::Stop => {
                let Vm::Runs(from) = world.vm else { return None };
                // A migration begins only after the grant was acknowledged.
                let to = world.asked.take().filter(|_| world.acknowledged(from));
                world.vm = Vm::Between(from, to);
                world.at(from, |moves| drop(moves.stopped(NOW, key())));
            }
            Act::Run(host) => world.run(host),
            Act::Crash(host) => {
                world.crashes -= 1;
                world.switches[host] = None;
                world.wire.retain(|(from, to, _)| *from != host && *to != host);
            }
            Act::Restart(host) => world.restart(host),
            Act::Pass(span) => world.pass(span),
        }
        world.settle_times();
        (world != *before).then_some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::<Self>::always("at most one port is open", |_, world| world.open().count() <= 1),
            Property::<Self>::always("once healed, the VM is reached", |_, world| {
                let (healed, ended) = world.healed();
                ended && healed.is_reached()
            }),
            // A model in which nothing happens would pass.
            Property::<Self>::sometimes("both moves are made", |_, world| {
                world.moves == 0 && matches!(world.vm, Vm::Runs(at) if world.open().eq([at])) && world.wire.is_empty()
            }),
            Property::<Self>::sometimes("a crash in the midst of a move", |_, world| {
                matches!(world.vm, Vm::Between(..)) && world.switches.iter().any(Option::is_none)
            }),
        ]
    }

    fn within_boundary(&self, world: &World) -> bool {
        world.wire.len() <= WIRE
    }
}

/// Unoptimised, as other tests are built, a short cut; `scripts/mutations`, a part of `make test`, looks through over a million states.
#[test]
fn in_no_schedule_two_ports_are_open_or_a_vm_is_lost() {
    let states = if cfg!(debug_assertions) { 20_000 } else { 6_000_000 };
    let checker = Schedules.checker().threads(2).target_state_count(states).spawn_bfs().join();
    println!(
        "{} states, {} of them different, {} steps deep",
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth()
    );
    for (property, path) in checker.discoveries() {
        if !property.starts_with("both") && !property.starts_with("a crash") {
            let (last, acts) = (path.last_state().clone(), path.into_actions());
            let acts = acts.iter().map(|act| format!("{act:?}\n")).collect::<String>();
            let each = |world: &World| {
                let entries = world.switches.iter().map(|moves| moves.as_ref().and_then(|moves| moves.entries.get(&key())));
                entries.map(|entry| format!("{entry:?}\n")).collect::<String>()
            };
            panic!("{property}: not after\n{acts}{:?}\n{}healed:\n{}", last.vm, each(&last), each(&last.healed().0));
        }
    }
    assert!(checker.discovery("a crash in the midst of a move").is_some());
    if !cfg!(debug_assertions) {
        assert!(checker.discovery("both moves are made").is_some());
        assert!(checker.unique_state_count() >= 1_000_000);
    }
}
