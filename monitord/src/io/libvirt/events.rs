//! What libvirtd tells unasked, turned into [`HypervisorEvent`]s.
//!
//! Stops and starts come from QEMU itself, with QEMU's time stamps; libvirt's own lifecycle events come later and are used
//! for the end of a domain (and for all three where the hypervisor has no monitor events).
#![allow(unsafe_code)]

use super::domain;
use super::parameters::{Parameter, read};
use super::sys::{Connection, Domain, Failure};
use crate::hypervisor::{Change, HypervisorEvent};
use crate::io::clock;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CStr, c_char, c_int, c_longlong, c_uint, c_void};
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use violin_common::{Instant, VmId};
use virt::sys;

/// A time stamp further off than this is not believed: the wall clock was set in between.
const PLAUSIBLE: Duration = Duration::from_secs(10);

/// Takes the callbacks' news to whoever listens.
#[derive(Debug)]
pub(super) struct Sink {
    sender: Sender<HypervisorEvent>,
    run: PathBuf,
    told: Mutex<Told>,
    /// Statistics of the last job of each VM, kept until asked for.
    jobs: Mutex<BTreeMap<VmId, Vec<Parameter>>>,
    /// VMs whose move away has become a post-copy.
    postcopy: Mutex<BTreeSet<VmId>>,
}

/// What was told last of each VM, each with its number in the order of telling.
#[derive(Debug, Default)]
struct Told {
    count: u64,
    last: BTreeMap<VmId, (u64, Change)>,
}

impl Sink {
    pub(super) fn new(sender: Sender<HypervisorEvent>, run: PathBuf) -> Self {
        Self { sender, run, told: Mutex::default(), jobs: Mutex::default(), postcopy: Mutex::default() }
    }

    /// Passes a change on, unless it is what was told last.
    fn tell(&self, vm: VmId, at: Instant, change: Change) {
        let mut told = lock(&self.told);
        self.tell_locked(&mut told, vm, at, change);
    }

    fn tell_locked(&self, told: &mut Told, vm: VmId, at: Instant, change: Change) {
        told.count += 1;
        let before = match change {
            Change::Ended => told.last.remove(&vm),
            Change::Stopped | Change::Running => told.last.insert(vm.clone(), (told.count, change)),
        };
        if change != Change::Stopped {
            // An arrived VM's QEMU has read its configuration, an ended one's never will.
            let _ = fs::remove_file(super::guest_config(&self.run, &vm));
        }
        if before.is_none_or(|(_, last)| last != change) {
            // Nobody listening any more is the driver's end, not ours to report.
            let _ = self.sender.send(HypervisorEvent { vm, at, change });
        }
    }

    /// Tells what changed while nobody listened: called when events flow again.
    pub(super) fn catch_up(&self, connection: &Connection) -> Result<(), Failure> {
        let before = lock(&self.told).count;
        let mut seen = BTreeMap::new();
        for domain in connection.domains()? {
            let Some(vm) = ours(&domain) else { continue };
            // A domain that went between the two calls is told of by its own event.
            if let Ok((state, _)) = domain.state() {
                seen.insert(vm, state);
            }
        }
        let at = clock::now();
        let mut told = lock(&self.told);
        let gone: Vec<VmId> = told
            .last
            .iter()
            .filter(|(vm, (when, _))| *when <= before && !seen.contains_key(*vm))
            .map(|(vm, _)| vm.clone())
            .collect();
        for vm in gone {
            self.tell_locked(&mut told, vm, at, Change::Ended);
        }
        for (vm, state) in seen {
            let last = told.last.get(&vm).copied();
            if last.is_some_and(|(when, _)| when > before) {
                continue; // an event has overtaken the list
            }
            match state {
                sys::VIR_DOMAIN_RUNNING => self.tell_locked(&mut told, vm, at, Change::Running),
                // Never seen running here, it may be arriving: that is no stop.
                sys::VIR_DOMAIN_PAUSED if last.is_some() => self.tell_locked(&mut told, vm, at, Change::Stopped),
                _ => {}
            }
        }
        Ok(())
    }

    fn note_postcopy(&self, domain: &Domain, event: c_int, detail: c_int) {
        let event = (event.cast_unsigned(), detail.cast_unsigned());
        if event == (sys::VIR_DOMAIN_EVENT_SUSPENDED, sys::VIR_DOMAIN_EVENT_SUSPENDED_POSTCOPY)
            && let Some(vm) = ours(domain)
        {
            lock(&self.postcopy).insert(vm);
        }
    }

    /// Forgets what was noted of earlier moves.
    pub(super) fn forget(&self, vm: &VmId) {
        lock(&self.jobs).remove(vm);
        lock(&self.postcopy).remove(vm);
    }

