//! The nf_tables of guards, spoken with the kernel itself: it takes microseconds, and only who speaks can own a table.
//!
//! An owned table (Linux 5.12) nobody else can remove or change, `nft flush ruleset` goes around it; one that persists (6.9)
//! stays when its owner dies, and the next owner takes it over. Kernels that have not both get an ordinary table, which
//! [`Watch`] watches. Source: linux/netfilter/nf_tables.h.

use super::netlink::{Heard, Request, Socket, attribute, text};
use nix::sys::socket::SockProtocol;
use std::collections::BTreeSet;
use std::io;
use std::os::fd::BorrowedFd;

const SUBSYSTEM: u16 = 10;
const FAMILY_NETDEV: u8 = 5;
const GROUP: u32 = 7;

const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEW_TABLE: u16 = 0;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const GET_CHAIN: u16 = 4;
const NEW_RULE: u16 = 6;

/// NFT_TABLE_F_OWNER and NFT_TABLE_F_PERSIST.
const OWNED: u32 = 0x2 | 0x4;
const POLICY_DROP: u32 = 0;
const ACCEPT: u32 = 1;
const PRIORITY: i32 = -500;
const INGRESS: (&str, u32) = ("ingress", 0);
const EGRESS: (&str, u32) = ("egress", 1);
const REGISTER_1: u32 = 1;
const META_MARK: u32 = 3;

/// How a guard is kept from being removed by others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keeping {
    /// Owned where the kernel can do that, else watched.
    Owned,
    /// Watched.
    Watched,
}

/// The way to the kernel. What it makes belongs to it until it is dropped.
#[derive(Debug)]
pub struct Nft {
    socket: Socket,
    keeping: Keeping,
}

fn message(request: &mut Request, kind: u16, flags: i32) -> &mut Request {
    request.message(SUBSYSTEM << 8 | kind, flags, &[FAMILY_NETDEV, 0, 0, 0])
}

/// Several changes of which all are made or none.
fn batch(fill: impl FnOnce(&mut Request)) -> Request {
    let mut request = Request::default();
    let [high, low] = SUBSYSTEM.to_be_bytes();
    request.message(BATCH_BEGIN, 0, &[0, 0, high, low]);
    fill(&mut request);
    request.message(BATCH_END, 0, &[0, 0, high, low]);
    request
}

/// One expression of a rule.
fn expression(rule: &mut Request, name: &str, fill: impl FnOnce(&mut Request)) {
    rule.nest(1, |element| {
        element.name(1, name).nest(2, fill);
    });
}

/// A table with nothing in it but the guard's two chains, in place of what has its name now.
fn guard(table: &str, interface: &str, mark: u32, flags: u32, egress: bool) -> Request {
    batch(|batch| {
        message(batch, NEW_TABLE, libc::NLM_F_CREATE | libc::NLM_F_ACK).name(1, table);
        message(batch, DELETE_TABLE, 0).name(1, table);
        message(batch, NEW_TABLE, libc::NLM_F_CREATE).name(1, table);
        if flags != 0 {
            batch.number(2, flags);
        }
        for (chain, hook) in [INGRESS, EGRESS].into_iter().take(1 + usize::from(egress)) {
            message(batch, NEW_CHAIN, libc::NLM_F_CREATE).name(1, table).name(3, chain);
            batch.nest(4, |at| {
                at.number(1, hook).number(2, PRIORITY.cast_unsigned()).name(3, interface);
            });
            batch.number(5, POLICY_DROP).name(7, "filter");
        }
        if !egress {
            return;
        }
        message(batch, NEW_RULE, libc::NLM_F_CREATE | libc::NLM_F_APPEND).name(1, table).name(2, EGRESS.0);
        batch.nest(4, |rule| {
            expression(rule, "meta", |meta| {
                meta.number(1, REGISTER_1).number(2, META_MARK);
            });
            expression(rule, "cmp", |compare| {
                compare.number(1, REGISTER_1).number(2, 0).nest(3, |data| {
                    data.put(1, &mark.to_ne_bytes());
                });
            });
            expression(rule, "immediate", |verdict| {
                verdict.number(1, 0).nest(2, |data| {
                    data.nest(2, |verdict| {
                        verdict.number(1, ACCEPT);
                    });
                });
            });
        });
    })
}

