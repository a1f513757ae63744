//! Control groups: the guests' CPU group of a host, and the groups of one sandbox guest.
//!
//! Both kinds of hierarchy are served: version 1 (a tree per controller) wherever a v1 controller is mounted, version 2
//! (one tree) else. It reads what is mounted and assumes no paths. Source: cgroups(7).

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Period of a CPU quota unless set otherwise. With 10 ms, guests that calibrate a timer against the clock failed to boot.
pub const PERIOD: Duration = Duration::from_millis(100);
/// How long processes may take to freeze or thaw.
const FREEZE_LIMIT: Duration = Duration::from_secs(5);

/// What is mounted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hierarchies {
    /// Mount point of each v1 controller (and of named v1 trees such as `name=systemd`).
    pub v1: BTreeMap<String, PathBuf>,
    /// Mount point of the unified tree.
    pub unified: Option<PathBuf>,
}

impl Hierarchies {
    /// Reads `/proc/self/mounts`. Errors: no control groups are visible, as inside `ip netns exec`, which hides /sys.
    pub fn detect() -> io::Result<Self> {
        let found = Self::parse(&fs::read_to_string("/proc/self/mounts")?);
        if found.v1.is_empty() && found.unified.is_none() {
            return Err(io::Error::other(
                "got no control group mounts, want /sys/fs/cgroup visible (start with nsenter --net, not with ip netns exec)",
            ));
        }
        Ok(found)
    }

    fn parse(mounts: &str) -> Self {
        let mut found = Self::default();
        for line in mounts.lines() {
            let mut words = line.split(' ');
            let (_, Some(at), Some(kind), Some(options)) = (words.next(), words.next(), words.next(), words.next()) else {
                continue;
            };
            match kind {
                "cgroup2" if found.unified.is_none() => found.unified = Some(at.into()),
                "cgroup" => {
                    let known = [
                        "cpu",
                        "cpuacct",
                        "cpuset",
                        "memory",
                        "devices",
                        "freezer",
                        "blkio",
                        "pids",
                        "net_cls",
                        "net_prio",
                        "perf_event",
                        "hugetlb",
                        "rdma",
                        "misc",
                    ];
                    for option in options.split(',').filter(|o| known.contains(o) || o.starts_with("name=")) {
                        found.v1.entry(option.to_owned()).or_insert_with(|| at.into());
                    }
                }
                _ => {}
            }
        }
        found
    }

    /// Whether a controller is on a v1 tree; if not, the unified tree serves it.
    fn v1(&self, controller: &str) -> Option<&Path> {
        self.v1.get(controller).map(PathBuf::as_path)
    }

    fn unified(&self) -> io::Result<&Path> {
        self.unified.as_deref().ok_or_else(|| io::Error::other("neither a v1 controller nor the unified tree is mounted"))
    }

    /// Directory of `group` in the tree that has the controller.
    fn dir(&self, controller: &str, group: &Path) -> io::Result<PathBuf> {
        self.v1(controller).map_or_else(|| Ok(self.unified()?.join(group)), |root| Ok(root.join(group)))
    }
}

fn write(path: &Path, value: &str) -> io::Result<()> {
    fs::write(path, value)
        .map_err(|error| io::Error::new(error.kind(), format!("writing {value:?} to {}: {error}", path.display())))
}

fn create(path: &Path) -> io::Result<()> {
    // Again, if the last other guest cleared the shared group above away in between.
    let mut made = fs::create_dir_all(path);
    for _ in 0..5 {
        if !matches!(&made, Err(error) if error.kind() == io::ErrorKind::NotFound) {
            break;
        }
        made = fs::create_dir_all(path);
    }
    made.map_err(|error| io::Error::new(error.kind(), format!("making {}: {error}", path.display())))?;
    // A cpuset group without CPUs and memory nodes takes no tasks.
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let (own, above) = (path.join(file), path.parent().unwrap_or(path).join(file));
        if let (Ok(here), Ok(there)) = (fs::read_to_string(&own), fs::read_to_string(&above))
            && here.trim().is_empty()
            && !there.trim().is_empty()
        {
            write(&own, there.trim())?;
        }
    }
    Ok(())
}

/// Removes a group if it is there; one that still has tasks stays and is an error.
fn remove(path: &Path) -> io::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(2);
    loop {
        match fs::remove_dir(path) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                // A killed process leaves its group only when the kernel has torn it down.
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => {
                let left = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
                let left: Vec<_> = left.lines().collect();
                let words = format!("removing {}: {error}; processes still in it: {left:?}", path.display());
                return Err(io::Error::new(error.kind(), words));
            }
            Ok(()) => return Ok(()),
        }
    }
}

/// The CPU group of one host's guests: `NAME.partition` in every tree, as libvirt looks for it.
#[derive(Debug, Clone)]
pub struct HostGroup {
    trees: Hierarchies,
    path: PathBuf,
    period: Duration,
}

impl HostGroup {
    /// Makes the group, or finds it.
    pub fn create(trees: &Hierarchies, name: &str) -> io::Result<Self> {
        let path = PathBuf::from(format!("{name}.partition"));
        for root in trees.v1.values().chain(&trees.unified) {
            create(&root.join(&path))?;
        }
        if trees.v1("cpu").is_none() {
            let root = trees.unified()?;
            for at in [root.to_owned(), root.join(&path)] {
                write(&at.join("cgroup.subtree_control"), "+cpu +memory")?;
            }
        }
        Ok(Self { trees: trees.clone(), path, period: PERIOD })
    }

