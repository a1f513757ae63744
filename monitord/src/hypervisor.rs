//! The one door to whatever runs guests. Two drivers stand behind it: libvirt and sandbox.
//!
//! All calls block and are made from threads that may block; a driver is shared between threads. Every call may be made
//! again. The monitor, not the driver, speaks to the switch; the driver tells it by events when a VM stops and runs.

use std::path::PathBuf;
use std::sync::mpsc::Receiver;
use violin_common::control::monitor::{MigrationMode, VmSeen, VmSpec};
use violin_common::{HostId, Instant, VmId};

/// A driver could not do as told.
#[derive(Debug, thiserror::Error)]
pub enum HypervisorError {
    /// The hypervisor said no, in its own words, and what was asked.
    #[error("{asked}: {said}")]
    Refused {
        /// What was asked.
        asked: String,
        /// What it said.
        said: String,
    },
    /// It cannot be reached now; worth trying again.
    #[error("hypervisor unreachable: {0}")]
    Unreachable(String),
    /// No VM of that name here.
    #[error("no VM {0} on this host")]
    NotHere(VmId),
    /// A move away failed, and the VM is known to run neither here nor there: nobody may be told that it does. What is known,
    /// in words; [`Hypervisor::settle`] asks again.
    #[error("{0}")]
    Doubtful(String),
    /// The driver cannot do this at all.
    #[error("the {driver} driver cannot {what}")]
    Unsupported {
        /// Driver.
        driver: &'static str,
        /// What.
        what: &'static str,
    },
}

/// Files of an image on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFiles {
    /// Kernel.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: PathBuf,
    /// Read-only root file system.
    pub root: PathBuf,
}

/// A VM changed, as the hypervisor itself tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HypervisorEvent {
    /// Which.
    pub vm: VmId,
    /// When, on the host's monotonic clock, as near to the hypervisor as it can be had.
    pub at: Instant,
    /// What.
    pub change: Change,
}

/// What happened to a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Its vCPUs stopped: in the last phase of a move away, or by hand.
    Stopped,
    /// Its vCPUs run: started, arrived, or running on after a failed move.
    Running,
    /// It is no longer on this host: moved away, shut down or dead.
    Ended,
}

/// Counters of a VM since it came to this host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// CPU time its vCPUs ran, in nanoseconds.
    pub run_ns: u64,
    /// Time they were ready to run and waited, throttling included, in nanoseconds.
    pub wait_ns: u64,
    /// How they came onto cores, where that can be had.
    pub scheduled: Option<Scheduled>,
    /// Memory resident on the host, in bytes.
    pub memory_bytes: u64,
}

/// How often the threads of a VM's vCPUs came onto cores and left them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Scheduled {
    /// Times they were put onto a core.
    pub slices: u64,
    /// Times they left it of themselves, to sleep.
    pub sleeps: u64,
    /// How many ran or were ready to, at the moment of the reading.
    pub ready: u64,
}

/// How a move ended at the source.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MoveStatistics {
    /// Bytes copied.
    pub copied_bytes: Option<u64>,
    /// The pause as the hypervisor counts it, in milliseconds.
    pub downtime_ms: Option<f64>,
    /// Its own statistics, verbatim.
    pub verbatim: Vec<(String, String)>,
}

/// Where a VM is whose move away failed or was lost sight of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Whereabouts {
    /// It runs here, and only here.
    Here,
    /// It runs at the destination, and nothing of it is left here.
    There,
    /// It is on neither host.
    Nowhere,
    /// Neither is known, or an operator has to decide; why, in words.
    Unclear(String),
}

/// Whatever runs guests.
pub trait Hypervisor: Send + Sync {
    /// `libvirt` or `sandbox`.
    fn name(&self) -> &'static str;

    /// Makes the interface a guest will be attached to, before [`Self::start`] or the arrival, and returns its name in the
    /// host's namespace. With the sandbox driver an arriving guest brings its own: the name is right, the interface comes later.
    fn make_interface(&self, spec: &VmSpec, arriving: bool) -> Result<String, HypervisorError>;

    /// Removes it; none there is no error.
    fn remove_interface(&self, vm: &VmId) -> Result<(), HypervisorError>;

    /// Starts a VM. Its console is written to [`Self::console`].
    fn start(&self, spec: &VmSpec, interface: &str, image: Option<&ImageFiles>) -> Result<(), HypervisorError>;

    /// Ends a VM at once, whatever its state; not here is no error.
    fn stop(&self, vm: &VmId) -> Result<(), HypervisorError>;

    /// Everything of ours the hypervisor has, by its own account.
    fn list(&self) -> Result<Vec<VmSeen>, HypervisorError>;

    /// File the guest's console goes to on this host. A guest that is up writes a line `violin-guest: ready` there.
    fn console(&self, vm: &VmId) -> PathBuf;

    /// At the destination: makes ready for an arrival; returns what the source's [`Self::migrate`] needs.
    fn prepare_incoming(&self, spec: &VmSpec, interface: &str, image: Option<&ImageFiles>) -> Result<String, HypervisorError>;

    /// At the destination: undoes it, ending what arrived half.
    fn cancel_incoming(&self, vm: &VmId) -> Result<(), HypervisorError>;

    /// At the source: moves a VM and returns when it runs at the destination and is gone here. On error it runs here, but for
    /// [`HypervisorError::Doubtful`].
    /// `progress` is called now and then with the done part (0 to 1, if known) and what is being done.
    fn migrate(
        &self,
        vm: &VmId,
        to: &HostId,
        uri: &str,
        mode: MigrationMode,
        progress: &mut dyn FnMut(Option<f64>, &str),
    ) -> Result<MoveStatistics, HypervisorError>;

    /// At the source, after a doubtful move or a restart in one: looks at both ends once, makes the VM run on here if it is
    /// known to be nowhere else, and ends what is left here of one that runs there. `uri` is what [`Self::migrate`] was given.
    fn settle(&self, vm: &VmId, uri: &str) -> Result<Whereabouts, HypervisorError>;

    /// At the source: asks to give up a move under way; [`Self::migrate`] then returns an error.
    fn abort(&self, vm: &VmId) -> Result<(), HypervisorError>;

    /// Counters of a VM.
    fn usage(&self, vm: &VmId) -> Result<Usage, HypervisorError>;

    /// Sets the memory a VM may use, in MiB.
    fn set_memory(&self, vm: &VmId, memory_mib: u64) -> Result<(), HypervisorError>;

    /// Sets CPU weight (1024 is normal) and cap in vCPUs.
    fn set_cpu(&self, vm: &VmId, shares: u64, cap: Option<f64>) -> Result<(), HypervisorError>;

    /// The channel of events; can be taken once.
    fn events(&self) -> Option<Receiver<HypervisorEvent>>;
}
