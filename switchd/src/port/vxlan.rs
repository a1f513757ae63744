//! `vxlan`: a gateway to one tunnel end that is not ours, exactly as RFC 7348 has it: a kernel's VXLAN device, a hardware
//! VTEP.
//!
//! Plain VXLAN knows no super-frames and no partial checksums: both are finished here. What is too big for the path is
//! answered by the worker.

use super::{AttachError, HEADROOM, PortIo, ReadError, WriteError, write_error};
use crate::drops::DropReason;
use crate::io::sys::{self, Batch};
use crate::io::udp::{self, large_buffers, send_segments};
use crate::slice::Way;
use crate::transport::{self, Transport, complete};
use crate::virtio::Offload;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use violin_common::Vni;
use violin_common::wire::ethernet::{HEADER_LEN, Header};

/// Bytes of the VXLAN header. Source: RFC 7348 §5.
const VXLAN_LEN: usize = 8;
/// The I flag: the VNI is valid.
const VNI_VALID: u8 = 0x08;
const BUFFER: libc::c_int = 4 << 20;

/// A UDP socket towards one foreign tunnel end.
#[derive(Debug)]
pub struct Vxlan {
    socket: UdpSocket,
    remote: SocketAddr,
    header: [u8; VXLAN_LEN],
    mtu: u16,
    path_mtu: Option<u16>,
    scratch: Vec<u8>,
    out: Vec<u8>,
    /// Datagrams the kernel has lost so far.
    lost: u32,
    /// To which of our addresses the foreign end last sent, where `local` is all of them.
    ours: Option<IpAddr>,
}

impl Vxlan {
    /// Opens the gateway. `mtu` is the network's.
    pub fn open(local: SocketAddr, remote: SocketAddr, vni: Vni, mtu: u16) -> Result<Self, AttachError> {
        let what = || format!("open a VXLAN gateway on {local}");
        let socket = UdpSocket::bind(local).map_err(|error| match error.kind() {
            io::ErrorKind::AddrNotAvailable => AttachError::NotThere(format!("address {}", local.ip())),
            _ => AttachError::io(what())(error),
        })?;
        socket.set_nonblocking(true).map_err(AttachError::io(what()))?;
        udp::tell_destinations(&socket).map_err(AttachError::io(what()))?;
        large_buffers(socket.as_fd(), BUFFER);
        // A tunnel end must not fragment (RFC 7348 §4.3).
        let (level, discover) = if local.is_ipv6() {
            (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER)
        } else {
            (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER)
        };
        sys::set_option(socket.as_fd(), level, discover, libc::IP_PMTUDISC_DO).map_err(AttachError::io(what()))?;
        let path_mtu = underlay_mtu(local, remote).ok().and_then(|outer| {
            let headers = if remote.is_ipv6() { 40 } else { 20 } + 8 + VXLAN_LEN + HEADER_LEN;
            u16::try_from(outer.saturating_sub(headers)).ok()
        });
        let mut header = [0; VXLAN_LEN];
        header[0] = VNI_VALID;
        header[4..7].copy_from_slice(&vni.value().to_be_bytes()[1..]);
        let (scratch, out) = (Vec::new(), Vec::new());
        Ok(Self { socket, remote, header, mtu, path_mtu, scratch, out, lost: 0, ours: None })
    }
}

/// MTU of the path to the foreign end as the kernel knows it.
fn underlay_mtu(local: SocketAddr, remote: SocketAddr) -> io::Result<usize> {
    let asking = UdpSocket::bind((local.ip(), 0))?;
    asking.connect(remote)?;
    let (level, name) = if local.is_ipv6() { (libc::IPPROTO_IPV6, libc::IPV6_MTU) } else { (libc::IPPROTO_IP, libc::IP_MTU) };
    sys::int_option(asking.as_fd(), level, name).map(|mtu| usize::try_from(mtu).unwrap_or(0))
}

impl PortIo for Vxlan {
    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn read(&mut self, batch: &mut Batch) -> Result<(), ReadError> {
        match batch.receive(self.socket.as_fd(), false, sys::VECTOR) {
            Ok(count) if count > 0 => (),
            _ => return Err(ReadError::Empty),
        }
        for index in 0..batch.received.len() {
            let received = batch.received[index];
            let slot = batch.slot_mut(index);
            let datagram = &mut slot[HEADROOM..HEADROOM + received.len];
            // Source ports differ from flow to flow (RFC 7348 §5); the address does not.
            let known = received.from.is_some_and(|from| from.ip() == self.remote.ip().to_canonical());
            let header = datagram.first_chunk::<VXLAN_LEN>();
            let ours = header.is_some_and(|got| got[0] & VNI_VALID != 0 && got[4..7] == self.header[4..7]);
            if !known || !ours {
                let reason = if known { DropReason::GatewayMalformed } else { DropReason::GatewayStranger };
                batch.received[index].refused = Some(reason);
                continue;
            }
            self.ours = received.to;
            datagram.copy_within(VXLAN_LEN.., 0);
            let len = received.len - VXLAN_LEN;
            let frame = &datagram[..len];
            let offload =
                Header::parse(frame).map_or_else(|_| Offload::default(), |header| transport::guess(frame, &header, self.mtu));
            batch.received[index].len = len;
            batch.vnet[index] = offload.emit();
        }
        Ok(())
    }

    fn write(&mut self, offload: &Offload, parts: &[&[u8]]) -> Result<(), WriteError> {
        let header = self.header;
        self.out.clear();
        let mut segment_len = 0;
        if offload.is_super() {
            let frame = parts.concat();
            let transport = Header::parse(&frame).ok().and_then(|header| Transport::find(&frame, &header));
            let transport = transport.ok_or(WriteError::Refused(DropReason::Segmentation))?;
            let out = &mut self.out;
            transport::segments(&frame, &transport, offload.segment_size, &mut self.scratch, |segment, offload| {
                if let Some(partial) = offload.checksum {
                    // Cannot fail: the place was found in this very frame.
                    let _ = complete(segment, partial);
                }
                out.extend_from_slice(&header);
                out.extend_from_slice(segment);
                segment_len = segment_len.max(VXLAN_LEN + segment.len());
            });
        } else {
            self.out.extend_from_slice(&header);
            parts.iter().for_each(|part| self.out.extend_from_slice(part));
            if let Some(partial) = offload.checksum {
                complete(&mut self.out[VXLAN_LEN..], partial).map_err(WriteError::Refused)?;
            }
            segment_len = self.out.len();
        }
        let burst = segment_len.max(1) * (crate::slice::MAX_BURST / segment_len.max(1)).clamp(1, crate::slice::MAX_SEGMENTS);
        for bytes in self.out.chunks(burst) {
            let mut sent = 0;
            let way = Way { to: self.remote, from: self.ours, interface: 0 };
            let mut send = |gso| send_segments(self.socket.as_fd(), way, bytes, segment_len, gso, &mut sent);
            match send(true).or_else(|_| send(false)) {
                Ok(()) => (),
                Err(nix::Error::EMSGSIZE) => return Err(WriteError::Refused(DropReason::GatewayTooBig)),
                // The foreign end is away; the port is still there.
                Err(nix::Error::ENETDOWN | nix::Error::ENETUNREACH) => return Err(WriteError::Refused(DropReason::PortError)),
                Err(error) => return Err(write_error(error)),
            }
        }
        Ok(())
    }

    fn losses(&mut self) -> u64 {
        sys::datagram_losses(self.socket.as_fd(), &mut self.lost)
    }

    fn path_mtu(&self) -> Option<u16> {
        self.path_mtu
    }
}
