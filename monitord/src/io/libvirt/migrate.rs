//! Moving a VM away, and what is true afterwards.
//!
//! The source's libvirtd talks to the destination's itself (peer to peer), so a move goes on if this process dies. Every
//! way out of `migrate` ends with a look at both sides: an error says where the VM is, and a VM that was left paused
//! here while the destination has none runs on here.

use super::domain::{Places, retarget, uuid};
use super::events::lock;
use super::parameters::{Parameter, number};
use super::sys::{Connection, Domain, Failure};
use super::{Libvirt, is_gone, refused};
use crate::hypervisor::{HypervisorError, MoveStatistics, Whereabouts};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};
use violin_common::control::monitor::MigrationMode;
use violin_common::{HostId, VmId};
use virt::sys;

/// How long a destination may take to answer before it counts as unreachable.
const CONNECT: Duration = Duration::from_secs(5);

/// How long we look for the VM after a move that failed; longer than a libvirtd takes to start again.
const SETTLE: Duration = Duration::from_secs(60);

/// Time between two looks at a move under way.
const POLL: Duration = Duration::from_millis(100);

/// Told when a move has become a post-copy: from here on only the destination can have the VM.
const POSTCOPY: &str = "runs at the destination, the rest of its memory follows";

/// Longest pause a pre-copy may end with, in milliseconds: QEMU's own default.
const PAUSE: u64 = 300;

/// The same for a post-copy: so short that it ends as a pre-copy only if nothing is left to follow.
const POSTCOPY_PAUSE: u64 = 5;

/// A post-copy switches when no more than this part of memory is left of its first pass: what the guest uses most has
/// then mostly arrived and need not be waited for page by page, yet every page is sent about once.
const POSTCOPY_REST: f64 = 0.25;

/// What a destination tells the source, as text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Incoming {
    /// Its libvirtd.
    pub(super) connect: String,
    /// Where it takes memory.
    pub(super) migrate: String,
    /// Where the VM's things are there.
    pub(super) places: Places,
}

impl fmt::Display for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&serde_json::to_string(self).map_err(|_| fmt::Error)?)
    }
}

/// The address as libvirt wants it; it picks a port itself.
pub(super) fn memory_uri(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => format!("tcp://{address}"),
        IpAddr::V6(address) => format!("tcp://[{address}]"),
    }
}

/// Takes a move out of the list of those under way, however it ends.
struct Leaving<'a> {
    driver: &'a Libvirt,
    vm: &'a VmId,
    abort: Arc<AtomicBool>,
}

impl<'a> Leaving<'a> {
    fn enter(driver: &'a Libvirt, vm: &'a VmId) -> Option<Self> {
        let abort = Arc::new(AtomicBool::new(false));
        let mut leaving = lock(&driver.leaving);
        if leaving.contains_key(vm) {
            return None;
        }
        leaving.insert(vm.clone(), abort.clone());
        Some(Self { driver, vm, abort })
    }
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        lock(&self.driver.leaving).remove(self.vm);
    }
}

