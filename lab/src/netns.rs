//! Network namespaces by name, as `ip netns` keeps them under `/run/netns`, and programs started inside.
//!
//! Programs enter by `setns`, never by `ip netns exec`: that mounts a fresh /sys, which hides the control groups.
#![allow(unsafe_code)]

use crate::error::{Doing, LabError, Result};
use crate::process::wait_for;
use nix::sched::{CloneFlags, setns};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use violin_channel::kernel;

/// Folder of the named namespaces.
pub const NAMESPACES: &str = "/run/netns";

/// Path of a named namespace.
pub fn path(netns: &str) -> PathBuf {
    Path::new(NAMESPACES).join(netns)
}

/// Makes a command run inside a named namespace, in a session of its own (so that a Ctrl-C at the terminal, or the
/// terminal's end, does not reach it).
///
/// Errors: no such namespace.
pub fn enter<'a>(command: &'a mut Command, netns: &str) -> Result<&'a mut Command> {
    let file = File::open(path(netns)).doing(|| format!("opening namespace {netns}"))?;
    // SAFETY: between fork and exec only setns and setsid are called, which are async-signal-safe; the descriptor is owned
    // by the closure and open until the command is dropped.
    unsafe {
        command.pre_exec(move || {
            setns(&file, CloneFlags::CLONE_NEWNET)?;
            nix::unistd::setsid()?;
            Ok(())
        });
    }
    Ok(command)
}

/// A command inside a named namespace, with nothing on its standard input.
pub fn spawn_in(netns: &str, program: impl AsRef<OsStr>) -> Result<Command> {
    let mut command = Command::new(program);
    enter(&mut command, netns)?;
    command.stdin(Stdio::null());
    Ok(command)
}

/// Runs `work` on a thread of its own inside a named namespace. Sockets and files opened there stay usable afterwards.
pub fn inside<T: Send>(netns: &str, work: impl FnOnce() -> io::Result<T> + Send) -> Result<T> {
    let file = File::open(path(netns)).doing(|| format!("opening namespace {netns}"))?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            setns(&file, CloneFlags::CLONE_NEWNET)?;
            work()
        });
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
    })
    .doing(|| format!("working in namespace {netns}"))
}

/// Runs a command and returns what it printed. Errors: it cannot be started, or ends with another status than 0.
pub fn run(command: &mut Command) -> Result<String> {
    let words = || {
        let arguments = command.get_args().map(|word| word.to_string_lossy().into_owned());
        [command.get_program().to_string_lossy().into_owned()].into_iter().chain(arguments).collect::<Vec<_>>().join(" ")
    };
    let words = words();
    let output = command.stdin(Stdio::null()).output().doing(|| format!("starting `{words}` (is it installed?)"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(LabError::Command { command: words, status: output.status, said })
    }
}

/// Runs `ip` with the words of `line`, inside a namespace if one is named.
pub(crate) fn ip(netns: Option<&str>, line: &str) -> Result<String> {
    let mut command = Command::new("ip");
    if let Some(netns) = netns {
        command.args(["-n", netns]);
    }
    run(command.args(line.split_ascii_whitespace()))
}

/// Makes a named namespace: loopback up, no IPv6 of the host's own.
pub(crate) fn create(netns: &str) -> Result<()> {
    ip(None, &format!("netns add {netns}"))?;
    // Neighbour discovery and router solicitations of the kernel would mix with what is measured.
    inside(netns, || {
        for what in ["all", "default"] {
            match kernel::set(&format!("net/ipv6/conf/{what}/disable_ipv6"), "1") {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    })?;
    ip(Some(netns), "link set lo up").map(|_| ())
}

/// Removes a named namespace if it is there; interfaces in it go when its last process is gone.
///
/// Tried again for some seconds: an `ip netns add` whose caller was killed may be about to mount it ("Device or resource busy").
pub(crate) fn remove(netns: &str) -> Result<()> {
    let mut last = Ok(());
    let gone = wait_for("a namespace to be removed", Duration::from_secs(5), None, || {
        last = if path(netns).exists() { ip(None, &format!("netns delete {netns}")).map(|_| ()) } else { Ok(()) };
        Ok(last.is_ok())
    });
    gone.or(last)
}

/// All named namespaces.
pub(crate) fn all() -> Vec<String> {
    let Ok(entries) = fs::read_dir(NAMESPACES) else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
}
