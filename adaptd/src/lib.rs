//! The adaptation manager: observes hosts and VMs, decides, explains, and moves VMs live.
//!
//! The decision's way: `io::monitors` takes a monitor's report → [`observe`] smooths it → [`model::Snapshot`] holds what is
//! known at one instant → [`cycle`] thinks: [`score`], [`policy`], [`plan`], and a second opinion by [`check`] →
//! `io::journal` writes it down ([`records`]) → [`act`] carries it out, asking the monitors → their answers go back into
//! [`act`], their next reports into [`observe`]. An operator's wish enters at [`plan`] and goes the same way. New
//! environments are admitted by [`place`]; [`explain`] says why a VM is where it is.
//!
//! Everything outside `io` (cargo feature `io`) is pure: no clock, no file, no socket. A dry run is the same cycle with
//! nothing carried out; a restart reads the journal's records again and takes up what was under way.
#![deny(unsafe_code)]
#![warn(missing_docs)]
pub mod act;
pub mod adopt;
pub mod check;
pub mod clocks;
pub mod cycle;
pub mod explain;
#[cfg(feature = "io")]
pub mod io;
pub mod model;
pub mod observe;
pub mod place;
pub mod plan;
pub mod policy;
pub mod records;
pub mod score;
