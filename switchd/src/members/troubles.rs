//! Why members and `join` addresses are not connected, and since when.

use super::{Call, Dial, LinkId, Member, Members};
use std::net::SocketAddr;
use violin_common::api::switch::{PeerTrouble, TroubleKind};
use violin_common::{HostId, Instant, Vni};

/// What became of a call or a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Told {
    /// Nobody answered.
    NoAnswer(String),
    /// The connection ended.
    Lost,
    /// The other end refuses us, in its words.
    Refuses(String),
    /// We refuse the other end, in ours.
    Refused(String),
    /// Networks have another MTU there; which, in words.
    Mtu(String),
    /// Data could go plain as far as our configuration says, not as far as the other end's does.
    PlainHereOnly,
}

impl Told {
    const fn kind(&self) -> TroubleKind {
        match self {
            Self::NoAnswer(_) => TroubleKind::NoAnswer,
            Self::Lost => TroubleKind::Lost,
            Self::Refuses(_) | Self::Refused(_) => TroubleKind::Refused,
            Self::Mtu(_) => TroubleKind::Mtu,
            Self::PlainHereOnly => TroubleKind::Plain,
        }
    }

    fn words(&self) -> String {
        match self {
            Self::NoAnswer(why) => {
                format!("{why}: want a switch that runs there, and a way to it from this host that no firewall or NAT shuts")
            }
            Self::Lost => "the connection was lost; it is called again".into(),
            Self::Refuses(why) => format!("it refuses us: {why}"),
            Self::Refused(why) => format!("we refuse it: {why}"),
            Self::Mtu(which) => {
                format!("{which}: want the same `mtu` at both ends, or what the one takes for too big the other sends")
            }
            Self::PlainHereOnly => {
                "data is sealed although `plain` names it here: want `plain` at the other end to name our domain and the interface there".into()
            }
        }
    }
}

/// Something that went wrong, since when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// What.
    pub told: Told,
    /// When it began, in whatever words.
    pub since: Instant,
}

impl Trouble {
    /// For operators.
    pub fn seen(&self, now: Instant) -> PeerTrouble {
        PeerTrouble { kind: self.told.kind(), why: self.told.words(), for_s: now.since(self.since).as_secs() }
    }

    /// Puts this where there may be trouble already; it lasts since then. Returns whether the words are new.
    fn goes_on(slot: &mut Option<Self>, now: Instant, told: Told) -> bool {
        let ours = slot.as_ref().is_some_and(|trouble| matches!(trouble.told, Told::Refused(_)));
        if ours && matches!(told, Told::Refuses(_)) {
            // Both refuse each other: ours is the one that can be mended here.
            return false;
        }
        let news = slot.as_ref().is_none_or(|trouble| trouble.told != told);
        let since = slot.as_ref().map_or(now, |trouble| trouble.since);
        *slot = Some(Self { told, since });
        news
    }
}

impl Dial {
    pub(super) fn ended(&mut self, now: Instant, told: Option<&Told>) {
        self.failed(now);
        if let Some(told) = told {
            Trouble::goes_on(&mut self.trouble, now, told.clone());
        }
    }
}

impl Member {
    /// Whether the connection counts for the other end too, as far as we know.
    pub const fn is_connected(&self) -> bool {
        self.link.is_some() && self.refused.is_none()
    }

    /// What is wrong with it.
    pub fn troubles(&self, now: Instant) -> Vec<PeerTrouble> {
        let absent = if self.link.is_none() { self.dial.trouble.as_ref() } else { None };
        let mut troubles: Vec<_> = self.refused.as_ref().or(absent).map(|trouble| trouble.seen(now)).into_iter().collect();
        let never = self.link.is_none() && troubles.is_empty();
        if never {
            troubles.push(PeerTrouble { kind: TroubleKind::NoAnswer, why: "it is being called".into(), for_s: 0 });
        }
        troubles.extend(self.mtus.as_ref().filter(|_| self.is_connected()).map(|trouble| trouble.seen(now)));
        troubles.extend(self.unsealed.as_ref().filter(|_| self.is_connected()).map(|trouble| trouble.seen(now)));
        troubles.extend(self.rivals.recent(now).map(|(_, since, why)| PeerTrouble {
            kind: TroubleKind::Twin,
            why,
            for_s: now.since(since).as_secs(),
        }));
        troubles
    }
}

