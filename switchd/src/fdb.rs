//! Learned MACs of one network: who was last heard where.
//!
//! Owned MACs never enter here; callers ask for them first. Bounded: when full, the place that holds most entries loses its
//! oldest, so that one noisy port or peer cannot push out the others.

use crate::tables::Place;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use violin_common::{Instant, MacAddr};

/// Entries of one network unless said otherwise.
pub const DEFAULT_LIMIT: usize = 8192;
/// A MAC that changes its place more often than this within [`FLAP_WINDOW`] stays where it is until the window has passed.
pub const FLAP_LIMIT: u8 = 8;
/// See [`FLAP_LIMIT`].
pub const FLAP_WINDOW: Duration = Duration::from_secs(1);
/// A frame and an announcement that contradict each other within this time may have overtaken one another.
pub const SETTLE: Duration = Duration::from_secs(1);

type Key = (u16, MacAddr);

/// What learning did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Learned {
    /// Was not known.
    New,
    /// Was known elsewhere.
    Moved {
        /// Where.
        from: Place,
    },
    /// Was known there.
    Refreshed,
    /// Changes its place too often: nothing was changed.
    Flapping,
    /// A group or zero address: never learned.
    Refused,
}

/// One line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FdbRow {
    /// Outer VLAN identifier, 0 for untagged.
    pub vid: u16,
    /// Address.
    pub mac: MacAddr,
    /// Where it was last heard.
    pub place: Place,
    /// When.
    pub seen: Instant,
}

#[derive(Debug)]
struct Entry {
    place: Place,
    seen: Instant,
    /// When it came to this place.
    placed: Instant,
    window: Instant,
    moves: u8,
}

#[derive(Debug, Default)]
struct Inner {
    entries: HashMap<Key, Entry>,
    /// Per place: how many entries it has, and its keys from oldest to newest; a key whose entry has left is skipped.
    places: HashMap<Place, (usize, VecDeque<Key>)>,
}

/// The learned MACs of one network. Shared by all workers.
#[derive(Debug)]
pub struct Fdb {
    limit: usize,
    inner: Mutex<Inner>,
}

impl Default for Fdb {
    fn default() -> Self {
        Self::new(DEFAULT_LIMIT)
    }
}

