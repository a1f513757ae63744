//! What peers say of owned MACs. A peer speaks for itself only: `from` is the host its certificate names.

use super::{Effect, Entry, Given, Got, HEARD_MOVES, Key, MoveSeen, Moves, TOMBSTONE, View, at};
use violin_common::api::switch::MoveState;
use violin_common::control::mesh::{Message, OwnedAt, Step};
use violin_common::{Epoch, HostId, Instant, VmId, Vni};

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

    fn owner_heard(&mut self, now: Instant, from: &HostId, key: Key, epoch: Epoch) {
        let me = self.host.clone();
        let Some(entry) = self.entries.get_mut(&key) else { return };
        // Somebody owned it later: the speaker has not heard of it, or has started anew and forgotten.
        if let Some((known, host)) = entry.owner.clone()
            && (known > epoch || known == epoch && host < *from)
        {
            self.send(from, Message::Moved { owned: at(key, known), host });
            return;
        }
        let ours = match entry.state {
            MoveState::Owned | MoveState::Granted | MoveState::Fenced => Some(entry.own),
            _ => None,
        };
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
        if !ourselves && host != *from && !absent || ourselves && owned.epoch.moves > HEARD_MOVES {
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

    /// A step of a move. `kept`: the MAC is one that may be remembered here, of a network we carry.
    pub fn step_heard(&mut self, now: Instant, from: &HostId, owned: OwnedAt, step: Step, kept: bool) {
        let key = (owned.vni, owned.mac);
        if !kept && !self.entries.contains_key(&key) {
            return self.answer_unkept(from, key, owned.epoch, &step);
        }
        match step {
            Step::Grant { vm } => self.grant_heard(now, from, key, owned.epoch, &vm),
            Step::Granted => {
                if let Some(given) = self.given(key, from, owned.epoch) {
                    (given.taken, given.lost) = (true, false);
                }
            }
            Step::Release => self.release_heard(now, from, key, owned.epoch),
            Step::Released { why } => self.released_heard(now, from, key, owned.epoch, why),
            Step::Unready { why } => self.unready_heard(now, from, key, owned.epoch, why),
            Step::Fence => self.fence_heard(now, from, key, owned.epoch),
            Step::Fenced => {
                let Some(entry) = self.entries.get_mut(&key) else { return };
                if let Some(got) = entry.got.as_mut().filter(|got| got.from == *from && got.epoch == owned.epoch) {
                    got.fenced = true;
                    self.arrive(now, key);
                }
            }
            Step::Claim => self.claim_heard(now, from, key),
            Step::Hold { .. } => {}
        }
    }

    /// No port can have the MAC, so there is nothing to remember; unanswered, the other end would ask for ever.
    fn answer_unkept(&mut self, from: &HostId, key: Key, epoch: Epoch, step: &Step) {
        let answer = match step {
            Step::Grant { .. } => {
                Step::Unready { why: format!("{} does not carry network {} for MAC {}", self.host, key.0, key.1) }
            }
            Step::Release => Step::Released { why: String::new() },
            Step::Fence => Step::Fenced,
            _ => return,
        };
        self.macs_refused += 1;
        self.step(from, key, epoch, answer);
    }

    fn given(&mut self, key: Key, to: &HostId, epoch: Epoch) -> Option<&mut Given> {
        self.entries.get_mut(&key)?.given.as_mut().filter(|given| given.to == *to && given.epoch == epoch)
    }

    fn grant_heard(&mut self, now: Instant, from: &HostId, key: Key, epoch: Epoch, vm: &VmId) {
        let host = self.host.clone();
        let Some(entry) = self.entries.get_mut(&key) else {
            self.remember_released(now, from, key, epoch);
            let why = format!("{host} has no port waiting for MAC {}", key.1);
            return self.step(from, key, epoch, Step::Unready { why });
        };
        if entry.owns() {
            // We started anew after the VM had arrived, and claimed less than what we had been granted.
            if entry.state == MoveState::Owned && entry.own < epoch && epoch.moves <= HEARD_MOVES {
                entry.own = epoch;
                return self.announce(key, Some(from.clone()));
            }
            let message = Message::Owned { all: false, macs: vec![at(key, entry.own)] };
            return self.send(from, message);
        }
        if let Some(got) = entry.got.as_ref().filter(|got| got.epoch == epoch && got.from == *from) {
            let epoch = got.epoch;
            return self.step(from, key, epoch, Step::Granted);
        }
        let later = entry.highest().max(entry.released);
        if entry.port.is_none() || !matches!(entry.state, MoveState::Absent | MoveState::Released) {
            let why = format!("{host} has no port waiting for MAC {}: it is {:?} there", key.1, entry.state);
            entry.released = entry.released.max(epoch);
            return self.step(from, key, epoch, Step::Unready { why });
        }
        let why = if entry.vm.as_ref() != Some(vm) {
            Some(format!("got VM {vm}, but the port of {host} waits for {:?}", entry.vm))
        } else if epoch <= later {
            Some(format!("got epoch {epoch}, but {later} was released or owned already"))
        } else {
            None
        };
        if let Some(why) = why {
            entry.released = entry.released.max(epoch);
            return self.step(from, key, epoch, Step::Released { why });
        }
        entry.got = Some(Got { epoch, from: from.clone(), fenced: false, since: now, told: now });
        if entry.owner.as_ref().is_none_or(|(_, host)| host != from) {
            entry.owner = Some((Epoch::default(), from.clone()));
        }
        entry.enter(now, MoveState::Prepared);
        self.step(from, key, epoch, Step::Granted);
        self.arrive(now, key);
    }

    fn release_heard(&mut self, now: Instant, from: &HostId, key: Key, epoch: Epoch) {
        let answer = Step::Released { why: String::new() };
        let Some(entry) = self.entries.get_mut(&key) else {
            self.remember_released(now, from, key, epoch);
            return self.step(from, key, epoch, answer);
        };
        if entry.owns() && entry.own >= epoch {
            let message = Message::Owned { all: false, macs: vec![at(key, entry.own)] };
            return self.send(from, message);
        }
        let ours = entry.got.as_ref().is_some_and(|got| got.from == *from && got.epoch <= epoch);
        if ours && entry.runs() {
            // The VM runs here: there is no way back. The source will fence.
            return self.arrive(now, key);
        }
        entry.released = entry.released.max(epoch);
        if ours {
            entry.got = None;
            entry.enter(now, MoveState::Released);
        }
        self.step(from, key, epoch, answer);
    }

    /// Although nothing is known of the MAC: a grant that was overtaken must be refused.
    fn remember_released(&mut self, now: Instant, from: &HostId, key: Key, epoch: Epoch) {
        if self.remember(from, key)
            && let Some(entry) = self.entries.get_mut(&key)
        {
            (entry.released, entry.expires) = (epoch, Some(now + TOMBSTONE));
        }
    }

    /// The destination cannot take the grant. If it had taken it before, it started anew and its port may yet be put back:
    /// the VM may be on its way there, so it is granted again, with a new epoch.
    fn unready_heard(&mut self, now: Instant, from: &HostId, key: Key, epoch: Epoch, why: String) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        let fenced = entry.state == MoveState::Fenced;
        match entry.given.as_mut().filter(|given| given.to == *from && given.epoch == epoch) {
            Some(given) if (given.taken || fenced) && !given.aborting && !given.released => {
                entry.last_given = entry.last_given.max(given.epoch).after(1);
                (given.epoch, given.told, given.lost) = (entry.last_given, now, true);
            }
            Some(_) => self.released_heard(now, from, key, epoch, why),
            None => {}
        }
    }

    fn released_heard(&mut self, now: Instant, from: &HostId, key: Key, epoch: Epoch, why: String) {
        let Some(given) = self.given(key, from, epoch) else { return };
        given.released = true;
        let Some(entry) = self.entries.get_mut(&key) else { return };
        entry.refusal = (!why.is_empty()).then(|| format!("{from} refused: {why}"));
        if entry.port.is_none() && entry.state == MoveState::Fenced {
            // Fenced without port, and nobody has the grant: the VM has ended on the way.
            let message = Message::Disowned(at(key, entry.own));
            self.entries.remove(&key);
            self.effects.push(Effect::Announce { message, also: None });
            return;
        }
        self.back(now, key);
    }

    fn fence_heard(&mut self, now: Instant, from: &HostId, key: Key, epoch: Epoch) {
        let me = self.host.clone();
        if !self.remember(from, key) {
            return;
        }
        let Some(entry) = self.entries.get_mut(&key) else { return };
        match entry.state {
            MoveState::Owned | MoveState::Granted | MoveState::Fenced => {
                // A grant that is over, or was given to another; an epoch we never gave is one we gave before we started anew.
                let other = match &entry.given {
                    Some(given) => given.to != *from || given.epoch != epoch,
                    None => epoch <= entry.last_given,
                };
                if epoch <= entry.own || other {
                    let own = entry.own;
                    return self.send(from, Message::Moved { owned: at(key, own), host: me });
                }
                let given =
                    Given { epoch, to: from.clone(), taken: true, lost: false, aborting: false, released: false, told: now };
                entry.given.get_or_insert(given);
                entry.last_given = entry.last_given.max(epoch);
                if entry.state != MoveState::Fenced {
                    entry.enter(now, MoveState::Fenced);
                }
            }
            _ => {
                if let Some((known, host)) = entry.owner.clone().filter(|(known, host)| *known > epoch && host != from) {
                    return self.send(from, Message::Moved { owned: at(key, known), host });
                }
                // Nothing of ours speaks; nor will a later claim of a lower epoch.
                if entry.owner.as_ref().is_none_or(|(known, _)| *known < epoch) {
                    entry.owner = Some((epoch, from.clone()));
                }
            }
        }
        self.step(from, key, epoch, Step::Fenced);
    }

    fn claim_heard(&mut self, now: Instant, from: &HostId, key: Key) {
        let Some(entry) = self.entries.get(&key) else { return };
        if entry.state == MoveState::Owned && entry.stopped {
            // It stopped here and runs there: a migration behind our back.
            let _ = self.grant(now, key, from);
        } else if entry.owns() {
            let epoch = entry.own;
            self.effects.push(Effect::Duplicate { key, host: from.clone(), epoch });
        }
    }

    /// All MACs we own in networks that `wanted` names, for a peer that has just connected.
    pub fn ours(&self, wanted: &dyn Fn(Vni) -> bool) -> Vec<OwnedAt> {
        let owned = self.entries.iter().filter(|(key, entry)| entry.owns() && wanted(key.0));
        owned.map(|(key, entry)| at(*key, entry.own)).collect()
    }

    /// What becomes of frames for each MAC.
    pub fn views(&self) -> impl Iterator<Item = (Key, View)> {
        self.entries.iter().filter_map(|(key, entry)| Some((*key, self.view_of(entry)?)))
    }

    fn view_of(&self, entry: &Entry) -> Option<View> {
        let owner = entry.owner.as_ref().map(|(_, host)| host.clone()).filter(|host| *host != self.host);
        let port = entry.port;
        let plain = View { port, here: false, host: owner, open: Some(false), arriving: false, forward_late: false };
        let late = entry.expires.is_some();
        Some(match entry.state {
            MoveState::Owned | MoveState::Granted => View { here: true, open: Some(true), ..plain },
            MoveState::Fenced => {
                let host = entry.given.as_ref().filter(|given| !given.released).map(|given| given.to.clone());
                View { host, forward_late: true, ..plain }
            }
            MoveState::Gone => View { forward_late: late, ..plain },
            MoveState::Prepared => {
                let host = plain.host.clone().or_else(|| entry.got.as_ref().map(|got| got.from.clone()));
                View { host, open: None, arriving: true, ..plain }
            }
            MoveState::Absent if entry.claiming.is_some() => View { here: true, open: None, ..plain },
            MoveState::Absent | MoveState::Released => View { forward_late: late && plain.host.is_some(), ..plain },
            MoveState::Elsewhere if plain.host.is_none() => return None,
            MoveState::Elsewhere => plain,
        })
    }

    /// Forgets a network that is not carried any more.
    pub fn network_removed(&mut self, vni: Vni) {
        self.entries.retain(|key, _| key.0 != vni);
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

    /// What is known of one MAC.
    pub fn seen(&self, key: Key) -> Option<MoveSeen> {
        let entry = self.entries.get(&key)?;
        let host = match entry.state {
            MoveState::Owned => Some(self.host.clone()),
            MoveState::Granted | MoveState::Fenced => entry.given.as_ref().map(|given| given.to.clone()),
            _ => entry.owner.as_ref().map(|(_, host)| host.clone()),
        };
        let mut entered: Vec<_> = entry.entered.values().copied().collect();
        entered.sort_by_key(|(_, when)| *when);
        Some(MoveSeen { state: entry.state, epoch: entry.highest(), host, entered })
    }
}
