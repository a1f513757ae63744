//! The adaptation manager's program: configuration → log → run → clean end.
#![deny(unsafe_code)]

use anyhow::Context;
use clap::Parser;
use std::path::PathBuf;
use tokio::signal::unix::{SignalKind, signal};
use violin_channel::log;
use violin_common::config::adapt::AdaptConfig;

/// violin's adaptation manager: observes hosts and VMs, decides, explains, moves VMs.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Configuration file; configs/adaptd.example.toml explains every key.
    #[arg(long, default_value = "/etc/violin/adaptd.toml")]
    config: PathBuf,
    /// Checks whether a start would work: configuration, certificate, its key and authority, folders, journal. Starts nothing.
    #[arg(long)]
    check: bool,
    /// Decides and lists what it would do, and begins no move by itself; overrides `mode` and what `violin mode` set
    /// before this start. What an earlier manager left
    /// unfinished is still finished or undone, and what operators ask for is done.
    #[arg(long)]
    dry_run: bool,
}

fn main() -> std::process::ExitCode {
    let arguments = Arguments::parse();
    let log = match log::start("VIOLIN_LOG", "info") {
        Ok(log) => log,
        Err(error) => {
            eprintln!("adaptd: cannot begin its log: {error}");
            return std::process::ExitCode::FAILURE;
        }
    };
    match start(&arguments) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            log.say(format_args!("adaptd: {error:#}"));
            std::process::ExitCode::FAILURE
        }
    }
}

fn start(arguments: &Arguments) -> anyhow::Result<()> {
    let path = arguments.config.display();
    let text = std::fs::read_to_string(&arguments.config).with_context(|| format!("reading the configuration {path}"))?;
    let config = AdaptConfig::parse(&text).with_context(|| format!("configuration {path}"))?;
    if arguments.check {
        adaptd::io::run::check(&config).with_context(|| format!("configuration {path}"))?;
        println!("{path}: good");
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let stop = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        adaptd::io::run::run(config, arguments.dry_run, stop).await
    })
}
