//! The groups of one sandbox guest.

use super::{Hierarchies, PERIOD, create, remove, set_quota, write};
use crate::io::proc;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{fs, io};

/// How long processes may take to freeze or thaw.
const FREEZE_LIMIT: Duration = Duration::from_secs(5);

/// The groups of one sandbox guest.
///
/// With v1, CPU time is accounted and limited below the host's CPU group and changes place when the guest moves, while the
/// freezer and memory groups are the guest's own for life. With v2 one directory is all of them.
#[derive(Debug, Clone)]
pub struct GuestGroup {
    trees: Hierarchies,
    /// Below the host's CPU group; none if the host has no such group.
    host: Option<PathBuf>,
    /// The guest's own.
    own: PathBuf,
}

impl GuestGroup {
    /// Names the groups of a guest: `partition` is [`HostGroup::path`](super::HostGroup::path), `own` a path unique on the machine.
    pub fn new(trees: &Hierarchies, partition: Option<&Path>, vm: &str, own: &Path) -> Self {
        Self { trees: trees.clone(), host: partition.map(|p| p.join(vm)), own: own.to_owned() }
    }

    fn freezer(&self) -> io::Result<PathBuf> {
        match (self.trees.v1("freezer"), &self.host) {
            (None, Some(host)) => Ok(self.trees.unified()?.join(host)),
            _ => self.trees.dir("freezer", &self.own),
        }
    }

    fn host_dirs(&self) -> io::Result<Vec<PathBuf>> {
        let Some(host) = &self.host else { return Ok(Vec::new()) };
        if self.trees.v1("cpu").is_none() {
            return Ok(vec![self.trees.unified()?.join(host)]);
        }
        Ok(["cpu", "cpuacct"].iter().filter_map(|c| self.trees.v1(c)).map(|root| root.join(host)).collect())
    }

    fn own_dirs(&self) -> Vec<PathBuf> {
        let v1 = ["freezer", "memory"].iter().filter_map(|c| self.trees.v1(c)).map(|root| root.join(&self.own));
        let mut dirs: Vec<_> = v1.collect();
        if dirs.is_empty() && self.host.is_none() {
            dirs.extend(self.trees.unified.iter().map(|root| root.join(&self.own)));
        }
        dirs
    }

    /// Makes all groups and returns the files a process writes `0` to in order to join.
    pub fn create(&self) -> io::Result<Vec<PathBuf>> {
        let dirs: Vec<_> = self.host_dirs()?.into_iter().chain(self.own_dirs()).collect();
        dirs.iter().try_for_each(|dir| create(dir))?;
        Ok(dirs.into_iter().map(|dir| dir.join("cgroup.procs")).collect())
    }

