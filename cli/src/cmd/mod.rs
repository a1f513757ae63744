//! One file for each group of the operator's words.

pub(crate) mod copy;
pub(crate) mod decisions;
pub(crate) mod env;
pub(crate) mod lab;
pub(crate) mod pki;
pub(crate) mod reach;
pub(crate) mod switch;
pub(crate) mod times;
pub(crate) mod vm;
