//! Removing a lab, whole or half-built, by what was recorded and by its names.

use crate::config::LabName;
use crate::error::{Doing, LabError, Result};
use crate::process::{self, ProcessId, wait_for};
use crate::state::{self, LABS, LabState};
use crate::{cgroup, netns};
use nix::mount::{MntFlags, umount2};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Removes a lab with everything in it: guests, daemons, namespaces, control groups, mounts, files.
///
/// Works on a lab half-built or half-removed. A lab that is not there is no error.
pub fn down(name: &str, progress: &mut dyn FnMut(&str)) -> Result<()> {
    let name: LabName = name.parse().map_err(LabError::Name)?;
    let _lock = state::lock(&name)?;
    remove_all(&name, progress)
}

/// The same; the caller holds the lab's lock, which is void afterwards.
pub(crate) fn remove_all(name: &LabName, progress: &mut dyn FnMut(&str)) -> Result<()> {
    let state = LabState::load(name.as_str()).ok();
    let ours = Ours::of(name);
    let recorded: Vec<ProcessId> =
        state.iter().flat_map(LabState::processes).map(|(_, process)| process).filter(|process| process.alive()).collect();
    if !ours.namespaces.is_empty() || !recorded.is_empty() {
        progress(&format!("removing lab {name}: {} namespaces, {} daemons", ours.namespaces.len(), recorded.len()));
    }
    let mut left = Vec::new();
    if let Err(error) = ours.kill(recorded) {
        left.push(error.to_string());
    }
    // Daemons have made nothing new since they are dead: access namespaces and groups found now are all.
    let ours = Ours::of(name);
    for netns in &ours.namespaces {
        left.extend(netns::remove(netns).err().map(|error| error.to_string()));
    }
    for group in &ours.groups {
        left.extend(cgroup::remove(group).err().map(|error| error.to_string()));
    }
    let dir = state::dir(name.as_str());
    for mount in mounts_below(&dir) {
        left.extend(umount2(&mount, MntFlags::MNT_DETACH).err().map(|error| format!("unmounting {}: {error}", mount.display())));
    }
    if !left.is_empty() {
        return Err(LabError::Left { name: name.to_string(), left: left.join("; ") });
    }
    match fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).doing(|| format!("removing {}", dir.display()));
        }
        _ => {}
    }
    // The folder of all labs goes with the last; that another is there is no error.
    let _ = fs::remove_dir(LABS);
    Ok(())
}

/// What bears the lab's name.
#[derive(Debug)]
struct Ours {
    namespaces: Vec<String>,
    groups: Vec<String>,
}

impl Ours {
    fn of(name: &LabName) -> Self {
        // A lab `a` must not take what belongs to a lab `a-b`.
        let own = format!("{name}-");
        let others: Vec<String> = state::names().into_iter().filter(|other| other.starts_with(&own)).collect();
        let is_ours = |found: &str, kind: &str| {
            let of = |lab: &str| {
                found.strip_prefix(kind).and_then(|rest| rest.strip_prefix(lab)).is_some_and(|rest| rest.starts_with(['-', '.']))
            };
            of(name.as_str()) && !others.iter().any(|other| of(other))
        };
        let accesses = access_suffixes(name);
        let mut namespaces = netns::all();
        namespaces.retain(|netns| {
            is_ours(netns, "vl-") || netns.starts_with("va-") && accesses.iter().any(|suffix| netns.ends_with(suffix))
        });
        let sandboxes = sandbox_group(name);
        let mut groups = cgroup::starting_with("violin-");
        groups.retain(|group| is_ours(group, "violin-") || sandboxes.as_ref() == Some(group));
        Self { namespaces, groups }
    }

    fn kill(&self, recorded: Vec<ProcessId>) -> Result<()> {
        // First those that were recorded: the monitors among them would start others.
        for process in recorded {
            process.kill();
        }
        for group in &self.groups {
            cgroup::kill_all(group)?;
        }
        let namespaces: Vec<PathBuf> = self.namespaces.iter().map(|netns| netns::path(netns)).collect();
        let groups: Vec<String> = self.groups.iter().map(|group| format!("/{group}")).collect();
        // Again until none is found: a process may have forked while the list was read.
        wait_for("the lab's processes to end", Duration::from_secs(20), None, || {
            let found = process::within(&namespaces, &groups);
            for process in &found {
                process.kill();
            }
            Ok(found.is_empty())
        })
    }
}

/// Ends of the names of a lab's access namespaces, one a host.
///
/// A monitor calls them `va-ENVIRONMENT-HOST-MARK`, with a mark that tells it from other monitors on the machine: the low 24
/// bits of a hash of its `run` folder (`monitord/src/io/access.rs`). They bear no lab's name, since a monitor knows of none.
fn access_suffixes(name: &LabName) -> Vec<String> {
    let Ok(entries) = fs::read_dir(state::dir(name.as_str())) else { return Vec::new() };
    let hosts = entries.flatten().filter(|entry| entry.path().join("run").is_dir());
    let suffix = |host: fs::DirEntry| {
        let mark = fnv1a(host.path().join("run").as_os_str().as_encoded_bytes()) & 0xff_ffff;
        Some(format!("-{}-{mark:06x}", host.file_name().to_str()?))
    };
    hosts.filter_map(suffix).collect()
}

/// Control group above those of a lab's sandbox guests, which move from host to host.
///
/// The monitors name it after the folder they share, by the same hash (`monitord/src/io/sandbox/store.rs`).
fn sandbox_group(name: &LabName) -> Option<String> {
    let folder = state::dir(name.as_str()).join("sandbox").canonicalize().ok()?;
    Some(format!("violin-{:08x}", fnv1a(folder.as_os_str().as_encoded_bytes())))
}

/// Source: FNV-1a, 32 bits (Fowler, Noll and Vo).
fn fnv1a(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

/// Mount points at and below a folder, the innermost first.
fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let points = text.lines().filter_map(|line| line.split(' ').nth(1)).map(PathBuf::from);
    let mut points: Vec<PathBuf> = points.filter(|point| point.starts_with(dir)).collect();
    points.reverse();
    points
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mark_of_access_namespaces_is_the_monitors() {
        // Seen: `va-alpha-h1-0f86db`, made by the monitor of h1 in a lab called labx.
        assert_eq!(fnv1a(b"/run/violin-lab/labx/h1/run") & 0xff_ffff, 0x0f_86db);
    }
}
