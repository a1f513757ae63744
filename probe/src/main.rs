//! Command line of the probe.

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use violin_probe::frame::parse_mac;
use violin_probe::hpl::{Problem, read_result};
use violin_probe::io::clock::parse_span;
use violin_probe::io::node::{self, Answer, Node, Question, SOCKET};
use violin_probe::io::{burn, guest, hpl, link, send, signal, transfer};

/// Runs inside violin's guests and asks them questions from outside. Results are JSON on standard output.
#[derive(Debug, Parser)]
#[command(name = "violin-probe", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Become a guest: set it up, start its ssh server and its answering service (docs/guest.md). Does not end
    Guest {
        /// KEY=VALUE lines
        #[arg(long)]
        config: PathBuf,
    },
    /// Only the answering service of a guest: canaries, their count, records and echoes of numbered frames. Does not end
    Answer {
        #[arg(long, default_value = link::INTERFACE)]
        interface: String,
        /// Tag of the environment's canaries
        #[arg(long)]
        tag: u32,
        #[arg(long, default_value = SOCKET)]
        socket: PathBuf,
    },
    /// Canaries sent and received here: own and foreign
    Counts {
        #[arg(long, default_value = SOCKET)]
        socket: PathBuf,
    },
    /// Send one broadcast canary with a wrong tag; every guest of the network must count it as foreign
    PlantForeign {
        #[arg(long)]
        tag: u32,
        #[arg(long, default_value = link::INTERFACE)]
        interface: String,
    },
    /// What was received here of a run of numbered frames
    Received {
        #[arg(long)]
        run: u64,
        /// Has no effect, the answer is JSON always
        #[arg(long)]
        json: bool,
        #[arg(long, default_value = SOCKET)]
        socket: PathBuf,
    },
    /// Send numbered frames and note their echoes: one JSON line a frame, a summary at last
    SendNumbered {
        #[arg(long)]
        interface: String,
        /// MAC of the guest
        #[arg(long, value_parser = parse_mac)]
        mac: [u8; 6],
        /// Time between frames, kept as an absolute schedule
        #[arg(long, default_value = "2ms", value_parser = parse_span)]
        interval: Duration,
        /// Number of the run, by which the guest keeps its record
        #[arg(long)]
        run: u64,
        /// Send for so long; else until standard input closes or a signal comes
        #[arg(long, value_parser = parse_span)]
        duration: Option<Duration>,
        #[arg(long)]
        until_stdin_closes: bool,
        /// Leave out this number: the guest must count one frame lost
        #[arg(long, value_name = "NUMBER")]
        withhold: Option<u64>,
        /// File for the lines instead of standard output
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// Send a rate-limited TCP stream of checksummed blocks
    TransferSend {
        #[arg(long, value_name = "ADDRESS:PORT")]
        to: SocketAddr,
        /// Bytes of data per second
        #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..))]
        rate: u64,
        /// Send for so long; else until standard input closes or a signal comes
        #[arg(long, value_parser = parse_span)]
        duration: Option<Duration>,
        #[arg(long)]
        until_stdin_closes: bool,
        /// Change the data's byte at this place after it was hashed: the receiver must notice
        #[arg(long, value_name = "BYTE")]
        corrupt_at: Option<u64>,
        /// How long the receiver may take to listen
        #[arg(long, default_value = "60s", value_parser = parse_span)]
        wait: Duration,
    },
    /// Receive one such stream, check every block, and say what came: exit status 0 whatever came
    TransferServe {
        #[arg(long)]
        port: u16,
        /// How long the sender may take to connect
        #[arg(long, default_value = "60s", value_parser = parse_span)]
        wait: Duration,
    },
    /// Compute (products of matrices), with next to no memory
    Burn {
        #[arg(long)]
        seconds: Option<u64>,
        /// Until this file exists
        #[arg(long)]
        until_file: Option<PathBuf>,
        #[arg(long)]
        until_stdin_closes: bool,
    },
    /// Write hpcc's input (hpccinf.txt) for one HPL problem to standard output
    HplInput {
        #[command(flatten)]
        problem: ProblemArguments,
    },
    /// Run HPL, and nothing else, out of hpcc; to be started by mpirun on every rank. Rank 0 says the result
    Hpl {
        #[command(flatten)]
        problem: ProblemArguments,
        /// Working directory on every node; rank 0 keeps hpccinf.txt and hpccoutf.txt there
        #[arg(long, default_value = "/root/hpl")]
        directory: PathBuf,
    },
    /// Read HPL's result from hpccoutf.txt
    HplResult { file: PathBuf },
}

