//! Askers that wait for their next request, oldest first.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::Notify;

#[derive(Debug, Default)]
struct Waiting {
    next: u64,
    all: BTreeMap<u64, Arc<Notify>>,
}

/// See the head of this file.
#[derive(Debug, Clone, Default)]
pub(super) struct Idle(Arc<Mutex<Waiting>>);

/// One that waits; it does no more when this is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    idle: Idle,
    number: u64,
    close: Arc<Notify>,
}

impl Idle {
    fn waiting<T>(&self, work: impl FnOnce(&mut Waiting) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// One waits from now on.
    pub(super) fn begin(&self) -> Turn {
        let close = Arc::new(Notify::new());
        let number = self.waiting(|waiting| {
            waiting.next += 1;
            waiting.all.insert(waiting.next, Arc::clone(&close));
            waiting.next
        });
        Turn { idle: self.clone(), number, close }
    }

    /// Tells the one that has waited for longest to go. `false`: none waits.
    pub(super) fn close_oldest(&self) -> bool {
        let oldest = self.waiting(|waiting| waiting.all.pop_first());
        oldest.inspect(|(_, close)| close.notify_one()).is_some()
    }
}

impl Turn {
    /// Ends when it is to go.
    pub(super) async fn closed(&self) {
        self.close.notified().await;
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.idle.waiting(|waiting| waiting.all.remove(&self.number));
    }
}
