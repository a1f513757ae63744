//! Which interface of the underlay leads to a peer.

use super::netlink::{Request, Socket, attribute};
use crate::members::Via;
use nix::sys::socket::SockProtocol;
use std::io;
use std::net::IpAddr;

const TO: u16 = 1;
const FROM: u16 = 2;
const OUT: u16 = 4;

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// The interface the kernel would send through, in the network namespace of the calling thread. `None`: it knows no way.
pub fn towards(ours: Option<IpAddr>, theirs: IpAddr) -> io::Result<Option<Via>> {
    let mut head = [0; 12];
    head[0] = if theirs.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 } as u8;
    head[1] = if theirs.is_ipv4() { 32 } else { 128 };
    let ours = ours.filter(|ours| ours.is_ipv4() == theirs.is_ipv4() && !ours.is_unspecified());
    head[2] = if ours.is_some() { head[1] } else { 0 };
    let mut request = Request::default();
    request.message(libc::RTM_GETROUTE, 0, &head).put(TO, &octets(theirs));
    if let Some(ours) = ours {
        request.put(FROM, &octets(ours));
    }
    let answers = Socket::open(SockProtocol::NetlinkRoute)?.ask(&request)?;
    let out = answers.iter().find_map(|heard| {
        let index = attribute(heard.body.get(12..)?, OUT)?;
        Some(u32::from_ne_bytes(index.try_into().ok()?))
    });
    let Some(index) = out else { return Ok(None) };
    let name = nix::net::if_::if_indextoname(index)?;
    Ok(Some(Via { name: name.to_string_lossy().into_owned(), index }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_leads_to_itself() {
        let via = towards(None, [127, 0, 0, 1].into()).unwrap().unwrap();
        assert_eq!((via.name.as_str(), via.index), ("lo", 1));
    }
}
