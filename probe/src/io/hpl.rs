//! Runs HPL, and nothing else, out of Debian's hpcc. Started by mpirun on every rank.
//!
//! hpcc runs all its tests in one go, and no option skips any: with a matrix that keeps HPL busy for a minute the others take
//! many times as long, and those of latency wait for whoever shares the cores. So each rank runs a copy of the program in
//! which their switches are off ([`only_hpl`]). HPL itself runs and checks exactly what was asked for.

use crate::hpl::{HplResult, Problem, only_hpl, read_result};
use anyhow::{Context, Result, bail};
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Names of the files hpcc uses in its working directory.
const INPUT: &str = "hpccinf.txt";
const OUTPUT: &str = "hpccoutf.txt";

/// Runs this rank in `directory`. Rank 0 returns HPL's result; the others become hpcc and do not return.
///
/// Errors: hpcc is missing, another build than Debian 12's, or failed, or its output holds no result.
pub fn run(problem: &Problem, directory: &Path) -> Result<HplResult> {
    fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    std::env::set_current_dir(directory).with_context(|| format!("cannot enter {}", directory.display()))?;
    let rank = std::env::var("OMPI_COMM_WORLD_RANK").context("no OMPI_COMM_WORLD_RANK: start this by mpirun")?;
    let mut hpcc = Command::new(own_copy(&rank)?);
    if rank != "0" {
        return Err(hpcc.exec()).context("cannot run hpcc");
    }
    remove(Path::new(OUTPUT))?;
    fs::write(INPUT, problem.input()).context("cannot write HPL's input")?;
    let status = hpcc.status().context("cannot run hpcc")?;
    if !status.success() {
        bail!("hpcc failed: {status}");
    }
    let text = fs::read_to_string(OUTPUT).with_context(|| format!("cannot read {}", directory.join(OUTPUT).display()))?;
    let result = read_result(&text).map_err(anyhow::Error::msg)?;
    if (result.n, result.p, result.q, result.nb) != (problem.n, problem.p, problem.q, problem.nb) {
        bail!("got a result for another problem ({result:?}), want {problem:?}: does another job use {}?", directory.display());
    }
    Ok(result)
}

/// Makes this rank's copy of the program; returns where it is.
fn own_copy(rank: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let program = std::env::split_paths(&path).map(|folder| folder.join("hpcc")).find(|file| file.is_file());
    let program = program.context("no hpcc in PATH; install the package hpcc")?;
    let bytes = fs::read(&program).with_context(|| format!("cannot read {}", program.display()))?;
    let Some(changed) = only_hpl(&bytes) else {
        bail!("got another build of {} than known, want hpcc 1.5.0-3 of Debian 12 for amd64", program.display());
    };
    // Ranks may share the directory: each its own file.
    let copy = std::env::current_dir()?.join(format!("hpcc.{rank}"));
    remove(&copy)?;
    fs::write(&copy, changed).with_context(|| format!("cannot write {}", copy.display()))?;
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o700))?;
    Ok(copy)
}

fn remove(file: &Path) -> Result<()> {
    match fs::remove_file(file) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", file.display()))
        }
        _ => Ok(()),
    }
}