impl Nft {
    /// Speaks of the network namespace of the calling thread.
    pub fn open(keeping: Keeping) -> io::Result<Self> {
        Ok(Self { socket: Socket::open(SockProtocol::NetlinkNetFilter)?, keeping })
    }

    /// Whose changes are ours; see [`Watch::changed`].
    pub const fn port(&self) -> u32 {
        self.socket.port()
    }

    /// Puts the guard in place, in one step, also in place of another or of what is left of one: policy *drop* on both ways,
    /// but for what the switch sends, known by its mark.
    pub fn guard(&mut self, table: &str, interface: &str, mark: u32) -> io::Result<()> {
        let kept: &[u32] = if self.keeping == Keeping::Owned { &[OWNED, 0] } else { &[0] };
        let mut last = io::Error::from_raw_os_error(libc::EOPNOTSUPP);
        for flags in kept {
            // Kernels before 5.16 have no egress hook.
            for egress in [true, false] {
                match self.socket.ask(&guard(table, interface, mark, *flags, egress)) {
                    Ok(_) => {
                        let owned = *flags != 0;
                        tracing::debug!(interface, owned, egress, "guard");
                        return Ok(());
                    }
                    Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                        let why = format!("{error}: the nft table {table} belongs to another program, or we lack CAP_NET_ADMIN");
                        return Err(io::Error::new(error.kind(), why));
                    }
                    Err(error) => last = error,
                }
            }
        }
        Err(last)
    }

    /// Removes a guard; none there is no error.
    pub fn remove(&mut self, table: &str) -> io::Result<()> {
        let request = batch(|batch| {
            message(batch, DELETE_TABLE, libc::NLM_F_ACK).name(1, table);
        });
        match self.socket.ask(&request) {
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => Err(error),
            _ => Ok(()),
        }
    }

    /// Whether what comes in is dropped.
    pub fn stands(&mut self, table: &str) -> bool {
        let mut request = Request::default();
        message(&mut request, GET_CHAIN, libc::NLM_F_ACK).name(1, table).name(3, INGRESS.0);
        let policy = |chain: &Heard| attribute(chain.body.get(4..)?, 5).map(<[u8]>::to_vec);
        match self.socket.ask(&request) {
            Ok(answers) => answers.iter().any(|chain| policy(chain).is_some_and(|policy| policy == POLICY_DROP.to_be_bytes())),
            Err(_) => false,
        }
    }
}

/// What others did to tables.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Tables of family netdev that somebody else changed or removed, or in which something was.
    pub tables: BTreeSet<String>,
    /// More happened than there was room to tell: look at all.
    pub lost: bool,
}

/// Hears of every change of nf_tables in this network namespace.
#[derive(Debug)]
pub struct Watch(Socket);

impl Watch {
    /// Begins.
    pub fn open() -> io::Result<Self> {
        let socket = Socket::open(SockProtocol::NetlinkNetFilter)?;
        socket.join(GROUP)?;
        Ok(Self(socket))
    }

    /// For poll.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd()
    }

    /// What others than the socket `ours` did since the last call.
    pub fn changed(&mut self, ours: u32) -> Changes {
        let heard = match self.0.heard() {
            Ok(heard) => heard,
            // What was not lost is read next time; all is looked at anyway.
            Err(error) => {
                tracing::debug!(%error, "watching nf_tables");
                return Changes { lost: true, ..Changes::default() };
            }
        };
        let table = |message: &Heard| {
            let netdev = message.kind >> 8 == SUBSYSTEM && message.body.first() == Some(&FAMILY_NETDEV);
            // In every kind of message the first attribute is the table's name.
            attribute(message.body.get(4..)?, 1).filter(|_| netdev).map(text)
        };
        Changes { tables: heard.iter().filter(|message| message.port != ours).filter_map(table).collect(), lost: false }
    }
}
