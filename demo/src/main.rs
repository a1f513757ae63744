//! The main job, end to end, on real parts: two isolated virtual clusters on three hosts in two domains, a real HPL inside
//! one of them, a crowd on one host, and a manager that sees it, decides, and moves VMs while they run.
//!
//! The demo only plays the user and the crowd; it never names a VM to move. Read in this order: [`stage`] (what is built),
//! [`runs`] (what is run), [`prober`] (who watches), [`report`] (what is claimed, and what would refute it).

mod capture;
mod evidence;
mod hpl;
mod prober;
mod report;
mod runs;
mod seed;
mod shell;
mod stage;
mod transfers;

use anyhow::{Context, Result};
use clap::Parser as _;
use std::path::PathBuf;
use std::process::ExitCode;

/// Runs HPL three times (calm, overloaded, overloaded with adaptation) and reports what the moves cost and gave.
#[derive(Debug, Clone, clap::Parser)]
#[command(version)]
pub(crate) struct Options {
    /// How guests are run.
    #[arg(long, value_enum, default_value_t = Guests::Qemu)]
    guests: Guests,
    /// Decides which host is crowded and by whom (default: drawn, and printed).
    #[arg(long)]
    seed: Option<u64>,
    /// Where report.json and its evidence go; those of an earlier demo there are removed.
    #[arg(long, default_value = "target/demo")]
    out: PathBuf,
    /// Name of the lab.
    #[arg(long, default_value = "demo")]
    lab: String,
    /// Lab file (default: configs/lab/demo-GUESTS.toml).
    #[arg(long)]
    lab_file: Option<PathBuf>,
    /// Falsification: the manager decides but does not act in the third run.
    #[arg(long)]
    dry_run: bool,
    /// Falsification: nobody crowds a host.
    #[arg(long)]
    no_crowd: bool,
    /// For a machine that has other work, which disturbs run times: what the report claims of them is shown, not checked.
    #[arg(long)]
    untimed: bool,
    /// Only print which host the seed crowds.
    #[arg(long)]
    show_cast: bool,
    /// Leave the lab running at the end, for a look around.
    #[arg(long)]
    keep: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Guests {
    /// QEMU virtual machines under libvirt.
    Qemu,
    /// Namespaces on this kernel.
    Sandbox,
}

impl Guests {
    fn word(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Sandbox => "sandbox",
        }
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    if options.show_cast {
        println!("{}", seed::Cast::draw(options.seed.unwrap_or_else(seed::drawn)).crowded);
        return ExitCode::SUCCESS;
    }
    shell::catch_interrupts();
    match play(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error:#}");
            // As a shell says it of SIGINT: a script must be able to tell a demo broken off from one that failed.
            if shell::interrupted() { ExitCode::from(130) } else { ExitCode::FAILURE }
        }
    }
}

/// Plays the whole and writes the report; whether all checks held.
fn play(options: &Options) -> Result<bool> {
    let (report, evidence) = (options.out.join("report.json"), options.out.join("evidence"));
    // Nothing else: whoever names another folder has other things in it.
    for result in [std::fs::remove_file(&report), std::fs::remove_dir_all(&evidence)] {
        match result {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot clear {} of an earlier demo", options.out.display()));
            }
            _ => {}
        }
    }
    std::fs::create_dir_all(&evidence).with_context(|| format!("cannot make {}", options.out.display()))?;
    let seed = options.seed.unwrap_or_else(seed::drawn);
    let cast = seed::Cast::draw(seed);
    shell::say(&format!(
        "seed {seed}: {} will be crowded by beta's {} first, {} later",
        cast.crowded,
        cast.first.join(" and "),
        cast.later.join(" and ")
    ));

    let stage = stage::Stage::build(options, &cast)?;
    let recorded = runs::play(options, &stage, &cast)?;
    let report = report::assemble(options, seed, &cast, &stage, &recorded)?;
    let held = report::publish(options, &report)?;
    if options.keep {
        stage.keep();
        shell::say(&format!(
            "the lab goes on; look around with `target/release/violin --lab {0} vm list`, end it with `target/release/violin lab down {0}`",
            options.lab
        ));
    }
    Ok(held)
}
