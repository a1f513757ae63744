//! Interfaces: index, flags, MTU, addresses, alias, in the network namespace of the calling thread.
#![allow(unsafe_code)]

use super::netlink::{Request, Socket, attribute, text};
use crate::io::sys::interface_request;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, OwnedFd};
use violin_common::MacAddr;

const ETHTOOL_GDRVINFO: u32 = 3;
const LINK_ALIAS: u16 = 20;

fn any_socket() -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?)
}

/// Its number; `None`: no such interface in this namespace.
pub fn index(name: &str) -> Option<u32> {
    nix::net::if_::if_nametoindex(name).ok()
}

/// Sets its MTU.
pub fn set_mtu(name: &str, mtu: u32) -> io::Result<()> {
    let fill = |request: &mut libc::ifreq| request.ifr_ifru.ifru_mtu = mtu as i32;
    interface_request(any_socket()?.as_fd(), libc::SIOCSIFMTU as _, name, fill).map(|_| ())
}

/// Sets it up.
pub fn set_up(name: &str) -> io::Result<()> {
    let socket = any_socket()?;
    let got = interface_request(socket.as_fd(), libc::SIOCGIFFLAGS as _, name, |_| ())?;
    // SAFETY: SIOCGIFFLAGS answers with flags.
    let flags = unsafe { got.ifr_ifru.ifru_flags };
    let wanted = flags | libc::IFF_UP as libc::c_short;
    if wanted == flags {
        return Ok(());
    }
    interface_request(socket.as_fd(), libc::SIOCSIFFLAGS as _, name, |request| request.ifr_ifru.ifru_flags = wanted).map(|_| ())
}

/// Sets it down.
pub fn set_down(name: &str) -> io::Result<()> {
    let socket = any_socket()?;
    let got = interface_request(socket.as_fd(), libc::SIOCGIFFLAGS as _, name, |_| ())?;
    // SAFETY: SIOCGIFFLAGS answers with flags.
    let flags = unsafe { got.ifr_ifru.ifru_flags } & !(libc::IFF_UP as libc::c_short);
    interface_request(socket.as_fd(), libc::SIOCSIFFLAGS as _, name, |request| request.ifr_ifru.ifru_flags = flags).map(|_| ())
}

/// Removes all its IPv4 addresses.
pub fn flush_addresses(name: &str) -> io::Result<()> {
    let socket = any_socket()?;
    // An interface has as many addresses as somebody gave it; setting 0.0.0.0 removes the first.
    for _ in 0..1024 {
        match interface_request(socket.as_fd(), libc::SIOCGIFADDR as _, name, |_| ()) {
            Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => return Ok(()),
            Err(error) => return Err(error),
            Ok(_) => interface_request(socket.as_fd(), libc::SIOCSIFADDR as _, name, |request| {
                request.ifr_ifru.ifru_addr.sa_family = libc::AF_INET as u16;
            })?,
        };
    }
    Err(io::Error::other("addresses keep coming back: somebody else configures this interface"))
}

/// Name of its driver, such as `veth` or `tun`; empty when it has none.
pub fn driver(name: &str) -> io::Result<String> {
    #[repr(C)]
    struct DriverInfo {
        command: u32,
        driver: [u8; 32],
        rest: [u8; 196 - 36],
    }
    const _: () = assert!(size_of::<DriverInfo>() == 196);
    let mut info = DriverInfo { command: ETHTOOL_GDRVINFO, driver: [0; 32], rest: [0; 160] };
    let data = (&raw mut info).cast();
    let asked =
        interface_request(any_socket()?.as_fd(), libc::SIOCETHTOOL as _, name, |request| request.ifr_ifru.ifru_data = data);
    match asked {
        Ok(_) => {
            let len = info.driver.iter().position(|&byte| byte == 0).unwrap_or(info.driver.len());
            Ok(String::from_utf8_lossy(&info.driver[..len]).into_owned())
        }
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(String::new()),
        Err(error) => Err(error),
    }
}

/// Gives it another MAC.
pub fn set_mac(name: &str, mac: MacAddr) -> io::Result<()> {
    let fill = |request: &mut libc::ifreq| {
        let mut address = libc::sockaddr { sa_family: libc::ARPHRD_ETHER, sa_data: [0; 14] };
        for (place, byte) in address.sa_data.iter_mut().zip(mac.0) {
            *place = byte as libc::c_char;
        }
        request.ifr_ifru.ifru_hwaddr = address;
    };
    interface_request(any_socket()?.as_fd(), libc::SIOCSIFHWADDR as _, name, fill).map(|_| ())
}

/// `ifinfomsg`: family, padding, type, index, flags, change.
fn link_head(name: &str) -> io::Result<[u8; 16]> {
    let index = index(name).ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))?;
    let mut head = [0; 16];
    head[4..8].copy_from_slice(&index.to_ne_bytes());
    Ok(head)
}

/// What it is called besides its name; empty: nothing.
pub fn alias(name: &str) -> io::Result<String> {
    let mut request = Request::default();
    request.message(libc::RTM_GETLINK, 0, &link_head(name)?);
    let heard = Socket::open(SockProtocol::NetlinkRoute)?.ask(&request)?;
    let alias = heard.iter().find_map(|link| attribute(link.body.get(16..)?, LINK_ALIAS).map(text));
    Ok(alias.unwrap_or_default())
}

/// Gives it another name besides its own.
pub fn set_alias(name: &str, alias: &str) -> io::Result<()> {
    let mut request = Request::default();
    request.message(libc::RTM_SETLINK, libc::NLM_F_ACK, &link_head(name)?).name(LINK_ALIAS, alias);
    Socket::open(SockProtocol::NetlinkRoute)?.ask(&request).map(|_| ())
}
