//! What the host itself needs an interface for: a packet port on it would take its addresses and cut the host off.
//!
//! Asked over rtnetlink each time a port is opened; nothing is kept, because others change addresses and routes at any time.
//! What is said of an interface holds for those on top of it too: the bridge, bond or VLAN that carries the address.

use super::netlink::{Heard, Request, Socket, attribute, text};
use nix::sys::socket::SockProtocol;
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};

const LINK_NAME: u16 = 3;
const LINK_LOWER: u16 = 5;
const LINK_MASTER: u16 = 10;
const LINK_INFO: u16 = 18;
const INFO_KIND: u16 = 1;
/// Kinds of interfaces that send and receive through another one, which they name. A veth names its peer.
const ON_TOP: [&str; 6] = ["vlan", "macvlan", "macvtap", "ipvlan", "ipvtap", "macsec"];
const ADDRESS: u16 = 1;
const ADDRESS_LOCAL: u16 = 2;
const ROUTE_OUT: u16 = 4;
const ROUTE_PATHS: u16 = 9;
const ROUTE_TABLE: u16 = 15;
const MAIN: u32 = 254;

/// What an operator said about it.
#[derive(Debug, Clone, Default)]
pub struct Needs {
    /// Where the switch listens; none: at all addresses, then those that lead to members count.
    pub listen: Option<IpAddr>,
    /// Members.
    pub members: Vec<SocketAddr>,
    /// Interfaces that are to be taken all the same.
    pub take_over: BTreeSet<String>,
}

impl Needs {
    /// Addresses of this host that the mesh stands on.
    fn addresses(&self) -> Vec<IpAddr> {
        match self.listen {
            Some(listen) => vec![listen],
            None => self.members.iter().filter_map(|member| towards(*member)).collect(),
        }
    }

    /// Why the host needs an interface, in words. `others`: addresses needed besides. None that can be found out: `Ok(None)`.
    pub fn why(&self, interface: &str, others: &[IpAddr]) -> io::Result<Option<String>> {
        if self.take_over.contains(interface) {
            return Ok(None);
        }
        let mut socket = Socket::open(SockProtocol::NetlinkRoute)?;
        let links = links(&mut socket)?;
        let Some(link) = links.iter().find(|link| link.name == interface) else { return Ok(None) };
        if link.loopback {
            return Ok(Some("it is the loopback".into()));
        }
        let above = above(&links, link.index);
        let named = |index: u32| match links.iter().find(|link| link.index == index) {
            Some(link) if link.name != interface => format!("{}, on top of it,", link.name),
            _ => "it".into(),
        };
        let needed = [self.addresses(), others.to_vec()].concat();
        for (index, address) in addresses(&mut socket)? {
            if above.contains(&index) && needed.contains(&address) {
                return Ok(Some(format!("{} carries {address}, by which this switch is reached", named(index))));
            }
        }
        let default = default_routes(&mut socket)?.into_iter().find(|index| above.contains(index));
        Ok(default.map(|index| format!("{} carries the default route", named(index))))
    }
}

/// Our address towards somebody; sends nothing.
fn towards(member: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr = if member.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(member).ok()?;
    socket.local_addr().ok().map(|address| address.ip()).filter(|address| !address.is_loopback())
}

#[derive(Debug)]
struct Link {
    index: u32,
    name: String,
    loopback: bool,
    master: Option<u32>,
    lower: Option<u32>,
}

fn dump(socket: &mut Socket, kind: u16, head: &[u8]) -> io::Result<Vec<Heard>> {
    let mut request = Request::default();
    request.message(kind, libc::NLM_F_DUMP, head);
    socket.ask(&request)
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn links(socket: &mut Socket) -> io::Result<Vec<Link>> {
    let link = |heard: Heard| {
        let (head, rest) = heard.body.split_at_checked(16)?;
        let kind = attribute(rest, LINK_INFO).and_then(|info| attribute(info, INFO_KIND)).map(text);
        let on_top = kind.is_some_and(|kind| ON_TOP.contains(&kind.as_str()));
        Some(Link {
            index: number(head, 4)?,
            name: text(attribute(rest, LINK_NAME)?),
            loopback: number(head, 8)? & libc::IFF_LOOPBACK as u32 != 0,
            master: attribute(rest, LINK_MASTER).and_then(|master| number(master, 0)),
            lower: attribute(rest, LINK_LOWER).filter(|_| on_top).and_then(|lower| number(lower, 0)),
        })
    };
    Ok(dump(socket, libc::RTM_GETLINK, &[0; 16])?.into_iter().filter_map(link).collect())
}

/// An interface and all on top of it.
fn above(links: &[Link], index: u32) -> BTreeSet<u32> {
    let by_index: HashMap<u32, &Link> = links.iter().map(|link| (link.index, link)).collect();
    let mut all = BTreeSet::from([index]);
    let mut new = vec![index];
    while let Some(index) = new.pop() {
        let master = by_index.get(&index).and_then(|link| link.master);
        let tops = links.iter().filter(|link| link.lower == Some(index)).map(|link| link.index);
        new.extend(master.into_iter().chain(tops).filter(|index| all.insert(*index)).collect::<Vec<_>>());
    }
    all
}

fn addresses(socket: &mut Socket) -> io::Result<Vec<(u32, IpAddr)>> {
    let address = |heard: Heard| {
        let (head, rest) = heard.body.split_at_checked(8)?;
        let bytes = attribute(rest, ADDRESS_LOCAL).or_else(|| attribute(rest, ADDRESS))?;
        let address = match bytes.len() {
            4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
            _ => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        };
        Some((number(head, 4)?, address?))
    };
    Ok(dump(socket, libc::RTM_GETADDR, &[0; 8])?.into_iter().filter_map(address).collect())
}

/// Interfaces that default routes of the main table leave through.
fn default_routes(socket: &mut Socket) -> io::Result<Vec<u32>> {
    let mut out = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let mut head = [0; 12];
        head[0] = family as u8;
        for heard in dump(socket, libc::RTM_GETROUTE, &head)? {
            let Some((head, rest)) = heard.body.split_at_checked(12) else { continue };
            let table = attribute(rest, ROUTE_TABLE).and_then(|table| number(table, 0)).unwrap_or_else(|| head[4].into());
            if head[1] != 0 || table != MAIN || head[7] != libc::RTN_UNICAST {
                continue;
            }
            out.extend(attribute(rest, ROUTE_OUT).and_then(|index| number(index, 0)));
            // Each path: length, flags, hops, interface, attributes of its own.
            let mut paths = attribute(rest, ROUTE_PATHS).unwrap_or_default();
            while let Some(index) = number(paths, 4) {
                out.push(index);
                let len = usize::from(u16::from_ne_bytes([paths[0], paths[1]])).next_multiple_of(4).max(8);
                paths = paths.get(len..).unwrap_or_default();
            }
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_on_top_of_an_interface_is_found_through_several_layers() {
        let link = |index, master, lower| Link { index, name: format!("i{index}"), loopback: false, master, lower };
        // 1 is a leg of bond 2; VLAN 3 runs over that and is a leg of bridge 4; 5 and 6 are beside.
        let links = [
            link(1, Some(2), None),
            link(2, None, None),
            link(3, Some(4), Some(2)),
            link(4, None, None),
            link(5, Some(4), None),
            link(6, None, None),
        ];

        assert_eq!(above(&links, 1), BTreeSet::from([1, 2, 3, 4]));
        assert_eq!(above(&links, 6), BTreeSet::from([6]));
    }
}
