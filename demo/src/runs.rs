//! The three runs of HPL, alike but for the crowd and for what the manager may do.

use crate::capture::{Capture, Seen};
use crate::hpl::{self, Running};
use crate::prober::{self, Prober, Received};
use crate::seed::{COMPUTE, Cast};
use crate::shell::{self, Held};
use crate::stage::Stage;
use crate::transfers::{self, Transfer, Transfers};
use crate::{Guests, Options};
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use violin_common::api::adapt::{AdaptRequest, MigrationSeen, Mode, VmListed};
use violin_lab::HostState;

/// Demand below which a VM counts as idle before a run.
const IDLE: f64 = 0.3;
/// Both environments.
const ENVIRONMENTS: [&str; 2] = ["alpha", "beta"];

/// What a guest counted of canaries.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Canaries {
    /// Sent by it.
    pub(crate) sent: u64,
    /// Received with its own environment's tag.
    pub(crate) own: u64,
    /// Received with another tag.
    pub(crate) foreign: u64,
}

/// One run.
#[derive(Debug, Serialize)]
pub(crate) struct Run {
    /// `calm`, `overloaded`, `adaptive`.
    pub(crate) label: &'static str,
    /// HPL's result.
    pub(crate) hpl: hpl::Finished,
    /// Host's monotonic clock when HPL started and ended, in nanoseconds.
    pub(crate) began_ns: u64,
    /// See above.
    pub(crate) ended_ns: u64,
    /// What each host's underlay carried meanwhile.
    #[serde(skip)]
    pub(crate) underlay: BTreeMap<String, Seen>,
    /// Connections inside beta.
    pub(crate) transfers: Vec<Transfer>,
    /// Moves the manager made during the run.
    #[serde(skip)]
    pub(crate) migrations: Vec<MigrationSeen>,
    /// What moved VMs received of the prober's frames, by the move's number.
    #[serde(skip)]
    pub(crate) probes: BTreeMap<u64, Result<Received, String>>,
    /// All VMs as last seen before the first move; without moves, as last seen during the run.
    #[serde(skip)]
    pub(crate) before: Vec<VmListed>,
    /// All VMs at the end.
    #[serde(skip)]
    pub(crate) after: Vec<VmListed>,
}

/// Everything that was seen.
#[derive(Debug)]
pub(crate) struct Recorded {
    pub(crate) runs: Vec<Run>,
    /// Canaries counted by every guest before any foreign one was planted.
    pub(crate) canaries: BTreeMap<String, Canaries>,
    /// Foreign canaries counted by each compute node after some were planted.
    pub(crate) planted_seen: BTreeMap<String, u64>,
    /// What the underlay carried meanwhile: those canaries in a network not their own, and bare frames.
    pub(crate) planted_underlay: Seen,
    /// What a VM received of frames of which one was withheld.
    pub(crate) withheld: Received,
    /// What the receiver of a corrupted transfer saw.
    pub(crate) corrupted: Transfer,
}

/// Plays all runs and the positive controls.
pub(crate) fn play(options: &Options, stage: &Stage, cast: &Cast) -> Result<Recorded> {
    let evidence = options.out.join("evidence");
    stage.ask(&AdaptRequest::SetMode(Mode::Observe))?;
    let (target, guess) = if options.guests == Guests::Qemu { (53.0, 1240) } else { (10.0, 600) };
    // Under what every run carries: among TCG guests it makes HPL a third slower.
    let carried = Transfers::start(&stage.operator, 5000)?;
    let n = hpl::calibrate(&stage.operator, guess, target, &evidence)?;
    carried.finish()?;

    let calm = run(options, stage, "calm", n, Mode::Act, None)?;
    let crowd = (!options.no_crowd).then_some(cast);
    let schedule = Schedule::of(calm.hpl.seconds, options.guests);
    let overloaded = run(options, stage, "overloaded", n, Mode::DryRun, crowd.map(|cast| (cast, schedule)))?;

    let mode = if options.dry_run { Mode::DryRun } else { Mode::Act };
    let adaptive = run(options, stage, "adaptive", n, mode, crowd.map(|cast| (cast, schedule)))?;

    shell::say("counting canaries, then planting one that must be counted, withholding one probe frame, corrupting one transfer");
    stage.ask(&AdaptRequest::SetMode(Mode::Observe))?;
    let canaries = count_canaries(stage)?;
    let (planted_seen, planted_underlay) = planted(stage, &canaries, &evidence)?;
    let withheld = prober::withheld(&stage.operator, &stage.ways, &evidence)?;
    let corrupted = transfers::corrupted(&stage.operator)?;
    let runs = vec![calm, overloaded, adaptive];
    Ok(Recorded { runs, canaries, planted_seen, planted_underlay, withheld, corrupted })
}

