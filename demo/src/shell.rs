//! Doing as an operator does: the `violin` command, and words on the terminal.

use anyhow::{Context, Result, bail};
use nix::sys::signal::{SigHandler, Signal, signal};
use std::ffi::OsStr;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn on_interrupt(_signal: i32) {
    INTERRUPTED.store(true, Ordering::SeqCst);
}

/// From now on Ctrl-C and SIGTERM end the demo by the ordinary way, which takes the lab down.
pub(crate) fn catch_interrupts() {
    for which in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler only stores to an atomic, which is async-signal-safe.
        let _ = unsafe { signal(which, SigHandler::Handler(on_interrupt)) };
    }
}

/// Whether the user wants to stop.
pub(crate) fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// An error once the user wants to stop.
pub(crate) fn check_interrupt() -> Result<()> {
    if interrupted() {
        bail!("interrupted; cleaning up")
    }
    Ok(())
}

/// One line for the reader, with the time since the start.
pub(crate) fn say(words: &str) {
    static START: OnceLock<Instant> = OnceLock::new();
    let at = START.get_or_init(Instant::now).elapsed().as_secs_f64();
    println!("[{at:6.1} s] {words}");
    let _ = std::io::stdout().flush();
}

/// Waits for `until` to hold, looking every 50 ms; an error in words after `limit`.
pub(crate) fn wait_for(what: &str, limit: Duration, mut until: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        check_interrupt()?;
        if until()? {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("waited {} s for {what}, in vain", limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The operator at one lab.
#[derive(Debug, Clone)]
pub(crate) struct Operator {
    program: PathBuf,
    lab: String,
}

impl Operator {
    /// Uses the `violin` beside this program.
    pub(crate) fn new(lab: &str) -> Result<Self> {
        let program = std::env::current_exe().context("cannot find this program")?.with_file_name("violin");
        if !program.exists() {
            bail!("got no {}, want the programs built together: run `make build`", program.display());
        }
        Ok(Self { program, lab: lab.to_owned() })
    }

    /// The folder the programs are in.
    pub(crate) fn programs(&self) -> &Path {
        self.program.parent().unwrap_or_else(|| Path::new("."))
    }

    /// `violin --lab LAB words…`, not yet started. In a process group of its own, so that Ctrl-C reaches only the demo.
    pub(crate) fn command<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Command {
        use std::os::unix::process::CommandExt as _;
        let mut command = Command::new(&self.program);
        command.arg("--lab").arg(&self.lab).args(words).stdin(Stdio::null()).process_group(0);
        command
    }

    /// Runs it and returns what it printed; an error with what it complained about otherwise. The user's wish to stop is
    /// passed on to it once, and its end awaited: what it was building it removes.
    pub(crate) fn run<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Result<String> {
        let mut command = self.command(words);
        let output = output_or_interrupt(&mut command)?;
        printed(&command, &output)
    }

    /// The same for what cleans up: it goes on when the user wants to stop.
    pub(crate) fn run_to_end<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Result<String> {
        let mut command = self.command(words);
        let output = command.output().with_context(|| format!("cannot run {}", self.program.display()))?;
        printed(&command, &output)
    }

    /// A command on a node.
    pub(crate) fn on(&self, environment: &str, node: &str, words: &[&str]) -> Command {
        self.command(["ssh", environment, node, "--"].iter().copied().chain(words.iter().copied()))
    }

    /// Runs a command on a node and returns what it printed; an error, too, when the user wants to stop meanwhile.
    pub(crate) fn on_run(&self, environment: &str, node: &str, words: &[&str]) -> Result<String> {
        let mut command = self.on(environment, node, words);
        let output = output_or_interrupt(&mut command)?;
        printed(&command, &output)
    }
}

fn output_or_interrupt(command: &mut Command) -> Result<Output> {
    check_interrupt()?;
    let mut child = Held::spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()))?;
    let (stdout, stderr) = (read_all(child.0.stdout.take()), read_all(child.0.stderr.take()));
    let mut told = false;
    let status = loop {
        if let Some(status) = child.0.try_wait().context("cannot wait for a child")? {
            break status;
        }
        if interrupted() && !told {
            told = true;
            say("interrupted; ending what is under way");
            let id = nix::unistd::Pid::from_raw(i32::try_from(child.0.id()).context("a process id")?);
            let _ = nix::sys::signal::kill(id, Signal::SIGINT);
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    // One that was done before it heard of it has its effect: the caller must know.
    if told && !status.success() {
        check_interrupt()?;
    }
    Ok(Output { status, stdout: stdout.join().unwrap_or_default(), stderr: stderr.join().unwrap_or_default() })
}

fn read_all(stream: Option<impl std::io::Read + Send + 'static>) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut stream) = stream {
            let _ = stream.read_to_end(&mut bytes);
        }
        bytes
    })
}

fn printed(command: &Command, output: &Output) -> Result<String> {
    if !output.status.success() {
        let words: Vec<_> = command.get_args().skip(2).map(|word| word.to_string_lossy()).collect();
        bail!("`violin {}` failed ({}): {}", words.join(" "), output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A child that is ended (by its id) when forgotten.
#[derive(Debug)]
pub(crate) struct Held(pub(crate) Child);

impl Held {
    /// Starts a command.
    pub(crate) fn spawn(command: &mut Command) -> Result<Self> {
        Ok(Self(command.spawn().with_context(|| format!("cannot start {:?}", command.get_program()))?))
    }

    /// Closes its standard input, waits until it ends (by force after `limit`), and returns what it printed.
    pub(crate) fn finish(mut self, limit: Duration) -> Result<String> {
        use std::io::Read as _;
        drop(self.0.stdin.take());
        let mut stdout = self.0.stdout.take();
        let reader = std::thread::spawn(move || {
            let mut text = String::new();
            if let Some(stdout) = &mut stdout {
                let _ = stdout.read_to_string(&mut text);
            }
            text
        });
        let deadline = Instant::now() + limit;
        while self.0.try_wait().context("cannot wait for a child")?.is_none() {
            if Instant::now() > deadline {
                let _ = self.0.kill();
                let _ = self.0.wait();
                bail!("a child did not end within {} s of being asked to", limit.as_secs());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(reader.join().unwrap_or_default())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupt_ends_what_runs_and_nothing_is_started_after_it() {
        let mut command = Command::new("sleep");
        command.arg("600");
        let waiting = std::thread::spawn(move || output_or_interrupt(&mut command).unwrap_err().to_string());
        INTERRUPTED.store(true, Ordering::SeqCst);
        assert!(waiting.join().unwrap().contains("interrupted"));
        assert!(output_or_interrupt(&mut Command::new("true")).is_err());
        INTERRUPTED.store(false, Ordering::SeqCst);
        assert_eq!(output_or_interrupt(Command::new("echo").arg("word")).unwrap().stdout, b"word\n");
    }
}
