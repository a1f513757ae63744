//! System calls that no crate in use wraps: batched receive with control messages, socket options, interface requests.
#![allow(unsafe_code)]

use crate::drops::DropReason;
use crate::virtio;
use std::io;
use std::mem::{size_of, size_of_val, zeroed};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use violin_common::Instant;

/// Messages one call takes.
pub const VECTOR: usize = 64;
const CONTROL: usize = 128;
const UDP_GRO: libc::c_int = 104;
const PACKET_AUXDATA: libc::c_int = 8;

/// The host's monotonic clock.
pub fn now() -> Instant {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place for the result; CLOCK_MONOTONIC always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    Instant(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}

/// One received message.
#[derive(Debug, Clone, Copy, Default)]
pub struct Received {
    /// Bytes in its slot, from the headroom on.
    pub len: usize,
    /// Who sent it, where the socket knows.
    pub from: Option<SocketAddr>,
    /// To which of our addresses it came, where the socket was asked to tell.
    pub to: Option<IpAddr>,
    /// Through which interface, likewise; 0: not told.
    pub interface: u32,
    /// Tag control information and protocol of a stripped VLAN tag.
    pub vlan: Option<(u16, u16)>,
    /// Size of the datagrams that were put together, where they were.
    pub segment: Option<usize>,
    /// Why it is to be refused unread, such as not having fitted.
    pub refused: Option<DropReason>,
}

/// Buffers for a vector of messages, allocated once.
#[derive(Debug)]
pub struct Batch {
    bytes: Vec<u8>,
    slot: usize,
    headroom: usize,
    /// `virtio_net_hdr` of each.
    pub vnet: Vec<[u8; virtio::LEN]>,
    /// What the last call received.
    pub received: Vec<Received>,
}

impl Batch {
    /// Room for `count` (at most [`VECTOR`]) messages of `size` bytes behind `headroom` bytes.
    pub fn new(count: usize, size: usize, headroom: usize) -> Self {
        let (count, slot) = (count.min(VECTOR), size + headroom);
        Self {
            bytes: vec![0; count * slot],
            slot,
            headroom,
            vnet: vec![[0; virtio::LEN]; count],
            received: Vec::with_capacity(count),
        }
    }

    /// Messages that fit.
    pub fn capacity(&self) -> usize {
        self.vnet.len()
    }

    /// Bytes in front of each message.
    pub fn headroom(&self) -> usize {
        self.headroom
    }

    /// The slot of one message, with its headroom.
    pub fn slot_mut(&mut self, index: usize) -> &mut [u8] {
        &mut self.bytes[index * self.slot..(index + 1) * self.slot]
    }

    /// All received messages with their slots, headroom included.
    pub fn slots_mut(&mut self) -> impl Iterator<Item = (&Received, &[u8; virtio::LEN], &mut [u8])> {
        self.received
            .iter()
            .zip(&self.vnet)
            .zip(self.bytes.chunks_mut(self.slot))
            .map(|((received, vnet), slot)| (received, vnet, slot))
    }

    /// All received messages without headroom.
    pub fn messages(&self) -> impl Iterator<Item = (&Received, &[u8])> {
        let headroom = self.headroom;
        self.received
            .iter()
            .zip(self.bytes.chunks(self.slot))
            .map(move |(received, slot)| (received, &slot[headroom..headroom + received.len]))
    }

    /// All received messages without headroom, to be changed in place.
    pub fn messages_mut(&mut self) -> impl Iterator<Item = (&Received, &mut [u8])> {
        let headroom = self.headroom;
        self.received
            .iter()
            .zip(self.bytes.chunks_mut(self.slot))
            .map(move |(received, slot)| (received, &mut slot[headroom..headroom + received.len]))
    }

    /// Receives as many messages as there are, at most `limit` and [`Self::capacity`], without waiting. With `vnet` each begins with a
    /// `virtio_net_hdr`, which goes to [`Self::vnet`].
    pub fn receive(&mut self, socket: BorrowedFd<'_>, vnet: bool, limit: usize) -> io::Result<usize> {
        self.received.clear();
        let count = self.capacity().min(limit);
        // SAFETY: all of these are plain C structs for which zero is a value.
        let mut headers: [libc::mmsghdr; VECTOR] = unsafe { zeroed() };
        // SAFETY: as above.
        let mut iovecs: [[libc::iovec; 2]; VECTOR] = unsafe { zeroed() };
        // SAFETY: as above.
        let mut names: [libc::sockaddr_storage; VECTOR] = unsafe { zeroed() };
        let mut controls = [[0u64; CONTROL / 8]; VECTOR];
        for index in 0..count {
            let body = &mut self.bytes[index * self.slot + self.headroom..(index + 1) * self.slot];
            iovecs[index] = [
                libc::iovec { iov_base: self.vnet[index].as_mut_ptr().cast(), iov_len: virtio::LEN },
                libc::iovec { iov_base: body.as_mut_ptr().cast(), iov_len: body.len() },
            ];
            let skip = usize::from(!vnet);
            let header = &mut headers[index].msg_hdr;
            header.msg_iov = iovecs[index][skip..].as_mut_ptr();
            header.msg_iovlen = 2 - skip;
            header.msg_name = (&raw mut names[index]).cast();
            header.msg_namelen = size_of::<libc::sockaddr_storage>() as u32;
            header.msg_control = controls[index].as_mut_ptr().cast();
            header.msg_controllen = CONTROL;
        }
        // SAFETY: every header points to buffers that live, unmoved, until the call has returned.
        let got = unsafe {
            let flags = libc::MSG_DONTWAIT;
            libc::recvmmsg(socket.as_raw_fd(), headers.as_mut_ptr(), count as u32, flags, std::ptr::null_mut())
        };
        if got < 0 {
            return Err(io::Error::last_os_error());
        }
        for (header, name) in headers.iter().zip(&names).take(got as usize) {
            let extra = if vnet { virtio::LEN } else { 0 };
            let mut received = Received {
                len: (header.msg_len as usize).saturating_sub(extra),
                from: address(name),
                refused: (header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0).then_some(DropReason::TooBig),
                ..Received::default()
            };
            controls_of(&header.msg_hdr, &mut received);
            self.received.push(received);
        }
        Ok(got as usize)
    }
}

/// Sends pieces of `bytes` (start, end), one message each, at most [`VECTOR`], without waiting. Returns how many were taken; the
/// error of the first, if that was refused.
pub fn send_pieces(socket: BorrowedFd<'_>, bytes: &[u8], pieces: &[(usize, usize)]) -> io::Result<usize> {
    // SAFETY: both are plain C structs for which zero is a value.
    let (mut headers, mut iovecs): ([libc::mmsghdr; VECTOR], [libc::iovec; VECTOR]) = unsafe { (zeroed(), zeroed()) };
    let count = pieces.len().min(VECTOR);
    for (index, &(start, end)) in pieces.iter().take(count).enumerate() {
        let piece = bytes.get(start..end).unwrap_or_default();
        // The kernel only reads from it.
        iovecs[index] = libc::iovec { iov_base: piece.as_ptr().cast_mut().cast(), iov_len: piece.len() };
        headers[index].msg_hdr.msg_iov = &raw mut iovecs[index];
        headers[index].msg_hdr.msg_iovlen = 1;
    }
    // SAFETY: every header points to an entry of `iovecs` and that into `bytes`; both live until the call has returned.
    let sent = unsafe { libc::sendmmsg(socket.as_raw_fd(), headers.as_mut_ptr(), count as u32, libc::MSG_DONTWAIT) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(sent as usize) }
}

fn controls_of(header: &libc::msghdr, received: &mut Received) {
    // SAFETY: the kernel filled the control buffer, which still lives; the macros stay within `msg_controllen`.
    let mut message = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !message.is_null() {
        // SAFETY: not null, so it points to a whole header within the buffer; so does its data.
        let (head, data) = unsafe { (&*message, libc::CMSG_DATA(message)) };
        match (head.cmsg_level, head.cmsg_type) {
            (libc::SOL_UDP, UDP_GRO) => {
                // SAFETY: UDP_GRO carries an int.
                let size = unsafe { data.cast::<libc::c_int>().read_unaligned() };
                received.segment = usize::try_from(size).ok().filter(|&size| size > 0);
            }
            (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                // SAFETY: IP_PKTINFO carries an in_pktinfo.
                let info = unsafe { data.cast::<libc::in_pktinfo>().read_unaligned() };
                // Ours also where the datagram was sent to a broadcast address.
                received.to = Some(IpAddr::from(info.ipi_spec_dst.s_addr.to_ne_bytes()));
                received.interface = u32::try_from(info.ipi_ifindex).unwrap_or(0);
            }
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                // SAFETY: IPV6_PKTINFO carries an in6_pktinfo.
                let info = unsafe { data.cast::<libc::in6_pktinfo>().read_unaligned() };
                received.to = Some(IpAddr::from(info.ipi6_addr.s6_addr).to_canonical()).filter(|to| !to.is_multicast());
                received.interface = info.ipi6_ifindex;
            }
            (libc::SOL_PACKET, PACKET_AUXDATA) => {
                // SAFETY: PACKET_AUXDATA carries a tpacket_auxdata.
                let aux = unsafe { data.cast::<libc::tpacket_auxdata>().read_unaligned() };
                if aux.tp_status & libc::TP_STATUS_VLAN_VALID != 0 {
                    let known = aux.tp_status & libc::TP_STATUS_VLAN_TPID_VALID != 0;
                    received.vlan = Some((aux.tp_vlan_tci, if known { aux.tp_vlan_tpid } else { 0x8100 }));
                }
            }
            _ => (),
        }
        // SAFETY: `message` came from this header's buffer.
        message = unsafe { libc::CMSG_NXTHDR(header, message) };
    }
}

