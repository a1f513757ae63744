//! One direction of the WAN: when does a packet arrive, if at all. Pure: time and length in, fate out.

/// Longest time a packet may wait for the rate.
const QUEUE_NS: u64 = 100_000_000;

/// What happens to a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It arrives at this time, in nanoseconds.
    Arrives(u64),
    /// Lost by chance.
    Lost,
    /// Dropped at the tail of a full queue.
    Dropped,
}

/// Delay, loss and rate of one direction. Arrivals never overtake each other.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    delay_ns: u64,
    /// Probability of loss as a fraction of 2^64.
    loss: u64,
    bits_per_s: Option<u64>,
    /// When the last bit accepted so far will have left.
    free_ns: u64,
    random: u64,
}

impl Link {
    /// Units: nanoseconds, percent, bits a second. `seed` decides which packets are lost.
    pub(crate) const fn new(delay_ns: u64, loss_percent: f64, bits_per_s: Option<u64>, seed: u64) -> Self {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 100 percent; saturates at the ends")]
        let loss = (loss_percent / 100.0 * 18_446_744_073_709_551_616.0) as u64;
        Self { delay_ns, loss, bits_per_s, free_ns: 0, random: seed }
    }

    /// A packet of `length` bytes comes in at `now_ns`, not before the one before it.
    pub(crate) fn offer(&mut self, now_ns: u64, length: usize) -> Fate {
        // The draw is made for every packet, so that what is lost depends on its number alone, not on load.
        let draw = self.draw();
        let start = self.free_ns.max(now_ns);
        if start - now_ns > QUEUE_NS {
            return Fate::Dropped;
        }
        if let Some(rate) = self.bits_per_s {
            let bits = length as u128 * 8;
            let span = bits * 1_000_000_000 / u128::from(rate.max(1));
            self.free_ns = start.saturating_add(u64::try_from(span).unwrap_or(u64::MAX));
        } else {
            self.free_ns = start;
        }
        // A packet lost on the way has taken its time on the wire all the same. All ones: a draw is always below.
        if draw < self.loss || self.loss == u64::MAX {
            Fate::Lost
        } else {
            Fate::Arrives(self.free_ns.saturating_add(self.delay_ns))
        }
    }

    /// Source: SplitMix64 (Steele, Lea and Flood 2014).
    const fn draw(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unlimited_link_only_delays() {
        let mut link = Link::new(5_000_000, 0.0, None, 1);

        assert_eq!(link.offer(100, 1500), Fate::Arrives(5_000_100));
        assert_eq!(link.offer(100, 1500), Fate::Arrives(5_000_100));
    }

    #[test]
    fn a_rate_spaces_packets_and_a_full_queue_drops() {
        let mut link = Link::new(0, 0.0, Some(8_000_000), 1);

        assert_eq!(link.offer(0, 1000), Fate::Arrives(1_000_000));
        assert_eq!(link.offer(0, 1000), Fate::Arrives(2_000_000));
        let dropped = (0..200).filter(|_| link.offer(0, 1000) == Fate::Dropped).count();
        assert_eq!(dropped, 101);
        assert_eq!(link.offer(500_000_000, 1000), Fate::Arrives(501_000_000));
    }

    #[test]
    fn losses_follow_the_seed() {
        let lost = |seed| {
            let mut link = Link::new(0, 10.0, None, seed);
            (0..10_000).filter(|&now| link.offer(now, 100) == Fate::Lost).collect::<Vec<_>>()
        };

        assert_eq!(lost(7), lost(7));
        assert_ne!(lost(7), lost(8));
        assert!((900..1100).contains(&lost(7).len()), "{}", lost(7).len());
    }

    #[test]
    fn all_is_lost_at_a_hundred_percent() {
        let mut link = Link::new(0, 100.0, None, 1);

        assert!((0..1000).all(|now| link.offer(now, 1) == Fate::Lost));
    }
}