    /// Whether the VM's move away has become a post-copy.
    pub(super) fn is_in_postcopy(&self, vm: &VmId) -> bool {
        lock(&self.postcopy).contains(vm)
    }

    /// Takes the statistics of the VM's last job.
    pub(super) fn take_job(&self, vm: &VmId) -> Option<Vec<Parameter>> {
        lock(&self.jobs).remove(vm)
    }
}

/// The lock, even if a thread died holding it: what we keep is valid after every statement.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The VM a domain is, if it is one of ours.
pub(super) fn ours(domain: &Domain) -> Option<VmId> {
    let (name, uuid) = domain.identity()?;
    let vm: VmId = name.parse().ok()?;
    (domain::uuid(&vm) == uuid).then_some(vm)
}

/// A time of the wall clock on the monotonic one, by the difference of the two at this moment.
fn monotonic(seconds: i64, micros: u32) -> Instant {
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let steady = clock::now();
    let Ok(seconds) = u64::try_from(seconds) else { return steady }; // -1: QEMU gave none
    // A stamp of the future is one of now: the two clocks are not read at once.
    let age = wall.saturating_sub(Duration::from_secs(seconds) + Duration::from_micros(micros.into()));
    if age > PLAUSIBLE { steady } else { steady - age }
}

/// A connection with its callbacks registered; they end with it.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) connection: Connection,
    monitor: Option<c_int>,
    any: Vec<c_int>,
    closed: Arc<Closed>,
}

/// Says that the connection broke.
#[derive(Debug, Default)]
pub(super) struct Closed {
    broken: AtomicBool,
    waiting: Mutex<()>,
    rung: Condvar,
}

impl Closed {
    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }

    /// Wakes whoever waits.
    pub(super) fn ring(&self) {
        let _guard = lock(&self.waiting);
        self.rung.notify_all();
    }

    /// Returns after `longest`, or as soon as the bell rings.
    pub(super) fn wait(&self, longest: Duration) {
        let guard = lock(&self.waiting);
        if !self.is_broken() {
            drop(self.rung.wait_timeout(guard, longest));
        }
    }
}

impl Session {
    /// Connects, and registers for everything the sink wants to know.
    pub(super) fn open(uri: &str, sink: &Arc<Sink>) -> Result<Self, Failure> {
        let connection = Connection::open(uri)?;
        let closed = Arc::new(Closed::default());
        let opaque = Arc::into_raw(closed.clone()).cast_mut().cast::<c_void>();
        // SAFETY: live connection; `release::<Closed>` gives back the reference passed as `opaque`.
        if unsafe { sys::virConnectRegisterCloseCallback(connection.0, Some(on_close), opaque, Some(release::<Closed>)) } < 0 {
            // SAFETY: not taken by libvirt, so still ours.
            unsafe { release::<Closed>(opaque) };
            return Err(Failure::last());
        }
        let mut session = Self { connection, monitor: None, any: Vec::new(), closed };
        session.monitor = session.register_monitor(sink);
        if session.monitor.is_none() {
            tracing::info!("no events of QEMU itself from this libvirtd; its own are used, which come later");
        }
        session.register(sink, sys::VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, on_job as *const ())?;
        let lifecycle = if session.monitor.is_some() { on_end as *const () } else { on_lifecycle as *const () };
        session.register(sink, sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle)?;
        Ok(session)
    }

    pub(super) fn closed(&self) -> &Closed {
        &self.closed
    }

    fn register_monitor(&self, sink: &Arc<Sink>) -> Option<c_int> {
        let opaque = Arc::into_raw(sink.clone()).cast_mut().cast::<c_void>();
        // SAFETY: live connection; `release::<Sink>` gives back the reference passed as `opaque`.
        let id = unsafe {
            sys::virConnectDomainQemuMonitorEventRegister(
                self.connection.0,
                std::ptr::null_mut(),
                c"^(STOP|RESUME)$".as_ptr(),
                Some(on_monitor),
                opaque,
                Some(release::<Sink>),
                sys::VIR_CONNECT_DOMAIN_QEMU_MONITOR_EVENT_REGISTER_REGEX,
            )
        };
        if id < 0 {
            // SAFETY: not taken by libvirt, so still ours.
            unsafe { release::<Sink>(opaque) };
            return None;
        }
        Some(id)
    }

