//! Interfaces by rtnetlink: the few requests the monitor needs, in any network namespace.
//!
//! A socket belongs to the namespace it was made in, so one opened in a host's namespace acts there whatever thread uses it.
//! Source: rtnetlink(7), veth(4).

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Mutex;
use violin_common::MacAddr;

const HEADER: usize = 16;
const IFINFO: usize = 16;
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_CREATE_EXCL: u16 = 0x600;
const NLMSG_ERROR: u16 = 2;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const NESTED: u16 = 1 << 15;
const IFF_UP: u32 = 1;

/// A socket to the kernel's interfaces of one network namespace.
#[derive(Debug)]
pub struct Netlink {
    /// One request at a time: answers carry no address but the socket they come from.
    socket: Mutex<OwnedFd>,
}

/// What an interface is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Its number in the namespace.
    pub index: u32,
    /// Whether it is administratively up.
    pub up: bool,
}

/// Runs `work` on a thread of its own inside the namespace, so that no other thread changes place.
///
/// Errors: the namespace cannot be entered (needs CAP_SYS_ADMIN).
pub fn inside<T: Send>(netns: impl AsFd + Send, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        scope
            .spawn(move || {
                setns(netns, CloneFlags::CLONE_NEWNET)?;
                work()
            })
            .join()
            .map_err(|_| io::Error::other("thread in another network namespace panicked"))?
    })
}

/// Makes a network namespace that lives as long as the descriptor or a process in it.
pub fn new_netns() -> io::Result<OwnedFd> {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET)?;
                Ok(File::open("/proc/thread-self/ns/net")?.into())
            })
            .join()
            .map_err(|_| io::Error::other("thread making a network namespace panicked"))?
    })
}

impl Netlink {
    /// Opens a socket in the namespace at `netns`, for example `/proc/self/ns/net` or `/run/netns/NAME`.
    pub fn open(netns: &Path) -> io::Result<Self> {
        Self::open_in(File::open(netns)?)
    }

    /// The same for a namespace already open.
    pub fn open_in(netns: impl AsFd + Send) -> io::Result<Self> {
        let socket = inside(netns, || {
            Ok(socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?)
        })?;
        Ok(Self { socket: Mutex::new(socket) })
    }

    /// Looks an interface up; `None`: no such name here.
    pub fn link(&self, name: &str) -> io::Result<Option<Link>> {
        let mut message = Message::new(RTM_GETLINK, NLM_F_REQUEST, 0, 0, 0);
        message.text(IFLA_IFNAME, name);
        match self.ask(message) {
            Ok(reply) => Ok(parse_link(&reply)),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes a veth pair: `host` here, `guest` with its MAC in the other namespace, both with this MTU.
    pub fn create_veth(&self, host: &str, guest: &str, mac: MacAddr, mtu: u16, guest_netns: impl AsFd) -> io::Result<()> {
        let mut message = Message::new(RTM_NEWLINK, NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE_EXCL, 0, 0, 0);
        message.text(IFLA_IFNAME, host);
        message.attribute(IFLA_MTU, &u32::from(mtu).to_ne_bytes());
        let info = message.open(IFLA_LINKINFO);
        message.text(IFLA_INFO_KIND, "veth");
        let data = message.open(IFLA_INFO_DATA);
        let peer = message.open(VETH_INFO_PEER);
        message.0.extend_from_slice(&[0; IFINFO]);
        message.text(IFLA_IFNAME, guest);
        message.attribute(IFLA_ADDRESS, &mac.0);
        message.attribute(IFLA_MTU, &u32::from(mtu).to_ne_bytes());
        message.attribute(IFLA_NET_NS_FD, &guest_netns.as_fd().as_raw_fd().to_ne_bytes());
        message.close(peer);
        message.close(data);
        message.close(info);
        self.ask(message).map(drop)
    }

    /// Brings an interface up.
    pub fn set_up(&self, name: &str) -> io::Result<()> {
        let index = self.must(name)?.index;
        self.ask(Message::new(RTM_NEWLINK, NLM_F_REQUEST | NLM_F_ACK, index, IFF_UP, IFF_UP)).map(drop)
    }

    /// Moves an interface into another namespace, where it arrives down.
    pub fn move_to(&self, name: &str, netns: impl AsFd) -> io::Result<()> {
        let mut message = Message::new(RTM_NEWLINK, NLM_F_REQUEST | NLM_F_ACK, self.must(name)?.index, 0, 0);
        message.attribute(IFLA_NET_NS_FD, &netns.as_fd().as_raw_fd().to_ne_bytes());
        self.ask(message).map(drop)
    }

    /// Deletes an interface (a veth with its other end); none there is no error.
    pub fn delete(&self, name: &str) -> io::Result<()> {
        let Some(link) = self.link(name)? else { return Ok(()) };
        match self.ask(Message::new(RTM_DELLINK, NLM_F_REQUEST | NLM_F_ACK, link.index, 0, 0)) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            other => other.map(drop),
        }
    }

    fn must(&self, name: &str) -> io::Result<Link> {
        self.link(name)?.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no interface {name} in this namespace")))
    }

    /// Sends a request and returns the kernel's first message; an error message becomes an error.
    fn ask(&self, message: Message) -> io::Result<Vec<u8>> {
        let bytes = message.finish();
        let guard = self.socket.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut reply = vec![0; 32 << 10];
        send(guard.as_raw_fd(), &bytes, MsgFlags::empty())?;
        let len = recv(guard.as_raw_fd(), &mut reply, MsgFlags::empty())?;
        reply.truncate(len);
        let kind = reply.get(4..6).and_then(|b| b.try_into().ok()).map(u16::from_ne_bytes);
        if kind == Some(NLMSG_ERROR) {
            let code = reply.get(HEADER..HEADER + 4).and_then(|b| b.try_into().ok()).map_or(0, i32::from_ne_bytes);
            if code != 0 {
                return Err(io::Error::from_raw_os_error(-code));
            }
        }
        Ok(reply)
    }
}

/// A request being written.
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: u16, index: u32, if_flags: u32, change: u32) -> Self {
        let mut bytes = vec![0; HEADER + IFINFO];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        bytes[20..24].copy_from_slice(&index.to_ne_bytes());
        bytes[24..28].copy_from_slice(&if_flags.to_ne_bytes());
        bytes[28..32].copy_from_slice(&change.to_ne_bytes());
        Self(bytes)
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) {
        let start = self.open(kind);
        self.0.extend_from_slice(value);
        self.end(start, kind);
    }

    fn text(&mut self, kind: u16, value: &str) {
        let start = self.open(kind);
        self.0.extend_from_slice(value.as_bytes());
        self.0.push(0);
        self.end(start, kind);
    }

    fn open(&mut self, kind: u16) -> usize {
        let start = self.0.len();
        self.0.extend_from_slice(&[0; 2]);
        self.0.extend_from_slice(&(kind | NESTED).to_ne_bytes());
        start
    }

    fn close(&mut self, start: usize) {
        let len = u16::try_from(self.0.len() - start).unwrap_or(u16::MAX);
        self.0[start..start + 2].copy_from_slice(&len.to_ne_bytes());
    }

    fn end(&mut self, start: usize, kind: u16) {
        self.0[start + 2..start + 4].copy_from_slice(&kind.to_ne_bytes());
        self.close(start);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        let len = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        self.0[0..4].copy_from_slice(&len.to_ne_bytes());
        self.0
    }
}

fn parse_link(reply: &[u8]) -> Option<Link> {
    let word = |at: usize| reply.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_ne_bytes);
    Some(Link { index: word(20)?, up: word(24)? & IFF_UP != 0 })
}
