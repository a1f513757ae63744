//! The one place that asks for the time.
#![allow(unsafe_code)]

use violin_common::Instant;

/// Now, on the machine's monotonic clock.
pub fn now() -> Instant {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a live timespec of our own; CLOCK_MONOTONIC exists on every Linux, so it is always filled.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    Instant(u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0))
}
