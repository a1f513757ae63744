//! Ports that are to be open: what is known of their interfaces, who looks for those that have gone, who watches the guards.
//!
//! Locked over the whole of an opening, an undoing and a mending: a guard put in place while another thread takes it away would
//! leave a port open without one. Read `guard.rs` first.

use crate::io::dataplane::Line;
use crate::io::guard::Guards;
use crate::io::link;
use crate::io::needs::Needs;
use crate::io::nft::{Keeping, Watch};
use crate::io::pump::Command;
use crate::port::{self, AttachError, PortIo};
use crate::switch::{Expecting, Nic};
use crate::tables::{Forwarding, PortSlot, WorkerEvent};
use arc_swap::ArcSwap;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::Sender;
use tokio::sync::mpsc::error::TrySendError;
use violin_common::PortId;
use violin_common::api::switch::{PortCondition, PortConditionSeen, PortKind};

/// How often a lost interface is looked for at first, and for how many times.
const LOOK_SOON: (Duration, u32) = (Duration::from_millis(2), 2500);
/// How often afterwards.
const LOOK_LATER: Duration = Duration::from_millis(100);
/// How long the worker may take to let go of an interface without a guard.
const SHUT: Duration = Duration::from_secs(2);
/// How often the loss of one guard is said at most.
const SAID: Duration = Duration::from_secs(60);

/// A port by place and number.
pub(crate) type Key = (PortSlot, PortId);

/// What the thread that looks for interfaces is told.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Look {
    /// The port has let go of an interface that has gone, or whose guard has.
    Lost(Key),
    /// What the port is attached to is not there yet.
    Expected(Key),
    /// The port was refused its interface; look whether that has changed.
    Again(Key),
}

#[derive(Debug)]
struct Entry {
    kind: PortKind,
    nic: Nic,
    expecting: Expecting,
    condition: PortCondition,
    /// What it waits for, or why.
    what: Option<String>,
    since: Instant,
    guard_losses: u32,
    said: Option<Instant>,
}

impl Entry {
    fn is(&mut self, condition: PortCondition, what: Option<String>) {
        if self.condition != condition {
            (self.condition, self.since) = (condition, Instant::now());
        }
        self.what = what;
    }

    /// How it is when opening it ended so.
    fn opened(&mut self, result: Result<(), &AttachError>) {
        match result {
            Ok(()) => self.is(PortCondition::Attached, None),
            Err(AttachError::Guard { why, .. }) => self.is(PortCondition::GuardLost, Some(why.clone())),
            Err(error @ AttachError::Needed { .. }) => self.is(PortCondition::Refused, Some(error.to_string())),
            Err(AttachError::NotThere(what)) => self.is(PortCondition::Waiting, Some(what.clone())),
            Err(error) => self.is(PortCondition::Waiting, Some(error.to_string())),
        }
    }
}

/// See the head of this file.
#[derive(Debug)]
pub(crate) struct Ports {
    entries: HashMap<Key, Entry>,
    guards: Guards,
    tables: Arc<ArcSwap<Forwarding>>,
    needs: Needs,
}

