//! libvirt's C interface with owners for what it allocates. Nothing here decides anything.
//!
//! The `virt` crate's wrappers free job statistics with the wrong allocator and know neither events, abort, post-copy nor
//! the records of bulk statistics, so everything goes through its raw `sys` module and the types below.
#![allow(unsafe_code)]

use super::parameters::{Parameter, Parameters, Value, read};
use std::ffi::{CStr, CString, c_int};
use std::{fmt, ptr, sync::Once, thread, time::Duration};
use virt::sys;

/// A call failed, in libvirt's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) code: u32,
    pub(super) message: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Failure {
    /// The calling thread's last error; libvirt keeps one a thread.
    pub(super) fn last() -> Self {
        // SAFETY: the pointer is NULL or valid until this thread's next libvirt call; the message is copied before.
        unsafe {
            let error = sys::virGetLastError();
            if error.is_null() || (*error).message.is_null() {
                return Self { code: sys::VIR_ERR_INTERNAL_ERROR, message: "libvirt gave no reason".into() };
            }
            let message = CStr::from_ptr((*error).message).to_string_lossy().into_owned();
            Self { code: (*error).code.cast_unsigned(), message }
        }
    }

    fn of(message: impl Into<String>) -> Self {
        Self { code: sys::VIR_ERR_INVALID_ARG, message: message.into() }
    }
}

pub(super) fn check(result: c_int) -> Result<(), Failure> {
    if result < 0 { Err(Failure::last()) } else { Ok(()) }
}

pub(super) fn text(what: &str) -> Result<CString, Failure> {
    CString::new(what).map_err(|_| Failure::of(format!("got a text with a NUL byte in it: {what:?}")))
}

/// Starts libvirt's event loop, once a process and before the first connection, or keep-alive and events stay silent.
pub(super) fn run_event_loop() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        // SAFETY: no connection was opened before; `ignore` has the type asked for and lives for ever.
        unsafe {
            sys::virSetErrorFunc(ptr::null_mut(), Some(ignore));
            sys::virEventRegisterDefaultImpl();
        }
        let looping = thread::Builder::new().name("libvirt-events".into()).spawn(|| {
            loop {
                // SAFETY: the default implementation was registered above; only this thread runs it.
                if unsafe { sys::virEventRunDefaultImpl() } < 0 {
                    tracing::warn!(error = %Failure::last(), "libvirt's event loop stumbled");
                    thread::sleep(Duration::from_millis(100)); // its poll failed: do not spin
                }
            }
        });
        if let Err(error) = looping {
            tracing::error!(%error, "no thread for libvirt's events: moves will not be noticed");
        }
    });
}

/// Replaces libvirt's handler that prints every error to standard error; we return them.
unsafe extern "C" fn ignore(_data: *mut libc::c_void, _error: sys::virErrorPtr) {}

/// A connection to one libvirtd. May be used by many threads at once.
#[derive(Debug)]
pub(super) struct Connection(pub(super) sys::virConnectPtr);

// SAFETY: libvirt documents its objects as usable from any thread at once once the event loop is registered.
unsafe impl Send for Connection {}
// SAFETY: as above.
unsafe impl Sync for Connection {}

impl Connection {
    /// Connects; blocks as long as the other side takes. A peer silent for 20 s later on is taken for dead.
    pub(super) fn open(uri: &str) -> Result<Self, Failure> {
        run_event_loop();
        let uri = text(uri)?;
        // SAFETY: `uri` outlives the call.
        let raw = unsafe { sys::virConnectOpen(uri.as_ptr()) };
        if raw.is_null() {
            return Err(Failure::last());
        }
        let connection = Self(raw);
        // SAFETY: `raw` is a live connection. 1 means that the driver is not remote and needs none.
        check(unsafe { sys::virConnectSetKeepAlive(raw, 5, 3) })?;
        Ok(connection)
    }

    /// Whether its socket is still open, as this side knows.
    pub(super) fn is_alive(&self) -> bool {
        // SAFETY: live connection.
        unsafe { sys::virConnectIsAlive(self.0) == 1 }
    }

    /// Lets libvirtd ask its QEMU what it can do, which takes seconds once; later starts and arrivals find it known.
    pub(super) fn warm_up(&self, machine: &str, kind: &str) -> Result<(), Failure> {
        let (machine, kind) = (text(machine)?, text(kind)?);
        // SAFETY: live connection, texts outlive the call; the answer is NULL or a text of malloc that is ours.
        unsafe {
            let raw =
                sys::virConnectGetDomainCapabilities(self.0, ptr::null(), c"x86_64".as_ptr(), machine.as_ptr(), kind.as_ptr(), 0);
            if raw.is_null() {
                return Err(Failure::last());
            }
            libc::free(raw.cast());
        }
        Ok(())
    }

