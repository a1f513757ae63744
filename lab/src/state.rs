//! `lab.json`: what a lab consists of, written before any of it is made, so that it can be removed after a kill.

use crate::config::{Guests, LabName};
use crate::error::{Doing, LabError, Result};
use crate::process::ProcessId;
use crate::topology::Subnet;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use violin_common::control::monitor::ImageDigest;
use violin_common::{DomainId, HostId};

/// Folder of all labs. In /run: nothing of a lab outlives the machine.
pub const LABS: &str = "/run/violin-lab";

/// A lab.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LabState {
    /// Name.
    pub name: String,
    /// Whether it stands.
    pub phase: Phase,
    /// The process for which the lab was built. When it is dead, a new lab of the same name takes the place of this one.
    pub owner: Option<ProcessId>,
    /// What guests are.
    pub guests: Guests,
    /// Seed of the WAN's losses.
    pub seed: u64,
    /// Folder of the lab's files.
    pub dir: PathBuf,
    /// Folder of the daemons' programs.
    pub binaries: PathBuf,
    /// Image in the first host's store.
    pub image: Option<ImageDigest>,
    /// Routers, one a domain.
    pub routers: Vec<RouterState>,
    /// The process between the domains.
    pub relay: Option<ProcessId>,
    /// Hosts, in the file's order.
    pub hosts: Vec<HostState>,
    /// The manager.
    pub adaptd: ManagerState,
}

/// How far a lab is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Being built, or left half-way.
    #[default]
    Building,
    /// Stands.
    Up,
}

/// A domain's router.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouterState {
    /// Domain.
    pub domain: DomainId,
    /// Network namespace.
    pub netns: String,
    /// Underlay.
    pub subnet: Subnet,
}

/// One host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostState {
    /// Name.
    pub host: HostId,
    /// Domain.
    pub domain: DomainId,
    /// Network namespace.
    pub netns: String,
    /// Underlay address.
    pub address: Ipv4Addr,
    /// Underlay interface, in the host's namespace.
    pub underlay_interface: String,
    /// UDP port of its switch.
    pub mesh_port: u16,
    /// Folder of its files: configuration, sockets, logs, `images/`, `run/`.
    pub dir: PathBuf,
    /// Its switch's local socket.
    pub switch_socket: PathBuf,
    /// Cores, as declared.
    pub cores: f64,
    /// Name of its guests' CPU group: `NAME.partition` in every hierarchy.
    pub cpu_group: String,
    /// Its libvirtd, as seen from its own namespace and from others of the lab.
    pub libvirt_uri: Option<String>,
    /// Its libvirtd's process.
    pub libvirtd: Option<ProcessId>,
    /// Its switch's process.
    pub switchd: Option<ProcessId>,
    /// Its monitor's process.
    pub monitord: Option<ProcessId>,
}

impl HostState {
    /// Path of its network namespace.
    pub fn netns_path(&self) -> String {
        crate::netns::path(&self.netns).to_string_lossy().into_owned()
    }
}

/// The manager.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManagerState {
    /// Network namespace.
    pub netns: String,
    /// Where monitors connect.
    pub listen: Option<SocketAddr>,
    /// Folder of its files.
    pub dir: PathBuf,
    /// Local socket.
    pub socket: PathBuf,
    /// Process.
    pub process: Option<ProcessId>,
}

impl ManagerState {
    /// Path of its network namespace.
    pub fn netns_path(&self) -> String {
        crate::netns::path(&self.netns).to_string_lossy().into_owned()
    }
}

/// Folder of a lab.
pub(crate) fn dir(name: &str) -> PathBuf {
    Path::new(LABS).join(name)
}

impl LabState {
    /// Reads the state of a lab.
    pub fn load(name: &str) -> Result<Self> {
        let name: LabName = name.parse().map_err(LabError::Name)?;
        let path = dir(name.as_str()).join("lab.json");
        let text = match fs::read_to_string(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(LabError::NoSuchLab(name.to_string())),
            result => result.doing(|| format!("reading {}", path.display()))?,
        };
        serde_json::from_str(&text).map_err(std::io::Error::from).doing(|| format!("understanding {}", path.display()))
    }

    /// Writes it; a reader sees the old or the new text, never half of one.
    pub(crate) fn save(&self) -> Result<()> {
        let path = self.dir.join("lab.json");
        let new = self.dir.join("lab.json.new");
        let text = serde_json::to_string_pretty(self).map_err(std::io::Error::from).doing(|| "writing lab.json".to_owned())?;
        fs::write(&new, text).and_then(|()| fs::rename(&new, &path)).doing(|| format!("writing {}", path.display()))
    }

    /// A host by name.
    pub fn host(&self, name: &str) -> Option<&HostState> {
        self.hosts.iter().find(|host| host.host.as_str() == name)
    }

    /// All processes it records, with what they are.
    pub fn processes(&self) -> Vec<(String, ProcessId)> {
        let mut all = Vec::new();
        let mut add = |what: String, process: Option<ProcessId>| all.extend(process.map(|process| (what, process)));
        add("relay".to_owned(), self.relay);
        add("adaptd".to_owned(), self.adaptd.process);
        for host in &self.hosts {
            add(format!("{} libvirtd", host.host), host.libvirtd);
            add(format!("{} switchd", host.host), host.switchd);
            add(format!("{} monitord", host.host), host.monitord);
        }
        all
    }

    /// Name of the control group of its daemons.
    pub(crate) fn daemon_group(&self) -> String {
        format!("violin-{}.daemons", self.name)
    }
}

/// Names of all labs that have a folder.
pub(crate) fn names() -> Vec<String> {
    let Ok(entries) = fs::read_dir(LABS) else { return Vec::new() };
    let mut names: Vec<String> = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort_unstable();
    names
}

/// Exclusive right to build or remove one lab: a lock on its folder, which is made. Ends with the process, however it ends.
pub(crate) fn lock(name: &LabName) -> Result<Flock<File>> {
    let dir = dir(name.as_str());
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        fs::create_dir_all(&dir).doing(|| format!("making {}", dir.display()))?;
        // Whoever held the lock may just have removed the folder: then there is nothing to open, or an old one is locked.
        if let Ok(file) = File::open(&dir) {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => {
                    let own = lock.metadata().doing(|| format!("looking at {}", dir.display()))?;
                    if fs::metadata(&dir).is_ok_and(|there| (there.dev(), there.ino()) == (own.dev(), own.ino())) {
                        return Ok(lock);
                    }
                }
                Err((_, nix::errno::Errno::EWOULDBLOCK)) => {}
                Err((_, error)) => return Err(error).doing(|| format!("locking {}", dir.display())),
            }
        }
        if Instant::now() >= deadline {
            return Err(LabError::Busy(name.to_string()));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
