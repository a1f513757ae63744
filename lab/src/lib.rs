//! Hosts, domains, a WAN and guests on one Linux machine: for trying, testing and measuring violin.
//!
//! [`config`] is the file, [`topology`] what follows from it, [`up`](up()) builds it, [`down`](down()) removes it, whatever
//! happened in between, by what [`LabState`] recorded. Everything is in namespaces with the lab's name: `vl-LAB-HOST` the
//! hosts, `vl-LAB-r.DOMAIN` the routers, `vl-LAB-m` the manager. The [`relay`] carries packets between domains. Needs root.
#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod cgroup;
pub mod config;
mod daemons;
mod down;
mod error;
mod image;
pub mod keep;
mod libvirt;
pub mod netns;
mod process;
pub mod relay;
mod state;
mod status;
pub mod topology;
mod up;

pub use config::{Guests, LabConfig, LabName};
pub use down::down;
pub use error::{LabError, Result};
pub use netns::spawn_in;
pub use process::{ProcessId, wait_for};
pub use state::{HostState, LABS, LabState, ManagerState, Phase, RouterState};
pub use status::{LabStatus, ProcessStatus, list, status};
pub use up::{Layers, UpOptions, up};
