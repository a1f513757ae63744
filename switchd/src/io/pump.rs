//! The worker's thread: waits for ports and the mesh port, and carries what they bring through a [`Worker`].

use crate::counters::Counters;
use crate::drops::DropReason;
use crate::inbound::Arrival;
use crate::io::dataplane::QuicDatagram;
use crate::io::outqueue::{FRAMES, OutQueue, SMALL};
use crate::io::ports::Look;
use crate::io::sys::{self, Batch, Received, VECTOR, now};
use crate::io::udp::{Mesh, READS};
use crate::port::{HEADROOM, MAX_FRAME, PortIo, ReadError, WriteError};
use crate::slice::Arena;
use crate::spin::Spin;
use crate::tables::{Forwarding, Gate, Port, PortSlot, WorkerEvent};
use crate::virtio::{self, Offload};
use crate::worker::{Delivered, Egress, Frame, Worker};
use arc_swap::ArcSwap;
use bytes::Bytes;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EventFd;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;
use tokio::sync::mpsc::Sender;
use violin_common::wire::mesh;
use violin_common::{Instant, PortId};

/// Frames that may wait for one port's interface.
const WAITING_FRAMES: usize = 512;
/// Bytes that may.
const WAITING_BYTES: usize = 4 << 20;
/// Vectors of datagrams read in one go at most, and bytes.
const DRAINS: usize = 8;
const DRAINED: usize = 512 << 10;
/// Frames of a port that are written in between.
const FEW: usize = 32;
/// How long they are worth delivering.
const WORTH: Duration = Duration::from_secs(10);
/// Time between two looks at the clock's work while something waits for it.
const TICK: Duration = Duration::from_millis(100);
/// Likewise while nothing does: ports are asked whether they have gone, and what was lost is counted.
const IDLE: Duration = Duration::from_millis(500);

const WAKE: u64 = 0;
const MESH: u64 = 1;
const PORTS: u64 = 2;

/// What the handle asks of the thread.
#[derive(Debug)]
pub(crate) enum Command {
    Attach(PortSlot, PortId, Box<dyn PortIo>),
    Detach(PortSlot, PortId, mpsc::Sender<()>),
    /// Send a token in a session, to an address.
    Challenge(u32, SocketAddr, u64),
    /// Let go of its interface at once, as if it had gone.
    Shut(PortSlot, PortId, mpsc::Sender<()>),
    Stop,
}

/// What the thread needs from outside.
#[derive(Debug)]
pub(crate) struct Outside {
    pub(crate) tables: Arc<ArcSwap<Forwarding>>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) events: Sender<WorkerEvent>,
    pub(crate) quic: Sender<QuicDatagram>,
    pub(crate) commands: mpsc::Receiver<Command>,
    pub(crate) wake: Arc<EventFd>,
    /// Ports whose interface has gone, to be looked for.
    pub(crate) lost: mpsc::Sender<Look>,
}

#[derive(Debug)]
struct Waiting {
    id: PortId,
    bytes: usize,
    frames: VecDeque<(Instant, Offload, Vec<u8>)>,
}

/// Everything a frame can leave through.
#[derive(Debug)]
struct Ways {
    mesh: Mesh,
    ports: HashMap<PortSlot, (PortId, Box<dyn PortIo>)>,
    waiting: HashMap<PortSlot, Waiting>,
    /// What is written at the end of each vector.
    out: HashMap<PortSlot, OutQueue>,
    /// Places with something in there.
    filled: Vec<PortSlot>,
    events: Sender<WorkerEvent>,
    counters: Arc<Counters>,
    lost: mpsc::Sender<Look>,
}

#[derive(Debug)]
pub(crate) struct Pump {
    worker: Worker,
    ways: Ways,
    epoll: Epoll,
    outside_tables: Arc<ArcSwap<Forwarding>>,
    seen_tables: Option<Arc<Forwarding>>,
    quic: Sender<QuicDatagram>,
    commands: mpsc::Receiver<Command>,
    wake: Arc<EventFd>,
    frames: Batch,
    datagrams: Batch,
    spin: Spin,
    /// Taken from ports and the mesh port since the last wait.
    bytes: usize,
    /// Datagrams in one message of the mesh port, as of late.
    together: usize,
    ticked: Instant,
    /// When ports were last asked whether they have gone.
    asked: Instant,
}

