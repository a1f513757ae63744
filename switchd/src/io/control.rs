//! The actor that owns the [`Switch`]: everything that happens becomes an [`Input`], its commands are carried out here.
//!
//! One task a connection reads messages, another writes them; both speak with the actor over channels. A peer that does
//! not keep up with what it is told loses its connection and is told all again on the next.

use super::attach::{Attach, Work};
use super::dataplane::DataPlane;
use super::{now, random, route};
use crate::members::{Call, Ends, LinkId, Told, Via};
use crate::seal::schedule::{SECRET_LEN, Secret};
use crate::switch::{Command, Switch, Ticket, Wanted};
use crate::tables::{Forwarding, WorkerEvent};
use arc_swap::ArcSwap;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use violin_channel::frame::{self, FrameError};
use violin_channel::quic::{self, Endpoint, QuicError};
use violin_channel::tls::Identity;
use violin_common::PortId;
use violin_common::api::switch::{Counter, SwitchReply, SwitchRequest};
use violin_common::control::mesh::Message;

/// Messages that may wait for one peer.
const OUTBOX: usize = 1024;
/// Messages of all peers that may wait for the actor.
const INBOX: usize = 1024;
/// Longest sleep while there are peers: whether a connection has wandered is only seen by looking.
const LOOK: Duration = Duration::from_secs(1);
/// Shortest sleep: nothing the switch asks for is more urgent.
const SHORTEST: Duration = Duration::from_millis(5);
/// Longest sleep at all.
const SLEEP: Duration = Duration::from_secs(3600);
/// How long either end may take to open the stream and send its HELLO.
const GREETING: Duration = Duration::from_secs(5);

/// What a request is answered with.
pub type Reply = Result<SwitchReply, String>;

/// What happens outside the switch and the peers.
#[derive(Debug)]
pub enum Input {
    /// A request of the local socket.
    Request(SwitchRequest, oneshot::Sender<Reply>),
    /// Attaching has ended.
    Attached {
        /// Which.
        id: PortId,
        /// How.
        result: Result<(), String>,
    },
    /// What the configuration file wants: networks and ports, what to remove first, and whom to join.
    Configure(Box<Wanted>),
    /// The daemon ends; answered when the tables are empty and peers have been told.
    Drain(oneshot::Sender<()>),
}

enum LinkEvent {
    Called(Call, Result<(quinn::Connection, Identity), QuicError>),
    Admitted(quinn::Connection, Identity),
    Message(LinkId, Box<Message>),
    Closed(LinkId, String),
    /// The other end refuses us; `Closed` follows.
    Refused(LinkId, String),
    /// The other end was heard.
    Answers(LinkId),
}

struct Peer {
    connection: quinn::Connection,
    outbox: mpsc::Sender<Message>,
    /// Where it was last seen.
    address: SocketAddr,
}

/// As the data plane sees it: an IPv4 member of an IPv6 port has a mapped address in quinn only.
fn canonical(address: SocketAddr) -> SocketAddr {
    (address.ip().to_canonical(), address.port()).into()
}

/// Control messages and connections that were refused.
#[derive(Debug, Default)]
pub struct ControlCounters {
    malformed: AtomicU64,
    refused_callers: AtomicU64,
    protocol: AtomicU64,
    outbox_full: AtomicU64,
    learned_heard: AtomicU64,
    hints_refused: AtomicU64,
    macs_refused: AtomicU64,
    twins_refused: AtomicU64,
}

impl ControlCounters {
    /// All counters with their names.
    pub fn snapshot(&self) -> Vec<Counter> {
        let named = [
            ("control.malformed", &self.malformed),
            ("control.refused-callers", &self.refused_callers),
            ("control.protocol-errors", &self.protocol),
            ("control.outbox-full", &self.outbox_full),
            ("control.learned-heard", &self.learned_heard),
            ("control.hints-refused", &self.hints_refused),
            ("control.macs-refused", &self.macs_refused),
            ("control.twins-refused", &self.twins_refused),
        ];
        named.map(|(name, counter)| Counter { name: name.into(), value: counter.load(Ordering::Relaxed) }).into()
    }
}

/// What the actor works with.
#[derive(Debug)]
pub struct Parts {
    /// The switch.
    pub switch: Switch,
    /// Its QUIC endpoint.
    pub endpoint: Endpoint,
    /// Its data plane.
    pub dataplane: Arc<DataPlane>,
    /// What the workers read.
    pub tables: Arc<ArcSwap<Forwarding>>,
    /// Who attaches ports.
    pub attach: std::sync::mpsc::Sender<Work>,
    /// What is counted here.
    pub counters: Arc<ControlCounters>,
    /// Where it listens, if at one address.
    pub listen: Option<IpAddr>,
    /// Whether data may go plain anywhere.
    pub speaks_plain: bool,
}

