//! Two and three switches side by side, their commands carried out by hand.

mod contest;
mod mtus;
mod sessions;

use super::*;
use crate::members::LIMIT;
use crate::seal::cipher::{Choice, Library};
use crate::seal::schedule::Secret;
use crate::tables::{Forwarding, Gate};
use sha2::{Digest, Sha256};
use std::collections::VecDeque;
use violin_common::Epoch;
use violin_common::api::switch::{MoveState, OwnedMac, Ownership, PortKind, SwitchRequest};
use violin_common::control::mesh::{Aead, Cipher, Member as Hint, Offer, OwnedAt, Step};

const MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);

fn vni(value: u32) -> Vni {
    Vni::new(value).unwrap()
}

fn address(number: usize) -> SocketAddr {
    format!("10.0.0.{number}:7471").parse().unwrap()
}

fn name(number: usize) -> HostId {
    format!("h{number}").parse().unwrap()
}

fn drawn(number: u64) -> Drawn {
    Drawn { index: number as u32 * 7, cookie: number }
}

fn abilities() -> Vec<Ability> {
    Aead::ALL.map(|aead| Ability { choice: Choice { aead, library: Library::Ring }, ns: 400 }).into()
}

fn offer() -> Option<Offer> {
    let ciphers = Aead::ALL.map(|aead| Cipher { code: aead.code(), ns: 400 }).into();
    Some(Offer { ciphers, queues: 1, plain: None })
}

/// Switches `h1`, `h2`, ... and what is under way between them.
struct Mesh {
    now: Instant,
    switches: Vec<Switch>,
    tables: Vec<Forwarding>,
    /// Connection number → its two ends: switch and number there.
    links: BTreeMap<(usize, u64), (usize, u64)>,
    next_link: u64,
    wire: VecDeque<(usize, LinkId, Message)>,
    answers: BTreeMap<(usize, u64), Result<SwitchReply, String>>,
    closed: usize,
}

impl Mesh {
    /// `h1` knows nobody, the others know `h1`. All carry network 5.
    fn new(count: usize) -> Self {
        let now = Instant(1);
        let switches = (1..=count).map(|number| {
            let nature = Nature {
                host: name(number),
                domain: "d1".parse().unwrap(),
                listen: address(number),
                max_datagram: 1472,
                boot: number as u64,
                ciphers: abilities(),
                queues: 1,
                plain: Vec::new(),
                renew: crate::members::RENEW,
            };
            let join = if number == 1 { vec![] } else { vec![address(1)] };
            let mut switch = Switch::new(now, nature, &join);
            switch.network_add(NetworkSpec { vni: vni(5), mtu: 1400, ageing_s: 300 }).unwrap();
            switch
        });
        let mut mesh = Self {
            now,
            switches: switches.collect(),
            tables: vec![Forwarding::default(); count],
            links: BTreeMap::new(),
            next_link: 0,
            wire: VecDeque::new(),
            answers: BTreeMap::new(),
            closed: 0,
        };
        mesh.run(Duration::from_secs(3));
        mesh
    }

    fn carry_out(&mut self, at: usize) {
        loop {
            let commands = self.switches[at].take_commands(self.now);
            if commands.is_empty() {
                return;
            }
            self.carry_out_these(at, commands);
        }
    }