fn address(name: &libc::sockaddr_storage) -> Option<SocketAddr> {
    match i32::from(name.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says which of the socket address types it is; the storage is large enough for each.
            let v4 = unsafe { &*(&raw const *name).cast::<libc::sockaddr_in>() };
            Some((IpAddr::from(v4.sin_addr.s_addr.to_ne_bytes()), u16::from_be(v4.sin_port)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: as above.
            let v6 = unsafe { &*(&raw const *name).cast::<libc::sockaddr_in6>() };
            let ip = IpAddr::from(v6.sin6_addr.s6_addr).to_canonical();
            Some((ip, u16::from_be(v6.sin6_port)).into())
        }
        _ => None,
    }
}

/// Sets a socket option of any plain type.
pub fn set_option<T: Copy>(socket: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int, value: T) -> io::Result<()> {
    // SAFETY: pointer and length describe `value`.
    let result = unsafe {
        let len = size_of::<T>() as libc::socklen_t;
        libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), len)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Reads an integer socket option.
pub fn int_option(socket: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int) -> io::Result<i32> {
    let (mut value, mut len) = (0i32, size_of::<i32>() as libc::socklen_t);
    // SAFETY: pointer and length describe `value`.
    let result = unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut value).cast(), &mut len) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

/// Packets that a packet socket lost since the last call.
pub fn packet_losses(socket: BorrowedFd<'_>) -> u64 {
    #[repr(C)]
    struct Stats {
        packets: u32,
        drops: u32,
    }
    let (mut stats, mut len) = (Stats { packets: 0, drops: 0 }, size_of::<Stats>() as libc::socklen_t);
    // SAFETY: pointer and length describe `stats`, which is a tpacket_stats.
    let result = unsafe {
        let value = (&raw mut stats).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_PACKET, libc::PACKET_STATISTICS, value, &mut len)
    };
    if result < 0 { 0 } else { u64::from(stats.drops) }
}

