//! The prober: follows the manager's plan and, from before the first step of a move, sends the VM numbered frames.
//!
//! It runs in the environment's access namespace, outside any guest's CPU group.

use crate::shell::{self, Held, Operator};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use violin_channel::local::blocking;
use violin_common::api::adapt::{AdaptReply, AdaptRequest, Event, Migration};
use violin_common::{MacAddr, VmId};

/// How long frames go on after a move ended.
const TAIL: Duration = Duration::from_millis(1500);

/// What the moved VM received of the frames sent to it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Received {
    /// Frames received, each number once.
    pub(crate) received: u64,
    /// Numbers between the first and the last sent that never came.
    pub(crate) lost: u64,
    /// Frames that came after a higher number.
    pub(crate) reordered: u64,
    /// Frames that came again.
    pub(crate) duplicated: u64,
}

/// What is known of one environment's VMs and the way in.
#[derive(Debug, Clone)]
pub(crate) struct Access {
    /// Path of the access namespace.
    pub(crate) netns: String,
    /// Its one interface besides the loopback.
    pub(crate) interface: String,
    /// MACs by VM.
    pub(crate) macs: BTreeMap<VmId, MacAddr>,
}

impl Access {
    /// Looks into an access namespace.
    pub(crate) fn of(netns: String, macs: BTreeMap<VmId, MacAddr>) -> Result<Self> {
        let output = Command::new("nsenter").arg(format!("--net={netns}")).args(["--", "ip", "-j", "link"]).output()?;
        let links: serde_json::Value = serde_json::from_slice(&output.stdout).context("ip lists links")?;
        let interface = links
            .as_array()
            .and_then(|links| links.iter().filter_map(|link| link["ifname"].as_str()).find(|name| *name != "lo"))
            .with_context(|| format!("the access namespace {netns} has no interface"))?
            .to_owned();
        Ok(Self { netns, interface, macs })
    }
}

/// Follows the manager until told to stop.
#[derive(Debug)]
pub(crate) struct Prober {
    stop: Arc<AtomicBool>,
    watcher: Option<JoinHandle<()>>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    operator: Operator,
    ways: BTreeMap<String, Access>,
    evidence: PathBuf,
    sending: Mutex<BTreeMap<u64, Sending>>,
    results: Mutex<BTreeMap<u64, Result<Received, String>>>,
    /// Threads that wait for the last frames of a move and then count.
    counting: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Sending {
    sender: Held,
    vm: VmId,
}

impl Prober {
    /// Starts following the manager at `socket`.
    pub(crate) fn start(operator: &Operator, socket: &Path, ways: BTreeMap<String, Access>, evidence: &Path) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let shared = Arc::new(Shared {
            operator: operator.clone(),
            ways,
            evidence: evidence.to_owned(),
            sending: Mutex::default(),
            results: Mutex::default(),
            counting: Mutex::default(),
        });
        let watcher = {
            let (stop, shared, socket) = (Arc::clone(&stop), Arc::clone(&shared), socket.to_owned());
            std::thread::spawn(move || {
                if let (Err(error), false) = (shared.follow(&socket, &stop), stop.load(Ordering::SeqCst)) {
                    shell::say(&format!("prober: lost the manager: {error}"));
                }
            })
        };
        Self { stop, watcher: Some(watcher), shared }
    }

    /// Waits for the frames still to be counted and returns what each move's VM received, by the move's number.
    pub(crate) fn finish(mut self) -> BTreeMap<u64, Result<Received, String>> {
        self.stop.store(true, Ordering::SeqCst);
        let counting = std::mem::take(&mut *self.shared.counting.lock().expect("no holder panics"));
        for thread in counting {
            let _ = thread.join();
        }
        let open: Vec<u64> = self.shared.sending.lock().expect("no holder panics").keys().copied().collect();
        for number in open {
            self.shared.collect(number);
        }
        // The watcher sits in a read until the manager says something; the process's end ends it.
        drop(self.watcher.take());
        std::mem::take(&mut *self.shared.results.lock().expect("no holder panics"))
    }
}

