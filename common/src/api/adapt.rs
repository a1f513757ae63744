//! Requests to the manager: environments, hosts, VMs, decisions.

use crate::api::switch::{SwitchReply, SwitchRequest};
use crate::config::environment::EnvironmentSpec;
use crate::control::monitor::{DestinationFigures, ImageDigest, Role, SourceFigures, VmState};
use crate::{DomainId, EnvironmentId, HostId, Instant, Utc, VmId, Vni};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::ops::Deref;

/// What the manager does with its decisions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Decides and acts.
    Act,
    /// Decides and writes down what it would do.
    DryRun,
    /// Observes only.
    Observe,
}

/// One request to the manager.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AdaptRequest {
    /// Answers [`AdaptReply::Status`].
    Status,
    /// Sets what is done with decisions.
    SetMode(Mode),
    /// Starts an environment; answered with [`AdaptReply::Done`] when all its VMs are ready. Streams
    /// [`AdaptReply::Progress`] lines before.
    EnvUp {
        /// What.
        spec: EnvironmentSpec,
        /// Hosts for some of its VMs by node name; the others are placed by free cores.
        placement: BTreeMap<String, HostId>,
        /// Image for its VMs (none: what the sandbox driver needs).
        image: Option<ImageDigest>,
    },
    /// Ends an environment.
    EnvDown {
        /// Which.
        environment: EnvironmentId,
    },
    /// Takes up what runs of an environment that the journal does not know; answers [`AdaptReply::Words`].
    EnvAdopt {
        /// Which.
        environment: EnvironmentId,
    },
    /// Ends what runs of an environment that the journal does not know.
    EnvDestroy {
        /// Which.
        environment: EnvironmentId,
    },
    /// Answers [`AdaptReply::Strays`].
    StrayList,
    /// Answers [`AdaptReply::Environments`].
    EnvList,
    /// Moves all compute nodes of an environment to another domain as one gang; answered like `VmMigrate`.
    EnvMove {
        /// Which.
        environment: EnvironmentId,
        /// Where to.
        to: DomainId,
    },
    /// Answers [`AdaptReply::Hosts`].
    HostList,
    /// Nothing starts on or moves to a host from now on, and the policy empties it; answers [`AdaptReply::Words`].
    HostDrain {
        /// Which.
        host: HostId,
    },
    /// Takes that back; answers [`AdaptReply::Words`].
    HostUndrain {
        /// Which.
        host: HostId,
    },
    /// A host is gone for good; answers [`AdaptReply::Words`].
    HostForget {
        /// Which.
        host: HostId,
        /// Whether the VMs recorded on it are given up: they are stopped should it ever come back.
        vms_are_lost: bool,
    },
    /// Answers [`AdaptReply::Vms`].
    VmList,
    /// Moves one VM; streams progress, then answers [`AdaptReply::Migrations`] with that one.
    VmMigrate {
        /// Which.
        vm: VmId,
        /// Where to.
        to: HostId,
    },
    /// Gives up the move of a VM that is under way. Says at once, as progress, what that waits for, and answers
    /// [`AdaptReply::Migrations`] with that one: as it ended, or, if that takes longer than a few seconds, as still running.
    /// A gang that loses a move this way takes the others back.
    VmAbort {
        /// Which.
        vm: VmId,
    },
    /// Answers [`AdaptReply::Migrations`], oldest first.
    MigrationList,
    /// Answers [`AdaptReply::Decisions`], newest last.
    DecisionList {
        /// How many at most.
        last: u32,
    },
    /// Answers [`AdaptReply::Words`]: why the VM is where it is.
    Why {
        /// Which.
        vm: VmId,
    },
    /// Opens the access namespace of an environment; answers [`AdaptReply::Access`].
    Access {
        /// Which.
        environment: EnvironmentId,
    },
    /// Relays a request to one host's switch.
    Switch {
        /// Which host.
        host: HostId,
        /// What.
        request: SwitchRequest,
    },
    /// Streams [`AdaptReply::Event`] lines until the asker hangs up.
    Watch,
}

/// The manager at a glance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct AdaptStatus {
    /// Program version.
    pub version: String,
    /// Name of the policy that acts.
    pub policy: String,
    /// What is done with its decisions.
    pub mode: Mode,
    /// Generation of its plans.
    pub generation: u64,
    /// Hosts whose monitor is connected.
    pub hosts: u32,
    /// VMs known.
    pub vms: u32,
    /// Moves under way.
    pub moving: u32,
    /// Lines of its log that were lost since it started.
    #[serde(default)]
    pub log_lines_lost: u64,
}