impl Pump {
    pub(crate) fn new(mesh: Mesh, worker: Worker, outside: Outside) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&*outside.wake, EpollEvent::new(EpollFlags::EPOLLIN, WAKE))?;
        epoll.add(mesh.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, MESH))?;
        let ways = Ways {
            mesh,
            ports: HashMap::new(),
            waiting: HashMap::new(),
            out: HashMap::new(),
            filled: Vec::new(),
            events: outside.events,
            counters: outside.counters,
            lost: outside.lost,
        };
        Ok(Self {
            worker,
            ways,
            epoll,
            outside_tables: outside.tables,
            seen_tables: None,
            quic: outside.quic,
            commands: outside.commands,
            wake: outside.wake,
            frames: Batch::new(VECTOR, MAX_FRAME, HEADROOM),
            datagrams: Mesh::batch(),
            spin: Spin::new(now()),
            bytes: 0,
            together: 1,
            ticked: now(),
            asked: now(),
        })
    }

    /// Runs until told to stop.
    pub(crate) fn run(mut self) {
        let mut events = [EpollEvent::empty(); 64];
        if let Err(error) = sys::short_slices() {
            tracing::debug!(%error, "this kernel has one length of time slices for all");
        }
        loop {
            let spins = self.spin.goes_on(now());
            let pause = if spins { Duration::ZERO } else { self.pause() };
            let timeout = EpollTimeout::from(u16::try_from(pause.as_millis()).unwrap_or(u16::MAX));
            let count = match self.epoll.wait(&mut events, timeout) {
                Ok(count) => count,
                Err(nix::Error::EINTR) => 0,
                Err(error) => {
                    tracing::error!(%error, "epoll failed: the worker ends");
                    return;
                }
            };
            if count == 0 && spins {
                // Whoever has work on this processor does it now.
                std::thread::yield_now();
                continue;
            }
            let found = now();
            self.ways.mesh.be_patient();
            for event in &events[..count] {
                let tables = self.outside_tables.load_full();
                match event.data() {
                    WAKE => {
                        let _ = self.wake.read();
                        if self.obey(&tables) {
                            return;
                        }
                    }
                    MESH => self.read_mesh(&tables),
                    port => self.read_port(&tables, PortSlot(u16::try_from(port - PORTS).unwrap_or(u16::MAX))),
                }
                self.ways.write_out(FRAMES);
            }
            self.keep_up();
            if count > 0 {
                self.spin.worked(found, now(), std::mem::take(&mut self.bytes));
            }
        }
    }

    /// How long to wait for something at most.
    fn pause(&self) -> Duration {
        if self.ways.waiting.is_empty() && !self.worker.is_restless() { IDLE } else { TICK }
    }

    /// What is due after every vector: gates when tables changed, the clock's work some times a second.
    fn keep_up(&mut self) {
        let (now, tables) = (now(), self.outside_tables.load_full());
        if self.seen_tables.as_ref().is_none_or(|seen| !Arc::ptr_eq(seen, &tables)) {
            self.worker.tables_changed(now, &tables, &mut self.ways);
            self.ways.write_out(FRAMES);
            let known = |slot: &PortSlot| tables.ports.get(usize::from(slot.0)).is_some_and(Option::is_some);
            self.ways.out.retain(|slot, _| known(slot));
            self.seen_tables = Some(tables.clone());
        }
        if now.since(self.ticked) < TICK {
            return;
        }
        self.ticked = now;
        self.worker.tick(now, &mut self.ways);
        if now.since(self.asked) >= IDLE {
            self.asked = now;
            let gone: Vec<_> = self.ways.ports.iter().filter(|(_, (_, io))| io.is_gone()).map(|(slot, _)| *slot).collect();
            gone.into_iter().for_each(|slot| self.ways.lose(slot));
        }
        self.ways.counters.drops.add(DropReason::TunnelOverrun, self.ways.mesh.losses());
        for (_, port) in self.ways.ports.values_mut() {
            self.ways.counters.drops.add(DropReason::PortOverrun, port.losses());
        }
        self.ways.waiting.retain(|slot, waiting| {
            let before = waiting.frames.len();
            let known = tables.ports.get(usize::from(slot.0)).and_then(Option::as_ref).is_some_and(|port| port.id == waiting.id);
            waiting.frames.retain(|(since, _, frame)| {
                let keep = known && now.since(*since) < WORTH;
                waiting.bytes -= if keep { 0 } else { frame.len() };
                keep
            });
            self.ways.counters.drops.add(DropReason::WaitedTooLong, (before - waiting.frames.len()) as u64);
            !waiting.frames.is_empty()
        });
    }

    /// Carries out commands; `true`: stop.
    fn obey(&mut self, tables: &Forwarding) -> bool {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Stop => return true,
                Command::Attach(slot, id, port) => {
                    let event = EpollEvent::new(EpollFlags::EPOLLIN, PORTS + u64::from(slot.0));
                    if let Err(error) = self.epoll.add(port.fd(), event) {
                        tracing::error!(%error, port = %id, "cannot wait for this port");
                        continue;
                    }
                    self.ways.ports.insert(slot, (id, port));
                    self.ways.flush(tables, slot);
                }
                Command::Challenge(session, to, token) => {
                    self.worker.challenge(now(), tables, session, (to, token), &mut self.ways);
                }
                Command::Detach(slot, id, done) => {
                    if self.ways.ports.get(&slot).is_some_and(|(attached, _)| *attached == id) {
                        self.ways.ports.remove(&slot);
                    }
                    let _ = done.send(());
                }
                Command::Shut(slot, id, done) => {
                    if self.ways.ports.get(&slot).is_some_and(|(attached, _)| *attached == id) {
                        self.ways.lose(slot);
                    }
                    let _ = done.send(());
                }
            }
        }
        false
    }

    fn read_port(&mut self, tables: &Forwarding, slot: PortSlot) {
        let Some((id, port)) = self.ways.ports.get_mut(&slot) else { return };
        let known = tables.ports.get(usize::from(slot.0)).and_then(Option::as_ref).is_some_and(|port| port.id == *id);
        match port.read(&mut self.frames) {
            Ok(()) => (),
            Err(ReadError::Empty) => return,
            Err(ReadError::Refused(reason)) => return self.ways.counters.drops.count(reason),
            Err(ReadError::Gone) => return self.ways.lose(slot),
        }
        let counters = &self.ways.counters;
        if !known {
            // Removed, and not yet detached: its slot may be that of another port, of another network. It is read all the
            // same, or it would wake us for ever.
            return counters.drops.add(DropReason::NoNetwork, self.frames.slots_mut().count() as u64);
        }
        let mut frames: Vec<_> = self
            .frames
            .slots_mut()
            .filter_map(|(received, vnet, slot)| {
                self.bytes += received.len;
                if let Some(reason) = received.refused {
                    counters.drops.count(reason);
                    return None;
                }
                Some(restore_tag(received, vnet, slot))
            })
            .collect();
        self.worker.outbound(now(), tables, slot, &mut frames, &mut self.ways);
    }

    /// Reads the mesh port until it is empty, within bounds: what waits there waits for everybody, while what is read waits for its
    /// own port only. Those for whom there is little get it in between.
    fn read_mesh(&mut self, tables: &Forwarding) {
        let before = self.bytes;
        for _ in 0..DRAINS {
            if !self.read_mesh_once(tables) || self.bytes - before > DRAINED {
                return;
            }
            self.ways.write_out(FEW);
        }
    }

    /// Takes one vector of datagrams; whether there may be more.
    fn read_mesh_once(&mut self, tables: &Forwarding) -> bool {
        // Of datagrams that were put together fewer at once: others wait meanwhile.
        let limit = (FRAMES / self.together.max(1)).clamp(4, READS);
        let messages = self.ways.mesh.receive(&mut self.datagrams, limit);
        if messages == 0 {
            return false;
        }
        let (now, mut all) = (now(), 0);
        let mut merging = Default::default();
        for (received, bytes) in self.datagrams.messages_mut() {
            self.bytes += bytes.len();
            let Some(from) = received.from.filter(|_| !bytes.is_empty()) else {
                self.ways.counters.drops.count(DropReason::BadDatagram);
                continue;
            };
            let arrival = Arrival { from, interface: received.interface };
            for datagram in bytes.chunks_mut(received.segment.unwrap_or(bytes.len()).max(1)) {
                all += 1;
                if mesh::is_quic(datagram[0]) {
                    let datagram = QuicDatagram { from, to: received.to, bytes: Bytes::copy_from_slice(datagram) };
                    if self.quic.try_send(datagram).is_err() {
                        self.ways.counters.drops.count(DropReason::QuicBusy);
                    }
                } else {
                    self.worker.inbound(now, tables, arrival, datagram, &mut merging, &mut self.ways);
                }
            }
        }
        self.worker.inbound_end(now, tables, merging, &mut self.ways);
        self.together = all / messages;
        messages == limit
    }
}

