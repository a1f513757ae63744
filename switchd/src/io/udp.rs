//! The mesh port: bursts out by UDP_SEGMENT, coalesced datagrams in by UDP_GRO, both with a way to do without.

use crate::counters::Counters;
use crate::drops::DropReason;
use crate::io::sys::{Batch, datagram_losses, now, set_option};
use crate::slice::{Arena, Way};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrIn, SockaddrIn6, sendmsg};
use std::io::{self, IoSlice};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

const UDP_GRO: libc::c_int = 104;
/// Bytes the kernel may queue for us.
const BUFFER: libc::c_int = 8 << 20;
/// Bytes it may queue from us; it takes twice as many. The control channel waits behind them and has peers for lost after
/// 1.5 s: on an underlay of 50 Mbit/s these are a third of a second.
const SEND_BUFFER: libc::c_int = 1 << 20;
/// How long a full socket is waited for until the mesh port is read again; guests feel it as back pressure. More would let a
/// guest that sends faster than the underlay takes keep us from our peers' word until all of them seem lost.
const PATIENCE: Duration = Duration::from_millis(10);
/// Datagrams taken by one call, each coalesced or single: where nobody coalesces, as many as a super-frame has slices.
pub const READS: usize = 64;

/// The UDP socket all switches of the mesh speak through.
#[derive(Debug)]
pub struct Mesh {
    socket: UdpSocket,
    v6: bool,
    gso: bool,
    /// Datagrams the kernel has lost so far.
    lost: u32,
    /// What is left of [`PATIENCE`].
    patience: Duration,
    counters: Arc<Counters>,
}

/// Sets both buffers' sizes beyond the system's limit where we may, within it otherwise.
pub fn large_buffers(socket: BorrowedFd<'_>, bytes: libc::c_int) {
    buffer(socket, (libc::SO_RCVBUFFORCE, libc::SO_RCVBUF), bytes);
    buffer(socket, (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF), bytes);
}

fn buffer(socket: BorrowedFd<'_>, (forced, plain): (libc::c_int, libc::c_int), bytes: libc::c_int) {
    if set_option(socket, libc::SOL_SOCKET, forced, bytes).is_err()
        && let Err(error) = set_option(socket, libc::SOL_SOCKET, plain, bytes)
    {
        tracing::debug!(%error, "a socket's buffer stays small");
    }
}

/// Has a socket tell to which of a host's addresses, and through which interface, each datagram came: whoever asked at one of
/// several takes an answer from another for a stranger's, and plain data counts from one interface only.
pub fn tell_destinations(socket: &UdpSocket) -> io::Result<()> {
    let local = socket.local_addr()?;
    // An IPv6 socket tells of IPv4 by mapped addresses.
    let (level, name) =
        if local.is_ipv6() { (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO) } else { (libc::IPPROTO_IP, libc::IP_PKTINFO) };
    set_option(socket.as_fd(), level, name, 1i32)
}

fn mapped(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    }
}

/// Sends one datagram, or with `segment` as many as `bytes` has of that size. Where the way goes to is of the socket's family.
pub fn send_from(socket: BorrowedFd<'_>, way: Way, bytes: &[u8], segment: Option<u16>) -> nix::Result<()> {
    let Way { from, to, interface } = way;
    let in_addr = |ip: Ipv4Addr| libc::in_addr { s_addr: u32::from_ne_bytes(ip.octets()) };
    let v4 = match from {
        Some(IpAddr::V4(ip)) => ip,
        _ => Ipv4Addr::UNSPECIFIED,
    };
    let v4 =
        libc::in_pktinfo { ipi_ifindex: interface as i32, ipi_spec_dst: in_addr(v4), ipi_addr: in_addr(Ipv4Addr::UNSPECIFIED) };
    let v6 = libc::in6_addr { s6_addr: from.map_or(Ipv6Addr::UNSPECIFIED, mapped).octets() };
    let v6 = libc::in6_pktinfo { ipi6_addr: v6, ipi6_ifindex: interface as _ };
    let size = segment.unwrap_or(0);
    let source = match to {
        SocketAddr::V4(_) => ControlMessage::Ipv4PacketInfo(&v4),
        SocketAddr::V6(_) => ControlMessage::Ipv6PacketInfo(&v6),
    };
    let controls = [source, ControlMessage::UdpGsoSegments(&size)];
    let kernel_chooses = from.is_none() && interface == 0;
    let controls = &controls[usize::from(kernel_chooses)..1 + usize::from(segment.is_some())];
    let (fd, parts, flags) = (socket.as_raw_fd(), [IoSlice::new(bytes)], MsgFlags::MSG_DONTWAIT);
    match to {
        SocketAddr::V4(to) => sendmsg(fd, &parts, controls, flags, Some(&SockaddrIn::from(to))),
        SocketAddr::V6(to) => sendmsg(fd, &parts, controls, flags, Some(&SockaddrIn6::from(to))),
    }
    .map(|_| ())
}

