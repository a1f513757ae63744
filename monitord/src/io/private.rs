//! Files and folders for root alone: what a guest is told at its start holds its environment's private key.

use std::fs::{self, DirBuilder, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// Writes a file that only its owner can read (0600), in place of what it held. Errors: it cannot be made or written.
pub(crate) fn write(path: &Path, bytes: impl AsRef<[u8]>) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    // One that was there, from a version that left it open to others, keeps its mode.
    file.set_permissions(Permissions::from_mode(0o600))?;
    file.write_all(bytes.as_ref())
}

/// Makes a folder that only its owner can enter (0700), or closes the one that is there; folders above it are made as usual.
///
/// Errors: it cannot be made, or belongs to another user.
pub(crate) fn folder(path: &Path) -> io::Result<()> {
    if let Some(above) = path.parent() {
        fs::create_dir_all(above)?;
    }
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => close(path),
        other => other,
    }
}

/// Closes a folder to all but its owner; none there is no error.
pub(crate) fn close(path: &Path) -> io::Result<()> {
    match fs::set_permissions(path, Permissions::from_mode(0o700)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn what_was_open_to_others_before_is_closed_too() {
        let dir = tempfile::tempdir().unwrap();
        let (inner, file) = (dir.path().join("run/vms"), dir.path().join("run/vms/alpha-c1.json"));
        fs::create_dir_all(&inner).unwrap();
        fs::set_permissions(&inner, Permissions::from_mode(0o755)).unwrap();
        fs::write(&file, "something longer").unwrap();
        fs::set_permissions(&file, Permissions::from_mode(0o644)).unwrap();

        folder(&inner).unwrap();
        write(&file, "key").unwrap();

        assert_eq!((mode(&inner), mode(&file)), (0o700, 0o600));
        assert_eq!(fs::read_to_string(&file).unwrap(), "key");
    }

    #[test]
    fn only_the_folder_itself_is_closed() {
        let dir = tempfile::tempdir().unwrap();

        folder(&dir.path().join("run/vms")).unwrap();

        assert_eq!(mode(&dir.path().join("run/vms")), 0o700);
        assert_ne!(mode(&dir.path().join("run")), 0o700, "QEMU may be another user, and its console is in here");
    }
}
