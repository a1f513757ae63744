//! Attaches and detaches ports, one after the other, on a thread of its own: each takes milliseconds (nft, netlink).

use super::control::Input;
use super::dataplane::DataPlane;
use crate::switch::{Expecting, Nic};
use crate::tables::PortSlot;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use violin_common::PortId;
use violin_common::api::switch::PortKind;

/// A port to be attached.
#[derive(Debug, Clone)]
pub struct Attach {
    /// Place.
    pub slot: PortSlot,
    /// Number.
    pub id: PortId,
    /// To what.
    pub kind: PortKind,
    /// What an interface made for it is like.
    pub nic: Nic,
    /// Whether that may come later.
    pub expecting: Expecting,
}

/// What the thread is asked.
#[derive(Debug)]
pub enum Work {
    /// Attach; answered by [`Input::Attached`].
    Attach(Attach),
    /// Detach, and stop looking for its interface.
    Detach {
        /// Place.
        slot: PortSlot,
        /// Number.
        id: PortId,
        /// Whether what was made for it stays.
        keep: bool,
    },
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
    while let Ok(work) = work.recv() {
        match work {
            Work::Attach(Attach { slot, id, kind, nic, expecting }) => {
                let result = match dataplane.attach(slot, id, &kind, nic, expecting) {
                    Err(error) if error.is_waited_for(expecting) => {
                        tracing::info!(port = %id, "waiting: {error}");
                        dataplane.look_for(slot, id);
                        Ok(())
                    }
                    other => other.map_err(|error| error.to_string()),
                };
                if inputs.send(Input::Attached { id, result }).is_err() {
                    return;
                }
            }
            Work::Detach { slot, id, keep } => dataplane.detach(slot, id, keep),
            Work::Check => dataplane.check_guards(),
            Work::Flush(done) => drop(done.send(())),
        }
    }
}
