//! Starting and ending a VM.

use super::{Monitor, Trouble, Vm};
use crate::hypervisor::{HypervisorError, ImageFiles};
use crate::io::cgroup::HostGroup;
use crate::io::console::{self, is_ready};
use crate::io::record::Record;
use crate::transaction::{Made, Part, Standing};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant as Clock};
use violin_common::control::monitor::{Answer, VmSeen, VmSpec, VmState};
use violin_common::{Epoch, VmId};

/// How often a booting guest's console is read.
const LOOK: Duration = Duration::from_millis(100);
/// A guest not up by then no longer holds the quota off the whole host.
pub(super) const BOOT_LIMIT: Duration = Duration::from_secs(180);

impl Monitor {
    pub(super) fn start(
        self: &Arc<Self>,
        spec: &VmSpec,
        epoch: Epoch,
        sources: &[SocketAddr],
        progress: &mut dyn FnMut(Answer),
    ) -> Result<(), Trouble> {
        let vm = &spec.vm;
        let known = super::lock(&self.vms).get(vm).map(|known| known.record.standing.clone());
        let seen = self.list()?.into_iter().find(|seen| &seen.vm == vm && seen.state != VmState::Stopped);
        match (known, seen) {
            (Some(Standing::Here), Some(_)) => return Ok(()),
            (Some(standing), Some(_)) => return Err(format!("{vm} is {standing:?} on this host; end that first")),
            _ => {}
        }
        let mut made = Made::default();
        self.make(spec, epoch, sources, progress, &mut made).map_err(|words| self.undo(vm, made, &words))
    }

    fn make(
        &self,
        spec: &VmSpec,
        epoch: Epoch,
        sources: &[SocketAddr],
        progress: &mut dyn FnMut(Answer),
        made: &mut Made,
    ) -> Result<(), Trouble> {
        let vm = &spec.vm;
        let image = self.image(spec, sources, progress)?;
        made.begin(Part::Interface);
        let interface = self.hypervisor.make_interface(spec, false).map_err(|error| error.to_string())?;
        let record = Record {
            spec: spec.clone(),
            interface: interface.clone(),
            epoch: Some(epoch),
            ready: false,
            standing: Standing::Here,
        };
        let mut known = Vm::new(record.clone(), VmState::Booting);
        known.booting = Some(Clock::now());
        made.begin(Part::Guest);
        self.clear_console(vm)?;
        self.remember(known)?;
        made.begin(Part::Port);
        self.attach(&record)?;
        // Boot code measures time: behind a full quota it takes minutes, or hangs.
        self.set_quota();
        progress(Answer::Progress { part: None, doing: "starting".into() });
        self.hypervisor.start(spec, &interface, image.as_ref()).map_err(|error| error.to_string())
    }

    pub(super) fn clear_console(&self, vm: &VmId) -> Result<(), Trouble> {
        let path = self.hypervisor.console(vm);
        console::begin(&path).map_err(|error| format!("removing an earlier console {}: {error}", path.display()))
    }

    /// Finds the VM's image here or fetches it.
    pub(super) fn image(
        &self,
        spec: &VmSpec,
        sources: &[SocketAddr],
        progress: &mut dyn FnMut(Answer),
    ) -> Result<Option<ImageFiles>, Trouble> {
        let Some(digest) = &spec.image else { return Ok(None) };
        let mut tell = |part, doing: String| progress(Answer::Progress { part, doing });
        self.images.ensure(digest, sources, &mut tell).map(Some).map_err(|error| error.to_string())
    }

    /// Undoes what a command made; returns why, and what could not be undone.
    pub(super) fn undo(self: &Arc<Self>, vm: &VmId, made: Made, why: &str) -> Trouble {
        let mut left = Vec::new();
        for part in made.undo() {
            let undone = match part {
                Part::Interface => self.remove_interface(vm),
                Part::Port => self.switch.remove_ports(vm).map_err(|error| error.to_string()),
                Part::Incoming => match self.hypervisor.cancel_incoming(vm) {
                    // Nobody can start it here while the hypervisor is away; it is told when it is back.
                    Err(HypervisorError::Unreachable(_)) => {
                        self.cancel_later(vm);
                        Ok(())
                    }
                    other => other.map_err(|error| error.to_string()),
                },
                Part::Guest => {
                    let stopped = self.hypervisor.stop(vm).map_err(|error| error.to_string());
                    self.forget(vm);
                    stopped
                }
            };
            if let Err(error) = undone {
                left.push(format!("{part:?}: {error}"));
            }
        }
        self.forget(vm);
        self.set_quota();
        if left.is_empty() { format!("{why}; all undone") } else { format!("{why}; not undone: {}", left.join("; ")) }
    }

    /// Ends a VM. While one asker waits for that, another is refused: who asks again every few seconds must not fill the host
    /// with threads that wait.
    pub(super) fn stop_once(&self, vm: &VmId) -> Result<(), Trouble> {
        // One that is being moved must not be waited for until it has gone. Each asker says so anew: at first the hypervisor may
        // have no job yet that it could abort.
        let _ = self.hypervisor.abort(vm);
        self.stops.at_once(vm, |first| {
            if !first {
                return Err(format!("{vm} is being stopped already; ask again when that, and what it waits for, is done"));
            }
            self.alone(vm, || self.stop(vm))
        })
    }

    pub(super) fn stop(&self, vm: &VmId) -> Result<(), Trouble> {
        let mut troubles = Vec::new();
        let mut note = |result: Result<(), Trouble>| troubles.extend(result.err());
        note(self.hypervisor.stop(vm).map_err(|error| error.to_string()));
        note(self.switch.remove_ports(vm).map_err(|error| error.to_string()));
        note(self.remove_interface(vm));
        if troubles.is_empty() {
            let was_known = super::lock(&self.vms).contains_key(vm);
            self.forget(vm);
            self.set_quota();
            if was_known {
                self.report(VmSeen { vm: vm.clone(), state: VmState::Stopped, leaving: false });
            }
            Ok(())
        } else {
            Err(troubles.join("; "))
        }
    }

    /// Watches the consoles of booting guests.
    pub(super) fn watch_boots(self: &Arc<Self>) {
        let monitor = Arc::downgrade(self);
        std::thread::spawn(move || {
            while let Some(monitor) = monitor.upgrade() {
                monitor.look_at_boots();
                if let Some(Err(error)) = monitor.group.as_ref().map(HostGroup::release_emulators) {
                    tracing::warn!(%error, "taking emulators out of the guests' quota; trying again");
                }
                drop(monitor);
                std::thread::sleep(LOOK);
            }
        });
    }

    fn look_at_boots(&self) {
        let booting: Vec<VmId> = super::lock(&self.vms)
            .values()
            .filter(|vm| vm.state == VmState::Booting)
            .map(|vm| vm.record.spec.vm.clone())
            .collect();
        for vm in booting {
            if is_ready(&self.hypervisor.console(&vm)) {
                tracing::info!(vm = %vm, "guest is up");
                self.change(&vm, |vm| {
                    vm.record.ready = true;
                    vm.booting = None;
                    // Not one that was stopped or moved between the look and now.
                    if vm.state == VmState::Booting {
                        vm.state = VmState::Running;
                    }
                });
            }
        }
        self.set_quota();
    }
}
