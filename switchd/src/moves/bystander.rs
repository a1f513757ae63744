//! What every switch hears of MACs that others own, and what it says to who thinks otherwise.

use super::{Effect, Given, HEARD_MOVES, Key, Moves, PATIENCE, REPEAT, TOMBSTONE, at};
use violin_common::api::switch::MoveState;
use violin_common::control::mesh::{Message, OwnedAt, Step};
use violin_common::{Epoch, HostId, Instant, Vni};

impl Moves {
    /// `from` owns MACs. Those it owned before and does not name are forgotten if `all`.
    pub fn owned_heard(&mut self, now: Instant, from: &HostId, all: bool, macs: &[OwnedAt], carried: &dyn Fn(Vni) -> bool) {
        if all {
            let named: std::collections::HashSet<Key> = macs.iter().map(|owned| (owned.vni, owned.mac)).collect();
            let gone: Vec<_> = self
                .entries
                .iter()
                .filter(|(key, entry)| !named.contains(key) && entry.owner.as_ref().is_some_and(|(_, host)| host == from))
                .map(|(key, entry)| (*key, entry.highest()))
                .collect();
            for (key, epoch) in gone {
                self.disowned_heard(from, at(key, epoch));
            }
        }
        for owned in macs {
            let key = (owned.vni, owned.mac);
            let known = self.entries.contains_key(&key);
            if owned.mac.is_group() || !known && !carried(owned.vni) {
                self.macs_refused += 1;
                continue;
            }
            if self.remember(from, key) {
                self.owner_heard(now, from, key, owned.epoch);
            }
        }
    }

    pub(super) fn owner_heard(&mut self, now: Instant, from: &HostId, key: Key, epoch: Epoch) {
        let me = self.host.clone();
        let Some(entry) = self.entries.get_mut(&key) else { return };
        // Somebody owned it later: the speaker has not heard of it, or has started anew and forgotten.
        let doubted = std::mem::take(&mut entry.doubted);
        if let Some((known, host)) = entry.owner.clone()
            && (known > epoch || known == epoch && host < *from)
            && !(doubted && host != *from)
        {
            self.send(from, Message::Moved { owned: at(key, known), host });
            return;
        }
        let ours = match entry.state {
            MoveState::Owned | MoveState::Granted | MoveState::Fenced => Some(entry.own),
            _ => None,
        };
        let grantee = |given: &Given| given.to == *from && given.epoch > epoch && !given.aborting && !given.released;
        if entry.state == MoveState::Fenced && entry.given.as_ref().is_some_and(grantee) && ours >= Some(epoch) {
            // It started anew after the VM had arrived, and claims less than it was granted: it is told again.
            if entry.given.as_ref().is_some_and(|given| now.since(given.told) >= REPEAT) {
                self.tell_given(now, key);
            }
            return;
        }
        let fenced = entry.state == MoveState::Fenced && entry.running.is_none();
        if let Some(given) = entry.given.as_ref().filter(|given| fenced && given.to != *from)
            && ours >= Some(epoch)
        {
            // The VM does not run here, and there it does: the destination of our grant has died with it. The claim is to be newer.
            let known = at(key, given.epoch.max(entry.own));
            return self.send(from, Message::Moved { owned: known, host: from.clone() });
        }
        if let Some(own) = ours {
            // Two claims of the same epoch: the lower name keeps it, at both ends.
            if own > epoch || own == epoch && me < *from {
                self.send(from, Message::Moved { owned: at(key, own), host: me });
                return;
            }
            // Perhaps an earlier grant than the last: it was owned, and forgotten by a destination that started anew.
            let expected = entry.given.as_ref().is_some_and(|given| given.to == *from && given.epoch >= epoch);
            entry.mute(now, !expected);
            if !expected {
                self.effects.push(Effect::Duplicate { key, host: from.clone(), epoch });
            }
        } else if entry.got.as_ref().is_some_and(|got| epoch >= got.epoch) {
            self.release(now, key, "another host owns it since that epoch or a later one");
        }
        let Some(entry) = self.entries.get_mut(&key) else { return };
        entry.owner = Some((epoch, from.clone()));
        match entry.state {
            // Muted, but the VM runs here: its owner may know that it has gone.
            MoveState::Absent | MoveState::Released if entry.running.is_some() => {
                self.step(from, key, epoch, Step::Claim);
            }
            MoveState::Gone => {}
            _ if entry.port.is_none() => entry.expires = None,
            _ => {}
        }
    }

    /// The VM behind a MAC `from` owned has ended.
    pub fn disowned_heard(&mut self, from: &HostId, owned: OwnedAt) {
        let key = (owned.vni, owned.mac);
        let Some(entry) = self.entries.get_mut(&key) else { return };
        if !entry.owner.as_ref().is_some_and(|(epoch, host)| host == from && *epoch <= owned.epoch) {
            return;
        }
        entry.owner = None;
        entry.released = Epoch::default();
        if entry.port.is_none() && matches!(entry.state, MoveState::Gone | MoveState::Elsewhere | MoveState::Released) {
            self.entries.remove(&key);
        }
    }

