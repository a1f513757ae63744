//! A daemon's log: lines to standard error that never hold up, and never end, whoever writes them.
//!
//! Owns descriptor 2 from [`start`] on. Lines wait in a queue bounded in bytes for one thread that writes; where the reader
//! hangs or the disk is full they are lost, counted, and said to be lost as soon as somebody takes lines again. What C
//! libraries, `eprintln!` and panics write to descriptor 2 goes the same way. Never writes anywhere else.
//!
//! Ours, not tracing-appender's `NonBlocking` (0.2.5): that one bounds lines and not bytes, neither counts nor says what the
//! sink refused, and its guard prints to standard output, which may be the very pipe that is stuck.

use std::collections::VecDeque;
use std::fmt::Display;
use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};

/// Most bytes that wait: some thousand lines.
const QUEUE: usize = 1 << 20;
/// How long the end of a daemon waits for its last lines to be written.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How long a panic waits for its words to be written: an abort may follow it.
const PANIC_WORDS: Duration = Duration::from_millis(100);
/// How often a sink that refused is tried again, while nothing new is said.
const AGAIN: Duration = Duration::from_secs(1);
/// How often a descriptor that others made non-blocking is tried.
const POLL: Duration = Duration::from_millis(20);
/// Longest piece without a line's end taken from descriptor 2, in bytes.
const PIECE: usize = 8 << 10;

static LOG: OnceLock<Arc<Queue>> = OnceLock::new();

/// Lines of this process's log that were lost since its start; 0 before [`start`].
pub fn lines_lost() -> u64 {
    LOG.get().map_or(0, |queue| queue.lost.load(Ordering::Relaxed))
}

/// Begins the log of this process: what `tracing` hears, filtered by the environment's `variable`, or by `usual` where
/// that is not set or cannot be understood.
///
/// Errors: there is a log already, or no descriptor or thread is to be had.
pub fn start(variable: &str, usual: &str) -> io::Result<Log> {
    let filter = EnvFilter::try_from_env(variable).unwrap_or_else(|_| EnvFilter::new(usual));
    let colours = io::stderr().is_terminal();
    let sink = io::stderr().as_fd().try_clone_to_owned()?;
    let queue = Arc::new(Queue::default());
    LOG.set(Arc::clone(&queue)).map_err(|_| io::Error::other("a process has one log"))?;
    let (mut from, to) = io::pipe()?;
    let (writing, reading) = (Arc::clone(&queue), Arc::clone(&queue));
    let mut out = Out { sink: File::from(sink.try_clone()?), unsaid: 0, torn: false };
    std::thread::Builder::new().name("log".into()).spawn(move || writing.write_out(&mut out))?;
    std::thread::Builder::new().name("log-others".into()).spawn(move || {
        reading.take_from(&mut from);
        reading.state().drained = true;
        reading.written.notify_all();
    })?;
    nix::unistd::dup2_stderr(&to)?;
    let lines = Lines(Arc::clone(&queue));
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(lines).init();
    let panics = Arc::clone(&queue);
    std::panic::set_hook(Box::new(move |panic| {
        let thread = std::thread::current();
        let mut words = format!("thread '{}' {panic}\n", thread.name().unwrap_or("?"));
        let trace = std::backtrace::Backtrace::capture();
        if trace.status() == std::backtrace::BacktraceStatus::Captured {
            words += &format!("{trace}\n");
        }
        panics.push(words.as_bytes());
        panics.wait(PANIC_WORDS, State::is_written);
    }));
    Ok(Log { queue, sink })
}

/// The log's end: dropped, it waits for the last lines to be written, but not for ever.
#[derive(Debug)]
pub struct Log {
    queue: Arc<Queue>,
    sink: OwnedFd,
}

impl Log {
    /// A line as it is, for why a daemon ends: queued also where others are lost.
    pub fn say(&self, words: impl Display) {
        self.queue.put(&mut self.queue.state(), format!("{words}\n").as_bytes());
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        // Closes the last writing end of the pipe, so what was still in it comes out.
        let _ = nix::unistd::dup2_stderr(&self.sink);
        self.queue.wait(LAST_WORDS, |state| state.drained && state.is_written());
    }
}

/// Where `tracing` writes: each event is one call.
#[derive(Debug)]
struct Lines(Arc<Queue>);

impl<'a> MakeWriter<'a> for Lines {
    type Writer = &'a Queue;

