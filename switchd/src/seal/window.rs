//! Which packet numbers were seen: a datagram is taken once, and only while its number is not too old.
//!
//! A ring of bits, as in RFC 6479 §2: the words between the old and the new top are cleared when it moves on, nothing is shifted.

/// Numbers below the top that can still be told apart.
pub const WINDOW: u64 = 8192;
const WORDS: usize = WINDOW as usize / 64 + 1;

/// The packet numbers of one queue and epoch.
#[derive(Debug)]
pub struct Window {
    /// The highest number that was marked.
    top: u64,
    words: Box<[u64; WORDS]>,
}

impl Default for Window {
    fn default() -> Self {
        Self { top: 0, words: Box::new([0; WORDS]) }
    }
}

const fn place(number: u64) -> (usize, u64) {
    ((number / 64) as usize % WORDS, 1 << (number % 64))
}

impl Window {
    /// Whether a number is neither seen nor too old. Numbers begin with 1.
    pub fn is_new(&self, number: u64) -> bool {
        if number > self.top {
            return true;
        }
        let (word, bit) = place(number);
        number != 0 && self.top - number < WINDOW && self.words[word] & bit == 0
    }

    /// Remembers a number that is new. Only after its datagram has opened: a forged one must not close the window.
    pub fn mark(&mut self, number: u64) {
        if number > self.top {
            let passed = (number / 64 - self.top / 64).min(WORDS as u64);
            for step in 1..=passed {
                self.words[(self.top / 64 + step) as usize % WORDS] = 0;
            }
            self.top = number;
        }
        let (word, bit) = place(number);
        self.words[word] |= bit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    #[test]
    fn the_window_is_as_wide_as_it_says() {
        let mut window = Window::default();
        window.mark(WINDOW);
        assert!(window.is_new(1) && !window.is_new(0) && !window.is_new(WINDOW));
        window.mark(WINDOW + 1);
        assert!(!window.is_new(1) && window.is_new(2));
    }

    proptest! {
        /// Against a set of all that was seen.
        #[test]
        fn each_number_is_taken_once_and_never_when_too_old(
            start in 1u64..u64::MAX / 2,
            steps in proptest::collection::vec((0u64..3 * WINDOW, any::<bool>()), 1..300),
        ) {
            let (mut window, mut seen, mut top) = (Window::default(), HashSet::new(), 0u64);
            for (step, back) in steps {
                let number = if back { top.saturating_sub(step % (WINDOW + 200)) } else { top.max(start) + step };
                let new = number != 0 && !seen.contains(&number) && number + WINDOW > top;
                prop_assert_eq!(window.is_new(number), new, "number {}, top {}", number, top);
                if new {
                    window.mark(number);
                    seen.insert(number);
                    top = top.max(number);
                }
            }
        }
    }
}
