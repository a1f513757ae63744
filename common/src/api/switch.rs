//! Requests to a switch: its ports, networks, tables, and the steps of a move.

use crate::{DomainId, Epoch, HostId, Instant, MacAddr, PortId, VmId, Vni};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// A virtual network as a switch carries it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct NetworkSpec {
    /// Its identifier.
    pub vni: Vni,
    /// Largest layer-3 packet, in bytes; the same on every host.
    pub mtu: u16,
    /// How long a silent learned MAC stays in the FDB, in seconds.
    pub ageing_s: u32,
}

/// What a port is attached to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PortKind {
    /// An existing interface in the switch's network namespace (a VM's TAP, a veth, a NIC), which the switch then owns.
    Packet {
        /// Its name.
        interface: String,
    },
    /// A TAP the switch creates and holds.
    Tap {
        /// Name of the interface.
        interface: String,
        /// Path of the network namespace it is moved into (`/run/netns/NAME` or `/proc/PID/ns/net`); none: it stays.
        netns: Option<String>,
    },
    /// A gateway to one VXLAN tunnel end that is not ours (RFC 7348).
    Vxlan {
        /// Where datagrams come from and go to on this host.
        local: SocketAddr,
        /// The foreign tunnel end.
        remote: SocketAddr,
        /// The identifier used on the foreign side.
        remote_vni: Vni,
    },
}

/// How a port stands to the owned MAC behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ownership {
    /// The VM starts (or runs) here; this switch claims the MAC with this epoch.
    Here {
        /// Epoch to claim.
        epoch: Epoch,
    },
    /// The VM will arrive by a move; the port says nothing until a grant came and the VM runs here.
    Arriving,
}

/// The owned MAC of a port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct OwnedMac {
    /// The address.
    pub mac: MacAddr,
    /// The VM it belongs to.
    pub vm: VmId,
    /// Whether the VM is here already.
    pub ownership: Ownership,
}

/// A port to be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct PortSpec {
    /// The network it belongs to, which must exist.
    pub vni: Vni,
    /// What it is attached to.
    pub kind: PortKind,
    /// The MAC of the managed VM behind it: only that source may then speak here. None: sources are learned.
    pub owned: Option<OwnedMac>,
}

/// Where a move of an owned MAC stands on this switch. See docs/architecture.md, Moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MoveState {
    /// Destination: a port waits for a grant.
    Absent,
    /// The VM runs here; frames flow both ways.
    Owned,
    /// Source: the destination has been named; frames still flow.
    Granted,
    /// Source: the VM stopped; nothing from the port enters the network, frames for it go to the grantee.
    Fenced,
    /// Source: the destination owns it; frames for it are forwarded by tombstone.
    Gone,
    /// Destination: granted; takes frames for the VM, holds what the port sends.
    Prepared,
    /// Destination: the grant is forgotten for ever.
    Released,
    /// The MAC is owned by another switch.
    Elsewhere,
}

/// One request to a switch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SwitchRequest {
    /// Answers [`SwitchReply::Status`].
    Status,
    /// Carries a network from now on; doing it again with the same values is fine.
    NetworkAdd(NetworkSpec),
    /// Stops carrying a network; its ports must be gone.
    NetworkRemove {
        /// Which.
        vni: Vni,
    },
    /// Answers [`SwitchReply::Networks`].
    NetworkList,
    /// Makes a port; answers [`SwitchReply::Port`].
    PortAdd(PortSpec),
    /// Removes a port and what it did to its interface. A port that does not exist is no error.
    PortRemove {
        /// Which.
        port: PortId,
    },
    /// Answers [`SwitchReply::Ports`].
    PortList,
    /// Answers [`SwitchReply::Peers`].
    PeerList,
    /// Answers [`SwitchReply::Fdb`].
    FdbList {
        /// Only of this network.
        vni: Option<Vni>,
    },
    /// Forgets all learned MACs of a network.
    FdbFlush {
        /// Which.
        vni: Vni,
    },
    /// Answers [`SwitchReply::Counters`].
    Counters,
    /// Answers [`SwitchReply::Traffic`].
    Traffic,
    /// At the source: names the destination; answered when that switch has the grant (it is PREPARED).
    MoveGrant {
        /// Network.
        vni: Vni,
        /// The VM's MAC.
        mac: MacAddr,
        /// Destination.
        to: HostId,
    },
    /// At the source: the hypervisor stopped the VM.
    MoveStopped {
        /// Network.
        vni: Vni,
        /// The VM's MAC.
        mac: MacAddr,
    },
    /// At either end: the VM runs here (again).
    MoveRunning {
        /// Network.
        vni: Vni,
        /// The VM's MAC.
        mac: MacAddr,
    },
    /// At either end: the move will not happen.
    MoveAbort {
        /// Network.
        vni: Vni,
        /// The VM's MAC.
        mac: MacAddr,
    },
    /// Answers [`SwitchReply::Move`].
    MoveStatus {
        /// Network.
        vni: Vni,
        /// The VM's MAC.
        mac: MacAddr,
    },
    /// Answers [`SwitchReply::PortConditions`].
    PortConditions,
}

/// The daemon at a glance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SwitchStatus {
    /// Its host.
    pub host: HostId,
    /// Its domain.
    pub domain: DomainId,
    /// Program version.
    pub version: String,
    /// Address of the mesh port.
    pub listen: SocketAddr,
    /// Seconds since start.
    pub uptime_s: u64,
    /// Peers now connected.
    pub peers: u32,
    /// Networks carried.
    pub networks: u32,
    /// Ports.
    pub ports: u32,
}

