//! Which process runs which VM: libvirt tells time run and waited, but not how vCPUs came onto cores. Remembered, since
//! finding one means to look at every process.

use super::lock;
use crate::io::proc::{self, Netns, TaskTime};
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};
use violin_common::VmId;

/// Time between two looks for a process that was not found: it may be on another machine, or hidden.
const AGAIN: Duration = Duration::from_secs(30);

/// The processes found, and those looked for in vain.
#[derive(Debug)]
pub(super) struct Emulators {
    /// The host's.
    netns: Option<Netns>,
    known: Mutex<BTreeMap<VmId, Found>>,
}

#[derive(Debug, Clone, Copy)]
enum Found {
    /// Its number and when it started, in clock ticks since boot.
    Process(i32, u64),
    /// Not found then.
    No(Instant),
}

impl Emulators {
    /// Those of the calling thread's network namespace.
    pub(super) fn here() -> Self {
        Self { netns: Netns::here(), known: Mutex::default() }
    }

    /// CPU account of a VM's vCPUs; none if its process cannot be seen from here.
    pub(super) fn vcpus(&self, vm: &VmId) -> Option<TaskTime> {
        let mut known = lock(&self.known);
        let pid = match known.get(vm) {
            Some(Found::Process(pid, started)) if proc::start_time(*pid) == Some(*started) => *pid,
            Some(Found::No(then)) if then.elapsed() < AGAIN => return None,
            _ => {
                let found = self
                    .netns
                    .and_then(|netns| proc::emulator(vm.as_str(), netns))
                    .and_then(|pid| Some((pid, proc::start_time(pid)?)));
                known.insert(vm.clone(), found.map_or_else(|| Found::No(Instant::now()), |(pid, at)| Found::Process(pid, at)));
                found?.0
            }
        };
        drop(known);
        proc::vcpus(pid)
    }

    /// Forgets a VM that is not here any more.
    pub(super) fn forget(&self, vm: &VmId) {
        lock(&self.known).remove(vm);
    }
}