    /// The domain with this UUID, none if there is none.
    pub(super) fn domain(&self, uuid: &[u8; 16]) -> Result<Option<Domain>, Failure> {
        // SAFETY: live connection, 16 bytes as libvirt wants.
        let raw = unsafe { sys::virDomainLookupByUUID(self.0, uuid.as_ptr()) };
        if !raw.is_null() {
            return Ok(Some(Domain(raw)));
        }
        let failure = Failure::last();
        if failure.code == sys::VIR_ERR_NO_DOMAIN { Ok(None) } else { Err(failure) }
    }

    /// The domain of this name, ours or not.
    pub(super) fn domain_named(&self, name: &str) -> Result<Option<Domain>, Failure> {
        let name = text(name)?;
        // SAFETY: live connection, `name` outlives the call.
        let raw = unsafe { sys::virDomainLookupByName(self.0, name.as_ptr()) };
        if !raw.is_null() {
            return Ok(Some(Domain(raw)));
        }
        let failure = Failure::last();
        if failure.code == sys::VIR_ERR_NO_DOMAIN { Ok(None) } else { Err(failure) }
    }

    /// Starts a transient domain.
    pub(super) fn create(&self, xml: &str) -> Result<Domain, Failure> {
        let xml = text(xml)?;
        // SAFETY: live connection, `xml` outlives the call.
        let raw = unsafe { sys::virDomainCreateXML(self.0, xml.as_ptr(), 0) };
        if raw.is_null() { Err(Failure::last()) } else { Ok(Domain(raw)) }
    }

    /// Every active domain.
    pub(super) fn domains(&self) -> Result<Vec<Domain>, Failure> {
        let mut list: *mut sys::virDomainPtr = ptr::null_mut();
        // SAFETY: on success `list` holds `count` domains, each with a reference of ours, in an array of malloc.
        unsafe {
            let count = sys::virConnectListAllDomains(self.0, &raw mut list, sys::VIR_CONNECT_LIST_DOMAINS_ACTIVE);
            check(count)?;
            let domains = (0..usize::try_from(count).unwrap_or(0)).map(|at| Domain(*list.add(at))).collect();
            libc::free(list.cast());
            Ok(domains)
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // SAFETY: our reference, given back once. Domains hold their own.
        unsafe { sys::virConnectClose(self.0) };
    }
}

/// A domain of one connection.
#[derive(Debug)]
pub(super) struct Domain(sys::virDomainPtr);

// SAFETY: as for `Connection`.
unsafe impl Send for Domain {}
// SAFETY: as for `Connection`.
unsafe impl Sync for Domain {}

impl Domain {
    /// Takes a further reference to a domain a callback was lent.
    ///
    /// # Safety
    /// `raw` must be a live domain.
    pub(super) unsafe fn borrowed(raw: sys::virDomainPtr) -> Self {
        // SAFETY: promised by the caller.
        unsafe { sys::virDomainRef(raw) };
        Self(raw)
    }

    /// Its name and UUID; both are kept on this side, so this is no call to the daemon.
    pub(super) fn identity(&self) -> Option<(String, [u8; 16])> {
        let mut uuid = [0; 16];
        // SAFETY: live domain; the name lives as long as the domain and is copied.
        unsafe {
            let name = sys::virDomainGetName(self.0);
            if name.is_null() || sys::virDomainGetUUID(self.0, uuid.as_mut_ptr()) < 0 {
                return None;
            }
            Some((CStr::from_ptr(name).to_string_lossy().into_owned(), uuid))
        }
    }

    /// State (`VIR_DOMAIN_RUNNING` …) and reason.
    pub(super) fn state(&self) -> Result<(u32, u32), Failure> {
        let (mut state, mut reason) = (0, 0);
        // SAFETY: live domain, both places outlive the call.
        check(unsafe { sys::virDomainGetState(self.0, &raw mut state, &raw mut reason, 0) })?;
        Ok((state.cast_unsigned(), reason.cast_unsigned()))
    }

    /// Kills it.
    pub(super) fn destroy(&self) -> Result<(), Failure> {
        // SAFETY: live domain.
        check(unsafe { sys::virDomainDestroy(self.0) })
    }

    /// Starts its vCPUs.
    pub(super) fn resume(&self) -> Result<(), Failure> {
        // SAFETY: live domain.
        check(unsafe { sys::virDomainResume(self.0) })
    }

