//! Moving a VM: the destination's preparation and arrival, the source's move.
//!
//! The hypervisor moves, the switches decide who owns the MAC; this file only keeps the two in step. What happens at the very
//! moment of stop and resume is in [`super::events`].

use super::events::READ_LIMIT;
use super::{Monitor, Trouble, Vm, lock};
use crate::hypervisor::HypervisorError;
use crate::io::clock;
use crate::io::record::Record;
use crate::transaction::{Fabric, Made, Part, Standing};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant as Clock};
use violin_common::api::switch::{MoveSeen, MoveState, SwitchRequest};
use violin_common::control::monitor::{Answer, DestinationFigures, MigrationMode, SourceFigures, VmSpec, VmState};
use violin_common::{HostId, VmId};

/// How long the fabric may take to agree on the end of a move the hypervisor has finished.
const FABRIC_LIMIT: Duration = Duration::from_secs(20);
/// Between two tries to tell a hypervisor that was away of a cancelled arrival.
const CANCEL_PAUSE: Duration = Duration::from_secs(1);
/// How long an arrival is awaited; a large VM over a slow path needs its time, and cancelling ends the wait at once.
const ARRIVAL_LIMIT: Duration = Duration::from_secs(3600);
/// How long the figures of a move away are kept; a manager that lost the answer asks within minutes of its restart.
const DEPARTED_LIMIT: Duration = Duration::from_secs(3600);

impl Monitor {
    pub(super) fn prepare(
        self: &Arc<Self>,
        spec: &VmSpec,
        sources: &[SocketAddr],
        progress: &mut dyn FnMut(Answer),
    ) -> Result<String, Trouble> {
        let vm = &spec.vm;
        match lock(&self.vms).get(vm).map(|known| (known.record.standing.clone(), known.left_behind)) {
            Some((_, true)) => return Err(not_put_right(vm)),
            Some((Standing::Arriving { uri }, _)) => return Ok(uri),
            Some((standing, _)) => return Err(format!("{vm} is {standing:?} on this host, so it cannot arrive")),
            None => {}
        }
        let mut made = Made::default();
        self.make_ready(spec, sources, progress, &mut made).map_err(|words| self.undo(vm, made, &words))
    }

    fn make_ready(
        &self,
        spec: &VmSpec,
        sources: &[SocketAddr],
        progress: &mut dyn FnMut(Answer),
        made: &mut Made,
    ) -> Result<String, Trouble> {
        let vm = &spec.vm;
        lock(&self.departed).remove(vm);
        let image = self.image(spec, sources, progress)?;
        made.begin(Part::Interface);
        let interface = self.hypervisor.make_interface(spec, true).map_err(|error| error.to_string())?;
        let standing = Standing::Arriving { uri: String::new() };
        // Guests are moved when they are up; one that was not shows it on its console.
        let record = Record { spec: spec.clone(), interface: interface.clone(), epoch: None, ready: true, standing };
        self.clear_console(vm)?;
        self.remember(Vm::new(record.clone(), VmState::Arriving))?;
        made.begin(Part::Port);
        self.attach(&record)?;
        made.begin(Part::Incoming);
        let uri = self.hypervisor.prepare_incoming(spec, &interface, image.as_ref()).map_err(|error| error.to_string())?;
        self.change(vm, |vm| vm.record.standing = Standing::Arriving { uri: uri.clone() });
        Ok(uri)
    }

    pub(super) fn cancel(self: &Arc<Self>, vm: &VmId) -> Result<(), Trouble> {
        let Some(known) = lock(&self.vms).get(vm).cloned() else { return Ok(()) };
        if known.left_behind {
            return Err(not_put_right(vm));
        }
        let runs = || format!("{vm} runs on this host already, so its arrival cannot be cancelled");
        if !matches!(known.record.standing, Standing::Arriving { .. }) || known.arrival.resumed.is_some() {
            return Err(runs());
        }
        match self.hypervisor.cancel_incoming(vm) {
            Ok(()) => {
                // It may have come in the moment before.
                let here = self.hypervisor.list().map_err(|error| error.to_string())?;
                if here.iter().any(|seen| &seen.vm == vm && matches!(seen.state, VmState::Running | VmState::Paused)) {
                    return Err(runs());
                }
            }
            // Nobody can start it here while the hypervisor is away, so what the fabric has of it can go; the rest follows.
            Err(HypervisorError::Unreachable(words)) => {
                tracing::warn!(vm = %vm, error = %words, "cancelling an arrival; the hypervisor is told when it is back");
                self.cancel_later(vm);
            }
            Err(error) => return Err(error.to_string()),
        }
        let (vni, mac) = (known.record.spec.network.vni, known.record.spec.mac);
        if let Err(error) = self.switch.tell(&SwitchRequest::MoveAbort { vni, mac }) {
            tracing::info!(vm = %vm, %error, "aborting the move at the switch; its port goes anyway");
        }
        self.switch.remove_ports(vm).map_err(|error| error.to_string())?;
        self.remove_interface(vm)?;
        self.forget(vm);
        Ok(())
    }

