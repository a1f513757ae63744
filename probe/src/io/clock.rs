//! The machine's monotonic clock, as numbers that can be compared with other processes' on the same kernel.

use nix::time::{ClockId, ClockNanosleepFlags, clock_gettime, clock_nanosleep};
use std::time::Duration;

/// Now, ns of `CLOCK_MONOTONIC`.
pub fn now_ns() -> u64 {
    // The monotonic clock exists on every Linux and is never negative.
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap_or_else(|_| nix::sys::time::TimeSpec::new(0, 0));
    u64::try_from(now.tv_sec()).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec()).unwrap_or(0)
}

/// Sleeps until the clock shows `at_ns`, or a signal comes.
pub fn sleep_until(at_ns: u64) {
    let at = Duration::from_nanos(at_ns);
    let _ = clock_nanosleep(ClockId::CLOCK_MONOTONIC, ClockNanosleepFlags::TIMER_ABSTIME, &at.into());
}

/// Reads a span of time: a number and a unit of us, ms, s, m or h; a bare number is seconds.
///
/// Errors: what was got and what is wanted.
pub fn parse_span(text: &str) -> Result<Duration, String> {
    let wrong = || format!("got {text:?}, want a number and a unit of us, ms, s, m or h, such as 2ms");
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let number: u64 = text[..digits].parse().map_err(|_| wrong())?;
    let micros = match &text[digits..] {
        "us" => 1,
        "ms" => 1_000,
        "" | "s" => 1_000_000,
        "m" => 60_000_000,
        "h" => 3_600_000_000,
        _ => return Err(wrong()),
    };
    number.checked_mul(micros).map(Duration::from_micros).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_read_with_their_unit() {
        assert_eq!(parse_span("2ms"), Ok(Duration::from_millis(2)));
        assert_eq!(parse_span("90"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_span("3m"), Ok(Duration::from_secs(180)));
        for wrong in ["", "ms", "2 ms", "-1s", "2d", "99999999999999999999s"] {
            assert!(parse_span(wrong).is_err(), "{wrong}");
        }
    }
}
