//! `switchd --config FILE`: one switch of the mesh.

use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;
use switchd::io::run;

/// The switch of one host: all its virtual networks, joined with those of other hosts.
///
/// SIGTERM drains: peers are told, ports are let go. SIGHUP reads the configuration again: networks, ports and join
/// addresses follow it, other keys need a restart. RUST_LOG sets what is logged (default: info).
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Configuration file; configs/switchd.example.toml explains every key.
    #[arg(long, default_value = "/etc/violin/switchd.toml")]
    config: PathBuf,
    /// Checks whether a start would work: configuration, certificate, its key and authority, folders. Starts nothing.
    #[arg(long)]
    check: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let log = match violin_channel::log::start("RUST_LOG", "info,quinn=warn") {
        Ok(log) => log,
        Err(error) => {
            eprintln!("switchd: cannot begin its log: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = if arguments.check {
        run::check(&arguments.config).map(|config| {
            println!(
                "{}: host {}, {} networks, {} ports",
                arguments.config.display(),
                config.host,
                config.networks.len(),
                config.ports.len()
            );
        })
    } else {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .map_err(Into::into)
            .and_then(|runtime| runtime.block_on(run::run(&arguments.config)))
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log.say(format_args!("switchd: {error:#}"));
            ExitCode::FAILURE
        }
    }
}