/// Datagrams that a UDP socket lost, most for want of room in its buffer, since the last call; `seen` is how many there were
/// by then. Kernels before 4.12 do not tell.
pub fn datagram_losses(socket: BorrowedFd<'_>, seen: &mut u32) -> u64 {
    const DROPS: usize = libc::SK_MEMINFO_DROPS as usize;
    let (mut figures, mut len) = ([0u32; DROPS + 1], size_of::<[u32; DROPS + 1]>() as libc::socklen_t);
    // SAFETY: pointer and length describe `figures`.
    let result = unsafe {
        let value = figures.as_mut_ptr().cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_MEMINFO, value, &mut len)
    };
    if result < 0 || (len as usize) < size_of_val(&figures) {
        return 0;
    }
    let lost = figures[DROPS].wrapping_sub(*seen);
    *seen = figures[DROPS];
    lost.into()
}

/// Opens a packet socket that receives nothing until it is bound.
pub fn packet_socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Binds a packet socket to an interface, for all protocols.
pub fn bind_packet(socket: BorrowedFd<'_>, index: u32) -> io::Result<()> {
    // SAFETY: zero is a value of this plain C struct.
    let mut address: libc::sockaddr_ll = unsafe { zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = index as i32;
    // SAFETY: pointer and length describe `address`.
    let result = unsafe {
        let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// One interface request (`netdevice(7)`, `tuntap`): `fill` writes the request's union, what the kernel left in it returns.
pub fn interface_request(
    fd: BorrowedFd<'_>,
    request: libc::c_ulong,
    name: &str,
    fill: impl FnOnce(&mut libc::ifreq),
) -> io::Result<libc::ifreq> {
    // SAFETY: zero is a value of this plain C struct.
    let mut ifreq: libc::ifreq = unsafe { zeroed() };
    if name.is_empty() || name.len() >= ifreq.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "an interface name has 1 to 15 bytes"));
    }
    for (place, byte) in ifreq.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    fill(&mut ifreq);
    // SAFETY: all requests used with this take a pointer to an ifreq.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, &raw mut ifreq) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(ifreq) }
}

/// One request that takes a number.
pub fn number_request(fd: BorrowedFd<'_>, request: libc::c_ulong, number: libc::c_ulong) -> io::Result<()> {
    // SAFETY: all requests used with this take a plain number.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, number) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Has the calling thread ask for the processor often and for short: a fair scheduler then lets it go first when it wakes.
/// Kernels before 6.12 do not have it.
pub fn short_slices() -> io::Result<()> {
    /// The shortest there is.
    const SLICE: u64 = 100_000;
    #[repr(C)]
    #[derive(Default)]
    struct Attributes {
        size: u32,
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        runtime: u64,
        deadline: u64,
        period: u64,
    }
    let size = size_of::<Attributes>() as u32;
    let mut attributes = Attributes::default();
    // SAFETY: `attributes` is a whole sched_attr of its first version (linux/sched/types.h), of the size that is said.
    let result = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    if attributes.policy != libc::SCHED_OTHER as u32 {
        // Whoever started us has chosen another scheduler.
        return Ok(());
    }
    (attributes.size, attributes.runtime) = (size, SLICE);
    // SAFETY: as above.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
