//! `tap`: an interface the switch makes and holds; its other side lies in some network namespace.
//!
//! It outlives the switch, so that a restart costs its users neither bridge membership, addresses and routes nor its MAC: the
//! next one takes it up. It goes with its port.

use super::{AttachError, HEADROOM, PortIo, ReadError, WriteError, write_error};
use crate::io::link;
use crate::io::sys::{self, Batch, Received};
use crate::switch::Nic;
use crate::virtio::{self, Offload};
use nix::sched::{CloneFlags, setns};
use nix::sys::uio::{readv, writev};
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use violin_common::Vni;

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

/// Does something in a network namespace, or in this one, on a thread that ends with it.
fn inside<T: Send>(
    netns: Option<&str>,
    work: impl FnOnce() -> Result<T, AttachError> + Send,
) -> Result<(T, Option<(String, Identity)>), AttachError> {
    let Some(path) = netns else { return Ok((work()?, None)) };
    let not_there = || AttachError::NotThere(format!("network namespace {path}"));
    let namespace = File::open(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => not_there(),
        _ => AttachError::io(format!("open network namespace {path}"))(error),
    })?;
    let at = namespace.metadata().map_err(AttachError::io(format!("look at network namespace {path}")))?;
    // Only this short-lived thread enters the namespace; the descriptor works from anywhere.
    std::thread::scope(|scope| {
        let doing = scope.spawn(|| {
            setns(&namespace, CloneFlags::CLONE_NEWNET).map_err(|error| match error {
                // A file of that name that is none yet: `ip netns add` makes it in two steps.
                nix::Error::EINVAL => not_there(),
                error => AttachError::io(format!("enter network namespace {path}"))(error),
            })?;
            work()
        });
        let done = doing.join().unwrap_or_else(|_| Err(not_there()))?;
        Ok((done, Some((path.to_owned(), identity(&at)))))
    })
}

/// What a TAP that a switch made for a network is called besides its name (`ip link` shows it as alias).
fn alias(vni: Vni) -> String {
    format!("{MADE} {vni}")
}

const MADE: &str = "violin switchd: network";

fn made_by_a_switch(interface: &str) -> bool {
    link::alias(interface).is_ok_and(|alias| alias.starts_with(MADE))
}

/// Takes the TAP of that name, which is made if there is none.
fn take(interface: &str) -> Result<File, AttachError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .map_err(AttachError::io("open /dev/net/tun"))?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let taken = sys::interface_request(file.as_fd(), libc::TUNSETIFF as _, interface, |request| {
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
    });
    let refused = |why: &str| AttachError::Taken { interface: interface.into(), why: why.into() };
    match taken.map_err(|error| (error.raw_os_error(), error)) {
        Ok(_) => Ok(file),
        Err((Some(libc::EBUSY), _)) => Err(refused("another program holds it")),
        Err((Some(libc::EINVAL), _)) if link::index(interface).is_some() => Err(refused("is no TAP with one queue")),
        Err((_, error)) => Err(AttachError::io(format!("create TAP {interface}"))(error)),
    }
}

/// Lets a TAP go with its descriptor.
fn give_up(file: &File) -> io::Result<()> {
    sys::number_request(file.as_fd(), libc::TUNSETPERSIST as _, 0)
}

/// Removes a TAP that a switch made. One that its operator made stays, and one that is gone is no error.
pub fn remove(interface: &str, netns: Option<&str>) {
    let removed = inside(netns, || {
        if !made_by_a_switch(interface) {
            return Ok(());
        }
        give_up(&take(interface)?).map_err(AttachError::io(format!("remove TAP {interface}")))
    });
    match removed {
        Ok(_) | Err(AttachError::NotThere(_)) => {}
        Err(error) => tracing::warn!(interface, %error, "the TAP stays"),
    }
}

impl Tap {
    /// Takes up the TAP in the given (or this) namespace that an earlier switch or its operator left there, as it is, with
    /// the bridge it belongs to and its addresses; makes one that stays, if there is none. Then gives it the network's MTU
    /// and sets it up.
    pub fn open(interface: &str, netns: Option<&str>, nic: Nic) -> Result<Self, AttachError> {
        if !violin_common::is_interface_name(interface) {
            return Err(AttachError::BadName(interface.into()));
        }
        let (file, netns) = inside(netns, || Self::open_here(interface, nic))?;
        Ok(Self { file, netns })
    }

    fn open_here(interface: &str, nic: Nic) -> Result<File, AttachError> {
        let mut there = link::index(interface).is_some();
        let mut file = take(interface)?;
        if there && made_by_a_switch(interface) && link::alias(interface).is_ok_and(|is| is != alias(nic.vni)) {
            // It was another network's: whoever was attached to that is not to find himself in this one.
            give_up(&file).map_err(AttachError::io(format!("remove TAP {interface}")))?;
            drop(file);
            tracing::info!(interface, vni = %nic.vni, "a TAP made for another network is made anew");
            (file, there) = (take(interface)?, false);
        }
        let failed = |what: &str| format!("{what} {interface}");
        if !there {
            link::set_mac(interface, nic.mac).map_err(AttachError::io(failed("set the MAC of")))?;
            link::set_alias(interface, &alias(nic.vni)).map_err(AttachError::io(failed("set the alias of")))?;
            sys::number_request(file.as_fd(), libc::TUNSETPERSIST as _, 1).map_err(AttachError::io(failed("make to stay")))?;
        }
        let offered = OFFLOADS.iter().find(|&&mask| sys::number_request(file.as_fd(), libc::TUNSETOFFLOAD as _, mask).is_ok());
        tracing::debug!(interface, there, ?offered, "TAP");
        link::set_mtu(interface, nic.mtu.into()).map_err(AttachError::io(failed("set the MTU of")))?;
        link::set_up(interface).map_err(AttachError::io(failed("set up")))?;
        Ok(file)
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
                    batch.received.push(Received { len, ..Received::default() });
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
