//! Keeper of a daemon: collects the processes it leaves behind.
//!
//! QEMU detaches from the libvirtd that starts it, and libvirtd takes it for alive until somebody has collected it after its
//! end. That is the work of process 1; where that one is slow at it, as in many containers, each stop and each move of a VM
//! waits for it: 2 s were seen. The keeper is their foster parent (`PR_SET_CHILD_SUBREAPER`, prctl(2)) and collects at once.

use crate::error::{Doing, Result};
use nix::errno::Errno;
use nix::sys::wait::wait;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the keeper is told: `keep.json` in a host's folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KeepPlan {
    /// The daemon's program and arguments, UTF-8.
    pub(crate) command: Vec<String>,
    /// Where its process number is written once it runs.
    pub(crate) pid: PathBuf,
}

/// Starts the daemon and collects what ends, until nothing of it is left.
pub fn run(plan: &Path) -> Result<()> {
    let text = fs::read_to_string(plan).doing(|| format!("reading {}", plan.display()))?;
    let plan: KeepPlan =
        serde_json::from_str(&text).map_err(std::io::Error::from).doing(|| format!("understanding {}", plan.display()))?;
    nix::sys::prctl::set_child_subreaper(true).map_err(std::io::Error::from).doing(|| "becoming a foster parent".to_owned())?;
    let (program, words) = plan
        .command
        .split_first()
        .ok_or_else(|| std::io::Error::from(std::io::ErrorKind::InvalidInput))
        .doing(|| "no command".to_owned())?;
    let child = Command::new(program).args(words).spawn().doing(|| format!("starting {program}"))?;
    // Whole or not at all: the lab reads it as soon as it is there.
    let unfinished = plan.pid.with_extension("new");
    fs::write(&unfinished, child.id().to_string()).doing(|| format!("writing {}", unfinished.display()))?;
    fs::rename(&unfinished, &plan.pid).doing(|| format!("writing {}", plan.pid.display()))?;
    loop {
        match wait() {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return Ok(()), // no children left
        }
    }
}
