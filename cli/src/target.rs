//! Which daemon a command talks to.

use anyhow::{Context, Result, bail};
use serde::{Serialize, de::DeserializeOwned};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use violin_channel::local::blocking;
use violin_common::HostId;
use violin_common::api::adapt::{AdaptReply, AdaptRequest};
use violin_common::api::switch::{SwitchReply, SwitchRequest};
use violin_common::control::monitor::ImageDigest;

const SYSTEM_MANAGER: &str = "/run/violin/adaptd.sock";
const SYSTEM_SWITCH: &str = "/run/violin/switchd.sock";
const LABS: &str = "/run/violin-lab";

/// Where the daemons are, from the options common to all commands.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Target {
    /// Talk to the manager of this lab (default: the system's manager, else the only lab there is).
    #[arg(long, global = true, env = "VIOLIN_LAB", value_name = "NAME")]
    lab: Option<String>,
    /// Talk to the manager at this Unix socket.
    #[arg(long, global = true, env = "VIOLIN_SOCKET", value_name = "PATH", conflicts_with = "lab")]
    socket: Option<PathBuf>,
    /// Talk to one switch at this Unix socket, without any manager (for `port`, `peer`, `fdb`, `counters`).
    #[arg(long, global = true, value_name = "PATH")]
    switch_socket: Option<PathBuf>,
}

impl Target {
    /// The manager's socket.
    pub(crate) fn manager(&self) -> Result<PathBuf> {
        if self.switch_socket.is_some() {
            bail!(
                "got --switch-socket, but this command asks the manager: leave it out (`port`, `peer`, `fdb` and `counters` take it)"
            );
        }
        if let Some(path) = &self.socket {
            return Ok(path.clone());
        }
        if let Some(lab) = &self.lab {
            if !Path::new(LABS).join(lab).exists() {
                bail!("got lab {lab}, but there is none of that name; `violin lab list` lists labs");
            }
            return Ok(lab_socket(lab));
        }
        if Path::new(SYSTEM_MANAGER).exists() {
            return Ok(SYSTEM_MANAGER.into());
        }
        let mut labs: Vec<String> = std::fs::read_dir(LABS)
            .map(|entries| entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
            .unwrap_or_default();
        labs.retain(|lab| lab_socket(lab).exists());
        match labs.as_slice() {
            [only] => Ok(lab_socket(only)),
            [] => bail!(
                "no manager found: there is no {SYSTEM_MANAGER} and no running lab; \
                 start adaptd, run `violin lab up`, or name a socket with --socket"
            ),
            several => bail!("several labs run ({}): say which with --lab NAME", several.join(", ")),
        }
    }

    /// One request to the manager, one reply.
    pub(crate) fn ask(&self, request: &AdaptRequest) -> Result<AdaptReply> {
        self.follow(request, |_| ())
    }

    /// One request to the manager; `progress` sees each line before the last.
    pub(crate) fn follow(&self, request: &AdaptRequest, mut progress: impl FnMut(&str)) -> Result<AdaptReply> {
        let mut last = None;
        self.stream(request, |reply| match reply {
            AdaptReply::Progress(words) => {
                progress(&words);
                ControlFlow::Continue(())
            }
            reply => {
                last = Some(reply);
                ControlFlow::Break(())
            }
        })?;
        last.context("the manager hung up without an answer; its log says more")
    }

    /// One request to the manager, all its replies.
    pub(crate) fn stream(&self, request: &AdaptRequest, seen: impl FnMut(AdaptReply) -> ControlFlow<()>) -> Result<()> {
        stream(&self.manager()?, request, seen)
    }

    /// One request to a switch: through the manager, or straight to its socket.
    pub(crate) fn switch(&self, host: Option<&HostId>, request: SwitchRequest) -> Result<SwitchReply> {
        if let Some(host) = host {
            let request = AdaptRequest::Switch { host: host.clone(), request };
            return match self.ask(&request)? {
                AdaptReply::Switch(reply) => Ok(reply),
                other => bail!("got {other:?}, want the switch's answer"),
            };
        }
        let path = self.switch_socket.clone().unwrap_or_else(|| SYSTEM_SWITCH.into());
        let mut last = None;
        stream(&path, &request, |reply| {
            last = Some(reply);
            ControlFlow::Break(())
        })?;
        last.context("the switch hung up without an answer")
    }

    /// All hosts the manager knows, unless one switch was named. Also those whose monitor is away: whoever asks is told that
    /// they do not answer.
    pub(crate) fn switches(&self, wanted: Option<HostId>) -> Result<Vec<Option<HostId>>> {
        if self.switch_socket.is_some() {
            if let Some(host) = wanted {
                bail!("got --host {host} and --switch-socket, want one of them: a socket is that of one switch");
            }
            return Ok(vec![None]);
        }
        if wanted.is_some() {
            return Ok(vec![wanted]);
        }
        if self.socket.is_none() && self.lab.is_none() && self.manager().is_err() && Path::new(SYSTEM_SWITCH).exists() {
            return Ok(vec![None]);
        }
        match self.ask(&AdaptRequest::HostList)? {
            AdaptReply::Hosts(hosts) => Ok(hosts.into_iter().map(|host| Some(host.host)).collect()),
            other => bail!("got {other:?}, want the list of hosts"),
        }
    }
}

fn lab_socket(lab: &str) -> PathBuf {
    Path::new(LABS).join(lab).join("adaptd/adaptd.sock")
}

fn stream<Q: Serialize, A: DeserializeOwned>(path: &Path, request: &Q, mut seen: impl FnMut(A) -> ControlFlow<()>) -> Result<()> {
    for answer in blocking::stream(path, request).map_err(anyhow::Error::msg)? {
        if seen(answer.map_err(anyhow::Error::msg)?).is_break() {
            break;
        }
    }
    Ok(())
}

impl Target {
    /// The image the lab was given, if this is a lab's manager and it has one.
    pub(crate) fn lab_image(&self) -> Result<Option<ImageDigest>> {
        let socket = self.manager()?;
        let Some(file) = socket.parent().and_then(Path::parent).map(|lab| lab.join("lab.json")) else { return Ok(None) };
        let Ok(text) = std::fs::read_to_string(&file) else { return Ok(None) };
        let state: serde_json::Value = serde_json::from_str(&text).with_context(|| format!("in {}", file.display()))?;
        match state.get("image").and_then(serde_json::Value::as_str) {
            Some(digest) => Ok(Some(ImageDigest::try_from(digest.to_owned())?)),
            None => Ok(None),
        }
    }
}