#[derive(Debug, clap::Args)]
struct ProblemArguments {
    /// Order of the matrix
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..1_000_000))]
    n: u32,
    /// Rows of the process grid
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..10_000))]
    p: u32,
    /// Columns of the process grid
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..10_000))]
    q: u32,
    /// Block size
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..10_000))]
    nb: u32,
}

impl ProblemArguments {
    const fn problem(&self) -> Problem {
        Problem { n: self.n, p: self.p, q: self.q, nb: self.nb }
    }
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("violin-probe: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Guest { config } => match guest::run(&config)? {},
        Command::Answer { interface, tag, socket } => {
            Node::start(&interface, u64::from(tag), &socket, || {})?;
            signal::install()?;
            while !signal::stopped() {
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        Command::Counts { socket } => say_answer(&socket, &Question::Counts)?,
        Command::PlantForeign { tag, interface } => {
            node::plant(&interface, u64::from(tag))?;
            say(&serde_json::json!({ "planted": tag }))?;
        }
        Command::Received { run, json: _, socket } => say_answer(&socket, &Question::Received { run })?,
        Command::SendNumbered { interface, mac, interval, run, duration, until_stdin_closes, withhold, out } => {
            listen_for_stop(until_stdin_closes)?;
            let plan = send::Plan { interface, mac, interval, run, duration, withhold };
            let mut output: Box<dyn Write> = match out {
                Some(path) => Box::new(File::create(&path).with_context(|| format!("cannot write {}", path.display()))?),
                None => Box::new(std::io::stdout()),
            };
            send::run(&plan, &mut BufWriter::new(&mut output))?;
        }
        Command::TransferSend { to, rate, duration, until_stdin_closes, corrupt_at, wait } => {
            listen_for_stop(until_stdin_closes)?;
            let result = transfer::send(&transfer::Sending { to, rate, duration, corrupt_at, wait });
            say(&result)?;
            return Ok(if result.intact { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Command::TransferServe { port, wait } => {
            signal::install()?;
            let listener = transfer::listen(port).with_context(|| format!("cannot listen on port {port}"))?;
            say(&transfer::serve(&listener, wait))?;
        }
        Command::Burn { seconds, until_file, until_stdin_closes } => {
            listen_for_stop(until_stdin_closes)?;
            say(&burn::burn(&burn::Until { span: seconds.map(Duration::from_secs), file: until_file }))?;
        }
        Command::HplInput { problem } => print!("{}", problem.problem().input()),
        Command::Hpl { problem, directory } => say(&hpl::run(&problem.problem(), &directory)?)?,
        Command::HplResult { file } => {
            let text = std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
            say(&read_result(&text).map_err(anyhow::Error::msg)?)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn listen_for_stop(at_end_of_input: bool) -> Result<()> {
    signal::install().context("cannot listen for signals")?;
    if at_end_of_input {
        signal::stop_at_end_of_input();
    }
    Ok(())
}

fn say_answer(socket: &Path, question: &Question) -> Result<()> {
    match node::ask(socket, question)? {
        Answer::Counts(counts) => say(&counts),
        Answer::Received(report) => say(&report),
        Answer::Error(said) => anyhow::bail!(said),
    }
}

fn say(value: &impl serde::Serialize) -> Result<()> {
    println!("{}", serde_json::to_string(value)?);
    Ok(())
}
