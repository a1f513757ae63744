//! A sandbox guest's view of the file system: the host's, with everything a guest writes to made private.
//!
//! The guest is in a mount namespace of its own; nothing here is seen outside, and all of it goes with the guest.

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::path::Path;

/// Where private files lie.
const PRIVATE: &str = "/run/violin";
/// A folder in every PATH, the ssh server's too, into which our program is put beside what the host has there.
const PROGRAMS: &str = "/usr/local/bin";

/// Makes /root, /tmp, /run and /dev/shm private and empty, /etc/hosts private with this text, and `violin-probe` callable.
///
/// Errors: the namespace is not the guest's own, or a mount is refused.
pub fn enter(hosts: &str) -> Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("cannot make mounts private")?;
    // Held open, as the folders they lie in may be about to be covered.
    let program = handle("/proc/self/exe")?;
    let programs = handle(PROGRAMS)?;
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    for (folder, mode) in [("/root", "0700"), ("/tmp", "1777"), ("/run", "0755"), ("/dev/shm", "1777")] {
        if Path::new(folder).is_dir() {
            let options = format!("mode={mode}");
            mount(Some("tmpfs"), folder, Some("tmpfs"), plain, Some(options.as_str()))
                .with_context(|| format!("cannot make {folder} private"))?;
        }
    }
    let path = |name: &str| format!("{PRIVATE}/{name}");
    let old = path("programs");
    fs::create_dir_all(&old)?;
    fs::create_dir_all("/run/lock")?;
    fs::write(path("hosts"), hosts)?;
    bind(&path("hosts"), "/etc/hosts")?;
    fs::write(path("violin-probe"), "")?;
    bind(&path_of(&program), &path("violin-probe"))?;
    bind(&path_of(&programs), &old)?;
    mount(Some("tmpfs"), PROGRAMS, Some("tmpfs"), plain, Some("mode=0755"))
        .with_context(|| format!("cannot cover {PROGRAMS}"))?;
    for entry in fs::read_dir(&old)?.flatten() {
        symlink(entry.path(), Path::new(PROGRAMS).join(entry.file_name()))?;
    }
    let ours = Path::new(PROGRAMS).join("violin-probe");
    let _ = fs::remove_file(&ours);
    symlink(path("violin-probe"), &ours).context("cannot make violin-probe callable")
}

fn handle(path: &str) -> Result<OwnedFd> {
    use nix::fcntl::{OFlag, open};
    open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, nix::sys::stat::Mode::empty()).with_context(|| format!("cannot open {path}"))
}

fn path_of(handle: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", handle.as_raw_fd())
}

fn bind(from: &str, to: &str) -> Result<()> {
    let none = None::<&str>;
    mount(Some(from), to, none, MsFlags::MS_BIND, none).with_context(|| format!("cannot put {from} over {to}"))
}
