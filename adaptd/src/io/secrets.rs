//! Private keys of the environments that the journal knows, each in a file of its own in a folder beside it. The journal never
//! holds them: what was once written to a database stays in its free pages, while a file can be overwritten and removed.
//!
//! A key's file is written before the environment is recorded, under a name that counts only from then on; it goes once the journal
//! says that the environment is gone. What a kill leaves in between is settled when the journal is read again.

use crate::records::Keys;
use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use violin_common::EnvironmentId;

/// How the name of a file ends whose environment is not recorded yet; no environment's name has a dot.
const NEW: &str = "new";

/// The folder of one journal.
#[derive(Debug, Clone)]
pub struct Secrets {
    folder: PathBuf,
}

impl Secrets {
    /// That of the journal at this path; there need not be one.
    pub fn beside(journal: &Path) -> Self {
        Self { folder: journal.with_added_extension("keys") }
    }

    /// Where an environment's private key is.
    pub fn path(&self, environment: &EnvironmentId) -> PathBuf {
        self.folder.join(environment.as_str())
    }

    fn new_path(&self, environment: &EnvironmentId) -> PathBuf {
        self.path(environment).with_extension(NEW)
    }

    /// Writes a key pair of an environment that is about to be recorded; it is on disk when this returns.
    pub fn prepare(&self, environment: &EnvironmentId, keys: &Keys) -> io::Result<()> {
        match DirBuilder::new().mode(0o700).create(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                fs::set_permissions(&self.folder, Permissions::from_mode(0o700))?;
            }
            made => {
                made?;
                sync_folder(&above(&self.folder))?;
            }
        }
        let path = self.new_path(environment);
        destroy(&path)?;
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(format!("{}\n{}", keys.public.trim_end(), keys.private).as_bytes())?;
        file.sync_all()?;
        sync_folder(&self.folder)
    }

    /// The environment is recorded: the key prepared for it is its key.
    pub fn settle(&self, environment: &EnvironmentId) -> io::Result<()> {
        destroy(&self.path(environment))?;
        fs::rename(self.new_path(environment), self.path(environment))?;
        sync_folder(&self.folder)
    }

    /// Puts the private half to a key pair, if it is here: each environment of a name has another one.
    pub fn fill(&self, environment: &EnvironmentId, keys: &mut Keys) {
        for path in [self.path(environment), self.new_path(environment)] {
            let Ok(text) = fs::read_to_string(path) else { continue };
            if let Some((public, private)) = text.split_once('\n')
                && public == keys.public.trim_end()
            {
                private.clone_into(&mut keys.private);
                return;
            }
        }
    }

    /// Removes the key of an environment that is gone; none there is no error.
    pub fn forget(&self, environment: &EnvironmentId) -> io::Result<()> {
        destroy(&self.path(environment))?;
        if self.folder.exists() { sync_folder(&self.folder) } else { Ok(()) }
    }

    /// Finishes what a kill has left, by what the journal says: keys of environments that are gone go, prepared ones of those that are
    /// there count. Files of names it does not know are left alone: they may be another journal's that stood here before.
    pub fn settle_all<'a>(
        &self,
        there: impl Fn(&EnvironmentId) -> Option<&'a Keys>,
        gone: &BTreeSet<EnvironmentId>,
    ) -> io::Result<()> {
        let entries = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let path = entry?.path();
            let Some(name) = path.file_stem().and_then(|name| name.to_str()?.parse::<EnvironmentId>().ok()) else { continue };
            let keys = there(&name);
            if path.extension().is_some_and(|end| end == NEW) {
                let text = fs::read_to_string(&path)?;
                match keys.filter(|keys| text.lines().next() == Some(keys.public.trim_end())) {
                    Some(_) => self.settle(&name)?,
                    None => destroy(&path)?,
                }
            } else if keys.is_none() && gone.contains(&name) {
                destroy(&path)?;
            }
        }
        sync_folder(&self.folder)
    }
}

/// The folder that a path is in.
pub(super) fn above(path: &Path) -> PathBuf {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or_else(|| Path::new(".")).to_owned()
}

/// Has the names in a folder on disk.
pub(super) fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Overwrites a file and removes it; none there is no error.
pub fn destroy(path: &Path) -> io::Result<()> {
    match OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(path) {
        Ok(file) => {
            fs::remove_file(path)?;
            overwrite(&file)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(_) => fs::remove_file(path),
    }
}

/// Overwrites a removed file with zeros, for whoever reads the disk below the file system; not one that has another name still.
pub(super) fn overwrite(mut file: &File) -> io::Result<()> {
    let metadata = file.metadata()?;
    if metadata.nlink() == 0 {
        io::copy(&mut io::Read::take(io::repeat(0), metadata.len()), &mut file)?;
        file.sync_all()?;
    }
    Ok(())
}