/// When the crowd comes, in seconds after HPL's start; the same in both overloaded runs.
#[derive(Debug, Clone, Copy)]
struct Schedule {
    first: f64,
    later: f64,
}

impl Schedule {
    /// The second crowd comes when the manager has had time to answer the first with a move inside the domain: among QEMU VMs
    /// it decides some 12 s after HPL's start, for starting the ranks takes them long.
    fn of(calm_seconds: f64, guests: Guests) -> Self {
        let later = if guests == Guests::Qemu { 0.3 } else { 0.25 };
        Self { first: 0.06 * calm_seconds, later: later * calm_seconds }
    }
}

fn run(
    options: &Options,
    stage: &Stage,
    label: &'static str,
    n: u32,
    mode: Mode,
    crowd: Option<(&Cast, Schedule)>,
) -> Result<Run> {
    let evidence = options.out.join("evidence");
    let operator = &stage.operator;
    shell::say(&format!("{label}: waiting until all VMs are idle"));
    shell::wait_for("all VMs to be idle", Duration::from_secs(120), || {
        Ok(stage.vms()?.iter().all(|vm| vm.smoothed_demand.is_some_and(|demand| demand < IDLE)))
    })?;
    let earlier = stage.migrations()?.len();
    stage.ask(&AdaptRequest::SetMode(mode))?;
    let prober = Prober::start(operator, &stage.manager, stage.ways.clone(), &evidence);
    let port = match label {
        "calm" => 5001,
        "overloaded" => 5002,
        _ => 5003,
    };
    let transfers = Transfers::start(operator, port)?;
    // In every run: what it costs must not count against the adaptive one.
    let mut captures = Vec::new();
    for host in &stage.lab.hosts {
        let file = evidence.join(format!("underlay-{label}-{}.pcap", host.host));
        captures.push((host.host.to_string(), Capture::start(host, &stage.inside, &file)?));
    }

    shell::say(&format!("{label}: HPL starts, N = {n}, on alpha's compute nodes"));
    let began_ns = monotonic_ns()?;
    let hpl = Running::start(operator, n, &evidence.join(format!("hpl-{label}.log")))?;
    let mut crowd_state = CrowdState { operator, cast: crowd, burning: Vec::new(), phase: 0 };
    let mut timeline = Timeline::create(stage, evidence.join(format!("vms-{label}.jsonl")), earlier)?;
    let result = hpl.wait(operator, &evidence.join(format!("hpl-{label}.txt")), Duration::from_secs(900), |elapsed| {
        crowd_state.advance(elapsed)?;
        timeline.sample(elapsed)
    });
    let ended_ns = monotonic_ns()?;
    let after = stage.vms()?;
    crowd_state.disperse();
    let hpl = result?;
    // What the manager decided during the run may still be under way.
    shell::wait_for("moves under way to end", Duration::from_secs(180), || {
        Ok(stage.migrations()?.iter().all(|migration| migration.ended.is_some()))
    })?;
    stage.ask(&AdaptRequest::SetMode(Mode::Observe))?;
    let probes = prober.finish();
    let underlay = captures.into_iter().map(|(host, capture)| Ok((host, capture.finish()?))).collect::<Result<_>>()?;
    let transfers = transfers.finish()?;
    let migrations = stage.migrations()?.split_off(earlier);
    shell::say(&format!(
        "{label}: HPL took {:.1} s ({} at {:.3} Gflop/s), {} moves",
        hpl.seconds,
        if hpl.passed { "PASSED" } else { "FAILED" },
        hpl.gflops,
        migrations.len()
    ));
    Ok(Run { label, hpl, began_ns, ended_ns, underlay, transfers, migrations, probes, before: timeline.before, after })
}

