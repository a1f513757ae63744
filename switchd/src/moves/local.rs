//! What happens on this host: the operator names destinations, the hypervisor stops and runs VMs, time passes.

use super::{Entry, GRANT_EXPIRY, Given, Key, Moves, PATIENCE, REPEAT, Until};
use violin_common::api::switch::MoveState;
use violin_common::control::mesh::Step;
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
    fn tell_given(&mut self, now: Instant, key: Key) {
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

    /// The hypervisor stopped the VM behind our port.
    pub fn stopped(&mut self, now: Instant, key: Key) -> Result<(), String> {
        let entry = self.known(key)?;
        entry.running = None;
        match entry.state {
            MoveState::Granted => {
                entry.enter(now, MoveState::Fenced);
                self.tell_fenced(now, key);
            }
            MoveState::Owned => entry.stopped = true,
            _ => {}
        }
        Ok(())
    }

    /// The hypervisor says that the VM runs behind our port. The caller waits for [`Until::Owned`].
    pub fn running(&mut self, now: Instant, key: Key) -> Result<(), String> {
        let entry = self.known(key)?;
        if entry.port.is_none() {
            return Err(format!("no port of this host has MAC {}: make one first", key.1));
        }
        entry.running.get_or_insert(now);
        match entry.state {
            // Of a grant that was aborted it says that the VM will not run at its destination.
            MoveState::Granted if entry.given.as_ref().is_some_and(|given| given.aborting) => entry.stopped = false,
            MoveState::Owned | MoveState::Granted => (entry.stopped, entry.running) = (false, None),
            MoveState::Fenced => {
                if let Some(given) = entry.given.as_mut() {
                    given.aborting = true;
                }
                self.back(now, key);
                self.tell_given(now, key);
            }
            MoveState::Prepared => self.arrive(now, key),
            MoveState::Absent | MoveState::Released | MoveState::Gone | MoveState::Elsewhere => {
                if let Some((epoch, host)) = entry.owner.clone() {
                    self.step(&host, key, epoch, Step::Claim);
                }
            }
        }
        Ok(())
    }

    /// The move will not happen. The caller at a source waits for [`Until::Released`]. No move at all is no error.
    pub fn abort(&mut self, now: Instant, key: Key) -> Result<(), String> {
        let Some(entry) = self.entries.get_mut(&key) else { return Ok(()) };
        match entry.state {
            MoveState::Granted | MoveState::Fenced => {
                if let Some(given) = entry.given.as_mut() {
                    given.aborting = true;
                }
                self.tell_given(now, key);
            }
            MoveState::Prepared if entry.runs() => {
                return Err(format!("the VM of MAC {} runs here already: its move cannot be aborted any more", key.1));
            }
            MoveState::Prepared => self.release(now, key, "the move was aborted at its destination"),
            _ => {}
        }
        Ok(())
    }

    pub(super) fn known(&mut self, key: Key) -> Result<&mut Entry, String> {
        self.entries.get_mut(&key).ok_or_else(|| format!("MAC {} of network {} is not known to be owned", key.1, key.0))
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

    pub(super) fn own_granted(&mut self, now: Instant, key: Key) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        let Some(got) = entry.got.take() else { return };
        entry.own = got.epoch;
        (entry.owner, entry.running, entry.given, entry.expires) = (None, None, None, None);
        (entry.stopped, entry.claiming) = (false, None);
        entry.enter(now, MoveState::Owned);
        self.announce(key, Some(got.from));
    }

    pub(super) fn release(&mut self, now: Instant, key: Key, why: &str) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        let Some(got) = entry.got.take() else { return };
        entry.released = entry.released.max(got.epoch);
        entry.enter(now, MoveState::Released);
        self.step(&got.from, key, got.epoch, Step::Released { why: why.into() });
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
            }
            _ => {}
        }
    }

    /// An aborted grant whose destination cannot be reached, while the VM runs here: the MAC is ours again. The epoch is above
    /// the grant's, so that a destination that comes back still PREPARED releases it.
    fn take_back(&mut self, now: Instant, key: Key) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        let Some(given) = entry.given.take() else { return };
        tracing::warn!(vni = %key.0, mac = %key.1, to = %given.to, "destination lost, and the VM runs here: its grant is void");
        entry.own = given.epoch.after(1);
        entry.refusal = Some(format!("{} could not be reached", given.to));
        (entry.running, entry.stopped) = (None, false);
        entry.enter(now, MoveState::Owned);
        self.announce(key, None);
    }

    /// A peer is connected (again): what has not ended is told again.
    pub fn peer_up(&mut self, now: Instant, peer: &HostId) {
        for key in self.entries.keys().copied().collect::<Vec<_>>() {
            let Some(entry) = self.entries.get_mut(&key) else { continue };
            if entry.given.as_ref().is_some_and(|given| given.to == *peer) {
                self.tell_given(now, key);
            } else if entry.got.as_ref().is_some_and(|got| got.from == *peer) {
                self.arrive(now, key);
            }
        }
    }

    /// Time has passed. `connected` says whether a peer can be reached, `complete` that all members have told what they own.
    pub fn tick(&mut self, now: Instant, connected: &dyn Fn(&HostId) -> bool, complete: bool) {
        self.recount();
        for key in self.entries.keys().copied().collect::<Vec<_>>() {
            let Some(entry) = self.entries.get_mut(&key) else { continue };
            if entry.port.is_none() && entry.expires.is_some_and(|expires| now >= expires) {
                // The tombstone has served its time; what is known of the new owner stays while that can be reached.
                let reachable = entry.owner.as_ref().is_some_and(|(_, host)| connected(host));
                if entry.state == MoveState::Gone && reachable {
                    entry.expires = None;
                    entry.enter(now, MoveState::Elsewhere);
                } else {
                    self.entries.remove(&key);
                }
                continue;
            }
            if entry.port.is_some() && entry.expires.is_some_and(|expires| now >= expires) {
                entry.expires = None;
            }
            // It runs here and nobody owns it any more: moved behind our back, both ends started anew on the way, or the other
            // place that had its MAC has ended.
            let orphan = matches!(entry.state, MoveState::Absent | MoveState::Released | MoveState::Gone)
                && entry.port.is_some()
                && entry.owner.is_none()
                && entry.running.is_some_and(|since| now.since(since) >= PATIENCE);
            if orphan && complete {
                entry.claiming = Some(entry.highest().max(entry.released).after(1).max(Epoch::FIRST));
                self.claim(now, key);
                continue;
            }
            let deserted = entry.given.as_ref().is_some_and(|given| given.aborting && !connected(&given.to))
                && matches!(entry.state, MoveState::Granted | MoveState::Fenced)
                && entry.running.is_some_and(|since| now.since(since) >= PATIENCE);
            if deserted {
                self.take_back(now, key);
                continue;
            }
            if let Some(got) = &entry.got {
                let unreachable = !connected(&got.from);
                match entry.running {
                    Some(since) if unreachable && now.since(since) >= PATIENCE => self.own_granted(now, key),
                    Some(_) if now.since(got.told) >= REPEAT => self.arrive(now, key),
                    None if now.since(got.since) >= GRANT_EXPIRY => self.release(now, key, "the grant expired"),
                    _ => {}
                }
            } else if entry.given.as_ref().is_some_and(|given| {
                (!given.taken || given.lost || given.aborting) && !given.released && now.since(given.told) >= REPEAT
            }) {
                self.tell_given(now, key);
            }
        }
    }

    /// What a waiting request may be answered, if anything yet.
    pub fn outcome(&self, key: Key, until: Until) -> Option<Result<(), String>> {
        let gone = |entry: &Entry| {
            let owner = entry.owner.as_ref().map_or_else(|| "another host".into(), |(_, host)| host.to_string());
            Some(Err(format!("MAC {} is owned by {owner} now", key.1)))
        };
        let Some(entry) = self.entries.get(&key) else {
            if until == Until::Released {
                return Some(Ok(()));
            }
            return Some(Err(format!("MAC {} of network {} is not known any more", key.1, key.0)));
        };
        match (until, entry.state) {
            (Until::Granted, MoveState::Granted | MoveState::Fenced) => {
                entry.given.as_ref().and_then(|given| given.taken.then_some(Ok(())))
            }
            (Until::Granted, MoveState::Owned) => Some(Err(entry.refusal.clone().unwrap_or_else(|| "aborted".into()))),
            (Until::Owned | Until::Released, MoveState::Owned) => Some(Ok(())),
            (Until::Owned, MoveState::Granted) => Some(Ok(())),
            (Until::Released, MoveState::Fenced) => entry.given.as_ref().and_then(|given| given.released.then_some(Ok(()))),
            (Until::Released, MoveState::Granted) => None,
            (Until::Granted | Until::Released, MoveState::Gone) => gone(entry),
            (Until::Released, _) => Some(Ok(())),
            (Until::Granted, _) => gone(entry),
            (Until::Owned, _) => None,
        }
    }
}
