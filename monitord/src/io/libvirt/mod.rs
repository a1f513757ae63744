//! The driver for QEMU under libvirt.
//!
//! Owns one connection to the host's libvirtd (`link.rs`) and the TAP interfaces of its VMs (`tap.rs`). Domains are transient:
//! libvirtd is the only place that knows which run, so nothing here can disagree with it. Read `domain.rs` for what a VM is
//! to libvirt, then `migrate.rs`.

mod domain;
mod emulators;
mod events;
mod link;
mod migrate;
mod parameters;
mod sys;
mod tap;

use crate::hypervisor::{
    Hypervisor, HypervisorError, HypervisorEvent, ImageFiles, MoveStatistics, Scheduled, Usage, Whereabouts,
};
use crate::io::cgroup::{Hierarchies, weight};
use domain::Places;
use emulators::Emulators;
use events::{Session, Sink, lock, ours};
use link::Link;
use migrate::Incoming;
use parameters::{Value, number};
use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use sys::{Domain, Failure};
use violin_common::config::monitor::{Accel, Driver, MonitorConfig};
use violin_common::control::monitor::{MigrationMode, VmSeen, VmSpec, VmState};
use violin_common::{HostId, VmId};
use virt::sys as raw;

/// Length of a CFS period, in microseconds. With 10 ms guests hung while booting under a quota; with 100 ms none did.
const CPU_PERIOD: u64 = 100_000;

/// What the driver is told at start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The host's libvirtd.
    pub uri: String,
    /// The same, as other hosts reach it.
    pub incoming_uri: String,
    /// Address to which the memory of arriving VMs is sent.
    pub migrate_address: IpAddr,
    /// How QEMU runs guest code.
    pub accel: Accel,
    /// Partition every domain is put in, if any.
    pub cpu_group: Option<String>,
    /// Directory for consoles and guest configurations; libvirtd and QEMU must see it under the same path.
    pub run: PathBuf,
}

impl Settings {
    /// Takes them from a monitor's configuration; none if that names another driver.
    pub fn from_config(config: &MonitorConfig) -> Option<Self> {
        let Driver::Libvirt { uri, incoming_uri, migrate_address, accel } = &config.driver else { return None };
        Some(Self {
            uri: uri.clone(),
            incoming_uri: incoming_uri.clone(),
            migrate_address: *migrate_address,
            accel: *accel,
            cpu_group: config.capacity.cpu_group.clone(),
            run: config.run.clone(),
        })
    }
}

/// QEMU under libvirt.
#[derive(Debug)]
pub struct Libvirt {
    settings: Settings,
    link: Arc<Link>,
    sink: Arc<Sink>,
    events: Mutex<Option<Receiver<HypervisorEvent>>>,
    /// Moves away from this host under way, each with whether it shall be given up.
    leaving: Mutex<BTreeMap<VmId, Arc<AtomicBool>>>,
    emulators: Emulators,
}

impl Libvirt {
    /// Starts the driver, in the calling thread's network namespace. libvirtd may come up later.
    ///
    /// Errors: the directories for run-time files cannot be made, or a thread not be started.
    pub fn start(settings: Settings) -> std::io::Result<Self> {
        fs::create_dir_all(settings.run.join("console"))?;
        super::private::folder(&settings.run.join("guest"))?;
        let (sender, receiver) = channel();
        let sink = Arc::new(Sink::new(sender, settings.run.clone()));
        let link = Link::start(settings.uri.clone(), settings.accel, sink.clone())?;
        let events = Mutex::new(Some(receiver));
        Ok(Self { settings, link, sink, events, leaving: Mutex::default(), emulators: Emulators::here() })
    }

    /// The connection and, if it is here, the VM's domain.
    fn find(&self, vm: &VmId) -> Result<(Arc<Session>, Option<Domain>), HypervisorError> {
        let session = self.link.session()?;
        let found = session.connection.domain(&domain::uuid(vm)).map_err(|f| refused(&session, format!("finding {vm}"), &f))?;
        Ok((session, found))
    }

    fn domain(&self, vm: &VmId) -> Result<(Arc<Session>, Domain), HypervisorError> {
        match self.find(vm)? {
            (session, Some(domain)) => Ok((session, domain)),
            (_, None) => Err(HypervisorError::NotHere(vm.clone())),
        }
    }

