//! Finding back: to the VMs after the monitor was restarted, to the ports after the switch was.

use super::{Monitor, Vm, lock};
use crate::io::record::Record;
use crate::transaction::{Fabric, Standing};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;
use violin_common::VmId;
use violin_common::api::switch::{MoveState, PortSeen, SwitchRequest};
use violin_common::control::monitor::VmState;

/// How often an unreachable hypervisor or switch is tried again.
const AGAIN: Duration = Duration::from_millis(500);

impl Monitor {
    /// Knows again every VM of which there is a record, and puts right what a kill left half done.
    ///
    /// The hypervisor says which VMs run; the record says what they are; the switch how far a move had come. What needs the
    /// hypervisor or the switch is done on a thread, again until both answer, so that a start needs neither of them.
    pub(super) fn take_up(self: &Arc<Self>) {
        let records = match self.records.read_all() {
            Ok(records) => records,
            Err(error) => {
                tracing::error!(%error, "no records could be read; VMs running here are listed but not served");
                return;
            }
        };
        for record in records {
            let state = match record.standing {
                Standing::Arriving { .. } => VmState::Arriving,
                _ if record.ready => VmState::Running,
                _ => VmState::Booting,
            };
            let mut vm = Vm::new(record, state);
            vm.booting = (state == VmState::Booting).then(std::time::Instant::now);
            vm.left_behind = true;
            lock(&self.vms).insert(vm.record.spec.vm.clone(), vm);
        }
        self.watch_boots();
        // A thread each: one whose move is still under way must not keep the others waiting.
        let left: Vec<_> = lock(&self.vms).keys().cloned().collect();
        let (taken, all_taken) = channel::<()>();
        for vm in left {
            let (weak, taken) = (Arc::downgrade(self), taken.clone());
            std::thread::spawn(move || {
                let mut taken = Some(taken);
                while let Some(monitor) = weak.upgrade() {
                    // The lock is free between two tries: an operator may end the VM.
                    let tried = monitor.alone(&vm, || {
                        drop(taken.take());
                        monitor.put_right(&vm)
                    });
                    drop(monitor);
                    match tried {
                        Ok(()) => return,
                        Err(error) => tracing::warn!(vm = %vm, %error, "taking up a VM; trying again"),
                    }
                    std::thread::sleep(AGAIN);
                }
            });
        }
        drop(taken);
        // Commands for a VM wait for the first try, so each thread has its VM's lock before the first can come.
        let _ = all_taken.recv();
    }

    fn put_right(self: &Arc<Self>, vm: &VmId) -> Result<(), String> {
        let Some(known) = lock(&self.vms).get(vm).cloned() else { return Ok(()) };
        if !known.left_behind {
            return Ok(()); // ended, and prepared for or started anew, since the last try
        }
        self.put_known_right(&known)?;
        self.change(vm, |vm| vm.left_behind = false);
        Ok(())
    }

    fn put_known_right(self: &Arc<Self>, known: &Vm) -> Result<(), String> {
        let record = &known.record;
        let vm = &record.spec.vm;
        let list = self.hypervisor.list().map_err(|error| error.to_string())?;
        let seen = list.into_iter().find(|seen| &seen.vm == vm && seen.state != VmState::Stopped);
        let ports = self.switch.ports().map_err(|error| error.to_string())?;
        let port = port_of(&ports, vm);
        let state = port.and_then(|port| port.state);
        tracing::info!(vm = %vm, standing = ?record.standing, hypervisor = ?seen, ?state, "taking up");
        self.change(vm, |vm| vm.attached = port.is_some());
        match (seen, &record.standing) {
            (None, Standing::Leaving { .. }) => {
                self.tell_fabric(known, Fabric::Stopped);
                let gone = self.await_fabric(known, |seen| matches!(seen.state, MoveState::Gone | MoveState::Elsewhere));
                tracing::info!(vm = %vm, fabric = ?gone, "moved away while no monitor ran");
                self.leave(vm);
            }
            (None, Standing::Arriving { .. }) => {
                // What was prepared is gone with the monitor: the manager prepares anew or gives up.
                let _ = self.hypervisor.cancel_incoming(vm);
                let (vni, mac) = (record.spec.network.vni, record.spec.mac);
                let _ = self.switch.tell(&SwitchRequest::MoveAbort { vni, mac });
                self.leave(vm);
            }
            (None, Standing::Here) => {
                tracing::warn!(vm = %vm, "ended while no monitor ran");
                self.stop(vm)?;
            }
            (Some(seen), Standing::Leaving { uri, .. })
                if !uri.is_empty() && !seen.leaving && !matches!(seen.state, VmState::Running | VmState::Booting) =>
            {
                // Left paused: only the destination can say whether it runs there.
                self.attach_if_lost(record, port)?;
                self.change(vm, |vm| vm.state = VmState::Paused);
                self.settle_later(vm);
            }
            (Some(seen), Standing::Leaving { .. }) if seen.leaving => {
                // The hypervisor carries the move on by itself; it is over when the VM is no longer here, or stays.
                self.attach_if_lost(record, port)?;
                return Err("its move is still under way".into());
            }
            (Some(_), Standing::Leaving { .. }) => {
                self.attach_if_lost(record, port)?;
                self.change(vm, |vm| vm.stopped = Some(crate::io::clock::now()));
                let words = self.stays(known, "the move was cut short");
                tracing::warn!(vm = %vm, %words, "taken up");
            }
            (Some(seen), Standing::Arriving { .. }) if seen.state == VmState::Running => {
                self.attach_if_lost(record, port)?;
                self.tell_fabric(known, Fabric::Running);
                self.settle_arrival(vm);
            }
            (Some(_), Standing::Arriving { .. }) => {
                self.attach_if_lost(record, port)?;
                self.resume_wait(record);
            }
            (Some(_), Standing::Here) => {
                self.attach_if_lost(record, port)?;
                if record.epoch.is_none() {
                    self.own_later(vm);
                }
            }
        }
        Ok(())
    }