/// Guests of beta that really compute.
#[derive(Debug)]
struct CrowdState<'a> {
    operator: &'a shell::Operator,
    cast: Option<(&'a Cast, Schedule)>,
    burning: Vec<(String, Held)>,
    phase: u8,
}

impl CrowdState<'_> {
    fn advance(&mut self, elapsed: f64) -> Result<()> {
        let Some((cast, schedule)) = self.cast else { return Ok(()) };
        let due = match self.phase {
            0 if elapsed >= schedule.first => &cast.first,
            1 if elapsed >= schedule.later => &cast.later,
            _ => return Ok(()),
        };
        self.phase += 1;
        shell::say(&format!("beta's {} on {} start to compute", due.join(" and "), cast.crowded));
        for node in due {
            let mut command = self.operator.on("beta", node, &["violin-probe", "burn", "--seconds", "3600"]);
            command.stdout(Stdio::null()).stderr(Stdio::null());
            self.burning.push((node.clone(), Held::spawn(&mut command)?));
        }
        Ok(())
    }

    fn disperse(&mut self) {
        for (node, held) in self.burning.drain(..) {
            if let Err(error) = self.operator.run_to_end(["ssh", "beta", &node, "--", "pkill -f 'violin-probe burn'"]) {
                shell::say(&format!("beta's {node} may still compute: {error:#}"));
            }
            drop(held);
        }
    }
}

/// The VMs once a second, kept as evidence.
struct Timeline<'a> {
    stage: &'a Stage,
    file: std::fs::File,
    next: f64,
    earlier: usize,
    before: Vec<VmListed>,
    moved: bool,
}

impl<'a> Timeline<'a> {
    fn create(stage: &'a Stage, path: PathBuf, earlier: usize) -> Result<Self> {
        let file = std::fs::File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { stage, file, next: 0.0, earlier, before: Vec::new(), moved: false })
    }

    fn sample(&mut self, elapsed: f64) -> Result<()> {
        if elapsed < self.next {
            return Ok(());
        }
        self.next = elapsed + 1.0;
        let vms = self.stage.vms()?;
        writeln!(self.file, "{}", serde_json::json!({ "elapsed": elapsed, "vms": vms }))?;
        self.moved |= self.stage.migrations()?.len() > self.earlier;
        if !self.moved {
            self.before = vms;
        }
        Ok(())
    }
}

fn canaries(stage: &Stage, environment: &str, node: &str) -> Result<Canaries> {
    let text = stage.operator.on_run(environment, node, &["violin-probe", "counts"])?;
    serde_json::from_str(text.trim()).with_context(|| format!("canaries of {environment}-{node}: {text:?}"))
}

fn count_canaries(stage: &Stage) -> Result<BTreeMap<String, Canaries>> {
    let mut all = BTreeMap::new();
    for environment in ENVIRONMENTS {
        for node in COMPUTE.iter().chain(&["head"]) {
            all.insert(format!("{environment}-{node}"), canaries(stage, environment, node)?);
        }
    }
    if all.values().any(|counts| counts.own == 0) {
        bail!("a guest received no canary of its own environment: the count of foreign ones would prove nothing ({all:?})");
    }
    Ok(all)
}

