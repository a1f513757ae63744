//! `violin lab`: hosts, domains, a WAN and guests on this one machine.

use crate::table::{Output, or_dash};
use anyhow::{Context, Result, bail};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::Instant;
use violin_lab::{Guests, LabConfig, LabName, LabStatus, Layers, ProcessId, UpOptions};

/// Words about labs.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Lab {
    /// Build a lab and start its daemons; as root.
    #[command(after_help = "Example: violin lab up --guests sandbox --name try")]
    Up {
        /// Lab file.
        #[arg(long, short, default_value = "configs/lab/three-hosts.toml", value_name = "FILE")]
        config: PathBuf,
        /// Name, instead of the file's.
        #[arg(long)]
        name: Option<LabName>,
        /// What guests are, instead of what the file says.
        #[arg(long)]
        guests: Option<GuestsWord>,
        /// Folder of a guest image (`scripts/build` makes target/image), put into the first host's store; QEMU guests need one.
        #[arg(long, value_name = "DIR")]
        image: Option<PathBuf>,
        /// How far to build.
        #[arg(long, default_value = "all")]
        layers: LayersWord,
        /// Folder of switchd, monitord, adaptd and violin-probe (default: where this program is).
        #[arg(long, value_name = "DIR")]
        binaries: Option<PathBuf>,
    },
    /// Remove a lab with everything in it, also one left half-built by a kill.
    Down {
        /// Which (default: the only one).
        name: Option<LabName>,
    },
    /// Show a lab: hosts, daemons, sockets.
    Status {
        /// Which (default: the only one).
        name: Option<LabName>,
    },
    /// List labs.
    List,
    /// Carry packets between domains (started by `up`).
    #[command(hide = true)]
    Relay {
        /// What to do, in JSON.
        plan: PathBuf,
    },
    /// Run a daemon and collect the processes it leaves behind (started by `up`).
    #[command(hide = true)]
    Keep {
        /// What to do, in JSON.
        plan: PathBuf,
    },
}

/// Words for [`Guests`].
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(crate) enum GuestsWord {
    /// QEMU VMs under libvirt.
    Qemu,
    /// Namespaces and control groups of this kernel.
    Sandbox,
}

/// Words for [`Layers`].
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(crate) enum LayersWord {
    /// Namespaces, WAN and control groups.
    Net,
    /// And a libvirtd a host.
    Libvirt,
    /// And the daemons.
    All,
}

/// True once the operator wants out.
static CANCELLED: AtomicBool = AtomicBool::new(false);
/// The status to end with then.
static ENDED: AtomicI32 = AtomicI32::new(0);

/// Carries out one of the words.
pub(crate) fn run(command: Lab, output: Output) -> Result<()> {
    match command {
        Lab::Up { config, name, guests, image, layers, binaries } => {
            let text =
                std::fs::read_to_string(&config).with_context(|| format!("cannot read the lab file {}", config.display()))?;
            let mut lab = LabConfig::parse(&text).with_context(|| format!("in {}", config.display()))?;
            lab.name = name.unwrap_or(lab.name);
            lab.guests = guests.map_or(lab.guests, |word| match word {
                GuestsWord::Qemu => Guests::Qemu,
                GuestsWord::Sandbox => Guests::Sandbox,
            });
            up(&lab, image, layers, binaries, output)
        }
        Lab::Down { name } => {
            let name = name.map_or_else(only, |name| Ok(name.to_string()))?;
            violin_lab::down(&name, &mut |words| eprintln!("{words}"))?;
            output.words(&format!("lab {name} is gone"));
            Ok(())
        }
        Lab::Status { name } => status(&name.map_or_else(only, |name| Ok(name.to_string()))?, output),
        Lab::List => {
            let head = ["LAB", "STATE", "GUESTS", "HOSTS", "DAEMONS", "OWNER"];
            output.list(&violin_lab::list(), head, |lab| {
                let alive = lab.processes.iter().filter(|process| process.alive).count();
                [
                    lab.state.name.clone(),
                    state(lab).to_owned(),
                    guests_word(lab.state.guests).to_owned(),
                    lab.state.hosts.len().to_string(),
                    format!("{alive}/{}", lab.processes.len()),
                    if lab.owner_alive { or_dash(lab.state.owner.map(|owner| owner.pid)) } else { "dead".to_owned() },
                ]
            })
        }
        Lab::Relay { plan } => Ok(violin_lab::relay::run(&plan)?),
        Lab::Keep { plan } => Ok(violin_lab::keep::run(&plan)?),
    }
}

