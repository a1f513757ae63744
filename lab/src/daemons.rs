//! Configuration files of the daemons, and their processes.

use crate::config::{Guests, LabConfig};
use crate::error::{Doing, LabError, Result};
use crate::libvirt;
use crate::netns;
use crate::process::{ProcessId, wait_for};
use crate::state::{HostState, LabState};
use serde::Serialize;
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use violin_channel::pki;
use violin_common::HostId;
use violin_common::api::Response;
use violin_common::api::adapt::{AdaptReply, AdaptRequest};
use violin_common::config::adapt::AdaptConfig;
use violin_common::config::monitor::{Capacity, Driver, MonitorConfig};
use violin_common::config::switch::{AeadChoice, LibraryChoice, SwitchConfig};
use violin_common::config::{ConfigError, Span};

/// UDP port of the mesh.
pub(crate) const MESH_PORT: u16 = 7471;
/// UDP port of the manager.
pub(crate) const MANAGER_PORT: u16 = 7472;
/// UDP port on which monitors give images to each other.
const IMAGE_PORT: u16 = 7473;
/// Longest time a daemon may take to start.
const LIMIT: Duration = Duration::from_secs(30);

/// Starts a daemon with its output in `log`. The command enters its namespace by itself.
pub(crate) fn spawn(mut command: Command, what: &str, log: &Path) -> Result<ProcessId> {
    let out = OpenOptions::new().create(true).append(true).open(log).doing(|| format!("opening {}", log.display()))?;
    let err = out.try_clone().doing(|| format!("opening {}", log.display()))?;
    let mut child = command.stdin(Stdio::null()).stdout(out).stderr(err).spawn().doing(|| format!("starting {what}"))?;
    let pid = child.id();
    let process = ProcessId::of(pid);
    // Collected when it ends, so that it does not look alive as long as this process lives.
    std::thread::spawn(move || child.wait());
    process.ok_or_else(|| LabError::Died { what: what.to_owned(), log: log.to_owned(), tail: tail(log) })
}

/// An error with the end of its log if the process is dead.
pub(crate) fn check_alive(what: &str, process: ProcessId, log: &Path) -> Result<()> {
    if process.alive() { Ok(()) } else { Err(LabError::Died { what: what.to_owned(), log: log.to_owned(), tail: tail(log) }) }
}

fn tail(log: &Path) -> String {
    let text = fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(10)..].join("\n")
}

/// The programs a lab needs, checked to be there.
pub(crate) fn check_programs(binaries: &Path, guests: Guests) -> Result<()> {
    let probe = (guests == Guests::Sandbox).then_some("violin-probe");
    for program in ["switchd", "monitord", "adaptd"].into_iter().chain(probe) {
        let path = binaries.join(program);
        if !path.exists() {
            let wanted = "the daemons' programs in one folder: build them (`make build`) or name their folder with --binaries";
            return Err(LabError::Missing { path, wanted: wanted.to_owned() });
        }
    }
    Ok(())
}

fn write<T: Serialize>(path: &Path, config: &T) -> Result<String> {
    let text = toml::to_string(config).map_err(std::io::Error::other).doing(|| format!("writing {}", path.display()))?;
    fs::write(path, &text).doing(|| format!("writing {}", path.display()))?;
    Ok(text)
}

