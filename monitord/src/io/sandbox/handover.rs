//! How a guest changes hands, and how a host finds back to its guests after a kill.
//!
//! ```text
//! source  mark the destination → processes into its CPU group → freeze → link into its namespace → at.S becomes to.D
//! dest.   sees to.D → at.D → link up → thaw → notes the time; only then the source is done
//! ```
//! Killed before `to.D`, the source's next start finds `at.S` and puts everything back. Killed after, the destination takes
//! it, or, if it does not within the limit, the source renames `to.D` to `at.S` again. The renames decide who: a guest is
//! thawed only by the one whose `at` file exists.

use super::store::{End, Guest, Marker, Place};
use super::{Inner, Sandbox, refused, spawn};
use crate::hypervisor::{Change, HypervisorError, MoveStatistics};
use crate::io::cgroup::clear_empty;
use crate::io::{clock, proc};
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use violin_common::{HostId, VmId};

/// How long an offer may lie before the source takes it back.
const OFFER_LIMIT: Duration = Duration::from_secs(5);
/// How long the source waits for a guest that was taken to run; it is the destination's then, whatever happens.
const RUN_LIMIT: Duration = Duration::from_secs(10);
/// How often an awaited offer is looked for; it adds to the pause.
const LOOK: Duration = Duration::from_millis(1);

/// What a destination answers to a prepared arrival.
struct Target {
    end: End,
    partition: Option<PathBuf>,
}

impl Target {
    fn parse(uri: &str, host: &HostId) -> Result<Self, String> {
        let wrong = || format!("got {uri:?}, want sandbox:netns=PATH[;partition=PATH] as a sandbox monitor answers");
        let mut netns = None;
        let mut partition = None;
        for part in uri.strip_prefix("sandbox:").ok_or_else(wrong)?.split(';') {
            match part.split_once('=').ok_or_else(wrong)? {
                ("netns", path) => netns = Some(PathBuf::from(path)),
                ("partition", path) if !path.contains("..") && !path.starts_with('/') => partition = Some(PathBuf::from(path)),
                _ => return Err(wrong()),
            }
        }
        Ok(Self { end: End { host: host.clone(), netns: netns.ok_or_else(wrong)? }, partition })
    }
}

impl Sandbox {
    /// Begins to look for an offer of this guest; returns the URI for the source.
    pub(super) fn expect(&self, vm: &VmId) -> String {
        let inner = &self.0;
        if inner.state().arrivals.insert(vm.clone()) {
            let (driver, vm) = (self.clone(), vm.clone());
            std::thread::spawn(move || driver.await_offer(&vm));
        }
        let netns = inner.config.netns.display();
        let partition = inner.config.partition.as_ref().map(|path| format!(";partition={}", path.display()));
        format!("sandbox:netns={netns}{}", partition.unwrap_or_default())
    }

