//! What a [`Switch`](super::Switch) wants of the world, and what the configuration file wants of it.

use super::Ticket;
use crate::members::{Call, Context, LinkId};
use crate::tables::{Forwarding, PortSlot};
use sha2::{Digest, Sha256};
use std::net::SocketAddr;
use violin_common::api::switch::{NetworkSpec, PortKind, PortSpec, SwitchReply};
use violin_common::control::mesh::Message;
use violin_common::{HostId, MacAddr, PortId, Vni};

/// Whether what a port is attached to may come later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expecting {
    /// It must be there: who asks is told.
    Now,
    /// Whatever is missing is waited for, always.
    Later,
    /// Likewise, and the guest behind it is on its way: what it sends meanwhile waits.
    Arrival,
}

/// What an interface is like that a port is attached to, where that is the switch's to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nic {
    /// Its network.
    pub vni: Vni,
    /// That network's MTU.
    pub mtu: u16,
    /// Its own address.
    pub mac: MacAddr,
}

impl Nic {
    /// The interface of that name of that host: its address is the same at each start, and no other's.
    pub fn new(host: &HostId, vni: Vni, mtu: u16, interface: &str) -> Self {
        let digest = Sha256::digest(format!("violin {host} {vni} {interface}"));
        let mut mac = [0; 6];
        mac.copy_from_slice(&digest[..6]);
        // Locally administered, of one station (IEEE 802-2014 8.4).
        mac[0] = mac[0] & 0xfc | 2;
        Self { vni, mtu, mac: MacAddr(mac) }
    }
}

/// What the world has to do, in this order.
#[derive(Debug)]
pub enum Command {
    /// Publish new tables.
    Publish(Box<Forwarding>),
    /// Attach a port; answered by [`super::Switch::handle_attached`].
    Attach {
        /// Place.
        slot: PortSlot,
        /// Number.
        id: PortId,
        /// To what.
        kind: PortKind,
        /// What an interface made for it is like.
        nic: Nic,
        /// Whether that may come later.
        expecting: Expecting,
    },
    /// Detach a port.
    Detach {
        /// Place.
        slot: PortSlot,
        /// Number.
        id: PortId,
        /// Whether what was made for it stays, for the next switch to take up.
        keep: bool,
    },
    /// Call somebody; answered by [`super::Switch::handle_called`], and [`super::Switch::handle_connected`] on success.
    Call(Call),
    /// Send on a connection.
    Send {
        /// Which.
        link: LinkId,
        /// What.
        message: Message,
    },
    /// Close a connection.
    Close {
        /// Which.
        link: LinkId,
        /// Why, told to the peer.
        why: String,
        /// Whether the peer is refused: it has to be changed, calling again is of no use.
        refused: bool,
    },
    /// Look whether the peer at the end of a connection still answers; if so, [`super::Switch::handle_answers`].
    Watch {
        /// Which.
        link: LinkId,
    },
    /// Ask a connection's handshake for the secret of its data; answered by [`super::Switch::handle_secret`].
    Export {
        /// Which.
        link: LinkId,
        /// What it is bound to.
        context: Context,
    },
    /// Draw a token, send it in a session, and say so by [`super::Switch::handle_challenged`].
    Challenge {
        /// The session's index.
        session: u32,
        /// Where to.
        to: SocketAddr,
    },
    /// Answer a request.
    Answer {
        /// Which.
        ticket: Ticket,
        /// With what.
        reply: Result<SwitchReply, String>,
    },
}

/// The difference between a configuration file and what was made from the one before.
#[derive(Debug, Default)]
pub struct Wanted {
    /// Ports to remove.
    pub remove_ports: Vec<PortSpec>,
    /// Networks to remove.
    pub remove_networks: Vec<Vni>,
    /// Networks to carry.
    pub networks: Vec<NetworkSpec>,
    /// Ports to make; an interface that is not there is waited for.
    pub ports: Vec<PortSpec>,
    /// Addresses of known members.
    pub join: Vec<SocketAddr>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_of_an_interface_is_its_own_and_stays() {
        let nic = |host: &str, vni, interface| Nic::new(&host.parse().unwrap(), Vni::new(vni).unwrap(), 1400, interface).mac;

        // Frozen: a change would give every TAP of every host another address at its next start.
        assert_eq!(nic("h1", 5, "t5").to_string(), "6e:d1:05:4f:d3:1d");
        let all = [nic("h1", 5, "t5"), nic("h2", 5, "t5"), nic("h1", 6, "t5"), nic("h1", 5, "t6")];
        assert_eq!(all.iter().collect::<std::collections::BTreeSet<_>>().len(), 4);
        assert!(all.iter().all(|mac| mac.0[0] & 3 == 2), "{all:?}");
    }
}