/// Sends `bytes` as datagrams of `segment` bytes, the last perhaps shorter, from byte `sent` on, which moves along with what
/// was sent: after an error the same call goes on where it stopped.
pub fn send_segments(
    socket: BorrowedFd<'_>,
    way: Way,
    bytes: &[u8],
    segment: usize,
    gso: bool,
    sent: &mut usize,
) -> nix::Result<()> {
    let size = u16::try_from(segment).unwrap_or(u16::MAX);
    walk(bytes, if gso { bytes.len() } else { segment }, sent, |piece| {
        let send = || send_from(socket, way, piece, (piece.len() > segment).then_some(size));
        match send() {
            // An ICMP error of an earlier datagram is told to the next call: say it again once.
            Err(nix::Error::ECONNREFUSED | nix::Error::EHOSTUNREACH) => send(),
            other => other,
        }
    })
}

fn walk(bytes: &[u8], step: usize, sent: &mut usize, mut each: impl FnMut(&[u8]) -> nix::Result<()>) -> nix::Result<()> {
    for piece in bytes.get(*sent..).unwrap_or_default().chunks(step.max(1)) {
        each(piece)?;
        *sent += piece.len();
    }
    Ok(())
}

/// Waits for at most `left`, rounded up to milliseconds; returns what remains of it.
fn spend(left: Duration, wait: impl FnOnce(u8)) -> Duration {
    let began = now();
    wait(u8::try_from(left.as_micros().div_ceil(1000)).unwrap_or(u8::MAX));
    left.saturating_sub(now().since(began))
}