    fn carry_out_these(&mut self, at: usize, commands: Vec<Command>) {
        for command in commands {
            match command {
                Command::Export { link, context } => {
                    // Both ends of a handshake get the same, and no other handshake does: which of its ends has the lower number
                    // tells them apart here.
                    let lower = link.0 & !1;
                    let digest = Sha256::digest([&lower.to_be_bytes()[..], &context.0].concat());
                    self.switches[at].handle_secret(self.now, link, &Secret::new(digest.into()));
                }
                Command::Challenge { .. } => {}
                Command::Publish(tables) => self.tables[at] = *tables,
                Command::Attach { id, .. } => self.switches[at].handle_attached(self.now, id, Ok(())),
                Command::Detach { .. } => {}
                Command::Call(call) => {
                    let to = (0..self.switches.len()).find(|number| address(number + 1) == call.address).unwrap();
                    self.next_link += 2;
                    let (ours, theirs) = (self.next_link, self.next_link + 1);
                    self.links.insert((at, ours), (to, theirs));
                    self.links.insert((to, theirs), (at, ours));
                    let domain: DomainId = "d1".parse().unwrap();
                    self.switches[at].handle_called(self.now, &call, None);
                    let (us, them) = ((name(at + 1), domain.clone()), (name(to + 1), domain));
                    self.switches[at].handle_connected(LinkId(ours), them, address(to + 1), true, drawn(ours));
                    self.switches[to].handle_connected(LinkId(theirs), us, address(at + 1), false, drawn(theirs));
                    self.carry_out(to);
                }
                Command::Send { link, message } => {
                    // As on the wire: encoded and decoded.
                    let bytes = postcard::to_stdvec(&message).unwrap();
                    if let Some((to, theirs)) = self.links.get(&(at, link.0)) {
                        self.wire.push_back((*to, LinkId(*theirs), postcard::from_bytes(&bytes).unwrap()));
                    }
                }
                Command::Close { link, .. } => self.close(at, link),
                Command::Watch { .. } => {}
                Command::Answer { ticket, reply } => drop(self.answers.insert((at, ticket.0), reply)),
            }
        }
    }

    fn close(&mut self, at: usize, link: LinkId) {
        let Some((to, theirs)) = self.links.remove(&(at, link.0)) else { return };
        self.closed += 1;
        self.links.remove(&(to, theirs));
        self.wire.retain(|(_, link, _)| link.0 != theirs);
        self.switches[at].handle_closed(self.now, link);
        self.switches[to].handle_closed(self.now, LinkId(theirs));
    }

    fn settle(&mut self) {
        for at in 0..self.switches.len() {
            self.carry_out(at);
        }
        while let Some((to, link, message)) = self.wire.pop_front() {
            let _ = self.switches[to].handle_message(self.now, link, message);
            self.carry_out(to);
        }
    }

    /// Lets time pass; each switch is told when it has asked for that, and not otherwise.
    fn run(&mut self, span: Duration) {
        let end = self.now + span;
        while self.now < end {
            let due = self.switches.iter().filter_map(Switch::poll_timeout).min();
            self.now = due.unwrap_or(end).max(self.now + Duration::from_millis(5)).min(end);
            for at in 0..self.switches.len() {
                if self.switches[at].poll_timeout().is_some_and(|due| due <= self.now) {
                    self.switches[at].handle_timeout(self.now);
                }
            }
            self.settle();
        }
    }

    /// How often anybody is told the time while nothing happens.
    fn looks(&mut self, span: Duration) -> usize {
        let (end, mut looks) = (self.now + span, 0);
        while let Some(due) = self.switches.iter().filter_map(Switch::poll_timeout).min().filter(|due| *due < end) {
            self.now = due.max(self.now + Duration::from_millis(5));
            looks += 1;
            self.switches.iter_mut().for_each(|switch| switch.handle_timeout(self.now));
            self.settle();
        }
        looks
    }

    /// Asks switch `at` (from 1) and waits some time.
    fn ask(&mut self, at: usize, request: SwitchRequest) -> Result<SwitchReply, String> {
        self.next_link += 1;
        let ticket = self.next_link;
        self.switches[at - 1].handle_request(self.now, Ticket(ticket), request);
        self.settle();
        self.run(Duration::from_millis(200));
        self.answers.remove(&(at - 1, ticket)).expect("answered")
    }

    fn port(&mut self, at: usize, interface: &str, owned: Option<Ownership>) -> PortId {
        let owned = owned.map(|ownership| OwnedMac { mac: MAC, vm: "alpha-c1".parse().unwrap(), ownership });
        let spec = PortSpec { vni: vni(5), kind: PortKind::Packet { interface: interface.into() }, owned };
        match self.ask(at, SwitchRequest::PortAdd(spec)) {
            Ok(SwitchReply::Port(port)) => port,
            other => panic!("{other:?}"),
        }
    }

    fn network(&self, at: usize) -> &crate::tables::Network {
        &self.tables[at - 1].networks[&vni(5)]
    }
}

