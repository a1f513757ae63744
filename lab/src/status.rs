//! Looking at labs.

use crate::error::Result;
use crate::netns;
use crate::state::{self, LabState, Phase};
use serde::Serialize;

/// A lab with what is there of it now.
#[derive(Debug, Clone, Serialize)]
pub struct LabStatus {
    /// As recorded.
    pub state: LabState,
    /// Whether its owner lives.
    pub owner_alive: bool,
    /// Its daemons.
    pub processes: Vec<ProcessStatus>,
    /// Namespaces it should have and has not.
    pub missing_namespaces: Vec<String>,
}

/// One daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ProcessStatus {
    /// What it is, for example `h1 switchd`.
    pub what: String,
    /// Process number.
    pub pid: u32,
    /// Whether it runs.
    pub alive: bool,
}

impl LabStatus {
    /// Whether it was built to the end and nothing of it is gone.
    pub fn whole(&self) -> bool {
        self.state.phase == Phase::Up && self.missing_namespaces.is_empty() && self.processes.iter().all(|process| process.alive)
    }
}

/// Looks at one lab. Errors: there is none of that name.
pub fn status(name: &str) -> Result<LabStatus> {
    let state = LabState::load(name)?;
    let hosts = state.hosts.iter().map(|host| &host.netns);
    let wanted = state.routers.iter().map(|router| &router.netns).chain(hosts).chain([&state.adaptd.netns]);
    Ok(LabStatus {
        owner_alive: state.owner.is_some_and(crate::ProcessId::alive),
        processes: state
            .processes()
            .into_iter()
            .map(|(what, process)| ProcessStatus { what, pid: process.pid, alive: process.alive() })
            .collect(),
        missing_namespaces: wanted.filter(|netns| !netns::path(netns).exists()).cloned().collect(),
        state,
    })
}

/// All labs of this machine.
pub fn list() -> Vec<LabStatus> {
    // One that is being built or removed at this moment has no record yet, or none any more.
    state::names().iter().filter_map(|name| status(name).ok()).collect()
}
