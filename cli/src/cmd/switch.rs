//! `port`, `peer`, `fdb`, `counters`: what switches have and know.

use super::times::without_raw;
use crate::table::{Output, joined, or_dash};
use crate::target::Target;
use anyhow::{Context, Result, bail};
use serde::Serialize;
use violin_common::api::switch::{
    Counter, FdbEntry, FdbPlace, PeerSeen, PeerTrouble, PortCondition, PortConditionSeen, PortKind, PortSeen, SwitchReply,
    SwitchRequest,
};
use violin_common::{HostId, Vni};

/// Which hosts.
#[derive(Debug, clap::Args)]
pub(crate) struct Of {
    /// Only this host (default: all hosts the manager knows).
    #[arg(long)]
    host: Option<HostId>,
}

struct On<T> {
    host: Option<HostId>,
    what: T,
}

/// The host comes first as `host`; where what is listed has a `host` of its own (peers), as `at`.
impl<T: Serialize> Serialize for On<T> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::Error;
        let mut all = serde_json::Map::new();
        if let serde_json::Value::Object(fields) = serde_json::to_value(&self.what).map_err(S::Error::custom)? {
            let key = if fields.contains_key("host") { "at" } else { "host" };
            all.insert(key.into(), serde_json::to_value(&self.host).map_err(S::Error::custom)?);
            all.extend(fields);
        }
        all.serialize(serializer)
    }
}

/// Asks each host's switch and prints what those that answer say. One that does not must not hide the others, just when they
/// are looked at; it is named, and makes the command fail at its end.
fn each<T: Serialize, const N: usize>(
    target: &Target,
    of: Of,
    request: &SwitchRequest,
    take: impl Fn(Option<&HostId>, SwitchReply) -> Option<Vec<T>>,
    output: Output,
    (head, row): ([&str; N], impl Fn(&On<T>) -> [String; N]),
) -> Result<()> {
    let (mut all, mut silent) = (Vec::new(), Vec::new());
    for host in target.switches(of.host)? {
        let reply = target.switch(host.as_ref(), request.clone()).and_then(|reply| {
            take(host.as_ref(), reply).context("the switch gave an answer to another question: are both of one version?")
        });
        match reply {
            Ok(values) => all.extend(values.into_iter().map(|what| On { host: host.clone(), what })),
            Err(error) => {
                let which = host.as_ref().map_or_else(|| "the switch".to_owned(), ToString::to_string);
                eprintln!("{which}: {error:#}");
                silent.push(which);
            }
        }
    }
    if all.is_empty() && !silent.is_empty() {
        bail!("no answer of {}", silent.join(" "));
    }
    if output.json {
        output.value(&without_raw(&all)?)?;
    } else {
        output.list(&all, head, row)?;
    }
    if silent.is_empty() { Ok(()) } else { bail!("no answer of {}; the others are above", silent.join(" ")) }
}

/// A port with how it is, which an older switch does not tell.
#[derive(Serialize)]
struct Port {
    #[serde(flatten)]
    seen: PortSeen,
    condition: Option<PortConditionSeen>,
}

/// How a port is, in words.
fn condition(seen: Option<&PortConditionSeen>) -> String {
    let Some(seen) = seen else { return or_dash(None::<&str>) };
    let what = seen.what.as_deref().unwrap_or_default();
    let told = match seen.condition {
        PortCondition::Attached if seen.guard_losses == 0 => return "attached".into(),
        PortCondition::Attached => return format!("attached, guard lost {} times and put back", seen.guard_losses),
        PortCondition::Waiting => "waiting",
        PortCondition::GuardLost => "guard lost",
        PortCondition::Refused => "refused",
    };
    format!("{told} for {} s: {what}", seen.since_s)
}