#[test]
fn everybody_is_connected_with_everybody_by_one_connection() {
    let mesh = Mesh::new(4);

    for at in 1..=4 {
        assert_eq!(mesh.network(at).peers.len(), 3, "h{at}");
        assert_eq!(mesh.tables[at - 1].by_receiver.len(), 3);
    }
    assert_eq!(mesh.links.len(), 2 * 6);
}

#[test]
fn each_writes_the_index_the_other_gave() {
    let mesh = Mesh::new(2);

    let ours = mesh.tables[0].peers[0].as_ref().unwrap();
    assert!(mesh.tables[1].by_receiver.contains_key(&ours.session.receiver));
    assert_eq!((ours.host.as_str(), ours.address), ("h2", address(2)));
}

#[test]
fn floods_go_only_to_peers_that_carry_the_network() {
    let mut mesh = Mesh::new(3);

    mesh.ask(3, SwitchRequest::NetworkRemove { vni: vni(5) }).unwrap();

    assert_eq!(mesh.network(1).peers.len(), 1);
    assert!(mesh.tables[0].peers[mesh.network(1).peers[0].0 as usize].as_ref().unwrap().host == name(2));
}

#[test]
fn a_lost_connection_is_made_again() {
    let mut mesh = Mesh::new(3);
    let (&(at, link), _) = mesh.links.iter().next().unwrap();

    mesh.close(at, LinkId(link));
    mesh.settle();
    assert!((1..=3).any(|at| mesh.network(at).peers.len() == 1));
    mesh.run(Duration::from_secs(1));

    assert!((1..=3).all(|at| mesh.network(at).peers.len() == 2));
}

#[test]
fn a_member_that_leaves_is_not_called_again() {
    let mut mesh = Mesh::new(3);

    mesh.switches[2].handle_drain();
    mesh.settle();

    assert_eq!(mesh.network(1).peers.len(), 1);
    assert!(mesh.switches[0].members.all().all(|(host, _)| *host != name(3)));
}

fn hello(number: usize) -> Hello {
    Hello {
        oldest: OLDEST,
        newest: PROTOCOL,
        features: 0,
        host: name(number),
        domain: "d1".parse().unwrap(),
        boot: 99,
        receiver: 1,
        reserved: 0,
        offer: offer(),
        max_datagram: 1472,
        networks: vec![],
    }
}

#[test]
fn members_that_were_only_told_of_give_way_to_those_that_come_themselves() {
    let mut mesh = Mesh::new(2);
    let now = mesh.now;
    let switch = &mut mesh.switches[1];
    let told = switch.link_of(&name(1)).unwrap();
    let hints = (10..10 + 2 * LIMIT).map(|number| Hint { host: name(number), address: address(9) });
    switch.handle_message(now, told, Message::Members(hints.collect())).unwrap();
    assert_eq!((switch.members.all().count(), switch.refusals().hints), (LIMIT, LIMIT as u64 + 1));

    switch.handle_closed(now, told);
    for number in [5, 6] {
        let link = LinkId(900 + number as u64);
        switch.handle_connected(link, (name(number), "d1".parse().unwrap()), address(number), false, drawn(link.0));
        switch.handle_message(now, link, Message::Hello(hello(number))).unwrap();
        assert_eq!((switch.members.all().count(), switch.link_of(&name(number))), (LIMIT, Some(link)));
    }
    assert!(switch.members.all().any(|(host, _)| *host == name(1)), "whoever was connected once stays");
}

#[test]
fn a_join_address_is_called_whatever_others_say_is_there() {
    let mut mesh = Mesh::new(2);
    let (now, switch) = (mesh.now, &mut mesh.switches[1]);
    let told = switch.link_of(&name(1)).unwrap();
    let liar = |host, at| Message::Members(vec![Hint { host: name(host), address: address(at) }]);
    switch.handle_message(now, told, liar(7, 3)).unwrap();
    switch.members.set_join(now, &[address(1), address(3), address(4)]);
    switch.handle_message(now, told, liar(8, 4)).unwrap();

    let anybody = |at| Call { address: address(at), expected: None };
    assert_eq!(switch.members.due(now + Duration::from_secs(1)), [anybody(3), anybody(4)]);
}

