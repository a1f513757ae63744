//! What the data plane counts; written by workers, read by anybody, never locked.

use crate::drops::DropReason;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use violin_common::Instant;
use violin_common::api::switch::{Counter, PortTraffic};

/// What went through one port.
#[derive(Debug, Default)]
pub struct PortCounters {
    frames_in: AtomicU64,
    bytes_in: AtomicU64,
    frames_out: AtomicU64,
    bytes_out: AtomicU64,
    oversize: AtomicU64,
    /// Whether the control side has heard of the first of them.
    oversize_told: AtomicBool,
    /// Nanoseconds; 0: never.
    last_out: AtomicU64,
}

impl PortCounters {
    /// Counts frames taken from the port.
    pub fn taken(&self, frames: u64, bytes: u64) {
        self.frames_in.fetch_add(frames, Relaxed);
        self.bytes_in.fetch_add(bytes, Relaxed);
    }

    /// Counts one frame written to the port.
    pub fn written(&self, now: Instant, bytes: u64) {
        self.frames_out.fetch_add(1, Relaxed);
        self.bytes_out.fetch_add(bytes, Relaxed);
        self.last_out.store(now.0, Relaxed);
    }

    /// Counts a frame taken from the port that is larger than its network's MTU; `tell` is asked until it says that the
    /// control side knows.
    pub fn oversized(&self, tell: impl FnOnce() -> bool) {
        self.oversize.fetch_add(1, Relaxed);
        if !self.oversize_told.load(Relaxed) && tell() {
            self.oversize_told.store(true, Relaxed);
        }
    }

    /// All figures now.
    pub fn snapshot(&self) -> PortTraffic {
        let last_out = self.last_out.load(Relaxed);
        PortTraffic {
            frames_in: self.frames_in.load(Relaxed),
            bytes_in: self.bytes_in.load(Relaxed),
            frames_out: self.frames_out.load(Relaxed),
            bytes_out: self.bytes_out.load(Relaxed),
            oversize: self.oversize.load(Relaxed),
            last_out: (last_out != 0).then_some(Instant(last_out)),
        }
    }
}

/// What went to and came from one peer.
#[derive(Debug, Default)]
pub struct PeerCounters {
    datagrams_out: AtomicU64,
    bytes_out: AtomicU64,
    datagrams_in: AtomicU64,
    bytes_in: AtomicU64,
}

/// A [`PeerCounters`] at one time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PeerTraffic {
    /// Datagrams sent.
    pub datagrams_out: u64,
    /// Bytes of UDP payload sent.
    pub bytes_out: u64,
    /// Datagrams admitted.
    pub datagrams_in: u64,
    /// Bytes of UDP payload admitted.
    pub bytes_in: u64,
}

impl PeerCounters {
    /// Counts datagrams handed to the underlay.
    pub fn sent(&self, datagrams: u64, bytes: u64) {
        self.datagrams_out.fetch_add(datagrams, Relaxed);
        self.bytes_out.fetch_add(bytes, Relaxed);
    }

    /// Counts datagrams admitted.
    pub fn admitted(&self, datagrams: u64, bytes: u64) {
        self.datagrams_in.fetch_add(datagrams, Relaxed);
        self.bytes_in.fetch_add(bytes, Relaxed);
    }

    /// All figures now.
    pub fn snapshot(&self) -> PeerTraffic {
        PeerTraffic {
            datagrams_out: self.datagrams_out.load(Relaxed),
            bytes_out: self.bytes_out.load(Relaxed),
            datagrams_in: self.datagrams_in.load(Relaxed),
            bytes_in: self.bytes_in.load(Relaxed),
        }
    }
}

/// One counter for each [`DropReason`].
#[derive(Debug)]
pub struct DropCounters(Box<[AtomicU64]>);

impl Default for DropCounters {
    fn default() -> Self {
        Self(DropReason::ALL.iter().map(|_| AtomicU64::new(0)).collect())
    }
}

impl DropCounters {
    /// Counts one refusal.
    pub fn count(&self, reason: DropReason) {
        self.add(reason, 1);
    }

    /// Counts several refusals.
    pub fn add(&self, reason: DropReason, times: u64) {
        self.0[reason as usize].fetch_add(times, Relaxed);
    }

    /// How often a reason was met.
    pub fn of(&self, reason: DropReason) -> u64 {
        self.0[reason as usize].load(Relaxed)
    }

    /// All refusals together.
    pub fn total(&self) -> u64 {
        self.0.iter().map(|counter| counter.load(Relaxed)).sum()
    }
}

/// All that a switch's data plane counts beside its ports and peers.
#[derive(Debug, Default)]
pub struct Counters {
    /// Refusals.
    pub drops: DropCounters,
    /// Frames copied to more than one place.
    pub floods: AtomicU64,
    /// Late frames forwarded once, tunnel to tunnel, because their MAC had just moved.
    pub late_forwards: AtomicU64,
    /// Frames of ports larger than their network's MTU, carried all the same.
    pub oversize_carried: AtomicU64,
    /// Super-frames of guests' own tunnels, which were cut here.
    pub software_segmentations: AtomicU64,
    /// Checksums of guests that were completed here, because nobody after us would have.
    pub software_checksums: AtomicU64,
    /// "Too big" answers sent on behalf of a gateway.
    pub too_big_answers: AtomicU64,
    /// Learned sources, new or moved.
    pub learned: AtomicU64,
    /// Worker events lost because the control side did not keep up.
    pub events_lost: AtomicU64,
}

impl Counters {
    /// All counters with their names; drops as `drop.REASON`, zeros included.
    pub fn snapshot(&self) -> Vec<Counter> {
        let named = [
            ("floods", &self.floods),
            ("late-forwards", &self.late_forwards),
            ("oversize-carried", &self.oversize_carried),
            ("software-segmentations", &self.software_segmentations),
            ("software-checksums", &self.software_checksums),
            ("too-big-answers", &self.too_big_answers),
            ("learned", &self.learned),
            ("events-lost", &self.events_lost),
        ];
        let mut all: Vec<_> = named.map(|(name, counter)| Counter { name: name.into(), value: counter.load(Relaxed) }).into();
        all.extend(
            DropReason::ALL
                .iter()
                .map(|&reason| Counter { name: format!("drop.{}", reason.name()), value: self.drops.of(reason) }),
        );
        all
    }
}
