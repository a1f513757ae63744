//! `packet`: an existing interface, through a packet socket that carries super-frames both ways.

use super::{AttachError, PortIo, ReadError, WriteError, write_error};
use crate::drops::DropReason;
use crate::io::guard::{self, Guards};
use crate::io::{link, sys, udp};
use crate::virtio::Offload;
use nix::sys::uio::writev;
use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Options libc has no name for. Source: linux/if_packet.h.
const PACKET_VNET_HDR: libc::c_int = 15;
const PACKET_QDISC_BYPASS: libc::c_int = 20;
const PACKET_IGNORE_OUTGOING: libc::c_int = 23;
/// Bytes the kernel may queue for us: a few hundred super-frames.
const BUFFER: libc::c_int = 16 << 20;
/// Our end of a veth or TAP takes whatever the guest sends, so that what is too big is refused by name, not lost.
const OPEN_MTU: u32 = 65_521;

/// A packet socket on one interface.
#[derive(Debug)]
pub struct Packet {
    socket: OwnedFd,
    interface: String,
    index: u32,
    /// Of a veth or TAP, which takes frames of any size when told so.
    opens: bool,
}

impl Packet {
    /// Closes the interface to the host's stack, opens it for the switch and sets it up.
    pub fn open(interface: &str, guards: &mut Guards) -> Result<Self, AttachError> {
        if !violin_common::is_interface_name(interface) {
            return Err(AttachError::BadName(interface.into()));
        }
        let not_there = || AttachError::no_interface(interface);
        let index = link::index(interface).ok_or_else(not_there)?;
        let guard_failed = |why| match link::index(interface) {
            Some(_) => AttachError::Guard { interface: interface.into(), why },
            None => not_there(),
        };
        guards.close(interface).map_err(guard_failed)?;
        let socket = sys::packet_socket().map_err(AttachError::io("open a packet socket"))?;
        let fd = socket.as_fd();
        for (option, what) in [
            (PACKET_VNET_HDR, "carry super-frames (PACKET_VNET_HDR)"),
            (libc::PACKET_AUXDATA, "see VLAN tags (PACKET_AUXDATA)"),
            (PACKET_IGNORE_OUTGOING, "ignore what it sends itself (PACKET_IGNORE_OUTGOING)"),
            (PACKET_QDISC_BYPASS, "bypass the queueing discipline (PACKET_QDISC_BYPASS)"),
        ] {
            sys::set_option(fd, libc::SOL_PACKET, option, 1i32)
                .map_err(AttachError::io(format!("make the packet socket {what}")))?;
        }
        // Before the first frame is sent: the guard lets no other through.
        sys::set_option(fd, libc::SOL_SOCKET, libc::SO_MARK, guard::MARK)
            .map_err(AttachError::io("mark the packet socket's frames (SO_MARK)"))?;
        udp::large_buffers(fd, BUFFER);
        sys::bind_packet(fd, index).map_err(AttachError::io(format!("bind to {interface}")))?;
        let promiscuous = libc::packet_mreq {
            mr_ifindex: index as i32,
            mr_type: libc::PACKET_MR_PROMISC as u16,
            mr_alen: 0,
            mr_address: [0; 8],
        };
        sys::set_option(fd, libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, promiscuous)
            .map_err(AttachError::io(format!("take all frames of {interface}")))?;
        link::set_up(interface).map_err(AttachError::io(format!("set {interface} up")))?;
        let opens = matches!(link::driver(interface).as_deref(), Ok("veth" | "tun"));
        if opens {
            link::set_mtu(interface, OPEN_MTU).map_err(AttachError::io(format!("set the MTU of {interface}")))?;
        }
        // Last, because nothing brings addresses back should the port come to nothing.
        guard::strip(interface).map_err(guard_failed)?;
        Ok(Self { socket, interface: interface.into(), index, opens })
    }

    /// An interface that was only set down belongs to us: it goes up again. Anything else means it has gone.
    fn is_gone(&self) -> bool {
        link::index(&self.interface) != Some(self.index) || link::set_up(&self.interface).is_err()
    }
}

impl PortIo for Packet {
    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn read(&mut self, batch: &mut sys::Batch) -> Result<(), ReadError> {
        match batch.receive(self.socket.as_fd(), true, sys::VECTOR) {
            Ok(0) => Err(ReadError::Empty),
            Ok(_) => Ok(()),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => Err(ReadError::Empty),
            // A super-frame of a kind that virtio_net_hdr has no word for (SCTP, UFO); the kernel throws it away.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Err(ReadError::Refused(DropReason::Segmentation)),
            Err(_) if self.is_gone() => Err(ReadError::Gone),
            Err(_) => Err(ReadError::Empty),
        }
    }

    fn write(&mut self, offload: &Offload, parts: &[&[u8]]) -> Result<(), WriteError> {
        let header = offload.emit();
        let mut slices = Vec::with_capacity(parts.len() + 1);
        slices.push(IoSlice::new(&header));
        slices.extend(parts.iter().map(|part| IoSlice::new(part)));
        match writev(&self.socket, &slices).map_err(write_error) {
            Ok(_) => Ok(()),
            Err(WriteError::Gone) if !self.is_gone() => writev(&self.socket, &slices).map(|_| ()).map_err(write_error),
            // Somebody has set the interface's MTU since, as a hypervisor may.
            Err(WriteError::Refused(DropReason::TooBig)) if self.opens && link::set_mtu(&self.interface, OPEN_MTU).is_ok() => {
                writev(&self.socket, &slices).map(|_| ()).map_err(write_error)
            }
            Err(error) => Err(error),
        }
    }

    fn batches(&self) -> bool {
        true
    }

    fn write_many(&mut self, bytes: &[u8], frames: &[(usize, usize)]) -> Result<usize, WriteError> {
        match sys::send_pieces(self.socket.as_fd(), bytes, frames) {
            Ok(sent) => Ok(sent),
            // Alone it is told what is wrong, and whether that can be mended.
            Err(_) => super::write_first(self, bytes, frames),
        }
    }

    fn losses(&mut self) -> u64 {
        sys::packet_losses(self.socket.as_fd())
    }
}