struct Actor {
    parts: Parts,
    peers: HashMap<LinkId, Peer>,
    next_link: u64,
    tickets: HashMap<Ticket, oneshot::Sender<Reply>>,
    next_ticket: u64,
    events: mpsc::Sender<LinkEvent>,
}

/// Runs the switch until it has been drained.
pub async fn run(parts: Parts, mut inputs: mpsc::UnboundedReceiver<Input>, mut worker_events: mpsc::Receiver<WorkerEvent>) {
    let (events, mut link_events) = mpsc::channel(INBOX);
    tokio::spawn(admit_callers(parts.endpoint.clone(), events.clone(), Arc::clone(&parts.counters)));
    let (peers, tickets) = (HashMap::new(), HashMap::new());
    let mut actor = Actor { parts, peers, next_link: 0, tickets, next_ticket: 0, events };
    loop {
        let sleep = actor.sleep();
        tokio::select! {
            // Requests first: a VM waits behind them. What guests can cause comes last.
            biased;
            Some(input) = inputs.recv() => {
                if let Some(done) = actor.input(input) {
                    actor.drain().await;
                    let _ = done.send(());
                    return;
                }
            }
            () = tokio::time::sleep(sleep) => {
                actor.look_for_migrations();
                actor.parts.switch.handle_timeout(now());
            }
            Some(event) = link_events.recv() => actor.link_event(event),
            Some(event) = worker_events.recv() => actor.parts.switch.handle_worker(now(), event),
        }
        actor.carry_out();
    }
}

async fn admit_callers(endpoint: Endpoint, events: mpsc::Sender<LinkEvent>, counters: Arc<ControlCounters>) {
    let refused = move || _ = counters.refused_callers.fetch_add(1, Ordering::Relaxed);
    let admitted = move |connection, who| {
        let events = events.clone();
        async move { drop(events.send(LinkEvent::Admitted(connection, who)).await) }
    };
    endpoint.serve(refused, admitted).await;
}

impl Actor {
    /// How long nothing is due.
    fn sleep(&self) -> Duration {
        let now = now();
        let longest = if self.peers.is_empty() { SLEEP } else { LOOK };
        self.parts.switch.poll_timeout().map_or(longest, |due| due.since(now).clamp(SHORTEST, longest))
    }

    fn input(&mut self, input: Input) -> Option<oneshot::Sender<()>> {
        match input {
            Input::Request(request, reply) => {
                let ticket = Ticket(self.next_ticket);
                self.next_ticket += 1;
                self.tickets.insert(ticket, reply);
                self.parts.switch.handle_request(now(), ticket, request);
            }
            Input::Attached { id, result } => self.parts.switch.handle_attached(now(), id, result),
            Input::Configure(wanted) => self.parts.switch.handle_config(now(), *wanted),
            Input::Drain(done) => return Some(done),
        }
        None
    }