/// Puts a VLAN tag back that the kernel took out of the frame.
fn restore_tag<'a>(received: &Received, vnet: &[u8; virtio::LEN], slot: &'a mut [u8]) -> Frame<'a> {
    let offload = Offload::parse(vnet).map_err(|_| DropReason::Segmentation);
    let end = HEADROOM + received.len;
    match received.vlan {
        Some((tci, protocol)) if received.len >= 12 => {
            slot.copy_within(HEADROOM..HEADROOM + 12, 0);
            slot[12..14].copy_from_slice(&protocol.to_be_bytes());
            slot[14..16].copy_from_slice(&tci.to_be_bytes());
            Frame { offload: offload.map(|offload| offload.shifted(4)), bytes: &mut slot[..end] }
        }
        _ => Frame { offload, bytes: &mut slot[HEADROOM..end] },
    }
}

impl Ways {
    /// The port's interface has gone: frames for it wait while somebody looks for it.
    fn lose(&mut self, slot: PortSlot) {
        if let Some((id, _)) = self.ports.remove(&slot) {
            let _ = self.lost.send(Look::Lost((slot, id)));
        }
    }

    /// Writes what was put together for ports that have at most so many frames, to those first for whom there is least: one that
    /// is sent more than others does not hold them up.
    fn write_out(&mut self, most: usize) {
        if self.filled.is_empty() {
            return;
        }
        let mut filled = std::mem::take(&mut self.filled);
        let len = |ways: &Self, slot: &PortSlot| ways.out.get(slot).map_or(0, OutQueue::len);
        filled.sort_unstable_by_key(|slot| len(self, slot));
        filled.retain(|slot| {
            let now = len(self, slot) <= most;
            if now {
                self.write_port(*slot);
            }
            !now
        });
        self.filled = filled;
    }

