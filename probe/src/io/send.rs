//! The prober: numbered frames on an absolute schedule, and the echoes that came back, as JSON lines.

use super::clock::{now_ns, sleep_until};
use super::packet::PacketSocket;
use super::signal;
use crate::frame::Probe;
use anyhow::{Context, Result};
use serde::Serialize;
use std::collections::VecDeque;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How long after the last frame echoes are waited for.
const TAIL: Duration = Duration::from_millis(500);
/// After this a frame's line is written without its echo.
const GIVE_UP_NS: u64 = 10_000_000_000;
/// How often the end of the run is told, as any copy may be lost.
const ENDS: u32 = 5;
/// Time between these copies: one burst could be lost as a whole.
const BETWEEN_ENDS: Duration = Duration::from_millis(50);

/// What is to be sent.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Interface.
    pub interface: String,
    /// Receiver.
    pub mac: [u8; 6],
    /// Time between frames.
    pub interval: Duration,
    /// Run the frames belong to.
    pub run: u64,
    /// How long; none: until told to stop.
    pub duration: Option<Duration>,
    /// Number to leave out: the receiver must count it lost.
    pub withhold: Option<u64>,
}

/// One line of the output. Times are ns of this machine's monotonic clock, `received_ns` of the receiver's.
#[derive(Debug, Clone, Serialize)]
struct Line {
    number: u64,
    sent_ns: u64,
    echo_ns: Option<u64>,
    received_ns: Option<u64>,
}

/// The last line.
#[derive(Debug, Clone, Serialize)]
struct Summary {
    run: u64,
    sent: u64,
    withheld: u64,
    echoed: u64,
    refused: u64,
    longest_echo_gap_ms: f64,
}

#[derive(Debug, Default)]
struct Shared {
    /// Frames not written out yet, by ascending number.
    open: VecDeque<Line>,
    echoed: u64,
    last_echo_ns: Option<u64>,
    longest_gap_ns: u64,
}

/// Sends until told to stop, then tells the receiver and waits for the last echoes.
///
/// Errors: the interface cannot be opened, or the output not be written.
pub fn run(plan: &Plan, output: &mut dyn Write) -> Result<()> {
    let opened = || PacketSocket::open(&plan.interface, Duration::from_millis(100));
    let socket = Arc::new(opened().with_context(|| format!("cannot open interface {:?} for raw frames", plan.interface))?);
    let shared = Arc::new(Mutex::new(Shared::default()));
    let done = Arc::new(AtomicBool::new(false));
    let listener = {
        let (socket, shared, done, run) = (Arc::clone(&socket), Arc::clone(&shared), Arc::clone(&done), plan.run);
        std::thread::spawn(move || listen(&socket, run, &shared, &done))
    };
    let lock = || shared.lock().unwrap_or_else(PoisonError::into_inner);
    let interval = u64::try_from(plan.interval.as_nanos()).unwrap_or(u64::MAX).max(1);
    let begun = now_ns();
    let end = plan.duration.map(|span| begun.saturating_add(u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)));
    let (mut number, mut sent, mut withheld, mut refused, mut due) = (0u64, 0u64, 0u64, 0u64, begun);
    let mut written_at = begun;
    while !signal::stopped() && end.is_none_or(|end| due < end) {
        sleep_until(due);
        let sent_ns = now_ns();
        if plan.withhold == Some(number) {
            (number, withheld) = (number + 1, withheld + 1);
        } else {
            // The line is there before its echo can be.
            lock().open.push_back(Line { number, sent_ns, echo_ns: None, received_ns: None });
            if socket.send(plan.mac, &Probe::Numbered { run: plan.run, number, sent_ns }).is_ok() {
                (number, sent) = (number + 1, sent + 1);
            } else {
                // Never on the wire: the number is used again, or the receiver would count a loss that is none.
                lock().open.pop_back();
                refused += 1;
            }
        }
        // Absolute: a late frame does not shift the others. What is more than a second late is skipped, not caught up.
        due += interval;
        if due + 1_000_000_000 < sent_ns {
            due = sent_ns;
        }
        if sent_ns > written_at + 1_000_000_000 {
            written_at = sent_ns;
            let ready = settled(&mut lock(), Some(sent_ns));
            write(output, &ready)?;
        }
    }
    if let Some(last) = number.checked_sub(1) {
        for _ in 0..ENDS {
            let _ = socket.send(plan.mac, &Probe::End { run: plan.run, last });
            std::thread::sleep(BETWEEN_ENDS);
        }
    }
    let deadline = now_ns() + u64::try_from(TAIL.as_nanos()).unwrap_or(0);
    while now_ns() < deadline && lock().open.iter().any(|line| line.echo_ns.is_none()) {
        std::thread::sleep(Duration::from_millis(5));
    }
    done.store(true, Ordering::SeqCst);
    let _ = listener.join();
    let ready = settled(&mut lock(), None);
    write(output, &ready)?;
    let shared = lock();
    let longest_echo_gap_ms = shared.longest_gap_ns as f64 / 1e6;
    let summary = Summary { run: plan.run, sent, withheld, echoed: shared.echoed, refused, longest_echo_gap_ms };
    writeln!(output, "{}", serde_json::json!({ "summary": summary }))?;
    output.flush()?;
    Ok(())
}

/// Takes the lines that will not change any more: echoed, or given up; all if `now_ns` is none.
fn settled(shared: &mut Shared, now_ns: Option<u64>) -> Vec<Line> {
    let keep = |line: &Line| now_ns.is_some_and(|now| line.echo_ns.is_none() && line.sent_ns + GIVE_UP_NS > now);
    let ready = shared.open.iter().take_while(|line| !keep(line)).count();
    shared.open.drain(..ready).collect()
}

fn write(output: &mut dyn Write, lines: &[Line]) -> Result<()> {
    for line in lines {
        writeln!(output, "{}", serde_json::to_string(line)?)?;
    }
    output.flush().context("cannot write the frames' lines")
}

fn listen(socket: &PacketSocket, run: u64, shared: &Mutex<Shared>, done: &AtomicBool) {
    while !done.load(Ordering::SeqCst) {
        let Ok(got) = socket.receive() else {
            std::thread::sleep(Duration::from_millis(20));
            continue;
        };
        let Some((_, Probe::Echo { run: of, number, received_ns, .. })) = got else { continue };
        if of != run {
            continue;
        }
        let echo_ns = now_ns();
        let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
        let place = shared.open.partition_point(|line| line.number < number);
        let Some(line) = shared.open.get_mut(place).filter(|line| line.number == number && line.echo_ns.is_none()) else {
            continue;
        };
        (line.echo_ns, line.received_ns) = (Some(echo_ns), Some(received_ns));
        shared.echoed += 1;
        if let Some(last) = shared.last_echo_ns.replace(echo_ns) {
            shared.longest_gap_ns = shared.longest_gap_ns.max(echo_ns.saturating_sub(last));
        }
    }
}
