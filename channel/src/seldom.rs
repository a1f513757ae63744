//! What may happen at any rate and is said once a minute.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Time between two lines about the same.
pub const EVERY: Duration = Duration::from_secs(60);
/// Things told apart at most: others could make us remember as many as they like.
const KEYS: usize = 64;

#[derive(Debug)]
struct Said {
    at: Instant,
    unsaid: u64,
}

/// Decides whether something is said now, and counts what is not.
#[derive(Debug, Default)]
pub struct Seldom(Mutex<HashMap<String, Said>>);

impl Seldom {
    /// It has happened at `now`; `what` tells it from others. `Some`: say it, and that it happened so many times unsaid before.
    pub fn due(&self, now: Instant, what: &str) -> Option<u64> {
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if said.len() >= KEYS && !said.contains_key(what) {
            said.retain(|_, said| now.saturating_duration_since(said.at) < EVERY);
        }
        // Where there are too many they share one line.
        let key = if said.len() >= KEYS && !said.contains_key(what) { "" } else { what };
        match said.get_mut(key) {
            Some(said) if now.saturating_duration_since(said.at) < EVERY => {
                said.unsaid += 1;
                None
            }
            Some(said) => {
                said.at = now;
                Some(std::mem::take(&mut said.unsaid))
            }
            None => {
                said.insert(key.to_owned(), Said { at: now, unsaid: 0 });
                Some(0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_is_said_once_a_minute_with_how_often_it_happened() {
        let (seldom, began) = (Seldom::default(), Instant::now());
        let lines: Vec<_> = (0..1200_u32).filter_map(|tick| seldom.due(began + tick * EVERY / 600, "full")).collect();
        assert_eq!(lines, [0, 599]);
        assert_eq!(seldom.due(began, "another"), Some(0));
    }

    #[test]
    fn ever_other_things_share_a_line() {
        let (seldom, now) = (Seldom::default(), Instant::now());
        let lines = (0..1000).filter(|number| seldom.due(now, &number.to_string()).is_some()).count();
        assert_eq!(lines, KEYS + 1);
    }
}