/// Lists ports.
pub(crate) fn ports(target: &Target, output: Output, of: Of) -> Result<()> {
    let with_conditions = |host: Option<&HostId>, ports: Vec<PortSeen>| {
        let told = match target.switch(host, SwitchRequest::PortConditions) {
            Ok(SwitchReply::PortConditions(told)) => told,
            _ => Vec::new(),
        };
        let of = |port: &PortSeen| told.iter().find(|told| told.port == port.port).cloned();
        ports.into_iter().map(|seen| Port { condition: of(&seen), seen }).collect()
    };
    each(
        target,
        of,
        &SwitchRequest::PortList,
        |host, reply| match reply {
            SwitchReply::Ports(ports) => Some(with_conditions(host, ports)),
            _ => None,
        },
        output,
        (
            ["HOST", "PORT", "VNI", "KIND", "ATTACHED TO", "CONDITION", "OWNED MAC", "VM", "STATE", "EPOCH", "IN", "OUT"],
            |On { host, what: Port { seen: port, condition: told } }: &On<Port>| {
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
                    condition(told.as_ref()),
                    or_dash(owned.map(|owned| owned.mac)),
                    or_dash(owned.map(|owned| &owned.vm)),
                    or_dash(port.state.map(|state| format!("{state:?}").to_lowercase())),
                    or_dash(port.epoch),
                    match port.traffic.oversize {
                        0 => format!("{} frames", port.traffic.frames_in),
                        // Larger than the network's MTU: carried, but whoever wonders about the speed finds it here.
                        some => format!("{} frames, {some} oversize", port.traffic.frames_in),
                    },
                    format!("{} frames", port.traffic.frames_out),
                ]
            },
        ),
    )
}

/// Lists peers.
pub(crate) fn peers(target: &Target, output: Output, of: Of) -> Result<()> {
    each(
        target,
        of,
        &SwitchRequest::PeerList,
        |_, reply| match reply {
            SwitchReply::Peers(peers) => Some(peers),
            _ => None,
        },
        output,
        (
            ["HOST", "PEER", "DOMAIN", "ADDRESS", "CONNECTED", "RTT", "DATA", "NETWORKS", "OUT", "IN", "TROUBLE"],
            |On { host, what: peer }: &On<PeerSeen>| {
                [
                    or_dash(host.as_ref()),
                    or_dash(peer.host.as_ref()),
                    or_dash(peer.domain.as_ref()),
                    peer.address.to_string(),
                    if peer.connected { "yes" } else { "no" }.to_owned(),
                    or_dash(peer.rtt_ms.map(|rtt| format!("{rtt:.2} ms"))),
                    or_dash(peer.protection.as_ref()),
                    joined(&peer.networks),
                    format!("{} datagrams", peer.datagrams_out),
                    format!("{} datagrams", peer.datagrams_in),
                    or_dash(troubles(&peer.troubles)),
                ]
            },
        ),
    )
}

fn troubles(troubles: &[PeerTrouble]) -> Option<String> {
    let words = troubles.iter().map(|trouble| format!("for {} s: {}", trouble.for_s, trouble.why));
    Some(words.collect::<Vec<_>>().join("; ")).filter(|words| !words.is_empty())
}

/// Lists the FDB.
pub(crate) fn fdb(target: &Target, output: Output, of: Of, vni: Option<Vni>) -> Result<()> {
    each(
        target,
        of,
        &SwitchRequest::FdbList { vni },
        |_, reply| match reply {
            SwitchReply::Fdb(entries) => Some(entries),
            _ => None,
        },
        output,
        (["HOST", "VNI", "VID", "MAC", "PLACE", "KIND", "IDLE"], |On { host, what: entry }: &On<FdbEntry>| {
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
        }),
    )
}

/// Lists counters that are not zero.
pub(crate) fn counters(target: &Target, output: Output, of: Of, all: bool) -> Result<()> {
    each(
        target,
        of,
        &SwitchRequest::Counters,
        |_, reply| match reply {
            SwitchReply::Counters(mut counters) => {
                counters.retain(|counter| all || counter.value > 0);
                Some(counters)
            }
            _ => None,
        },
        output,
        (["HOST", "COUNTER", "VALUE"], |On { host, what }: &On<Counter>| {
            [or_dash(host.as_ref()), what.name.clone(), what.value.to_string()]
        }),
    )
}
