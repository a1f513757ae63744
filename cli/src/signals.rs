//! What ends a command from outside: Ctrl-C, SIGTERM, the terminal's end.

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};

/// Calls `act`, once, with the status to end with when one of them comes: 128 and its number, as a shell tells it. Those this
/// process was started to ignore (`nohup`) stay ignored.
pub(crate) fn heed(act: impl FnOnce(i32) + Send + 'static) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot wait for signals")?;
    let ignored = ignored();
    let kinds = [SignalKind::hangup(), SignalKind::interrupt(), SignalKind::terminate()];
    let (sender, mut ends) = tokio::sync::mpsc::unbounded_channel();
    let inside = runtime.enter();
    for kind in kinds {
        let number = kind.as_raw_value();
        if ignored & 1 << (number - 1) != 0 {
            continue;
        }
        let mut signal = signal(kind).context("cannot wait for signals")?;
        let sender = sender.clone();
        runtime.spawn(async move {
            signal.recv().await;
            let _ = sender.send(number);
        });
    }
    drop(inside);
    std::thread::spawn(move || {
        if let Some(number) = runtime.block_on(ends.recv()) {
            act(128 + number);
        }
        // The sender of this function keeps the wait from ending when all of them are ignored.
        drop(sender);
    });
    Ok(())
}

/// Signals that are ignored, the first as the lowest bit; nobody else tells without unsafe code.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let bits = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    bits.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0)
}
