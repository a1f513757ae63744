//! A guest's answering service: sends canaries, counts those of others, records and echoes numbered frames, and tells it
//! to whoever asks on a local socket (one JSON line in, one out).

use super::clock::now_ns;
use super::packet::PacketSocket;
use crate::frame::{BROADCAST, Probe};
use crate::record::{Counts, RunReport, Runs};
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Where a guest's service listens.
pub const SOCKET: &str = "/run/violin-probe.sock";
/// Time between canaries: enough to count, little enough to leave an idle guest idle. Under translation every frame that wakes a
/// guest costs it about a millisecond.
const PERIOD: Duration = Duration::from_secs(1);
/// How often a missing interface is looked for.
const RETRY: Duration = Duration::from_millis(50);
/// Neighbours remembered, and for how long after their last canary.
const MAX_NEIGHBOURS: usize = 256;
const FORGET: Duration = Duration::from_secs(30);

/// What a guest's service can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Question {
    /// How many canaries.
    Counts,
    /// What was received of a run of numbered frames.
    Received {
        /// The run.
        run: u64,
    },
}

/// What it answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Canaries.
    Counts(Counts),
    /// A run.
    Received(RunReport),
    /// Nothing, and why.
    Error(String),
}

/// The service's memory.
#[derive(Debug, Default)]
struct State {
    counts: Counts,
    runs: Runs,
    neighbours: BTreeMap<[u8; 6], Instant>,
}

/// The service. It runs until the process ends.
#[derive(Debug, Clone)]
pub struct Node {
    interface: String,
    tag: u64,
    state: Arc<Mutex<State>>,
}

