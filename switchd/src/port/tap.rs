//! `tap`: an interface the switch creates and holds; its other side lies in some network namespace.

use super::{AttachError, HEADROOM, PortIo, ReadError, WriteError, write_error};
use crate::io::link;
use crate::io::sys::{self, Batch, Received};
use crate::virtio::{self, Offload};
use nix::sched::{CloneFlags, setns};
use nix::sys::uio::{readv, writev};
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

/// CSUM, TSO4, TSO6, TSO_ECN, USO4, USO6; then without USO (before Linux 6.2), without ECN, without anything.
const OFFLOADS: [libc::c_ulong; 4] = [0x6f, 0x0f, 0x07, 0];
/// Frames read in one go.
const READS: usize = 32;

/// A TAP's descriptor.
#[derive(Debug)]
pub struct Tap {
    file: File,
    /// Where it lies: path and identity of a network namespace.
    netns: Option<(String, Identity)>,
}

/// Device and inode of a network namespace.
type Identity = (u64, u64);

fn identity(metadata: &Metadata) -> Identity {
    (metadata.dev(), metadata.ino())
}

impl Tap {
    /// Creates the TAP in the given (or this) namespace, with the network's MTU, and sets it up.
    pub fn open(interface: &str, netns: Option<&str>, mtu: u16) -> Result<Self, AttachError> {
        if !violin_common::is_interface_name(interface) {
            return Err(AttachError::BadName(interface.into()));
        }
        let Some(path) = netns else { return Self::create(interface, mtu) };
        let not_there = || AttachError::NotThere(format!("network namespace {path}"));
        let namespace = File::open(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => not_there(),
            _ => AttachError::io(format!("open network namespace {path}"))(error),
        })?;
        let at = namespace.metadata().map_err(AttachError::io(format!("look at network namespace {path}")))?;
        // Only this short-lived thread enters the namespace; the descriptor works from anywhere.
        std::thread::scope(|scope| {
            let made = scope.spawn(|| {
                setns(&namespace, CloneFlags::CLONE_NEWNET).map_err(|error| match error {
                    // A file of that name that is none yet: `ip netns add` makes it in two steps.
                    nix::Error::EINVAL => not_there(),
                    error => AttachError::io(format!("enter network namespace {path}"))(error),
                })?;
                Self::create(interface, mtu)
            });
            let tap = made.join().unwrap_or_else(|_| Err(AttachError::no_interface(interface)))?;
            Ok(Self { netns: Some((path.to_owned(), identity(&at))), ..tap })
        })
    }

    fn create(interface: &str, mtu: u16) -> Result<Self, AttachError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(AttachError::io("open /dev/net/tun"))?;
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        sys::interface_request(file.as_fd(), libc::TUNSETIFF as _, interface, |request| {
            request.ifr_ifru.ifru_flags = flags as libc::c_short;
        })
        .map_err(AttachError::io(format!("create TAP {interface}")))?;
        let offered = OFFLOADS.iter().find(|&&mask| sys::number_request(file.as_fd(), libc::TUNSETOFFLOAD as _, mask).is_ok());
        tracing::debug!(interface, ?offered, "TAP offloads");
        link::set_mtu(interface, mtu.into()).map_err(AttachError::io(format!("set the MTU of {interface}")))?;
        link::set_up(interface).map_err(AttachError::io(format!("set {interface} up")))?;
        Ok(Self { file, netns: None })
    }
}

impl PortIo for Tap {
    /// A namespace that was deleted lives on, unseen, for as long as we hold its TAP; another of its name is another.
    fn is_gone(&self) -> bool {
        let Some((path, ours)) = &self.netns else { return false };
        !std::fs::metadata(path).is_ok_and(|metadata| identity(&metadata) == *ours)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn read(&mut self, batch: &mut Batch) -> Result<(), ReadError> {
        batch.received.clear();
        for index in 0..READS.min(batch.capacity()) {
            let mut header = [0; virtio::LEN];
            let slot = batch.slot_mut(index);
            let got = readv(&self.file, &mut [IoSliceMut::new(&mut header), IoSliceMut::new(&mut slot[HEADROOM..])]);
            match got {
                Ok(len) => {
                    batch.vnet[index] = header;
                    let len = len.saturating_sub(virtio::LEN);
                    batch.received.push(Received { len, from: None, to: None, vlan: None, segment: None, refused: None });
                }
                Err(nix::Error::EAGAIN | nix::Error::EINTR) => break,
                Err(error) if batch.received.is_empty() => {
                    tracing::trace!(%error, "TAP");
                    return Err(if error == nix::Error::EBADFD { ReadError::Gone } else { ReadError::Empty });
                }
                Err(_) => break,
            }
        }
        if batch.received.is_empty() { Err(ReadError::Empty) } else { Ok(()) }
    }

    fn write(&mut self, offload: &Offload, parts: &[&[u8]]) -> Result<(), WriteError> {
        let header = offload.emit();
        let mut slices = Vec::with_capacity(parts.len() + 1);
        slices.push(IoSlice::new(&header));
        slices.extend(parts.iter().map(|part| IoSlice::new(part)));
        match writev(&self.file, &slices) {
            Ok(_) => Ok(()),
            // Not up: its owner set it down, it is not gone.
            Err(nix::Error::EIO) => Err(WriteError::Refused(crate::drops::DropReason::PortError)),
            Err(error) => Err(write_error(error)),
        }
    }
}
