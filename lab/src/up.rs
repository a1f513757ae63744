//! Building a lab, one layer on the other: namespaces and WAN, libvirtds, daemons.

use crate::config::{Guests, LabConfig, LabName, Wire};
use crate::error::{Doing, LabError, Result};
use crate::image::Image;
use crate::netns::{self, ip};
use crate::process::{ProcessId, wait_for};
use crate::relay::{self, RelayPlan};
use crate::state::{self, HostState, LabState, ManagerState, Phase, RouterState};
use crate::topology::{Router, Station, Topology};
use crate::{cgroup, daemons, down, libvirt};
use nix::fcntl::Flock;
use std::ffi::OsString;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use violin_channel::pki;
use violin_common::{DomainId, HostId};

/// Underlay interface of a host, in its namespace.
const UNDERLAY: &str = "eth0";
/// Bridge of a domain, in its router's namespace.
const BRIDGE: &str = "lan0";

/// How far a lab is built.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Layers {
    /// Namespaces, WAN and control groups.
    Net,
    /// And a libvirtd a host, if guests are QEMU's.
    Libvirt,
    /// And the daemons.
    #[default]
    All,
}

/// What `up` is told beside the lab file.
#[derive(Debug, Clone)]
pub struct UpOptions {
    /// Folder with `switchd`, `monitord`, `adaptd` and `violin-probe`.
    pub binaries: PathBuf,
    /// Folder of a guest image, given to the first host.
    pub image: Option<PathBuf>,
    /// How far to build.
    pub layers: Layers,
    /// Command that runs [`relay::run`] or [`crate::keep::run`]; the word `relay` or `keep` and a plan's path are added to it.
    pub helper: Vec<OsString>,
    /// The process for which the lab is built: while it lives, `up` refuses to replace the lab.
    pub owner: Option<ProcessId>,
    /// Becomes true when the operator wants out: building ends, and what was built is removed.
    pub cancelled: Option<&'static AtomicBool>,
}

/// Builds a lab and records it; on an error nothing is left of it.
///
/// A lab of the same name whose owner is dead is removed first. `progress` gets a line for each thing that takes time.
///
/// Errors: another lab of that name lives; a program is missing; the system refuses; a daemon is not ready in time.
pub fn up(config: &LabConfig, options: &UpOptions, progress: &mut dyn FnMut(&str)) -> Result<LabState> {
    config.check()?;
    let topology = Topology::of(config)?;
    if options.layers == Layers::All {
        daemons::check_programs(&options.binaries, config.guests)?;
    }
    let listen = SocketAddr::from((topology.manager.address, daemons::MANAGER_PORT));
    let manager = daemons::manager_config(config, &state::dir(config.name.as_str()), listen)?;
    let image = options.image.as_deref().map(Image::read).transpose()?;

    let _lock = claim(&config.name, progress)?;

    let mut builder =
        Builder { config, options, topology: &topology, state: describe(config, options, &topology, listen), progress };
    let built = builder.build(&manager, image.as_ref());
    let state = builder.state;
    match built {
        Ok(()) => Ok(state),
        Err(error) => {
            progress("that failed; removing what was built");
            // Whoever interrupts knows why it did not come up.
            let kept = if matches!(error, LabError::Cancelled) { Ok(None) } else { keep_logs(&state) };
            match kept {
                Ok(Some(folder)) => progress(&format!("its logs are kept in {}", folder.display())),
                Ok(None) => {}
                Err(error) => progress(&error.to_string()),
            }
            // The first error is the one to tell; what cannot be removed now, `down` names.
            if let Err(left) = down::remove_all(&config.name, progress) {
                progress(&left.to_string());
            }
            Err(error)
        }
    }
}

/// The right to build a lab of this name where none is; what a dead one left is removed.
fn claim(name: &LabName, progress: &mut dyn FnMut(&str)) -> Result<Flock<File>> {
    let mut removed = false;
    loop {
        let lock = state::lock(name)?;
        match LabState::load(name.as_str()) {
            Ok(there) if there.phase == Phase::Up => {
                if let Some(owner) = there.owner.filter(|owner| owner.alive()) {
                    return Err(LabError::AlreadyUp { name: there.name, owner: owner.pid });
                }
            }
            Err(LabError::NoSuchLab(_)) if removed => return Ok(lock),
            _ => {}
        }
        // This takes the locked folder away too: another `up` may come before the next look.
        down::remove_all(name, progress)?;
        removed = true;
    }
}

