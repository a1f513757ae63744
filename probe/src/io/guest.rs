//! The guest's first process: sets it up, starts what answers in it, then looks after its processes for ever.

use super::node::{Node, SOCKET};
use super::{link, sandbox, ssh};
use crate::config::GuestConfig;
use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use std::convert::Infallible;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

/// The line by which a guest says that it is up.
pub const READY: &str = "violin-guest: ready";
/// How long a step may take: a guest may boot on a small share of a core.
const LIMIT: Duration = Duration::from_secs(120);

/// A line on the console. One that cannot be written, its host's disk being full, is no reason for a guest to end.
fn say(words: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "violin-guest: {words}");
}

/// Becomes the guest that the file describes.
///
/// Errors: the guest cannot be set up; it is of no use then.
pub fn run(path: &Path) -> Result<Infallible> {
    let Err(error) = try_run(path);
    if std::process::id() == 1 && std::env::var_os("VIOLIN_SANDBOX").is_none() {
        // The end of a VM's first process is a kernel panic, which would bury the reason.
        say(format_args!("{error:#}"));
        let _ = reboot(RebootMode::RB_POWER_OFF);
    }
    Err(error)
}

fn try_run(path: &Path) -> Result<Infallible> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let config = GuestConfig::parse(&text)?;
    if std::env::var_os("VIOLIN_SANDBOX").is_some() {
        sandbox::enter(&config.hosts_file())?;
    } else {
        std::fs::write("/etc/hosts", config.hosts_file()).context("cannot write /etc/hosts")?;
    }
    nix::unistd::sethostname(&config.name).context("cannot set the host name")?;
    link::wait(LIMIT)?;
    link::set_up(&config)?;
    ssh::write_files(&config)?;
    ssh::make_host_key()?;
    let server = ssh::start()?;
    let again = config.clone();
    Node::start(link::INTERFACE, config.canary, Path::new(SOCKET), move || {
        if let Err(error) = link::set_up(&again) {
            say(format_args!("the interface came back and could not be set up: {error:#}"));
        }
    })?;
    std::thread::spawn(|| match ssh::wait(LIMIT) {
        Ok(()) => {
            // Without it nobody takes this guest for ready: said again until it is taken.
            while writeln!(std::io::stdout(), "{READY}").and_then(|()| std::io::stdout().flush()).is_err() {
                std::thread::sleep(Duration::from_secs(1));
            }
        }
        Err(error) => say(format_args!("{error:#}")),
    });
    look_after(server)
}

/// Reaps whatever ends, and starts the ssh server again if it was that.
fn look_after(mut server: u32) -> Result<Infallible> {
    loop {
        match waitpid(None::<Pid>, None) {
            Ok(status) if status.pid().is_some_and(|pid| u32::try_from(pid.as_raw()) == Ok(server)) => {
                say(format_args!("the ssh server ended ({status:?}), starting it again"));
                std::thread::sleep(Duration::from_secs(1));
                match ssh::start() {
                    Ok(started) => server = started,
                    Err(error) => say(format_args!("{error:#}")),
                }
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(Errno::ECHILD) => {
                std::thread::sleep(Duration::from_secs(1));
                if let Ok(started) = ssh::start() {
                    server = started;
                }
            }
            Err(error) => return Err(error).context("cannot wait for processes"),
        }
    }
}