    fn make_writer(&'a self) -> &'a Queue {
        &self.0
    }
}

impl Write for &Queue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Debug)]
enum Entry {
    Line(Box<[u8]>),
    /// So many lines were lost here.
    Lost(u64),
}

#[derive(Debug, Default)]
struct State {
    entries: VecDeque<Entry>,
    /// Of the lines above and the one that is being written.
    bytes: usize,
    /// The writer is at work on what it took out.
    writing: bool,
    /// Nothing more comes out of descriptor 2.
    drained: bool,
}

impl State {
    fn is_written(&self) -> bool {
        self.entries.is_empty() && !self.writing
    }
}

#[derive(Debug, Default)]
struct Queue {
    state: Mutex<State>,
    filled: Condvar,
    written: Condvar,
    lost: AtomicU64,
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic is done while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a line into the queue, or counts it as lost. Cost: one short lock; never waits for the sink.
    fn push(&self, line: &[u8]) {
        let mut state = self.state();
        if state.bytes + line.len() <= QUEUE {
            return self.put(&mut state, line);
        }
        self.lost.fetch_add(1, Ordering::Relaxed);
        match state.entries.back_mut() {
            Some(Entry::Lost(count)) => *count += 1,
            // Each of these has a line before it, so they are bounded too.
            _ => state.entries.push_back(Entry::Lost(1)),
        }
        self.filled.notify_one();
    }

    fn put(&self, state: &mut State, line: &[u8]) {
        state.bytes += line.len();
        state.entries.push_back(Entry::Line(line.into()));
        self.filled.notify_one();
    }

