//! `violin`: the operator's words.

mod cmd;
mod signals;
mod table;
mod target;

use clap::Parser as _;
use std::process::ExitCode;
use violin_common::{EnvironmentId, VmId, Vni};

const EXIT: &str = "\
Examples:
  violin lab up                                      a lab of three hosts (as root)
  violin env up configs/environments/alpha.toml      a virtual cluster
  violin run alpha -- ./hello                        an MPI program in it
  violin vm migrate alpha-c1 --to h2                 a move by hand
  violin why alpha-c1                                why it is where it is
  violin --json host                                 the same for programs
  violin --switch-socket /run/violin/switchd.sock counters

Exit status:
  0    done
  1    not done, or done in part; the standard error says what was got, what is wanted and what to do
  2    the command line was not understood
  141  nobody reads the standard output any more
`ssh` and `run` end with the status of the command over there, 255 if ssh could not reach it.";

/// Isolated virtual clusters that span network domains and move themselves.
///
/// Talks to the manager (adaptd) over its Unix socket, or to one switch (switchd) with --switch-socket. Tables are for
/// people; --json prints the same for programs.
#[derive(Debug, clap::Parser)]
#[command(version, max_term_width = 110, after_long_help = EXIT)]
struct Cli {
    #[command(flatten)]
    target: target::Target,
    /// Print JSON (`ssh`, `cp` and `run` print what the guest does).
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Hosts, domains, a WAN and guests on this one machine: for trying, testing, measuring.
    #[command(subcommand)]
    Lab(cmd::lab::Lab),
    /// Environments (virtual clusters): start, end, show, move.
    #[command(subcommand)]
    Env(cmd::env::Env),
    /// Open a shell on a node of an environment, or run a command there.
    ///
    /// As root, on the machine that both the manager and the environment's head node run on; `cp` and `run` too. Ends with the
    /// command's status, 255 if ssh could not reach the node.
    ///
    /// A command of several words is a program and its arguments, each of which arrives as it is; one of a single word is a line
    /// for the node's shell. It has a terminal there when standard input and output are one here; without, it is ended
    /// (SIGTERM, after 5 s SIGKILL) when its connection is, as by Ctrl-C.
    #[command(
        after_help = "Examples: violin ssh alpha\n          violin ssh alpha c1 -- touch 'a file'\n          violin ssh alpha c1 -- 'cd /tmp && ls | wc -l'"
    )]
    Ssh {
        /// Environment.
        environment: EnvironmentId,
        /// Node, for example c1 (default: the head node).
        node: Option<String>,
        /// Program and arguments, or one line for the node's shell.
        #[arg(last = true, value_name = "COMMAND")]
        words: Vec<String>,
    },
    /// Copy files into or out of a node, as scp does: either all FROM or TO is ENV:NODE:PATH.
    ///
    /// A new file has the mode of its source, less the umask; one that is there keeps its own and its owner and is replaced when
    /// the whole has come. Links are followed. Set-user-ID bits do not leave a guest. Ends with 1 if anything was not copied; the
    /// rest is.
    #[command(
        after_help = "Examples: violin cp hello alpha:head:/root/\n          violin cp alpha:c1:/root/log log\n          violin cp -r job alpha:head:/opt"
    )]
    Cp {
        #[command(flatten)]
        how: cmd::copy::How,
        /// Files here, or ENV:NODE:PATH; `./a:b` is a file here.
        #[arg(required = true)]
        from: Vec<String>,
        /// File or folder here, or ENV:NODE:PATH; of several files: a folder that is there.
        to: String,
    },
    /// Run an MPI program over an environment's compute nodes, from its head node.
    ///
    /// The program must be on every node: `violin cp` brings it there. Its arguments arrive as they are. Ends with the status of
    /// mpirun; Ctrl-C ends all ranks.
    #[command(after_help = "Example: violin run alpha -n 4 --directory /opt/job -- ./hello 100")]
    Run {
        /// Environment.
        environment: EnvironmentId,
        /// MPI ranks, at most one for each vCPU of the compute nodes (default: so many).
        #[arg(long, short = 'n', value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..))]
        ranks: Option<u32>,
        /// Directory it runs in, on every node.
        #[arg(long, default_value = "/root", value_name = "PATH")]
        directory: String,
        /// Program and arguments.
        #[arg(last = true, required = true, value_name = "COMMAND")]
        words: Vec<String>,
    },
    /// List hosts; drain, undrain or forget one.
    ///
    /// CORES as declared, WANTED the cores its VMs want, SCORE its high-demand VMs a core, SEEN the age of its last observation.
    /// WANTED, SCORE and the free memory are `-` when its monitor is away or its last observation older than `max-age` (10 s).
    #[command(after_help = "Examples: violin host\n          violin host drain h1")]
    Host {
        #[command(subcommand)]
        command: Option<cmd::vm::Host>,
    },
    /// VMs: list, migrate, abort a move.
    #[command(subcommand)]
    Vm(cmd::vm::Vm),
    /// List the forwarding databases of the switches.
    Fdb {
        #[command(flatten)]
        of: cmd::switch::Of,
        /// Only this network, 1 to 16777215.
        #[arg(long, value_parser = parse_vni)]
        vni: Option<Vni>,
    },
    /// List the ports of the switches.
    Port(cmd::switch::Of),
    /// List the peers of the switches.
    Peer(cmd::switch::Of),
    /// List the counters of the switches, drops with their reasons among them.
    Counters {
        #[command(flatten)]
        of: cmd::switch::Of,
        /// Those that are zero, too.
        #[arg(long)]
        all: bool,
    },
    /// Show what the manager decided, with scores and refusals, oldest first.
    Decisions {
        /// The last N; the manager holds 1000.
        #[arg(long, value_name = "N", default_value_t = 20)]
        last: u32,
    },
    /// List moves under way and the last 1000.
    ///
    /// TOTAL is from its first step to its end, PAUSE how long the VM stood still.
    Migrations,
    /// Tell why a VM is where it is.
    Why {
        /// VM, for example alpha-c1.
        vm: VmId,
    },
    /// Show or set what the manager does with its decisions; kept over its restarts.
    ///
    /// In no mode does it leave unfinished what it or an earlier manager began, or refuse moves by hand. At its next start
    /// `--dry-run` and a `mode` that was changed in its configuration since win over what was set here; its log says which.
    Mode {
        /// New mode.
        mode: Option<cmd::decisions::ModeWord>,
    },
    /// Print decisions and moves as they happen, until Ctrl-C or the manager's end.
    Watch,
    /// Certificates for a deployment that has no authority of its own.
    #[command(subcommand)]
    Pki(cmd::pki::Pki),
}

