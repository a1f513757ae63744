//! Access namespaces: an operator's or a probe's way into one network, and nothing else.
//!
//! Each is a network namespace with one TAP port of that network. What was opened is kept on disk, so a restarted monitor
//! closes it and a restarted switch gets its port back.

use super::switch::{Switch, SwitchError};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use violin_common::api::switch::{NetworkSpec, PortKind, PortSeen, PortSpec, SwitchRequest};
use violin_common::{EnvironmentId, HostId};

/// One that is open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Access {
    /// Name of the namespace: it stays what it was when this monitor is given another mark.
    #[serde(default)]
    name: String,
    network: NetworkSpec,
    address: Ipv4Addr,
    prefix_len: u8,
}

/// Name of a namespace: mark of its monitor, environment and host. No mark holds a dot: that of a lab `a` begins no name of a
/// lab `a-b`.
fn name(mark: &str, environment: &EnvironmentId, host: &HostId) -> String {
    format!("va-{mark}.{environment}-{host}")
}

impl Access {
    fn netns(&self) -> String {
        format!("/run/netns/{}", self.name)
    }

    /// Name of the TAP, in the switch's namespace for a moment and then in the access namespace.
    fn interface(&self) -> String {
        format!("va{:08x}", super::sandbox::short_hash(self.name.as_bytes()))
    }

    fn port<'a>(&self, ports: &'a [PortSeen]) -> Option<&'a PortSeen> {
        let wanted = self.netns();
        ports.iter().find(|port| matches!(&port.spec.kind, PortKind::Tap { netns: Some(netns), .. } if *netns == wanted))
    }
}

/// All of this host.
#[derive(Debug)]
pub(crate) struct Accesses {
    file: PathBuf,
    /// Tells this monitor's namespaces from those of other monitors on the machine.
    mark: String,
    host: HostId,
    switch: Switch,
    open: Mutex<BTreeMap<EnvironmentId, Access>>,
}

/// Opening or closing failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AccessError {
    #[error(transparent)]
    Switch(#[from] SwitchError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Runs `ip` and wants it to succeed.
fn ip(arguments: &[&str]) -> io::Result<()> {
    let output = Command::new("ip").args(arguments).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim())))
}

impl Accesses {
    pub(crate) fn open(run: &Path, host: &HostId, mark: Option<&str>, switch: Switch) -> io::Result<Self> {
        fs::create_dir_all(run)?;
        let file = run.join("access.json");
        let mut open: BTreeMap<EnvironmentId, Access> = match fs::read(&file) {
            Ok(text) => serde_json::from_slice(&text).map_err(io::Error::other)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(error),
        };
        let folder = run.canonicalize()?;
        let from_folder = || format!("{:06x}", super::sandbox::short_hash(folder.as_os_str().as_encoded_bytes()) & 0xff_ffff);
        let mark = mark.map_or_else(from_folder, str::to_owned);
        // An earlier version kept no names.
        for (environment, access) in open.iter_mut().filter(|(_, access)| access.name.is_empty()) {
            access.name = name(&mark, environment, host);
        }
        Ok(Self { file, mark, host: host.clone(), switch, open: Mutex::new(open) })
    }

    fn write(&self, open: &BTreeMap<EnvironmentId, Access>) -> io::Result<()> {
        let temporary = self.file.with_extension("new");
        fs::write(&temporary, serde_json::to_vec_pretty(open).map_err(io::Error::other)?)?;
        fs::rename(temporary, &self.file)
    }

    /// Makes one, or finds it; returns the path of its namespace. A failure leaves nothing.
    pub(crate) fn open_one(
        &self,
        environment: &EnvironmentId,
        network: &NetworkSpec,
        address: Ipv4Addr,
        prefix_len: u8,
    ) -> Result<String, AccessError> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let name = name(&self.mark, environment, &self.host);
        let access = Access { name, network: network.clone(), address, prefix_len };
        if let Some(old) = open.get(environment).filter(|old| **old != access) {
            self.remove(old)?;
        }
        open.insert(environment.clone(), access.clone());
        self.write(&open)?;
        if let Err(error) = self.make(&access) {
            let _ = self.remove(&access);
            open.remove(environment);
            self.write(&open)?;
            return Err(error);
        }
        Ok(access.netns())
    }

    fn make(&self, access: &Access) -> Result<(), AccessError> {
        let (name, interface, netns) = (&access.name, access.interface(), access.netns());
        if !Path::new(&netns).exists() {
            ip(&["netns", "add", name])?;
        }
        self.switch.tell(&SwitchRequest::NetworkAdd(access.network.clone()))?;
        if access.port(&self.switch.ports()?).is_none() {
            let kind = PortKind::Tap { interface: interface.clone(), netns: Some(netns) };
            self.switch.add_port(PortSpec { vni: access.network.vni, kind, owned: None })?;
        }
        let address = format!("{}/{}", access.address, access.prefix_len);
        ip(&["-n", name, "link", "set", "lo", "up"])?;
        ip(&["-n", name, "link", "set", &interface, "mtu", &access.network.mtu.to_string()])?;
        ip(&["-n", name, "address", "replace", &address, "dev", &interface])?;
        ip(&["-n", name, "link", "set", &interface, "up"])?;
        Ok(())
    }

    /// Removes one; none there is no error.
    pub(crate) fn close(&self, environment: &EnvironmentId) -> Result<(), AccessError> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(access) = open.get(environment) {
            self.remove(access)?;
            open.remove(environment);
            self.write(&open)?;
        }
        Ok(())
    }

    fn remove(&self, access: &Access) -> Result<(), AccessError> {
        if let Some(port) = access.port(&self.switch.ports()?) {
            self.switch.tell(&SwitchRequest::PortRemove { port: port.port })?;
        }
        if Path::new(&access.netns()).exists() {
            ip(&["netns", "delete", &access.name])?;
        }
        Ok(())
    }

    /// Makes again the ports a restarted switch has lost.
    pub(crate) fn heal(&self, ports: &[PortSeen]) {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        for (environment, access) in open.iter().filter(|(_, access)| access.port(ports).is_none()) {
            tracing::warn!(%environment, "the switch has lost the access port; making it again");
            if let Err(error) = self.make(access) {
                tracing::warn!(%environment, %error, "making the access port again; trying again next time");
            }
        }
    }
}