/// Writes `switchd.toml` and `monitord.toml` of a host.
pub(crate) fn configure_host(config: &LabConfig, state: &LabState, host: &HostState) -> Result<()> {
    let tls = pki::paths(&state.dir.join("pki"), &host.host);
    let at = |port| SocketAddr::from((host.address, port));
    let first = state.hosts.first().filter(|first| first.host != host.host);
    let switch = SwitchConfig {
        host: host.host.clone(),
        domain: host.domain.clone(),
        listen: at(host.mesh_port),
        join: first.map(|first| SocketAddr::from((first.address, first.mesh_port))).into_iter().collect(),
        socket: host.switch_socket.clone(),
        tls: tls.clone(),
        aead: AeadChoice::Auto,
        aead_library: LibraryChoice::Auto,
        plain: Vec::new(),
        underlay_mtu: 1500,
        networks: Vec::new(),
        ports: Vec::new(),
    };
    SwitchConfig::parse(&write(&host.dir.join("switchd.toml"), &switch)?)?;

    let wanted = config.hosts.iter().find(|wanted| wanted.name == host.host);
    let wanted = wanted.ok_or_else(|| ConfigError::value("host", &host.host, "a [[host]] of the lab file"))?;
    let driver = match config.guests {
        Guests::Qemu => Driver::Libvirt {
            uri: libvirt::local_uri(),
            incoming_uri: libvirt::incoming_uri(host),
            migrate_address: host.address.into(),
            accel: config.accel,
        },
        Guests::Sandbox => Driver::Sandbox {
            pause: Span::from_secs(0),
            shared: state.dir.join("sandbox"),
            guest_program: state.binaries.join("violin-probe"),
        },
    };
    let monitor = MonitorConfig {
        host: host.host.clone(),
        domain: host.domain.clone(),
        manager: state.adaptd.listen.unwrap_or_else(|| at(MANAGER_PORT)),
        listen: at(IMAGE_PORT),
        switch_socket: host.switch_socket.clone(),
        tls,
        period: config.monitor_period,
        images: host.dir.join("images"),
        run: host.dir.join("run"),
        mark: Some(state.name.to_string()),
        capacity: Capacity {
            cores: wanted.cores,
            scale: config.scale,
            memory_mib: wanted.memory_mib,
            cpu_group: Some(host.cpu_group.clone()),
            quota_period: config.quota_period,
        },
        driver,
    };
    MonitorConfig::parse(&write(&host.dir.join("monitord.toml"), &monitor)?)?;
    Ok(())
}

/// Name in the manager's certificate.
pub(crate) fn manager_name() -> Result<HostId> {
    "adaptd".parse().map_err(|error: violin_common::id::BadName| LabError::Name(error.to_string()))
}

/// Text of `adaptd.toml`: where things are, and the `[manager]` table of the lab file as it is.
///
/// Errors: a key of that table is unknown to adaptd, or is one the lab sets itself.
pub(crate) fn manager_config(config: &LabConfig, dir: &Path, listen: SocketAddr) -> Result<String> {
    let home = dir.join("adaptd");
    let tls = pki::paths(&dir.join("pki"), &manager_name()?);
    let text = |path: PathBuf| toml::Value::String(path.to_string_lossy().into_owned());
    let mut table = config.manager.clone();
    let tls =
        toml::Table::from_iter([("ca", tls.ca), ("cert", tls.cert), ("key", tls.key)].map(|(k, v)| (k.to_owned(), text(v))));
    for (key, value) in [
        ("listen", toml::Value::String(listen.to_string())),
        ("socket", text(home.join("adaptd.sock"))),
        ("journal", text(home.join("adaptd.redb"))),
        ("tls", toml::Value::Table(tls)),
    ] {
        if table.insert(key.to_owned(), value).is_some() {
            return Err(ConfigError::value(format!("manager.{key}"), "a value", "none: the lab sets it itself").into());
        }
    }
    let written = toml::to_string(&table).map_err(std::io::Error::other).doing(|| "writing adaptd.toml".to_owned())?;
    match AdaptConfig::parse(&written) {
        Ok(_) => Ok(written),
        Err(ConfigError::Toml(words)) => Err(ConfigError::Toml(format!("in [manager]: {words}")).into()),
        Err(ConfigError::Value { key, got, wanted }) => {
            Err(ConfigError::Value { key: format!("manager.{key}"), got, wanted }.into())
        }
    }
}

