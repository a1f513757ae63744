//! The monitor's connection to the manager.

use super::monitor::Monitor;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::broadcast::error::RecvError;
use violin_channel::frame::{self, FrameError};
use violin_channel::quic::{self, Endpoint};
use violin_common::control::monitor::{Answer, Command, Report};

/// First and longest pause between two attempts to reach the manager.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Keeps a connection to the manager for ever.
pub(crate) async fn keep(monitor: Arc<Monitor>, endpoint: Endpoint, manager: std::net::SocketAddr) {
    let (mut pause, mut refused) = (BACKOFF.0, None);
    loop {
        match endpoint.connect(manager, None).await {
            Ok((connection, identity)) => {
                let begun = tokio::time::Instant::now();
                let connected = async {
                    if refused.is_some() {
                        // It may refuse us again.
                        tokio::time::sleep(BACKOFF.1).await;
                    }
                    tracing::info!(%manager, %identity, "connected to the manager");
                    std::future::pending::<String>().await
                };
                let error = tokio::select! {
                    biased;
                    never = connected => never,
                    error = converse(&monitor, &connection) => error,
                };
                match quic::refusal(&connection) {
                    // Said once, not at each call.
                    Some(why) if refused.as_ref() == Some(&why) => tracing::debug!(%manager, "refused again"),
                    Some(why) => {
                        tracing::warn!(%manager, "the manager refuses this monitor, and is called again all the same: {why}");
                        refused = Some(why);
                    }
                    None => {
                        tracing::warn!(%manager, %error, "the manager is lost; commands under way are carried on");
                        refused = None;
                    }
                }
                connection.close(quinn::VarInt::from_u32(0), b"");
                if begun.elapsed() > BACKOFF.1 {
                    pause = BACKOFF.0;
                }
            }
            Err(error) => tracing::warn!(%manager, %error, again_in = ?pause, "calling the manager"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(BACKOFF.1);
    }
}

/// Reports and serves on one connection until it breaks; returns why.
async fn converse(monitor: &Arc<Monitor>, connection: &quinn::Connection) -> String {
    let report = async {
        let mut stream = connection.open_uni().await.map_err(|error| FrameError::Broken(error.to_string()))?;
        let mut reports = monitor.reports();
        // Read off the runtime: it looks at the image store.
        let hello = {
            let monitor = Arc::clone(monitor);
            tokio::task::spawn_blocking(move || monitor.hello()).await
        };
        let hello = hello.map_err(|error| FrameError::Broken(error.to_string()))?;
        frame::send(&mut stream, &Report::Hello(hello)).await?;
        for vm in monitor.known() {
            frame::send(&mut stream, &Report::Vm(vm)).await?;
        }
        loop {
            match reports.recv().await {
                Ok(report) => frame::send(&mut stream, &report).await?,
                // The oldest were dropped; what is sent from here on tells the present state.
                Err(RecvError::Lagged(count)) => tracing::warn!(count, "reports were lost: the manager is slow"),
                Err(RecvError::Closed) => return Ok::<(), FrameError>(()),
            }
        }
    };
    let serve = async {
        loop {
            match connection.accept_bi().await {
                Ok((send, recv)) => {
                    tokio::spawn(command(Arc::clone(monitor), send, recv));
                }
                Err(error) => return error.to_string(),
            }
        }
    };
    tokio::select! {
        result = report => result.map_or_else(|error| error.to_string(), |()| "the monitor ends".into()),
        error = serve => error,
    }
}

/// Carries out one command. A broken stream stops the telling, not the doing.
async fn command(monitor: Arc<Monitor>, mut send: quinn::SendStream, mut recv: quinn::RecvStream) {
    let command = match frame::recv::<Command>(&mut recv).await {
        Ok(Some(command)) => command,
        Ok(None) => return,
        Err(error) => {
            tracing::warn!(%error, "a command could not be read");
            let words = format!("the command could not be read: {error}");
            if frame::send(&mut send, &Answer::Failed(words)).await.is_ok() {
                let _ = send.finish();
            }
            return;
        }
    };
    let (answers, mut queue) = tokio::sync::mpsc::unbounded_channel();
    let without = answers.clone();
    let began = std::thread::Builder::new().spawn(move || {
        let last = monitor.execute(command, &mut |progress| {
            let _ = answers.send(progress);
        });
        let _ = answers.send(last);
    });
    if let Err(error) = began {
        tracing::error!(%error, "no thread for a command");
        let _ = without.send(Answer::Failed(format!("this host has no thread left for the command ({error}); try again later")));
    }
    drop(without);
    while let Some(answer) = queue.recv().await {
        if let Err(error) = frame::send(&mut send, &answer).await {
            tracing::debug!(%error, "the asker is gone");
            return;
        }
    }
    let _ = send.finish();
    // The last answer is on its way until it is acknowledged.
    let _ = send.stopped().await;
}
