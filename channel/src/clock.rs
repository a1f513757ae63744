//! This host's clocks as others have to know them.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{SystemTime, UNIX_EPOCH};
use violin_common::Utc;

/// A name of the monotonic clock that no other clock has: those of other machines, of other boots and of other time namespaces show
/// other times (time_namespaces(7)).
pub fn name() -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    // A kernel without time namespaces has one clock.
    let namespace = fs::metadata("/proc/self/ns/time").map_or(0, |namespace| namespace.ino());
    format!("{} {namespace}", boot.trim())
}

/// What time it is.
pub fn utc() -> Utc {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Utc(u64::try_from(now.as_nanos()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_keeps_its_name_and_has_one() {
        assert_eq!(name(), name());
        assert!(name().len() > 36, "{:?}", name());
    }
}