    fn link_event(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Called(call, result) => {
                let failed = match &result {
                    Ok(_) => None,
                    Err(QuicError::Silent { .. }) => Some(Told::NoAnswer("no answer".into())),
                    Err(error) => Some(Told::Refused(error.to_string())),
                };
                self.parts.switch.handle_called(now(), &call, failed.as_ref());
                match result {
                    Ok((connection, who)) => self.link(connection, who, true),
                    Err(why) => tracing::debug!(address = %call.address, %why, "call failed"),
                }
            }
            LinkEvent::Admitted(connection, who) => self.link(connection, who, false),
            LinkEvent::Message(link, message) => {
                if matches!(*message, Message::Learned { .. }) {
                    self.parts.counters.learned_heard.fetch_add(1, Ordering::Relaxed);
                }
                if let Err(why) = self.parts.switch.handle_message(now(), link, *message) {
                    self.parts.counters.protocol.fetch_add(1, Ordering::Relaxed);
                    tracing::debug!(?link, %why, "connection refused");
                }
            }
            LinkEvent::Refused(link, why) => self.parts.switch.handle_refused(now(), link, &why),
            LinkEvent::Answers(link) => self.parts.switch.handle_answers(now(), link),
            LinkEvent::Closed(link, why) => {
                if let Some(peer) = self.peers.remove(&link) {
                    tracing::debug!(?link, peer = %peer.connection.remote_address(), %why, "connection closed");
                }
                self.parts.switch.handle_closed(now(), link);
            }
        }
    }

    fn link(&mut self, connection: quinn::Connection, who: Identity, called: bool) {
        let link = LinkId(self.next_link);
        self.next_link += 1;
        let (outbox, messages) = mpsc::channel(OUTBOX);
        let remote = connection.remote_address();
        let theirs = canonical(remote);
        let ours = connection.local_ip().map(|ip| ip.to_canonical());
        let via = if self.parts.speaks_plain { self.via(ours, theirs) } else { None };
        let ends = Ends { theirs, ours, via };
        let drawn = match random::drawn() {
            Ok(drawn) => drawn,
            Err(error) => {
                tracing::error!(%error, "no random numbers: the connection is given up");
                return connection.close(quinn::VarInt::from_u32(1), b"no random numbers here");
            }
        };
        let exchange =
            exchange(connection.clone(), called, link, messages, self.events.clone(), Arc::clone(&self.parts.counters));
        tokio::spawn(exchange);
        self.peers.insert(link, Peer { connection, outbox, address: theirs });
        self.parts.switch.handle_connected(link, (who.host, who.domain), ends, called, drawn);
    }

    /// The underlay interface that leads to a peer.
    fn via(&self, ours: Option<IpAddr>, theirs: SocketAddr) -> Option<Via> {
        match route::towards(ours.or(self.parts.listen), theirs.ip()) {
            Ok(via) => via,
            Err(error) => {
                tracing::warn!(%error, peer = %theirs, "cannot find out which interface leads there: its data is sealed");
                None
            }
        }
    }

    /// A connection whose peer has wandered is followed by quinn, which has validated the new path.
    fn look_for_migrations(&mut self) {
        for (link, peer) in &mut self.peers {
            let address = canonical(peer.connection.remote_address());
            if std::mem::replace(&mut peer.address, address) != address {
                self.parts.switch.handle_migrated(*link, address);
            }
        }
    }

    /// The secret of a connection's data.
    fn export(&self, link: LinkId, context: &[u8]) -> Option<Secret> {
        let mut secret = [0; SECRET_LEN];
        self.peers.get(&link)?.connection.export_keying_material(&mut secret, b"violin mesh data", context).ok()?;
        Some(Secret::new(secret))
    }

    /// Carries out what the switch wants until it wants nothing more.
    fn carry_out(&mut self) {
        loop {
            let commands = self.parts.switch.take_commands(now());
            if commands.is_empty() {
                break;
            }
            self.carry_out_these(commands);
        }
    }

    fn carry_out_these(&mut self, commands: Vec<Command>) {
        let refused = self.parts.switch.refusals();
        self.parts.counters.hints_refused.store(refused.hints, Ordering::Relaxed);
        self.parts.counters.macs_refused.store(refused.macs, Ordering::Relaxed);
        self.parts.counters.twins_refused.store(refused.twins, Ordering::Relaxed);
        for command in commands {
            match command {
                Command::Publish(tables) => {
                    self.parts.tables.store(Arc::new(*tables));
                    self.parts.dataplane.wake();
                }
                Command::Attach { slot, id, kind, nic, expecting } => {
                    let _ = self.parts.attach.send(Work::Attach(Attach { slot, id, kind, nic, expecting }));
                }
                Command::Detach { slot, id, keep } => drop(self.parts.attach.send(Work::Detach { slot, id, keep })),
                Command::Call(call) => {
                    let (endpoint, events) = (self.parts.endpoint.clone(), self.events.clone());
                    tokio::spawn(async move {
                        let result = endpoint.connect(call.address, call.expected.as_ref()).await;
                        let _ = events.send(LinkEvent::Called(call, result)).await;
                    });
                }
                Command::Send { link, message } => {
                    let Some(peer) = self.peers.get(&link) else { continue };
                    if matches!(message, Message::Learned { .. }) && peer.outbox.capacity() < OUTBOX / 2 {
                        // Guests can cause these at will; a flood will correct the peer's FDB instead.
                        continue;
                    }
                    if let Err(mpsc::error::TrySendError::Full(_)) = peer.outbox.try_send(message) {
                        self.parts.counters.outbox_full.fetch_add(1, Ordering::Relaxed);
                        peer.connection.close(quinn::VarInt::from_u32(2), b"you do not keep up");
                    }
                }
                Command::Close { link, why, refused } => match self.peers.get(&link) {
                    Some(peer) if refused => quic::refuse(&peer.connection, &why),
                    Some(peer) => peer.connection.close(quinn::VarInt::from_u32(1), why.as_bytes()),
                    None => {}
                },
                Command::Watch { link } => {
                    let Some(connection) = self.peers.get(&link).map(|peer| peer.connection.clone()) else { continue };
                    let events = self.events.clone();
                    tokio::spawn(async move {
                        if quic::answers(&connection).await {
                            let _ = events.send(LinkEvent::Answers(link)).await;
                        }
                    });
                }
                Command::Export { link, context } => match self.export(link, &context.0) {
                    Some(secret) => self.parts.switch.handle_secret(now(), link, &secret),
                    None => tracing::debug!(?link, "no secret: the connection is gone"),
                },
                Command::Challenge { session, to } => match random::number() {
                    Ok(token) => {
                        self.parts.switch.handle_challenged(now(), session, to, token);
                        self.parts.dataplane.challenge(session, to, token);
                    }
                    Err(error) => tracing::error!(%error, "no random numbers: a peer is not followed"),
                },
                Command::Answer { ticket, reply } => {
                    if let Some(sender) = self.tickets.remove(&ticket) {
                        let _ = sender.send(self.complete(reply));
                    }
                }
            }
        }
    }

    /// Adds what only connections know.
    fn complete(&self, mut reply: Reply) -> Reply {
        if let Ok(SwitchReply::Peers(seen)) = &mut reply {
            for peer in seen {
                let link = peer.host.as_ref().filter(|_| peer.connected).and_then(|host| self.parts.switch.link_of(host));
                peer.rtt_ms = link.and_then(|link| self.peers.get(&link)).map(|link| link.connection.rtt().as_secs_f64() * 1e3);
            }
        }
        reply
    }

    async fn drain(&mut self) {
        self.parts.switch.handle_drain();
        self.carry_out();
        // Each writer ends when its outbox is dropped and finishes its stream, so LEAVE is out before the close.
        let peers = std::mem::take(&mut self.peers);
        let mut told = Vec::new();
        for (_, peer) in peers {
            drop(peer.outbox);
            told.push(peer.connection);
        }
        let all_gone = async {
            for connection in &told {
                connection.closed().await;
            }
        };
        // A peer closes the connection when it has read LEAVE; one that does not answer is not waited for.
        let _ = tokio::time::timeout(Duration::from_millis(500), all_gone).await;
    }
}