impl Mesh {
    /// Takes the socket over for data; it becomes non-blocking.
    pub fn new(socket: UdpSocket, counters: Arc<Counters>) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let v6 = socket.local_addr()?.is_ipv6();
        let fd = socket.as_fd();
        buffer(fd, (libc::SO_RCVBUFFORCE, libc::SO_RCVBUF), BUFFER);
        buffer(fd, (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF), SEND_BUFFER);
        if let Err(error) = set_option(fd, libc::SOL_UDP, UDP_GRO, 1i32) {
            tracing::info!(%error, "no UDP_GRO here: datagrams are read one by one");
        }
        tell_destinations(&socket)?;
        // Slices are made to fit the path; a fragmented one would cost a whole frame.
        let (level, discover) =
            if v6 { (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER) } else { (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER) };
        set_option(fd, level, discover, libc::IP_PMTUDISC_PROBE)?;
        Ok(Self { socket, v6, gso: true, lost: 0, patience: PATIENCE, counters })
    }

    /// For epoll.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Buffers for [`Self::receive`].
    pub fn batch() -> Batch {
        Batch::new(READS, 65_536, 0)
    }

    /// Takes what is there, at most `limit`; 0: nothing.
    pub fn receive(&self, batch: &mut Batch, limit: usize) -> usize {
        match batch.receive(self.socket.as_fd(), false, limit) {
            Ok(count) => count,
            Err(error) => {
                // ICMP errors of datagrams sent earlier end up here; the control side notices a dead peer by itself.
                tracing::trace!(%error, "mesh port");
                0
            }
        }
    }

    /// Datagrams lost between underlay and us since the last call.
    pub fn losses(&mut self) -> u64 {
        datagram_losses(self.socket.as_fd(), &mut self.lost)
    }

    /// A full socket may be waited for again: to be called before each look at what came.
    pub const fn be_patient(&mut self) {
        self.patience = PATIENCE;
    }

    /// Sends all bursts of an arena, in order.
    pub fn send(&mut self, arena: &Arena) {
        for burst in arena.bursts() {
            let bytes = &arena.bytes()[burst.start..burst.end];
            let to = match burst.way.to {
                SocketAddr::V4(v4) if self.v6 => (IpAddr::from(v4.ip().to_ipv6_mapped()), v4.port()).into(),
                other => other,
            };
            let mut sent = 0;
            if let Err(error) = self.send_burst(Way { to, ..burst.way }, bytes, burst.segment, &mut sent) {
                tracing::trace!(%error, %to, "burst");
                let reason = if error == nix::Error::EAGAIN || error == nix::Error::ENOBUFS {
                    DropReason::TunnelBusy
                } else {
                    DropReason::TunnelError
                };
                self.counters.drops.add(reason, (bytes.len() - sent).div_ceil(burst.segment.max(1)) as u64);
            }
        }
    }

    fn send_burst(&mut self, way: Way, bytes: &[u8], segment: usize, sent: &mut usize) -> nix::Result<()> {
        let fd = self.socket.as_fd();
        let (mut at_once, mut waited) = (self.gso, false);
        loop {
            match send_segments(fd, way, bytes, segment, at_once, sent) {
                Err(nix::Error::EAGAIN) if !waited && !self.patience.is_zero() => {
                    waited = true;
                    self.patience = spend(self.patience, |ms| {
                        let _ = poll(&mut [PollFd::new(fd, PollFlags::POLLOUT)], PollTimeout::from(ms));
                    });
                }
                // EIO: the device cannot checksum; EINVAL also means "a segment is larger than the path", then singles tell.
                Err(error @ (nix::Error::EIO | nix::Error::EINVAL | nix::Error::EOPNOTSUPP))
                    if at_once && bytes.len() > segment =>
                {
                    at_once = false;
                    if error != nix::Error::EINVAL {
                        tracing::info!(%error, "no UDP_SEGMENT here: datagrams are sent one by one");
                        self.gso = false;
                    }
                }
                other => return other,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn way(from: Option<IpAddr>, to: SocketAddr) -> Way {
        Way { to, from, interface: 0 }
    }

    #[test]
    fn what_was_waited_for_a_full_socket_is_not_waited_again() {
        let left = spend(PATIENCE, |ms| {
            assert_eq!(ms, 10);
            std::thread::sleep(Duration::from_millis(4));
        });
        assert!(left <= Duration::from_millis(6));
        let left = spend(left, |ms| std::thread::sleep(Duration::from_millis(ms.into())));
        assert_eq!(left, Duration::ZERO);
    }

    #[test]
    fn datagrams_that_found_no_room_are_counted_once() {
        let (from, to) = (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
        set_option(to.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUF, 4096i32).unwrap();
        to.set_nonblocking(true).unwrap();
        let address = to.local_addr().unwrap();
        for _ in 0..200 {
            from.send_to(&[7; 1000], address).unwrap();
        }

        let (mut seen, mut arrived, mut lost) = (0, 0, 0);
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(120);
        while arrived + lost < 200 && std::time::Instant::now() < deadline {
            arrived += std::iter::from_fn(|| to.recv(&mut [0; 1000]).ok()).count() as u64;
            lost += datagram_losses(to.as_fd(), &mut seen);
        }
        assert_eq!((arrived + lost, arrived > 0, lost > 0), (200, true, true));
        assert_eq!(datagram_losses(to.as_fd(), &mut seen), 0);
    }

    #[test]
    fn a_burst_that_was_stopped_goes_on_where_it_stopped() {
        let bytes: Vec<u8> = (0..25).collect();
        let (mut sent, mut heard, mut room) = (0, Vec::new(), 2);
        let mut each = |datagram: &[u8]| {
            if room == 0 {
                room = 9;
                return Err(nix::Error::EAGAIN);
            }
            room -= 1;
            heard.push(datagram.to_vec());
            Ok(())
        };
        assert_eq!(walk(&bytes, 10, &mut sent, &mut each), Err(nix::Error::EAGAIN));
        assert_eq!(sent, 20);
        assert_eq!(walk(&bytes, 10, &mut sent, &mut each), Ok(()));
        assert_eq!(heard, [&bytes[..10], &bytes[10..20], &bytes[20..]]);
    }

    #[test]
    fn a_datagram_is_answered_from_the_address_it_came_to() {
        for (any, asked) in [("0.0.0.0:0", "127.0.0.2"), ("[::]:0", "127.0.0.2"), ("[::]:0", "::1")] {
            let ours = UdpSocket::bind(any).unwrap();
            tell_destinations(&ours).unwrap();
            let place: SocketAddr = (asked.parse::<IpAddr>().unwrap(), ours.local_addr().unwrap().port()).into();
            let theirs = UdpSocket::bind((if place.is_ipv4() { "127.0.0.1" } else { "::1" }, 0)).unwrap();
            theirs.set_read_timeout(Some(std::time::Duration::from_secs(60))).unwrap();
            theirs.send_to(b"?", place).unwrap();
            let mut batch = Mesh::batch();
            poll(&mut [PollFd::new(ours.as_fd(), PollFlags::POLLIN)], PollTimeout::from(5000u16)).unwrap();
            batch.receive(ours.as_fd(), false, 1).unwrap();
            let received = batch.received[0];
            assert_eq!(received.to, Some(place.ip()), "{any}");

            let back = theirs.local_addr().unwrap();
            let back = if any.starts_with('[') { (IpAddr::from(mapped(back.ip())), back.port()).into() } else { back };
            for segment in [None, Some(1)] {
                send_from(ours.as_fd(), way(received.to, back), b"ab", segment).unwrap();
                assert_eq!(theirs.recv_from(&mut [0; 2]).unwrap().1, place, "{any}, segments {segment:?}");
            }
        }
    }

    #[test]
    fn bursts_arrive_once_each_at_once_and_one_by_one() {
        let (from, to) = (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
        to.set_read_timeout(Some(std::time::Duration::from_secs(60))).unwrap();
        for gso in [true, false] {
            let mut sent = 0;
            send_segments(from.as_fd(), way(None, to.local_addr().unwrap()), &[7; 250], 100, gso, &mut sent).unwrap();
            let lens = [0; 3].map(|_| to.recv(&mut [0; 1000]).unwrap());
            assert_eq!((lens, sent), ([100, 100, 50], 250));
        }
    }
}