/// A host as listed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct HostSeen {
    /// Name.
    pub host: HostId,
    /// Domain.
    pub domain: DomainId,
    /// Whether its monitor is connected.
    pub connected: bool,
    /// Driver of its hypervisor.
    pub driver: String,
    /// Declared cores.
    pub cores: f64,
    /// Declared cores its VMs want, smoothed; none: nothing is known of it at present.
    pub demand_cores: Option<f64>,
    /// High-demand VMs / cores; none like above.
    pub score: Option<f64>,
    /// Memory for guests, in MiB.
    pub memory_mib: u64,
    /// Free of it; none like above.
    pub memory_free_mib: Option<u64>,
    /// Seconds since its last observation.
    pub age_s: Option<f64>,
    /// VMs on it.
    pub vms: Vec<VmId>,
    /// Whether an operator wants it empty: nothing starts or moves there.
    #[serde(default)]
    pub draining: bool,
    /// What keeps those VMs on it that cannot leave a draining host, in words.
    #[serde(default)]
    pub staying: Vec<String>,
    /// What else is wrong with it, in words.
    #[serde(default)]
    pub troubles: Vec<String>,
}

/// How a VM is, as far as it is known at present.
///
/// It is known as long as the manager would act on it: the monitor of its host is connected, and has told of the VM within the
/// policy's `max-age`. What was known before that is no longer shown as how the VM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Condition {
    /// See [`VmState::Booting`].
    Booting,
    /// See [`VmState::Running`].
    Running,
    /// See [`VmState::Paused`].
    Paused,
    /// See [`VmState::Arriving`].
    Arriving,
    /// See [`VmState::Stopped`].
    Stopped,
    /// Nobody says at present.
    Unknown,
}

impl From<VmState> for Condition {
    fn from(state: VmState) -> Self {
        match state {
            VmState::Booting => Self::Booting,
            VmState::Running => Self::Running,
            VmState::Paused => Self::Paused,
            VmState::Arriving => Self::Arriving,
            VmState::Stopped => Self::Stopped,
        }
    }
}

impl std::fmt::Display for Condition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Booting => "booting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Arriving => "arriving",
            Self::Stopped => "stopped",
            Self::Unknown => "unknown",
        })
    }
}

/// A VM as listed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct VmListed {
    /// Name.
    pub vm: VmId,
    /// Environment.
    pub environment: EnvironmentId,
    /// What it is there.
    pub role: Role,
    /// Address inside its network.
    pub address: Ipv4Addr,
    /// Where it runs, or was when it was last heard of.
    pub host: Option<HostId>,
    /// How it is.
    pub state: Condition,
    /// How it was when it was last heard of; none: never since the manager started.
    #[serde(default)]
    pub last_state: Option<Condition>,
    /// Seconds since it was last heard of; none: not since the manager started.
    #[serde(default)]
    pub seen_s: Option<f64>,
    /// Last figures: run, wait and demand as fractions of its vCPUs, and demand smoothed; none: nothing is known at present.
    pub run: Option<f64>,
    /// See above.
    pub wait: Option<f64>,
    /// See above.
    pub demand: Option<f64>,
    /// See above.
    pub smoothed_demand: Option<f64>,
    /// Where it is moving to.
    pub moving_to: Option<HostId>,
    /// Whether an operator wants that move given up.
    #[serde(default)]
    pub giving_up: bool,
}

/// How far an environment is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EnvironmentLife {
    /// Its VMs are being started.
    Starting,
    /// It is up.
    #[default]
    Ready,
    /// It is being ended; some of its VMs may still run.
    Ending,
}

impl std::fmt::Display for EnvironmentLife {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Ending => "ending",
        })
    }
}

/// A VM that runs though the journal knows nothing of it, as listed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct StraySeen {
    /// Always: where VMs of both kinds stand in one list, this tells them apart.
    pub stray: bool,
    /// Name.
    pub vm: VmId,
    /// Environment; none, as for what follows: its monitor does not tell.
    pub environment: Option<EnvironmentId>,
    /// What it is there.
    pub role: Option<Role>,
    /// Address inside its network.
    pub address: Option<Ipv4Addr>,
    /// Its network.
    pub vni: Option<Vni>,
    /// Where it runs, or was when that host was last heard of.
    pub host: HostId,
    /// How it is.
    pub state: Condition,
}

/// An environment as listed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct EnvironmentSeen {
    /// As it was asked for.
    pub spec: EnvironmentSpec,
    /// Home domain: where its head node stays.
    pub home: DomainId,
    /// How far it is.
    #[serde(default)]
    pub life: EnvironmentLife,
    /// How far its start or end is, and what was last said of that, in words; none: nothing is under way.
    #[serde(default)]
    pub progress: Option<String>,
    /// Seconds since that began, or since this manager took it up.
    #[serde(default)]
    pub progress_s: Option<f64>,
    /// Its VMs.
    pub vms: Vec<VmListed>,
}

/// A named, weighted part of a score.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Term {
    /// Name.
    pub name: String,
    /// Value before the move.
    pub before: f64,
    /// Value it would have after it.
    pub after: f64,
    /// Unit.
    pub unit: String,
}

/// How a move ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Under way.
    Running,
    /// The VM runs at its destination.
    Done,
    /// The VM runs at its source; why.
    Undone(String),
}