    /// Checks that everything a VM needs is on this host, and writes what QEMU reads at its start.
    fn places(&self, spec: &VmSpec, interface: &str, image: Option<&ImageFiles>) -> Result<Places, HypervisorError> {
        let asked = || format!("making ready for {}", spec.vm);
        let Some(image) = image else {
            return Err(HypervisorError::Refused { asked: asked(), said: "got no image; a QEMU guest needs one".into() });
        };
        for file in [&image.kernel, &image.initrd, &image.root] {
            if let Err(error) = fs::File::open(file) {
                let said = format!("{}: {error}; fetch the image again", file.display());
                return Err(HypervisorError::Refused { asked: asked(), said });
            }
        }
        if !tap::exists(interface) {
            return Err(HypervisorError::Refused {
                asked: asked(),
                said: format!("no interface {interface} here; make it first"),
            });
        }
        let guest_config = guest_config(&self.settings.run, &spec.vm);
        if let Err(error) = super::private::write(&guest_config, &spec.guest_config) {
            return Err(HypervisorError::Refused { asked: asked(), said: format!("{}: {error}", guest_config.display()) });
        }
        Ok(Places {
            kernel: image.kernel.clone(),
            initrd: image.initrd.clone(),
            root: image.root.clone(),
            console: self.console(&spec.vm),
            guest_config,
            interface: interface.to_owned(),
            cpu_group: self.settings.cpu_group.clone(),
        })
    }

    /// How a domain of ours is, and whether it is on its way to another host.
    fn seen(&self, vm: VmId, domain: &Domain) -> Result<VmSeen, Failure> {
        let (state, reason) = domain.state()?;
        // libvirt tells of a job at its source only: at the destination this is an error.
        let job = domain.job(false);
        let operation = job.as_ref().ok().and_then(|(_, statistics)| number(statistics, "operation"));
        let leaving =
            lock(&self.leaving).contains_key(&vm) || operation == Some(raw::VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT.into());
        let arriving = !leaving && job.is_err();
        let state = match (state, reason) {
            (raw::VIR_DOMAIN_RUNNING | raw::VIR_DOMAIN_BLOCKED, _) => VmState::Running,
            (raw::VIR_DOMAIN_PAUSED, raw::VIR_DOMAIN_PAUSED_MIGRATION | raw::VIR_DOMAIN_PAUSED_STARTING_UP) if arriving => {
                VmState::Arriving
            }
            (raw::VIR_DOMAIN_PAUSED, raw::VIR_DOMAIN_PAUSED_STARTING_UP) => VmState::Booting,
            (raw::VIR_DOMAIN_PAUSED, _) => VmState::Paused,
            _ => VmState::Stopped,
        };
        Ok(VmSeen { vm, state, leaving })
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        self.link.end();
    }
}

/// An error of libvirt as ours: lost connections are told from refusals.
fn refused(session: &Session, asked: String, failure: &Failure) -> HypervisorError {
    if session.closed().is_broken() || !session.connection.is_alive() {
        return HypervisorError::Unreachable(format!("{asked}: {failure}"));
    }
    HypervisorError::Refused { asked, said: failure.to_string() }
}

/// Whether a failure only says that the domain ended meanwhile.
fn is_gone(failure: &Failure) -> bool {
    failure.code == raw::VIR_ERR_NO_DOMAIN
        || (failure.code == raw::VIR_ERR_OPERATION_INVALID && failure.message.contains("domain is not running"))
}