    fn register(&mut self, sink: &Arc<Sink>, event: c_uint, callback: *const ()) -> Result<(), Failure> {
        let opaque = Arc::into_raw(sink.clone()).cast_mut().cast::<c_void>();
        // SAFETY: live connection. libvirt wants every callback as its generic type and calls it as the type that belongs
        // to `event`, which is what `callback` is. `release::<Sink>` gives back the reference passed as `opaque`.
        let id = unsafe {
            let generic = std::mem::transmute::<*const (), sys::virConnectDomainEventGenericCallback>(callback);
            sys::virConnectDomainEventRegisterAny(
                self.connection.0,
                std::ptr::null_mut(),
                event.cast_signed(),
                generic,
                opaque,
                Some(release::<Sink>),
            )
        };
        if id < 0 {
            let failure = Failure::last();
            // SAFETY: not taken by libvirt, so still ours.
            unsafe { release::<Sink>(opaque) };
            return Err(failure);
        }
        self.any.push(id);
        Ok(())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Each callback holds a reference to the connection: without this it would never be closed.
        // SAFETY: live connection, ids it gave. On a broken one the calls fail after forgetting the callback.
        unsafe {
            for id in &self.any {
                sys::virConnectDomainEventDeregisterAny(self.connection.0, *id);
            }
            if let Some(id) = self.monitor {
                sys::virConnectDomainQemuMonitorEventDeregister(self.connection.0, id);
            }
            sys::virConnectUnregisterCloseCallback(self.connection.0, Some(on_close));
        }
    }
}

/// Gives back the reference a registration held.
unsafe extern "C" fn release<T>(opaque: *mut c_void) {
    // SAFETY: `opaque` came from `Arc::<T>::into_raw` and is released once.
    drop(unsafe { Arc::from_raw(opaque.cast::<T>()) });
}

unsafe extern "C" fn on_close(_connection: sys::virConnectPtr, _reason: c_int, opaque: *mut c_void) {
    // SAFETY: `opaque` is the `Closed` of this registration, alive until released.
    let closed = unsafe { &*opaque.cast::<Closed>() };
    closed.broken.store(true, Ordering::SeqCst);
    closed.ring();
}

unsafe extern "C" fn on_monitor(
    _connection: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: *const c_char,
    seconds: c_longlong,
    micros: c_uint,
    _details: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt lends a live domain and a text for the call; `opaque` is the `Sink` of this registration.
    let (domain, event, sink) = unsafe { (Domain::borrowed(domain), CStr::from_ptr(event), &*opaque.cast::<Sink>()) };
    let change = match event.to_bytes() {
        b"STOP" => Change::Stopped,
        b"RESUME" => Change::Running,
        _ => return,
    };
    if let Some(vm) = ours(&domain) {
        sink.tell(vm, monotonic(seconds, micros), change);
    }
}

/// Lifecycle events where QEMU's own tell of stops and starts: only the end counts.
unsafe extern "C" fn on_end(
    connection: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: c_int,
    detail: c_int,
    opaque: *mut c_void,
) {
    if matches!(event.cast_unsigned(), sys::VIR_DOMAIN_EVENT_STOPPED | sys::VIR_DOMAIN_EVENT_CRASHED) {
        // SAFETY: the same contract.
        unsafe { on_lifecycle(connection, domain, event, detail, opaque) };
    } else {
        // SAFETY: as in `on_lifecycle`.
        let (domain, sink) = unsafe { (Domain::borrowed(domain), &*opaque.cast::<Sink>()) };
        sink.note_postcopy(&domain, event, detail);
    }
}

unsafe extern "C" fn on_lifecycle(
    _connection: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: c_int,
    detail: c_int,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt lends a live domain for the call; `opaque` is the `Sink` of this registration.
    let (domain, sink) = unsafe { (Domain::borrowed(domain), &*opaque.cast::<Sink>()) };
    sink.note_postcopy(&domain, event, detail);
    let change = match event.cast_unsigned() {
        sys::VIR_DOMAIN_EVENT_STARTED | sys::VIR_DOMAIN_EVENT_RESUMED => Change::Running,
        sys::VIR_DOMAIN_EVENT_SUSPENDED => Change::Stopped,
        sys::VIR_DOMAIN_EVENT_STOPPED | sys::VIR_DOMAIN_EVENT_CRASHED => Change::Ended,
        _ => return,
    };
    if let Some(vm) = ours(&domain) {
        sink.tell(vm, clock::now(), change);
    }
}

unsafe extern "C" fn on_job(
    _connection: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    parameters: sys::virTypedParameterPtr,
    count: c_int,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt lends a live domain and `count` parameters for the call; `opaque` is the `Sink` of this registration.
    let (domain, parameters, sink) = unsafe { (Domain::borrowed(domain), read(parameters, count), &*opaque.cast::<Sink>()) };
    if let Some(vm) = ours(&domain) {
        lock(&sink.jobs).insert(vm, parameters);
    }
}
