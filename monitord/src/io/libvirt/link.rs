//! Keeps one connection to the host's libvirtd, for ever.
//!
//! A thread of its own opens it, listens, and opens it again when it breaks (a restart of libvirtd does not end its VMs).
//! Callers never wait for it: they get the connection there is, or are told that there is none.

use super::domain;
use super::events::{Session, Sink, lock};
use crate::hypervisor::HypervisorError;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};
use violin_common::config::monitor::Accel;

/// First and longest pause between two attempts.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(3));

/// How long the first callers wait for the first attempt.
const FIRST: Duration = Duration::from_secs(3);

#[derive(Debug)]
pub(super) struct Link {
    uri: String,
    accel: Accel,
    sink: Arc<Sink>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    session: Option<Arc<Session>>,
    /// Why there is none; nothing as long as the first attempt runs.
    reason: Option<String>,
    ending: bool,
}

impl Link {
    /// Starts connecting.
    pub(super) fn start(uri: String, accel: Accel, sink: Arc<Sink>) -> std::io::Result<Arc<Self>> {
        let link = Arc::new(Self { uri, accel, sink, state: Mutex::default(), changed: Condvar::new() });
        let kept = link.clone();
        thread::Builder::new().name("libvirt-link".into()).spawn(move || kept.keep())?;
        Ok(link)
    }

    /// Ends the thread and with it the connection; does not wait.
    pub(super) fn end(&self) {
        let mut state = lock(&self.state);
        state.ending = true;
        if let Some(session) = &state.session {
            session.closed().ring();
        }
        self.changed.notify_all();
    }

    /// The connection.
    pub(super) fn session(&self) -> Result<Arc<Session>, HypervisorError> {
        let deadline = Instant::now() + FIRST;
        let mut state = lock(&self.state);
        loop {
            if let Some(session) = &state.session
                && !session.closed().is_broken()
            {
                return Ok(session.clone());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.session.is_some() || state.reason.is_some() || left.is_zero() {
                let reason = state.reason.as_deref().unwrap_or("connecting still");
                return Err(HypervisorError::Unreachable(format!(
                    "libvirtd at {}: {reason}; it is tried again until it answers",
                    self.uri
                )));
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
    }

    fn keep(&self) {
        let mut pause = PAUSE.0;
        while !lock(&self.state).ending {
            let opened = Session::open(&self.uri, &self.sink).and_then(|session| {
                self.sink.catch_up(&session.connection)?;
                Ok(Arc::new(session))
            });
            match opened {
                Ok(session) => {
                    tracing::info!(uri = self.uri, "connected to libvirtd");
                    pause = PAUSE.0;
                    self.publish(Some(session.clone()), None);
                    if let Err(error) = session.connection.warm_up(domain::MACHINE, domain::kind(self.accel)) {
                        tracing::error!(%error, "this libvirtd cannot run our guests; check its QEMU and `accel`");
                    }
                    while !session.closed().is_broken() && session.connection.is_alive() && !lock(&self.state).ending {
                        session.closed().wait(Duration::from_secs(1));
                    }
                    tracing::warn!(uri = self.uri, "connection to libvirtd ended");
                    self.publish(None, Some("the connection broke".into()));
                }
                Err(failure) => {
                    let reason = failure.to_string();
                    if lock(&self.state).reason.as_ref() != Some(&reason) {
                        tracing::warn!(uri = self.uri, error = reason, "no connection to libvirtd");
                    }
                    self.publish(None, Some(reason));
                    let state = lock(&self.state);
                    if !state.ending {
                        drop(self.changed.wait_timeout(state, pause));
                    }
                    pause = (pause * 2).min(PAUSE.1);
                }
            }
        }
        self.publish(None, Some("the driver has ended".into()));
    }

    fn publish(&self, session: Option<Arc<Session>>, reason: Option<String>) {
        let mut state = lock(&self.state);
        // Dropped after the lock: giving up a session calls libvirt.
        let _old = std::mem::replace(&mut state.session, session);
        state.reason = reason;
        self.changed.notify_all();
        drop(state);
    }
}
