//! The data plane as the control side sees it: a handle to the worker's thread.

use crate::counters::Counters;
use crate::io::needs::Needs;
use crate::io::nft::{Keeping, Watch};
use crate::io::ports::{self, Look, Ports};
use crate::io::pump::{Command, Outside, Pump};
use crate::io::udp::Mesh;
use crate::switch::{Expecting, Nic};
use crate::tables::{Forwarding, PortSlot, WorkerEvent};
use crate::traffic::Traffic;
use crate::worker::Worker;
use arc_swap::ArcSwap;
use bytes::Bytes;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::sync::mpsc::Sender;
use violin_common::PortId;
use violin_common::api::switch::{PortConditionSeen, PortKind, TrafficSeen};

pub use crate::port::AttachError;

/// How long a detach waits for the worker.
const DETACH: Duration = Duration::from_secs(2);

/// A datagram on the mesh port that is QUIC's; segments of a coalesced read come one by one.
#[derive(Debug, Clone)]
pub struct QuicDatagram {
    /// Who sent it.
    pub from: SocketAddr,
    /// To which of our addresses, where the mesh port has several.
    pub to: Option<IpAddr>,
    /// Its UDP payload.
    pub bytes: Bytes,
}

/// The way to the worker's thread.
#[derive(Debug, Clone)]
pub(crate) struct Line {
    commands: mpsc::Sender<Command>,
    wake: Arc<EventFd>,
}

impl Line {
    pub(crate) fn say(&self, command: Command) {
        let _ = self.commands.send(command);
        self.wake();
    }

    fn wake(&self) {
        // Fails only when the counter is full, and then the worker wakes anyway.
        let _ = self.wake.write(1);
    }
}

/// Held by a thread the switch cannot do without: tells when it ends, in a panic too.
#[derive(Debug)]
pub struct Alive(Arc<Notify>);

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

/// Owns the worker's thread, which owns the ports and reads the mesh port. Dropping it stops the thread; guards stay.
#[derive(Debug)]
pub struct DataPlane {
    line: Line,
    ports: Arc<Mutex<Ports>>,
    look: mpsc::Sender<Look>,
    traffic: Arc<Traffic>,
    thread: Option<JoinHandle<()>>,
    ended: Arc<Notify>,
    /// Ends the thread that watches guards.
    watching: Arc<EventFd>,
}

impl DataPlane {
    /// Starts the worker on the mesh port, which it shares with QUIC: the worker alone reads, both may send.
    ///
    /// The socket becomes non-blocking; UDP_GRO is switched on where the kernel has it. `events` and `quic` are written
    /// with `try_send`: what does not fit is lost and counted. Interfaces are looked for in the network namespace of the
    /// calling thread.
    pub fn start(
        socket: UdpSocket,
        tables: Arc<ArcSwap<Forwarding>>,
        counters: Arc<Counters>,
        events: Sender<WorkerEvent>,
        quic: Sender<QuicDatagram>,
    ) -> io::Result<Self> {
        Self::start_keeping(Keeping::Owned, socket, tables, counters, events, quic)
    }

    /// Likewise, and says how guards are to be kept.
    pub fn start_keeping(
        keeping: Keeping,
        socket: UdpSocket,
        tables: Arc<ArcSwap<Forwarding>>,
        counters: Arc<Counters>,
        events: Sender<WorkerEvent>,
        quic: Sender<QuicDatagram>,
    ) -> io::Result<Self> {
        let (commands, receiver) = mpsc::channel();
        let (lost, losses) = mpsc::channel();
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let traffic = Arc::new(Traffic::default());
        let mesh = Mesh::new(socket, counters.clone())?;
        let worker = Worker::new(counters.clone(), traffic.clone());
        let losses_told = events.clone();
        let outside_tables = Arc::clone(&tables);
        let outside = Outside { tables, counters, events, quic, commands: receiver, wake: wake.clone(), lost: lost.clone() };
        let pump = Pump::new(mesh, worker, outside)?;
        let ended = Arc::new(Notify::new());
        let alive = || Alive(Arc::clone(&ended));
        let (working, looking, watched) = (alive(), alive(), alive());
        let thread = Builder::new().name("worker".into()).spawn(move || {
            let _working = working;
            pump.run();
        })?;

        let line = Line { commands, wake };
        let ports = Arc::new(Mutex::new(Ports::new(keeping, Arc::clone(&outside_tables))));
        let (looking_line, looking_ports) = (line.clone(), ports.clone());
        // Ends with the worker and the handle, which hold the other ends of `losses`.
        Builder::new().name("ports".into()).spawn(move || {
            let _looking = looking;
            ports::look_for_lost(&losses, &looking_line, &looking_ports, &losses_told);
        })?;
        let watching = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let (watching_line, watching_ports, end) = (line.clone(), ports.clone(), watching.clone());
        // A kernel without nf_tables has no guards to watch: packet ports are refused there.
        if let Ok(watch) = Watch::open() {
            Builder::new().name("guards".into()).spawn(move || {
                let _watched = watched;
                ports::watch_guards(watch, &end, &watching_line, &watching_ports);
            })?;
        }
        Ok(Self { line, ports, look: lost, traffic, thread: Some(thread), ended, watching })
    }

