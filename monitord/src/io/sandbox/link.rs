//! A guest's veth: its host end is the switch's port, its guest end `eth0`.

use super::Inner;
use super::store::{Guest, Marker, fnv};
use crate::io::netlink::{Netlink, inside, new_netns};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;
use violin_channel::kernel;
use violin_common::VmId;
use violin_common::control::monitor::VmSpec;

/// Segmentation offloads that a packet socket mislabels; off on the guest's end, the guest's kernel does the work itself.
const OFFLOADS: [&str; 11] = [
    "tx-gre-segmentation",
    "tx-gre-csum-segmentation",
    "tx-ipxip4-segmentation",
    "tx-ipxip6-segmentation",
    "tx-udp_tnl-segmentation",
    "tx-udp_tnl-csum-segmentation",
    "tx-gso-partial",
    "tx-gso-list",
    "tx-sctp-segmentation",
    "tx-esp-segmentation",
    "tx-fcoe-segmentation",
];

/// Name of the host's end: readable where 15 bytes allow, the same on every host of a deployment.
pub(super) fn name(vm: &VmId) -> String {
    let name = vm.as_str();
    if name.len() <= 12 { format!("vg-{name}") } else { format!("vg-{}-{:06x}", &name[..5], fnv(name.as_bytes()) & 0xff_ffff) }
}

/// Runs a program in a network namespace and wants it to succeed.
fn run_in(netns: impl AsFd + Send, program: &str, arguments: &[&str]) -> io::Result<()> {
    let output = inside(netns, || Command::new(program).args(arguments).output())?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("{program} {}: {}", arguments.join(" "), said.trim())))
}

impl Inner {
    /// Makes the pair, its guest end in a namespace of its own.
    pub(super) fn make_link(&self, spec: &VmSpec) -> io::Result<OwnedFd> {
        let netns = new_netns()?;
        self.connect(spec, &netns)?;
        Ok(netns)
    }

    fn connect(&self, spec: &VmSpec, guest: &OwnedFd) -> io::Result<()> {
        let name = name(&spec.vm);
        self.netlink.delete(&name)?;
        self.netlink.create_veth(&name, "eth0", spec.mac, spec.network.mtu, guest)?;
        self.quieten(&name);
        self.netlink.set_up(&name)?;
        let mut arguments = vec!["-K", "eth0"];
        arguments.extend(OFFLOADS.iter().flat_map(|feature| [*feature, "off"]));
        if let Err(error) = run_in(guest.as_fd(), "ethtool", &arguments) {
            tracing::warn!(vm = %spec.vm, %error, "segmentation offloads stay on; the switch refuses such frames by name");
        }
        Ok(())
    }

    /// Keeps the host's own IPv6 off its end, from before it is up.
    fn quieten(&self, name: &str) {
        match inside(&self.netns, || kernel::set(&format!("net/ipv6/conf/{name}/disable_ipv6"), "1")) {
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(interface = name, "the host's own IPv6 speaks to the guest: {error}"),
            Ok(()) => {}
        }
    }

    /// Makes sure that the guest's link ends in this host's namespace and is up, wherever a killed move left it.
    pub(super) fn bring_link(&self, guest: &Guest, marker: &Marker) -> io::Result<()> {
        let name = &guest.interface;
        if self.netlink.link(name)?.is_none() {
            let others = [Some(&marker.from), marker.to.as_ref()];
            for end in others.into_iter().flatten().filter(|end| end.host != self.config.host) {
                let fetched = Netlink::open(&end.netns).and_then(|there| there.move_to(name, &self.netns));
                if fetched.is_ok() {
                    break;
                }
            }
        }
        if self.netlink.link(name)?.is_none() {
            tracing::warn!(vm = %guest.spec.vm, "its link is nowhere to be found and made anew");
            let netns = OwnedFd::from(File::open(format!("/proc/{}/ns/net", guest.init))?);
            Netlink::open_in(netns.try_clone()?)?.delete("eth0")?;
            self.connect(&guest.spec, &netns)?;
            let address = format!("{}/{}", guest.spec.address, guest.spec.prefix_len);
            run_in(netns.as_fd(), "ip", &["address", "replace", &address, "dev", "eth0"])?;
            run_in(netns.as_fd(), "ip", &["link", "set", "eth0", "up"])?;
        }
        self.quieten(name);
        self.netlink.set_up(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_names_fit_the_kernel_and_differ() {
        let names: Vec<_> =
            ["alpha-c1", "environment-with-c1", "environment-with-c2"].iter().map(|vm| name(&vm.parse().unwrap())).collect();

        assert_eq!(names[0], "vg-alpha-c1");
        assert!(names.iter().all(|name| name.len() <= 15), "{names:?}");
        assert_ne!(names[1], names[2]);
    }

    proptest::proptest! {
        #[test]
        fn every_vm_has_an_interface_name(vm in "[a-z][a-z0-9-]{0,32}") {
            proptest::prop_assert!(violin_common::is_interface_name(&name(&vm.parse().unwrap())));
        }
    }
}
