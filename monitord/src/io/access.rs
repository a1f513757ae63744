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
    network: NetworkSpec,
    address: Ipv4Addr,
    prefix_len: u8,
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
        let open = match fs::read(&file) {
            Ok(text) => serde_json::from_slice(&text).map_err(io::Error::other)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(error),
        };
        let folder = run.canonicalize()?;
        let from_folder = || format!("{:06x}", super::sandbox::short_hash(folder.as_os_str().as_encoded_bytes()) & 0xff_ffff);
        let mark = mark.map_or_else(from_folder, str::to_owned);
        Ok(Self { file, mark, host: host.clone(), switch, open: Mutex::new(open) })
    }

    /// Name of the namespace: mark of this monitor, environment and host. No mark holds a dot: that of a lab `a` begins no name
    /// of a lab `a-b`.
    fn name(&self, environment: &EnvironmentId) -> String {
        format!("va-{}.{environment}-{}", self.mark, self.host)
    }

    fn netns(&self, environment: &EnvironmentId) -> String {
        format!("/run/netns/{}", self.name(environment))
    }

    /// Name of the TAP, in the switch's namespace for a moment and then in the access namespace.
    fn interface(&self, environment: &EnvironmentId) -> String {
        let key = super::sandbox::short_hash(self.name(environment).as_bytes());
        format!("va{key:08x}")
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
        let access = Access { network: network.clone(), address, prefix_len };
        if open.get(environment).is_some_and(|old| *old != access) {
            self.remove(environment)?;
        }
        open.insert(environment.clone(), access.clone());
        self.write(&open)?;
        if let Err(error) = self.make(environment, &access) {
            let _ = self.remove(environment);
            open.remove(environment);
            self.write(&open)?;
            return Err(error);
        }
        Ok(self.netns(environment))
    }

    fn make(&self, environment: &EnvironmentId, access: &Access) -> Result<(), AccessError> {
        let (name, interface, netns) = (self.name(environment), self.interface(environment), self.netns(environment));
        if !Path::new(&netns).exists() {
            ip(&["netns", "add", &name])?;
        }
        self.switch.tell(&SwitchRequest::NetworkAdd(access.network.clone()))?;
        if self.port(environment, &self.switch.ports()?).is_none() {
            let kind = PortKind::Tap { interface: interface.clone(), netns: Some(netns) };
            self.switch.add_port(PortSpec { vni: access.network.vni, kind, owned: None })?;
        }
        let address = format!("{}/{}", access.address, access.prefix_len);
        ip(&["-n", &name, "link", "set", "lo", "up"])?;
        ip(&["-n", &name, "link", "set", &interface, "mtu", &access.network.mtu.to_string()])?;
        ip(&["-n", &name, "address", "replace", &address, "dev", &interface])?;
        ip(&["-n", &name, "link", "set", &interface, "up"])?;
        Ok(())
    }

    fn port<'a>(&self, environment: &EnvironmentId, ports: &'a [PortSeen]) -> Option<&'a PortSeen> {
        let wanted = self.netns(environment);
        ports.iter().find(|port| matches!(&port.spec.kind, PortKind::Tap { netns: Some(netns), .. } if *netns == wanted))
    }

    /// Removes one; none there is no error.
    pub(crate) fn close(&self, environment: &EnvironmentId) -> Result<(), AccessError> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        self.remove(environment)?;
        open.remove(environment);
        self.write(&open)?;
        Ok(())
    }

    fn remove(&self, environment: &EnvironmentId) -> Result<(), AccessError> {
        if let Some(port) = self.port(environment, &self.switch.ports()?) {
            self.switch.tell(&SwitchRequest::PortRemove { port: port.port })?;
        }
        if Path::new(&self.netns(environment)).exists() {
            ip(&["netns", "delete", &self.name(environment)])?;
        }
        Ok(())
    }

    /// Makes again the ports a restarted switch has lost.
    pub(crate) fn heal(&self, ports: &[PortSeen]) {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        for (environment, access) in open.iter().filter(|(environment, _)| self.port(environment, ports).is_none()) {
            tracing::warn!(%environment, "the switch has lost the access port; making it again");
            if let Err(error) = self.make(environment, access) {
                tracing::warn!(%environment, %error, "making the access port again; trying again next time");
            }
        }
    }
}
