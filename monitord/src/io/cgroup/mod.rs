//! Control groups: the guests' CPU group of a host, and the groups of one sandbox guest.
//!
//! Both kinds of hierarchy are served: version 1 (a tree per controller) wherever a v1 controller is mounted, version 2
//! (one tree) else. It reads what is mounted and assumes no paths. Source: cgroups(7).

mod guest;

pub use guest::GuestGroup;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Period of a CPU quota unless set otherwise. With 10 ms, guests that calibrate a timer against the clock failed to boot.
pub const PERIOD: Duration = Duration::from_millis(100);

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

/// Weight in the unified tree for shares of a v1 tree: what was never set is 100 there, 1024 here.
///
/// Source: `sched_weight_to_cgroup` in the kernel's kernel/sched/core.c; Documentation/admin-guide/cgroup-v2.rst, `cpu.weight`.
pub(crate) fn weight(shares: u64) -> u64 {
    (shares.saturating_mul(100).saturating_add(512) / 1024).clamp(1, 10_000)
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
                write(&at.join("cgroup.subtree_control"), "+cpu")?;
                if let Err(error) = write(&at.join("cgroup.subtree_control"), "+memory") {
                    tracing::warn!(at = %at.display(), %error, "no memory limits of single guests");
                }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_that_were_never_set_are_a_weight_that_was_never_set() {
        assert_eq!([2, 512, 1024, 2048, 262_144].map(weight), [1, 50, 100, 200, 10_000]);
    }

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
}
