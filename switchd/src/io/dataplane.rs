//! The data plane as the control side sees it: a handle to the worker's thread.

use crate::counters::Counters;
use crate::io::guard;
use crate::io::pump::{Command, Outside, Pump};
use crate::io::udp::Mesh;
use crate::port::{self, PortIo};
use crate::tables::{Forwarding, PortSlot, WorkerEvent};
use crate::traffic::Traffic;
use crate::worker::Worker;
use arc_swap::ArcSwap;
use bytes::Bytes;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::sync::mpsc::Sender;
use violin_common::PortId;
use violin_common::api::switch::{PortKind, TrafficSeen};

pub use crate::port::AttachError;

/// How often a lost interface is looked for at first, and for how many times.
const LOOK_SOON: (Duration, u32) = (Duration::from_millis(2), 2500);
/// How often afterwards.
const LOOK_LATER: Duration = Duration::from_millis(100);
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

type Key = (PortSlot, PortId);

/// Ports that are to be open, and what is known of interfaces still on their way.
///
/// Locked over the whole of an opening and of an undoing: a guard put in place while another thread takes it away would
/// leave a port open without one.
#[derive(Debug, Default)]
struct Wanted {
    ports: HashMap<Key, (PortKind, u16)>,
    /// Interface → whether its guard could be put in place before it existed.
    ahead: HashMap<String, bool>,
}

fn lock(wanted: &Mutex<Wanted>) -> MutexGuard<'_, Wanted> {
    wanted.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Wanted {
    /// Opens a port. The first time an interface that is `expected` is not there, the guard is put in place ahead of it where the kernel can
    /// do that: it saves the time when the guest arrives, and leaves no moment unguarded.
    fn open(&mut self, kind: &PortKind, mtu: u16, expected: bool) -> Result<Box<dyn PortIo>, AttachError> {
        let PortKind::Packet { interface } = kind else { return port::open(kind, mtu, false) };
        let ahead = self.ahead.get(interface).copied();
        let opened = port::open(kind, mtu, ahead == Some(true));
        if let (true, Err(AttachError::NotThere(_)), None) = (expected, &opened, ahead) {
            let holds = guard::drop_all(interface);
            tracing::debug!(interface, ?holds, "guard ahead of the interface");
            self.ahead.insert(interface.clone(), holds.is_ok());
        }
        opened
    }

    fn undo(&mut self, kind: &PortKind) {
        if let PortKind::Packet { interface } = kind {
            self.ahead.remove(interface);
        }
        port::undo(kind);
    }
}

/// The way to the worker's thread.
#[derive(Debug, Clone)]
struct Line {
    commands: mpsc::Sender<Command>,
    wake: Arc<EventFd>,
}

impl Line {
    fn say(&self, command: Command) {
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
    wanted: Arc<Mutex<Wanted>>,
    traffic: Arc<Traffic>,
    thread: Option<JoinHandle<()>>,
    ended: Arc<Notify>,
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
        let (commands, receiver) = mpsc::channel();
        let (lost, losses) = mpsc::channel();
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let traffic = Arc::new(Traffic::default());
        let mesh = Mesh::new(socket, counters.clone())?;
        let worker = Worker::new(counters.clone(), traffic.clone());
        let outside = Outside { tables, counters, events, quic, commands: receiver, wake: wake.clone(), lost };
        let pump = Pump::new(mesh, worker, outside)?;
        let ended = Arc::new(Notify::new());
        let (working, looking) = (Alive(Arc::clone(&ended)), Alive(Arc::clone(&ended)));
        let thread = Builder::new().name("worker".into()).spawn(move || {
            let _working = working;
            pump.run();
        })?;

        let line = Line { commands, wake };
        let wanted = Arc::new(Mutex::new(Wanted::default()));
        let (looking_line, looking_wanted) = (line.clone(), wanted.clone());
        // Ends when the worker does, which holds the other end of `losses`.
        Builder::new().name("ports".into()).spawn(move || {
            let _looking = looking;
            look_for_lost(&losses, &looking_line, &looking_wanted);
        })?;
        Ok(Self { line, wanted, traffic, thread: Some(thread), ended })
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
    /// `mtu` is the network's. Blocks for some milliseconds (guard), so call it where blocking is allowed. An interface
    /// that vanishes later is looked for again until the port is detached. `arriving`: the interface may come later with
    /// its guest; [`AttachError::NotThere`] is then expected, and frames for the port wait, bounded, while its gate is not
    /// closed.
    pub fn attach(&self, slot: PortSlot, id: PortId, kind: &PortKind, mtu: u16, arriving: bool) -> Result<(), AttachError> {
        let mut wanted = lock(&self.wanted);
        let opened = wanted.open(kind, mtu, arriving);
        if arriving || !matches!(opened, Err(AttachError::NotThere(_) | AttachError::BadName(_))) {
            // Also when it has yet to arrive or was not taken: a detach must undo the guard.
            wanted.ports.insert((slot, id), (kind.clone(), mtu));
        }
        let io = opened?;
        self.line.say(Command::Attach(slot, id, io));
        Ok(())
    }

    /// Lets go of a port and undoes what attaching did to its interface; an interface that is gone is no error.
    pub fn detach(&self, slot: PortSlot, id: PortId) {
        let known = lock(&self.wanted).ports.remove(&(slot, id));
        let (done, finished) = mpsc::channel();
        self.line.say(Command::Detach(slot, id, done));
        let _ = finished.recv_timeout(DETACH);
        if let Some((kind, _)) = known {
            lock(&self.wanted).undo(&kind);
        }
    }

    /// Tells the worker that new tables were published, so that frames on hold move at once.
    pub fn wake(&self) {
        self.line.wake();
    }

    /// What each pair of MACs exchanged, as seen where it entered; bounded, pairs with least bytes are forgotten first.
    pub fn traffic(&self) -> Vec<TrafficSeen> {
        self.traffic.snapshot()
    }
}

impl Drop for DataPlane {
    fn drop(&mut self) {
        self.line.say(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Opens ports again whose interface has gone and come back, as when a guest takes its interface along and returns.
fn look_for_lost(losses: &mpsc::Receiver<Key>, line: &Line, wanted: &Mutex<Wanted>) {
    let mut lost: Vec<(Key, u32)> = Vec::new();
    loop {
        let soon = lost.iter().any(|(_, looks)| *looks < LOOK_SOON.1);
        let pause = match (lost.is_empty(), soon) {
            (true, _) => Duration::from_secs(3600),
            (false, true) => LOOK_SOON.0,
            (false, false) => LOOK_LATER,
        };
        match losses.recv_timeout(pause) {
            Ok(key) => lost.push((key, 0)),
            Err(RecvTimeoutError::Timeout) => (),
            Err(RecvTimeoutError::Disconnected) => return,
        }
        lost.retain_mut(|(key, looks)| {
            *looks += 1;
            let mut wanted = lock(wanted);
            let Some((kind, mtu)) = wanted.ports.get(key).cloned() else { return false };
            match wanted.open(&kind, mtu, true) {
                Ok(io) => {
                    tracing::info!(port = %key.1, "interface is back");
                    // Still locked: the detach of this port, if one is on its way, follows.
                    line.say(Command::Attach(key.0, key.1, io));
                    false
                }
                Err(AttachError::NotThere(_)) => true,
                Err(error) => {
                    tracing::debug!(port = %key.1, %error, "looking for the interface again");
                    *looks = LOOK_SOON.1;
                    true
                }
            }
        });
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
        tokio::time::timeout(Duration::from_secs(10), dataplane.ended()).await.is_ok()
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