    /// Waits until it is `done`, at most so long.
    fn wait(&self, limit: Duration, done: impl Fn(&State) -> bool) {
        let deadline = Instant::now() + limit;
        let mut state = self.state();
        while !done(&state) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.written.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The writing thread: takes entries out one by one, for ever.
    fn write_out<W: Write>(&self, out: &mut Out<W>) {
        loop {
            let entry = self.next(out.unsaid > 0);
            let mut len = 0;
            match entry {
                None => _ = out.say_lost(),
                Some(Entry::Lost(count)) => {
                    out.unsaid += count;
                    out.say_lost();
                }
                Some(Entry::Line(line)) => {
                    len = line.len();
                    if !out.say_lost() || !out.put(&line) {
                        self.lost.fetch_add(1, Ordering::Relaxed);
                        out.unsaid += 1;
                    }
                }
            }
            let mut state = self.state();
            state.bytes -= len;
            state.writing = false;
            self.written.notify_all();
        }
    }

    /// The next entry; `None`: there is none, and it is time to say again what `owes` to be said.
    fn next(&self, owes: bool) -> Option<Entry> {
        let mut state = self.state();
        loop {
            if let Some(entry) = state.entries.pop_front() {
                state.writing = true;
                return Some(entry);
            }
            if owes {
                let (again, timeout) = self.filled.wait_timeout(state, AGAIN).unwrap_or_else(PoisonError::into_inner);
                state = again;
                if timeout.timed_out() && state.entries.is_empty() {
                    state.writing = true;
                    return None;
                }
            } else {
                state = self.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// The thread that empties descriptor 2: lines of others become lines of the queue.
    fn take_from(&self, from: &mut impl Read) {
        let (mut chunk, mut rest) = ([0; PIECE], Vec::new());
        loop {
            match from.read(&mut chunk) {
                Ok(0) => break,
                Ok(len) => rest.extend_from_slice(&chunk[..len]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
            while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                self.push(&rest[..=end]);
                rest.drain(..=end);
            }
            if rest.len() >= PIECE {
                self.push(&rest);
                rest.clear();
            }
        }
        if !rest.is_empty() {
            rest.push(b'\n');
            self.push(&rest);
        }
    }
}

/// The sink and what it is owed.
#[derive(Debug)]
struct Out<W> {
    sink: W,
    /// Lines lost that the log does not tell of yet.
    unsaid: u64,
    /// The last line broke off in its middle.
    torn: bool,
}

impl<W: Write> Out<W> {
    /// Writes all of it; says whether that was possible.
    fn put(&mut self, bytes: &[u8]) -> bool {
        if self.torn && !self.put_all(b"\n") {
            return false;
        }
        self.torn = false;
        self.put_all(bytes)
    }

    fn put_all(&mut self, bytes: &[u8]) -> bool {
        let mut rest = bytes;
        while !rest.is_empty() {
            match self.sink.write(rest) {
                Ok(len) if len > 0 => rest = &rest[len..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(POLL),
                _ => {
                    self.torn |= rest.len() < bytes.len();
                    return false;
                }
            }
        }
        true
    }

    /// Tells of lost lines, if there are any; says whether nothing is owed any more.
    fn say_lost(&mut self) -> bool {
        if self.unsaid == 0 {
            return true;
        }
        let mut note = String::new();
        let _ = SystemTime.format_time(&mut Writer::new(&mut note));
        note +=
            &format!("  WARN violin_channel::log: {} log lines were lost here: standard error did not take them\n", self.unsaid);
        if self.put(note.as_bytes()) {
            self.unsaid = 0;
        }
        self.unsaid == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// A sink that takes each write when it is told what to answer.
    struct Told(mpsc::Receiver<io::Result<usize>>, mpsc::Sender<Vec<u8>>);

    impl Write for Told {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let len = self.0.recv().unwrap_or_else(|_| Err(io::Error::other("the test ends")))?.min(bytes.len());
            let _ = self.1.send(bytes[..len].to_vec());
            Ok(len)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A queue with its writing thread, who tells its sink what to do, and what that took.
    fn queue() -> (Arc<Queue>, mpsc::Sender<io::Result<usize>>, mpsc::Receiver<Vec<u8>>) {
        let ((tell, told), (took, taken)) = (mpsc::channel(), mpsc::channel());
        let queue = Arc::new(Queue::default());
        let writing = Arc::clone(&queue);
        std::thread::spawn(move || writing.write_out(&mut Out { sink: Told(told, took), unsaid: 0, torn: false }));
        (queue, tell, taken)
    }

    fn text(taken: &mpsc::Receiver<Vec<u8>>) -> String {
        String::from_utf8(taken.recv_timeout(Duration::from_secs(120)).unwrap()).unwrap()
    }

    const ALL: usize = usize::MAX;

    #[test]
    fn a_stuck_sink_costs_lines_that_are_counted_and_said_where_they_are_missing() {
        let (queue, tell, taken) = queue();
        let line = vec![b'x'; QUEUE / 4];

        (0..7).for_each(|_| queue.push(&line));

        assert_eq!(queue.lost.load(Ordering::Relaxed), 3);
        for _ in 0..4 {
            tell.send(Ok(ALL)).unwrap();
            assert_eq!(text(&taken).len(), line.len());
        }
        tell.send(Ok(ALL)).unwrap();
        assert!(text(&taken).contains(" 3 log lines were lost"));
        queue.push(b"next\n");
        tell.send(Ok(ALL)).unwrap();
        assert_eq!(text(&taken), "next\n");
    }

    #[test]
    fn what_a_sink_refuses_is_counted_and_said_when_it_takes_lines_again() {
        let (queue, tell, taken) = queue();
        queue.push(b"one\n");
        tell.send(Ok(2)).unwrap();
        assert_eq!(text(&taken), "on");
        tell.send(Err(io::Error::from(io::ErrorKind::StorageFull))).unwrap();
        queue.push(b"two\n");
        tell.send(Err(io::Error::from(io::ErrorKind::BrokenPipe))).unwrap();

        // Nothing else is said: the note comes by itself, behind what ends the torn line.
        tell.send(Ok(ALL)).unwrap();
        tell.send(Ok(ALL)).unwrap();

        assert_eq!(text(&taken), "\n");
        assert!(text(&taken).contains(" 2 log lines were lost"));
        assert_eq!(queue.lost.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn the_end_waits_for_the_last_lines_and_not_for_ever() {
        let (queue, tell, taken) = queue();
        queue.push(b"last\n");

        let began = Instant::now();
        queue.wait(PANIC_WORDS, State::is_written);
        assert!(began.elapsed() >= PANIC_WORDS && taken.try_recv().is_err());

        tell.send(Ok(ALL)).unwrap();
        queue.wait(Duration::from_secs(60), State::is_written);
        assert_eq!(taken.try_recv().unwrap(), b"last\n");
    }

    #[test]
    fn lines_of_others_are_taken_as_lines_and_an_endless_one_in_pieces() {
        let queue = Queue::default();
        let mut others = b"a\nb\n".to_vec();
        others.extend([b'x'; 2 * PIECE]);

        queue.take_from(&mut others.as_slice());

        let lens: Vec<_> =
            queue.state().entries.iter().map(|entry| matches!(entry, Entry::Line(line) if line.len() < 3)).collect();
        assert_eq!((lens.len(), &lens[..2], queue.state().bytes), (4, &[true, true][..], others.len() + 1));
    }
}
