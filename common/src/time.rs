//! Time as an argument.

use ::time::OffsetDateTime;
use ::time::format_description::well_known::Rfc3339;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::{Add, Sub};
use std::str::FromStr;
use std::time::Duration;

/// A point in time: nanoseconds on the host's monotonic clock, or since the start of a simulated world.
///
/// Pure code takes it as an argument and never asks for it. It means something only beside times of the same clock: those of another
/// machine, of another boot or of another time namespace differ by any number. All network namespaces of one machine share the
/// monotonic clock, so times taken by the daemons of one lab can be subtracted from each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Instant(pub u64);

impl Instant {
    /// Time since `earlier`, zero if that lies in the future.
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Instant {
    type Output = Self;
    fn add(self, span: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)))
    }
}

impl Sub<Duration> for Instant {
    type Output = Self;
    fn sub(self, span: Duration) -> Self {
        Self(self.0.saturating_sub(u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)))
    }
}

/// A point in time as people, and other machines, know it: nanoseconds since 1970 in UTC. Written as RFC 3339 has it, with
/// milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Utc(pub u64);

impl fmt::Display for Utc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = OffsetDateTime::from_unix_timestamp_nanos(self.0.into()).map_err(|_| fmt::Error)?;
        let (year, month, day) = (time.year(), u8::from(time.month()), time.day());
        let (hour, minute, second, milli) = time.to_hms_milli();
        f.pad(&format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{milli:03}Z"))
    }
}

impl FromStr for Utc {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("got {text:?}, want a time as RFC 3339 has it, such as 2026-11-27T02:13:50.120Z");
        let time = OffsetDateTime::parse(text, &Rfc3339).map_err(|_| wrong())?;
        u64::try_from(time.unix_timestamp_nanos()).map(Self).map_err(|_| wrong())
    }
}

impl TryFrom<String> for Utc {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Utc> for String {
    fn from(time: Utc) -> Self {
        time.to_string()
    }
}

/// What a monotonic clock showed at a moment, and what time that was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Anchor {
    /// Which clock: a name that no other clock has, of no other machine or boot.
    pub clock: String,
    /// What it showed.
    pub at: Instant,
    /// When that was.
    pub utc: Utc,
}

impl Anchor {
    /// When another time of that clock was, or will be.
    pub const fn utc(&self, at: Instant) -> Utc {
        if at.0 >= self.at.0 {
            Utc(self.utc.0.saturating_add(at.0 - self.at.0))
        } else {
            Utc(self.utc.0.saturating_sub(self.at.0 - at.0))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn utc_is_written_and_read_as_rfc_3339() {
        let time = Utc(1_795_745_630_120_000_000);
        assert_eq!(time.to_string(), "2026-11-27T02:13:50.120Z");
        assert_eq!("2026-11-27T02:13:50.120Z".parse(), Ok(time));
        assert_eq!("2026-11-27T04:13:50.12+02:00".parse(), Ok(time));
        assert_eq!(Utc(0).to_string(), "1970-01-01T00:00:00.000Z");
        assert_eq!(Utc(u64::MAX).to_string().parse(), Ok(Utc(u64::MAX / 1_000_000 * 1_000_000)));
        for wrong in ["", "1795745630", "2026-11-27", "1969-12-31T23:59:59Z"] {
            assert!(wrong.parse::<Utc>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn times_before_and_after_an_anchor_are_found() {
        let anchor = Anchor { clock: "a".into(), at: Instant(100), utc: Utc(1000) };
        assert_eq!((anchor.utc(Instant(150)), anchor.utc(Instant(40)), anchor.utc(Instant(0))), (Utc(1050), Utc(940), Utc(900)));
    }
}