/// What went through a port. Frames count as the guest sees them: a super-frame is one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct PortTraffic {
    /// Frames taken from the port.
    pub frames_in: u64,
    /// Bytes of them.
    pub bytes_in: u64,
    /// Frames written to the port.
    pub frames_out: u64,
    /// Bytes of them.
    pub bytes_out: u64,
    /// Frames taken whose packets (or segments) are larger than the network's MTU; carried all the same.
    #[serde(default)]
    pub oversize: u64,
    /// When a frame was last written to the port.
    pub last_out: Option<Instant>,
}

/// A port as listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct PortSeen {
    /// Its number.
    pub port: PortId,
    /// As it was asked for.
    pub spec: PortSpec,
    /// Where a move of its owned MAC stands.
    pub state: Option<MoveState>,
    /// The epoch of its owned MAC.
    pub epoch: Option<Epoch>,
    /// What went through.
    pub traffic: PortTraffic,
}

/// Whether a port works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PortCondition {
    /// Attached: frames flow.
    Attached,
    /// What it is attached to is not there (yet).
    Waiting,
    /// Shut: the guard that keeps it apart from the host's own stack was taken away and could not be put back.
    GuardLost,
    /// Its interface is needed by the host itself; tried again when the configuration is read again.
    Refused,
}

/// How a port is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct PortConditionSeen {
    /// Which.
    pub port: PortId,
    /// Whether it works.
    pub condition: PortCondition,
    /// What it waits for, or why it is shut.
    pub what: Option<String>,
    /// For how many seconds that has been so.
    pub since_s: u64,
    /// How often somebody took its guard away; where it is attached, it was put back.
    pub guard_losses: u32,
}

/// What kind of trouble there is with a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TroubleKind {
    /// Nobody answers where it is called.
    NoAnswer,
    /// It was connected, and is not any more.
    Lost,
    /// It refuses us, or we refuse it.
    Refused,
    /// A second switch with the same certificate is refused.
    Twin,
    /// Networks have another MTU there.
    Mtu,
    /// Its data is sealed although our configuration would let it go plain.
    Plain,
}

/// What is wrong with a peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct PeerTrouble {
    /// What kind of.
    pub kind: TroubleKind,
    /// In words, with what to do.
    pub why: String,
    /// For how many seconds.
    pub for_s: u64,
}

/// A peer as listed: every member that is known, every `join` address nobody has answered at, and whoever has our own name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct PeerSeen {
    /// Its host; none: a `join` address nobody has answered at.
    pub host: Option<HostId>,
    /// Its domain; none: it was never connected.
    pub domain: Option<DomainId>,
    /// Where its mesh port is.
    pub address: SocketAddr,
    /// Whether the control channel stands.
    pub connected: bool,
    /// Round-trip time of the control channel, in milliseconds.
    pub rtt_ms: Option<f64>,
    /// Networks it carries.
    pub networks: Vec<Vni>,
    /// Datagrams sent to and taken from it.
    pub datagrams_out: u64,
    /// See above.
    pub datagrams_in: u64,
    /// How data to and from it is protected: a cipher with its library, or `plain`.
    #[serde(default)]
    pub protection: Option<String>,
    /// Why it is not connected, and what else is wrong with it.
    #[serde(default)]
    pub troubles: Vec<PeerTrouble>,
}

/// Where a MAC is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FdbPlace {
    /// Behind a port of this switch.
    Port(PortId),
    /// Behind another switch.
    Host(HostId),
}

/// One line of the FDB.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FdbEntry {
    /// Network.
    pub vni: Vni,
    /// Outer VLAN identifier, 0 for untagged.
    pub vid: u16,
    /// Address.
    pub mac: MacAddr,
    /// Where it is.
    pub place: FdbPlace,
    /// Seconds since it was last seen; none for an owned MAC.
    pub idle_s: Option<u32>,
    /// Epoch of an owned MAC; none for a learned one.
    pub epoch: Option<Epoch>,
}

/// A counter's name and value; drops are named `drop.REASON`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Counter {
    /// Name.
    pub name: String,
    /// Value since start.
    pub value: u64,
}

/// What one MAC sent to another since the switch started, as seen where it entered the network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct TrafficSeen {
    /// Network.
    pub vni: Vni,
    /// Sender.
    pub from: MacAddr,
    /// Receiver; group addresses are counted under [`MacAddr::BROADCAST`].
    pub to: MacAddr,
    /// Frames.
    pub frames: u64,
    /// Bytes.
    pub bytes: u64,
}

/// What is known of one owned MAC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MoveSeen {
    /// Where the move stands here.
    pub state: MoveState,
    /// Highest epoch known.
    pub epoch: Epoch,
    /// Owner (or grantee) as far as known.
    pub host: Option<HostId>,
    /// When each state was last entered here.
    pub entered: Vec<(MoveState, Instant)>,
}

/// Answers of a switch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SwitchReply {
    /// Done, nothing to tell.
    Done,
    /// To `Status`.
    Status(SwitchStatus),
    /// To `NetworkList`.
    Networks(Vec<NetworkSpec>),
    /// To `PortAdd`.
    Port(PortId),
    /// To `PortList`.
    Ports(Vec<PortSeen>),
    /// To `PeerList`.
    Peers(Vec<PeerSeen>),
    /// To `FdbList`.
    Fdb(Vec<FdbEntry>),
    /// To `Counters`.
    Counters(Vec<Counter>),
    /// To `Traffic`.
    Traffic(Vec<TrafficSeen>),
    /// To `MoveStatus`.
    Move(MoveSeen),
    /// To `PortConditions`.
    PortConditions(Vec<PortConditionSeen>),
}
