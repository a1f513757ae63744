//! `env`: environments from their files.

use crate::table::{Output, say};
use crate::target::Target;
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::path::PathBuf;
use violin_common::api::adapt::{AdaptReply, AdaptRequest, EnvironmentLife, EnvironmentSeen};
use violin_common::config::environment::EnvironmentSpec;
use violin_common::control::monitor::ImageDigest;
use violin_common::{DomainId, EnvironmentId, HostId};

/// `violin env …`
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Env {
    /// Start an environment and wait until all its VMs are ready.
    ///
    /// All of it starts, or none. Its progress goes to the standard error.
    #[command(after_help = "Example: violin env up configs/environments/alpha.toml --place head=h1 --place c1=h2")]
    Up {
        /// Its file (configs/environments/*.toml are examples).
        file: PathBuf,
        /// Host for a node, for example `c1=h2`; may be repeated. The others are placed by free cores.
        #[arg(long = "place", value_name = "NODE=HOST", value_parser = parse_place)]
        placement: Vec<(String, HostId)>,
        /// Image its VMs boot: the SHA-256 of its manifest, 64 hexadecimal digits (default: the lab's).
        #[arg(long, value_name = "DIGEST")]
        image: Option<String>,
    },
    /// End an environment: its VMs, its network, its access.
    Down {
        /// Its name.
        environment: EnvironmentId,
    },
    /// Take up an environment that runs though the manager does not know it, as after its journal was lost.
    ///
    /// Its VMs go on as they are; all of them must be seen. `violin env status` and `violin vm list` show strays: VMs that run and
    /// that the journal does not know.
    Adopt {
        /// Its name.
        environment: EnvironmentId,
    },
    /// End an environment that runs though the manager does not know it: its VMs, its network, its access.
    ///
    /// For one that the manager knows it is `violin env down`.
    Destroy {
        /// Its name.
        environment: EnvironmentId,
    },
    /// Show environments and their VMs, and how far those are that are being started or ended.
    #[command(visible_alias = "list")]
    Status {
        /// Only this one.
        environment: Option<EnvironmentId>,
    },
    /// Move all compute nodes of an environment to another domain, as one gang; its head node stays.
    ///
    /// Fails if a move did not happen; the gang's other VMs are then taken back. OUTCOME says where each VM is.
    #[command(after_help = "Example: violin env move alpha --to d2")]
    Move {
        /// Its name.
        environment: EnvironmentId,
        /// Domain they go to; `violin host` lists domains.
        #[arg(long, value_name = "DOMAIN")]
        to: DomainId,
    },
}

fn parse_place(text: &str) -> Result<(String, HostId), String> {
    let (node, host) = text.split_once('=').ok_or_else(|| format!("got {text:?}, want NODE=HOST such as c1=h2"))?;
    Ok((node.to_owned(), host.parse().map_err(|error| format!("{error}"))?))
}

/// Runs `violin env …`.
pub(crate) fn run(target: &Target, output: Output, command: Env) -> Result<()> {
    match command {
        Env::Up { file, placement, image } => {
            let text = std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
            let spec = EnvironmentSpec::parse(&text).with_context(|| format!("in {}", file.display()))?;
            let image = match image {
                Some(image) => Some(ImageDigest::try_from(image)?),
                None => target.lab_image()?,
            };
            let name = spec.name.clone();
            let placement: BTreeMap<_, _> = placement.into_iter().collect();
            target.follow(&AdaptRequest::EnvUp { spec, placement, image }, |words| eprintln!("{words}"))?;
            output.words(&format!("environment {name} is up; enter it with: violin ssh {name}"));
            Ok(())
        }
        Env::Down { environment } => {
            target.follow(&AdaptRequest::EnvDown { environment: environment.clone() }, |words| eprintln!("{words}"))?;
            output.words(&format!("environment {environment} is down"));
            Ok(())
        }
        Env::Adopt { environment } => match target.ask(&AdaptRequest::EnvAdopt { environment })? {
            AdaptReply::Words(words) => {
                output.words(&words);
                Ok(())
            }
            other => bail!("got {other:?}, want words"),
        },
        Env::Destroy { environment } => {
            target.follow(&AdaptRequest::EnvDestroy { environment: environment.clone() }, |words| eprintln!("{words}"))?;
            output.words(&format!("environment {environment} is gone"));
            Ok(())
        }
        Env::Status { environment } => {
            let all = environment.is_none();
            let chosen = match environment {
                Some(name) => vec![find(target, &name)?],
                None => list(target)?,
            };
            if output.json {
                return output.value(&chosen);
            }
            for seen in &chosen {
                let network = &seen.spec.network;
                say!(
                    "environment {}: home {}, vni {}, {}/{}, {} VMs",
                    seen.spec.name,
                    seen.home,
                    network.vni,
                    network.address,
                    network.prefix_len,
                    seen.vms.len()
                );
                if let Some(progress) = under_way(seen) {
                    say!("{progress}");
                }
                super::vm::print(output, &seen.vms)?;
            }
            if chosen.is_empty() {
                say!("no environments; start one with: violin env up FILE");
            }
            if all { super::vm::print_strays(output, &super::vm::strays(target)?) } else { Ok(()) }
        }
        Env::Move { environment, to } => {
            match target.follow(&AdaptRequest::EnvMove { environment, to }, |words| eprintln!("{words}"))? {
                AdaptReply::Migrations(migrations) => super::vm::finished(output, &migrations),
                other => bail!("got {other:?}, want the moves' records"),
            }
        }
    }
}

/// What goes on with an environment, in words.
fn under_way(seen: &EnvironmentSeen) -> Option<String> {
    if seen.life == EnvironmentLife::Ready && seen.progress.is_none() {
        return None;
    }
    let since = seen.progress_s.map_or_else(String::new, |age| format!(" for {age:.0} s"));
    let progress = seen.progress.as_deref().map_or_else(String::new, |progress| format!(": {progress}"));
    Some(format!("{}{since}{progress}", seen.life))
}

/// All environments.
pub(crate) fn list(target: &Target) -> Result<Vec<EnvironmentSeen>> {
    match target.ask(&AdaptRequest::EnvList)? {
        AdaptReply::Environments(environments) => Ok(environments),
        other => bail!("got {other:?}, want the list of environments"),
    }
}

/// One environment by name.
pub(crate) fn find(target: &Target, name: &EnvironmentId) -> Result<EnvironmentSeen> {
    let environments = list(target)?;
    let known = environments.iter().map(|seen| seen.spec.name.as_str()).collect::<Vec<_>>().join(", ");
    if environments.iter().all(|seen| seen.spec.name != *name)
        && super::vm::strays(target)?.iter().any(|stray| stray.environment.as_ref() == Some(name))
    {
        bail!(
            "environment {name} runs, but the manager's journal does not know it: `violin env adopt {name}` takes it up, \
             `violin env destroy {name}` ends it"
        );
    }
    environments.into_iter().find(|seen| seen.spec.name == *name).with_context(|| match known.as_str() {
        "" => format!("got environment {name}, but there is none; `violin env up FILE` starts one"),
        known => format!("got environment {name}, want one of: {known}"),
    })
}