#[test]
fn hints_of_ever_another_address_make_no_more_calls() {
    let mut mesh = Mesh::new(2);
    let (mut now, switch) = (mesh.now, &mut mesh.switches[1]);
    let told = switch.link_of(&name(1)).unwrap();
    let (mut calls, mut under_way) = (0, None);
    for round in 0..200 {
        let hint = Hint { host: name(7), address: address(10 + round % 2) };
        switch.handle_message(now, told, Message::Members(vec![hint])).unwrap();
        now = now + Duration::from_millis(50);
        if let Some(call) = under_way.take() {
            switch.handle_called(now, &call, None);
        }
        for call in switch.members.due(now) {
            assert!(under_way.is_none(), "called while a call is under way");
            calls += 1;
            under_way = Some(call);
        }
        assert_eq!(switch.members.due(now), [], "called twice at once");
    }
    // In 10 s: after 0.2, 0.4, 0.8, 1.6 s and then every 3 s.
    assert!((4..=8).contains(&calls), "{calls} calls");
}

#[test]
fn a_message_before_hello_and_a_false_name_end_the_connection() {
    let mut mesh = Mesh::new(2);
    let switch = &mut mesh.switches[0];
    switch.handle_connected(LinkId(900), (name(3), "d1".parse().unwrap()), address(3), false, drawn(900));
    let early = switch.handle_message(mesh.now, LinkId(900), Message::Leave);
    assert_eq!(early, Err("got a message before HELLO".into()));

    let hello = hello(2);
    let false_name = switch.handle_message(mesh.now, LinkId(900), Message::Hello(hello.clone()));
    assert!(false_name.unwrap_err().contains("the certificate says h3"));
    let newer = Hello { host: name(3), oldest: PROTOCOL + 1, newest: PROTOCOL + 2, ..hello.clone() };
    let refused = switch.handle_message(mesh.now, LinkId(900), Message::Hello(newer));
    assert!(refused.unwrap_err().contains("upgrade the older end"));
    let narrow = Hello { host: name(3), max_datagram: 44, ..hello.clone() };
    let refused = switch.handle_message(mesh.now, LinkId(900), Message::Hello(narrow));
    assert!(refused.unwrap_err().contains("got max-datagram 44, want 1232"));
    let sealed = Hello { host: name(3), offer: None, ..hello };
    let refused = switch.handle_message(mesh.now, LinkId(900), Message::Hello(sealed));
    assert!(refused.unwrap_err().contains("without an offer"));
}

#[test]
fn a_move_changes_the_tables_of_all_three() {
    let mut mesh = Mesh::new(3);
    let source = mesh.port(1, "a", Some(Ownership::Here { epoch: Epoch::FIRST }));
    mesh.port(2, "b", Some(Ownership::Arriving));
    let (Place::Port(at_source), true) = (mesh.network(1).owned[&MAC].at, source == PortId(1)) else { panic!() };
    assert_eq!(mesh.tables[0].ports[at_source.0 as usize].as_ref().unwrap().gate, Gate::Open);
    let third = mesh.network(3).owned[&MAC].at;

    assert_eq!(mesh.ask(1, SwitchRequest::MoveGrant { vni: vni(5), mac: MAC, to: name(2) }), Ok(SwitchReply::Done));
    let arriving = mesh.network(2).owned[&MAC].arriving.expect("takes what tunnels bring");
    assert_eq!(mesh.tables[1].ports[arriving.0 as usize].as_ref().unwrap().gate, Gate::Hold);
    assert_eq!(mesh.ask(1, SwitchRequest::MoveStopped { vni: vni(5), mac: MAC }), Ok(SwitchReply::Done));
    let fenced = mesh.network(1).owned[&MAC];
    assert!(fenced.forward_late && matches!(fenced.at, Place::Peer(_)));
    assert_eq!(mesh.tables[0].ports[at_source.0 as usize].as_ref().unwrap().gate, Gate::Closed);
    assert_eq!(mesh.ask(2, SwitchRequest::MoveRunning { vni: vni(5), mac: MAC }), Ok(SwitchReply::Done));

    assert_eq!(mesh.network(2).owned[&MAC].at, Place::Port(arriving));
    assert_eq!(mesh.tables[1].ports[arriving.0 as usize].as_ref().unwrap().gate, Gate::Open);
    assert_ne!(mesh.network(3).owned[&MAC].at, third);
    let Ok(SwitchReply::Move(seen)) = mesh.ask(1, SwitchRequest::MoveStatus { vni: vni(5), mac: MAC }) else { panic!() };
    assert_eq!((seen.state, seen.host), (MoveState::Gone, Some(name(2))));
    let states: Vec<_> = seen.entered.iter().map(|(state, _)| *state).collect();
    let wanted = [MoveState::Absent, MoveState::Owned, MoveState::Granted, MoveState::Fenced, MoveState::Gone];
    assert!(wanted.iter().all(|state| states.contains(state)), "{states:?}");
}