    /// Makes ready again for a VM that is still on its way.
    fn resume_wait(&self, record: &Record) {
        if let Err(error) = self.hypervisor.prepare_incoming(&record.spec, &record.interface, None) {
            tracing::debug!(vm = %record.spec.vm, %error, "the driver goes on with the arrival by itself");
        }
    }

    fn attach_if_lost(&self, record: &Record, port: Option<&PortSeen>) -> Result<(), String> {
        if port.is_some() { Ok(()) } else { self.attach(record) }
    }

    /// Gives a restarted switch its networks and ports back, with the epochs known here: they claim before they speak.
    pub(super) fn heal(&self, ports: &[PortSeen]) {
        let lost: Vec<Record> = lock(&self.vms)
            .values()
            .filter(|vm| vm.attached && port_of(ports, &vm.record.spec.vm).is_none())
            .map(|vm| vm.record.clone())
            .collect();
        for record in lost {
            self.locks.at_once(&record.spec.vm, |alone| self.heal_one(&record, alone));
        }
        self.accesses.heal(ports);
    }

    /// Makes a lost port again; `alone`: no command for its VM is at work.
    fn heal_one(&self, record: &Record, alone: bool) {
        let vm = &record.spec.vm;
        let wants_port = lock(&self.vms).get(vm).is_some_and(|known| {
            // A command at work on this VM knows better what its port should be; but a move away may copy memory for
            // many minutes, while the VM runs here.
            known.record == *record && (alone || is_being_copied(known))
        });
        // The list may be older than the port.
        if !wants_port || self.switch.ports().map_or(true, |ports| port_of(&ports, vm).is_some()) {
            return;
        }
        tracing::warn!(vm = %vm, epoch = ?record.epoch, "the switch has lost this VM's port; making it again");
        if let Err(error) = self.attach(record) {
            tracing::warn!(vm = %vm, %error, "making the port again; trying again next time");
        }
        if !alone {
            self.overtaken(record);
        }
    }

    /// What the move told the switch while its VM's port was being made again found no port: does it now.
    fn overtaken(&self, record: &Record) {
        let vm = &record.spec.vm;
        let known = lock(&self.vms).get(vm).cloned();
        let result = match known {
            Some(known) if known.stopped.is_some() && known.state == VmState::Paused => {
                let (vni, mac) = (record.spec.network.vni, record.spec.mac);
                self.switch.tell(&SwitchRequest::MoveStopped { vni, mac })
            }
            Some(_) => Ok(()),
            None => self.switch.remove_ports(vm),
        };
        if let Err(error) = result {
            tracing::warn!(vm = %vm, %error, "following a move that went on while its port was made again");
        }
    }
}

/// Whether a VM that is being moved away still runs here.
fn is_being_copied(vm: &Vm) -> bool {
    matches!(vm.record.standing, Standing::Leaving { .. }) && vm.stopped.is_none() && vm.state == VmState::Running
}

/// A VM's port in a list.
pub(super) fn port_of<'a>(ports: &'a [PortSeen], vm: &VmId) -> Option<&'a PortSeen> {
    ports.iter().find(|port| port.spec.owned.as_ref().is_some_and(|owned| &owned.vm == vm))
}

/// Ports by VM.
pub(super) fn by_vm(ports: &[PortSeen]) -> BTreeMap<&VmId, &PortSeen> {
    ports.iter().filter_map(|port| Some((&port.spec.owned.as_ref()?.vm, port))).collect()
}
