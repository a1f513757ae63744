//! The mesh port: bursts out by UDP_SEGMENT, coalesced datagrams in by UDP_GRO, both with a way to do without.

use crate::counters::Counters;
use crate::drops::DropReason;
use crate::io::sys::{Batch, set_option};
use crate::slice::Arena;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrIn, SockaddrIn6, sendmsg};
use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

const UDP_GRO: libc::c_int = 104;
/// Bytes the kernel may queue for us in each direction.
const BUFFER: libc::c_int = 8 << 20;
/// How long a full socket is waited for, in milliseconds; guests feel it as back pressure.
const WAIT_MS: u8 = 10;
/// Coalesced datagrams taken by one call.
const READS: usize = 16;

/// The UDP socket all switches of the mesh speak through.
#[derive(Debug)]
pub struct Mesh {
    socket: UdpSocket,
    v6: bool,
    gso: bool,
    counters: Arc<Counters>,
}

/// Sets a buffer size beyond the system's limit where we may, within it otherwise.
pub fn large_buffers(socket: BorrowedFd<'_>, bytes: libc::c_int) {
    for (forced, plain) in [(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF), (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)] {
        if set_option(socket, libc::SOL_SOCKET, forced, bytes).is_err()
            && let Err(error) = set_option(socket, libc::SOL_SOCKET, plain, bytes)
        {
            tracing::debug!(%error, "socket buffers stay small");
        }
    }
}

/// Sends `bytes` as datagrams of `segment` bytes, the last perhaps shorter.
pub fn send_segments(socket: BorrowedFd<'_>, to: SocketAddr, bytes: &[u8], segment: usize, gso: bool) -> nix::Result<()> {
    let size = u16::try_from(segment).unwrap_or(u16::MAX);
    let controls = [ControlMessage::UdpGsoSegments(&size)];
    let controls = if gso && bytes.len() > segment { &controls[..] } else { &[] };
    if !gso && bytes.len() > segment {
        return bytes.chunks(segment).try_for_each(|datagram| send_segments(socket, to, datagram, segment, false));
    }
    let fd = socket.as_raw_fd();
    let parts = [IoSlice::new(bytes)];
    let sent = |fd| match to {
        SocketAddr::V4(to) => sendmsg(fd, &parts, controls, MsgFlags::MSG_DONTWAIT, Some(&SockaddrIn::from(to))),
        SocketAddr::V6(to) => sendmsg(fd, &parts, controls, MsgFlags::MSG_DONTWAIT, Some(&SockaddrIn6::from(to))),
    };
    match sent(fd) {
        // An ICMP error of an earlier datagram is told to the next call: say it again once.
        Err(nix::Error::ECONNREFUSED | nix::Error::EHOSTUNREACH) => sent(fd).map(|_| ()),
        other => other.map(|_| ()),
    }
}

impl Mesh {
    /// Takes the socket over for data; it becomes non-blocking.
    pub fn new(socket: UdpSocket, counters: Arc<Counters>) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let v6 = socket.local_addr()?.is_ipv6();
        let fd = socket.as_fd();
        large_buffers(fd, BUFFER);
        if let Err(error) = set_option(fd, libc::SOL_UDP, UDP_GRO, 1i32) {
            tracing::info!(%error, "no UDP_GRO here: datagrams are read one by one");
        }
        // Slices are made to fit the path; a fragmented one would cost a whole frame.
        let (level, discover, tos) = if v6 {
            (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_RECVTCLASS)
        } else {
            (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_RECVTOS)
        };
        set_option(fd, level, discover, libc::IP_PMTUDISC_PROBE)?;
        set_option(fd, level, tos, 1i32)?;
        Ok(Self { socket, v6, gso: true, counters })
    }

    /// For epoll.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Buffers for [`Self::receive`].
    pub fn batch() -> Batch {
        Batch::new(READS, 65_536, 0)
    }

    /// Takes what is there; 0: nothing.
    pub fn receive(&self, batch: &mut Batch) -> usize {
        match batch.receive(self.socket.as_fd(), false) {
            Ok(count) => count,
            Err(error) => {
                // ICMP errors of datagrams sent earlier end up here; the control side notices a dead peer by itself.
                tracing::trace!(%error, "mesh port");
                0
            }
        }
    }

    /// Sends all bursts of an arena, in order.
    pub fn send(&mut self, arena: &Arena) {
        for burst in arena.bursts() {
            let bytes = &arena.bytes()[burst.start..burst.end];
            let to = match burst.to {
                SocketAddr::V4(v4) if self.v6 => (IpAddr::from(v4.ip().to_ipv6_mapped()), v4.port()).into(),
                other => other,
            };
            if let Err(error) = self.send_burst(to, bytes, burst.segment) {
                tracing::trace!(%error, %to, "burst");
                let reason = if error == nix::Error::EAGAIN || error == nix::Error::ENOBUFS {
                    DropReason::TunnelBusy
                } else {
                    DropReason::TunnelError
                };
                self.counters.drops.add(reason, burst.count as u64);
            }
        }
    }

    fn send_burst(&mut self, to: SocketAddr, bytes: &[u8], segment: usize) -> nix::Result<()> {
        let fd = self.socket.as_fd();
        let mut result = send_segments(fd, to, bytes, segment, self.gso);
        if result == Err(nix::Error::EAGAIN) {
            let mut ready = [PollFd::new(fd, PollFlags::POLLOUT)];
            let _ = poll(&mut ready, PollTimeout::from(WAIT_MS));
            result = send_segments(fd, to, bytes, segment, self.gso);
        }
        match result {
            // EIO: the device cannot checksum; EINVAL also means "a segment is larger than the path", then singles tell.
            Err(error @ (nix::Error::EIO | nix::Error::EINVAL | nix::Error::EOPNOTSUPP)) if self.gso && bytes.len() > segment => {
                if error != nix::Error::EINVAL {
                    tracing::info!(%error, "no UDP_SEGMENT here: datagrams are sent one by one");
                    self.gso = false;
                }
                send_segments(fd, to, bytes, segment, false)
            }
            other => other,
        }
    }
}
