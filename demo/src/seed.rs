//! What the seed decides: who is crowded, and by whom.

use std::time::{SystemTime, UNIX_EPOCH};

/// Nodes of beta that compute; all start on the crowded host.
pub(crate) const COMPUTE: [&str; 4] = ["c1", "c2", "c3", "c4"];

/// The roles as drawn.
#[derive(Debug, Clone)]
pub(crate) struct Cast {
    /// Host whose guests compute too much.
    pub(crate) crowded: String,
    /// The other host of its domain.
    pub(crate) other: String,
    /// Nodes of beta that start computing first.
    pub(crate) first: Vec<String>,
    /// Nodes of beta that follow.
    pub(crate) later: Vec<String>,
}

/// A seed from the clock, small enough to type.
pub(crate) fn drawn() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| u64::from(now.subsec_nanos()) % 100_000)
}

impl Cast {
    /// Draws the roles: the lowest bit of the mixed seed chooses the host, the rest shuffles beta's nodes.
    pub(crate) fn draw(seed: u64) -> Self {
        let mut state = seed;
        let [crowded, other] = if next(&mut state).is_multiple_of(2) { ["h1", "h2"] } else { ["h2", "h1"] };
        let mut nodes: Vec<String> = COMPUTE.iter().map(|&node| node.to_owned()).collect();
        for last in (1..nodes.len()).rev() {
            let place = usize::try_from(next(&mut state) % (last as u64 + 1)).unwrap_or(0);
            nodes.swap(last, place);
        }
        let later = nodes.split_off(2);
        Self { crowded: crowded.into(), other: other.into(), first: nodes, later }
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014).
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_draw_both_hosts_and_always_the_same_for_one_seed() {
        let hosts: std::collections::BTreeSet<_> = (0..20).map(|seed| Cast::draw(seed).crowded).collect();
        assert_eq!(hosts.len(), 2);
        assert_eq!(Cast::draw(7).first, Cast::draw(7).first);
    }
}
