//! What a monitor and the manager tell each other.
//!
//! The monitor dials the manager. It opens one stream and sends [`Report`]s on it, [`Report::Hello`] first. The manager
//! opens a stream for each [`Command`] and reads [`Answer`]s from it: any number of [`Answer::Progress`], then one other.
//! A command whose stream breaks is carried on or undone by the monitor as its documentation says; the manager learns the
//! outcome from [`Command::List`] after the next HELLO. Every command may be sent again.

use crate::api::switch::{MoveSeen, NetworkSpec, SwitchReply, SwitchRequest};
use crate::{DomainId, EnvironmentId, Epoch, HostId, Instant, MacAddr, VmId, Vni};
use serde::{Deserialize, Serialize};
use std::net::{Ipv4Addr, SocketAddr};

/// Version of this surface. Raised when the meaning of an existing message changes.
pub const PROTOCOL: u16 = 1;

/// A digest of an image: SHA-256 of its manifest, 64 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageDigest(String);

/// A text was not a digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("got image digest {0:?}, want 64 hexadecimal digits (SHA-256)")]
pub struct BadDigest(pub String);

impl ImageDigest {
    /// The digest as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for ImageDigest {
    type Error = BadDigest;
    fn try_from(text: String) -> Result<Self, BadDigest> {
        if text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            Ok(Self(text))
        } else {
            Err(BadDigest(text))
        }
    }
}

impl From<ImageDigest> for String {
    fn from(digest: ImageDigest) -> Self {
        digest.0
    }
}

/// What a VM is in its environment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The environment's entry; stays within its home domain.
    Head,
    /// Computes; may go anywhere the environment allows.
    Compute,
}

/// Everything a monitor needs to run a VM, at its first host and at every later one.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct VmSpec {
    /// Its name, also its domain's name at the hypervisor.
    pub vm: VmId,
    /// Its environment.
    pub environment: EnvironmentId,
    /// What it is there.
    pub role: Role,
    /// Its network.
    pub network: NetworkSpec,
    /// Its MAC.
    pub mac: MacAddr,
    /// Its address inside the network.
    pub address: Ipv4Addr,
    /// Length of the network's prefix, in bits.
    pub prefix_len: u8,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory, in MiB.
    pub memory_mib: u64,
    /// Its root image; none only for drivers that need none (sandbox).
    pub image: Option<ImageDigest>,
    /// `KEY=VALUE` lines for the guest (docs/guest.md): names, hosts, keys.
    pub guest_config: String,
}

/// Without what its guest is told: that holds a private key.
impl std::fmt::Debug for VmSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { vm, environment, role, network, mac, address, prefix_len, vcpus, memory_mib, image, guest_config: _ } = self;
        f.debug_struct("VmSpec")
            .field("vm", vm)
            .field("environment", environment)
            .field("role", role)
            .field("network", network)
            .field("mac", mac)
            .field("address", address)
            .field("prefix_len", prefix_len)
            .field("vcpus", vcpus)
            .field("memory_mib", memory_mib)
            .field("image", image)
            .finish_non_exhaustive()
    }
}

/// Whether and how a VM is on a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// Started, has not said that it is ready.
    Booting,
    /// Runs.
    Running,
    /// Stopped in the middle of a move, or by hand.
    Paused,
    /// A move towards this host is prepared or under way; it does not run here yet.
    Arriving,
    /// Not running any more.
    Stopped,
}

/// One VM as a monitor's hypervisor sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct VmSeen {
    /// Which.
    pub vm: VmId,
    /// How it is.
    pub state: VmState,
    /// Whether a move away from this host is under way.
    pub leaving: bool,
}

/// What a monitor tells of its host when it connects.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Hello {
    /// [`PROTOCOL`].
    pub protocol: u16,
    /// Host; must be the name in its certificate.
    pub host: HostId,
    /// Domain; must be the one in its certificate.
    pub domain: DomainId,
    /// Name of the driver: `libvirt` or `sandbox`.
    pub driver: String,
    /// Cores its guests may use together, as declared in its configuration.
    pub cores: f64,
    /// Memory its guests may use together, in MiB.
    pub memory_mib: u64,
    /// Where other monitors fetch images from it.
    pub image_address: SocketAddr,
    /// Images it has.
    pub images: Vec<ImageDigest>,
    /// Program version.
    pub version: String,
}

