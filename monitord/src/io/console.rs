//! A guest's console: where it says that it is up, and what keeps it from filling the host.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

/// Line by which a guest says that it is up.
const READY: &str = "violin-guest: ready";
/// Longest console, in bytes. Guests have root, and the file lies in memory where `run` does.
pub const LIMIT: u64 = 8 << 20;
/// What is left of a longer one, and read of any: its end, in bytes.
const TAIL: u64 = 256 << 10;

fn tail(file: &mut File) -> io::Result<Vec<u8>> {
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(TAIL)))?;
    let mut bytes = Vec::new();
    file.take(TAIL).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Whether the guest whose console this is has said that it is up. Reads its end only: a guest says it early.
pub fn is_ready(console: &Path) -> bool {
    let bytes = File::open(console).and_then(|mut file| tail(&mut file));
    bytes.is_ok_and(|bytes| String::from_utf8_lossy(&bytes).lines().any(|line| line.trim_end().ends_with(READY)))
}

/// Begins a new life: what an earlier guest of that name said, `ready` above all, is not to be taken for this one's.
///
/// Called before the guest is known to boot, for from then on its console is read.
pub fn begin(console: &Path) -> io::Result<()> {
    match std::fs::remove_file(console) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Cuts a console longer than [`LIMIT`] down to its end; returns the bytes cut off, 0 for one that is short or not there.
///
/// Its writers append (QEMU's `append='on'`, the sandbox's guests), so they go on behind what is left. A line written in
/// between may stand before it.
pub fn bound(console: &Path) -> io::Result<u64> {
    let mut file = match OpenOptions::new().read(true).append(true).open(console) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let len = file.metadata()?.len();
    if len <= LIMIT {
        return Ok(0);
    }
    let end = tail(&mut file)?;
    file.set_len(0)?;
    file.write_all(&end)?;
    Ok(len - end.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_too_long_keeps_its_end_and_its_writer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        let mut guest = OpenOptions::new().create(true).append(true).open(&path).unwrap();
        guest.write_all(&vec![b'x'; usize::try_from(LIMIT).unwrap()]).unwrap();
        assert_eq!(bound(&path).unwrap(), 0);
        writeln!(guest, "\nviolin-guest: ready").unwrap();

        let cut = bound(&path).unwrap();

        assert_eq!(cut, LIMIT + 21 - TAIL);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), TAIL);
        assert!(is_ready(&path));
        writeln!(guest, "more").unwrap();
        assert!(std::fs::read_to_string(&path).unwrap().ends_with("violin-guest: ready\nmore\n"));
    }

    #[test]
    fn a_console_that_is_not_there_is_no_error() {
        assert_eq!(bound(Path::new("/nowhere/console")).unwrap(), 0);
        assert!(!is_ready(Path::new("/nowhere/console")));
    }
}