/// The positive controls: the head of each environment sends canaries with a foreign tag, the host of alpha's head one outside
/// the mesh, and frames to a guest's MAC. How many foreign ones each compute node counts now, and what the wire of that host carried.
fn planted(stage: &Stage, before: &BTreeMap<String, Canaries>, evidence: &Path) -> Result<(BTreeMap<String, u64>, Seen)> {
    let head = stage.vms()?.into_iter().find(|vm| vm.vm.as_str() == "alpha-head").and_then(|vm| vm.host);
    let host = stage.lab.hosts.iter().find(|host| Some(&host.host) == head.as_ref()).context("alpha's head runs nowhere")?;
    let file = evidence.join("underlay-control.pcap");
    let capture = Capture::start(host, &stage.inside, &file)?;
    let guest = stage.ways.get("alpha").and_then(|way| way.macs.values().next()).context("alpha has no guest")?.to_string();
    let wire = ["--interface", &host.underlay_interface];
    for (words, rest) in [
        (["plant-foreign", "--tag", "65000"].as_slice(), [].as_slice()),
        (&["send-numbered", "--run", "60001", "--duration", "20ms"], &["--mac", &guest]),
    ] {
        let mut bare = Command::new("nsenter");
        bare.arg(format!("--net={}", host.netns_path())).arg("--").arg(stage.lab.binaries.join("violin-probe"));
        let output = bare.args(words).args(wire).args(rest).output().context("cannot run nsenter")?;
        if !output.status.success() {
            bail!("no bare frame could be sent: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
    }
    let other = stage.lab.hosts.iter().find(|other| other.host != host.host).context("there is one host only")?;
    let vni = *stage.inside.vnis.first().context("there is no network")?;
    plant_readable(host, &format!("/dev/udp/{}/{}", other.address, other.mesh_port), vni)?;
    // A flood reaches all; one of its copies may be lost, so that who has seen none yet is sent another.
    let mut seen: BTreeMap<String, u64> = BTreeMap::new();
    let counted = shell::wait_for("planted canaries to be counted by every compute node", Duration::from_secs(30), || {
        for environment in ENVIRONMENTS {
            let name = |node: &str| format!("{environment}-{node}");
            if COMPUTE.iter().all(|node| seen.get(&name(node)).is_some_and(|count| *count > 0)) {
                continue;
            }
            stage.operator.on_run(environment, "head", &["violin-probe", "plant-foreign", "--tag", "65000"])?;
            for node in COMPUTE {
                let earlier = before.get(&name(node)).map_or(0, |counts| counts.foreign);
                seen.insert(name(node), canaries(stage, environment, node)?.foreign.saturating_sub(earlier));
            }
        }
        Ok(seen.values().all(|count| *count > 0))
    });
    if let Err(error) = counted {
        shell::check_interrupt()?;
        // Not an end of the demo: the report says who counted none.
        shell::say(&format!("{error:#}"));
    }
    Ok((seen, capture.finish()?))
}

/// A datagram that calls itself sealed and is not: the beginning of a slice in a network, behind the outer header.
fn plant_readable(host: &HostState, to: &str, vni: u32) -> Result<()> {
    let [_, high, middle, low] = vni.to_be_bytes();
    let bytes = format!("\\x21{}\\x{high:02x}\\x{middle:02x}\\x{low:02x}{}", "\\0".repeat(15), "\\0".repeat(77));
    let mut bash = Command::new("nsenter");
    bash.arg(format!("--net={}", host.netns_path())).args(["--", "bash", "-c", &format!("printf '{bytes}' > {to}")]);
    let output = bash.output().context("cannot run nsenter")?;
    if !output.status.success() {
        bail!("no readable datagram could be sent: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn monotonic_ns() -> Result<u64> {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?;
    Ok(u64::try_from(now.tv_sec())? * 1_000_000_000 + u64::try_from(now.tv_nsec())?)
}
