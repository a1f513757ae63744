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
        let mut namespaces = netns::all();
        // Those of hosts, and those through which its monitors reach environments.
        namespaces.retain(|netns| is_ours(netns, "vl-") || is_ours(netns, "va-"));
        let mut groups = cgroup::starting_with("violin-");
        groups.retain(|group| is_ours(group, "violin-"));
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

/// Mount points at and below a folder, the innermost first.
fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let points = text.lines().filter_map(|line| line.split(' ').nth(1)).map(PathBuf::from);
    let mut points: Vec<PathBuf> = points.filter(|point| point.starts_with(dir)).collect();
    points.reverse();
    points
}