#[test]
fn a_request_about_a_move_is_answered_even_if_the_other_end_is_not() {
    let mut mesh = Mesh::new(2);
    mesh.port(1, "a", Some(Ownership::Here { epoch: Epoch::FIRST }));
    let unknown = mesh.ask(1, SwitchRequest::MoveGrant { vni: vni(5), mac: MAC, to: name(7) });
    assert!(unknown.unwrap_err().contains("not connected"));

    let ticket = Ticket(77);
    mesh.switches[0].handle_request(mesh.now, ticket, SwitchRequest::MoveGrant { vni: vni(5), mac: MAC, to: name(2) });
    mesh.now = mesh.now + WAIT;
    mesh.carry_out(0);

    let reply = mesh.answers.remove(&(0, 77)).expect("answered");
    assert!(reply.unwrap_err().contains("no answer from the other end"));
}

/// What switch `at` (from 1) knows of the MAC.
fn seen(mesh: &Mesh, at: usize) -> (MoveState, Epoch, Option<HostId>) {
    let seen = mesh.switches[at - 1].moves.seen((vni(5), MAC)).expect("known");
    (seen.state, seen.epoch, seen.host)
}

/// `from` says something to `to`; what that leads to is carried out.
fn say(mesh: &mut Mesh, from: usize, to: usize, message: Message) {
    let link = mesh.switches[to - 1].link_of(&name(from)).unwrap();
    mesh.switches[to - 1].handle_message(mesh.now, link, message).unwrap();
    mesh.settle();
}

/// A move from h1 to h3 while h2 speaks for others.
#[test]
fn a_peer_cannot_disown_or_release_for_another() {
    let mut mesh = Mesh::new(3);
    mesh.port(1, "a", Some(Ownership::Here { epoch: Epoch::FIRST }));
    let (owner, told) = (mesh.network(2).owned[&MAC], seen(&mesh, 2));
    let step = |moves, step| Message::Move { owned: OwnedAt { vni: vni(5), mac: MAC, epoch: Epoch::FIRST.after(moves) }, step };
    let disowned = |moves| Message::Disowned(OwnedAt { vni: vni(5), mac: MAC, epoch: Epoch::FIRST.after(moves) });
    say(&mut mesh, 3, 2, disowned(7));
    assert_eq!((mesh.network(2).owned[&MAC], seen(&mesh, 2)), (owner, told));

    mesh.port(3, "b", Some(Ownership::Arriving));
    assert_eq!(mesh.ask(1, SwitchRequest::MoveGrant { vni: vni(5), mac: MAC, to: name(3) }), Ok(SwitchReply::Done));
    let ends = (seen(&mesh, 1), seen(&mesh, 3));
    assert_eq!((ends.0.0, ends.1.0), (MoveState::Granted, MoveState::Prepared));
    let nothing = || String::new();
    for moves in [0, 1, 7] {
        say(&mut mesh, 2, 1, disowned(moves));
        say(&mut mesh, 2, 1, step(moves, Step::Released { why: nothing() }));
        say(&mut mesh, 2, 1, step(moves, Step::Unready { why: nothing() }));
        say(&mut mesh, 2, 3, disowned(moves));
        assert_eq!((seen(&mesh, 1), seen(&mesh, 3)), ends, "h2 said it of epoch {moves}");
    }
    for message in [step(1, Step::Fenced), step(1, Step::Release), step(7, Step::Released { why: nothing() })] {
        say(&mut mesh, 2, 3, message);
    }
    assert_eq!(mesh.switches[0].moves.outcome((vni(5), MAC), Until::Granted), Some(Ok(())));

    // The VM runs at h3. Had h2's word fenced the source, h3 would own at once.
    mesh.switches[2].handle_request(mesh.now, Ticket(99), SwitchRequest::MoveRunning { vni: vni(5), mac: MAC });
    assert_eq!(seen(&mesh, 3).0, MoveState::Prepared);
    mesh.settle();
    assert_eq!((seen(&mesh, 1).0, seen(&mesh, 3).0), (MoveState::Gone, MoveState::Owned));
}

