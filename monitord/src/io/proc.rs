//! Figures the kernel tells in /proc.

use std::fs;
use std::io;
use std::path::Path;

/// One task's CPU account. Source: Documentation/scheduler/sched-stats.rst, `/proc/PID/schedstat`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TaskTime {
    /// Nanoseconds run.
    pub run_ns: u64,
    /// Nanoseconds ready to run and waiting; time throttled by a quota counts.
    pub wait_ns: u64,
}

/// CPU accounts of all threads of a process, by thread. Empty if it has ended.
pub fn tasks(pid: i32) -> Vec<(i32, TaskTime)> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    entries
        .filter_map(|entry| {
            let tid = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let text = fs::read_to_string(format!("/proc/{pid}/task/{tid}/schedstat")).ok()?;
            let mut words = text.split_ascii_whitespace().map(str::parse);
            let time = TaskTime { run_ns: words.next()?.ok()?, wait_ns: words.next()?.ok()? };
            Some((tid, time))
        })
        .collect()
}

/// Memory of a process resident on the host, in bytes; 0 if it has ended.
pub fn resident_bytes(pid: i32) -> u64 {
    let pages = fs::read_to_string(format!("/proc/{pid}/statm"))
        .ok()
        .and_then(|text| text.split_ascii_whitespace().nth(1)?.parse::<u64>().ok());
    pages.unwrap_or(0) * 4096
}

/// When a live process started, in clock ticks since boot: with the number it names one process for ever.
/// `None`: there is none, or it is a zombie.
pub fn start_time(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name, in parentheses, may hold anything; fields are counted after its end.
    let mut fields = text.get(text.rfind(')')? + 1..)?.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") { None } else { fields.nth(18)?.parse().ok() }
}

/// Processes in the PID namespace of this one: all of a sandbox guest, in whatever control group they are.
pub fn beside(pid: i32) -> Vec<i32> {
    use std::os::unix::fs::MetadataExt;
    let namespace = |pid: i32| fs::metadata(format!("/proc/{pid}/ns/pid")).ok().map(|seen| (seen.dev(), seen.ino()));
    let (Some(own), Ok(entries)) = (namespace(pid), fs::read_dir("/proc")) else { return Vec::new() };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter(|pid| namespace(*pid) == Some(own)).collect()
}

/// Pressure stall information: share of the last ten seconds in which some task waited, 0 to 1.
/// `None`: the kernel does not tell. `what` is `cpu` or `memory`.
pub fn pressure(what: &str) -> Option<f64> {
    let text = fs::read_to_string(format!("/proc/pressure/{what}")).ok()?;
    parse_pressure(&text)
}

fn parse_pressure(text: &str) -> Option<f64> {
    let some = text.lines().find(|line| line.starts_with("some"))?;
    let value = some.split_ascii_whitespace().find_map(|word| word.strip_prefix("avg10="))?;
    Some(value.parse::<f64>().ok()? / 100.0)
}

/// Memory the machine can still give without swapping, in MiB.
pub fn memory_available_mib() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.split_ascii_whitespace().next()?.parse::<u64>().ok());
    kib.map(|kib| kib / 1024).ok_or_else(|| io::Error::other("no MemAvailable line in /proc/meminfo"))
}

/// Packets an interface of this process's network namespace has transmitted; `None`: there is none of that name.
///
/// Read from /proc and not by rtnetlink, which would wait while any interface changes its namespace.
pub fn transmitted(interface: &str) -> Option<u64> {
    parse_transmitted(&fs::read_to_string("/proc/self/net/dev").ok()?, interface)
}

fn parse_transmitted(text: &str, interface: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.trim_start().strip_prefix(interface)?.strip_prefix(':'))?;
    line.split_ascii_whitespace().nth(9)?.parse().ok()
}

/// Path by which others can open this process's network namespace: a name under `/run/netns` if it has one, for such a path
/// outlives this process.
pub fn own_netns_path() -> String {
    use std::os::unix::fs::MetadataExt;
    let fallback = format!("/proc/{}/ns/net", std::process::id());
    let Ok(own) = fs::metadata("/proc/self/ns/net") else { return fallback };
    let Ok(entries) = fs::read_dir(Path::new("/run/netns")) else { return fallback };
    let named = entries
        .filter_map(Result::ok)
        .find(|entry| fs::metadata(entry.path()).is_ok_and(|named| named.ino() == own.ino() && named.dev() == own.dev()));
    named.map_or(fallback, |entry| entry.path().to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_beside_itself_and_its_children() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let own = i32::try_from(std::process::id()).unwrap();

        let seen = beside(i32::try_from(child.id()).unwrap());

        child.kill().unwrap();
        child.wait().unwrap();
        assert!(seen.contains(&own) && seen.contains(&i32::try_from(child.id()).unwrap()), "{seen:?}");
        assert!(beside(i32::MAX).is_empty());
    }

    #[test]
    fn pressure_is_a_fraction() {
        let text = "some avg10=12.50 avg60=1.00 avg300=0.00 total=1\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n";
        assert_eq!(parse_pressure(text), Some(0.125));
        assert_eq!(parse_pressure(""), None);
    }

    #[test]
    fn transmitted_packets_are_the_tenth_figure_of_the_right_line() {
        let text = "Inter-|   Receive ... |  Transmit\n face |bytes ...\n    vg-a1: 1 2 0 0 0 0 0 0 3 4 0 0 0 0 0 0\n  vg-a: 5 6 0 0 0 0 0 0 7 8 0 0 0 0 0 0\n";
        assert_eq!(parse_transmitted(text, "vg-a"), Some(8));
        assert_eq!(parse_transmitted(text, "vg-b"), None);
    }

    #[test]
    fn this_process_has_a_start_time_and_threads() {
        let pid = i32::try_from(std::process::id()).unwrap();
        assert!(start_time(pid).is_some());
        assert!(!tasks(pid).is_empty());
        assert_eq!(start_time(i32::MAX), None);
    }
}
