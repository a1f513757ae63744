//! `port`, `peer`, `fdb`, `counters`: what switches have and know.

use crate::table::{Output, joined, or_dash};
use crate::target::Target;
use anyhow::{Result, bail};
use serde::Serialize;
use violin_common::api::switch::{Counter, FdbEntry, FdbPlace, PeerSeen, PortKind, PortSeen, SwitchReply, SwitchRequest};
use violin_common::{HostId, Vni};

/// Which hosts.
#[derive(Debug, clap::Args)]
pub(crate) struct Of {
    /// Only this host (default: all hosts the manager knows).
    #[arg(long)]
    host: Option<HostId>,
}

#[derive(Serialize)]
struct On<T> {
    host: Option<HostId>,
    #[serde(flatten)]
    what: T,
}

fn collect<T>(
    target: &Target,
    of: Of,
    request: &SwitchRequest,
    take: impl Fn(SwitchReply) -> Option<Vec<T>>,
) -> Result<Vec<On<T>>> {
    let mut all = Vec::new();
    for host in target.switches(of.host)? {
        let reply = target.switch(host.as_ref(), request.clone())?;
        let Some(values) = take(reply) else { bail!("the switch gave an answer to another question: are both of one version?") };
        all.extend(values.into_iter().map(|what| On { host: host.clone(), what }));
    }
    Ok(all)
}

/// Lists ports.
pub(crate) fn ports(target: &Target, output: Output, of: Of) -> Result<()> {
    let ports = collect(target, of, &SwitchRequest::PortList, |reply| match reply {
        SwitchReply::Ports(ports) => Some(ports),
        _ => None,
    })?;
    output.list(
        &ports,
        ["HOST", "PORT", "VNI", "KIND", "ATTACHED TO", "OWNED MAC", "VM", "STATE", "EPOCH", "IN", "OUT"],
        |On { host, what: port }: &On<PortSeen>| {
            let (kind, to) = match &port.spec.kind {
                PortKind::Packet { interface } => ("packet", interface.clone()),
                PortKind::Tap { interface, .. } => ("tap", interface.clone()),
                PortKind::Vxlan { remote, remote_vni, .. } => ("vxlan", format!("{remote} vni {remote_vni}")),
            };
            let owned = port.spec.owned.as_ref();
            [
                or_dash(host.as_ref()),
                port.port.to_string(),
                port.spec.vni.to_string(),
                kind.to_owned(),
                to,
                or_dash(owned.map(|owned| owned.mac)),
                or_dash(owned.map(|owned| &owned.vm)),
                or_dash(port.state.map(|state| format!("{state:?}").to_lowercase())),
                or_dash(port.epoch),
                format!("{} frames", port.traffic.frames_in),
                format!("{} frames", port.traffic.frames_out),
            ]
        },
    )
}

/// Lists peers.
pub(crate) fn peers(target: &Target, output: Output, of: Of) -> Result<()> {
    let peers = collect(target, of, &SwitchRequest::PeerList, |reply| match reply {
        SwitchReply::Peers(peers) => Some(peers),
        _ => None,
    })?;
    output.list(
        &peers,
        ["HOST", "PEER", "DOMAIN", "ADDRESS", "CONNECTED", "RTT", "NETWORKS", "OUT", "IN"],
        |On { host, what: peer }: &On<PeerSeen>| {
            [
                or_dash(host.as_ref()),
                peer.host.to_string(),
                peer.domain.to_string(),
                peer.address.to_string(),
                if peer.connected { "yes" } else { "no" }.to_owned(),
                or_dash(peer.rtt_ms.map(|rtt| format!("{rtt:.2} ms"))),
                joined(&peer.networks),
                format!("{} datagrams", peer.datagrams_out),
                format!("{} datagrams", peer.datagrams_in),
            ]
        },
    )
}

/// Lists the FDB.
pub(crate) fn fdb(target: &Target, output: Output, of: Of, vni: Option<Vni>) -> Result<()> {
    let entries = collect(target, of, &SwitchRequest::FdbList { vni }, |reply| match reply {
        SwitchReply::Fdb(entries) => Some(entries),
        _ => None,
    })?;
    output.list(&entries, ["HOST", "VNI", "VID", "MAC", "PLACE", "KIND", "IDLE"], |On { host, what: entry }: &On<FdbEntry>| {
        [
            or_dash(host.as_ref()),
            entry.vni.to_string(),
            entry.vid.to_string(),
            entry.mac.to_string(),
            match &entry.place {
                FdbPlace::Port(port) => port.to_string(),
                FdbPlace::Host(host) => host.to_string(),
            },
            entry.epoch.map_or_else(|| "learned".to_owned(), |epoch| format!("owned, epoch {epoch}")),
            or_dash(entry.idle_s.map(|idle| format!("{idle} s"))),
        ]
    })
}

/// Lists counters that are not zero.
pub(crate) fn counters(target: &Target, output: Output, of: Of, all: bool) -> Result<()> {
    let mut counters = collect(target, of, &SwitchRequest::Counters, |reply| match reply {
        SwitchReply::Counters(counters) => Some(counters),
        _ => None,
    })?;
    counters.retain(|counter| all || counter.what.value > 0);
    output.list(&counters, ["HOST", "COUNTER", "VALUE"], |On { host, what }: &On<Counter>| {
        [or_dash(host.as_ref()), what.name.clone(), what.value.to_string()]
    })
}
