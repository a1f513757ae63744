//! MTUs of one network that differ between hosts: said at both ends, in the log and in the list of peers.

use super::Switch;
use crate::members::LinkId;
use std::time::Duration;
use violin_common::control::mesh::{Hello, Message, feature};
use violin_common::{HostId, Instant, Vni};

/// MTUs in one message: about 100 KiB.
const CHUNK: usize = 16_384;
/// Networks named, of those that differ.
const NAMED: usize = 3;
/// How often the log tells of one peer at most.
const SAID: Duration = Duration::from_secs(60);

fn understands(hello: &Hello) -> bool {
    hello.features & feature::MTUS != 0
}

impl Switch {
    /// Tells a peer that has just been connected.
    pub(super) fn tell_mtus(&mut self, id: LinkId) {
        if !self.members.link(id).and_then(|link| link.hello.as_ref()).is_some_and(understands) {
            return;
        }
        let all: Vec<_> = self.networks.iter().map(|(vni, network)| (*vni, network.spec.mtu)).collect();
        for chunk in all.chunks(CHUNK) {
            self.send(id, Message::Mtus(chunk.to_vec()));
        }
    }

    /// Tells all that carry a network, or may carry it next.
    pub(super) fn announce_mtu(&mut self, vni: Vni, mtu: u16) {
        let links: Vec<_> = self
            .members
            .connected_links()
            .filter(|(_, _, _, link)| link.hello.as_ref().is_some_and(understands))
            .map(|(_, _, id, _)| id)
            .collect();
        for link in links {
            self.send(link, Message::Mtus(vec![(vni, mtu)]));
        }
    }

    pub(super) fn mtus_heard(&mut self, id: LinkId, mtus: Vec<(Vni, u16)>) {
        self.members.mtus(id, mtus);
        self.dirty = true;
    }

    /// Looks whose MTUs differ from ours.
    pub(super) fn compare_mtus(&mut self, now: Instant) {
        let differing: Vec<(HostId, Option<String>)> = self
            .members
            .connected_links()
            // On a new connection what it carries comes before the MTUs of that.
            .filter(|(_, _, _, link)| !link.mtus.is_empty() || link.networks.is_empty())
            .map(|(host, _, _, link)| {
                let ours = |vni: &Vni| self.networks.get(vni).map(|network| network.spec.mtu);
                let differ = link.mtus.iter().filter_map(|(vni, theirs)| Some((*vni, ours(vni)?, *theirs)));
                (host.clone(), words(differ.filter(|(_, ours, theirs)| ours != theirs)))
            })
            .collect();
        for (host, which) in differing {
            let Some(which) = which else {
                self.members.mtus_differ(now, &host, None);
                self.mtus_said.retain(|(said, _)| *said != host);
                continue;
            };
            let news = self.members.mtus_differ(now, &host, Some(which.clone()));
            self.mtus_said.retain(|(_, at)| now.since(*at) < SAID);
            if news && self.mtus_said.iter().all(|(said, _)| *said != host) {
                tracing::warn!(peer = %host, "MTUs differ: {which}; want the same `mtu` at both ends");
                self.mtus_said.push((host, now));
            }
        }
    }
}

/// Which differ: identifier, ours, theirs.
fn words(differ: impl Iterator<Item = (Vni, u16, u16)>) -> Option<String> {
    let all: Vec<_> = differ.collect();
    let named = all.iter().take(NAMED).map(|(vni, ours, theirs)| format!("network {vni} has MTU {ours} here and {theirs} there"));
    let more = all.len().saturating_sub(NAMED);
    let more = if more > 0 { format!(", and so {more} more") } else { String::new() };
    (!all.is_empty()).then(|| named.collect::<Vec<_>>().join(", ") + &more)
}