pub(super) fn migrate(
    driver: &Libvirt,
    vm: &VmId,
    to: &HostId,
    uri: &str,
    mode: MigrationMode,
    progress: &mut dyn FnMut(Option<f64>, &str),
) -> Result<MoveStatistics, HypervisorError> {
    let refuse = |said: String| HypervisorError::Refused { asked: format!("moving {vm} to {to}"), said };
    let incoming: Incoming = serde_json::from_str(uri)
        .map_err(|error| refuse(format!("got {uri:?} ({error}), want what the destination answered to prepare")))?;
    let (session, here) = driver.domain(vm)?;
    let Some(leaving) = Leaving::enter(driver, vm) else {
        return Err(refuse("a move of it is under way already; abort that or wait".into()));
    };
    let state = here.state().map_err(|f| refused(&session, format!("moving {vm} to {to}"), &f))?;
    if state.0 != sys::VIR_DOMAIN_RUNNING {
        return Err(refuse(format!("got a VM that does not run (libvirt state {}), want one that runs", state.0)));
    }
    progress(None, "asking the destination");
    let destination = reach(&incoming.connect).map_err(|said| refuse(format!("libvirtd at {}: {said}", incoming.connect)))?;
    let xml = here.xml().map_err(|f| refused(&session, format!("moving {vm} to {to}"), &f))?;
    let xml = retarget(&xml, &incoming.places).ok_or_else(|| refuse("its description is not one of ours".into()))?;
    driver.sink.forget(vm);

    let flags = match mode {
        // Slows a guest that dirties memory faster than it can be copied, so that every move ends.
        MigrationMode::PreCopy => sys::VIR_MIGRATE_LIVE | sys::VIR_MIGRATE_AUTO_CONVERGE,
        MigrationMode::PostCopy => sys::VIR_MIGRATE_LIVE | sys::VIR_MIGRATE_POSTCOPY,
        MigrationMode::StopAndCopy => 0,
    };
    let way = Way { driver, vm, here: &here, incoming: &incoming, xml: &xml, abort: &leaving.abort };
    let pause = if mode == MigrationMode::PostCopy { POSTCOPY_PAUSE } else { PAUSE };
    let moved = here.set_max_downtime(pause).and_then(|()| way.run(flags, progress));
    let failure = match moved {
        Ok(()) => return Ok(statistics(driver, vm, &destination)),
        Err(failure) => failure,
    };
    progress(None, "finding out where the VM is after the failure");
    match settle(driver, vm, &incoming.connect) {
        Place::There => Ok(statistics(driver, vm, &destination)),
        Place::Here => {
            let why = if leaving.abort.load(Ordering::SeqCst) { "given up as asked" } else { "failed" };
            Err(refuse(format!("{why}: {failure}")))
        }
        Place::Nowhere => Err(doubtful(vm, to, &failure, "it is on neither host; start it again")),
        Place::Unknown(where_now) => Err(doubtful(vm, to, &failure, &where_now)),
    }
}

fn doubtful(vm: &VmId, to: &HostId, failure: &Failure, where_now: &str) -> HypervisorError {
    HypervisorError::Doubtful(format!("moving {vm} to {to}: failed: {failure}; THE VM DOES NOT RUN HERE: {where_now}"))
}

/// One look at both ends after a move that was lost sight of.
pub(super) fn whereabouts(driver: &Libvirt, vm: &VmId, uri: &str) -> Result<Whereabouts, HypervisorError> {
    let incoming: Incoming = serde_json::from_str(uri).map_err(|error| HypervisorError::Refused {
        asked: format!("finding out where {vm} is"),
        said: format!("got {uri:?} ({error}), want what the destination answered to prepare"),
    })?;
    Ok(match look(driver, vm, &incoming.connect) {
        Ok(Place::Here) => Whereabouts::Here,
        Ok(Place::There) => Whereabouts::There,
        Ok(Place::Nowhere) => Whereabouts::Nowhere,
        Ok(Place::Unknown(words)) | Err(words) => Whereabouts::Unclear(words),
    })
}

pub(super) fn abort(driver: &Libvirt, vm: &VmId) -> Result<(), HypervisorError> {
    if let Some(abort) = lock(&driver.leaving).get(vm) {
        // The move's own thread does it, again and again: before its job exists libvirt would only say that there is none.
        abort.store(true, Ordering::SeqCst);
        return Ok(());
    }
    // Begun before this process started.
    let (session, domain) = driver.domain(vm)?;
    domain.abort_job().map_err(|f| refused(&session, format!("giving up the move of {vm}"), &f))
}

/// A move under way: from where, of what, to where.
struct Way<'a> {
    driver: &'a Libvirt,
    vm: &'a VmId,
    here: &'a Domain,
    incoming: &'a Incoming,
    xml: &'a str,
    abort: &'a AtomicBool,
}

