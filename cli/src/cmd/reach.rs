//! `ssh`, `run`: into an environment, through its access namespace. `copy.rs` goes the same way.

use crate::target::Target;
use anyhow::{Context, Result, bail};
use std::fmt::Write as _;
use std::io::IsTerminal as _;
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use violin_common::EnvironmentId;
use violin_common::api::adapt::{AdaptReply, AdaptRequest, EnvironmentSeen, VmListed};
use violin_common::control::monitor::Role;

/// An open way into one environment.
#[derive(Debug)]
pub(crate) struct Way {
    environment: EnvironmentSeen,
    netns: String,
    key: PathBuf,
}

const SSH_OPTIONS: [&str; 10] = [
    "-o",
    "StrictHostKeyChecking=no",
    "-o",
    "UserKnownHostsFile=/dev/null",
    "-o",
    "LogLevel=ERROR",
    "-o",
    "ServerAliveInterval=15",
    "-o",
    "ConnectTimeout=20",
];

pub(super) const MISSING: &str = "cannot run nsenter (Debian package util-linux) and ssh (openssh-client)";

impl Way {
    /// Opens the environment's access namespace (or finds it open), which must be on this machine, as the manager is.
    pub(crate) fn open(target: &Target, name: &EnvironmentId) -> Result<Self> {
        let environment = super::env::find(target, name)?;
        let AdaptReply::Access { host, netns } = target.ask(&AdaptRequest::Access { environment: name.clone() })? else {
            bail!("the manager answered another question")
        };
        if !Path::new(&netns).exists() {
            bail!(
                "got the access namespace of {name} on {host}, where it is {netns}; want it on this machine, which has no such file: \
                 run this on {host}; the manager must run on that machine too, its keys lie beside its socket"
            );
        }
        let socket = target.manager()?;
        let key = socket.parent().context("the manager's socket has no folder")?.join("keys").join(name.as_str());
        Ok(Self { environment, netns, key })
    }

    pub(super) fn vm(&self, node: Option<&str>) -> Result<&VmListed> {
        let prefix = format!("{}-", self.environment.spec.name);
        self.environment
            .vms
            .iter()
            .find(|vm| match node {
                Some(node) => vm.vm.as_str().strip_prefix(&prefix) == Some(node) || vm.vm.as_str() == node,
                None => vm.role == Role::Head,
            })
            .with_context(|| {
                let nodes: Vec<_> = self.environment.vms.iter().filter_map(|vm| vm.vm.as_str().strip_prefix(&prefix)).collect();
                format!("got node {:?}, want one of: {}", node.unwrap_or("(head)"), nodes.join(", "))
            })
    }

    fn within(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.netns)).arg("--").arg(program).arg("-i").arg(&self.key).args(SSH_OPTIONS);
        command
    }

    pub(super) fn ssh(&self, address: Ipv4Addr) -> Command {
        let mut command = self.within("ssh");
        command.arg(destination(address));
        command
    }
}

fn destination(address: Ipv4Addr) -> String {
    format!("root@{address}")
}

/// One word of a command for a node's shell.
pub(super) fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// What the operator wants run, in words of a node's shell. One word alone is a line for it, as with ssh; of several, each
/// reaches the program as it is.
fn line(words: &[String]) -> String {
    match words {
        [line] => line.clone(),
        words => words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" "),
    }
}

/// Runs a line on a node such that its status comes back: of a program that a signal ended, an ssh server tells no number,
/// and ssh ends as if it had not reached the node. 128 and the signal's is what a shell says.
fn minded(line: &str) -> String {
    format!("trap : INT QUIT TERM\nsh -c -- {}\nexit $?", quoted(line))
}

/// Runs a line on a node such that it ends with its connection, as a terminal's hang-up would end it.
///
/// Without a terminal a broken connection is no signal to anybody, and a job that neither reads nor writes would go on for
/// ever. So one watches beside it whether its parent, the ssh server's process for this connection, is still there. The job
/// is in a process group of its own, which goes as a whole; what leaves that group (`setsid`) stays, as with ssh.
fn guarded(line: &str) -> String {
    let guarded = format!(
        r#"( ( trap '' TERM
    while sleep 1; do
        read -r stat < "/proc/$$/stat" || exit
        set -- ${{stat##*) }}
        [ "$2" = "$PPID" ] || break
    done
    kill -TERM "-$$"
    sleep 5
    kill -KILL "-$$" ) < /dev/null > /dev/null 2>&1 & )
{}"#,
        minded(line)
    );
    format!(
        r#"read -r stat < "/proc/$$/stat"
set -- ${{stat##*) }}
[ "$3" = "$$" ] || exec setsid sh -c {guarded}
exec sh -c {guarded}"#,
        guarded = quoted(&guarded)
    )
}

/// Gives this process to ssh with that line on a node: with a terminal there when there is one here, both ways.
fn become_ssh(way: &Way, address: Ipv4Addr, line: &str) -> Result<()> {
    let mut command = if std::io::stdin().is_terminal() && std::io::stdout().is_terminal() {
        let mut command = way.within("ssh");
        command.arg("-t").arg(destination(address)).arg(minded(line));
        command
    } else {
        let mut command = way.ssh(address);
        command.arg(guarded(line));
        command
    };
    Err(command.exec()).context(MISSING)
}

/// Opens a shell on a node, or runs a command there.
pub(crate) fn ssh(target: &Target, environment: &EnvironmentId, node: Option<&str>, words: &[String]) -> Result<()> {
    let way = Way::open(target, environment)?;
    let address = way.vm(node)?.address;
    if words.is_empty() {
        // ssh itself asks for a terminal where there is one.
        return Err(way.ssh(address).exec()).context(MISSING);
    }
    become_ssh(&way, address, &line(words))
}

/// Runs an MPI program over an environment's compute nodes, started from its head node.
pub(crate) fn run(
    target: &Target,
    environment: &EnvironmentId,
    ranks: Option<u32>,
    directory: &str,
    words: &[String],
) -> Result<()> {
    let way = Way::open(target, environment)?;
    let mut hosts = String::new();
    let mut slots = 0;
    for vm in way.environment.vms.iter().filter(|vm| vm.role == Role::Compute) {
        let prefix = format!("{environment}-");
        let node = vm.vm.as_str().strip_prefix(&prefix).unwrap_or_else(|| vm.vm.as_str());
        let vcpus = way.environment.spec.nodes()?.iter().find(|spec| spec.vm == vm.vm).map_or(1, |spec| spec.vcpus);
        slots += vcpus;
        writeln!(hosts, "{node} slots={vcpus}")?;
    }
    let ranks = ranks.unwrap_or(slots);
    if ranks == 0 || ranks > slots {
        bail!("got {ranks} ranks, want 1 to {slots}: the compute nodes of {environment} have {slots} vCPUs, one for each rank");
    }
    let network = &way.environment.spec.network;
    let mask = format!("{}/{}", network.address, network.prefix_len);
    let program = words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ");
    let directory = quoted(directory);
    let script = format!(
        "cd -- {directory} && file=$(mktemp) || exit 1
trap 'rm -f \"$file\"' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
printf '%s' '{hosts}' > \"$file\" && mpirun --allow-run-as-root --hostfile \"$file\" -np {ranks} --wdir \"$PWD\" \
         --mca btl tcp,self --mca btl_tcp_if_include {mask} --mca oob_tcp_if_include {mask} {program}"
    );
    become_ssh(&way, way.vm(None)?.address, &script)
}
