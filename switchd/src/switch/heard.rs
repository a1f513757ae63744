//! What peers say. Nothing of it is believed about others than the host in the peer's certificate, but that a MAC has
//! gone to a member that we cannot reach to hear it from.
//!
//! A member is trusted with what it says of itself: one that claims a MAC with a higher epoch gets it.

use super::{Command, OWNED_CHUNK, Switch};
use crate::members::{Greeted, LinkId, Told};
use crate::tables::Place;
use std::collections::{BTreeMap, HashSet};
use violin_common::control::mesh::{Hello, Message};
use violin_common::{HostId, Instant, MacAddr, Vni};

/// Networks one peer may say it carries: a bound on what it can make us remember.
const NETWORKS_LIMIT: usize = 65_536;

impl Switch {
    /// A message came on a connection. One that contradicts the protocol ends the connection.
    ///
    /// *Errors*: in words; the connection is being closed then.
    pub fn handle_message(&mut self, now: Instant, link: LinkId, message: Message) -> Result<(), String> {
        let result = self.heard(now, link, message);
        if let Err(why) = &result {
            self.refuse(now, link, why.clone());
        }
        result
    }

    fn heard(&mut self, now: Instant, id: LinkId, message: Message) -> Result<(), String> {
        let message = match message {
            Message::Hello(hello) => return self.greeted(now, id, hello),
            other => other,
        };
        if let Some(contest) = self.contests.get_mut(&id) {
            return contest.hold(message);
        }
        let link = self.members.link(id).ok_or("this connection is closed")?;
        if link.hello.is_none() {
            return Err("got a message before HELLO".into());
        }
        let from = link.host.clone();
        if self.members.link_to(&from) != Some(id) {
            // Superseded: what it says may be older than what the other connection said.
            return Ok(());
        }
        if self.members.welcomed(&from) {
            tracing::info!(peer = %from, "peer connected");
        }
        match message {
            Message::Hello(_) => {}
            Message::Members(hints) => self.members.hinted(now, hints),
            Message::Networks(networks) => self.carries(&from, id, networks)?,
            Message::Owned { all, macs } => self.owned(now, &from, all, &macs),
            Message::Disowned(owned) => {
                self.moves.disowned_heard(&from, owned);
                self.dirty = true;
            }
            Message::Moved { owned, host } => {
                let absent = self.members.slot(&host).is_some() && self.members.link_to(&host).is_none();
                self.moves.moved_heard(now, &from, owned, host, absent);
                self.dirty = true;
            }
            Message::Learned { vni, vid, mac } => self.learned(now, id, vni, vid, mac),
            Message::Move { owned, step } => {
                let kept = self.networks.contains_key(&owned.vni) && !owned.mac.is_group();
                self.moves.step_heard(now, &from, owned, step, kept);
                self.flush_owned((owned.vni, owned.mac));
                self.dirty = true;
            }
            Message::Mtus(mtus) => self.mtus_heard(id, mtus),
            Message::Forgotten { vni, stations } => self.forgotten(id, vni, &stations.into_iter().collect()),
            Message::Ready => self.peer_is_ready(now, id),
            Message::Opened { receiver, queue, epoch } => self.members.acknowledged(&from, receiver, queue, epoch),
            Message::Leave => {
                tracing::info!(peer = %from, "peer left");
                self.forget_place(&from);
                self.moves.peer_down(now, &from);
                self.members.closed(now, id);
                self.members.left(&from);
                self.close(id, "you left");
            }
        }
        Ok(())
    }

    pub(super) fn greeted(&mut self, now: Instant, id: LinkId, hello: Hello) -> Result<(), String> {
        if hello.networks.len() > NETWORKS_LIMIT {
            return Err(format!("got {} networks, want at most {NETWORKS_LIMIT}", hello.networks.len()));
        }
        let host = hello.host.clone();
        match self.members.greet(now, id, hello.clone())? {
            Greeted::Superseded => {
                self.members.closed(now, id);
                self.close(id, "another connection between us stays");
                return Ok(());
            }
            Greeted::Ourselves => {
                self.close(id, "that is ourselves");
                return Ok(());
            }
            Greeted::Contested { standing } => {
                self.contest(id, standing, hello);
                return Ok(());
            }
            Greeted::Up { replaced, same_boot } => {
                for old in replaced {
                    self.members.closed(now, old);
                    self.close(old, "a newer connection between us stays");
                }
                if self.members.refuses_us(&host) || self.members.is_renewed(&host) {
                    tracing::debug!(peer = %host, same_boot, "peer connected, perhaps");
                } else {
                    tracing::info!(peer = %host, same_boot, "peer connected");
                }
                if !same_boot {
                    self.moves.peer_restarted(&host);
                }
                self.dirty = true;
                self.begin_session(now, id);
            }
        }
        let hints = self.members.hints(&host);
        self.send(id, Message::Members(hints));
        let everybody: Vec<_> = self.members.connected_links().map(|(host, _, link, _)| (host.clone(), link)).collect();
        for (other, link) in everybody.into_iter().filter(|(other, _)| *other != host) {
            let newcomer = self.members.hints(&other).into_iter().filter(|hint| hint.host == host).collect();
            self.send(link, Message::Members(newcomer));
        }
        let networks = self.members.link(id).map(|link| link.networks.clone()).unwrap_or_default();
        self.tell_owned(id, true, &|vni| networks.contains(&vni));
        self.tell_mtus(id);
        self.moves.peer_up(now, &host);
        Ok(())
    }

