//! A peer's step of a move. A peer speaks for itself only: `from` is the host its certificate names.

use super::Moves;
use violin_common::control::mesh::{OwnedAt, Step};
use violin_common::{HostId, Instant};

impl Moves {
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
            Step::Fenced => self.fenced_heard(now, from, key, owned.epoch),
            Step::Claim => self.claim_heard(now, from, key, owned.epoch),
            Step::Hold { .. } => {}
        }
    }
}