pub(crate) fn lock(ports: &Mutex<Ports>) -> MutexGuard<'_, Ports> {
    ports.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ports {
    pub(crate) fn new(keeping: Keeping, tables: Arc<ArcSwap<Forwarding>>) -> Self {
        Self { entries: HashMap::new(), guards: Guards::new(keeping), tables, needs: Needs::default() }
    }

    /// Takes note of what the host itself needs; ports that were refused for it may be worth another try.
    pub(crate) fn set_needs(&mut self, needs: Needs) -> Vec<Key> {
        self.needs = needs;
        let refused = self.entries.iter().filter(|(_, entry)| entry.condition == PortCondition::Refused);
        refused.map(|(key, _)| *key).collect()
    }

    /// Refuses an interface that the host itself needs.
    fn must_be_free(&self, interface: &str) -> Result<(), AttachError> {
        let gateway = |entry: &Entry| match entry.kind {
            PortKind::Vxlan { local, .. } if !local.ip().is_unspecified() => Some(local.ip()),
            _ => None,
        };
        let others: Vec<_> = self.entries.values().filter_map(gateway).collect();
        let mut needs = self.needs.clone();
        needs.members.extend(self.tables.load().peers.iter().flatten().map(|peer| peer.address));
        match needs.why(interface, &others) {
            Ok(None) => Ok(()),
            Ok(Some(why)) => Err(AttachError::Needed { interface: interface.into(), why }),
            // A kernel that does not tell does not forbid either.
            Err(error) => {
                tracing::debug!(interface, %error, "what the host needs the interface for");
                Ok(())
            }
        }
    }

    /// Opens a port. The first time an interface that is `expected` is not there, the guard is put in place ahead of it where
    /// the kernel can do that: it saves the time when the guest arrives, and leaves no moment unguarded.
    fn open(&mut self, kind: &PortKind, nic: Nic, expected: bool) -> Result<Box<dyn PortIo>, AttachError> {
        if let PortKind::Packet { interface } = kind
            && link::index(interface).is_some()
            && let Err(needed) = self.must_be_free(interface)
        {
            // A guard from before, or ahead of it, would cut the host off as well.
            self.guards.open(interface);
            return Err(needed);
        }
        let opened = port::open(kind, nic, &mut self.guards);
        if let (true, Err(AttachError::NotThere(_)), PortKind::Packet { interface }) = (expected, &opened, kind) {
            self.guards.ahead(interface);
        }
        opened
    }

    /// Opens a port for the first time. One that waits, or was not taken, is remembered: a detach must undo its guard.
    pub(crate) fn attach(
        &mut self,
        key: Key,
        kind: &PortKind,
        nic: Nic,
        expecting: Expecting,
    ) -> Result<Box<dyn PortIo>, AttachError> {
        let opened = self.open(kind, nic, expecting == Expecting::Arrival);
        let waits = opened.as_ref().is_err_and(|error| error.is_waited_for(expecting));
        if waits || !matches!(opened, Err(AttachError::NotThere(_) | AttachError::BadName(_) | AttachError::Needed { .. })) {
            let mut entry = Entry {
                kind: kind.clone(),
                nic,
                expecting,
                condition: PortCondition::Waiting,
                what: None,
                since: Instant::now(),
                guard_losses: 0,
                said: None,
            };
            entry.opened(opened.as_ref().map(|_| ()));
            self.entries.insert(key, entry);
        }
        opened
    }

    /// Forgets a port; what it was attached to is to be undone once the worker has let go of it.
    pub(crate) fn forget(&mut self, key: Key) -> Option<PortKind> {
        self.entries.remove(&key).map(|entry| entry.kind)
    }

    pub(crate) fn undo(&mut self, kind: &PortKind, keep: bool) {
        port::undo(kind, keep, &mut self.guards);
    }

    /// How each port is.
    pub(crate) fn conditions(&self) -> Vec<PortConditionSeen> {
        let seen = self.entries.iter().map(|((_, id), entry)| PortConditionSeen {
            port: *id,
            condition: entry.condition,
            what: entry.what.clone(),
            since_s: entry.since.elapsed().as_secs(),
            guard_losses: entry.guard_losses,
        });
        let mut seen: Vec<_> = seen.collect();
        seen.sort_unstable_by_key(|seen| seen.port);
        seen
    }

    /// Looks whether all guards stand.
    pub(crate) fn check_guards(&mut self, line: &Line) {
        for interface in self.guards.interfaces() {
            if !self.guards.stands(&interface) {
                self.mend(&interface, line);
            }
        }
    }

    /// Somebody took an interface's guard away, or changed it: it is put back at once. Where that cannot be done the port is
    /// shut to its guest, and the interface to both, until it can.
    fn mend(&mut self, interface: &str, line: &Line) {
        self.guards.distrust(interface);
        let mended = self.guards.drop_all(interface);
        let is_its = |kind: &PortKind| matches!(kind, PortKind::Packet { interface: its } if its == interface);
        let there = link::index(interface).is_some();
        for (key, entry) in self.entries.iter_mut().filter(|(_, entry)| is_its(&entry.kind)) {
            if entry.condition == PortCondition::GuardLost {
                // Already shut: whoever looks for it opens it with its guard.
                continue;
            }
            if mended.is_ok() || there {
                entry.guard_losses = entry.guard_losses.saturating_add(1);
            }
            let say = entry.said.is_none_or(|said| said.elapsed() >= SAID);
            match &mended {
                Ok(()) if say => {
                    entry.said = Some(Instant::now());
                    tracing::warn!(
                        port = %key.1, interface, losses = entry.guard_losses,
                        "guard lost: somebody removed or changed the port's nft table (`nft flush ruleset` does); put back at once"
                    );
                }
                Ok(()) => {}
                Err(why) if there => {
                    entry.is(PortCondition::GuardLost, Some(why.clone()));
                    let down = shut(*key, interface, line);
                    tracing::error!(
                        port = %key.1, interface, why, ?down,
                        "guard lost: it could not be put back, so the port is shut and its interface down; trying again"
                    );
                }
                // Gone with its interface, as before Linux 6.16: guarded when it is back.
                Err(_) => {}
            }
        }
    }
}

/// Shuts an interface that has no guard to guest and host. The worker would set it up again as long as it has it.
fn shut(key: Key, interface: &str, line: &Line) -> io::Result<()> {
    let (done, finished) = mpsc::channel();
    let _ = link::set_down(interface);
    line.say(Command::Shut(key.0, key.1, done));
    let _ = finished.recv_timeout(SHUT);
    link::set_down(interface)
}