impl Members {
    /// A call has ended, in a connection (`None`) or not.
    pub fn called(&mut self, now: Instant, call: &Call, failed: Option<&Told>) {
        match &call.expected {
            Some(host) => {
                if let Some(member) = self.hosts.get_mut(host) {
                    if member.link.is_some() {
                        // For a new session beside the one that stands; a trouble of the call is none of the member's.
                        member.renewal.ended(now, None);
                    } else {
                        member.dial.ended(now, failed);
                    }
                    if failed.is_some() && member.link.is_none() {
                        member.refused = None;
                    }
                }
            }
            None => {
                if let Some(dial) = self.join.get_mut(&call.address) {
                    dial.ended(now, failed);
                }
            }
        }
    }

    /// A connection is being refused, by the other end or by us. Returns whom that concerns, if it is news.
    pub fn refused(&mut self, now: Instant, id: LinkId, told: &Told) -> Option<(HostId, SocketAddr)> {
        // Whoever has our own name is listed as that.
        let link = self.links.get(&id).filter(|link| link.host != self.host)?;
        let (host, address) = (link.host.clone(), link.address);
        // One that calls us and is refused may be somebody else with that name: it says nothing of the member we call.
        let concerned = |member: &&mut Member| match told {
            Told::Refuses(_) => member.link.is_none_or(|counts| counts == id),
            _ => link.called && member.link.is_none(),
        };
        let member = self.hosts.get_mut(&host).filter(concerned);
        let member = member.map(|member| match told {
            Told::Refuses(_) => Trouble::goes_on(&mut member.refused, now, told.clone()),
            _ => Trouble::goes_on(&mut member.dial.trouble, now, told.clone()),
        });
        let join = self.join.get_mut(&address).map(|dial| Trouble::goes_on(&mut dial.trouble, now, told.clone()));
        member.or(join).filter(|news| *news).map(|_| (host, address))
    }

    /// The peer says more than HELLO: it has taken us. Returns whether it had refused us before.
    pub fn welcomed(&mut self, host: &HostId) -> bool {
        self.hosts.get_mut(host).is_some_and(|member| member.refused.take().is_some())
    }

    /// A connected peer has told MTUs, of networks it carries.
    pub fn mtus(&mut self, id: LinkId, told: Vec<(Vni, u16)>) {
        if let Some(link) = self.links.get_mut(&id) {
            let carried = told.into_iter().filter(|(vni, _)| link.networks.contains(vni));
            link.mtus.extend(carried.collect::<Vec<_>>());
        }
    }

    /// Networks of a peer have another MTU there, in words; or none has. Returns whether that is news.
    pub fn mtus_differ(&mut self, now: Instant, host: &HostId, which: Option<String>) -> bool {
        let Some(member) = self.hosts.get_mut(host) else { return false };
        match which {
            Some(which) => Trouble::goes_on(&mut member.mtus, now, Told::Mtu(which)),
            None => {
                member.mtus = None;
                false
            }
        }
    }

    /// Whether the peer refused us lately: then its HELLO alone means nothing.
    pub fn refuses_us(&self, host: &HostId) -> bool {
        self.hosts.get(host).is_some_and(|member| member.refused.is_some())
    }

    /// `join` addresses where nobody was met yet, with what is wrong there.
    pub fn unmet(&self, now: Instant) -> Vec<(SocketAddr, PeerTrouble)> {
        let known = self.known();
        let twins: Vec<_> = self.twins.recent(now).map(|(address, ..)| address).collect();
        let unmet = self
            .join
            .iter()
            .filter(|(address, _)| !known.contains(address) && !self.met.contains_key(address) && !twins.contains(address));
        unmet.filter_map(|(address, dial)| Some((*address, dial.trouble.as_ref()?.seen(now)))).collect()
    }
}
