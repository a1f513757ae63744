//! Being told to stop: by SIGTERM or SIGINT, or by the end of standard input.
#![allow(unsafe_code)]

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use std::io::Read;
use std::sync::atomic::{AtomicBool, Ordering};

static STOP: AtomicBool = AtomicBool::new(false);

extern "C" fn handle(_: i32) {
    STOP.store(true, Ordering::SeqCst);
}

/// From now on SIGTERM and SIGINT ask to stop instead of ending the process.
///
/// Errors: the kernel refuses the handler.
pub fn install() -> nix::Result<()> {
    let action = SigAction::new(SigHandler::Handler(handle), SaFlags::empty(), SigSet::empty());
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        // SAFETY: the handler only stores to an atomic, which is async-signal-safe.
        unsafe { sigaction(signal, &action)? };
    }
    Ok(())
}

/// From now on the end of standard input asks to stop, too.
pub fn stop_at_end_of_input() {
    std::thread::spawn(|| {
        let mut buffer = [0; 256];
        let mut input = std::io::stdin().lock();
        loop {
            match input.read(&mut buffer) {
                Ok(0) => break,
                Err(error) if error.kind() != std::io::ErrorKind::Interrupted => break,
                _ => {}
            }
        }
        STOP.store(true, Ordering::SeqCst);
    });
}

/// Whether to stop.
pub fn stopped() -> bool {
    STOP.load(Ordering::SeqCst)
}
