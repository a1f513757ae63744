//! What the hypervisor tells, and what the switch is told of it at once.

use super::{Monitor, Trouble, Vm, lock};
use crate::hypervisor::{Change, HypervisorEvent};
use crate::io::switch::SwitchError;
use crate::io::{clock, proc};
use crate::transaction::{Fabric, Standing, on_change};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant as Clock};
use violin_common::VmId;
use violin_common::api::switch::{MoveSeen, MoveState, SwitchRequest};
use violin_common::control::monitor::{VmSeen, VmState};

/// How long the switch is asked again when it cannot be reached: a restart of it takes less.
const TELL_LIMIT: Duration = Duration::from_secs(10);
/// How long a switch that does not own the MAC of an arrived VM is left in peace before it is told again.
const TELL_AGAIN: Duration = Duration::from_millis(500);
/// How long the first frame read after an arrival is waited for.
pub(super) const READ_LIMIT: Duration = Duration::from_secs(3);
/// How often the interface's counter is read meanwhile; it is the resolution of that figure.
const READ_LOOK: Duration = Duration::from_millis(1);
/// Between two tries to ask a hypervisor that is away whether a VM has ended.
const ASK_AGAIN: Duration = Duration::from_secs(1);

impl Monitor {
    /// Handles events in order for each VM, different VMs side by side: a move must not wait for another's.
    pub(super) fn follow_events(self: &Arc<Self>) {
        let Some(events) = self.hypervisor.events() else {
            tracing::error!("the driver's events were taken already");
            return;
        };
        let monitor = Arc::clone(self);
        std::thread::spawn(move || {
            let mut queues: HashMap<VmId, Sender<HypervisorEvent>> = HashMap::new();
            for event in events {
                // Those of VMs that are gone end with their last event.
                queues.retain(|vm, _| lock(&monitor.vms).contains_key(vm));
                if !lock(&monitor.vms).contains_key(&event.vm) {
                    tracing::debug!(vm = %event.vm, change = ?event.change, "event of a VM not known here");
                    continue;
                }
                let queue = match queues.entry(event.vm.clone()) {
                    Entry::Occupied(queue) => queue.into_mut(),
                    Entry::Vacant(place) => match monitor.queue() {
                        Ok(queue) => place.insert(queue),
                        Err(error) => {
                            tracing::error!(vm = %event.vm, %error, "no thread for its events; those of other VMs wait");
                            monitor.on_event(&event);
                            continue;
                        }
                    },
                };
                // Its thread ends only with its queue.
                let _ = queue.send(event);
            }
        });
    }

    /// A queue of events and the thread that handles them.
    fn queue(self: &Arc<Self>) -> std::io::Result<Sender<HypervisorEvent>> {
        let (queue, own) = channel::<HypervisorEvent>();
        let monitor = Arc::clone(self);
        let handle = move || own.into_iter().for_each(|event| monitor.on_event(&event));
        std::thread::Builder::new().spawn(handle).map(|_| queue)
    }

    /// Works beside the handling of events, which must not end because there is no thread: without one the work is left out.
    fn beside(vm: &VmId, what: &str, work: impl FnOnce() + Send + 'static) {
        if let Err(error) = std::thread::Builder::new().spawn(work) {
            tracing::error!(vm = %vm, %error, what, "no thread for it; left out");
        }
    }