impl Fdb {
    /// An empty table of at most `limit` entries (at least one).
    pub fn new(limit: usize) -> Self {
        Self { limit: limit.max(1), inner: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers that `mac` is reached through `place`, or refreshes what is known.
    ///
    /// Group addresses are never learned: a forged one would draw everybody's multicast to a single place.
    pub fn learn(&self, now: Instant, vid: u16, mac: MacAddr, place: Place) -> Learned {
        if mac.is_group() || mac == MacAddr([0; 6]) {
            return Learned::Refused;
        }
        let mut inner = self.lock();
        let key = (vid, mac);
        if let Some(entry) = inner.entries.get_mut(&key) {
            if entry.place == place {
                entry.seen = now;
                return Learned::Refreshed;
            }
            if now.since(entry.window) > FLAP_WINDOW {
                (entry.window, entry.moves) = (now, 0);
            }
            if entry.moves >= FLAP_LIMIT {
                return Learned::Flapping;
            }
            entry.moves += 1;
            (entry.seen, entry.placed) = (now, now);
            let from = std::mem::replace(&mut entry.place, place);
            inner.leave(from);
            inner.enter(place, key);
            return Learned::Moved { from };
        }
        if inner.entries.len() >= self.limit {
            inner.evict();
        }
        inner.entries.insert(key, Entry { place, seen: now, placed: now, window: now, moves: 0 });
        inner.enter(place, key);
        Learned::New
    }

    /// A peer announces that it hears `mac` at `place`. Only what is known is corrected: an announcement fills no table.
    ///
    /// An announcement and the frames of the next place take different ways and may overtake each other. Where a frame has
    /// placed the MAC elsewhere less than [`SETTLE`] ago nobody can tell which is older: the entry is forgotten, and the
    /// flood that follows finds the station wherever it is.
    pub fn correct(&self, now: Instant, vid: u16, mac: MacAddr, place: Place, ageing: Duration) {
        let disputed = match self.lock().entries.get(&(vid, mac)) {
            Some(entry) if entry.place != place && now.since(entry.seen) < ageing => now.since(entry.placed) < SETTLE,
            _ => return,
        };
        if disputed {
            self.forget(|key, _| *key == (vid, mac));
        } else {
            self.learn(now, vid, mac, place);
        }
    }

    /// Where `mac` was heard within `ageing`.
    pub fn lookup(&self, now: Instant, vid: u16, mac: MacAddr, ageing: Duration) -> Option<Place> {
        let inner = self.lock();
        inner.entries.get(&(vid, mac)).filter(|entry| now.since(entry.seen) < ageing).map(|entry| entry.place)
    }

    /// Forgets what has been silent for `ageing`; returns how many.
    pub fn age(&self, now: Instant, ageing: Duration) -> usize {
        self.forget(|_, entry| now.since(entry.seen) >= ageing)
    }

    /// Forgets everything; returns how many.
    pub fn flush(&self) -> usize {
        self.forget(|_, _| true)
    }

    /// Forgets what was heard at `place`, as when a port or peer has gone; returns how many.
    pub fn flush_place(&self, place: Place) -> usize {
        self.forget(|_, entry| entry.place == place)
    }

    /// Likewise for every place of which `gone` says so; returns what was forgotten.
    pub fn take_places(&self, gone: impl Fn(Place) -> bool) -> Vec<(u16, MacAddr)> {
        let mut inner = self.lock();
        let taken: Vec<Key> = inner.entries.iter().filter(|(_, entry)| gone(entry.place)).map(|(key, _)| *key).collect();
        if !taken.is_empty() {
            inner.entries.retain(|_, entry| !gone(entry.place));
            inner.recount();
        }
        taken
    }

    /// Forgets those of these stations that are known to be at `place`: who has been heard elsewhere since stays.
    pub fn flush_stations(&self, place: Place, stations: &HashSet<(u16, MacAddr)>) -> usize {
        self.forget(|key, entry| entry.place == place && stations.contains(key))
    }

    /// Forgets one address in all VLANs, as when it becomes owned; returns how many.
    pub fn flush_mac(&self, mac: MacAddr) -> usize {
        self.forget(|key, _| key.1 == mac)
    }

    /// Likewise for many addresses, in one pass over the table.
    pub fn flush_macs(&self, macs: &HashSet<MacAddr>) -> usize {
        self.forget(|key, _| macs.contains(&key.1))
    }

    fn forget(&self, which: impl Fn(&Key, &Entry) -> bool) -> usize {
        let mut inner = self.lock();
        let before = inner.entries.len();
        inner.entries.retain(|key, entry| !which(key, entry));
        let gone = before - inner.entries.len();
        if gone > 0 {
            inner.recount();
        }
        gone
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.lock().entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All entries, by VLAN and address.
    pub fn entries(&self) -> Vec<FdbRow> {
        let inner = self.lock();
        let mut rows: Vec<_> =
            inner.entries.iter().map(|(&(vid, mac), entry)| FdbRow { vid, mac, place: entry.place, seen: entry.seen }).collect();
        rows.sort_unstable_by_key(|row| (row.vid, row.mac));
        rows
    }
}

impl Inner {
    fn enter(&mut self, place: Place, key: Key) {
        let (count, queue) = self.places.entry(place).or_default();
        *count += 1;
        queue.push_back(key);
        self.sweep(place);
    }

    /// A MAC that wanders to and fro leaves a key behind each time: they go before they outnumber the entries.
    fn sweep(&mut self, place: Place) {
        let Some((count, queue)) = self.places.get_mut(&place) else { return };
        if queue.len() > 2 * *count + 16 {
            let entries = &self.entries;
            let mut seen = HashSet::new();
            queue.retain(|key| entries.get(key).is_some_and(|entry| entry.place == place) && seen.insert(*key));
        }
    }

    fn leave(&mut self, place: Place) {
        if let Some((count, _)) = self.places.get_mut(&place) {
            *count -= 1;
            if *count == 0 {
                self.places.remove(&place);
            } else {
                self.sweep(place);
            }
        }
    }

    fn recount(&mut self) {
        self.places.clear();
        let mut keys: Vec<_> = self.entries.iter().map(|(key, entry)| (entry.seen, entry.place, *key)).collect();
        keys.sort_unstable_by_key(|&(seen, _, key)| (seen, key));
        for (_, place, key) in keys {
            let (count, queue) = self.places.entry(place).or_default();
            *count += 1;
            queue.push_back(key);
        }
    }

    /// Drops the entry that has been longest with the place that has most. An entry refreshed since it was queued is given
    /// a second chance, a few times at most, so the cost stays bounded.
    fn evict(&mut self) {
        let Some(place) = self.places.iter().max_by_key(|(_, (count, _))| *count).map(|(place, _)| *place) else { return };
        let mut victim: Option<(Instant, Key)> = None;
        let Some((_, queue)) = self.places.get_mut(&place) else { return };
        let mut looked = 0;
        while let Some(key) = queue.pop_front() {
            let Some(entry) = self.entries.get(&key).filter(|entry| entry.place == place) else { continue };
            looked += 1;
            match victim {
                Some((seen, other)) if seen <= entry.seen => {
                    queue.push_back(key);
                    victim = Some((seen, other));
                }
                Some((_, other)) => {
                    queue.push_back(other);
                    victim = Some((entry.seen, key));
                }
                None => victim = Some((entry.seen, key)),
            }
            if looked >= 8 {
                break;
            }
        }
        if let Some((_, key)) = victim {
            self.entries.remove(&key);
            self.leave(place);
        }
    }
}

#[cfg(test)]
#[path = "fdb_tests.rs"]
mod tests;
