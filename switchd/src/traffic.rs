//! Who talks to whom: bytes and frames per pair of MACs, counted where they enter a network.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use violin_common::api::switch::TrafficSeen;
use violin_common::{MacAddr, Vni};

/// Pairs remembered.
pub const LIMIT: usize = 4096;

/// Network, sender, receiver.
pub type Pair = (Vni, MacAddr, MacAddr);

/// The bounded table of pairs. When full, the half with least bytes is forgotten: what matters for placement stays.
#[derive(Debug, Default)]
pub struct Traffic(Mutex<HashMap<Pair, (u64, u64)>>);

impl Traffic {
    /// Adds frames and bytes of some pairs, emptying `seen`.
    pub fn add(&self, seen: &mut Vec<(Pair, u64, u64)>) {
        if seen.is_empty() {
            return;
        }
        let mut pairs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (pair, frames, bytes) in seen.drain(..) {
            if pairs.len() >= LIMIT && !pairs.contains_key(&pair) {
                let mut all: Vec<_> = pairs.iter().map(|(pair, (_, bytes))| (*bytes, *pair)).collect();
                let (small, _, _) = all.select_nth_unstable(LIMIT / 2);
                for (_, pair) in small {
                    pairs.remove(pair);
                }
            }
            let (all_frames, all_bytes) = pairs.entry(pair).or_default();
            *all_frames += frames;
            *all_bytes += bytes;
        }
    }

    /// All pairs, by network and addresses.
    pub fn snapshot(&self) -> Vec<TrafficSeen> {
        let pairs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> =
            pairs.iter().map(|(&(vni, from, to), &(frames, bytes))| TrafficSeen { vni, from, to, frames, bytes }).collect();
        all.sort_unstable_by_key(|seen| (seen.vni, seen.from, seen.to));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_forged_pairs_leaves_the_heavy_ones() {
        let (traffic, vni) = (Traffic::default(), Vni::new(1).unwrap());
        let heavy = (vni, MacAddr([2; 6]), MacAddr([4; 6]));
        traffic.add(&mut vec![(heavy, 10, 1_000_000)]);
        for number in 0..20_000 {
            traffic.add(&mut vec![((vni, MacAddr::from_u64(number), MacAddr::BROADCAST), 1, 60)]);
        }
        let all = traffic.snapshot();
        assert!(all.len() <= LIMIT);
        assert!(all.iter().any(|seen| (seen.from, seen.bytes) == (heavy.1, 1_000_000)));
    }
}
