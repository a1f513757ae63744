//! The end of a move that the VM comes to: it takes a grant, owns when the source is fenced, or releases it for ever.

use super::{GRANT_EXPIRY, Got, HEARD_MOVES, Key, Moves, PATIENCE, REPEAT, TOMBSTONE, at};
use violin_common::api::switch::MoveState;
use violin_common::control::mesh::{Message, Step};
use violin_common::{Epoch, HostId, Instant, VmId};

impl Moves {
    pub(super) fn grant_heard(&mut self, now: Instant, from: &HostId, key: Key, epoch: Epoch, vm: &VmId) {
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

    /// PREPARED and the VM runs here: own, or have the source fenced first.
    pub(super) fn arrive(&mut self, now: Instant, key: Key) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        let (Some(got), Some(_)) = (entry.got.as_mut(), entry.running) else { return };
        if entry.state != MoveState::Prepared {
            return;
        }
        if got.fenced {
            self.own_granted(now, key);
        } else {
            got.told = now;
            let (from, epoch) = (got.from.clone(), got.epoch);
            self.step(&from, key, epoch, Step::Fence);
        }
    }

    pub(super) fn fenced_heard(&mut self, now: Instant, from: &HostId, key: Key, epoch: Epoch) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        if let Some(got) = entry.got.as_mut().filter(|got| got.from == *from && got.epoch == epoch) {
            got.fenced = true;
            self.arrive(now, key);
        }
    }

    pub(super) fn own_granted(&mut self, now: Instant, key: Key) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        let Some(got) = entry.got.take() else { return };
        entry.own = got.epoch;
        (entry.owner, entry.running, entry.given, entry.expires) = (None, None, None, None);
        (entry.stopped, entry.claiming) = (false, None);
        entry.enter(now, MoveState::Owned);
        self.announce(key, Some(got.from));
    }

    pub(super) fn release_heard(&mut self, now: Instant, from: &HostId, key: Key, epoch: Epoch) {
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

    pub(super) fn release(&mut self, now: Instant, key: Key, why: &str) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        let Some(got) = entry.got.take() else { return };
        entry.released = entry.released.max(got.epoch);
        entry.enter(now, MoveState::Released);
        self.step(&got.from, key, got.epoch, Step::Released { why: why.into() });
    }

    /// Although nothing is known of the MAC: a grant that was overtaken must be refused.
    pub(super) fn remember_released(&mut self, now: Instant, from: &HostId, key: Key, epoch: Epoch) {
        if self.remember(from, key)
            && let Some(entry) = self.entries.get_mut(&key)
        {
            (entry.released, entry.expires) = (epoch, Some(now + TOMBSTONE));
        }
    }

    /// No port can have the MAC, so there is nothing to remember; unanswered, the other end would ask for ever.
    pub(super) fn answer_unkept(&mut self, from: &HostId, key: Key, epoch: Epoch, step: &Step) {
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

    /// A grant we have: owned without an answer when its source is out of reach for long, asked for again, or given back. `false`:
    /// there is none.
    pub(super) fn tick_destination(&mut self, now: Instant, key: Key, connected: &dyn Fn(&HostId) -> bool) -> bool {
        let Some(entry) = self.entries.get(&key) else { return true };
        if self.is_deserted(now, entry, connected) {
            return false;
        }
        let Some(got) = &entry.got else { return false };
        let unreachable = !connected(&got.from);
        match entry.running {
            Some(since) if unreachable && now.since(since) >= PATIENCE => self.own_granted(now, key),
            Some(_) if now.since(got.told) >= REPEAT => self.arrive(now, key),
            None if now.since(got.since) >= GRANT_EXPIRY => self.release(now, key, "the grant expired"),
            _ => {}
        }
        true
    }
}