/// Logs of a lab that did not come up, for whoever wants to know why; the folder, if there were any. It is new and root's
/// alone: a name that can be foreseen could be a link of another user.
fn keep_logs(state: &LabState) -> Result<Option<PathBuf>> {
    let mut logs = Vec::new();
    for dir in [&state.dir, &state.adaptd.dir].into_iter().chain(state.hosts.iter().map(|host| &host.dir)) {
        let Ok(entries) = fs::read_dir(dir) else { continue };
        logs.extend(entries.flatten().map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|ext| ext == "log")));
    }
    if logs.is_empty() {
        return Ok(None);
    }
    let folder = tempfile::Builder::new()
        .prefix(&format!("violin-lab-{}-failed-", state.name))
        .permissions(fs::Permissions::from_mode(0o700))
        .tempdir();
    let kept = folder.doing(|| format!("making a folder for logs in {}", std::env::temp_dir().display()))?.keep();
    for log in logs {
        let name = log.strip_prefix(&state.dir).unwrap_or(&log).to_string_lossy().replace('/', "-");
        fs::copy(&log, kept.join(name)).doing(|| format!("keeping {}", log.display()))?;
    }
    Ok(Some(kept))
}

/// Everything the lab will consist of, before any of it is there.
fn describe(config: &LabConfig, options: &UpOptions, topology: &Topology, listen: SocketAddr) -> LabState {
    let dir = state::dir(config.name.as_str());
    let libvirt = config.guests == Guests::Qemu && options.layers >= Layers::Libvirt;
    let hosts = topology.hosts.iter().zip(&config.hosts).map(|((name, station), wanted)| {
        let home = dir.join(name.as_str());
        let mut host = HostState {
            host: name.clone(),
            domain: wanted.domain.clone(),
            netns: station.netns.clone(),
            address: station.address,
            underlay_interface: UNDERLAY.to_owned(),
            mesh_port: daemons::MESH_PORT,
            switch_socket: home.join("switchd.sock"),
            dir: home,
            cores: wanted.cores,
            cpu_group: format!("violin-{}-{name}", config.name),
            libvirt_uri: None,
            libvirtd: None,
            switchd: None,
            monitord: None,
        };
        host.libvirt_uri = libvirt.then(|| libvirt::incoming_uri(&host));
        host
    });
    let routers = topology.routers.iter();
    LabState {
        name: config.name.to_string(),
        phase: Phase::Building,
        owner: options.owner.or_else(ProcessId::own),
        guests: config.guests,
        seed: config.wan.seed,
        binaries: options.binaries.clone(),
        image: None,
        routers: routers
            .map(|router| RouterState { domain: router.domain.clone(), netns: router.netns.clone(), subnet: router.subnet })
            .collect(),
        relay: None,
        hosts: hosts.collect(),
        adaptd: ManagerState {
            netns: topology.manager.netns.clone(),
            listen: Some(listen),
            socket: dir.join("adaptd/adaptd.sock"),
            dir: dir.join("adaptd"),
            process: None,
        },
        dir,
    }
}

struct Builder<'a> {
    config: &'a LabConfig,
    options: &'a UpOptions,
    topology: &'a Topology,
    state: LabState,
    progress: &'a mut dyn FnMut(&str),
}

/// An error once the operator wants out.
fn go_on(options: &UpOptions) -> Result<()> {
    match options.cancelled {
        Some(cancelled) if cancelled.load(Ordering::Relaxed) => Err(LabError::Cancelled),
        _ => Ok(()),
    }
}