impl Node {
    /// Starts the service's threads on `interface`. `appeared` is called whenever the interface turns out to be another
    /// one than before, so that it can be set up again.
    ///
    /// Errors: the local socket cannot be made.
    pub fn start(interface: &str, tag: u64, socket: &Path, appeared: impl Fn() + Send + 'static) -> Result<Self> {
        let node = Self { interface: interface.to_owned(), tag, state: Arc::default() };
        let _ = std::fs::remove_file(socket);
        let listener = UnixListener::bind(socket).with_context(|| format!("cannot listen on {}", socket.display()))?;
        let (receiver, sender, teller) = (node.clone(), node.clone(), node.clone());
        thread::Builder::new().name("receive".into()).spawn(move || receiver.receive_forever(&appeared))?;
        thread::Builder::new().name("canary".into()).spawn(move || sender.send_forever())?;
        thread::Builder::new().name("answer".into()).spawn(move || teller.answer_forever(&listener))?;
        Ok(node)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn receive_forever(&self, appeared: &dyn Fn()) {
        let mut index = None;
        loop {
            let Ok(socket) = PacketSocket::open(&self.interface, Duration::from_secs(1)) else {
                thread::sleep(RETRY);
                continue;
            };
            if index.replace(socket.index).is_some_and(|old| old != socket.index) {
                appeared();
            }
            if index.is_some() {
                // A socket that outlived its interface says so once; whatever the reason, a new one is made.
                while self.receive(&socket).is_ok() {}
                self.state().counts.rebinds += 1;
                thread::sleep(RETRY);
            }
        }
    }

    fn receive(&self, socket: &PacketSocket) -> std::io::Result<()> {
        let Some((source, probe)) = socket.receive()? else { return Ok(()) };
        let received_ns = now_ns();
        match probe {
            Probe::Canary { tag, .. } => {
                let mut state = self.state();
                state.counts.receive(self.tag, tag);
                if tag == self.tag && (state.neighbours.len() < MAX_NEIGHBOURS || state.neighbours.contains_key(&source)) {
                    state.neighbours.insert(source, Instant::now());
                }
            }
            Probe::Numbered { run, number, sent_ns } => {
                // An echo that cannot be sent is the prober's loss to see; the frame itself was received.
                let _ = socket.send(source, &Probe::Echo { run, number, sent_ns, received_ns });
                let mut state = self.state();
                state.counts.numbered += 1;
                state.runs.entry(run).receive(number, received_ns);
            }
            Probe::End { run, last } => self.state().runs.entry(run).end(last),
            Probe::Echo { .. } => {}
        }
        Ok(())
    }

    fn send_forever(&self) {
        let (mut sequence, mut turn) = (0, 0);
        let mut next = Instant::now();
        let mut socket = None;
        loop {
            if socket.is_none() {
                socket = PacketSocket::open(&self.interface, PERIOD).ok();
            }
            let neighbour = {
                let mut state = self.state();
                state.neighbours.retain(|_, seen| seen.elapsed() < FORGET);
                let count = state.neighbours.len();
                state.neighbours.keys().nth(turn % count.max(1)).copied()
            };
            turn = turn.wrapping_add(1);
            for destination in [Some(BROADCAST), neighbour].into_iter().flatten() {
                let canary = Probe::Canary { tag: self.tag, sequence };
                sequence += 1;
                match socket.as_ref().map(|socket| socket.send(destination, &canary)) {
                    Some(Ok(())) => {
                        let mut state = self.state();
                        state.counts.sent += 1;
                        state.counts.sent_unicast += u64::from(destination != BROADCAST);
                    }
                    Some(Err(_)) => socket = None,
                    None => {}
                }
            }
            next += PERIOD;
            // A guest that stood still does not catch up.
            next = next.max(Instant::now());
            thread::sleep(next.saturating_duration_since(Instant::now()).max(RETRY));
        }
    }

    fn answer_forever(&self, listener: &UnixListener) {
        for stream in listener.incoming().flatten() {
            let _ = stream.set_read_timeout(Some(Duration::from_secs(5)));
            let _ = stream.set_write_timeout(Some(Duration::from_secs(5)));
            // Whoever went away before the answer needs none.
            let _ = self.answer(&stream);
        }
    }

    fn answer(&self, stream: &UnixStream) -> std::io::Result<()> {
        let mut line = String::new();
        BufReader::new(stream.take(4096)).read_line(&mut line)?;
        let answer = match serde_json::from_str(&line) {
            Ok(Question::Counts) => Answer::Counts(self.state().counts.clone()),
            Ok(Question::Received { run }) => {
                let state = self.state();
                state.runs.report(run).map_or_else(
                    || Answer::Error(format!("no frame of run {run} was received; runs known: {:?}", state.runs.known())),
                    Answer::Received,
                )
            }
            Err(error) => Answer::Error(format!("got {:?}, want a question such as \"counts\": {error}", line.trim())),
        };
        let mut text = serde_json::to_string(&answer)?;
        text.push('\n');
        (&mut &*stream).write_all(text.as_bytes())
    }
}

/// Asks a guest's service.
///
/// Errors: it does not run here, or its answer is an error.
pub fn ask(socket: &Path, question: &Question) -> Result<Answer> {
    let mut stream =
        UnixStream::connect(socket).with_context(|| format!("nothing answers on {}; is this a guest?", socket.display()))?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut text = serde_json::to_string(question)?;
    text.push('\n');
    stream.write_all(text.as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).context("the guest's service did not answer")?;
    match serde_json::from_str(&line).with_context(|| format!("got answer {line:?}"))? {
        Answer::Error(said) => bail!(said),
        answer => Ok(answer),
    }
}

/// Sends one broadcast canary with any tag: the positive control of counting foreign ones.
///
/// Errors: the interface cannot send.
pub fn plant(interface: &str, tag: u64) -> Result<()> {
    let socket = PacketSocket::open(interface, PERIOD).with_context(|| format!("cannot open interface {interface}"))?;
    socket.send(BROADCAST, &Probe::Canary { tag, sequence: 0 }).with_context(|| format!("cannot send on {interface}"))
}
