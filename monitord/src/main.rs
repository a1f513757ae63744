//! `monitord`: the monitor of one host.

use anyhow::Context;
use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;
use violin_channel::log;
use violin_common::config::monitor::MonitorConfig;

/// Samples this host's guests, drives its hypervisor, speaks to its switch.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Configuration file; configs/monitord.example.toml shows every key.
    #[arg(long, default_value = "/etc/violin/monitord.toml")]
    config: PathBuf,
    /// Checks whether a start would work: configuration, certificate, its key and authority, folders, control groups. Starts nothing.
    #[arg(long)]
    check: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let log = match log::start("RUST_LOG", "info") {
        Ok(log) => log,
        Err(error) => {
            eprintln!("monitord: cannot begin its log: {error}");
            return ExitCode::FAILURE;
        }
    };
    match start(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log.say(format_args!("monitord: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn start(arguments: &Arguments) -> anyhow::Result<()> {
    let path = arguments.config.display();
    let text = std::fs::read_to_string(&arguments.config).with_context(|| format!("reading {path}"))?;
    let config = MonitorConfig::parse(&text).with_context(|| format!("in {path}"))?;
    if arguments.check {
        monitord::io::run::check(&config)?;
        println!("{path} is fine");
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let result = runtime.block_on(monitord::io::run::run(config));
    // Threads at work on commands must not hold up the end.
    runtime.shutdown_background();
    result
}
