//! Everything that touches the machine: clock, files of the kernel, sockets, processes.

mod access;
pub mod cgroup;
pub mod clock;
pub mod console;
mod each;
pub mod images;
#[cfg(feature = "libvirt")]
pub mod libvirt;
mod link;
pub mod monitor;
pub mod netlink;
mod private;
pub mod proc;
pub mod record;
pub mod run;
pub mod sandbox;
pub mod switch;
