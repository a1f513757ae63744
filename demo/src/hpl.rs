//! HPL (Petitet et al. 2004), as the HPC Challenge package runs it, over alpha's compute nodes.

use crate::shell::{self, Held, Operator, check_interrupt};
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

const DIRECTORY: &str = "/root/hpl";
const OUTPUT: &str = "/root/hpl/hpccoutf.txt";

/// One run of HPL.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Finished {
    /// Whether its residual check passed.
    pub(crate) passed: bool,
    /// What it says it reached.
    pub(crate) gflops: f64,
    /// Host clock around mpirun.
    pub(crate) seconds: f64,
    /// What it says it took.
    pub(crate) own_seconds: f64,
    /// Order of the matrix.
    pub(crate) n: u32,
}

/// What `violin-probe hpl-result` tells.
#[derive(Debug, Deserialize)]
struct Parsed {
    passed: bool,
    gflops: f64,
    seconds: f64,
    n: u32,
}

/// A run under way.
#[derive(Debug)]
pub(crate) struct Running {
    child: Held,
    began: Instant,
    n: u32,
}

impl Running {
    /// Starts mpirun on the head node.
    pub(crate) fn start(operator: &Operator, n: u32, log: &Path) -> Result<Self> {
        let log = std::fs::File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
        let order = n.to_string();
        let program = ["violin-probe", "hpl", "--n", &order, "--p", "1", "--q", "4", "--directory", DIRECTORY];
        let mut command = operator.command(["run", "alpha", "--"].into_iter().chain(program));
        command.stdout(log.try_clone()?).stderr(log).stdin(Stdio::null());
        let began = Instant::now();
        Ok(Self { child: Held::spawn(&mut command)?, began, n })
    }

    /// Seconds since mpirun was started.
    pub(crate) fn elapsed(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    /// Waits for its end, doing `meanwhile` every 100 ms, and reads what it wrote.
    pub(crate) fn wait(
        mut self,
        operator: &Operator,
        keep: &Path,
        limit: Duration,
        mut meanwhile: impl FnMut(f64) -> Result<()>,
    ) -> Result<Finished> {
        let status = loop {
            check_interrupt()?;
            if let Some(status) = self.child.0.try_wait().context("cannot wait for mpirun")? {
                break status;
            }
            if self.began.elapsed() > limit {
                bail!("HPL with N = {} did not end within {} s", self.n, limit.as_secs());
            }
            meanwhile(self.elapsed())?;
            std::thread::sleep(Duration::from_millis(100));
        };
        let seconds = self.elapsed();
        if !status.success() {
            bail!("mpirun failed ({status}); its output lies in the evidence");
        }
        let text = operator.on_run("alpha", "c1", &["cat", OUTPUT])?;
        std::fs::write(keep, &text)?;
        let parsed: Parsed = serde_json::from_str(&operator.on_run("alpha", "c1", &["violin-probe", "hpl-result", OUTPUT])?)
            .context("HPL's output was not understood")?;
        if parsed.n != self.n {
            bail!("got HPL output for N = {}, want N = {}", parsed.n, self.n);
        }
        Ok(Finished { passed: parsed.passed, gflops: parsed.gflops, seconds, own_seconds: parsed.seconds, n: parsed.n })
    }
}

/// Finds the order of the matrix that makes a calm run take about `target` seconds, `guess` being tried first.
///
/// Starting the ranks takes the same for every order. HPL's own time grows with N³ where it computes, with N² where it talks; on
/// both kinds of guests it was between.
pub(crate) fn calibrate(operator: &Operator, guess: u32, target: f64, evidence: &Path) -> Result<u32> {
    // The first job in fresh guests reads everything from disk, and under TCG is translated anew: it tells nothing.
    let log = evidence.join("warm-up.log");
    let run = Running::start(operator, 100, &log)?;
    let first = run.wait(operator, &evidence.join("warm-up.txt"), Duration::from_secs(180), |_| Ok(()))?;
    shell::say(&format!("warming up: the first job took {:.1} s, {:.1} of them HPL", first.seconds, first.own_seconds));
    let mut n = guess;
    let mut nearest = (f64::INFINITY, guess);
    for round in 1..=4 {
        let log = evidence.join(format!("calibration-{round}.log"));
        let run = Running::start(operator, n, &log)?;
        let result =
            run.wait(operator, &evidence.join(format!("calibration-{round}.txt")), Duration::from_secs(180), |_| Ok(()))?;
        shell::say(&format!("calibration: N = {n} takes {:.1} s, {:.1} of them HPL", result.seconds, result.own_seconds));
        // Only an order that was measured is ever returned.
        let off = (result.seconds / target).ln().abs();
        if off < nearest.0 {
            nearest = (off, n);
        }
        if (0.85..1.1).contains(&(result.seconds / target)) {
            return Ok(n);
        }
        let start = result.seconds - result.own_seconds;
        let wanted = (target - start).max(0.2 * target);
        let factor = (wanted / result.own_seconds.max(0.1)).powf(0.4).clamp(0.6, 2.5);
        n = ((f64::from(n) * factor / 20.0).round() as u32).max(5) * 20;
    }
    shell::say(&format!("calibration: no order came close to {target:.0} s; the nearest one, N = {}, is taken", nearest.1));
    Ok(nearest.1)
}