impl Builder<'_> {
    fn build(&mut self, manager: &str, image: Option<&Image>) -> Result<()> {
        self.state.save()?;
        self.folders()?;
        (self.progress)(&format!(
            "{} hosts in {} domains: namespaces, control groups, WAN ({} one way, {} % lost, rate {})",
            self.state.hosts.len(),
            self.state.routers.len(),
            self.config.wan.delay,
            self.config.wan.loss,
            String::from(self.config.wan.rate),
        ));
        self.groups()?;
        self.network()?;
        self.relay()?;
        if let Some(image) = image {
            self.image(image)?;
        }
        if self.options.layers >= Layers::Libvirt && self.config.guests == Guests::Qemu {
            self.libvirt()?;
        }
        if self.options.layers >= Layers::All {
            self.daemons(manager)?;
        }
        go_on(self.options)?;
        self.state.phase = Phase::Up;
        self.state.save()
    }

    fn folders(&self) -> Result<()> {
        let hosts = self.state.hosts.iter().flat_map(|host| [host.dir.join("images"), host.dir.join("run")]);
        for dir in hosts.chain([self.state.adaptd.dir.clone(), self.state.dir.join("sandbox")]) {
            fs::create_dir_all(&dir).doing(|| format!("making {}", dir.display()))?;
        }
        Ok(())
    }

    fn groups(&self) -> Result<()> {
        cgroup::create(&self.state.daemon_group())?;
        for host in &self.state.hosts {
            cgroup::create(&cgroup::partition(&host.cpu_group))?;
        }
        Ok(())
    }

    fn network(&self) -> Result<()> {
        for netns in self.topology.namespaces() {
            go_on(self.options)?;
            netns::create(netns)?;
        }
        for router in &self.topology.routers {
            let at = Some(router.netns.as_str());
            netns::inside(&router.netns, || fs::write("/proc/sys/net/ipv4/ip_forward", "1"))?;
            // No snooping and no spanning tree: the underlay is a plain Ethernet, up at once.
            ip(at, &format!("link add {BRIDGE} type bridge mcast_snooping 0 stp_state 0"))?;
            ip(at, &format!("address add {}/{} dev {BRIDGE}", router.address, router.subnet.prefix_len()))?;
            ip(at, &format!("link set {BRIDGE} up"))?;
        }
        let stations = self.topology.hosts.iter().map(|(_, station)| station).chain([&self.topology.manager]);
        for (number, station) in stations.enumerate() {
            attach(&self.topology.routers[station.router], station, number)?;
        }
        Ok(())
    }

    fn relay(&mut self) -> Result<()> {
        let routers = &self.topology.routers;
        if routers.len() < 2 {
            return Ok(());
        }
        for router in routers {
            let at = Some(router.netns.as_str());
            ip(at, &format!("tuntap add mode tun name {}", relay::INTERFACE))?;
            ip(at, &format!("link set {} txqueuelen 5000 up", relay::INTERFACE))?;
            // Only what exists is routed: a packet to anywhere else is answered with "unreachable" at once, not lost in the
            // relay, so that a look-up of a name in here fails in no time.
            for other in routers.iter().filter(|other| other.netns != router.netns) {
                ip(at, &format!("route add {} dev {}", other.subnet, relay::INTERFACE))?;
            }
        }
        let wan = &self.config.wan;
        let plan = RelayPlan {
            ends: routers.iter().map(|router| relay::End { netns: router.netns.clone(), subnet: router.subnet }).collect(),
            delay_ns: u64::try_from(wan.delay.0.as_nanos()).unwrap_or(u64::MAX),
            loss_percent: wan.loss,
            bits_per_s: wan.rate.0,
            seed: wan.seed,
            ready: self.state.dir.join("relay.ready"),
        };
        let path = self.state.dir.join("relay.json");
        let text = serde_json::to_string_pretty(&plan).map_err(std::io::Error::from).doing(|| "writing relay.json".to_owned())?;
        fs::write(&path, text).doing(|| format!("writing {}", path.display()))?;

        let log = self.state.dir.join("relay.log");
        let [program, words @ ..] = self.options.helper.as_slice() else {
            return Err(LabError::no_helper());
        };
        // It runs in a router's namespace, so that it is found there even if its number was never recorded.
        let mut command = netns::spawn_in(&routers[0].netns, program)?;
        command.args(words).arg("relay").arg(&path);
        let process = daemons::spawn(command, "relay", &log)?;
        self.state.relay = Some(process);
        self.state.save()?;
        // Not among the other daemons: it schedules in real time, which a group without a share of that refuses.
        let options = self.options;
        wait_for("the WAN relay to carry packets", Duration::from_secs(10), Some(&log), || {
            go_on(options)?;
            daemons::check_alive("relay", process, &log)?;
            Ok(plan.ready.exists())
        })
    }

    /// Puts the image into the first host's store, where the other monitors will find it.
    fn image(&mut self, image: &Image) -> Result<()> {
        let Some(first) = self.state.hosts.first() else { return Ok(()) };
        (self.progress)(&format!("image {:.12} into the store of {}", image.digest.as_str(), first.host));
        image.put_into(&first.dir.join("images"))?;
        self.state.image = Some(image.digest.clone());
        self.state.save()
    }

    fn libvirt(&mut self) -> Result<()> {
        (self.progress)(&format!("starting {} libvirtds", self.state.hosts.len()));
        for index in 0..self.state.hosts.len() {
            go_on(self.options)?;
            let process = libvirt::start(&self.state, &self.state.hosts[index], &self.options.helper)?;
            self.state.hosts[index].libvirtd = Some(process);
            self.state.save()?;
        }
        let options = self.options;
        for host in &self.state.hosts {
            if let Some(process) = host.libvirtd {
                libvirt::wait_ready(host, process, &|| go_on(options))?;
            }
        }
        go_on(options)?;
        (self.progress)("asking QEMU once what it can do");
        libvirt::learn_abilities(&self.state.hosts)
    }

    fn daemons(&mut self, manager: &str) -> Result<()> {
        (self.progress)("certificates and configuration; starting switchd and monitord on each host, adaptd for all");
        let mut named: Vec<(HostId, DomainId)> =
            self.state.hosts.iter().map(|host| (host.host.clone(), host.domain.clone())).collect();
        if let Some(first) = self.topology.routers.first() {
            named.push((daemons::manager_name()?, first.domain.clone()));
        }
        pki::write_pki(&self.state.dir.join("pki"), &format!("violin lab {}", self.state.name), &named)?;
        for host in &self.state.hosts {
            daemons::configure_host(self.config, &self.state, host)?;
        }
        let file = self.state.adaptd.dir.join("adaptd.toml");
        fs::write(&file, manager).doing(|| format!("writing {}", file.display()))?;

        let options = self.options;
        let process = daemons::start(&self.state, "adaptd", &self.state.adaptd.netns, &file)?;
        self.state.adaptd.process = Some(process);
        self.state.save()?;
        for index in 0..self.state.hosts.len() {
            go_on(options)?;
            let host = &self.state.hosts[index];
            let file = host.dir.join("switchd.toml");
            let process = daemons::start(&self.state, "switchd", &host.netns, &file)?;
            self.state.hosts[index].switchd = Some(process);
            self.state.save()?;
            let host = &self.state.hosts[index];
            let what = format!("switchd of {}", host.host);
            daemons::wait_socket(&what, &host.switch_socket, process, &file.with_extension("log"), &|| go_on(options))?;
            let process = daemons::start(&self.state, "monitord", &host.netns, &host.dir.join("monitord.toml"))?;
            self.state.hosts[index].monitord = Some(process);
            self.state.save()?;
        }
        let log = file.with_extension("log");
        daemons::wait_socket("adaptd", &self.state.adaptd.socket, process, &log, &|| go_on(options))?;
        daemons::wait_hosts(&self.state, &|| go_on(options))
    }
}