/// Load of the host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct HostSample {
    /// Declared cores in use by guests.
    pub guest_cores: f64,
    /// Memory its guests may still take, in MiB.
    pub memory_free_mib: u64,
    /// Share of time in which some task waited for CPU (PSI some avg10, 0 to 1), if the kernel tells.
    pub cpu_pressure: Option<f64>,
    /// The same for memory.
    pub memory_pressure: Option<f64>,
}

/// Load of one VM since the last observation. Fractions are of its vCPUs' declared speed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct VmSample {
    /// Which.
    pub vm: VmId,
    /// How it is.
    pub state: VmState,
    /// Time run / (wall × vCPUs), 0 to 1.
    pub run: f64,
    /// Time it was ready to run and waited / (wall × vCPUs), 0 to 1.
    pub wait: f64,
    /// Run, plus wait where it counts; 0 to 1. See docs/architecture.md, Demand.
    pub demand: f64,
    /// Memory resident on the host, in MiB.
    pub memory_mib: u64,
    /// Bytes per second it received from the network.
    pub net_in: f64,
    /// Bytes per second it sent.
    pub net_out: f64,
}

/// What one VM's MAC sent to another since the last observation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct TrafficSample {
    /// Network.
    pub vni: Vni,
    /// Sender.
    pub from: MacAddr,
    /// Receiver.
    pub to: MacAddr,
    /// Bytes per second.
    pub bytes: f64,
    /// Frames per second.
    pub frames: f64,
}

/// What one monitor saw, once a period.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Observation {
    /// When, on the host's clock.
    pub at: Instant,
    /// The host.
    pub host: HostSample,
    /// Its VMs.
    pub vms: Vec<VmSample>,
    /// Traffic of its VMs.
    pub traffic: Vec<TrafficSample>,
    /// What could not be read, in words.
    pub missing: Vec<String>,
}

/// What a monitor sends unasked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Report {
    /// First of all.
    Hello(Hello),
    /// Once a period.
    Observation(Observation),
    /// A VM changed its state, seen from the hypervisor.
    Vm(VmSeen),
}

/// How a VM is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationMode {
    /// Copy while it runs, stop for the rest.
    PreCopy,
    /// Stop, move, start: the rest follows on demand.
    PostCopy,
    /// Stop, copy, start.
    StopAndCopy,
}

/// What the manager wants of a monitor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Command {
    /// Starts a VM: image (fetched from a source if missing), interface, port owning the MAC, domain. Undone as a whole if
    /// any part fails. Answered by [`Answer::Done`] once the hypervisor runs it; readiness comes as a report.
    Start {
        /// Which.
        spec: VmSpec,
        /// Epoch its port claims.
        epoch: Epoch,
        /// Monitors that may have the image.
        image_sources: Vec<SocketAddr>,
    },
    /// Ends a VM and removes all that was made for it. A VM that is not here is no error.
    Stop {
        /// Which.
        vm: VmId,
    },
    /// At the destination: image, interface, port waiting for a grant. Answered by [`Answer::Prepared`].
    PrepareIncoming {
        /// Which.
        spec: VmSpec,
        /// Monitors that may have the image.
        image_sources: Vec<SocketAddr>,
    },
    /// At the destination: undoes [`Command::PrepareIncoming`]. Refused if the VM already runs here.
    CancelIncoming {
        /// Which.
        vm: VmId,
    },
    /// At the source: grant, move, fence when it stops, clean up when it is gone. If the hypervisor fails, the VM runs on
    /// here, the grant is taken back, and the answer is a failure. Carried to its end even if the stream breaks.
    /// Answered by [`Answer::Migrated`].
    Migrate {
        /// Which.
        vm: VmId,
        /// Where to.
        to: HostId,
        /// What the destination answered to `PrepareIncoming`.
        uri: String,
        /// How.
        mode: MigrationMode,
    },
    /// At the source: asks the hypervisor to give up a move under way.
    AbortMigration {
        /// Which.
        vm: VmId,
    },
    /// At the destination: waits until the VM runs here and owns its MAC. Answered by [`Answer::Arrived`].
    FinishIncoming {
        /// Which.
        vm: VmId,
    },
    /// Makes (or finds) the access namespace of an environment on this host; answered by [`Answer::Access`].
    AccessOpen {
        /// Environment.
        environment: EnvironmentId,
        /// Its network.
        network: NetworkSpec,
        /// Address of the access interface.
        address: Ipv4Addr,
        /// Length of the network's prefix, in bits.
        prefix_len: u8,
    },
    /// Removes it.
    AccessClose {
        /// Environment.
        environment: EnvironmentId,
    },
    /// Removes a network that no port uses any more; it is carried by those commands that need it.
    NetworkRemove {
        /// Which.
        vni: Vni,
    },
    /// Sets the memory a VM may use, by its balloon.
    SetMemory {
        /// Which.
        vm: VmId,
        /// MiB.
        memory_mib: u64,
    },
    /// Sets a VM's CPU weight (1024 is normal) and cap in vCPUs (none: no cap).
    SetCpu {
        /// Which.
        vm: VmId,
        /// Weight.
        shares: u64,
        /// Cap.
        cap: Option<f64>,
    },
    /// Answered by [`Answer::Vms`].
    List,
    /// Relays a request to the host's switch; answered by [`Answer::Switch`].
    Switch(SwitchRequest),
    /// Answered by [`Answer::Described`]; by no answer of a monitor that is older than this command.
    Describe {
        /// Which; one that is not here is a failure.
        vm: VmId,
    },
    /// Answered at once by [`Answer::Clock`]; by no answer of a monitor that is older than this command.
    Clock,
}

