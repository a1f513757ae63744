//! Control groups of a lab: one for the guests of each host, one for its daemons, in every mounted hierarchy.
//!
//! The monitor sets the quota of a guests' group; here groups are only made, emptied and removed.

use crate::error::{Doing, LabError, Result};
use crate::process::{ProcessId, wait_for};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Weight of a lab's daemons in v1 and v2, eight times that of a guests' group (1024 and 100): guests that burn every core
/// must not starve the switch that carries their frames.
const DAEMON_WEIGHTS: [(&str, &str); 2] = [("cpu.shares", "8192"), ("cpu.weight", "800")];

/// One mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    root: PathBuf,
    unified: bool,
}

fn hierarchies() -> Vec<Hierarchy> {
    parse(&fs::read_to_string("/proc/self/mounts").unwrap_or_default())
}

fn parse(mounts: &str) -> Vec<Hierarchy> {
    let mut all: Vec<Hierarchy> = Vec::new();
    for line in mounts.lines() {
        let mut words = line.split(' ').skip(1);
        let (Some(root), Some(kind)) = (words.next(), words.next()) else { continue };
        if matches!(kind, "cgroup" | "cgroup2") && !all.iter().any(|known| known.root == Path::new(root)) {
            all.push(Hierarchy { root: root.into(), unified: kind == "cgroup2" });
        }
    }
    all
}

/// Name of the directory of a host's guests: what libvirt makes of `<partition>/NAME</partition>`.
pub(crate) fn partition(group: &str) -> String {
    format!("{group}.partition")
}

/// Makes a group in every hierarchy.
pub(crate) fn create(name: &str) -> Result<()> {
    for hierarchy in hierarchies() {
        let dir = hierarchy.root.join(name);
        if hierarchy.unified {
            // On a machine without v1 controllers the quota is set here; where they are v1 there is nothing to enable.
            let controllers = fs::read_to_string(hierarchy.root.join("cgroup.controllers")).unwrap_or_default();
            for controller in ["cpu", "memory"].iter().filter(|c| controllers.split_whitespace().any(|k| k == **c)) {
                let file = hierarchy.root.join("cgroup.subtree_control");
                fs::write(&file, format!("+{controller}")).doing(|| format!("enabling {controller} in {}", file.display()))?;
            }
        }
        match fs::create_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            result => result.doing(|| format!("making control group {}", dir.display()))?,
        }
        // A cpuset group without CPUs and memory nodes takes no tasks.
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let (own, above) = (dir.join(file), hierarchy.root.join(file));
            if !hierarchy.unified && own.exists() {
                let value = fs::read_to_string(&above).doing(|| format!("reading {}", above.display()))?;
                fs::write(&own, value.trim()).doing(|| format!("writing {}", own.display()))?;
            }
        }
    }
    Ok(())
}

/// Puts a daemon into the lab's group of daemons, where that weighs.
pub(crate) fn adopt(name: &str, process: ProcessId) -> Result<()> {
    places(name).iter().try_for_each(|dir| adopt_in(dir, process.pid))
}

fn adopt_in(dir: &Path, pid: u32) -> Result<()> {
    for (file, weight) in DAEMON_WEIGHTS.map(|(file, weight)| (dir.join(file), weight)) {
        if file.exists() {
            fs::write(&file, weight).doing(|| format!("writing {}", file.display()))?;
            fs::write(dir.join("cgroup.procs"), pid.to_string())
                .doing(|| format!("putting process {pid} into {}", dir.display()))?;
        }
    }
    Ok(())
}

/// Where a group lies: its directory in each hierarchy, whether it is there or not.
pub fn places(name: &str) -> Vec<PathBuf> {
    hierarchies().into_iter().map(|hierarchy| hierarchy.root.join(name)).collect()
}

/// Names of all groups at the top of any hierarchy that start with `prefix`.
pub(crate) fn starting_with(prefix: &str) -> Vec<String> {
    let entries = hierarchies().into_iter().filter_map(|hierarchy| fs::read_dir(hierarchy.root).ok()).flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.retain(|name| name.starts_with(prefix));
    names.sort_unstable();
    names.dedup();
    names
}

/// Thaws everything in a group, since what is frozen does not die.
pub(crate) fn thaw(name: &str) {
    for hierarchy in hierarchies() {
        for dir in tree(&hierarchy.root.join(name)) {
            for (file, value) in [("freezer.state", "THAWED"), ("cgroup.freeze", "0")] {
                if dir.join(file).exists() {
                    // Best effort: what stays frozen is named when it does not die.
                    let _ = fs::write(dir.join(file), value);
                }
            }
        }
    }
}

/// Freezes everything in a group, so that nothing in it forks while it is killed.
pub(crate) fn freeze(name: &str) {
    for hierarchy in hierarchies() {
        for (file, value) in [("freezer.state", "FROZEN"), ("cgroup.freeze", "1")] {
            let file = hierarchy.root.join(name).join(file);
            if file.exists() {
                let _ = fs::write(file, value);
            }
        }
    }
}

/// Kills everything in a group: freezes it, kills each process, thaws it so that they die.
///
/// Errors: something lives on after 10 s.
pub fn kill_all(name: &str) -> Result<()> {
    let limit = Duration::from_secs(10);
    wait_for(&format!("the processes of control group {name} to end"), limit, None, || {
        freeze(name);
        let processes = crate::process::within(&[], &[format!("/{name}")]);
        for process in &processes {
            process.kill();
        }
        thaw(name);
        Ok(processes.is_empty())
    })
}

/// Removes a group with all below it; its processes must be dead or dying.
pub(crate) fn remove(name: &str) -> Result<()> {
    for hierarchy in hierarchies() {
        for dir in tree(&hierarchy.root.join(name)) {
            let mut last = None;
            let gone = wait_for(&format!("control group {} to empty", dir.display()), Duration::from_secs(5), None, || {
                match fs::remove_dir(&dir) {
                    Ok(()) => Ok(true),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
                    // A killed process leaves its group only when the kernel has torn it down.
                    Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                        last = Some(error);
                        Ok(false)
                    }
                    Err(error) => Err(error).doing(|| format!("removing control group {}", dir.display())),
                }
            });
            match (gone, last) {
                (Err(LabError::Timeout { .. }), Some(error)) => {
                    return Err(error).doing(|| format!("removing control group {}", dir.display()));
                }
                (result, _) => result?,
            }
        }
    }
    Ok(())
}

/// A directory and all below it, the deepest first.
fn tree(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let below = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    let mut all: Vec<PathBuf> = below.flat_map(|entry| tree(&entry.path())).collect();
    all.push(dir.to_owned());
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_weighs_in_either_version() {
        for (file, weight) in [("cpu.shares", "8192"), ("cpu.weight", "800")] {
            let dir = tempfile::tempdir().unwrap();
            for name in [file, "cgroup.procs"] {
                fs::write(dir.path().join(name), "").unwrap();
            }

            adopt_in(dir.path(), 77).unwrap();

            assert_eq!(fs::read_to_string(dir.path().join(file)).unwrap(), weight);
            assert_eq!(fs::read_to_string(dir.path().join("cgroup.procs")).unwrap(), "77");
        }
    }

    #[test]
    fn every_hierarchy_is_found_once() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /c/cpu cgroup rw,cpu 0 0\ncgroup2 /c/u cgroup2 rw 0 0\n\
                      cgroup /c/cpu cgroup rw,cpu 0 0\n";

        let found = parse(mounts);

        assert_eq!(found.len(), 2);
        assert!(found[1].unified && !found[0].unified);
    }
}
