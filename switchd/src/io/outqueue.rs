//! Small frames for a port, put together while a vector is walked and written in few calls.
//!
//! Bounded: a guest that is sent more than it is worth loses of its own, and the others of its host wait for a few hundred of its
//! frames at most.

use crate::counters::PortCounters;
use crate::drops::DropReason;
use crate::port::{PortIo, WriteError};
use crate::virtio::Offload;
use std::sync::Arc;
use violin_common::{Instant, PortId};

/// Frames that are put together at most.
pub(crate) const FRAMES: usize = 512;
/// A larger frame is written at once, from where it lies.
pub(crate) const SMALL: usize = 2048;

/// See the head of this file.
#[derive(Debug)]
pub(crate) struct OutQueue {
    id: PortId,
    traffic: Arc<PortCounters>,
    bytes: Vec<u8>,
    /// Start and end of each, its `virtio_net_hdr` included.
    frames: Vec<(usize, usize)>,
}

impl OutQueue {
    /// An empty one.
    pub(crate) fn new(id: PortId, traffic: &Arc<PortCounters>) -> Self {
        Self { id, traffic: Arc::clone(traffic), bytes: Vec::new(), frames: Vec::new() }
    }

    /// Whose frames these are.
    pub(crate) const fn id(&self) -> PortId {
        self.id
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.frames.len()
    }

    /// Takes a frame in parts.
    pub(crate) fn push(&mut self, offload: &Offload, parts: &[&[u8]]) -> Result<(), DropReason> {
        if self.frames.len() >= FRAMES {
            return Err(DropReason::PortBusy);
        }
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&offload.emit());
        parts.iter().for_each(|part| self.bytes.extend_from_slice(part));
        self.frames.push((start, self.bytes.len()));
        Ok(())
    }

    /// Writes all of them; what is refused is told to `dropped`. When the interface has gone, the rest is returned, each with what
    /// its reader has to do.
    pub(crate) fn write(
        &mut self,
        now: Instant,
        io: &mut dyn PortIo,
        mut dropped: impl FnMut(DropReason),
    ) -> Vec<(Offload, Vec<u8>)> {
        let mut rest = self.frames.as_slice();
        let mut left = Vec::new();
        while !rest.is_empty() {
            let taken = match io.write_many(&self.bytes, rest) {
                Ok(taken) => {
                    for (start, end) in rest.iter().take(taken) {
                        self.traffic.written(now, (end - start - crate::virtio::LEN) as u64);
                    }
                    taken
                }
                Err(WriteError::Refused(reason)) => {
                    dropped(reason);
                    1
                }
                Err(WriteError::Gone) => {
                    left.extend(rest.iter().filter_map(|&(start, end)| self.frame(start, end)));
                    break;
                }
            };
            rest = rest.get(taken.max(1)..).unwrap_or_default();
        }
        self.bytes.clear();
        self.frames.clear();
        left
    }

    fn frame(&self, start: usize, end: usize) -> Option<(Offload, Vec<u8>)> {
        let (header, frame) = self.bytes.get(start..end)?.split_first_chunk()?;
        Some((Offload::parse(header).ok()?, frame.to_vec()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::sys::Batch;
    use crate::port::ReadError;
    use std::os::fd::BorrowedFd;

    /// Takes three frames a call, refuses those that begin with `refused`, and goes after `life` frames.
    #[derive(Debug)]
    struct Port {
        taken: Vec<Vec<u8>>,
        life: usize,
        refused: u8,
    }

    impl PortIo for Port {
        fn fd(&self) -> BorrowedFd<'_> {
            unreachable!("nobody waits for it")
        }

        fn read(&mut self, _: &mut Batch) -> Result<(), ReadError> {
            Err(ReadError::Empty)
        }

        fn write(&mut self, _: &Offload, _: &[&[u8]]) -> Result<(), WriteError> {
            unreachable!("frames are written together")
        }

        fn write_many(&mut self, bytes: &[u8], frames: &[(usize, usize)]) -> Result<usize, WriteError> {
            let frame = |(start, end): (usize, usize)| bytes[start + crate::virtio::LEN..end].to_vec();
            let ahead: Vec<_> = frames.iter().map(|at| frame(*at)).take(3).take_while(|frame| frame[0] != self.refused).collect();
            if ahead.is_empty() {
                return Err(WriteError::Refused(DropReason::TooBig));
            }
            if self.life == 0 {
                return Err(WriteError::Gone);
            }
            let taken = ahead.len().min(self.life);
            self.life -= taken;
            self.taken.extend(ahead.into_iter().take(taken));
            Ok(taken)
        }
    }

    fn filled(count: u8) -> (OutQueue, Arc<PortCounters>) {
        let traffic = Arc::new(PortCounters::default());
        let mut queue = OutQueue::new(PortId(1), &traffic);
        for number in 0..count {
            queue.push(&Offload::default(), &[&[number], &[9; 60]]).unwrap();
        }
        (queue, traffic)
    }

    #[test]
    fn all_are_written_in_order_and_one_that_is_refused_holds_up_no_other() {
        let (mut queue, traffic) = filled(10);
        let (mut port, mut dropped) = (Port { taken: Vec::new(), life: 100, refused: 4 }, Vec::new());
        assert_eq!(queue.write(Instant(1), &mut port, |reason| dropped.push(reason)), []);
        assert_eq!(port.taken.iter().map(|frame| frame[0]).collect::<Vec<_>>(), [0, 1, 2, 3, 5, 6, 7, 8, 9]);
        assert_eq!((dropped, queue.len()), (vec![DropReason::TooBig], 0));
        assert_eq!((traffic.snapshot().frames_out, traffic.snapshot().bytes_out), (9, 9 * 61));
    }

    #[test]
    fn what_an_interface_that_has_gone_did_not_take_is_given_back() {
        let (mut queue, traffic) = filled(10);
        let mut port = Port { taken: Vec::new(), life: 4, refused: 200 };
        let left = queue.write(Instant(1), &mut port, |_| panic!("nothing is refused"));
        assert_eq!(left.iter().map(|(_, frame)| frame[0]).collect::<Vec<_>>(), [4, 5, 6, 7, 8, 9]);
        assert_eq!((traffic.snapshot().frames_out, queue.len()), (4, 0));
    }

    #[test]
    fn more_than_there_is_room_for_is_refused() {
        let (mut queue, _) = filled(0);
        let pushed = (0..FRAMES + 5).filter(|_| queue.push(&Offload::default(), &[&[1; 60]]).is_ok()).count();
        assert_eq!((pushed, queue.len()), (FRAMES, FRAMES));
    }
}
