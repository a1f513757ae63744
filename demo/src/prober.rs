//! The prober: follows the manager's plan and, from before the first step of a move, sends the VM numbered frames.
//!
//! It runs in the environment's access namespace, outside any guest's CPU group.

use crate::shell::{self, Held, Operator};
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use violin_channel::local::blocking;
use violin_common::api::adapt::{AdaptReply, AdaptRequest, Event, MigrationSeen};
use violin_common::{MacAddr, VmId};
use violin_probe::record::RunReport;

/// How long frames go on after a move ended.
const TAIL: Duration = Duration::from_millis(1500);

/// What a VM received of the frames sent to it, beside what was sent.
#[derive(Debug, Clone)]
pub(crate) struct Received {
    /// The VM's record.
    pub(crate) report: RunReport,
    /// The sender's account.
    pub(crate) sent: Sent,
}

/// What the sender wrote of its frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sent {
    /// Numbers used, the withheld ones among them.
    pub(crate) numbers: u64,
    /// When the first went out, ns of this host's monotonic clock, which is the manager's, too.
    pub(crate) first_ns: u64,
}

impl Received {
    /// Numbers used that never came. A VM that missed the end of the run cannot know of a lost tail: the sender does.
    pub(crate) fn lost(&self) -> u64 {
        if self.report.ended { self.report.lost } else { self.sent.numbers.saturating_sub(self.report.received) }
    }

    /// Whether every number used is either received or lost, and none is unrecorded.
    pub(crate) fn whole(&self) -> bool {
        self.report.unrecorded == 0 && self.report.received + self.lost() == self.sent.numbers
    }
}

/// Reads the sender's lines: one a frame, a summary at last.
fn read_sent(text: &str) -> Result<Sent> {
    let line = |line: Option<&str>| -> Result<serde_json::Value> {
        serde_json::from_str(line.context("the sender wrote nothing")?).context("the sender's lines are JSON")
    };
    let summary = &line(text.lines().last())?["summary"];
    let (sent, withheld) = (summary["sent"].as_u64(), summary["withheld"].as_u64());
    let first = line(text.lines().next())?["sent_ns"].as_u64();
    Ok(Sent {
        numbers: sent.zip(withheld).map(|(sent, withheld)| sent + withheld).context("the sender wrote no summary")?,
        first_ns: first.context("the sender sent no frame")?,
    })
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
    /// The sender's lines.
    log: PathBuf,
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

    fn announced(&self, migration: &MigrationSeen) {
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
        let path = self.evidence.join(format!("probe-{number}-{vm}.jsonl"));
        let log = std::fs::File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
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
        Ok(Sending { sender: Held::spawn(&mut command)?, vm: vm.clone(), log: path })
    }

    fn collect(&self, number: u64) {
        let Some(sending) = self.sending.lock().expect("no holder panics").remove(&number) else { return };
        let result = self.received(number, sending).map_err(|error| format!("{error:#}"));
        self.results.lock().expect("no holder panics").insert(number, result);
    }

    fn received(&self, number: u64, sending: Sending) -> Result<Received> {
        sending.sender.finish(Duration::from_secs(10))?;
        let lines = std::fs::read_to_string(&sending.log).with_context(|| format!("cannot read {}", sending.log.display()))?;
        let sent = read_sent(&lines).with_context(|| format!("frames to {}", sending.vm))?;
        Ok(Received { report: self.record(number, &sending.vm)?, sent })
    }

    /// What the VM has received of a run until now.
    fn record(&self, number: u64, vm: &VmId) -> Result<RunReport> {
        let (environment, node) = vm.as_str().split_once('-').context("a VM is named ENVIRONMENT-NODE")?;
        let run = number.to_string();
        let text = self.operator.on_run(environment, node, &["violin-probe", "received", "--run", &run, "--json"])?;
        serde_json::from_str(text.trim()).with_context(|| format!("{vm} said {text:?} of its frames"))
    }
}

/// Number withheld by the positive control.
const WITHHELD: u64 = 100;

/// The positive control: frames to a VM that stays, one number withheld. What the VM received.
pub(crate) fn withheld(operator: &Operator, ways: &BTreeMap<String, Access>, evidence: &Path) -> Result<Received> {
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
    let sending = shared.send(RUN, &vm, &["--withhold", &WITHHELD.to_string()])?;
    shell::wait_for("frames beyond the withheld one", Duration::from_secs(30), || {
        // Before the first frame the VM knows of no such run.
        Ok(shared.record(RUN, &vm).is_ok_and(|report| report.last.is_some_and(|(number, _)| number > WITHHELD)))
    })?;
    shared.received(RUN, sending)
}

impl Received {
    /// Whether the withheld number is counted among the lost. Others may be lost as well: the control is of the counting.
    pub(crate) fn withheld_is_lost(&self) -> bool {
        self.report.lost_ranges.iter().any(|(from, to)| (*from..=*to).contains(&WITHHELD))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use violin_probe::record::Run;

    fn of(numbers: &[u64], end: Option<u64>, sent: u64) -> Received {
        let mut run = Run::default();
        for number in numbers {
            run.receive(*number, 0);
        }
        if let Some(last) = end {
            run.end(last);
        }
        Received { report: run.report(1), sent: Sent { numbers: sent, first_ns: 0 } }
    }

    #[test]
    fn a_lost_tail_is_counted_whether_or_not_the_end_of_the_run_arrived() {
        for end in [Some(7), None] {
            let received = of(&[0, 1, 3, 4], end, 8);
            assert_eq!((received.lost(), received.whole()), (4, true), "{end:?}");
        }
        assert!(!of(&[0, 1, 2], Some(2), 5).whole(), "the sender counts more than the receiver knows of");
        let mut unrecorded = of(&[0, 1], Some(1), 2);
        unrecorded.report.unrecorded = 1;
        assert!(!unrecorded.whole());
    }

    #[test]
    fn the_withheld_number_is_looked_for_among_all_lost() {
        assert!(of(&[0, 98, 99, 101, 103], Some(110), 111).withheld_is_lost());
        assert!(!of(&[100, 102], Some(110), 111).withheld_is_lost());
    }

    #[test]
    fn the_senders_lines_tell_how_many_and_since_when() {
        let text = "{\"number\":0,\"sent_ns\":7}\n{\"number\":1,\"sent_ns\":9}\n{\"summary\":{\"sent\":2,\"withheld\":1}}\n";
        assert_eq!(read_sent(text).unwrap(), Sent { numbers: 3, first_ns: 7 });
        for wrong in ["", "{}\n", "{\"summary\":{\"sent\":0,\"withheld\":0}}\n"] {
            assert!(read_sent(wrong).is_err(), "{wrong:?}");
        }
    }
}