    /// For another thread without which nothing goes on: it ends, [`Self::ended`] tells.
    pub fn alive(&self) -> Alive {
        Alive(Arc::clone(&self.ended))
    }

    /// Returns when a thread of the data plane has ended although nobody asked: nothing is forwarded any more.
    pub async fn ended(&self) {
        self.ended.notified().await;
    }

    /// Opens what the port is attached to and hands it to the worker. The port must be in the published tables by then, or
    /// frames for it are refused.
    ///
    /// Blocks for some milliseconds (guard), so call it where blocking is allowed. An interface
    /// that vanishes later is looked for again until the port is detached. What may come later, by `expecting`, is looked for
    /// from [`Self::look_for`] on; frames for the port wait meanwhile, bounded, while its gate is not closed.
    pub fn attach(&self, slot: PortSlot, id: PortId, kind: &PortKind, nic: Nic, expecting: Expecting) -> Result<(), AttachError> {
        let mut ports = ports::lock(&self.ports);
        let io = ports.attach((slot, id), kind, nic, expecting)?;
        self.line.say(Command::Attach(slot, id, io));
        Ok(())
    }

    /// Looks for what a port waits for until it is there or the port is detached.
    pub fn look_for(&self, slot: PortSlot, id: PortId) {
        let _ = self.look.send(Look::Expected((slot, id)));
    }

    /// Lets go of a port and undoes what attaching did to its interface; an interface that is gone is no error. With `keep`
    /// an interface that was made for the port stays.
    pub fn detach(&self, slot: PortSlot, id: PortId, keep: bool) {
        let known = ports::lock(&self.ports).forget((slot, id));
        let (done, finished) = mpsc::channel();
        self.line.say(Command::Detach(slot, id, done));
        let _ = finished.recv_timeout(DETACH);
        if let Some(kind) = known {
            ports::lock(&self.ports).undo(&kind, keep);
        }
    }

    /// Says what the host itself needs interfaces for. Ports that were refused for it are tried again.
    pub fn set_needs(&self, needs: Needs) {
        for key in ports::lock(&self.ports).set_needs(needs) {
            let _ = self.look.send(Look::Again(key));
        }
    }

    /// How each port is.
    pub fn conditions(&self) -> Vec<PortConditionSeen> {
        ports::lock(&self.ports).conditions()
    }

    /// Looks whether all guards stand, and puts back what is missing.
    pub fn check_guards(&self) {
        ports::lock(&self.ports).check_guards(&self.line);
    }

    /// Tells the worker that new tables were published, so that frames on hold move at once.
    pub fn wake(&self) {
        self.line.wake();
    }

    /// Sends a token in a session to an address; an answer is a [`WorkerEvent::Answered`].
    pub fn challenge(&self, session: u32, to: SocketAddr, token: u64) {
        self.line.say(Command::Challenge(session, to, token));
    }

    /// What each pair of MACs exchanged, as seen where it entered; bounded, pairs with least bytes are forgotten first.
    pub fn traffic(&self) -> Vec<TrafficSeen> {
        self.traffic.snapshot()
    }
}

impl Drop for DataPlane {
    fn drop(&mut self) {
        self.line.say(Command::Stop);
        let _ = self.watching.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dataplane() -> DataPlane {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let (events, quic) = (tokio::sync::mpsc::channel(1).0, tokio::sync::mpsc::channel(1).0);
        DataPlane::start(socket, Arc::default(), Arc::default(), events, quic).unwrap()
    }

    async fn notices(dataplane: &DataPlane) -> bool {
        tokio::time::timeout(Duration::from_secs(120), dataplane.ended()).await.is_ok()
    }

    #[tokio::test]
    async fn a_worker_that_ends_by_itself_is_noticed() {
        let dataplane = dataplane();
        dataplane.line.say(Command::Stop);
        assert!(notices(&dataplane).await);
    }

    #[tokio::test]
    async fn a_thread_that_panics_is_noticed() {
        let dataplane = dataplane();
        let alive = dataplane.alive();
        let thread = std::thread::spawn(move || {
            let _alive = alive;
            panic!("as a test");
        });
        assert!(thread.join().is_err() && notices(&dataplane).await);
    }
}
