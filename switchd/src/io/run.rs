//! From a configuration file to a running switch and back.

use super::api::Api;
use super::control::{self, ControlCounters, Input, Parts};
use super::dataplane::DataPlane;
use super::mesh_socket::MeshSocket;
use super::needs::Needs;
use super::{attach, ciphers, now, random};
use crate::counters::Counters;
use crate::members;
use crate::switch::{Nature, Switch, Wanted};
use crate::tables::Forwarding;
use anyhow::{Context, Result, anyhow, bail};
use arc_swap::ArcSwap;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use violin_channel::local;
use violin_channel::quic::{Endpoint, alpn};
use violin_channel::start::{folder_of_can_be, patiently};
use violin_channel::tls::{Credentials, Timing, endpoint_config};
use violin_common::VmId;
use violin_common::api::switch::{NetworkSpec, OwnedMac, Ownership, PortKind, PortSpec};
use violin_common::config::switch::{NetworkConfig, PortConfig, SwitchConfig};

/// Events of workers that may wait.
const WORKER_EVENTS: usize = 4096;
/// QUIC datagrams that may wait.
const QUIC_DATAGRAMS: usize = 1024;

/// Reads and checks a file, its certificate included.
pub fn load(path: &Path) -> Result<(SwitchConfig, Credentials)> {
    let text = std::fs::read_to_string(path).with_context(|| format!("could not read {}", path.display()))?;
    let config = SwitchConfig::parse(&text).with_context(|| format!("in {}", path.display()))?;
    let credentials = Credentials::load(&config.tls).with_context(|| format!("in {}", path.display()))?;
    credentials.must_name(&config.host, &config.domain).with_context(|| format!("in {}", path.display()))?;
    Ok((config, credentials))
}

/// Whether a start with this file would work, as far as can be told without starting: another switch may run.
pub fn check(path: &Path) -> Result<SwitchConfig> {
    let (config, credentials) = load(path)?;
    let within = || format!("in {}", path.display());
    credentials.must_be_valid(SystemTime::now()).with_context(within)?;
    let socket = folder_of_can_be(&config.socket).and_then(|()| local::must_be_socket(&config.socket));
    socket.context("key `socket`").with_context(within)?;
    Ok(config)
}

fn network(config: &NetworkConfig) -> NetworkSpec {
    let ageing_s = u32::try_from(config.ageing.0.as_secs()).unwrap_or(u32::MAX);
    NetworkSpec { vni: config.vni, mtu: config.mtu, ageing_s }
}

/// A port of the file. Its owned MAC belongs to a "VM" called after the interface: nothing moves it.
fn port(config: &PortConfig) -> PortSpec {
    let kind = match config.clone() {
        PortConfig::Packet { interface, .. } => PortKind::Packet { interface },
        PortConfig::Tap { interface, netns, .. } => PortKind::Tap { interface, netns },
        PortConfig::Vxlan { local, remote, remote_vni, .. } => PortKind::Vxlan { local, remote, remote_vni },
    };
    let owned = match config {
        PortConfig::Packet { mac: Some(mac), interface, .. } => {
            let legal = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
            let name = format!("static-{}", interface.chars().map(legal).collect::<String>());
            let ownership = Ownership::Here { epoch: violin_common::Epoch::FIRST };
            name.parse::<VmId>().ok().map(|vm| OwnedMac { mac: *mac, vm, ownership })
        }
        _ => None,
    };
    PortSpec { vni: config.vni(), kind, owned }
}

fn wanted(old: Option<&SwitchConfig>, new: &SwitchConfig) -> Wanted {
    let (networks, ports): (Vec<_>, Vec<_>) = (new.networks.iter().map(network).collect(), new.ports.iter().map(port).collect());
    let old_ports = old.map(|old| old.ports.iter().map(port).collect::<Vec<_>>()).unwrap_or_default();
    let old_networks = old.map(|old| old.networks.clone()).unwrap_or_default();
    Wanted {
        remove_ports: old_ports.into_iter().filter(|old| !ports.contains(old)).collect(),
        remove_networks: old_networks
            .into_iter()
            .map(|old| old.vni)
            .filter(|old| networks.iter().all(|new| new.vni != *old))
            .collect(),
        networks,
        ports,
        join: new.join.clone(),
    }
}

/// What the host needs for itself; `listen` cannot be changed while running.
fn needs(listen: SocketAddr, config: &SwitchConfig) -> Needs {
    let taken = |port: &PortConfig| match port {
        PortConfig::Packet { interface, take_over: true, .. } => Some(interface.clone()),
        _ => None,
    };
    Needs {
        listen: Some(listen.ip()).filter(|ip| !ip.is_unspecified()),
        members: config.join.clone(),
        take_over: config.ports.iter().filter_map(taken).collect(),
    }
}

/// Keys that differ and need a restart.
fn fixed_differences(old: &SwitchConfig, new: &SwitchConfig) -> Vec<&'static str> {
    let mut keys = Vec::new();
    let mut check = |same: bool, key| {
        if !same {
            keys.push(key);
        }
    };
    check(old.host == new.host, "host");
    check(old.domain == new.domain, "domain");
    check(old.listen == new.listen, "listen");
    check(old.socket == new.socket, "socket");
    check(old.tls == new.tls, "tls");
    check(old.aead == new.aead, "aead");
    check(old.aead_library == new.aead_library, "aead-library");
    check(old.plain == new.plain, "plain");
    check(old.underlay_mtu == new.underlay_mtu, "underlay-mtu");
    keys
}

