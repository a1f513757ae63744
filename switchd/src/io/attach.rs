//! Attaches and detaches ports, one after the other, on a thread of its own: each takes milliseconds (nft, netlink).

use super::control::Input;
use super::dataplane::{AttachError, DataPlane};
use crate::tables::PortSlot;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};
use violin_common::PortId;
use violin_common::api::switch::PortKind;

/// How often an arriving VM's interface is looked for: what the guest sends meanwhile waits in its queue.
const RETRY_ARRIVING: Duration = Duration::from_millis(2);
/// How often another interface that is not there is looked for.
const RETRY: Duration = Duration::from_millis(500);

/// A port to be attached.
#[derive(Debug, Clone)]
pub struct Attach {
    /// Place.
    pub slot: PortSlot,
    /// Number.
    pub id: PortId,
    /// To what.
    pub kind: PortKind,
    /// Its network's.
    pub mtu: u16,
    /// Whether its VM is still to come.
    pub arriving: bool,
    /// Whether an interface that is not there is waited for.
    pub patient: bool,
}

/// What the thread is asked.
#[derive(Debug)]
pub enum Work {
    /// Attach; answered by [`Input::Attached`].
    Attach(Attach),
    /// Detach, and stop looking for its interface.
    Detach(PortSlot, PortId),
    /// Look whether all guards stand.
    Check,
    /// Answer when all that was asked before is done.
    Flush(Sender<()>),
}

/// Starts the thread; it ends when the sender is dropped. Should it end before, [`DataPlane::ended`] tells.
pub fn start(dataplane: Arc<DataPlane>, inputs: tokio::sync::mpsc::UnboundedSender<Input>) -> io::Result<Sender<Work>> {
    let (sender, work) = channel();
    let alive = dataplane.alive();
    std::thread::Builder::new().name("attach".into()).spawn(move || {
        let _alive = alive;
        run(&dataplane, &work, &inputs);
    })?;
    Ok(sender)
}

fn run(dataplane: &DataPlane, work: &Receiver<Work>, inputs: &tokio::sync::mpsc::UnboundedSender<Input>) {
    let mut waiting: BTreeMap<PortId, (Attach, Instant)> = BTreeMap::new();
    loop {
        let next = waiting.values().map(|(_, due)| *due).min();
        let got = match next {
            Some(due) => work.recv_timeout(due.saturating_duration_since(Instant::now())),
            None => work.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match got {
            Ok(Work::Attach(port)) => {
                let id = port.id;
                let result = match try_attach(dataplane, &port) {
                    Err(AttachError::NotThere(interface)) if port.patient => {
                        tracing::info!(port = %id, interface, "waiting for the interface");
                        waiting.insert(id, (port, Instant::now()));
                        Ok(())
                    }
                    other => other.map_err(|error| error.to_string()),
                };
                if inputs.send(Input::Attached { id, result }).is_err() {
                    return;
                }
            }
            Ok(Work::Detach(slot, id)) => {
                waiting.remove(&id);
                dataplane.detach(slot, id);
            }
            Ok(Work::Check) => dataplane.check_guards(),
            Ok(Work::Flush(done)) => drop(done.send(())),
            Err(RecvTimeoutError::Timeout) => look_again(dataplane, &mut waiting),
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

fn try_attach(dataplane: &DataPlane, port: &Attach) -> Result<(), AttachError> {
    dataplane.attach(port.slot, port.id, &port.kind, port.mtu, port.arriving)
}

fn look_again(dataplane: &DataPlane, waiting: &mut BTreeMap<PortId, (Attach, Instant)>) {
    let now = Instant::now();
    let due: Vec<PortId> = waiting.iter().filter(|(_, (_, due))| *due <= now).map(|(id, _)| *id).collect();
    for id in due {
        let Some((port, mut due)) = waiting.remove(&id) else { continue };
        match try_attach(dataplane, &port) {
            Ok(()) => tracing::info!(port = %id, "interface is there: attached"),
            Err(error) => {
                if !matches!(error, AttachError::NotThere(_)) {
                    // It appeared and could not be taken; it may yet be, and the VM behind it must not be left alone.
                    tracing::warn!(port = %id, %error, "could not attach; trying again");
                    due = now + RETRY;
                } else {
                    due = now.max(due) + if port.arriving { RETRY_ARRIVING } else { RETRY };
                }
                waiting.insert(id, (port, due));
            }
        }
    }
}