    fn write_port(&mut self, slot: PortSlot) {
        let Some(queue) = self.out.get_mut(&slot).filter(|queue| queue.len() > 0) else { return };
        let Some((_, io)) = self.ports.get_mut(&slot).filter(|(id, _)| *id == queue.id()) else { return };
        let (now, drops) = (now(), &self.counters.drops);
        let left = queue.write(now, io.as_mut(), |reason| drops.count(reason));
        if !left.is_empty() {
            let id = queue.id();
            self.lose(slot);
            left.into_iter().for_each(|(offload, frame)| self.park(now, (slot, id), offload, frame));
        }
    }

    fn wait(
        &mut self,
        now: Instant,
        slot: PortSlot,
        port: &Port,
        offload: &Offload,
        parts: &[&[u8]],
    ) -> Result<Delivered, DropReason> {
        if port.gate == Gate::Closed {
            return Err(DropReason::NotAttached);
        }
        self.park(now, (slot, port.id), *offload, parts.concat());
        Ok(Delivered::Waiting)
    }

    /// Keeps a frame until its port's interface is there.
    fn park(&mut self, now: Instant, (slot, id): (PortSlot, PortId), offload: Offload, frame: Vec<u8>) {
        let waiting = self.waiting.entry(slot).or_insert_with(|| Waiting { id, bytes: 0, frames: VecDeque::new() });
        if waiting.id != id {
            self.counters.drops.add(DropReason::NotAttached, waiting.frames.len() as u64);
            *waiting = Waiting { id, bytes: 0, frames: VecDeque::new() };
        }
        waiting.bytes += frame.len();
        waiting.frames.push_back((now, offload, frame));
        // The oldest goes first: it is the likeliest to have been sent again.
        while waiting.frames.len() > WAITING_FRAMES || waiting.bytes > WAITING_BYTES {
            let Some((_, _, frame)) = waiting.frames.pop_front() else { break };
            waiting.bytes -= frame.len();
            self.counters.drops.count(DropReason::NotAttached);
        }
    }