    /// The same group with another period of its quota.
    #[must_use]
    pub fn with_period(self, period: Duration) -> Self {
        Self { period, ..self }
    }

    /// Its path below each tree's root.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Sets how many real cores its guests may use together; none: no limit.
    pub fn set_quota(&self, cores: Option<f64>) -> io::Result<()> {
        set_quota(&self.trees, &self.path, cores, self.period)
    }

    /// Takes the emulators' own threads (I/O, control, migration) out of the quota, which is for what guests compute.
    ///
    /// libvirt keeps them in a group `emulator` of each VM; threads they start follow them. They go to `NAME.emulators`,
    /// which has no limit. Only with a v1 tree: the unified one moves single threads only within threaded groups.
    /// Why: docs/decisions/0008.
    pub fn release_emulators(&self) -> io::Result<()> {
        let Some(root) = self.trees.v1("cpu") else { return Ok(()) };
        let released = root.join(self.path.with_extension("emulators"));
        let machines = fs::read_dir(root.join(&self.path))?.filter_map(Result::ok).map(|entry| entry.path());
        for tasks in machines.map(|machine| machine.join("emulator/tasks")) {
            let Ok(threads) = fs::read_to_string(&tasks) else { continue };
            for thread in threads.lines() {
                create(&released)?;
                match fs::write(released.join("tasks"), thread) {
                    // It ended meanwhile.
                    Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                    other => other?,
                }
            }
        }
        Ok(())
    }

    /// Removes it everywhere; its guests' groups must be gone.
    pub fn remove(&self) -> io::Result<()> {
        if let Some(root) = self.trees.v1("cpu") {
            remove(&root.join(self.path.with_extension("emulators")))?;
        }
        self.trees.v1.values().chain(&self.trees.unified).try_for_each(|root| remove(&root.join(&self.path)))
    }
}

/// Removes groups without processes below a host's CPU group: what a move cut short has left. Best effort.
pub(crate) fn clear_empty(trees: &Hierarchies, partition: &Path) {
    let roots = ["cpu", "cpuacct"].iter().filter_map(|controller| trees.v1(controller));
    let unified = if trees.v1("cpu").is_none() { trees.unified.as_deref() } else { None };
    for root in roots.chain(unified) {
        let Ok(entries) = fs::read_dir(root.join(partition)) else { continue };
        for entry in entries.filter_map(Result::ok).filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            // The kernel refuses those that have processes.
            let _ = fs::remove_dir(entry.path());
        }
    }
}

fn set_quota(trees: &Hierarchies, group: &Path, cores: Option<f64>, period: Duration) -> io::Result<()> {
    let period_us = period.as_micros();
    // The kernel refuses less than 1 ms.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
    let quota = cores.map(|cores| ((cores * period_us as f64).round() as u64).max(1000));
    let dir = trees.dir("cpu", group)?;
    if trees.v1("cpu").is_some() {
        write(&dir.join("cpu.cfs_period_us"), &period_us.to_string())?;
        write(&dir.join("cpu.cfs_quota_us"), &quota.map_or_else(|| "-1".to_owned(), |q| q.to_string()))
    } else {
        let quota = quota.map_or_else(|| "max".to_owned(), |q| q.to_string());
        write(&dir.join("cpu.max"), &format!("{quota} {period_us}"))
    }
}

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
    /// Names the groups of a guest: `partition` is [`HostGroup::path`], `own` a path unique on the machine.
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
            if !self.moves_running() {
                write(&dir.join("cgroup.freeze"), "1")?;
            }
            for pid in processes.iter().filter(|pid| !there.contains(&pid.to_string().as_str())) {
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
            // The kernel's own conversion between the two scales: 1024 shares are weight 39, 2 are 1, 262144 are 10000.
            let weight = 1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142;
            write(&self.trees.unified()?.join(host).join("cpu.weight"), &weight.to_string())?;
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
    super::proc::start_time(pid).is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_mounts_are_found() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
            cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,relatime,cpu,cpuacct 0 0\n\
            cgroup /sys/fs/cgroup/systemd cgroup rw,relatime,name=systemd 0 0\n\
            cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0\n";

        let trees = Hierarchies::parse(mounts);

        assert_eq!(trees.v1("cpu"), Some(Path::new("/sys/fs/cgroup/cpu,cpuacct")));
        assert_eq!(trees.v1("cpuacct"), Some(Path::new("/sys/fs/cgroup/cpu,cpuacct")));
        assert_eq!(trees.v1("name=systemd"), Some(Path::new("/sys/fs/cgroup/systemd")));
        assert_eq!(trees.unified.as_deref(), Some(Path::new("/sys/fs/cgroup/unified")));
    }

    #[test]
    fn a_pure_v2_guest_has_one_directory() {
        let trees = Hierarchies::parse("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n");
        let guest = GuestGroup::new(&trees, Some(Path::new("h1.partition")), "alpha-c1", Path::new("own/alpha-c1"));

        assert_eq!(guest.freezer().unwrap(), Path::new("/sys/fs/cgroup/h1.partition/alpha-c1"));
        assert_eq!(guest.host_dirs().unwrap(), [Path::new("/sys/fs/cgroup/h1.partition/alpha-c1")]);
        assert!(guest.own_dirs().is_empty());
    }
}