    fn on_event(self: &Arc<Self>, event: &HypervisorEvent) {
        let vm = &event.vm;
        let Some(known) = lock(&self.vms).get(vm).cloned() else {
            tracing::debug!(vm = %vm, change = ?event.change, "event of a VM not known here");
            return;
        };
        tracing::info!(vm = %vm, change = ?event.change, standing = ?known.record.standing, "hypervisor");
        let told = on_change(&known.record.standing, event.change);
        // Before the switch lets held frames through.
        let read = packets_read(&known);
        if let Some(fabric) = told {
            self.tell_fabric(&known, fabric);
        }
        match (&known.record.standing, event.change) {
            (Standing::Arriving { .. }, Change::Running) => {
                self.change(vm, |vm| vm.arrival.resumed = Some(event.at));
                self.await_first_read(vm, read);
                self.settle_arrival(vm);
            }
            (Standing::Here, Change::Ended) => {
                // A command at work on this VM may be what ended it, and is waited for.
                self.clear_ended(vm);
            }
            // The commands that move it say what becomes of it; one that stays is looked for again.
            (Standing::Arriving { .. }, _) | (Standing::Leaving { .. }, Change::Ended) => {}
            (_, Change::Stopped) => {
                self.change(vm, |vm| {
                    vm.stopped = Some(event.at);
                    vm.state = VmState::Paused;
                });
            }
            (_, Change::Running) => {
                self.change(vm, |vm| {
                    if vm.state == VmState::Paused {
                        vm.state = if vm.record.ready { VmState::Running } else { VmState::Booting };
                    }
                });
            }
        }
    }

    /// Tells the switch, again and again while it cannot be reached. What it refuses is said: it is asked about the move's
    /// end by the command under way.
    pub(super) fn tell_fabric(&self, vm: &Vm, fabric: Fabric) {
        let (vni, mac) = (vm.record.spec.network.vni, vm.record.spec.mac);
        let request = match fabric {
            Fabric::Stopped => SwitchRequest::MoveStopped { vni, mac },
            Fabric::Running => SwitchRequest::MoveRunning { vni, mac },
        };
        let deadline = Clock::now() + TELL_LIMIT;
        loop {
            match self.switch.tell(&request) {
                Err(SwitchError::Unreachable { .. }) if Clock::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(error) => {
                    tracing::warn!(vm = %vm.record.spec.vm, ?fabric, %error, "telling the switch");
                    return;
                }
                Ok(()) => return,
            }
        }
    }

