//! The stage: a lab of three hosts in two domains, two environments with the same addresses, all guests up.

use crate::capture::Inside;
use crate::prober::Access;
use crate::seed::Cast;
use crate::shell::{self, Operator};
use crate::{Guests, Options};
use anyhow::{Context, Result, bail};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use violin_channel::local::blocking;
use violin_common::MacAddr;
use violin_common::api::adapt::{AdaptReply, AdaptRequest, MigrationSeen, VmListed};
use violin_common::config::environment::EnvironmentSpec;
use violin_lab::LabState;

/// Everything that stands while the demo plays. Taken down when forgotten.
#[derive(Debug)]
pub(crate) struct Stage {
    pub(crate) operator: Operator,
    pub(crate) lab: LabState,
    /// The manager's local socket.
    pub(crate) manager: PathBuf,
    /// Ways into both environments.
    pub(crate) ways: BTreeMap<String, Access>,
    /// What must not be seen outside the mesh.
    pub(crate) inside: Inside,
    name: String,
    keep: Cell<bool>,
    /// Where the daemons' words are kept.
    evidence: PathBuf,
}

impl Stage {
    /// Builds everything, telling what it does.
    pub(crate) fn build(options: &Options, cast: &Cast) -> Result<Self> {
        let operator = Operator::new(&options.lab)?;
        shell::say(&format!("building the lab {}: three hosts in two domains, a WAN between them", options.lab));
        let stage = Self {
            operator,
            lab: LabState::default(),
            manager: PathBuf::new(),
            ways: BTreeMap::new(),
            inside: Inside::default(),
            name: options.lab.clone(),
            // What fails to come up goes by itself, and what stood there before is not ours to take down.
            keep: Cell::new(true),
            evidence: options.out.join("evidence"),
        };
        stage.up(options, cast)
    }

    fn up(mut self, options: &Options, cast: &Cast) -> Result<Self> {
        let default = || format!("configs/lab/demo-{}.toml", options.guests.word());
        let file = options.lab_file.as_ref().map_or_else(default, |file| file.to_string_lossy().into_owned());
        let mut words = vec!["lab", "up", "--config", &file, "--name", &options.lab, "--guests", options.guests.word()];
        if options.guests == Guests::Qemu {
            words.extend(["--image", "target/image"]);
        }
        self.operator.run(words)?;
        self.keep.set(false);
        shell::check_interrupt()?;
        self.lab = LabState::load(&options.lab)?;
        self.manager = self.lab.adaptd.socket.clone();
        shell::say("switches, monitors and the manager run; starting two environments with the same MAC and IP addresses");

        for name in ["alpha", "beta"] {
            let file = format!("configs/environments/{name}.toml");
            let mut words = vec!["env".to_owned(), "up".into(), file.clone()];
            for (node, host) in placement(name, cast) {
                words.extend(["--place".into(), format!("{node}={host}")]);
            }
            self.operator.run(&words).with_context(|| format!("starting environment {name}"))?;
            shell::check_interrupt()?;
            let spec = EnvironmentSpec::parse(&std::fs::read_to_string(&file)?)?;
            let macs: BTreeMap<_, MacAddr> = spec.nodes()?.into_iter().map(|node| (node.vm, node.mac)).collect();
            self.inside.add(spec.network.vni.value(), macs.values());
            let request = AdaptRequest::Access { environment: spec.name.clone() };
            let AdaptReply::Access { netns, .. } = self.ask(&request)? else { bail!("the manager answered another question") };
            self.ways.insert(name.to_owned(), Access::of(netns, macs)?);
            shell::say(&format!("environment {name} is up"));
        }
        Ok(self)
    }

    /// One question to the manager.
    pub(crate) fn ask(&self, request: &AdaptRequest) -> Result<AdaptReply> {
        blocking::ask(&self.manager, request).map_err(anyhow::Error::msg)
    }

    /// All VMs as the manager sees them.
    pub(crate) fn vms(&self) -> Result<Vec<VmListed>> {
        match self.ask(&AdaptRequest::VmList)? {
            AdaptReply::Vms(vms) => Ok(vms),
            other => bail!("got {other:?}, want the list of VMs"),
        }
    }

    /// All moves so far.
    pub(crate) fn migrations(&self) -> Result<Vec<MigrationSeen>> {
        match self.ask(&AdaptRequest::MigrationList)? {
            AdaptReply::Migrations(migrations) => Ok(migrations),
            other => bail!("got {other:?}, want the list of moves"),
        }
    }

    /// Leaves the lab running.
    pub(crate) fn keep(&self) {
        self.keep.set(true);
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // Of a lab that never stood there is nothing to keep.
        if !self.lab.name.is_empty() {
            crate::evidence::keep(self, &self.evidence);
        }
        if !self.keep.get() {
            shell::say("taking the lab down");
            if let Err(error) = self.operator.run_to_end(["lab", "down", &self.name]) {
                shell::say(&format!("the lab is not all gone: {error:#}"));
            }
        }
    }
}

/// Where VMs start: alpha's ranks spread evenly over the first domain, all of beta's on the host to be crowded.
fn placement(environment: &str, cast: &Cast) -> Vec<(&'static str, String)> {
    let (crowded, other) = (cast.crowded.clone(), cast.other.clone());
    if environment == "alpha" {
        vec![("head", other.clone()), ("c1", "h1".into()), ("c2", "h1".into()), ("c3", "h2".into()), ("c4", "h2".into())]
    } else {
        std::iter::once(("head", other)).chain(crate::seed::COMPUTE.map(|node| (node, crowded.clone()))).collect()
    }
}
