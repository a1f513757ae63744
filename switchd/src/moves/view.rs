//! What is told of moves: to tables, to new peers, to operators, to whoever waits.

use super::{Entry, Key, MoveSeen, Moves, Until, View, at};
use violin_common::Vni;
use violin_common::api::switch::MoveState;
use violin_common::control::mesh::OwnedAt;

impl Moves {
    /// What becomes of frames for each MAC.
    pub fn views(&self) -> impl Iterator<Item = (Key, View)> {
        self.entries.iter().filter_map(|(key, entry)| Some((*key, self.view_of(entry)?)))
    }

    pub(super) fn view_of(&self, entry: &Entry) -> Option<View> {
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

    /// All MACs we own in networks that `wanted` names, for a peer that has just connected.
    pub fn ours(&self, wanted: &dyn Fn(Vni) -> bool) -> Vec<OwnedAt> {
        let owned = self.entries.iter().filter(|(key, entry)| entry.owns() && wanted(key.0));
        owned.map(|(key, entry)| at(*key, entry.own)).collect()
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