    /// Its description as a destination wants it.
    pub(super) fn xml(&self) -> Result<String, Failure> {
        // SAFETY: live domain; the answer is NULL or a text of malloc that is ours.
        unsafe {
            let raw = sys::virDomainGetXMLDesc(self.0, sys::VIR_DOMAIN_XML_SECURE | sys::VIR_DOMAIN_XML_MIGRATABLE);
            if raw.is_null() {
                return Err(Failure::last());
            }
            let xml = CStr::from_ptr(raw).to_string_lossy().into_owned();
            libc::free(raw.cast());
            Ok(xml)
        }
    }

    /// Asks to give up the job under way.
    pub(super) fn abort_job(&self) -> Result<(), Failure> {
        // SAFETY: live domain.
        check(unsafe { sys::virDomainAbortJob(self.0) })
    }

    /// Sets the pause a migration may end with, in milliseconds.
    pub(super) fn set_max_downtime(&self, milliseconds: u64) -> Result<(), Failure> {
        // SAFETY: live domain.
        check(unsafe { sys::virDomainMigrateSetMaxDowntime(self.0, milliseconds, 0) })
    }

    /// Switches a migration begun with `VIR_MIGRATE_POSTCOPY` to post-copy.
    pub(super) fn start_postcopy(&self) -> Result<(), Failure> {
        // SAFETY: live domain.
        check(unsafe { sys::virDomainMigrateStartPostCopy(self.0, 0) })
    }

    /// Type and statistics of the job under way, or of the last one completed.
    pub(super) fn job(&self, completed: bool) -> Result<(u32, Vec<Parameter>), Failure> {
        let flags = if completed { sys::VIR_DOMAIN_JOB_STATS_COMPLETED | sys::VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED } else { 0 };
        let mut kind = 0;
        let mut owned = Parameters::default();
        // SAFETY: live domain; libvirt allocates the array and `owned` frees it.
        check(unsafe { sys::virDomainGetJobStats(self.0, &raw mut kind, &raw mut owned.list, &raw mut owned.count, flags) })?;
        Ok((kind.cast_unsigned(), owned.read()))
    }

    /// Moves it; returns when it is over. `options` are `VIR_MIGRATE_PARAM_…` and their texts.
    pub(super) fn migrate(&self, connect: &str, options: &[(&CStr, &str)], flags: u32) -> Result<(), Failure> {
        let connect = text(connect)?;
        let mut owned = Parameters::default();
        for (name, value) in options {
            owned.add(name, &Value::Text((*value).to_owned()))?;
        }
        // SAFETY: live domain, everything outlives the call.
        check(unsafe { sys::virDomainMigrateToURI3(self.0, connect.as_ptr(), owned.list, owned.count.cast_unsigned(), flags) })
    }

    /// Its vCPUs.
    pub(super) fn vcpus(&self) -> Result<u32, Failure> {
        // SAFETY: live domain.
        let count = unsafe { sys::virDomainGetVcpusFlags(self.0, sys::VIR_DOMAIN_AFFECT_LIVE) };
        u32::try_from(count).map_err(|_| Failure::last())
    }

    /// Sets its balloon, in KiB.
    pub(super) fn set_memory(&self, kib: u64) -> Result<(), Failure> {
        // SAFETY: live domain.
        check(unsafe { sys::virDomainSetMemoryFlags(self.0, kib, sys::VIR_DOMAIN_AFFECT_LIVE) })
    }

    /// Sets scheduler parameters of the running domain.
    pub(super) fn set_scheduler(&self, parameters: &[(&CStr, Value)]) -> Result<(), Failure> {
        let mut owned = Parameters::default();
        for (name, value) in parameters {
            owned.add(name, value)?;
        }
        // SAFETY: live domain, the array outlives the call.
        check(unsafe { sys::virDomainSetSchedulerParametersFlags(self.0, owned.list, owned.count, sys::VIR_DOMAIN_AFFECT_LIVE) })
    }

    /// Its statistics of these kinds (`VIR_DOMAIN_STATS_…`), without waiting for a job under way.
    pub(super) fn statistics(&self, kinds: u32) -> Result<Vec<Parameter>, Failure> {
        let mut list = [self.0, ptr::null_mut()];
        let mut records: *mut sys::virDomainStatsRecordPtr = ptr::null_mut();
        // SAFETY: `list` ends with NULL as wanted; on success `records` holds `count` records until freed below.
        unsafe {
            let count = sys::virDomainListGetStats(
                list.as_mut_ptr(),
                kinds,
                &raw mut records,
                sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT,
            );
            check(count)?;
            let found = if count > 0 { read((**records).params, (**records).nparams) } else { Vec::new() };
            sys::virDomainStatsRecordListFree(records);
            Ok(found)
        }
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: our reference, given back once.
        unsafe { sys::virDomainFree(self.0) };
    }
}