/// Starts one daemon in a namespace with `--config FILE`; its log lies beside that file.
pub(crate) fn start(state: &LabState, program: &str, netns: &str, config: &Path) -> Result<ProcessId> {
    let mut command = netns::spawn_in(netns, state.binaries.join(program))?;
    command.arg("--config").arg(config);
    if std::env::var_os("RUST_LOG").is_none() {
        command.env("RUST_LOG", "info");
    }
    let process = spawn(command, program, &config.with_extension("log"))?;
    crate::cgroup::adopt(&state.daemon_group(), process)?;
    Ok(process)
}

/// Waits until a daemon listens on its local socket.
pub(crate) fn wait_socket(
    what: &str,
    socket: &Path,
    process: ProcessId,
    log: &Path,
    go_on: &dyn Fn() -> Result<()>,
) -> Result<()> {
    wait_for(&format!("{what} to listen on {}", socket.display()), LIMIT, Some(log), || {
        go_on()?;
        check_alive(what, process, log)?;
        Ok(UnixStream::connect(socket).is_ok())
    })
}

/// Waits until the manager sees all hosts connected.
pub(crate) fn wait_hosts(state: &LabState, go_on: &dyn Fn() -> Result<()>) -> Result<()> {
    let log = state.adaptd.dir.join("adaptd.log");
    let mut said = String::new();
    let result = wait_for("all monitors to report to adaptd", LIMIT, Some(&log), || {
        go_on()?;
        for (what, process) in state.processes() {
            let log = match what.split_once(' ') {
                Some((host, daemon)) => state.dir.join(host).join(format!("{daemon}.log")),
                None if what == "adaptd" => log.clone(),
                None => state.dir.join(format!("{what}.log")),
            };
            check_alive(&what, process, &log)?;
        }
        match connected(&state.adaptd.socket) {
            Ok(count) => Ok(count == state.hosts.len()),
            Err(error) => {
                said = error;
                Ok(false)
            }
        }
    });
    match result {
        Err(LabError::Timeout { what, seconds, log }) if !said.is_empty() => {
            Err(LabError::Timeout { what: format!("{what} (last answer: {said})"), seconds, log })
        }
        other => other,
    }
}

fn connected(socket: &Path) -> Result<usize, String> {
    let text = |error: std::io::Error| error.to_string();
    let mut stream = UnixStream::connect(socket).map_err(text)?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).map_err(text)?;
    let mut line = serde_json::to_string(&AdaptRequest::HostList).map_err(|error| error.to_string())?;
    line.push('\n');
    stream.write_all(line.as_bytes()).map_err(text)?;
    line.clear();
    BufReader::new(stream).read_line(&mut line).map_err(text)?;
    let response: Response<AdaptReply> = serde_json::from_str(&line).map_err(|error| error.to_string())?;
    match Result::from(response)? {
        AdaptReply::Hosts(hosts) => Ok(hosts.iter().filter(|host| host.connected).count()),
        other => Err(format!("got {other:?}, want the list of hosts")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lab(manager: &str) -> LabConfig {
        let text = "[[domain]]\nname = \"d1\"\n[[host]]\nname = \"h1\"\ndomain = \"d1\"\ncores = 1\nmemory-mib = 1\n";
        LabConfig::parse(&format!("{text}{manager}")).unwrap()
    }

    #[test]
    fn the_managers_table_is_handed_over_and_checked() {
        let listen = "10.201.1.2:7472".parse().unwrap();
        let of = |manager: &str| manager_config(&lab(manager), Path::new("/run/violin-lab/x"), listen);

        let config = AdaptConfig::parse(&of("[manager.policy]\ncooldown = \"7s\"\n").unwrap()).unwrap();

        assert_eq!(config.policy.cooldown, Span::from_secs(7));
        assert_eq!(config.listen, listen);
        assert!(of("[manager]\nnonsense = 1\n").unwrap_err().to_string().contains("nonsense"));
        assert!(of("[manager]\nlisten = \"1.2.3.4:5\"\n").unwrap_err().to_string().contains("manager.listen"));
    }
}