impl Shared {
    fn follow(self: &Arc<Self>, socket: &Path, stop: &AtomicBool) -> Result<(), String> {
        for reply in blocking::stream(socket, &AdaptRequest::Watch)? {
            let reply = reply?;
            if stop.load(Ordering::SeqCst) {
                break;
            }
            if let AdaptReply::Event(event) = reply {
                self.saw(&event);
            }
        }
        Ok(())
    }

    fn saw(self: &Arc<Self>, event: &Event) {
        match event {
            Event::Decided(decision) => {
                for line in &decision.moves {
                    shell::say(&format!("decided: {line} ({})", decision.reason));
                }
            }
            Event::Announced(migration) => self.announced(migration),
            Event::Began(migration) => {
                shell::say(&format!("moving {} from {} to {}", migration.vm, migration.from, migration.to))
            }
            Event::Ended(migration) => {
                shell::say(&format!("move of {} to {} ended: {:?}", migration.vm, migration.to, migration.outcome));
                let (shared, number) = (Arc::clone(self), migration.number);
                let thread = std::thread::spawn(move || {
                    std::thread::sleep(TAIL);
                    shared.collect(number);
                });
                self.counting.lock().expect("no holder panics").push(thread);
            }
            Event::Host { host, connected } => shell::say(&format!("host {host} {}", if *connected { "came" } else { "went" })),
        }
    }

    fn announced(&self, migration: &Migration) {
        let sending = self.send(migration.number, &migration.vm, &[]);
        match sending {
            Ok(sending) => {
                self.sending.lock().expect("no holder panics").insert(migration.number, sending);
            }
            Err(error) => {
                self.results.lock().expect("no holder panics").insert(migration.number, Err(format!("{error:#}")));
            }
        }
    }

    fn send(&self, number: u64, vm: &VmId, extra: &[&str]) -> Result<Sending> {
        let environment = vm.as_str().split('-').next().unwrap_or_default();
        let way = self.ways.get(environment).with_context(|| format!("no way into the environment of {vm}"))?;
        let mac = way.macs.get(vm).with_context(|| format!("the MAC of {vm} is not known"))?.to_string();
        let log = std::fs::File::create(self.evidence.join(format!("probe-{number}-{vm}.jsonl")))?;
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", way.netns)).arg("--").arg(self.operator.programs().join("violin-probe"));
        command.args([
            "send-numbered",
            "--interface",
            &way.interface,
            "--mac",
            &mac,
            "--interval",
            "2ms",
            "--until-stdin-closes",
        ]);
        command.args(["--run", &number.to_string()]).args(extra);
        command.stdin(Stdio::piped()).stdout(log).stderr(Stdio::inherit());
        Ok(Sending { sender: Held::spawn(&mut command)?, vm: vm.clone() })
    }

    fn collect(&self, number: u64) {
        let Some(sending) = self.sending.lock().expect("no holder panics").remove(&number) else { return };
        let result = self.received(number, sending).map_err(|error| format!("{error:#}"));
        self.results.lock().expect("no holder panics").insert(number, result);
    }

    fn received(&self, number: u64, sending: Sending) -> Result<Received> {
        let (environment, node) = sending.vm.as_str().split_once('-').context("a VM is named ENVIRONMENT-NODE")?;
        sending.sender.finish(Duration::from_secs(10))?;
        let run = number.to_string();
        let text = self.operator.on_run(environment, node, &["violin-probe", "received", "--run", &run, "--json"])?;
        serde_json::from_str(text.trim()).with_context(|| format!("{} said {text:?} of its frames", sending.vm))
    }
}

/// The positive control: frames to a VM that stays, one number withheld. How many the VM counts as lost.
pub(crate) fn withheld_is_counted(operator: &Operator, ways: &BTreeMap<String, Access>, evidence: &Path) -> Result<u64> {
    const RUN: u64 = 60_000;
    let shared = Shared {
        operator: operator.clone(),
        ways: ways.clone(),
        evidence: evidence.to_owned(),
        sending: Mutex::default(),
        results: Mutex::default(),
        counting: Mutex::default(),
    };
    let vm: VmId = "beta-head".parse().context("a VM's name")?;
    let sending = shared.send(RUN, &vm, &["--withhold", "100"])?;
    std::thread::sleep(Duration::from_secs(1));
    Ok(shared.received(RUN, sending)?.lost)
}