    fn await_offer(&self, vm: &VmId) {
        let offer = Place::To(self.0.config.host.clone());
        while self.0.state().arrivals.contains(vm) {
            match self.0.store.pass(vm, &offer, &self.0.here()) {
                Ok(true) => {
                    if let Err(error) = self.take(vm) {
                        tracing::error!(vm = %vm, %error, "a guest was taken over but does not run; restart to try again");
                    }
                    self.0.state().arrivals.remove(vm);
                    return;
                }
                Ok(false) => {}
                Err(error) => tracing::warn!(vm = %vm, %error, "looking for an offered guest"),
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Makes a guest run whose marker says that it belongs here.
    fn take(&self, vm: &VmId) -> io::Result<()> {
        let inner = &self.0;
        let guest = inner.store.guest(vm)?.ok_or_else(|| io::Error::other("no guest.json beside its marker"))?;
        let marker = inner.store.marker(vm, &inner.here())?;
        inner.bring_link(&guest, &marker)?;
        let groups = inner.groups(vm);
        // In the unified tree a move cut short leaves them in the group of another host, some or all.
        let all = if groups.moves_running() { groups.processes()? } else { proc::beside(guest.init) };
        groups.adopt(&all)?;
        groups.thaw()?;
        let running = clock::now();
        inner.tell(vm, Change::Running);
        self.watch(vm, guest.init);
        inner.store.write_marker(vm, &inner.here(), &Marker::running(inner.end(), running))
    }

    /// Tells when a guest ends by itself, once for each.
    pub(super) fn watch(&self, vm: &VmId, init: i32) {
        if self.0.state().watched.insert(vm.clone(), init) == Some(init) {
            return;
        }
        let (driver, vm) = (Arc::downgrade(&self.0), vm.clone());
        std::thread::spawn(move || {
            if let Err(error) = spawn::wait_end(init, None) {
                tracing::warn!(vm = %vm, %error, "waiting for the end of a guest");
                return;
            }
            let Some(inner) = driver.upgrade() else { return };
            let known = inner.state().watched.get(&vm) == Some(&init);
            if known && inner.store.place(&vm).ok().flatten() == Some(inner.here()) {
                inner.state().watched.remove(&vm);
                inner.tell(&vm, Change::Ended);
            }
        });
    }

    /// Moves a guest to another host of this machine.
    pub(super) fn hand_over(
        &self,
        vm: &VmId,
        to: &HostId,
        uri: &str,
        progress: &mut dyn FnMut(Option<f64>, &str),
    ) -> Result<MoveStatistics, HypervisorError> {
        let asked = format!("moving {vm} to {to}");
        let inner = &self.0;
        let target = Target::parse(uri, to).map_err(refused(&asked))?;
        let guest = inner.mine(vm)?;
        if !guest.is_alive() {
            return Err(refused(asked)("it has ended"));
        }
        let give_up = Arc::new(AtomicBool::new(false));
        if inner.state().leaving.insert(vm.clone(), Arc::clone(&give_up)).is_some() {
            return Err(refused(asked)("it is being moved already"));
        }
        let moved = self.offer(&guest, &target, &give_up, progress);
        let outcome = match moved {
            Ok(stopped) => self.await_taking(vm, &target, stopped),
            Err(error) => Err(error),
        };
        let result = match outcome {
            Ok(statistics) => {
                let _ = inner.groups(vm).leave_host();
                let mut state = inner.state();
                state.accounts.remove(vm);
                state.watched.remove(vm);
                drop(state);
                inner.tell(vm, Change::Ended);
                Ok(statistics)
            }
            Err(error) => {
                // It is ours: either it was never offered, or the offer was taken back.
                if let Err(worse) = self.take(vm) {
                    tracing::error!(vm = %vm, error = %worse, "a guest that did not move does not run either");
                }
                // What was made over there for its arrival; empty again now, or of use to nobody.
                let _ = inner.groups_below(vm, target.partition.as_deref()).leave_host();
                Err(refused(asked)(error))
            }
        };
        inner.state().leaving.remove(vm);
        result
    }

    /// The source's part, up to the offer. Returns when the guest stopped.
    fn offer(
        &self,
        guest: &Guest,
        target: &Target,
        give_up: &AtomicBool,
        progress: &mut dyn FnMut(Option<f64>, &str),
    ) -> io::Result<violin_common::Instant> {
        let inner = &self.0;
        let vm = &guest.spec.vm;
        let check = || if give_up.load(Ordering::Relaxed) { Err(io::Error::other("given up as asked")) } else { Ok(()) };
        check()?;
        let netns = File::open(&target.end.netns).map_err(|error| {
            io::Error::other(format!("opening the destination's namespace {}: {error}", target.end.netns.display()))
        })?;
        let marker = Marker { from: inner.end(), to: Some(target.end.clone()), running: None, clock: None };
        inner.store.write_marker(vm, &inner.here(), &marker)?;
        let groups = inner.groups_below(vm, target.partition.as_deref());
        if groups.moves_running() {
            // Outside the pause: what is started from here on starts over there.
            groups.adopt(&inner.groups(vm).processes()?)?;
        }
        progress(Some(0.0), "freezing");
        inner.groups(vm).freeze()?;
        let stopped = clock::now();
        inner.tell(vm, Change::Stopped);
        if !inner.config.pause.is_zero() {
            std::thread::sleep(inner.config.pause);
        }
        check()?;
        progress(Some(0.5), "handing over");
        inner.netlink.move_to(&guest.interface, &netns)?;
        groups.adopt(&inner.groups(vm).processes()?)?;
        if inner.store.pass(vm, &inner.here(), &Place::To(target.end.host.clone()))? {
            Ok(stopped)
        } else {
            Err(io::Error::other("its marker vanished"))
        }
    }

    /// Waits until the destination has taken the guest and runs it; takes it back if it is not taken.
    fn await_taking(&self, vm: &VmId, target: &Target, stopped: violin_common::Instant) -> io::Result<MoveStatistics> {
        let (offered, taken) = (Place::To(target.end.host.clone()), Place::At(target.end.host.clone()));
        let begun = Instant::now();
        loop {
            let place = self.0.store.place(vm)?;
            if place.as_ref() == Some(&offered) && begun.elapsed() > OFFER_LIMIT {
                if self.0.store.pass(vm, &offered, &self.0.here())? {
                    return Err(io::Error::other(format!("{} did not take it within {OFFER_LIMIT:?}", target.end.host)));
                }
                continue;
            }
            if place.as_ref() != Some(&offered) {
                // A marker elsewhere altogether means that it has moved on meanwhile.
                let own = violin_channel::clock::name();
                let running = match &place {
                    Some(at) if at == &taken => {
                        self.0.store.marker(vm, at).ok().and_then(|marker| Some((marker.running?, marker.clock)))
                    }
                    _ => Some((clock::now(), Some(own.clone()))),
                };
                if let Some((running, clock)) = running {
                    // A monitor of another time namespace reads another clock.
                    let same_clock = clock.is_some_and(|clock| clock == own);
                    let downtime_ms = same_clock.then(|| running.since(stopped).as_secs_f64() * 1000.0);
                    return Ok(MoveStatistics { copied_bytes: None, downtime_ms, verbatim: Vec::new() });
                }
                if begun.elapsed() > RUN_LIMIT {
                    tracing::error!(vm = %vm, host = %target.end.host, "the destination owns the guest but does not run it");
                    return Ok(MoveStatistics::default());
                }
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Puts every guest of this host right after a restart. One that cannot be is said and left as it is: it must not keep the
    /// others from running.
    pub(super) fn recover(&self) -> io::Result<()> {
        let inner = &self.0;
        let guests = inner.store.names()?;
        for vm in &guests {
            if let Err(error) = inner.clear_half_started(vm) {
                tracing::error!(vm = %vm, %error, "clearing away a guest whose start was cut short; it is left");
            }
        }
        if let Some(partition) = &inner.config.partition {
            clear_empty(&inner.config.trees, partition);
        }
        for vm in &guests {
            if let Err(error) = self.recover_one(vm) {
                tracing::error!(vm = %vm, %error, "taking up a guest; it is left as it is");
            }
        }
        Ok(())
    }

    fn recover_one(&self, vm: &VmId) -> io::Result<()> {
        let inner = &self.0;
        let host = &inner.config.host;
        let Some(place) = inner.store.place(vm)? else { return Ok(()) };
        let Some(guest) = inner.store.guest(vm)? else { return Ok(()) };
        match &place {
            _ if !guest.is_alive() => {}
            Place::At(at) if at == host => self.take(vm)?,
            Place::To(to) if to == host => {
                let taken = inner.store.pass(vm, &place, &inner.here())?;
                taken.then(|| self.take(vm)).transpose()?;
            }
            Place::To(_) if inner.offered_from_here(vm, &place) => {
                let (driver, vm) = (self.clone(), vm.clone());
                std::thread::spawn(move || driver.take_back_later(&vm, &place));
            }
            _ => {}
        }
        Ok(())
    }

    /// An offer a killed monitor left behind: the destination gets its time, then the guest comes back.
    fn take_back_later(&self, vm: &VmId, offered: &Place) {
        std::thread::sleep(OFFER_LIMIT);
        match self.0.store.pass(vm, offered, &self.0.here()) {
            Ok(true) => {
                if let Err(error) = self.take(vm) {
                    tracing::error!(vm = %vm, %error, "a guest taken back does not run");
                }
            }
            Ok(false) => {}
            Err(error) => tracing::error!(vm = %vm, %error, "taking back an offered guest"),
        }
    }
}

impl Inner {
    /// Ends a guest whose start was cut short by a kill: nobody was told that it runs.
    fn clear_half_started(&self, vm: &VmId) -> io::Result<()> {
        let began = self.store.dir(vm).join(format!("starting.{}", self.config.host));
        if began.exists() && self.store.place(vm)?.is_none() {
            tracing::warn!(vm = %vm, "ending a guest whose start was cut short");
            self.destroy(vm)?;
        }
        Ok(())
    }
}
