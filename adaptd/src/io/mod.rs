//! Everything that touches the world: the journal's file, the monitors' streams, the local socket, the clock.
//!
//! [`world`] is what the manager knows, behind one lock that is never held across a wait; the other files are tasks that
//! take the lock, look, write a record, and let go. Start with [`run`].

pub mod api;
pub mod clock;
pub mod ending;
pub mod environments;
pub mod execute;
pub mod hosts;
pub mod journal;
pub mod keys;
pub mod monitors;
pub mod progress;
pub mod reconcile;
pub mod run;
pub mod secrets;
pub mod strays;
pub mod world;
