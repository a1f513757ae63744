//! Ordinary frames that were too large for one datagram, put together again; bounded per peer in frames, bytes and time.
//!
//! Super-frames never come here: each of their slices can leave on its own (see `inbound.rs`).

use crate::drops::DropReason;
use std::collections::BTreeMap;
use std::time::Duration;
use violin_common::wire::mesh::Slice;
use violin_common::{Instant, Vni};

/// Unfinished frames of one peer. Stations with a larger MTU than their network's send nothing else at full speed: on a path
/// that reorders, so many frames overtake each other.
pub const MAX_FRAMES: usize = 64;
/// Bytes of one frame.
pub const MAX_FRAME: usize = 65_600;
/// Pieces of one frame that do not touch each other.
const MAX_PIECES: usize = 64;
/// How long a frame may stay unfinished.
pub const PATIENCE: Duration = Duration::from_millis(500);

#[derive(Debug)]
struct Unfinished {
    since: Instant,
    vni: Vni,
    marks: u8,
    bytes: Vec<u8>,
    /// Start → end of what is there; no two touch.
    pieces: BTreeMap<usize, usize>,
}

/// The unfinished frames of one peer, by queue and frame id.
#[derive(Debug, Default)]
pub struct Reassembly {
    frames: BTreeMap<(u16, u32), Unfinished>,
}

impl Reassembly {
    /// Takes one slice of an ordinary frame; gives the frame when it is complete.
    ///
    /// Errors: the slice contradicts itself or its siblings, or overlaps them; its frame is kept without it. When the peer
    /// has too many unfinished frames, its oldest goes and is counted by `dropped`.
    pub fn take(
        &mut self,
        now: Instant,
        queue: u16,
        slice: &Slice,
        bytes: &[u8],
        mut dropped: impl FnMut(DropReason),
    ) -> Result<Option<Vec<u8>>, DropReason> {
        let (start, total) = (slice.offset as usize, slice.total as usize);
        let end = start + bytes.len();
        if bytes.is_empty() || end > total || total > MAX_FRAME {
            return Err(DropReason::BadSlice);
        }
        let key = (queue, slice.frame_id);
        if !self.frames.contains_key(&key) && self.frames.len() >= MAX_FRAMES {
            let oldest = self.frames.iter().min_by_key(|(_, frame)| frame.since).map(|(key, _)| *key);
            if oldest.and_then(|key| self.frames.remove(&key)).is_some() {
                dropped(DropReason::ReassemblyFull);
            }
        }
        let frame = self.frames.entry(key).or_insert_with(|| Unfinished {
            since: now,
            vni: slice.vni,
            marks: slice.marks,
            bytes: vec![0; total],
            pieces: BTreeMap::new(),
        });
        if frame.bytes.len() != total || frame.vni != slice.vni || frame.marks != slice.marks {
            return Err(DropReason::BadSlice);
        }
        let before = frame.pieces.range(..end).next_back().map(|(&from, &to)| (from, to));
        if before.is_some_and(|(_, to)| to > start) {
            return Err(DropReason::ReassemblyOverlap);
        }
        let Some(place) = frame.bytes.get_mut(start..end) else { return Err(DropReason::BadSlice) };
        place.copy_from_slice(bytes);
        let mut piece = (start, end);
        if let Some((from, to)) = before
            && to == start
        {
            frame.pieces.remove(&from);
            piece.0 = from;
        }
        if let Some(to) = frame.pieces.remove(&end) {
            piece.1 = to;
        }
        frame.pieces.insert(piece.0, piece.1);
        if piece == (0, total) {
            return Ok(self.frames.remove(&key).map(|frame| frame.bytes));
        }
        if frame.pieces.len() > MAX_PIECES {
            self.frames.remove(&key);
            return Err(DropReason::ReassemblyFull);
        }
        Ok(None)
    }

    /// Gives up on frames that wait too long; returns how many.
    pub fn expire(&mut self, now: Instant) -> usize {
        let before = self.frames.len();
        self.frames.retain(|_, frame| now.since(frame.since) < PATIENCE);
        before - self.frames.len()
    }

    /// Whether nothing is unfinished.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use violin_common::wire::mesh::Segmentation;

    fn slice(frame_id: u32, offset: usize, total: usize) -> Slice {
        Slice {
            vni: Vni::new(7).unwrap(),
            marks: 0,
            segmentation: Segmentation::None,
            frame_id,
            offset: offset as u32,
            total: total as u32,
            segment_size: 0,
        }
    }

    proptest! {
        #[test]
        fn slices_in_any_order_give_the_frame(len in 1usize..9000, chunk in 500usize..2000, seed in any::<u64>()) {
            let frame: Vec<u8> = (0..len).map(|i| (i as u64 ^ seed) as u8).collect();
            let mut slices: Vec<_> = frame.chunks(chunk).enumerate().map(|(i, c)| (i * chunk, c)).collect();
            for i in (1..slices.len()).rev() {
                slices.swap(i, (seed as usize).wrapping_mul(i) % (i + 1));
            }
            let mut reassembly = Reassembly::default();
            let count = slices.len();
            for (i, (offset, bytes)) in slices.into_iter().enumerate() {
                let done = reassembly.take(Instant(0), 0, &slice(1, offset, len), bytes, |_| ()).unwrap();
                prop_assert_eq!(done.is_some(), i + 1 == count);
                if let Some(done) = done {
                    prop_assert_eq!(&done, &frame);
                }
            }
            prop_assert!(reassembly.is_empty());
        }

        #[test]
        fn nothing_makes_it_panic_or_grow(steps in proptest::collection::vec((0u32..40, 0usize..0x20000, 0usize..0x20000, 0usize..2000), 0..200)) {
            let mut reassembly = Reassembly::default();
            for (id, offset, total, len) in steps {
                let _ = reassembly.take(Instant(0), 0, &slice(id, offset, total), &vec![0; len], |_| ());
                prop_assert!(reassembly.frames.len() <= MAX_FRAMES);
            }
            reassembly.expire(Instant(0) + PATIENCE);
            prop_assert!(reassembly.is_empty());
        }
    }

    #[test]
    fn a_slice_that_came_twice_is_refused() {
        let mut reassembly = Reassembly::default();
        assert_eq!(reassembly.take(Instant(0), 0, &slice(1, 0, 10), &[0; 4], |_| ()), Ok(None));
        assert_eq!(reassembly.take(Instant(0), 0, &slice(1, 0, 10), &[0; 4], |_| ()), Err(DropReason::ReassemblyOverlap));
        assert_eq!(reassembly.take(Instant(0), 0, &slice(1, 3, 10), &[0; 7], |_| ()), Err(DropReason::ReassemblyOverlap));
        assert!(reassembly.take(Instant(0), 0, &slice(1, 4, 10), &[0; 6], |_| ()).unwrap().is_some());
    }
}