/// Bytes of UDP payload that fit one packet of the underlay.
fn max_datagram(listen: SocketAddr, underlay_mtu: u16) -> u16 {
    underlay_mtu - if listen.is_ipv4() { 28 } else { 48 }
}

/// Runs a switch until SIGTERM or SIGINT; SIGHUP reads the file again.
pub async fn run(path: &Path) -> Result<()> {
    let (mut config, credentials) = load(path)?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut reload = signal(SignalKind::hangup())?;

    if let Err(error) = credentials.must_be_valid(SystemTime::now()) {
        tracing::error!("the certificate will be refused by everybody: {error}");
    }
    let socket = tokio::select! {
        bound = patiently(config.listen, || UdpSocket::bind(config.listen)) => bound,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    let socket = socket.map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => anyhow!("could not bind the mesh port {}: is another switchd running?", config.listen),
        _ => anyhow!("could not bind the mesh port {}: {error}", config.listen),
    })?;
    let listener = local::bind(&config.socket)?;
    socket.set_nonblocking(true)?;
    let listen = socket.local_addr()?;
    let credentials = Arc::new(credentials);
    let (quic_sender, quic_datagrams) = mpsc::channel(QUIC_DATAGRAMS);
    let (event_sender, worker_events) = mpsc::channel(WORKER_EVENTS);
    let (inputs, input_receiver) = mpsc::unbounded_channel();

    let counters = Arc::new(Counters::default());
    let mesh_socket = MeshSocket::new(socket.try_clone()?, quic_datagrams, Arc::clone(&counters));
    let server = credentials.server(alpn::MESH, Timing::BRISK)?;
    let quinn = quinn::Endpoint::new_with_abstract_socket(
        endpoint_config(),
        Some(server),
        Arc::new(mesh_socket),
        Arc::new(quinn::TokioRuntime),
    )?;
    let endpoint = Endpoint::over(quinn, credentials, alpn::MESH, Timing::BRISK);

    let tables = Arc::new(ArcSwap::from_pointee(Forwarding::default()));
    let dataplane = Arc::new(DataPlane::start(socket, Arc::clone(&tables), Arc::clone(&counters), event_sender, quic_sender)?);
    dataplane.set_needs(needs(listen, &config));
    let attach = attach::start(Arc::clone(&dataplane), inputs.clone())?;
    let nature = Nature {
        host: config.host.clone(),
        domain: config.domain.clone(),
        listen,
        max_datagram: max_datagram(config.listen, config.underlay_mtu),
        boot: random::number().context("could not draw a random number")?,
        ciphers: ciphers::abilities(config.aead, config.aead_library),
        queues: 1,
        plain: config.plain.clone(),
        renew: members::RENEW,
    };
    for can in &nature.ciphers {
        let (aead, library) = (can.choice.aead.name(), can.choice.library.name());
        tracing::info!(aead, library, ns_per_1400_bytes = can.ns, "can seal");
    }
    let switch = Switch::new(now(), nature, &config.join);
    let control_counters = Arc::new(ControlCounters::default());
    let api = Api { inputs: inputs.clone(), dataplane: Arc::clone(&dataplane), counters, control: Arc::clone(&control_counters) };

    inputs.send(Input::Configure(Box::new(wanted(None, &config))))?;
    let parts = Parts {
        switch,
        endpoint: endpoint.clone(),
        dataplane: Arc::clone(&dataplane),
        tables,
        attach: attach.clone(),
        counters: control_counters,
        listen: Some(listen.ip()).filter(|ip| !ip.is_unspecified()),
        speaks_plain: !config.plain.is_empty(),
    };
    let mut actor = tokio::spawn(control::run(parts, input_receiver, worker_events));
    let serving = tokio::spawn(api.serve(listener));
    tracing::info!(host = %config.host, domain = %config.domain, %listen, socket = %config.socket.display(), "switch is up");

    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = reload.recv() => match load(path) {
                Ok((new, _)) => {
                    for key in fixed_differences(&config, &new) {
                        tracing::warn!(key, "cannot be changed while running: restart to make it so");
                    }
                    dataplane.set_needs(needs(listen, &new));
                    inputs.send(Input::Configure(Box::new(wanted(Some(&config), &new))))?;
                    let _ = attach.send(attach::Work::Check);
                    tracing::info!("configuration read again");
                    let (networks, ports, join) = (new.networks, new.ports, new.join);
                    config = SwitchConfig { networks, ports, join, ..config };
                }
                Err(error) => tracing::error!("configuration not taken over: {error:#}"),
            },
            ended = &mut actor => match ended {
                Ok(()) => bail!("the switch ended by itself"),
                Err(error) => bail!("the switch failed: {error}"),
            },
            () = dataplane.ended() => bail!("a thread of the data plane ended (see the log): want the switch started again"),
        }
    }
    tracing::info!("draining");
    serving.abort();
    let (sender, done) = oneshot::channel();
    inputs.send(Input::Drain(sender))?;
    done.await?;
    endpoint.close("the switch ends").await;
    let (sender, flushed) = std::sync::mpsc::channel();
    attach.send(attach::Work::Flush(sender))?;
    tokio::task::spawn_blocking(move || flushed.recv()).await??;
    Ok(())
}