impl Hypervisor for Libvirt {
    fn name(&self) -> &'static str {
        "libvirt"
    }

    fn make_interface(&self, spec: &VmSpec, _arriving: bool) -> Result<String, HypervisorError> {
        let name = tap::name(&spec.vm);
        tap::make(&name, spec.network.mtu).map_err(|error| HypervisorError::Refused {
            asked: format!("making interface {name} for {}", spec.vm),
            said: error.to_string(),
        })?;
        Ok(name)
    }

    fn remove_interface(&self, vm: &VmId) -> Result<(), HypervisorError> {
        let name = tap::name(vm);
        tap::remove(&name).map_err(|error| HypervisorError::Refused {
            asked: format!("removing interface {name} of {vm}"),
            said: error.to_string(),
        })
    }

    fn start(&self, spec: &VmSpec, interface: &str, image: Option<&ImageFiles>) -> Result<(), HypervisorError> {
        let (session, found) = self.find(&spec.vm)?;
        let asked = || format!("starting {}", spec.vm);
        if let Some(domain) = found {
            let seen = self.seen(spec.vm.clone(), &domain).map_err(|f| refused(&session, asked(), &f))?;
            return match seen.state {
                VmState::Running => Ok(()), // asked again
                state => Err(HypervisorError::Refused {
                    asked: asked(),
                    said: format!("it is here already and {state:?}; stop it first"),
                }),
            };
        }
        let places = self.places(spec, interface, image)?;
        // QEMU appends: a new life starts a new console.
        let _ = fs::remove_file(&places.console);
        let xml = domain::describe(spec, &places, self.settings.accel);
        let created = session.connection.create(&xml);
        // QEMU has read it, or never will.
        let _ = fs::remove_file(&places.guest_config);
        created.map(drop).map_err(|f| refused(&session, asked(), &f))
    }

    fn stop(&self, vm: &VmId) -> Result<(), HypervisorError> {
        let (session, found) = self.find(vm)?;
        // Of an arrival that was prepared and never came.
        let _ = fs::remove_file(guest_config(&self.settings.run, vm));
        match found.map(|domain| domain.destroy()) {
            Some(Err(failure)) if !is_gone(&failure) => Err(refused(&session, format!("stopping {vm}"), &failure)),
            _ => Ok(()),
        }
    }

    fn list(&self) -> Result<Vec<VmSeen>, HypervisorError> {
        let session = self.link.session()?;
        let domains = session.connection.domains().map_err(|f| refused(&session, "listing domains".into(), &f))?;
        let mut seen = Vec::new();
        for domain in domains {
            let Some(vm) = ours(&domain) else { continue };
            match self.seen(vm.clone(), &domain) {
                Ok(vm) => seen.push(vm),
                Err(failure) if is_gone(&failure) => {} // between the two calls
                Err(failure) => return Err(refused(&session, format!("asking how {vm} is"), &failure)),
            }
        }
        Ok(seen)
    }

    fn console(&self, vm: &VmId) -> PathBuf {
        console(&self.settings.run, vm)
    }

    fn prepare_incoming(&self, spec: &VmSpec, interface: &str, image: Option<&ImageFiles>) -> Result<String, HypervisorError> {
        let session = self.link.session()?;
        let asked = || format!("making ready for {}", spec.vm);
        let taken = session.connection.domain_named(spec.vm.as_str()).map_err(|f| refused(&session, asked(), &f))?;
        if taken.is_some() {
            return Err(HypervisorError::Refused {
                asked: asked(),
                said: "a domain of that name is here already; cancel its arrival or stop it first".into(),
            });
        }
        let incoming = Incoming {
            connect: self.settings.incoming_uri.clone(),
            migrate: migrate::memory_uri(self.settings.migrate_address),
            places: self.places(spec, interface, image)?,
        };
        Ok(incoming.to_string())
    }

    fn cancel_incoming(&self, vm: &VmId) -> Result<(), HypervisorError> {
        let (session, found) = self.find(vm)?;
        let _ = fs::remove_file(guest_config(&self.settings.run, vm));
        let Some(domain) = found else { return Ok(()) };
        let asked = || format!("cancelling the arrival of {vm}");
        let ended = self.seen(vm.clone(), &domain).and_then(|seen| match seen.state {
            VmState::Running | VmState::Booting => Ok(false),
            _ if seen.leaving => Ok(false),
            _ => domain.destroy().map(|()| true),
        });
        match ended {
            Ok(true) => Ok(()),
            Ok(false) => Err(HypervisorError::Refused { asked: asked(), said: "it runs here already; stop it instead".into() }),
            Err(failure) if is_gone(&failure) => Ok(()),
            Err(failure) => Err(refused(&session, asked(), &failure)),
        }
    }

    fn migrate(
        &self,
        vm: &VmId,
        to: &HostId,
        uri: &str,
        mode: MigrationMode,
        progress: &mut dyn FnMut(Option<f64>, &str),
    ) -> Result<MoveStatistics, HypervisorError> {
        migrate::migrate(self, vm, to, uri, mode, progress)
    }

    fn settle(&self, vm: &VmId, uri: &str) -> Result<Whereabouts, HypervisorError> {
        migrate::whereabouts(self, vm, uri)
    }

    fn abort(&self, vm: &VmId) -> Result<(), HypervisorError> {
        migrate::abort(self, vm)
    }

    fn usage(&self, vm: &VmId) -> Result<Usage, HypervisorError> {
        let (session, domain) = self.domain(vm)?;
        let statistics = match domain.statistics(raw::VIR_DOMAIN_STATS_VCPU | raw::VIR_DOMAIN_STATS_BALLOON) {
            Ok(statistics) => statistics,
            Err(failure) if is_gone(&failure) => {
                self.emulators.forget(vm);
                return Err(HypervisorError::NotHere(vm.clone()));
            }
            Err(failure) => return Err(refused(&session, format!("asking what {vm} used"), &failure)),
        };
        let sum = |kind: &str| {
            let of_vcpu = |name: &str| name.starts_with("vcpu.") && name.ends_with(kind);
            statistics.iter().filter(|(name, _)| of_vcpu(name)).filter_map(|(name, _)| number(&statistics, name)).sum()
        };
        let kib = number(&statistics, "balloon.rss").or_else(|| number(&statistics, "balloon.current")).unwrap_or(0);
        let scheduled =
            self.emulators.vcpus(vm).map(|seen| Scheduled { slices: seen.slices, sleeps: seen.sleeps, ready: seen.ready });
        Ok(Usage { run_ns: sum(".time"), wait_ns: sum(".delay"), scheduled, memory_bytes: kib * 1024 })
    }

    fn set_memory(&self, vm: &VmId, memory_mib: u64) -> Result<(), HypervisorError> {
        let (session, domain) = self.domain(vm)?;
        domain
            .set_memory(memory_mib.saturating_mul(1024))
            .map_err(|f| refused(&session, format!("setting the memory of {vm} to {memory_mib} MiB"), &f))
    }

    fn set_cpu(&self, vm: &VmId, shares: u64, cap: Option<f64>) -> Result<(), HypervisorError> {
        let (session, domain) = self.domain(vm)?;
        let asked = || format!("setting the CPU weight of {vm} to {shares}, its cap to {cap:?}");
        let vcpus = domain.vcpus().map_err(|f| refused(&session, asked(), &f))?;
        let quota = match cap {
            None => -1,
            Some(cap) if cap > 0.0 && cap.is_finite() => quota(cap, vcpus),
            Some(cap) => {
                return Err(HypervisorError::Refused {
                    asked: asked(),
                    said: format!("got a cap of {cap}, want more than 0 vCPUs"),
                });
            }
        };
        // libvirt hands the figure on as it is, be it shares or, without a v1 tree, a weight.
        let v1 = Hierarchies::detect().is_ok_and(|trees| trees.v1.contains_key("cpu"));
        let shares = if v1 { shares } else { weight(shares) };
        let parameters = [
            (c"cpu_shares", Value::Unsigned(shares)),
            (c"vcpu_period", Value::Unsigned(CPU_PERIOD)),
            (c"vcpu_quota", Value::Signed(quota)),
        ];
        domain.set_scheduler(&parameters).map_err(|f| refused(&session, asked(), &f))
    }

    fn events(&self) -> Option<Receiver<HypervisorEvent>> {
        lock(&self.events).take()
    }
}

/// Quota of each vCPU in microseconds a period, for a cap of all together; at least the kernel's smallest, 1 ms.
fn quota(cap: f64, vcpus: u32) -> i64 {
    let quota = cap / f64::from(vcpus.max(1)) * CPU_PERIOD as f64;
    (quota as i64).max(1000)
}

/// Where a VM's configuration lies until its QEMU has read it: it may hold keys.
fn guest_config(run: &Path, vm: &VmId) -> PathBuf {
    run.join("guest").join(vm.as_str())
}

fn console(run: &Path, vm: &VmId) -> PathBuf {
    run.join("console").join(format!("{vm}.log"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cap_is_shared_by_the_vcpus() {
        assert_eq!(quota(1.0, 2), 50_000);
        assert_eq!(quota(0.0001, 1), 1000);
    }
}