#[test]
fn a_peer_neither_mutes_an_owner_in_the_name_of_another_nor_keeps_it_from_moving() {
    let mut mesh = Mesh::new(3);
    mesh.port(1, "a", Some(Ownership::Here { epoch: Epoch::FIRST }));
    let before = seen(&mesh, 1);
    let last = Epoch { incarnation: u32::MAX, moves: u32::MAX };
    let owned = OwnedAt { vni: vni(5), mac: MAC, epoch: last };
    // One that we are connected with, one that nobody knows, and the owner itself.
    for host in [name(3), name(77), name(1)] {
        say(&mut mesh, 2, 1, Message::Moved { owned, host });
        assert_eq!(seen(&mesh, 1), before);
    }
    say(&mut mesh, 2, 1, Message::Move { owned, step: Step::Grant { vm: "alpha-c1".parse().unwrap() } });
    assert_eq!(seen(&mesh, 1), before);

    mesh.port(3, "b", Some(Ownership::Arriving));
    assert_eq!(mesh.ask(1, SwitchRequest::MoveGrant { vni: vni(5), mac: MAC, to: name(3) }), Ok(SwitchReply::Done));
}

#[test]
fn macs_that_no_port_here_can_have_are_answered_for_and_not_remembered() {
    let mut mesh = Mesh::new(2);
    let link = mesh.switches[0].link_of(&name(2)).unwrap();
    let switch = &mut mesh.switches[0];
    let (foreign, group) = ((vni(9), MAC), (vni(5), MacAddr([3, 0, 0, 0, 0, 1])));
    let vm = || "alpha-c1".parse().unwrap();
    for (vni, mac) in [foreign, group] {
        let owned = OwnedAt { vni, mac, epoch: Epoch::FIRST };
        switch.handle_message(mesh.now, link, Message::Owned { all: false, macs: vec![owned] }).unwrap();
        for step in [Step::Grant { vm: vm() }, Step::Release, Step::Fence] {
            switch.handle_message(mesh.now, link, Message::Move { owned, step }).unwrap();
        }
    }

    let answers: Vec<_> = (switch.take_commands(mesh.now).into_iter())
        .filter_map(|command| match command {
            Command::Send { message: Message::Move { step, .. }, .. } => Some(step),
            _ => None,
        })
        .collect();
    assert!(matches!(&answers[..3], [Step::Unready { .. }, Step::Released { .. }, Step::Fenced]), "{answers:?}");
    assert_eq!((answers.len(), switch.refusals().macs), (6, 8));
    assert!([foreign, group].iter().all(|key| switch.moves.seen(*key).is_none()));
}

#[test]
fn every_mac_of_a_long_list_of_owned_ones_leaves_a_full_fdb() {
    let mut mesh = Mesh::new(2);
    let fdb = Arc::clone(&mesh.network(1).fdb);
    let numbered = |number: usize| MacAddr([2, 0, 0, 1, (number >> 8) as u8, number as u8]);
    for number in 0..8192 {
        fdb.learn(mesh.now, 0, numbered(number), Place::Port(PortSlot((number % 64) as u16)));
    }
    let before = fdb.len();
    let macs = (0..4096).map(|number| OwnedAt { vni: vni(5), mac: numbered(number), epoch: Epoch::FIRST }).collect();
    let link = mesh.switches[0].link_of(&name(2)).unwrap();

    mesh.switches[0].handle_message(mesh.now, link, Message::Owned { all: false, macs }).unwrap();

    assert_eq!(fdb.len(), before - 4096);
}

