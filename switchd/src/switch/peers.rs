//! The list of peers: who is connected, and what is wrong with those that are not.

use super::Switch;
use crate::members::words;
use violin_common::Instant;
use violin_common::api::switch::{PeerSeen, PeerTrouble, TroubleKind};

impl Switch {
    /// Every member that is known, then whoever has our own name, then `join` addresses where nobody was met.
    pub(super) fn peer_list(&self, now: Instant) -> Vec<PeerSeen> {
        let members = self.members.all().map(|(host, member)| {
            let link = member.link.and_then(|link| self.members.link(link)).filter(|_| member.is_connected());
            let traffic = member.traffic.snapshot();
            PeerSeen {
                host: Some(host.clone()),
                domain: member.domain.clone(),
                address: member.address,
                connected: link.is_some(),
                rtt_ms: None,
                networks: link.map(|link| link.networks.iter().copied().collect()).unwrap_or_default(),
                datagrams_out: traffic.datagrams_out,
                datagrams_in: traffic.datagrams_in,
                protection: link.and_then(|_| member.sessions.sending()).map(|session| words(session)),
                troubles: member.troubles(now),
            }
        });
        let absent = |host, domain, address, trouble| PeerSeen {
            host,
            domain,
            address,
            connected: false,
            rtt_ms: None,
            networks: Vec::new(),
            datagrams_out: 0,
            datagrams_in: 0,
            protection: None,
            troubles: vec![trouble],
        };
        let twins = self.members.twins().recent(now).map(|(address, since, why)| {
            let trouble = PeerTrouble { kind: TroubleKind::Twin, why, for_s: now.since(since).as_secs() };
            absent(Some(self.nature.host.clone()), Some(self.nature.domain.clone()), address, trouble)
        });
        let unmet = self.members.unmet(now).into_iter().map(|(address, trouble)| absent(None, None, address, trouble));
        members.chain(twins).chain(unmet).collect()
    }
}
