//! Once a period: counters become an observation; and the quota of the guests' CPU group is kept right.

use super::restart::by_vm;
use super::start::BOOT_LIMIT;
use super::{Monitor, Vm, lock};
use crate::demand::{Recent, demands};
use crate::hypervisor::Usage;
use crate::io::{clock, console, proc};
use crate::sample::{At, Traffic, load, rate};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant as Clock;
use violin_common::VmId;
use violin_common::api::switch::PortSeen;
use violin_common::control::monitor::{HostSample, Observation, Report, TrafficSample, VmSample, VmState};

/// Readings of the last period.
#[derive(Default)]
struct Last {
    usage: BTreeMap<VmId, At<Usage>>,
    /// Bytes to and from the guest.
    net: BTreeMap<VmId, At<(u64, u64)>>,
    /// Loads of the last few periods.
    recent: BTreeMap<VmId, Recent>,
    traffic: Traffic,
    consoles_cut: u64,
}

impl Monitor {
    /// Observes for as long as the monitor lives.
    pub(super) fn observe(self: &Arc<Self>) {
        let weak = Arc::downgrade(self);
        let period = self.config.period.0;
        std::thread::spawn(move || {
            let mut last = Last::default();
            let mut next = Clock::now();
            while let Some(monitor) = weak.upgrade() {
                let observation = monitor.observation(&mut last);
                // Nobody listening: this one is lost, as it would be stale when somebody does.
                let _ = monitor.reports.send(Report::Observation(observation));
                drop(monitor);
                next += period;
                let now = Clock::now();
                // After a long stall the missed periods are not made up for.
                next = next.max(now);
                std::thread::sleep(next - now);
            }
        });
    }

    fn observation(&self, last: &mut Last) -> Observation {
        let mut missing = Vec::new();
        let (ports, traffic) = self.ask_switch(last, &mut missing);
        let at = clock::now();
        let ports = by_vm(&ports);
        let here: Vec<Vm> = lock(&self.vms).values().filter(|vm| vm.state != VmState::Arriving).cloned().collect();
        self.bound_consoles(&here, last);
        let mut samples = Vec::new();
        let mut judged = Vec::new();
        let mut recent = BTreeMap::new();
        let mut usage = BTreeMap::new();
        let mut net = BTreeMap::new();
        for known in &here {
            let vm = &known.record.spec.vm;
            let port = ports.get(vm);
            let (mut net_in, mut net_out) = (0.0, 0.0);
            if let Some(port) = port {
                let now = (port.traffic.bytes_out, port.traffic.bytes_in);
                if let Some(before) = last.net.get(vm) {
                    let side = |old, new| rate(At { at: before.at, value: old }, At { at, value: new }).unwrap_or(0.0);
                    (net_in, net_out) = (side(before.value.0, now.0), side(before.value.1, now.1));
                }
                net.insert(vm.clone(), At { at, value: now });
            }
            let now = match self.hypervisor.usage(vm) {
                Ok(value) => At { at: clock::now(), value },
                Err(error) => {
                    missing.push(format!("usage of {vm}: {error}"));
                    continue;
                }
            };
            usage.insert(vm.clone(), now);
            let (vcpus, scale) = (known.record.spec.vcpus, self.config.capacity.scale);
            let Some(load) = last.usage.get(vm).and_then(|before| load(vcpus, scale, *before, now)) else {
                missing.push(format!("usage of {vm}: no earlier reading to compare with"));
                continue;
            };
            let mut past = last.recent.remove(vm).unwrap_or_default();
            judged.push(past.judge(load));
            recent.insert(vm.clone(), past);
            let memory_mib = now.value.memory_bytes >> 20;
            let (state, vm) = (known.state, vm.clone());
            samples.push(VmSample { vm, state, run: 0.0, wait: 0.0, demand: 0.0, memory_mib, net_in, net_out });
        }
        for (sample, demand) in samples.iter_mut().zip(demands(self.config.capacity.cores, &judged)) {
            (sample.run, sample.wait, sample.demand) = (demand.run, demand.wait, demand.demand);
        }
        (last.usage, last.net, last.recent) = (usage, net, recent);
        let host = self.host_sample(judged.iter().map(|vm| vm.load.run).sum(), &mut missing);
        Observation { at, host, vms: samples, traffic, missing }
    }

    fn bound_consoles(&self, here: &[Vm], last: &mut Last) {
        for vm in here.iter().map(|known| &known.record.spec.vm) {
            match console::bound(&self.hypervisor.console(vm)) {
                Ok(0) => {}
                Ok(bytes) => {
                    last.consoles_cut += 1;
                    tracing::warn!(vm = %vm, bytes, consoles_cut = last.consoles_cut, "cut the start off a console too long");
                }
                Err(error) => tracing::debug!(vm = %vm, %error, "looking at the console's length"),
            }
        }
    }

    fn ask_switch(&self, last: &mut Last, missing: &mut Vec<String>) -> (Vec<PortSeen>, Vec<TrafficSample>) {
        let ports = match self.switch.ports() {
            Ok(ports) => {
                self.heal(&ports);
                ports
            }
            Err(error) => {
                missing.push(format!("network rates: {error}"));
                return (Vec::new(), Vec::new());
            }
        };
        match self.switch.traffic() {
            Ok(seen) => {
                let at = clock::now();
                (ports, last.traffic.update(at, &seen))
            }
            Err(error) => {
                missing.push(format!("traffic: {error}"));
                (ports, Vec::new())
            }
        }
    }

    fn host_sample(&self, guest_cores: f64, missing: &mut Vec<String>) -> HostSample {
        let promised: u64 = lock(&self.vms).values().map(|vm| vm.record.spec.memory_mib).sum();
        let declared = self.config.capacity.memory_mib.saturating_sub(promised);
        let memory_free_mib = match proc::memory_available_mib() {
            // What the machine cannot give is not free, whatever was declared.
            Ok(real) => declared.min(real),
            Err(error) => {
                missing.push(format!("memory: {error}"));
                declared
            }
        };
        let (cpu_pressure, memory_pressure) = (proc::pressure("cpu"), proc::pressure("memory"));
        HostSample { guest_cores, memory_free_mib, cpu_pressure, memory_pressure }
    }

    /// Lifts the quota of the guests' CPU group while a guest boots, sets it when none does.
    pub(super) fn set_quota(&self) {
        let Some(group) = &self.group else { return };
        let mut standing = lock(&self.quota);
        let booting = lock(&self.vms).values().any(|vm| vm.booting.is_some_and(|since| since.elapsed() < BOOT_LIMIT));
        let capacity = &self.config.capacity;
        let wanted = if booting { None } else { Some(capacity.cores * capacity.scale) };
        if *standing == Some(wanted) {
            return;
        }
        match group.set_quota(wanted) {
            Ok(()) => {
                tracing::info!(real_cores = ?wanted, "quota of the guests' CPU group");
                *standing = Some(wanted);
            }
            Err(error) => tracing::error!(%error, "setting the quota of the guests' CPU group; trying again"),
        }
    }
}
