//! The end of a move that the VM leaves: it names the destination, fences, and takes back what comes to nothing.

use super::{Effect, Entry, Given, Key, Moves, PATIENCE, REPEAT, at};
use violin_common::api::switch::MoveState;
use violin_common::control::mesh::{Message, Step};
use violin_common::{Epoch, HostId, Instant};

impl Moves {
    /// Names the destination of a move. Again with the same destination: told again.
    ///
    /// *Errors*: the MAC is not owned here, or another grant is outstanding.
    pub fn grant(&mut self, now: Instant, key: Key, to: &HostId) -> Result<(), String> {
        let unknown = || format!("MAC {} of network {} is not owned by this host", key.1, key.0);
        let entry = self.entries.get_mut(&key).ok_or_else(unknown)?;
        if *to == self.host {
            return Err(format!("got destination {to}, want another host than this"));
        }
        match (&entry.state, &entry.given) {
            (MoveState::Owned, _) => {
                let epoch = entry.own.max(entry.last_given).after(1);
                entry.last_given = epoch;
                entry.refusal = None;
                entry.given =
                    Some(Given { epoch, to: to.clone(), taken: false, lost: false, aborting: false, released: false, told: now });
                entry.enter(now, MoveState::Granted);
            }
            (MoveState::Granted, Some(given)) if given.to == *to && !given.aborting => {}
            (MoveState::Granted | MoveState::Fenced, Some(given)) => {
                return Err(format!("a grant to {} is outstanding: abort it first", given.to));
            }
            _ => return Err(unknown()),
        }
        self.tell_given(now, key);
        Ok(())
    }

    /// Tells the destination again what it should know of the grant it has from us.
    pub(super) fn tell_given(&mut self, now: Instant, key: Key) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        let fenced = entry.state == MoveState::Fenced;
        let Some(vm) = entry.vm.clone() else { return };
        let Some(given) = entry.given.as_mut().filter(|given| !given.released) else { return };
        given.told = now;
        let (to, epoch, aborting) = (given.to.clone(), given.epoch, given.aborting);
        if aborting {
            self.step(&to, key, epoch, Step::Release);
        } else {
            self.step(&to, key, epoch, Step::Grant { vm });
            if fenced {
                self.step(&to, key, epoch, Step::Fenced);
            }
        }
    }

    pub(super) fn tell_fenced(&mut self, now: Instant, key: Key) {
        let Some(given) = self.entries.get_mut(&key).and_then(|entry| entry.given.as_mut()) else { return };
        given.told = now;
        let (to, epoch) = (given.to.clone(), given.epoch);
        self.step(&to, key, epoch, Step::Fenced);
    }

    pub(super) fn given(&mut self, key: Key, to: &HostId, epoch: Epoch) -> Option<&mut Given> {
        self.entries.get_mut(&key)?.given.as_mut().filter(|given| given.to == *to && given.epoch == epoch)
    }

    /// The destination cannot take the grant. If it had taken it before, it started anew and its port may yet be put back:
    /// the VM may be on its way there, so it is granted again, with a new epoch.
    pub(super) fn unready_heard(&mut self, now: Instant, from: &HostId, key: Key, epoch: Epoch, why: String) {
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

    pub(super) fn released_heard(&mut self, now: Instant, from: &HostId, key: Key, epoch: Epoch, why: String) {
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

    pub(super) fn fence_heard(&mut self, now: Instant, from: &HostId, key: Key, epoch: Epoch) {
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

    pub(super) fn claim_heard(&mut self, now: Instant, from: &HostId, key: Key, epoch: Epoch) {
        let nothing = |entry: &Entry| entry.port.is_none() && !entry.owns() && entry.state != MoveState::Fenced;
        if self.entries.get(&key).is_none_or(nothing) {
            // We started anew and have lost it: whoever thinks otherwise would wait for us for ever.
            return self.send(from, Message::Disowned(at(key, epoch)));
        }
        let Some(entry) = self.entries.get(&key) else { return };
        if entry.state == MoveState::Owned && entry.stopped {
            // It stopped here and runs there: a migration behind our back.
            let _ = self.grant(now, key, from);
        } else if entry.owns() {
            let epoch = entry.own;
            self.effects.push(Effect::Duplicate { key, host: from.clone(), epoch });
        }
    }

    /// FENCED, and the VM runs here again, and the destination has forgotten the grant: the MAC is ours again.
    pub(super) fn back(&mut self, now: Instant, key: Key) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        let Some(given) = entry.given.as_ref().filter(|given| given.released) else { return };
        match entry.state {
            MoveState::Fenced if entry.running.is_some() => {
                entry.own = given.epoch.after(1);
                (entry.given, entry.running, entry.stopped) = (None, None, false);
                entry.enter(now, MoveState::Owned);
                self.announce(key, None);
            }
            MoveState::Granted => {
                (entry.given, entry.running) = (None, None);
                entry.enter(now, MoveState::Owned);
                // Whoever thinks otherwise had no answer meanwhile.
                self.announce(key, None);
            }
            _ => {}
        }
    }

    /// An aborted grant whose destination cannot be reached, while the VM runs here: the MAC is ours again. The epoch is above
    /// the grant's, so that a destination that comes back still PREPARED releases it.
    pub(super) fn take_back(&mut self, now: Instant, key: Key) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        let Some(given) = entry.given.take() else { return };
        tracing::warn!(vni = %key.0, mac = %key.1, to = %given.to, "destination lost, and the VM runs here: its grant is void");
        entry.own = given.epoch.after(1);
        entry.refusal = Some(format!("{} could not be reached", given.to));
        (entry.running, entry.stopped) = (None, false);
        entry.enter(now, MoveState::Owned);
        self.announce(key, None);
    }

    /// An aborted grant whose destination cannot be reached, while the VM runs here for long.
    pub(super) fn is_deserted(&self, now: Instant, entry: &Entry, connected: &dyn Fn(&HostId) -> bool) -> bool {
        entry.given.as_ref().is_some_and(|given| given.aborting && !connected(&given.to))
            && matches!(entry.state, MoveState::Granted | MoveState::Fenced)
            && entry.running.is_some_and(|since| now.since(since) >= PATIENCE)
    }

    /// A grant we gave: taken back, or told again.
    pub(super) fn tick_source(&mut self, now: Instant, key: Key, connected: &dyn Fn(&HostId) -> bool) {
        let Some(entry) = self.entries.get(&key) else { return };
        if self.is_deserted(now, entry, connected) {
            return self.take_back(now, key);
        }
        if entry.untold().is_some_and(|told| now.since(told) >= REPEAT) {
            self.tell_given(now, key);
        }
    }
}
