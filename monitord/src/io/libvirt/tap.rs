//! The TAP interface a guest is attached to: made before QEMU opens it, kept when QEMU ends, removed by us.
//!
//! QEMU holds the descriptor; the switch attaches to the interface. Works in the calling thread's network namespace.
#![allow(unsafe_code)]

use crate::io::netlink::Netlink;
use sha2::{Digest, Sha256};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::{fs, io};
use violin_channel::kernel;
use violin_common::VmId;

/// Longest interface name, in bytes (`IFNAMSIZ` less the NUL).
const NAME_MAX: usize = 15;

/// A VM's interface name: the same on every host and for ever. A name that does not fit is cut and told apart by a digest.
pub(super) fn name(vm: &VmId) -> String {
    let whole = format!("vt-{vm}");
    if whole.len() <= NAME_MAX {
        return whole;
    }
    let digest = Sha256::digest(vm.as_str());
    format!("vh-{}-{:02x}{:02x}{:02x}", &vm.as_str()[..5], digest[0], digest[1], digest[2])
}

/// Makes the TAP (again is no error), with IPv6 off so that the host says nothing to the guest, and brings it up.
///
/// Units: `mtu` in bytes. One that is there keeps its own: the switch may serve it already, and has it take larger frames.
pub(super) fn make(name: &str, mtu: u16) -> io::Result<()> {
    if !exists(name) {
        create(name)?;
        set_mtu(name, mtu)?;
    }
    match kernel::set(&format!("net/ipv6/conf/{name}/disable_ipv6"), "1") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    netlink()?.set_up(name)
}

/// Removes it, whoever still holds its descriptor. None there is no error.
pub(super) fn remove(name: &str) -> io::Result<()> {
    netlink()?.delete(name)
}

/// Whether there is an interface of this name.
pub(super) fn exists(name: &str) -> bool {
    nix::net::if_::if_nametoindex(name).is_ok()
}

fn netlink() -> io::Result<Netlink> {
    Netlink::open(Path::new("/proc/thread-self/ns/net"))
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: all-zero is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(NAME_MAX)) {
        *to = from.cast_signed();
    }
    request
}

/// `IFF_VNET_HDR` so that QEMU may pass segments whole; one queue, as QEMU's device has one. Source: tun(4) of Linux.
fn create(name: &str) -> io::Result<()> {
    let device = fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let mut request = request(name);
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, TUNSETPERSIST takes a number; the descriptor is open.
    let done = unsafe {
        libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) >= 0
            && libc::ioctl(device.as_raw_fd(), libc::TUNSETPERSIST as _, 1) >= 0
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn set_mtu(name: &str, mtu: u16) -> io::Result<()> {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").or_else(|_| std::net::UdpSocket::bind("0.0.0.0:0"))?;
    let mut request = request(name);
    request.ifr_ifru.ifru_mtu = mtu.into();
    // SAFETY: SIOCSIFMTU reads one `ifreq`; the descriptor is an open socket of this namespace.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFMTU as _, &raw mut request) >= 0 };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_and_differ() {
        let long = |last: char| format!("abcdefghijklmnop-compute-{last}").parse::<VmId>().unwrap();

        assert_eq!(name(&"alpha-c1".parse().unwrap()), "vt-alpha-c1");
        assert_eq!(name(&long('1')).len(), NAME_MAX);
        assert_ne!(name(&long('1')), name(&long('2')));
    }

    proptest::proptest! {
        #[test]
        fn every_vm_has_an_interface_name(vm in "[a-z][a-z0-9-]{0,32}") {
            proptest::prop_assert!(violin_common::is_interface_name(&name(&vm.parse().unwrap())));
        }
    }
}
