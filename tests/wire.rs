//! A guest's wire: a raw socket on an interface in some namespace.

use crate::netns::Netns;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socket};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

/// Sends and receives whole Ethernet frames.
#[derive(Debug)]
pub struct Wire {
    fd: OwnedFd,
}

impl Wire {
    /// Opens the interface in the namespace: all frames, not those sent by itself, promiscuous.
    pub fn open(netns: &Netns, interface: &str) -> Self {
        netns.enter(|| {
            let fd =
                socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None).expect("root may open packet sockets");
            let index = nix::net::if_::if_nametoindex(interface).expect("the interface exists");
            let raw = fd.as_raw_fd();
            let set = |level: i32, name: i32, value: &[u8]| {
                // SAFETY: value lives through the call and its length is given.
                let status = unsafe { libc::setsockopt(raw, level, name, value.as_ptr().cast(), value.len() as u32) };
                assert_eq!(status, 0, "setsockopt {name}: {}", std::io::Error::last_os_error());
            };
            set(libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, &1i32.to_ne_bytes());
            set(libc::SOL_PACKET, libc::PACKET_AUXDATA, &1i32.to_ne_bytes());
            let mut request = Vec::from((index as i32).to_ne_bytes());
            request.extend((libc::PACKET_MR_PROMISC as u16).to_ne_bytes());
            request.extend([0; 10]);
            set(libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &request);
            // SAFETY: an all-zero sockaddr_ll is valid; it is filled and passed with its size.
            let status = unsafe {
                let mut address: libc::sockaddr_ll = std::mem::zeroed();
                address.sll_family = libc::AF_PACKET as u16;
                address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
                address.sll_ifindex = index as i32;
                libc::bind(raw, (&raw const address).cast(), size_of::<libc::sockaddr_ll>() as u32)
            };
            assert_eq!(status, 0, "bind: {}", std::io::Error::last_os_error());
            Self { fd }
        })
    }

    /// Sends a frame as it is. Errors: the kernel's (a frame longer than the interface's MTU, for one).
    pub fn try_send(&self, frame: &[u8]) -> nix::Result<()> {
        send(self.fd.as_raw_fd(), frame, MsgFlags::empty()).map(|_| ())
    }

    /// Sends a frame that the interface must take.
    pub fn send(&self, frame: &[u8]) {
        self.try_send(frame).expect("the interface takes the frame");
    }

    /// The next frame that `wanted` accepts, within `limit`.
    pub fn receive(&self, limit: Duration, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        let deadline = Instant::now() + limit;
        let mut buffer = vec![0; 70_000];
        loop {
            let left = deadline.checked_duration_since(Instant::now())?;
            let mut poll = [nix::poll::PollFd::new(std::os::fd::AsFd::as_fd(&self.fd), nix::poll::PollFlags::POLLIN)];
            let timeout = nix::poll::PollTimeout::try_from(left.as_millis().min(60_000) as i32 + 1).expect("within range");
            if nix::poll::poll(&mut poll, timeout).expect("poll works") == 0 {
                continue;
            }
            if let Some(frame) = self.take(&mut buffer)
                && wanted(&frame)
            {
                return Some(frame);
            }
        }
    }

    /// The frame that waits, if one does, with the VLAN tag that the kernel took out of it (packet(7), PACKET_AUXDATA).
    fn take(&self, buffer: &mut [u8]) -> Option<Vec<u8>> {
        let mut control = [0u64; 16];
        let mut piece = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        // SAFETY: an all-zero msghdr is valid; its pointers are to values that live through the call, with their lengths.
        let (len, mut message) = unsafe {
            let mut message: libc::msghdr = std::mem::zeroed();
            message.msg_iov = &raw mut piece;
            message.msg_iovlen = 1;
            message.msg_control = control.as_mut_ptr().cast();
            message.msg_controllen = size_of_val(&control) as _;
            (libc::recvmsg(self.fd.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT), message)
        };
        let mut frame = buffer[..usize::try_from(len).ok()?].to_vec();
        // SAFETY: the kernel filled the control buffer, which these macros walk; PACKET_AUXDATA carries a tpacket_auxdata.
        let aux = unsafe {
            let first = libc::CMSG_FIRSTHDR(&raw mut message);
            (!first.is_null() && (*first).cmsg_type == libc::PACKET_AUXDATA)
                .then(|| libc::CMSG_DATA(first).cast::<libc::tpacket_auxdata>().read_unaligned())
        };
        if let Some(aux) = aux.filter(|aux| aux.tp_status & libc::TP_STATUS_VLAN_VALID != 0) {
            let known = aux.tp_status & libc::TP_STATUS_VLAN_TPID_VALID != 0;
            let tpid = if known { aux.tp_vlan_tpid } else { 0x8100 };
            frame.splice(12..12, [tpid.to_be_bytes(), aux.tp_vlan_tci.to_be_bytes()].concat());
        }
        Some(frame)
    }

    /// How many frames that `wanted` accepts come within `span`.
    pub fn count(&self, span: Duration, wanted: impl Fn(&[u8]) -> bool) -> usize {
        let deadline = Instant::now() + span;
        let mut count = 0;
        while let Some(left) = deadline.checked_duration_since(Instant::now()) {
            if self.receive(left, &wanted).is_none() {
                break;
            }
            count += 1;
        }
        count
    }

    /// Throws away what has arrived.
    pub fn drain(&self) {
        while self.receive(Duration::from_millis(0), |_| true).is_some() {}
    }
}
