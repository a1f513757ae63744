//! What a port is attached to: one file a kind.

pub mod packet;
pub mod tap;
pub mod vxlan;

use crate::drops::DropReason;
use crate::io::guard::Guards;
use crate::io::sys::Batch;
use crate::switch::{Expecting, Nic};
use crate::virtio::Offload;
use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use violin_common::api::switch::PortKind;

/// Largest frame taken from or given to an interface: a super-frame with two tags.
pub const MAX_FRAME: usize = 65_600;
/// Room in front of a frame, for a VLAN tag that has to come back.
pub const HEADROOM: usize = 4;

/// A port could not be attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// What it is attached to does not exist (yet); named in words.
    #[error("{0} is not there: create it, or wait until the guest that owns it arrives")]
    NotThere(String),
    /// A name no interface can have.
    #[error("got interface name {0:?}, want {INTERFACE_NAME}", INTERFACE_NAME = violin_common::id::INTERFACE_NAME)]
    BadName(String),
    /// The host itself lives on it.
    #[error(
        "interface {interface} is needed by the host itself, which the port would cut off: {why}; want another interface, or \
         `take-over = true` in the port's configuration if that is meant"
    )]
    Needed {
        /// Which.
        interface: String,
        /// What for.
        why: String,
    },
    /// An interface of that name is there and is not the port's to take.
    #[error("interface {interface} is there and {why}: remove it, or give the port another name")]
    Taken {
        /// Which.
        interface: String,
        /// What it is.
        why: String,
    },
    /// The interface could not be closed to the host's own network stack, so it was left alone.
    #[error(
        "could not keep the host's own stack off interface {interface}: {why}; check that its kernel has nf_tables with family netdev"
    )]
    Guard {
        /// Which.
        interface: String,
        /// What went wrong.
        why: String,
    },
    /// The kernel refused.
    #[error("could not {what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Its answer.
        source: io::Error,
    },
}

impl AttachError {
    pub(crate) fn no_interface(interface: &str) -> Self {
        Self::NotThere(format!("interface {interface}"))
    }

    /// Whether somebody who expects the port later waits for this to end.
    pub fn is_waited_for(&self, expecting: Expecting) -> bool {
        match expecting {
            Expecting::Now => false,
            Expecting::Later => !matches!(self, Self::BadName(_) | Self::Needed { .. }),
            Expecting::Arrival => matches!(self, Self::NotThere(_)),
        }
    }

    pub(crate) fn io<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        move |source| Self::Io { what: what.into(), source: source.into() }
    }
}

/// Why a frame was not written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteError {
    /// This frame was refused.
    Refused(DropReason),
    /// The interface has gone.
    Gone,
}

/// Why nothing was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadError {
    /// Nothing there now.
    Empty,
    /// A frame was there that the kernel could not hand over as it is; others may follow.
    Refused(DropReason),
    /// The interface has gone.
    Gone,
}

/// One open port; used by its worker only.
pub trait PortIo: Send + fmt::Debug {
    /// For epoll.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Reads a vector of frames without waiting. Each frame lies in its slot behind `headroom` bytes; what is to be done
    /// to it stands in the slot's `virtio_net_hdr`.
    fn read(&mut self, batch: &mut Batch) -> Result<(), ReadError>;

    /// Writes one frame given in parts.
    fn write(&mut self, offload: &Offload, parts: &[&[u8]]) -> Result<(), WriteError>;

    /// Whether [`Self::write_many`] costs less than one by one.
    fn batches(&self) -> bool {
        false
    }

    /// Writes frames that lie in `bytes` (start, end), each behind its `virtio_net_hdr`, from the first on. Returns how many were
    /// taken, at least one. Errors: the first was refused.
    fn write_many(&mut self, bytes: &[u8], frames: &[(usize, usize)]) -> Result<usize, WriteError> {
        write_first(self, bytes, frames)
    }

    /// Frames lost between interface and us since the last call.
    fn losses(&mut self) -> u64 {
        0
    }

    /// Whether what it is attached to has gone in a way that neither reading nor writing tells. Asked twice a second.
    fn is_gone(&self) -> bool {
        false
    }

    /// Largest layer-3 packet a foreign tunnel end takes.
    fn path_mtu(&self) -> Option<u16> {
        None
    }
}

/// The first of many frames, as any other.
fn write_first<P: PortIo + ?Sized>(port: &mut P, bytes: &[u8], frames: &[(usize, usize)]) -> Result<usize, WriteError> {
    let refused = WriteError::Refused(DropReason::PortError);
    let &(start, end) = frames.first().ok_or(refused)?;
    let (header, frame) = bytes.get(start..end).and_then(<[u8]>::split_first_chunk).ok_or(refused)?;
    let offload = Offload::parse(header).map_err(|_| refused)?;
    port.write(&offload, &[frame]).map(|()| 1)
}

/// Opens what a port is attached to, guard first.
pub fn open(kind: &PortKind, nic: Nic, guards: &mut Guards) -> Result<Box<dyn PortIo>, AttachError> {
    Ok(match kind {
        PortKind::Packet { interface } => Box::new(packet::Packet::open(interface, guards)?),
        PortKind::Tap { interface, netns } => Box::new(tap::Tap::open(interface, netns.as_deref(), nic)?),
        PortKind::Vxlan { local, remote, remote_vni } => Box::new(vxlan::Vxlan::open(*local, *remote, *remote_vni, nic.mtu)?),
    })
}

/// Undoes what [`open`] did to interfaces; to be called after the port was dropped. With `keep` a TAP stays.
pub fn undo(kind: &PortKind, keep: bool, guards: &mut Guards) {
    match kind {
        PortKind::Packet { interface } => guards.open(interface),
        PortKind::Tap { interface, netns } if !keep => tap::remove(interface, netns.as_deref()),
        PortKind::Tap { .. } | PortKind::Vxlan { .. } => {}
    }
}

/// What an error of a write to an interface means.
pub(crate) fn write_error(error: nix::Error) -> WriteError {
    match error {
        nix::Error::ENETDOWN | nix::Error::ENXIO | nix::Error::ENODEV | nix::Error::EBADFD => WriteError::Gone,
        nix::Error::EAGAIN | nix::Error::ENOBUFS => WriteError::Refused(DropReason::PortBusy),
        nix::Error::EMSGSIZE => WriteError::Refused(DropReason::TooBig),
        _ => WriteError::Refused(DropReason::PortError),
    }
}
