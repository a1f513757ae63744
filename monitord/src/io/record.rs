//! What the monitor must know of a VM after it was killed: one small file each, written whole.

use crate::transaction::Standing;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use violin_common::control::monitor::VmSpec;
use violin_common::{Epoch, VmId};

/// How the name of a file ends that is not whole yet.
const NEW: &str = "new";

/// One VM's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// As it was asked for.
    pub spec: VmSpec,
    /// Name of its interface.
    pub interface: String,
    /// Highest epoch known; none before this switch has owned the MAC of a VM that arrived.
    pub epoch: Option<Epoch>,
    /// Whether its guest has said that it is up.
    pub ready: bool,
    /// How it stands to this host.
    pub standing: Standing,
}

/// All files.
#[derive(Debug, Clone)]
pub struct Records {
    dir: PathBuf,
}

impl Records {
    /// Opens the directory, which others may not enter: a VM's configuration holds its environment's private key.
    pub fn open(run: &Path) -> io::Result<Self> {
        let dir = run.join("vms");
        super::private::folder(&dir)?;
        for entry in fs::read_dir(&dir)? {
            // Left by a kill in the middle of a write: nobody would read it, nor remove it when its VM ends.
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == NEW) {
                fs::remove_file(path)?;
            }
        }
        Ok(Self { dir })
    }

    fn path(&self, vm: &VmId) -> PathBuf {
        self.dir.join(format!("{vm}.json"))
    }

    /// Writes one, in place of the old.
    pub fn write(&self, record: &Record) -> io::Result<()> {
        let path = self.path(&record.spec.vm);
        let temporary = path.with_extension(NEW);
        super::private::write(&temporary, serde_json::to_vec_pretty(record).map_err(io::Error::other)?)?;
        fs::rename(temporary, path)
    }

    /// Removes one; none there is no error.
    pub fn remove(&self, vm: &VmId) -> io::Result<()> {
        match fs::remove_file(self.path(vm)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// Reads all. A file that cannot be read is said and left out: it must not keep the others from running.
    pub fn read_all(&self) -> io::Result<Vec<Record>> {
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            match fs::read(&path).and_then(|text| serde_json::from_slice(&text).map_err(io::Error::other)) {
                Ok(record) => records.push(record),
                Err(error) => tracing::warn!(path = %path.display(), %error, "a VM's record is left out"),
            }
        }
        Ok(records)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_kill_left_half_written_goes() {
        let run = tempfile::tempdir().unwrap();
        let records = Records::open(run.path()).unwrap();
        let (whole, half) = (records.dir.join("alpha-c1.json"), records.dir.join("alpha-c2.new"));
        fs::write(&whole, "{}").unwrap();
        fs::write(&half, "VIOLIN_SSH_PRIVATE=").unwrap();

        Records::open(run.path()).unwrap();

        assert!(whole.exists() && !half.exists());
    }
}
