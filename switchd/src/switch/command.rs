//! What a [`Switch`](super::Switch) wants of the world, and what the configuration file wants of it.

use super::Ticket;
use crate::members::{Call, LinkId};
use crate::tables::{Forwarding, PortSlot};
use std::net::SocketAddr;
use violin_common::api::switch::{NetworkSpec, PortKind, PortSpec, SwitchReply};
use violin_common::control::mesh::Message;
use violin_common::{PortId, Vni};

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
        /// Its network's.
        mtu: u16,
        /// Whether that may come later.
        expecting: Expecting,
    },
    /// Detach a port.
    Detach {
        /// Place.
        slot: PortSlot,
        /// Number.
        id: PortId,
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
