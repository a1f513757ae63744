//! What happens on this host: the hypervisor stops and runs VMs, an operator aborts, peers come, time passes.

use super::{Entry, GRANT_EXPIRY, Key, Moves, PATIENCE, REPEAT};
use violin_common::api::switch::MoveState;
use violin_common::control::mesh::Step;
use violin_common::{HostId, Instant};

impl Moves {
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

    /// The hypervisor says that the VM runs behind our port. The caller waits for [`super::Until::Owned`].
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

    /// The move will not happen. The caller at a source waits for [`super::Until::Released`]. No move at all is no error.
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

    /// When [`Self::tick`], which was called last at `ticked`, has something to do, if nothing happens before.
    pub fn poll_timeout(&self, ticked: Instant) -> Option<Instant> {
        let of = |entry: &Entry| {
            let expires = entry.expires;
            let repeats = |told: Instant| told + REPEAT;
            let given = entry.untold().map(repeats);
            let got = entry.got.as_ref().map(|got| match entry.running {
                Some(_) => repeats(got.told),
                None => got.since + GRANT_EXPIRY,
            });
            // Patience is over some time; whether others are heard of by then is looked at again and again.
            let running = entry.running.map(|since| (since + PATIENCE).max(ticked + REPEAT / 4));
            [expires, given, got, running].into_iter().flatten().min()
        };
        self.entries.values().filter_map(of).min()
    }

    /// Time has passed. `connected` says whether a peer can be reached, `complete` that all members have told what they own.
    pub fn tick(&mut self, now: Instant, connected: &dyn Fn(&HostId) -> bool, complete: bool) {
        self.recount();
        for key in self.entries.keys().copied().collect::<Vec<_>>() {
            let done = self.tick_tombstone(now, key, connected) || complete && self.tick_orphan(now, key);
            if !done && !self.tick_destination(now, key, connected) {
                self.tick_source(now, key, connected);
            }
        }
    }
}