fn parse_vni(text: &str) -> Result<Vni, String> {
    let number: u32 = text.parse().map_err(|_| format!("got {text:?}, want a number from 1 to 16777215"))?;
    Vni::new(number).map_err(|error| error.to_string())
}

fn main() -> ExitCode {
    let Cli { target, json, command } = Cli::parse();
    let output = table::Output { json };
    let result = match command {
        Command::Lab(command) => cmd::lab::run(command, output),
        Command::Env(command) => cmd::env::run(&target, output, command),
        Command::Ssh { environment, node, words } => cmd::reach::ssh(&target, &environment, node.as_deref(), &words),
        Command::Cp { how, from, to } => cmd::copy::copy(&target, &from, &to, how),
        Command::Run { environment, ranks, directory, words } => {
            cmd::reach::run(&target, &environment, ranks, &directory, &words)
        }
        Command::Host { command: None } => cmd::vm::hosts(&target, output),
        Command::Host { command: Some(command) } => cmd::vm::host(&target, output, command),
        Command::Vm(command) => cmd::vm::run(&target, output, command),
        Command::Fdb { of, vni } => cmd::switch::fdb(&target, output, of, vni),
        Command::Port(of) => cmd::switch::ports(&target, output, of),
        Command::Peer(of) => cmd::switch::peers(&target, output, of),
        Command::Counters { of, all } => cmd::switch::counters(&target, output, of, all),
        Command::Decisions { last } => cmd::decisions::decisions(&target, output, last),
        Command::Migrations => cmd::decisions::migrations(&target, output),
        Command::Why { vm } => cmd::decisions::why(&target, output, vm),
        Command::Mode { mode } => cmd::decisions::mode(&target, output, mode),
        Command::Pki(command) => cmd::pki::run(command, output),
        Command::Watch => cmd::decisions::watch(&target, output),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("violin: {error:#}");
            ExitCode::FAILURE
        }
    }
}
