//! An AF_PACKET socket that carries probe frames of one interface.
#![allow(unsafe_code)]

use crate::frame::{self, ETHERTYPE, Probe};
use std::ffi::CString;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

/// `linux/if_packet.h`
const PACKET_IGNORE_OUTGOING: libc::c_int = 23;

/// Bytes of received frames that may wait: some 10,000 probe frames as the kernel counts them, 20 s of the prober's.
const RECEIVE_ROOM: libc::c_int = 8 << 20;

/// The socket. It dies with its interface: then sending and receiving fail and a new one must be opened.
#[derive(Debug)]
pub struct PacketSocket {
    socket: OwnedFd,
    /// Index of the interface.
    pub index: u32,
    /// MAC of the interface.
    pub mac: [u8; 6],
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

impl PacketSocket {
    /// Opens it on `interface`; receiving gives up after `patience`.
    ///
    /// Errors: no such interface, or no right to raw sockets.
    pub fn open(interface: &str, patience: Duration) -> io::Result<Self> {
        let protocol = libc::c_int::from(ETHERTYPE.to_be());
        // SAFETY: socket takes three integers and returns a new descriptor or -1.
        let socket = check(unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) })?;
        // SAFETY: the descriptor was just made and is owned by nothing else.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        let name = CString::new(interface).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: the name is a C string that outlives the call.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        if index == 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: all zeros is a valid value of this plain structure.
        let mut address: libc::sockaddr_ll = unsafe { zeroed() };
        address.sll_family = libc::AF_PACKET as libc::c_ushort;
        address.sll_protocol = ETHERTYPE.to_be();
        address.sll_ifindex = index.cast_signed();
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: the address is a live sockaddr_ll of the length given.
        check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) })?;
        // A starved guest must not count as lost what only waited for it.
        let room: libc::c_int = RECEIVE_ROOM;
        set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &room)?;
        let one: libc::c_int = 1;
        set(&socket, libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, &one)?;
        let patience = libc::timeval { tv_sec: patience.as_secs().cast_signed(), tv_usec: i64::from(patience.subsec_micros()) };
        set(&socket, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &patience)?;
        let mac = hardware_address(&socket, interface)?;
        Ok(Self { socket, index, mac })
    }

    /// Sends a frame to `destination`.
    ///
    /// Errors: the interface is down, gone, or its queue full.
    pub fn send(&self, destination: [u8; 6], probe: &Probe) -> io::Result<()> {
        let frame = frame::encode(destination, self.mac, probe);
        // SAFETY: the buffer is live and of the length given.
        let sent = unsafe { libc::send(self.socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Receives a frame: `None` if none came in time or it is no probe frame.
    ///
    /// Errors: the interface is down or gone.
    pub fn receive(&self) -> io::Result<Option<([u8; 6], Probe)>> {
        let mut buffer = [0u8; 256];
        // SAFETY: the buffer is live and of the length given; longer frames are cut.
        let got = unsafe { libc::recv(self.socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        match usize::try_from(got) {
            Ok(length) => Ok(frame::decode(&buffer[..length])),
            Err(_) => match io::Error::last_os_error() {
                error if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
                error => Err(error),
            },
        }
    }
}

fn set<T>(socket: &OwnedFd, level: libc::c_int, option: libc::c_int, value: &T) -> io::Result<()> {
    let length = size_of::<T>() as libc::socklen_t;
    // SAFETY: the value is live and of the length given.
    check(unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, std::ptr::from_ref(value).cast(), length) }).map(drop)
}

fn hardware_address(socket: &OwnedFd, interface: &str) -> io::Result<[u8; 6]> {
    // SAFETY: all zeros is a valid value of this plain structure.
    let mut request: libc::ifreq = unsafe { zeroed() };
    if interface.len() >= request.ifr_name.len() {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *place = byte.cast_signed();
    }
    // SAFETY: the request is live and its name ends in a zero.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFHWADDR, &raw mut request) })?;
    // SAFETY: a successful SIOCGIFHWADDR has filled in the hardware address.
    let data = unsafe { request.ifr_ifru.ifru_hwaddr.sa_data };
    let mut mac = [0; 6];
    for (place, byte) in mac.iter_mut().zip(data) {
        *place = byte.cast_unsigned();
    }
    Ok(mac)
}