impl Way<'_> {
    /// Lets libvirt move the VM while watching it.
    ///
    /// The call gets a thread and a connection of its own: libvirtd serves few calls of one connection at once, and while
    /// moves fill those, none to abort them would be heard. The thread is left alone when a post-copy breaks, for libvirt
    /// may then wait for the destination's QEMU without end.
    fn run(&self, flags: u32, progress: &mut dyn FnMut(Option<f64>, &str)) -> Result<(), Failure> {
        let Self { driver, vm, here, abort, .. } = *self;
        let result = self.begin(flags | sys::VIR_MIGRATE_PEER2PEER | sys::VIR_MIGRATE_ABORT_ON_ERROR)?;
        let mut switched = flags & sys::VIR_MIGRATE_POSTCOPY == 0;
        loop {
            match result.recv_timeout(if switched { POLL } else { POLL / 10 }) {
                Ok(moved) => {
                    if driver.sink.is_in_postcopy(vm) {
                        progress(None, POSTCOPY); // over before it was seen under way
                    }
                    return moved;
                }
                Err(RecvTimeoutError::Timeout) if is_broken_postcopy(here) => {
                    return Err(failure("the connection broke after the switch to post-copy"));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(failure("the thread that moves it died")),
            }
            if abort.load(Ordering::SeqCst) {
                let _ = here.abort_job(); // no job yet, or no longer: the next round or the result tells
            }
            let Ok((_, job)) = here.job(false) else { continue };
            let left = number(&job, "data_remaining")
                .zip(number(&job, "data_total").filter(|total| *total > 0))
                .map(|(remaining, total)| remaining as f64 / total as f64);
            let first_pass = number(&job, "memory_iteration").is_none_or(|iteration| iteration < 2);
            if !switched && (!first_pass || left.is_some_and(|left| left < POSTCOPY_REST)) {
                switched = here.start_postcopy().is_ok();
            }
            if driver.sink.is_in_postcopy(vm) {
                progress(None, POSTCOPY);
            } else if let Some(left) = left {
                progress(Some(1.0 - left), "copying memory");
            }
        }
    }

    /// Starts the thread that makes the call; the receiver gets its result.
    fn begin(&self, flags: u32) -> Result<Receiver<Result<(), Failure>>, Failure> {
        let (done, result) = channel();
        let uri = self.driver.settings.uri.clone();
        let (vm, incoming, xml) = (self.vm.clone(), self.incoming.clone(), self.xml.to_owned());
        let call = move || {
            let options =
                [(sys::VIR_MIGRATE_PARAM_URI, incoming.migrate.as_str()), (sys::VIR_MIGRATE_PARAM_DEST_XML, xml.as_str())];
            let moved = Connection::open(&uri).and_then(|own| match own.domain(&uuid(&vm))? {
                Some(domain) => domain.migrate(&incoming.connect, &options, flags),
                None => Err(failure(&format!("no VM {vm} on this host"))),
            });
            let _ = done.send(moved); // whoever gave up on it does not listen
        };
        match thread::Builder::new().name("libvirt-move".into()).spawn(call) {
            Ok(_) => Ok(result),
            Err(error) => Err(failure(&format!("no thread for it: {error}"))),
        }
    }
}

fn failure(message: &str) -> Failure {
    Failure { code: sys::VIR_ERR_INTERNAL_ERROR, message: message.to_owned() }
}

/// Whether its move broke after the switch to post-copy. A libvirtd that does not answer says no.
fn is_broken_postcopy(domain: &Domain) -> bool {
    matches!(domain.state(), Ok((sys::VIR_DOMAIN_PAUSED, sys::VIR_DOMAIN_PAUSED_POSTCOPY_FAILED)))
}

/// Where a VM is after a move that failed.
enum Place {
    Here,
    There,
    Nowhere,
    Unknown(String),
}

/// Finds out where the VM is and makes it run here if it is nowhere else. Takes until both sides have said something
/// final, at most [`SETTLE`].
fn settle(driver: &Libvirt, vm: &VmId, connect: &str) -> Place {
    let deadline = Instant::now() + SETTLE;
    let mut story = String::new();
    while Instant::now() < deadline {
        match look(driver, vm, connect) {
            Ok(place) => return place,
            Err(still) => story = still,
        }
        thread::sleep(POLL); // both libvirtds carry on by themselves; there is no event for "has made up its mind"
    }
    Place::Unknown(format!("after {} s {story}", SETTLE.as_secs()))
}

