//! A VM whose move away failed, or was lost sight of, and that is not known to run anywhere.
//!
//! It stays *leaving*: nobody is told that it runs. The driver is asked where it is until it is here, there or nowhere, or
//! until an operator ends it here.

use super::{Monitor, lock};
use crate::hypervisor::Whereabouts;
use crate::io::clock;
use crate::transaction::{Fabric, Standing};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;
use violin_common::VmId;
use violin_common::control::monitor::{SourceFigures, VmSeen, VmState};

/// Between two looks; each may take seconds when the destination does not answer.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

impl Monitor {
    /// Finds out where the VM is on a thread of its own, and acts on it.
    pub(super) fn settle_later(self: &Arc<Self>, vm: &VmId) {
        let (weak, vm) = (Arc::downgrade(self), vm.clone());
        std::thread::spawn(move || {
            let mut said = String::new();
            while let Some(monitor) = weak.upgrade() {
                // The lock is free between two looks: an operator may end the VM.
                let looked = monitor.alone(&vm, || monitor.settle(&vm));
                drop(monitor);
                match looked {
                    ControlFlow::Break(()) => return,
                    ControlFlow::Continue(words) if words != said => {
                        tracing::warn!(vm = %vm, %words, "not known to run here or at its destination; looking again");
                        said = words;
                    }
                    ControlFlow::Continue(_) => {}
                }
                std::thread::sleep(LOOK_AGAIN);
            }
        });
    }

    /// One look; goes on with what is not known yet.
    fn settle(self: &Arc<Self>, vm: &VmId) -> ControlFlow<(), String> {
        let Some(known) = lock(&self.vms).get(vm).cloned() else { return ControlFlow::Break(()) };
        let Standing::Leaving { to, uri } = &known.record.standing else { return ControlFlow::Break(()) };
        match self.hypervisor.settle(vm, uri) {
            Ok(Whereabouts::Here) => {
                // It had stopped, or may have: the switch is to hear that it runs.
                self.change(vm, |vm| *vm.stopped.get_or_insert_with(clock::now));
                let words = self.stays(&known, "its move failed");
                tracing::warn!(vm = %vm, %words, "settled");
            }
            Ok(Whereabouts::There) => {
                tracing::warn!(vm = %vm, %to, "settled: its move was done");
                let mut figures = SourceFigures { began: clock::now(), ..SourceFigures::default() };
                figures.done = Some(figures.began);
                self.gone(&known, &mut figures);
                self.departed(vm, to, &figures);
            }
            Ok(Whereabouts::Nowhere) => {
                tracing::error!(vm = %vm, %to, "settled: it is on neither host");
                self.tell_fabric(&known, Fabric::Stopped);
                self.leave(vm);
                self.report(VmSeen { vm: vm.clone(), state: VmState::Stopped, leaving: false });
            }
            Ok(Whereabouts::Unclear(words)) => return ControlFlow::Continue(words),
            Err(error) => return ControlFlow::Continue(error.to_string()),
        }
        ControlFlow::Break(())
    }
}
