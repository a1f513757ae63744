//! Starts a guest's first process: namespaces, control groups, and no parent that could take it along.
#![allow(unsafe_code)]

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{ForkResult, fork, setsid, write};
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What the first process of a guest gets.
#[derive(Debug)]
pub(crate) struct Launch<'a> {
    /// Program, run as `PROGRAM guest --config CONFIG`.
    pub program: &'a Path,
    /// The guest's configuration.
    pub config: &'a Path,
    /// Where its output goes.
    pub console: &'a Path,
    /// Its network namespace.
    pub netns: &'a OwnedFd,
    /// Files `0` is written to in order to join its control groups.
    pub groups: &'a [PathBuf],
}

/// Starts it and returns its number on the host. It has a session and mount, UTS and PID namespaces of its own, and is
/// adopted by the machine's init, so it outlives the monitor.
///
/// Errors: a namespace or group could not be entered, or the program not be run; then no process is left.
pub(crate) fn spawn(launch: &Launch<'_>) -> io::Result<i32> {
    let console = OpenOptions::new().create(true).append(true).open(launch.console)?;
    let groups = launch.groups.iter().map(|path| OpenOptions::new().write(true).open(path)).collect::<io::Result<Vec<File>>>()?;
    let netns = launch.netns.try_clone()?;
    let (told, tell) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    let mut command = Command::new(launch.program);
    command
        .args(["guest", "--config"])
        .arg(launch.config)
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("VIOLIN_SANDBOX", "1")
        .env("HOME", "/root")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(console.try_clone()?)
        .stderr(console);
    // SAFETY: between fork and exec only system calls are made, on descriptors opened before; nothing allocates or takes a
    // lock. The error path of `Command` (a pipe written before _exit) works from the second child too, as it holds the pipe.
    unsafe {
        command.pre_exec(move || {
            for group in &groups {
                write(group.as_fd(), b"0")?;
            }
            setns(&netns, CloneFlags::CLONE_NEWNET)?;
            unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWPID)?;
            match fork()? {
                ForkResult::Parent { child } => {
                    let _ = write(tell.as_fd(), &child.as_raw().to_ne_bytes());
                    libc::_exit(0);
                }
                ForkResult::Child => {
                    setsid()?;
                    let none = None::<&str>;
                    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
                    mount(Some("proc"), "/proc", Some("proc"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, none)?;
                    Ok(())
                }
            }
        });
    }
    let spawned = command.spawn();
    // The command holds the writing end of the pipe: without it gone, a child that died early would be waited for for ever.
    drop(command);
    let mut child =
        spawned.map_err(|error| io::Error::new(error.kind(), format!("running {}: {error}", launch.program.display())))?;
    child.wait()?;
    let mut pid = [0; 4];
    File::from(told).read_exact(&mut pid)?;
    Ok(i32::from_ne_bytes(pid))
}

/// Waits until a process has ended, or `limit` has passed; says whether it has.
pub(crate) fn wait_end(pid: i32, limit: Option<std::time::Duration>) -> io::Result<bool> {
    // SAFETY: pidfd_open takes two integers and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::ESRCH) { Ok(true) } else { Err(error) };
    }
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the descriptor was just made and is owned by nothing else.
    let fd = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) };
    let mut polled = [nix::poll::PollFd::new(fd.as_fd(), nix::poll::PollFlags::POLLIN)];
    let timeout = limit.map_or(nix::poll::PollTimeout::NONE, |limit| {
        nix::poll::PollTimeout::try_from(limit).unwrap_or(nix::poll::PollTimeout::MAX)
    });
    loop {
        match nix::poll::poll(&mut polled, timeout) {
            Err(nix::errno::Errno::EINTR) => {}
            other => return Ok(other? > 0),
        }
    }
}