/// One look; an error says what is not final yet.
fn look(driver: &Libvirt, vm: &VmId, connect: &str) -> Result<Place, String> {
    let (_, here) = driver.find(vm).map_err(|error| error.to_string())?;
    let here = match &here {
        None => None,
        Some(domain) => {
            match (domain.state(), domain.job(false)) {
                (Ok((sys::VIR_DOMAIN_RUNNING, _)), Ok((sys::VIR_DOMAIN_JOB_NONE, _))) => return Ok(Place::Here),
                (Ok((sys::VIR_DOMAIN_PAUSED, sys::VIR_DOMAIN_PAUSED_POSTCOPY_FAILED)), _) => {
                    // Neither side can go on alone, and ending or resuming either would lose it for good: the operator's choice.
                    let what = "part of its memory is here still, the rest at the destination, where it runs until it needs that \
                            part; try `virsh migrate --postcopy-resume`, or stop it on both hosts and start it again";
                    return Ok(Place::Unknown(what.into()));
                }
                (Ok((sys::VIR_DOMAIN_PAUSED, sys::VIR_DOMAIN_PAUSED_POSTCOPY)), _) => {
                    return Err("its memory follows to the destination still; do not end it here".into());
                }
                (Ok(_), Ok((sys::VIR_DOMAIN_JOB_NONE, _))) => Some(domain),
                (Err(failure), _) | (_, Err(failure)) if is_gone(&failure) => None,
                (Err(failure), _) | (_, Err(failure)) => return Err(failure.to_string()),
                _ => return Err("libvirt works on the move still".into()),
            }
        }
    };
    let destination = reach(connect).map_err(|said| format!("it is paused or gone here, and the destination: {said}"))?;
    let there = match destination.domain(&uuid(vm)).map_err(|failure| failure.to_string())? {
        None => None,
        Some(domain) => match domain.state() {
            Ok((state, _)) => Some(state),
            Err(failure) if is_gone(&failure) => None,
            Err(failure) => return Err(failure.to_string()),
        },
    };
    match (here, there) {
        (None, Some(sys::VIR_DOMAIN_RUNNING)) => Ok(Place::There),
        (Some(left_over), Some(sys::VIR_DOMAIN_RUNNING)) => {
            // It runs there: what is left here must never run again.
            left_over.destroy().map_err(|failure| format!("it runs there, and here it could not be ended: {failure}"))?;
            Ok(Place::There)
        }
        (Some(paused), None) => {
            paused.resume().map_err(|failure| format!("it is paused here and did not resume: {failure}"))?;
            Err("it was resumed here".into()) // the next look confirms it
        }
        (None, None) => Ok(Place::Nowhere),
        (_, Some(state)) => Err(format!("the destination has it in libvirt state {state}")),
    }
}

/// Connects to another host's libvirtd within [`CONNECT`].
///
/// libvirt has no time limit for connecting, so a thread waits; it ends when the other side answers or its TCP gives up.
fn reach(connect: &str) -> Result<Connection, String> {
    let (sender, receiver) = channel();
    let uri = connect.to_owned();
    let spawned = thread::Builder::new().name("libvirt-reach".into()).spawn(move || {
        let _ = sender.send(Connection::open(&uri)); // nobody waits any more: the connection is closed again
    });
    spawned.map_err(|error| error.to_string())?;
    match receiver.recv_timeout(CONNECT) {
        Ok(opened) => opened.map_err(|failure| failure.to_string()),
        Err(_) => Err(format!("no answer within {} s", CONNECT.as_secs())),
    }
}

/// The finished move's statistics: the destination has them all, the source's own event comes second.
fn statistics(driver: &Libvirt, vm: &VmId, destination: &Connection) -> MoveStatistics {
    let there = destination.domain(&uuid(vm)).ok().flatten().and_then(|domain| domain.job(true).ok()).map(|(_, job)| job);
    let job: Vec<Parameter> = there.filter(|job| !job.is_empty()).or_else(|| driver.sink.take_job(vm)).unwrap_or_default();
    MoveStatistics {
        copied_bytes: number(&job, "data_processed"),
        downtime_ms: number(&job, "downtime").map(|ms| ms as f64),
        verbatim: job.iter().map(|(name, value)| (name.clone(), value.to_string())).collect(),
    }
}
