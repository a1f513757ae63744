//! Processes by number *and* start time: a number alone may meanwhile be somebody else's.

use crate::error::{LabError, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// One process, for all time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ProcessId {
    /// Number.
    pub pid: u32,
    /// Start time in clock ticks since boot: field 22 of proc_pid_stat(5).
    pub started: u64,
}

impl ProcessId {
    /// The process that has this number now; none if there is none, or it is dead and only not yet collected.
    pub fn of(pid: u32) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field is a name in parentheses that may hold anything, parentheses too.
        let (_, rest) = text.rsplit_once(')')?;
        let mut fields = rest.split_ascii_whitespace();
        let state = fields.next()?;
        let started = fields.nth(18)?.parse().ok()?;
        (!matches!(state, "Z" | "X")).then_some(Self { pid, started })
    }

    /// This process.
    pub fn own() -> Option<Self> {
        Self::of(std::process::id())
    }

    /// Whether it still runs.
    pub fn alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// Sends SIGKILL if it still runs.
    pub(crate) fn kill(self) {
        if self.alive()
            && let Ok(pid) = i32::try_from(self.pid)
        {
            // Gone in between is as good.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// Waits until `done` is true, looking every 10 ms.
///
/// Errors: `limit` passed; `what` and `log` go into the error.
pub fn wait_for(what: &str, limit: Duration, log: Option<&Path>, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + limit;
    while !done()? {
        if Instant::now() >= deadline {
            return Err(LabError::Timeout { what: what.to_owned(), seconds: limit.as_secs(), log: log.map(PathBuf::from) });
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// All processes inside one of the namespaces or below one of the control groups, but never this process or its parents.
///
/// Shape: `groups` are paths within a hierarchy such as `/violin-demo-h1.partition`.
pub(crate) fn within(namespaces: &[PathBuf], groups: &[String]) -> Vec<ProcessId> {
    let inodes: BTreeSet<_> =
        namespaces.iter().filter_map(|path| fs::metadata(path).ok()).map(|meta| (meta.dev(), meta.ino())).collect();
    let spared = ancestors();
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| !spared.contains(pid))
        .filter(|pid| {
            let in_namespace =
                || fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|meta| inodes.contains(&(meta.dev(), meta.ino())));
            let in_group = || {
                let Ok(text) = fs::read_to_string(format!("/proc/{pid}/cgroup")) else { return false };
                let mut paths = text.lines().filter_map(|line| line.splitn(3, ':').nth(2));
                paths.any(|path| groups.iter().any(|group| below(path, group)))
            };
            in_group() || in_namespace()
        })
        .filter_map(ProcessId::of)
        .collect()
}

fn below(path: &str, group: &str) -> bool {
    path.strip_prefix(group).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn ancestors() -> BTreeSet<u32> {
    let mut all = BTreeSet::new();
    let mut next = Some(std::process::id());
    while let Some(pid) = next.filter(|&pid| pid > 1 && all.insert(pid)) {
        next = parent(pid);
    }
    all
}

fn parent(pid: u32) -> Option<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    text.rsplit_once(')')?.1.split_ascii_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_ended_is_not_alive() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let process = ProcessId::of(child.id()).unwrap();
        assert!(process.alive());
        assert!(!ProcessId { started: process.started + 1, ..process }.alive());

        process.kill();
        child.wait().unwrap();

        assert!(!process.alive());
    }

    #[test]
    fn a_group_is_not_below_one_whose_name_begins_alike() {
        assert!(below("/violin-a-h1.partition/qemu-1", "/violin-a-h1.partition"));
        assert!(below("/violin-a-h1.partition", "/violin-a-h1.partition"));
        assert!(!below("/violin-a-h1.partition2", "/violin-a-h1.partition"));
    }
}