    /// Tells the hypervisor of a cancelled arrival once it can be reached, unless the VM is expected here again by then.
    pub(super) fn cancel_later(self: &Arc<Self>, vm: &VmId) {
        let (weak, vm) = (Arc::downgrade(self), vm.clone());
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(CANCEL_PAUSE);
                let Some(monitor) = weak.upgrade() else { return };
                if lock(&monitor.vms).contains_key(&vm) {
                    return;
                }
                match monitor.hypervisor.cancel_incoming(&vm) {
                    Err(HypervisorError::Unreachable(_)) => {}
                    Err(error) => return tracing::warn!(vm = %vm, %error, "cancelling an arrival"),
                    Ok(()) => return,
                }
            }
        });
    }

    pub(super) fn finish(&self, vm: &VmId) -> Result<DestinationFigures, Trouble> {
        let deadline = Clock::now() + ARRIVAL_LIMIT;
        let mut read_deadline = None;
        let mut vms = lock(&self.vms);
        loop {
            let Some(known) = vms.get(vm) else {
                return Err(format!("{vm} is not on this host: it was not prepared for, or that was cancelled"));
            };
            let now = Clock::now();
            if known.record.standing == Standing::Here {
                if !known.owned && known.arrival.resumed.is_some() {
                    return Err(format!("{vm} runs here, but the switch does not own its MAC; see the switch's log"));
                }
                let until = *read_deadline.get_or_insert(now + READ_LIMIT);
                // Without a time of resuming it was running before this monitor: there is no first frame to wait for.
                if known.arrival.first_read.is_some() || known.arrival.resumed.is_none() || now > until {
                    return Ok(known.arrival.clone());
                }
            }
            if now > deadline {
                return Err(format!("{vm} did not arrive within {ARRIVAL_LIMIT:?}"));
            }
            // Woken by every change; the time is only for the deadlines.
            let waited = self.changed.wait_timeout(vms, Duration::from_millis(100));
            vms = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
    }

    pub(super) fn migrate(
        self: &Arc<Self>,
        vm: &VmId,
        to: &HostId,
        uri: &str,
        mode: MigrationMode,
        progress: &mut dyn FnMut(Answer),
    ) -> Result<SourceFigures, Trouble> {
        let Some(known) = lock(&self.vms).get(vm).cloned() else {
            return match lock(&self.departed).get(vm) {
                Some((_, there, figures)) if there == to => Ok(figures.clone()),
                _ => Err(format!("{vm} is not on this host")),
            };
        };
        if known.left_behind {
            return Err(not_put_right(vm));
        }
        if known.record.standing != Standing::Here {
            return Err(format!("{vm} is {:?} on this host, so it cannot be moved to {to}", known.record.standing));
        }
        let (vni, mac) = (known.record.spec.network.vni, known.record.spec.mac);
        let mut figures = SourceFigures { began: clock::now(), ..SourceFigures::default() };
        self.change(vm, |vm| {
            vm.stopped = None;
            vm.record.standing = Standing::Leaving { to: to.clone(), uri: uri.into() };
        });
        progress(Answer::Progress { part: Some(0.0), doing: format!("asking {to}'s switch to take over") });
        if let Err(error) = self.switch.tell(&SwitchRequest::MoveGrant { vni, mac, to: to.clone() }) {
            return Err(self.stays(&known, &format!("granting the MAC to {to}: {error}")));
        }
        figures.granted = Some(clock::now());
        let mut tell = |part, doing: &str| progress(Answer::Progress { part, doing: doing.into() });
        match self.hypervisor.migrate(vm, to, uri, mode, &mut tell) {
            Ok(statistics) => {
                figures.done = Some(clock::now());
                figures.copied_bytes = statistics.copied_bytes;
                figures.hypervisor_downtime_ms = statistics.downtime_ms;
                figures.hypervisor_statistics = statistics.verbatim;
                self.gone(&known, &mut figures);
                self.departed(vm, to, &figures);
                Ok(figures)
            }
            Err(HypervisorError::Doubtful(words)) => {
                self.change(vm, |vm| vm.state = VmState::Paused);
                self.settle_later(vm);
                Err(words)
            }
            Err(error) => Err(self.stays(&known, &error.to_string())),
        }
    }

    /// Keeps the figures of a move away for a while.
    pub(super) fn departed(&self, vm: &VmId, to: &HostId, figures: &SourceFigures) {
        let mut departed = lock(&self.departed);
        departed.retain(|_, (since, ..)| since.elapsed() < DEPARTED_LIMIT);
        departed.insert(vm.clone(), (Clock::now(), to.clone(), figures.clone()));
    }

    /// The hypervisor failed or the grant was refused: the VM runs on here, or has ended here. Returns why, and how the fabric
    /// stands.
    pub(super) fn stays(self: &Arc<Self>, known: &Vm, why: &str) -> Trouble {
        let spec = &known.record.spec;
        let (vni, mac) = (spec.network.vni, spec.mac);
        let owned = |seen: &MoveSeen| seen.state == MoveState::Owned;
        // If it was stopped the hypervisor's event has said that it runs again; what is told twice does no harm.
        let stopped = lock(&self.vms).get(&spec.vm).is_some_and(|vm| vm.stopped.is_some());
        if stopped {
            self.tell_fabric(known, Fabric::Running);
        }
        if !self.switch.move_status(vni, mac).is_ok_and(|seen| owned(&seen)) {
            match self.switch.tell(&SwitchRequest::MoveAbort { vni, mac }) {
                // A destination that is lost cannot release: the hypervisor's word, said after the abort, takes the move back.
                Ok(_) => self.tell_fabric(known, Fabric::Running),
                Err(error) => tracing::warn!(vm = %spec.vm, %error, "aborting the move at the switch"),
            }
        }
        let status = self.await_fabric(known, owned);
        self.change(&spec.vm, |vm| {
            vm.record.standing = Standing::Here;
            if vm.state == VmState::Paused {
                vm.state = VmState::Running;
            }
            if let Some(seen) = status.as_ref().filter(|seen| owned(seen)) {
                vm.record.epoch = Some(seen.epoch);
            }
        });
        // Its end may be why it did not move, and nobody cleared it away while it was leaving.
        match self.ended(&spec.vm) {
            Ok(true) => return format!("{why}; the VM has ended by itself"),
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(vm = %spec.vm, %error, "it may have ended; asking again");
                self.clear_ended(&spec.vm);
            }
        }
        match status {
            Some(seen) if owned(&seen) => format!("{why}; the VM runs on here"),
            other => format!("{why}; the VM runs on here, but its switch says {other:?}"),
        }
    }

    /// The hypervisor says that the VM is gone: waits until the destination's switch owns it, then clears away.
    pub(super) fn gone(&self, known: &Vm, figures: &mut SourceFigures) {
        let vm = &known.record.spec.vm;
        // The event is on its way if it has not come yet: the hypervisor sent it before it said that it is done.
        let deadline = Clock::now() + Duration::from_secs(1);
        let stopped = || lock(&self.vms).get(vm).and_then(|vm| vm.stopped);
        while stopped().is_none() && Clock::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        figures.stopped = stopped();
        if figures.stopped.is_none() {
            tracing::warn!(vm = %vm, "the hypervisor moved a VM without saying when it stopped");
            self.tell_fabric(known, Fabric::Stopped);
        }
        figures.fabric = self.await_fabric(known, |seen| matches!(seen.state, MoveState::Gone | MoveState::Elsewhere));
        if !figures.fabric.as_ref().is_some_and(|seen| matches!(seen.state, MoveState::Gone | MoveState::Elsewhere)) {
            tracing::error!(vm = %vm, fabric = ?figures.fabric, "the VM has moved, but its destination's switch does not own it");
        }
        match self.switch.ports() {
            Ok(ports) => {
                let port = ports.iter().find(|port| port.spec.owned.as_ref().is_some_and(|owned| &owned.vm == vm));
                figures.last_delivered = port.and_then(|port| port.traffic.last_out);
            }
            Err(error) => tracing::warn!(vm = %vm, %error, "reading when the last frame was delivered"),
        }
        self.leave(vm);
    }

    /// Clears away what is left of a VM that has moved.
    pub(super) fn leave(&self, vm: &VmId) {
        let ports = self.switch.remove_ports(vm).map_err(|error| error.to_string());
        if let Err(error) = ports.and_then(|()| self.remove_interface(vm)) {
            tracing::warn!(vm = %vm, %error, "clearing away a VM that moved");
        }
        self.forget(vm);
        self.set_quota();
    }

    /// Asks the switch until `enough`, or the limit; returns the last answer.
    pub(super) fn await_fabric(&self, known: &Vm, enough: impl Fn(&MoveSeen) -> bool) -> Option<MoveSeen> {
        let spec = &known.record.spec;
        let deadline = Clock::now() + FABRIC_LIMIT;
        let mut pause = Duration::from_millis(2);
        loop {
            let status = self.switch.move_status(spec.network.vni, spec.mac);
            match status {
                Ok(seen) if enough(&seen) => return Some(seen),
                other if Clock::now() > deadline => return other.ok(),
                _ => {}
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }
}

/// What an earlier monitor knew of the VM may be wrong, and the hypervisor or the switch has not said yet how it is.
fn not_put_right(vm: &VmId) -> Trouble {
    format!("{vm} was left by an earlier monitor and is not taken up yet (this one's log says what for); try again")
}