    /// The guest's processes.
    pub fn processes(&self) -> io::Result<Vec<i32>> {
        match fs::read_to_string(self.freezer()?.join("cgroup.procs")) {
            Ok(text) => Ok(text.lines().filter_map(|line| line.parse().ok()).collect()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Whether processes may change their CPU group while they run; in the unified tree that would thaw or freeze them.
    pub fn moves_running(&self) -> bool {
        self.trees.v1("freezer").is_some()
    }

    /// Takes processes below this host's CPU group; without [`Self::moves_running`] they must be frozen, and stay so.
    ///
    /// Cost: milliseconds for each process that is not there yet, because the kernel waits for a grace period.
    pub fn adopt(&self, processes: &[i32]) -> io::Result<()> {
        for dir in self.host_dirs()? {
            create(&dir)?;
            let there = fs::read_to_string(dir.join("cgroup.procs"))?;
            let there: Vec<&str> = there.lines().collect();
            // In the unified tree a process takes the state of the group it enters: it must not run a moment too soon.
            let missing: Vec<&i32> = processes.iter().filter(|pid| !there.contains(&pid.to_string().as_str())).collect();
            if !missing.is_empty() && !self.moves_running() {
                write(&dir.join("cgroup.freeze"), "1")?;
            }
            for pid in missing {
                match write(&dir.join("cgroup.procs"), &pid.to_string()) {
                    Err(error) if start_gone(*pid) => tracing::debug!(pid, %error, "process ended while its group changed"),
                    other => other?,
                }
            }
        }
        Ok(())
    }

    /// Stops every process of the guest; returns when all have stopped.
    pub fn freeze(&self) -> io::Result<()> {
        self.set_frozen(true)
    }

    /// Lets them run again.
    pub fn thaw(&self) -> io::Result<()> {
        self.set_frozen(false)
    }

    /// Whether they are stopped, or being stopped.
    pub fn is_frozen(&self) -> io::Result<bool> {
        let dir = self.freezer()?;
        if self.trees.v1("freezer").is_some() {
            Ok(fs::read_to_string(dir.join("freezer.state"))?.trim() != "THAWED")
        } else {
            Ok(fs::read_to_string(dir.join("cgroup.freeze"))?.trim() == "1")
        }
    }

    fn set_frozen(&self, frozen: bool) -> io::Result<()> {
        let dir = self.freezer()?;
        let v1 = self.trees.v1("freezer").is_some();
        let word = if frozen { "FROZEN" } else { "THAWED" };
        let digit = if frozen { "1" } else { "0" };
        if v1 {
            write(&dir.join("freezer.state"), word)?
        } else {
            write(&dir.join("cgroup.freeze"), digit)?
        }
        let deadline = Instant::now() + FREEZE_LIMIT;
        loop {
            let reached = if v1 {
                fs::read_to_string(dir.join("freezer.state"))?.trim() == word
            } else {
                fs::read_to_string(dir.join("cgroup.events"))?.contains(&format!("frozen {digit}"))
            };
            if reached {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(io::Error::new(io::ErrorKind::TimedOut, format!("{} did not become {word}", dir.display())));
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// CPU time its processes, ended ones too, used in this host's group, in nanoseconds; `None` without such a group.
    pub fn cpu_ns(&self) -> Option<u64> {
        let host = self.host.as_ref()?;
        if let Some(root) = self.trees.v1("cpuacct") {
            return fs::read_to_string(root.join(host).join("cpuacct.usage")).ok()?.trim().parse().ok();
        }
        let text = fs::read_to_string(self.trees.unified.as_ref()?.join(host).join("cpu.stat")).ok()?;
        let micros = text.lines().find_map(|line| line.strip_prefix("usage_usec "))?;
        Some(micros.parse::<u64>().ok()? * 1000)
    }

    /// Sets CPU weight (1024 is normal) and cap in real cores.
    pub fn set_cpu(&self, shares: u64, cap: Option<f64>) -> io::Result<()> {
        let Some(host) = &self.host else { return Err(io::Error::other("this host has no CPU group (capacity.cpu-group)")) };
        if let Some(root) = self.trees.v1("cpu") {
            write(&root.join(host).join("cpu.shares"), &shares.clamp(2, 262_144).to_string())?;
        } else {
            write(&self.trees.unified()?.join(host).join("cpu.weight"), &super::weight(shares).to_string())?;
        }
        set_quota(&self.trees, host, cap, PERIOD)
    }

    /// Limits its memory, in bytes.
    pub fn set_memory(&self, bytes: u64) -> io::Result<()> {
        if let Some(root) = self.trees.v1("memory") {
            return write(&root.join(&self.own).join("memory.limit_in_bytes"), &bytes.to_string());
        }
        let group = self.host.as_ref().unwrap_or(&self.own);
        write(&self.trees.unified()?.join(group).join("memory.max"), &bytes.to_string())
    }

    /// Removes its group below this host's CPU group, after it has moved away.
    pub fn leave_host(&self) -> io::Result<()> {
        self.host_dirs()?.iter().try_for_each(|dir| remove(dir))
    }

    /// Removes all its groups; its processes must have ended.
    pub fn remove(&self) -> io::Result<()> {
        self.leave_host()?;
        for dir in self.own_dirs() {
            remove(&dir)?;
            // The group above is shared with other guests: the last one clears it away.
            if let Some(above) = dir.parent() {
                let _ = fs::remove_dir(above);
            }
        }
        Ok(())
    }
}

fn start_gone(pid: i32) -> bool {
    proc::start_time(pid).is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pure_v2_guest_has_one_directory() {
        let trees = Hierarchies::parse("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n");
        let guest = GuestGroup::new(&trees, Some(Path::new("h1.partition")), "alpha-c1", Path::new("own/alpha-c1"));

        assert_eq!(guest.freezer().unwrap(), Path::new("/sys/fs/cgroup/h1.partition/alpha-c1"));
        assert_eq!(guest.host_dirs().unwrap(), [Path::new("/sys/fs/cgroup/h1.partition/alpha-c1")]);
        assert!(guest.own_dirs().is_empty());
    }
}