    /// `from` knows of a later owner than we told it of: `host`, perhaps ourselves before we started anew. Of another than
    /// itself and us that is believed if `absent`: a member we know and are not connected with now, which cannot tell us
    /// itself.
    pub fn moved_heard(&mut self, now: Instant, from: &HostId, owned: OwnedAt, host: HostId, absent: bool) {
        let key = (owned.vni, owned.mac);
        let ourselves = host == self.host;
        if !ourselves && host != *from && !absent {
            return self.outdated_heard(key, owned.epoch);
        }
        if ourselves && owned.epoch.moves > HEARD_MOVES {
            return;
        }
        let Some(entry) = self.entries.get_mut(&key) else { return };
        match entry.state {
            MoveState::Owned if ourselves && owned.epoch >= entry.own => {
                entry.own = owned.epoch.after(1);
                self.announce(key, None);
            }
            MoveState::Owned | MoveState::Granted if !ourselves && owned.epoch > entry.own => {
                // Only the owner itself can make us GONE; that somebody owns it later is enough to be silent.
                entry.mute(now, true);
                entry.owner = Some((owned.epoch, host.clone()));
                self.effects.push(Effect::Duplicate { key, host, epoch: owned.epoch });
            }
            _ if entry.claiming.is_some_and(|wanted| owned.epoch >= wanted) && ourselves => {
                entry.claiming = Some(owned.epoch.after(1));
            }
            _ if !ourselves && !entry.owns() && owned.epoch > entry.highest() => entry.owner = Some((owned.epoch, host)),
            _ => {}
        }
    }

    /// Somebody believes a third one to own what we own, who is connected with us and says nothing of the kind: it started anew and
    /// has lost the MAC, and whoever heard of it then takes our claim for an old one. The VM runs here, so the claim becomes newer.
    fn outdated_heard(&mut self, key: Key, epoch: Epoch) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        if entry.state == MoveState::Owned && !entry.stopped && epoch >= entry.own && epoch.moves <= HEARD_MOVES {
            entry.own = epoch.after(1);
            self.announce(key, None);
        }
    }

    /// A peer has started anew: what it owned it may own again when its ports are back, or never.
    pub fn peer_restarted(&mut self, peer: &HostId) {
        for entry in self.entries.values_mut() {
            entry.doubted |= entry.owner.as_ref().is_some_and(|(_, host)| host == peer);
        }
    }

    /// A peer was lost: what it owned is forgotten some time later, unless it comes back.
    pub fn peer_down(&mut self, now: Instant, peer: &HostId) {
        for entry in self.entries.values_mut() {
            if entry.port.is_none()
                && entry.state == MoveState::Elsewhere
                && entry.owner.as_ref().is_some_and(|(_, host)| host == peer)
            {
                entry.expires = Some(now + TOMBSTONE);
            }
        }
    }

    /// Forgets a network that is not carried any more.
    pub fn network_removed(&mut self, vni: Vni) {
        self.entries.retain(|key, _| key.0 != vni);
    }

    /// What is remembered of a MAC without port goes when its time is over. `true`: there is nothing more to look at.
    pub(super) fn tick_tombstone(&mut self, now: Instant, key: Key, connected: &dyn Fn(&HostId) -> bool) -> bool {
        let Some(entry) = self.entries.get_mut(&key) else { return true };
        if entry.expires.is_none_or(|expires| now < expires) {
            return false;
        }
        if entry.port.is_some() {
            entry.expires = None;
            return false;
        }
        // The tombstone has served its time; what is known of the new owner stays while that can be reached.
        let reachable = entry.owner.as_ref().is_some_and(|(_, host)| connected(host));
        if entry.state == MoveState::Gone && reachable {
            entry.expires = None;
            entry.enter(now, MoveState::Elsewhere);
        } else {
            self.entries.remove(&key);
        }
        true
    }

    /// It runs here and nobody owns it any more: moved behind our back, both ends started anew on the way, or the other place that
    /// had its MAC has ended. Only to be asked when all members have told what they own. `true`: it is ours now.
    pub(super) fn tick_orphan(&mut self, now: Instant, key: Key) -> bool {
        let Some(entry) = self.entries.get_mut(&key) else { return true };
        let orphan = matches!(entry.state, MoveState::Absent | MoveState::Released | MoveState::Gone)
            && entry.port.is_some()
            && entry.owner.is_none()
            && entry.running.is_some_and(|since| now.since(since) >= PATIENCE);
        if orphan {
            entry.claiming = Some(entry.highest().max(entry.released).after(1).max(Epoch::FIRST));
            self.claim(now, key);
        }
        orphan
    }
}