/// Connects a station's namespace to its domain's bridge. Both ends are made in place: the machine's own namespace never
/// sees an interface of a lab.
fn attach(router: &Router, station: &Station, number: usize) -> Result<()> {
    let (there, port) = (&router.netns, format!("port{number}"));
    ip(None, &format!("link add {UNDERLAY} netns {} type veth peer name {port} netns {there}", station.netns))?;
    ip(Some(there), &format!("link set {port} master {BRIDGE} up"))?;
    let at = Some(station.netns.as_str());
    ip(at, &format!("address add {}/{} dev {UNDERLAY}", station.address, router.subnet.prefix_len()))?;
    ip(at, &format!("link set {UNDERLAY} up"))?;
    ip(at, &format!("route add default via {}", router.address))?;
    if router.wire == Wire::Segmented {
        for (netns, interface) in [(&station.netns, UNDERLAY), (there, port.as_str())] {
            let mut ethtool = Command::new("ethtool");
            netns::enter(&mut ethtool, netns)?.args(["-K", interface, "tso", "off", "gso", "off"]).args([
                "tx-udp-segmentation",
                "off",
                "tx-udp_tnl-segmentation",
                "off",
                "tx-udp_tnl-csum-segmentation",
                "off",
            ]);
            netns::run(&mut ethtool)?;
        }
    }
    Ok(())
}