#[test]
fn an_announced_learned_mac_corrects_the_fdb_but_never_fills_it() {
    let mut mesh = Mesh::new(3);
    let port = mesh.port(1, "a", None);
    assert_eq!(port, PortId(1));
    let (slot, other) = (PortSlot(0), MacAddr([2, 0, 0, 0, 0, 2]));
    let fdb = Arc::clone(&mesh.network(1).fdb);
    fdb.learn(mesh.now, 0, MAC, Place::Port(slot));

    mesh.now = mesh.now + crate::fdb::SETTLE;
    for mac in [MAC, other] {
        mesh.switches[2].handle_worker(mesh.now, WorkerEvent::Learned { vni: vni(5), vid: 0, mac, port: slot });
    }
    mesh.settle();

    let ageing = Duration::from_secs(300);
    assert!(matches!(fdb.lookup(mesh.now, 0, MAC, ageing), Some(Place::Peer(_))));
    assert_eq!(fdb.lookup(mesh.now, 0, other, ageing), None);
}

#[test]
fn a_peer_that_stops_carrying_a_network_is_forgotten_there_and_teaches_nothing_of_it() {
    let mut mesh = Mesh::new(2);
    mesh.port(1, "a", None);
    let fdb = Arc::clone(&mesh.network(1).fdb);
    fdb.learn(mesh.now, 0, MAC, Place::Peer(mesh.network(1).peers[0]));

    mesh.ask(2, SwitchRequest::NetworkRemove { vni: vni(5) }).unwrap();
    assert!(fdb.is_empty(), "frames for it would be dropped until it has aged");

    fdb.learn(mesh.now, 0, MAC, Place::Port(PortSlot(0)));
    mesh.now = mesh.now + crate::fdb::SETTLE;
    let link = mesh.switches[0].link_of(&name(2)).unwrap();
    mesh.switches[0].handle_message(mesh.now, link, Message::Learned { vni: vni(5), vid: 0, mac: MAC }).unwrap();
    assert_eq!(fdb.lookup(mesh.now, 0, MAC, Duration::from_secs(300)), Some(Place::Port(PortSlot(0))));
}

#[test]
fn ports_and_networks_refuse_what_cannot_be() {
    let mut mesh = Mesh::new(1);
    mesh.port(1, "a", Some(Ownership::Arriving));
    let owned = Some(OwnedMac { mac: MAC, vm: "x-y".parse().unwrap(), ownership: Ownership::Arriving });
    let packet = |interface: &str| PortKind::Packet { interface: interface.into() };
    let cases = [
        (PortSpec { vni: vni(9), kind: packet("b"), owned: None }, "does not carry"),
        (PortSpec { vni: vni(5), kind: packet("a"), owned: None }, "port p1 has it"),
        (PortSpec { vni: vni(5), kind: packet("b"), owned }, "port p1 has it"),
        (PortSpec { vni: vni(5), kind: packet("a/../../b"), owned: None }, "want 1 to 15"),
        (PortSpec { vni: vni(5), kind: packet("a\"b"), owned: None }, "want 1 to 15"),
        (PortSpec { vni: vni(5), kind: packet(".."), owned: None }, "want 1 to 15"),
        (PortSpec { vni: vni(5), kind: packet("sixteen-letters-"), owned: None }, "want 1 to 15"),
    ];
    for (spec, wanted) in cases {
        let error = mesh.ask(1, SwitchRequest::PortAdd(spec)).unwrap_err();
        assert!(error.contains(wanted), "{error}");
    }
    let error = mesh.ask(1, SwitchRequest::NetworkRemove { vni: vni(5) }).unwrap_err();
    assert!(error.contains("has port p1"), "{error}");
    let error = mesh.ask(1, SwitchRequest::NetworkAdd(NetworkSpec { vni: vni(5), mtu: 9000, ageing_s: 300 })).unwrap_err();
    assert!(error.contains("remove its ports first"), "{error}");
    assert_eq!(mesh.ask(1, SwitchRequest::PortRemove { port: PortId(77) }), Ok(SwitchReply::Done));
}