/// Speaks with one peer until either end is done.
async fn exchange(
    connection: quinn::Connection,
    called: bool,
    link: LinkId,
    mut messages: mpsc::Receiver<Message>,
    events: mpsc::Sender<LinkEvent>,
    counters: Arc<ControlCounters>,
) {
    let stream = async { if called { connection.open_bi().await } else { connection.accept_bi().await } };
    let (mut out, mut inn) = match tokio::time::timeout(GREETING, stream).await {
        Ok(Ok(streams)) => streams,
        Ok(Err(error)) => {
            if let Some(words) = quic::refusal(&connection) {
                let _ = events.send(LinkEvent::Refused(link, words)).await;
            }
            return drop(events.send(LinkEvent::Closed(link, error.to_string())).await);
        }
        Err(_) => {
            connection.close(quinn::VarInt::from_u32(1), b"no stream opened in time");
            return drop(events.send(LinkEvent::Closed(link, "no stream opened in time".into())).await);
        }
    };
    let writing = tokio::spawn(async move {
        while let Some(message) = messages.recv().await {
            if let Err(error) = frame::send(&mut out, &message).await {
                tracing::debug!(%error, "could not send");
                return;
            }
        }
        let _ = out.finish();
        let _ = out.stopped().await;
    });
    let mut greeted = false;
    let why = loop {
        let next = frame::recv::<Message>(&mut inn);
        let received = if greeted {
            next.await
        } else {
            tokio::time::timeout(GREETING, next).await.unwrap_or_else(|_| Err(FrameError::Broken("no HELLO in time".into())))
        };
        match received {
            Ok(Some(message)) => {
                greeted = true;
                if events.send(LinkEvent::Message(link, Box::new(message))).await.is_err() {
                    break "we end".to_owned();
                }
            }
            Ok(None) => break "the peer has finished".to_owned(),
            Err(error) => {
                if matches!(error, FrameError::TooLong(_) | FrameError::Malformed { .. } | FrameError::Cut) {
                    counters.malformed.fetch_add(1, Ordering::Relaxed);
                }
                break error.to_string();
            }
        }
    };
    // Before we close it too, or that would be the reason.
    let refusal = quic::refusal(&connection);
    connection.close(quinn::VarInt::from_u32(1), why.as_bytes());
    writing.abort();
    if let Some(words) = refusal {
        let _ = events.send(LinkEvent::Refused(link, words)).await;
    }
    let _ = events.send(LinkEvent::Closed(link, why)).await;
}