    /// Waits until this switch owns the arrived VM's MAC, then knows the VM as running here. If that takes too long it is
    /// known as running here too, but without an epoch, and the switch is told further on a thread of its own.
    pub(super) fn settle_arrival(self: &Arc<Self>, vm: &VmId) {
        let deadline = Clock::now() + TELL_LIMIT;
        let mut again = Clock::now() + TELL_AGAIN;
        let Some(known) = lock(&self.vms).get(vm).cloned() else { return };
        let spec = &known.record.spec;
        loop {
            let status = self.switch.move_status(spec.network.vni, spec.mac);
            let owned = status.as_ref().is_ok_and(|seen| seen.state == MoveState::Owned);
            if owned {
                self.arrived(vm, status.ok());
                return;
            }
            if Clock::now() > deadline {
                tracing::error!(vm = %vm, ?status, "the VM runs here, but the switch does not own its MAC; it is told again");
                self.arrived(vm, None);
                self.own_later(vm);
                return;
            }
            // A switch that started anew had no port when it was told, or has forgotten it.
            if Clock::now() > again {
                self.tell_fabric(&known, Fabric::Running);
                again = Clock::now() + TELL_AGAIN;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Knows an arrived VM as running here, and its MAC as owned if the switch has said so.
    fn arrived(&self, vm: &VmId, owned: Option<MoveSeen>) {
        self.change(vm, |vm| {
            if matches!(vm.record.standing, Standing::Arriving { .. }) {
                vm.record.standing = Standing::Here;
                vm.state = if vm.record.ready { VmState::Running } else { VmState::Booting };
            }
            vm.owned = owned.is_some();
            if let Some(seen) = owned {
                vm.record.epoch = Some(seen.epoch);
                vm.arrival.fabric = Some(seen);
            }
        });
    }

    /// Tells the switch that an arrived VM runs, again and again until it owns its MAC or the VM is no longer here.
    pub(super) fn own_later(self: &Arc<Self>, vm: &VmId) {
        let (weak, owned) = (Arc::downgrade(self), vm.clone());
        Self::beside(vm, "owning its MAC", move || {
            let vm = owned;
            loop {
                std::thread::sleep(TELL_AGAIN);
                let Some(monitor) = weak.upgrade() else { return };
                let Some(known) = lock(&monitor.vms).get(&vm).cloned() else { return };
                match known.record.standing {
                    _ if known.record.epoch.is_some() => return,
                    Standing::Arriving { .. } => return,
                    Standing::Here if known.state != VmState::Paused => {}
                    // A try to move it away fails while it is not owned.
                    Standing::Here | Standing::Leaving { .. } => continue,
                }
                monitor.tell_fabric(&known, Fabric::Running);
                let spec = &known.record.spec;
                match monitor.switch.move_status(spec.network.vni, spec.mac) {
                    Ok(seen) if seen.state == MoveState::Owned => {
                        tracing::info!(vm = %vm, "the switch owns its MAC at last");
                        return monitor.arrived(&vm, Some(seen));
                    }
                    status => tracing::debug!(vm = %vm, ?status, "not owned yet"),
                }
            }
        });
    }

    /// Notes when more than `before` frames have been read, on a thread of its own: further events must not wait for it.
    fn await_first_read(self: &Arc<Self>, vm: &VmId, before: u64) {
        let Some(known) = lock(&self.vms).get(vm).cloned() else { return };
        let monitor = Arc::clone(self);
        Self::beside(vm, "looking for its first frame", move || {
            let vm = &known.record.spec.vm;
            let deadline = Clock::now() + READ_LIMIT;
            while Clock::now() < deadline {
                if packets_read(&known) > before {
                    let at = clock::now();
                    monitor.change(vm, |vm| vm.arrival.first_read = Some(at));
                    return;
                }
                std::thread::sleep(READ_LOOK);
            }
            tracing::info!(vm = %vm, "nothing was sent to the VM in the first seconds after its arrival");
        });
    }

    /// Clears away a VM that may have ended by itself, on a thread of its own: at once when no command is at work on it and the
    /// hypervisor can be asked.
    pub(super) fn clear_ended(self: &Arc<Self>, vm: &VmId) {
        let (weak, ended) = (Arc::downgrade(self), vm.clone());
        Self::beside(vm, "clearing it away", move || {
            let vm = ended;
            while let Some(monitor) = weak.upgrade() {
                match monitor.alone(&vm, || monitor.ended(&vm)) {
                    Ok(_) => return,
                    Err(error) => tracing::warn!(vm = %vm, %error, "it may have ended; asking again"),
                }
                drop(monitor);
                std::thread::sleep(ASK_AGAIN);
            }
        });
    }

    /// Clears away a VM that ended by itself, unless it is known no more or runs; says whether it did. A hypervisor that cannot
    /// be asked is an error: it says nothing of the VM.
    pub(super) fn ended(&self, vm: &VmId) -> Result<bool, Trouble> {
        if lock(&self.vms).get(vm).is_none_or(|known| known.record.standing != Standing::Here) {
            return Ok(false);
        }
        let list = self.hypervisor.list().map_err(|error| error.to_string())?;
        if list.iter().any(|seen| &seen.vm == vm && seen.state != VmState::Stopped) {
            return Ok(false);
        }
        tracing::warn!(vm = %vm, "ended by itself");
        let removed = self.switch.remove_ports(vm).map_err(|error| error.to_string());
        let removed = removed.and_then(|()| self.hypervisor.stop(vm).map_err(|error| error.to_string()));
        if let Err(error) = removed.and_then(|()| self.remove_interface(vm)) {
            tracing::warn!(vm = %vm, %error, "clearing away a VM that ended");
        }
        self.forget(vm);
        self.set_quota();
        self.report(VmSeen { vm: vm.clone(), state: VmState::Stopped, leaving: false });
        Ok(true)
    }
}

/// Frames taken from the host's end of the VM's interface. Of a TAP: what QEMU has read for the guest. Of a sandbox guest's
/// veth: what the kernel has put into the guest's namespace.
fn packets_read(vm: &Vm) -> u64 {
    proc::transmitted(&vm.record.interface).unwrap_or(0)
}