/// Puts guards back that somebody takes away, until told to end.
pub(crate) fn watch_guards(mut watch: Watch, end: &EventFd, line: &Line, ports: &Mutex<Ports>) {
    loop {
        let mut fds = [PollFd::new(watch.fd(), PollFlags::POLLIN), PollFd::new(end.as_fd(), PollFlags::POLLIN)];
        if let Err(error) = poll(&mut fds, PollTimeout::NONE)
            && error != nix::Error::EINTR
        {
            tracing::error!(%error, "guards cannot be watched");
            return;
        }
        if fds[1].any().unwrap_or(false) {
            return;
        }
        let mut ports = lock(ports);
        let changes = watch.changed(ports.guards.port());
        if changes.lost {
            ports.check_guards(line);
        }
        for table in changes.tables {
            if let Some(interface) = ports.guards.interface_of(&table) {
                ports.mend(&interface, line);
            }
        }
    }
}

/// A port whose interface is looked for.
#[derive(Debug)]
struct Looking {
    key: Key,
    /// It had one before.
    lost: bool,
    looks: u32,
    due: Instant,
    /// The last thing said about it.
    said: Option<String>,
}

impl Looking {
    fn new(key: Key, lost: bool) -> Self {
        Self { key, lost, looks: 0, due: Instant::now(), said: None }
    }

    /// When to look next: soon for what has just been lost and for guests on their way.
    fn again(&mut self, expecting: Expecting, hopeful: bool) {
        self.looks = self.looks.saturating_add(1);
        let soon = expecting == Expecting::Arrival || self.lost && self.looks < LOOK_SOON.1;
        self.due = Instant::now() + if soon && hopeful { LOOK_SOON.0 } else { LOOK_LATER };
    }

    /// Looks; `false`: it need not be looked for any more.
    fn look(&mut self, line: &Line, ports: &Mutex<Ports>) -> bool {
        let (key, mut ports) = (self.key, lock(ports));
        let Some(entry) = ports.entries.get(&key) else { return false };
        let (kind, nic, expecting) = (entry.kind.clone(), entry.nic, entry.expecting);
        let opened = ports.open(&kind, nic, self.lost || expecting == Expecting::Arrival);
        if let Some(entry) = ports.entries.get_mut(&key) {
            entry.opened(opened.as_ref().map(|_| ()));
        }
        match opened {
            Ok(io) => {
                let what = if self.lost { "interface is back" } else { "what it waited for is there: attached" };
                tracing::info!(port = %key.1, "{what}");
                // Still locked: the detach of this port, if one is on its way, follows.
                line.say(Command::Attach(key.0, key.1, io));
                false
            }
            // Not tried again by itself: the moment the host's route is away for a while the host would lose it for good.
            Err(error @ AttachError::Needed { .. }) => {
                tracing::error!(port = %key.1, %error, "port refused; SIGHUP tries again");
                false
            }
            Err(error) => {
                let (hopeful, words) = (matches!(error, AttachError::NotThere(_)), error.to_string());
                if !hopeful && self.said.as_ref() != Some(&words) {
                    // What it is attached to is there and cannot be taken; it may yet be.
                    tracing::warn!(port = %key.1, %error, "could not attach; trying again");
                    self.said = Some(words);
                }
                self.again(expecting, hopeful);
                true
            }
        }
    }
}

/// Opens ports whose interface has gone or has yet to come, as when a guest takes its interface along and returns.
pub(crate) fn look_for_lost(losses: &mpsc::Receiver<Look>, line: &Line, ports: &Mutex<Ports>, events: &Sender<WorkerEvent>) {
    let mut all: Vec<Looking> = Vec::new();
    // What the control side has yet to hear: it must, and nobody may wait for it here.
    let mut untold: Vec<WorkerEvent> = Vec::new();
    loop {
        untold.retain(|event| matches!(events.try_send(*event), Err(TrySendError::Full(_))));
        let retell = (!untold.is_empty()).then(|| Instant::now() + LOOK_LATER);
        let next = all.iter().map(|looking| looking.due).chain(retell).min();
        let pause = next.map_or(Duration::from_secs(3600), |next| next.saturating_duration_since(Instant::now()));
        let (key, lost) = match losses.recv_timeout(pause) {
            Ok(Look::Lost(key)) => {
                tracing::info!(port = %key.1, "interface gone");
                untold.push(WorkerEvent::Lost { port: key.0, id: key.1 });
                (key, true)
            }
            Ok(Look::Expected(key) | Look::Again(key)) => (key, false),
            Err(RecvTimeoutError::Timeout) => {
                let now = Instant::now();
                all.retain_mut(|looking| looking.due > now || looking.look(line, ports));
                continue;
            }
            Err(RecvTimeoutError::Disconnected) => return,
        };
        all.retain(|looking| looking.key != key);
        all.push(Looking::new(key, lost));
    }
}
