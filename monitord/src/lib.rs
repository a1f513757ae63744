//! The monitor of one host: samples its guests, drives its hypervisor, speaks to its switch.
//!
//! Pure: [`hypervisor`] (what a driver promises), [`sample`] (counters to rates), [`demand`] (rates to demand),
//! [`transaction`] (what follows on what, what undoes what), [`images`] (what an image is). Everything that touches the
//! machine is in `io`; read `io/monitor/mod.rs` first there.
#![deny(unsafe_code)]
// Documentation is built with private items: it is for those who read the code.
#![allow(rustdoc::private_intra_doc_links)]

pub mod demand;
pub mod hypervisor;
pub mod images;
pub mod sample;
pub mod transaction;

#[cfg(feature = "io")]
pub mod io;
