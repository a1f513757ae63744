//! Netlink as far as the switch needs it: messages and attributes written and read, one request and its answers.
//!
//! Never waits: the kernel carries a request out while it is sent, so its answers are there afterwards, and a dump goes on with
//! each read. Read `nft.rs` (guards) and `needs.rs` (what the host itself needs) next.

use super::sys;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, getsockname, recv, send, socket,
};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Length of a message's header.
const HEADER: usize = 16;
/// Length of an attribute's header.
const ATTRIBUTE: usize = 4;
/// Marks an attribute that holds others.
const NESTED: u16 = 0x8000;
/// Longest piece of a dump the kernel sends is half of this.
const PIECE: usize = 1 << 16;

/// Messages to the kernel, one after the other.
#[derive(Debug, Default)]
pub struct Request {
    bytes: Vec<u8>,
    /// Where the message being written began.
    begun: usize,
}

const fn padded(len: usize) -> usize {
    len.next_multiple_of(4)
}

impl Request {
    /// Begins another message; `head` is what its kind puts before the attributes.
    pub fn message(&mut self, kind: u16, flags: i32, head: &[u8]) -> &mut Self {
        self.begun = self.bytes.len();
        let flags = (flags | libc::NLM_F_REQUEST) as u16;
        self.bytes.extend([0; 4]);
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(flags.to_ne_bytes());
        self.bytes.extend([0; 8]);
        self.bytes.extend(head);
        self.close()
    }

    /// An attribute.
    pub fn put(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let len = u16::try_from(ATTRIBUTE + value.len()).expect("attributes written here are short");
        self.bytes.extend(len.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(value);
        self.close()
    }

    /// A name, as C has them.
    pub fn name(&mut self, kind: u16, name: &str) -> &mut Self {
        self.put(kind, &[name.as_bytes(), &[0]].concat())
    }

    /// A number, as nf_tables has them.
    pub fn number(&mut self, kind: u16, number: u32) -> &mut Self {
        self.put(kind, &number.to_be_bytes())
    }

    /// An attribute that holds others.
    pub fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        let start = self.bytes.len();
        self.put(kind | NESTED, &[]);
        fill(self);
        let len = u16::try_from(self.bytes.len() - start).expect("attributes written here are short");
        self.bytes[start..start + 2].copy_from_slice(&len.to_ne_bytes());
        self
    }

    /// Pads what was written and counts it into its message.
    fn close(&mut self) -> &mut Self {
        self.bytes.resize(padded(self.bytes.len()), 0);
        let len = u32::try_from(self.bytes.len() - self.begun).expect("messages written here are short");
        self.bytes[self.begun..self.begun + 4].copy_from_slice(&len.to_ne_bytes());
        self
    }
}

/// One message of the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heard {
    /// What it is.
    pub kind: u16,
    /// Whose request caused it: the port of a socket, 0 for the kernel itself.
    pub port: u32,
    /// What follows its header.
    pub body: Vec<u8>,
}

/// The attributes in `bytes`, without the mark of those that hold others.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?);
        let value = bytes.get(ATTRIBUTE..len)?;
        bytes = bytes.get(padded(len)..).unwrap_or_default();
        Some((kind & 0x3fff, value))
    })
}

/// One attribute, if it is there.
pub fn attribute(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

/// A name, as C has them.
pub fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}

fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Heard> {
    std::iter::from_fn(move || {
        let len = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
        let port = u32::from_ne_bytes(bytes.get(12..16)?.try_into().ok()?);
        let body = bytes.get(HEADER..len)?.to_vec();
        bytes = bytes.get(padded(len)..).unwrap_or_default();
        Some(Heard { kind, port, body })
    })
}

/// A netlink socket in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    port: u32,
    room: Vec<u8>,
}

impl Socket {
    /// Opens one that speaks `protocol`.
    pub fn open(protocol: SockProtocol) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        let port = getsockname::<NetlinkAddr>(fd.as_raw_fd())?.pid();
        Ok(Self { fd, port, room: vec![0; PIECE] })
    }

    /// By what the kernel knows it.
    pub const fn port(&self) -> u32 {
        self.port
    }

    /// For poll.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Hears what a group is told from now on.
    pub fn join(&self, group: u32) -> io::Result<()> {
        sys::set_option(self.fd.as_fd(), libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, group)
    }

    /// All that is there now; *Errors*: ENOBUFS when something was lost.
    pub fn heard(&mut self) -> io::Result<Vec<Heard>> {
        let mut all = Vec::new();
        loop {
            match recv(self.fd.as_raw_fd(), &mut self.room, MsgFlags::MSG_DONTWAIT) {
                Ok(len) => all.extend(messages(&self.room[..len])),
                Err(nix::Error::EAGAIN) => return Ok(all),
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Sends a request; what the kernel answers, but for errors and the ends of dumps. *Errors*: the first it tells of.
    pub fn ask(&mut self, request: &Request) -> io::Result<Vec<Heard>> {
        send(self.fd.as_raw_fd(), &request.bytes, MsgFlags::empty())?;
        let mut answers = self.heard()?;
        for answer in answers.iter().filter(|answer| i32::from(answer.kind) == libc::NLMSG_ERROR) {
            let code = answer.body.get(..4).and_then(|code| code.try_into().ok()).map_or(libc::EPROTO, i32::from_ne_bytes);
            if code != 0 {
                return Err(io::Error::from_raw_os_error(code.saturating_neg()));
            }
        }
        if answers.is_empty() {
            return Err(io::Error::other("the kernel gave no answer"));
        }
        answers.retain(|answer| i32::from(answer.kind) > libc::NLMSG_DONE);
        Ok(answers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let mut request = Request::default();
        request.message(7, 0, &[1, 2, 3, 4]).name(1, "abc").nest(2, |inner| {
            inner.number(3, 9);
        });

        let all: Vec<_> = messages(&request.bytes).collect();

        assert_eq!((all.len(), all[0].kind), (1, 7));
        assert_eq!(attribute(&all[0].body[4..], 1).map(text).as_deref(), Some("abc"));
        assert_eq!(attribute(attribute(&all[0].body[4..], 2).unwrap(), 3), Some(&[0, 0, 0, 9][..]));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..100)) {
            for message in messages(&bytes) {
                for (_, value) in attributes(&message.body) {
                    let _ = text(value);
                }
            }
        }
    }
}