#[test]
fn stations_of_a_port_that_is_gone_are_forgotten_where_they_are_still_thought_to_be_there() {
    let others: [MacAddr; 2] = [MacAddr([2, 0, 0, 0, 0, 2]), MacAddr([2, 0, 0, 0, 0, 3])];
    for removed in [true, false] {
        let mut mesh = Mesh::new(3);
        let (port, other) = (mesh.port(1, "a", None), mesh.port(1, "b", None));
        let fdbs: Vec<_> = (1..=3).map(|at| Arc::clone(&mesh.network(at).fdb)).collect();
        let place = |mesh: &Mesh, at: usize, of: usize| {
            let slot = mesh.tables[at - 1].peers.iter().position(|peer| peer.as_ref().is_some_and(|peer| peer.host == name(of)));
            Place::Peer(PeerSlot(slot.unwrap() as u16))
        };
        let (h1, h3) = (place(&mesh, 2, 1), place(&mesh, 2, 3));
        // One at the port, one beside it, one that has been heard at h3 since.
        fdbs[0].learn(mesh.now, 7, MAC, Place::Port(PortSlot(0)));
        fdbs[0].learn(mesh.now, 0, others[0], Place::Port(PortSlot(1)));
        fdbs[0].learn(mesh.now, 0, others[1], Place::Port(PortSlot(0)));
        for (vid, mac, at) in [(7, MAC, h1), (0, MAC, h1), (0, others[0], h1), (0, others[1], h3)] {
            fdbs[1].learn(mesh.now, vid, mac, at);
        }

        if removed {
            mesh.ask(1, SwitchRequest::PortRemove { port }).unwrap();
        } else {
            mesh.switches[0].handle_worker(mesh.now, WorkerEvent::Lost { port: PortSlot(0), id: port });
            // Not what came to its place meanwhile.
            mesh.switches[0].handle_worker(mesh.now, WorkerEvent::Lost { port: PortSlot(1), id: port });
        }
        mesh.settle();

        let known = |at: usize| fdbs[at - 1].entries().into_iter().map(|row| (row.vid, row.mac, row.place)).collect::<Vec<_>>();
        assert_eq!(known(1), [(0, others[0], Place::Port(PortSlot(1)))], "removed: {removed}");
        assert_eq!(known(2), [(0, MAC, h1), (0, others[0], h1), (0, others[1], h3)], "removed: {removed}");
        assert_eq!(other, PortId(2));
    }
}

#[test]
fn a_peer_that_does_not_know_how_to_forget_is_not_told() {
    let mut mesh = Mesh::new(1);
    let port = mesh.port(1, "a", None);
    for (number, link, features) in [(2, LinkId(2), 0), (3, LinkId(3), feature::FORGET)] {
        mesh.switches[0].handle_connected(link, (name(number), "d1".parse().unwrap()), address(number), false, drawn(link.0));
        let hello = Hello { features, networks: vec![vni(5)], ..hello(number) };
        mesh.switches[0].handle_message(mesh.now, link, Message::Hello(hello)).unwrap();
    }
    mesh.switches[0].take_commands(mesh.now);
    mesh.network(1).fdb.learn(mesh.now, 0, MAC, Place::Port(PortSlot(0)));

    mesh.switches[0].port_remove(mesh.now, port);

    let told = mesh.switches[0].take_commands(mesh.now).into_iter().filter_map(|command| match command {
        Command::Send { link, message: Message::Forgotten { stations, .. } } => Some((link, stations)),
        _ => None,
    });
    assert_eq!(told.collect::<Vec<_>>(), [(LinkId(3), vec![(0, MAC)])]);
}

#[test]
fn an_idle_switch_is_not_told_the_time() {
    let mut mesh = Mesh::new(3);
    mesh.port(1, "a", None);
    mesh.run(Duration::from_secs(10));
    assert_eq!(mesh.looks(Duration::from_secs(600)), 0);
}