/// One move of one VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Migration {
    /// Counts up over the life of the deployment.
    pub number: u64,
    /// Which.
    pub vm: VmId,
    /// From.
    pub from: HostId,
    /// To.
    pub to: HostId,
    /// Domain it came from.
    pub from_domain: DomainId,
    /// Domain it went to.
    pub to_domain: DomainId,
    /// Environment whose compute nodes move together, if this is part of a gang.
    pub gang: Option<EnvironmentId>,
    /// Decision that wanted it; none when an operator asked.
    pub decision: Option<u64>,
    /// Why, in words.
    pub reason: String,
    /// The decision's terms.
    pub terms: Vec<Term>,
    /// Driver of the hypervisor.
    pub driver: String,
    /// When its plan was announced, on the manager's clock.
    pub announced: Instant,
    /// When its first step began.
    pub began: Option<Instant>,
    /// When it ended.
    pub ended: Option<Instant>,
    /// How.
    pub outcome: Outcome,
    /// The VM's smoothed demand when decided.
    pub demand_before: f64,
    /// Figures of the source.
    pub source: Option<SourceFigures>,
    /// Figures of the destination.
    pub destination: Option<DestinationFigures>,
}

/// A span of time, and how far off it may be.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Span {
    /// In milliseconds.
    pub ms: f64,
    /// At most this much more or less, in milliseconds: 0 where one clock saw both ends.
    pub error_ms: f64,
}

/// A move as told. Times of its [`Migration`] are of clocks of the manager and of hosts; what can be said of them elsewhere stands
/// beside them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationSeen {
    /// The move.
    #[serde(flatten)]
    pub migration: Migration,
    /// When its plan was announced; none, as for what follows: it was recorded by a version that did not tell.
    #[serde(default)]
    pub announced_at: Option<Utc>,
    /// When its first step began.
    #[serde(default)]
    pub began_at: Option<Utc>,
    /// When it ended.
    #[serde(default)]
    pub ended_at: Option<Utc>,
    /// From its first step to its end, in milliseconds.
    #[serde(default)]
    pub total_ms: Option<f64>,
    /// From the source's hypervisor stopping the VM to the destination's running it.
    #[serde(default)]
    pub pause: Option<Span>,
    /// From the last frame delivered at the source to the first one read at the destination.
    #[serde(default)]
    pub gap: Option<Span>,
}

impl From<Migration> for MigrationSeen {
    fn from(migration: Migration) -> Self {
        Self { migration, announced_at: None, began_at: None, ended_at: None, total_ms: None, pause: None, gap: None }
    }
}

impl Deref for MigrationSeen {
    type Target = Migration;
    fn deref(&self) -> &Migration {
        &self.migration
    }
}

/// A decision as told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DecisionTold {
    /// The decision.
    #[serde(flatten)]
    pub decision: DecisionSeen,
    /// When it was taken; none: it was recorded by a version that did not tell.
    #[serde(default)]
    pub decided_at: Option<Utc>,
}

impl Deref for DecisionTold {
    type Target = DecisionSeen;
    fn deref(&self) -> &DecisionSeen {
        &self.decision
    }
}

/// What the manager thought in one cycle that changed something or refused something.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DecisionSeen {
    /// Counts up.
    pub number: u64,
    /// When, on the manager's clock.
    pub at: Instant,
    /// What was done with it.
    pub mode: Mode,
    /// Policy.
    pub policy: String,
    /// What it wants, in words; one line a move.
    pub moves: Vec<String>,
    /// Why, in words.
    pub reason: String,
    /// Terms of the score.
    pub terms: Vec<Term>,
    /// What was considered and refused, in words.
    pub refusals: Vec<String>,
}

/// What a watcher is told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// A decision was taken.
    Decided(DecisionTold),
    /// A move was announced; its first step follows after the configured notice.
    Announced(MigrationSeen),
    /// Its first step began.
    Began(MigrationSeen),
    /// It ended.
    Ended(MigrationSeen),
    /// A host came or went.
    Host {
        /// Which.
        host: HostId,
        /// Whether it is there now.
        connected: bool,
    },
}

/// Answers of the manager.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(clippy::large_enum_variant)] // One at a time is made and printed: a box would save nothing and hide the shape.
pub enum AdaptReply {
    /// Done, nothing to tell.
    Done,
    /// Still at work, in words; more lines follow.
    Progress(String),
    /// To `Status`.
    Status(AdaptStatus),
    /// To `EnvList`.
    Environments(Vec<EnvironmentSeen>),
    /// To `HostList`.
    Hosts(Vec<HostSeen>),
    /// To `VmList`.
    Vms(Vec<VmListed>),
    /// To `StrayList`.
    Strays(Vec<StraySeen>),
    /// To `MigrationList`, `VmMigrate`, `EnvMove`.
    Migrations(Vec<MigrationSeen>),
    /// To `DecisionList`.
    Decisions(Vec<DecisionTold>),
    /// To `Why`.
    Words(String),
    /// To `Access`.
    Access {
        /// Host it is on.
        host: HostId,
        /// Path of the network namespace there.
        netns: String,
    },
    /// To `Switch`.
    Switch(SwitchReply),
    /// To `Watch`.
    Event(Event),
}