    pub(super) fn close(&mut self, link: LinkId, why: &str) {
        self.commands.push(Command::Close { link, why: why.into(), refused: false });
    }

    pub(super) fn refuse(&mut self, now: Instant, link: LinkId, why: String) {
        let _ = self.members.refused(now, link, &Told::Refused(why.clone()));
        self.commands.push(Command::Close { link, why, refused: true });
    }

    fn tell_owned(&mut self, link: LinkId, all: bool, wanted: &dyn Fn(Vni) -> bool) {
        let macs = self.moves.ours(wanted);
        // Only a list that fits one message can say that it is complete.
        let all = all && macs.len() <= OWNED_CHUNK;
        if macs.is_empty() && all {
            self.send(link, Message::Owned { all, macs });
            return;
        }
        for chunk in macs.chunks(OWNED_CHUNK) {
            self.send(link, Message::Owned { all, macs: chunk.to_vec() });
        }
    }

    fn carries(&mut self, from: &HostId, id: LinkId, networks: Vec<Vni>) -> Result<(), String> {
        if networks.len() > NETWORKS_LIMIT {
            return Err(format!("got {} networks, want at most {NETWORKS_LIMIT}", networks.len()));
        }
        let (added, removed) = self.members.carries(id, networks);
        if let Some(slot) = self.members.slot(from) {
            // What was heard there would be sent there in vain until it has aged.
            for network in removed.iter().filter_map(|vni| self.networks.get(vni)) {
                network.fdb.flush_place(Place::Peer(slot));
            }
        }
        self.dirty = true;
        if !added.is_empty() {
            self.tell_owned(id, false, &|vni| added.contains(&vni));
        }
        Ok(())
    }

    fn owned(&mut self, now: Instant, from: &HostId, all: bool, macs: &[violin_common::control::mesh::OwnedAt]) {
        // A daemon that started anew has not got its ports back yet: what it does not name may still be there.
        let complete = all && self.members.same_boot(from);
        let networks = &self.networks;
        self.moves.owned_heard(now, from, complete, macs, &|vni| networks.contains_key(&vni));
        let mut named: BTreeMap<Vni, HashSet<MacAddr>> = BTreeMap::new();
        for owned in macs {
            named.entry(owned.vni).or_default().insert(owned.mac);
        }
        for (vni, macs) in named {
            if let Some(network) = self.networks.get(&vni) {
                network.fdb.flush_macs(&macs);
            }
        }
        self.dirty = true;
    }

    /// A learned MAC is heard elsewhere now. Only what we know is corrected: an announcement fills no table. A peer speaks
    /// for networks it carries.
    fn learned(&mut self, now: Instant, id: LinkId, vni: Vni, vid: u16, mac: MacAddr) {
        let Some(link) = self.members.link(id).filter(|link| link.networks.contains(&vni)) else { return };
        let Some(slot) = self.members.slot(&link.host) else { return };
        let Some(network) = self.networks.get(&vni) else { return };
        let ageing = std::time::Duration::from_secs(network.spec.ageing_s.into());
        if !self.is_owned(vni, mac) {
            network.fdb.correct(now, vid, mac, Place::Peer(slot), ageing);
        }
    }

    /// Stations are not at a peer's place any more. Those that were heard elsewhere meanwhile stay where they are.
    fn forgotten(&self, id: LinkId, vni: Vni, stations: &HashSet<(u16, MacAddr)>) {
        let place = self.members.link(id).and_then(|link| self.members.slot(&link.host)).map(Place::Peer);
        if let (Some(place), Some(network)) = (place, self.networks.get(&vni)) {
            network.fdb.flush_stations(place, stations);
        }
    }
}