fn up(lab: &LabConfig, image: Option<PathBuf>, layers: LayersWord, binaries: Option<PathBuf>, output: Output) -> Result<()> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let options = UpOptions {
        binaries: binaries.or_else(|| program.parent().map(PathBuf::from)).context("this program is in no folder")?,
        image,
        layers: match layers {
            LayersWord::Net => Layers::Net,
            LayersWord::Libvirt => Layers::Libvirt,
            LayersWord::All => Layers::All,
        },
        helper: vec![program.into_os_string(), "lab".into()],
        // This process ends when the lab stands; the lab serves whoever started it.
        owner: ProcessId::of(std::os::unix::process::parent_id()),
        cancelled: Some(&CANCELLED),
    };
    // Ctrl-C, SIGTERM and the terminal's end make it stop and remove what it built.
    crate::signals::heed(|status| {
        ENDED.store(status, Ordering::Relaxed);
        CANCELLED.store(true, Ordering::Relaxed);
    })?;
    let began = Instant::now();
    let built = violin_lab::up(lab, &options, &mut |words| eprintln!("[{:5.1} s] {words}", began.elapsed().as_secs_f64()));
    let state = match (built, ENDED.load(Ordering::Relaxed)) {
        (Err(error), status) if status != 0 => {
            eprintln!("violin: {:#}", anyhow::Error::from(error));
            std::process::exit(status);
        }
        (built, _) => built?,
    };
    if output.json {
        return output.value(&state);
    }
    output.words(&format!(
        "lab {} is up after {:.1} s; `violin lab down {0}` ends it",
        state.name,
        began.elapsed().as_secs_f64()
    ));
    Ok(())
}

fn only() -> Result<String> {
    let names: Vec<String> = violin_lab::list().into_iter().map(|lab| lab.state.name).collect();
    match names.as_slice() {
        [only] => Ok(only.clone()),
        [] => bail!("there is no lab; `violin lab up` builds one"),
        several => bail!("several labs stand ({}): say which", several.join(", ")),
    }
}

const fn guests_word(guests: Guests) -> &'static str {
    match guests {
        Guests::Qemu => "qemu",
        Guests::Sandbox => "sandbox",
    }
}

fn state(lab: &LabStatus) -> &'static str {
    match (lab.state.phase, lab.whole()) {
        (violin_lab::Phase::Building, _) => "half-built",
        (violin_lab::Phase::Up, true) => "up",
        (violin_lab::Phase::Up, false) => "damaged",
    }
}

fn status(name: &str, output: Output) -> Result<()> {
    let lab = violin_lab::status(name)?;
    if output.json {
        return output.value(&lab);
    }
    output.words(&format!(
        "lab {name}: {}, {} guests, files in {}",
        state(&lab),
        guests_word(lab.state.guests),
        lab.state.dir.display()
    ));
    for netns in &lab.missing_namespaces {
        output.words(&format!("namespace {netns} is gone"));
    }
    output.list(&lab.state.hosts, ["HOST", "DOMAIN", "NAMESPACE", "ADDRESS", "CORES", "SWITCH SOCKET", "LIBVIRT"], |host| {
        [
            host.host.to_string(),
            host.domain.to_string(),
            host.netns.clone(),
            host.address.to_string(),
            host.cores.to_string(),
            host.switch_socket.display().to_string(),
            or_dash(host.libvirt_uri.as_ref()),
        ]
    })?;
    output.list(&lab.processes, ["DAEMON", "PID", "STATE"], |process| {
        [process.what.clone(), process.pid.to_string(), if process.alive { "runs" } else { "dead" }.to_owned()]
    })
}
