//! `ssh`, `run`: into an environment, through its access namespace. `copy.rs` goes the same way.

use crate::target::Target;
use anyhow::{Context, Result, bail};
use std::fmt::Write as _;
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
        command.arg(format!("root@{address}"));
        command
    }
}

/// One word of a command for a node's shell.
pub(super) fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// Opens a shell on a node, or runs a command there.
pub(crate) fn ssh(target: &Target, environment: &EnvironmentId, node: Option<&str>, words: &[String]) -> Result<()> {
    let way = Way::open(target, environment)?;
    let mut command = way.ssh(way.vm(node)?.address);
    command.args(words);
    Err(command.exec()).context("cannot run nsenter (Debian package util-linux) and ssh (openssh-client)")
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
    let network = &way.environment.spec.network;
    let mask = format!("{}/{}", network.address, network.prefix_len);
    let quoted: Vec<_> = words.iter().map(|word| quoted(word)).collect();
    let script = format!(
        "file=$(mktemp) && printf '%s' '{hosts}' > $file && cd '{directory}' && \
         mpirun --allow-run-as-root --hostfile $file -np {} --wdir '{directory}' \
         --mca btl tcp,self --mca btl_tcp_if_include {mask} --mca oob_tcp_if_include {mask} {}; \
         status=$?; rm -f $file; exit $status",
        ranks.unwrap_or(slots),
        quoted.join(" "),
    );
    let mut command = way.ssh(way.vm(None)?.address);
    command.arg(script);
    Err(command.exec()).context("cannot run nsenter (Debian package util-linux) and ssh (openssh-client)")
}