    /// Gives a port that is there now what has waited for it.
    fn flush(&mut self, tables: &Forwarding, slot: PortSlot) {
        let Some(mut waiting) = self.waiting.remove(&slot) else { return };
        let known = tables.ports.get(usize::from(slot.0)).and_then(Option::as_ref).filter(|port| port.id == waiting.id);
        let io = self.ports.get_mut(&slot).filter(|(id, _)| *id == waiting.id);
        let (Some(port), Some((_, io))) = (known, io) else {
            // They waited for a port that has been removed.
            return self.counters.drops.add(DropReason::NotAttached, waiting.frames.len() as u64);
        };
        let mut gone = false;
        while let Some((since, offload, frame)) = waiting.frames.pop_front() {
            match io.write(&offload, &[&frame]) {
                Ok(()) => port.traffic.written(now(), frame.len() as u64),
                Err(WriteError::Refused(reason)) => self.counters.drops.count(reason),
                Err(WriteError::Gone) => {
                    waiting.frames.push_front((since, offload, frame));
                    gone = true;
                    break;
                }
            }
        }
        if gone {
            waiting.bytes = waiting.frames.iter().map(|(_, _, frame)| frame.len()).sum();
            self.waiting.insert(slot, waiting);
            self.lose(slot);
        }
    }
}

impl Egress for Ways {
    fn deliver(
        &mut self,
        now: Instant,
        slot: PortSlot,
        port: &Port,
        offload: &Offload,
        parts: &[&[u8]],
    ) -> Result<Delivered, DropReason> {
        let Some((_, io)) = self.ports.get_mut(&slot).filter(|(id, _)| *id == port.id) else {
            return self.wait(now, slot, port, offload, parts);
        };
        if io.batches() && !offload.is_super() && parts.iter().map(|part| part.len()).sum::<usize>() <= SMALL {
            let queue = self.out.entry(slot).or_insert_with(|| OutQueue::new(port.id, &port.traffic));
            if queue.id() != port.id {
                *queue = OutQueue::new(port.id, &port.traffic);
            }
            if queue.len() == 0 {
                self.filled.push(slot);
            }
            return queue.push(offload, parts).map(|()| Delivered::Waiting);
        }
        // In the order they came.
        self.write_port(slot);
        let Some((_, io)) = self.ports.get_mut(&slot).filter(|(id, _)| *id == port.id) else {
            return self.wait(now, slot, port, offload, parts);
        };
        match io.write(offload, parts) {
            Ok(()) => Ok(Delivered::Written),
            Err(WriteError::Refused(reason)) => Err(reason),
            Err(WriteError::Gone) => {
                self.lose(slot);
                self.wait(now, slot, port, offload, parts)
            }
        }
    }

    fn path_mtu(&self, slot: PortSlot) -> Option<u16> {
        self.ports.get(&slot).and_then(|(_, io)| io.path_mtu())
    }

    fn send(&mut self, arena: &Arena) {
        self.mesh.send(arena);
    }

    fn tell(&mut self, event: WorkerEvent) -> bool {
        self.events.try_send(event).is_ok()
    }
}