/// Figures of a move, all times on the host's monotonic clock in nanoseconds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SourceFigures {
    /// When the command began.
    pub began: Instant,
    /// When the destination had the grant.
    pub granted: Option<Instant>,
    /// When the hypervisor stopped the VM (its own event).
    pub stopped: Option<Instant>,
    /// When the last frame was written to the VM's port here.
    pub last_delivered: Option<Instant>,
    /// When the hypervisor said that it is done.
    pub done: Option<Instant>,
    /// Bytes the hypervisor copied, if it tells.
    pub copied_bytes: Option<u64>,
    /// The pause as the hypervisor counts it, in milliseconds, if it tells.
    pub hypervisor_downtime_ms: Option<f64>,
    /// The hypervisor's own statistics, verbatim, for the record.
    pub hypervisor_statistics: Vec<(String, String)>,
    /// The move as this switch saw it.
    pub fabric: Option<MoveSeen>,
}

/// The same at the destination.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DestinationFigures {
    /// When the hypervisor said that the VM runs here (its own event).
    pub resumed: Option<Instant>,
    /// When the guest was first seen to have read a frame from its interface.
    pub first_read: Option<Instant>,
    /// The move as this switch saw it.
    pub fabric: Option<MoveSeen>,
}

/// What a monitor answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Done.
    Done,
    /// Still at work: how far, 0 to 1 where known, and what is being done.
    Progress {
        /// Done part.
        part: Option<f64>,
        /// In words.
        doing: String,
    },
    /// To `PrepareIncoming`: what the source gives to its hypervisor.
    Prepared {
        /// Opaque to the manager.
        uri: String,
    },
    /// To `Migrate`.
    Migrated(SourceFigures),
    /// To `FinishIncoming`.
    Arrived(DestinationFigures),
    /// To `AccessOpen`: path of the network namespace on that host.
    Access {
        /// For example `/run/netns/NAME`.
        netns: String,
    },
    /// To `List`.
    Vms(Vec<VmSeen>),
    /// To `Switch`.
    Switch(Result<SwitchReply, String>),
    /// Not done; got, wanted, and what was undone.
    Failed(String),
    /// To `Describe`.
    Described {
        /// As it was started.
        spec: Box<VmSpec>,
        /// Highest epoch known of it.
        epoch: Option<Epoch>,
    },
    /// To `Clock`.
    Clock {
        /// What the host's monotonic clock shows.
        at: Instant,
        /// The clock's name: no other clock has it, of no other machine, boot or time namespace.
        name: String,
    },
}
