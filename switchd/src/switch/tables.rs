//! From what the switch knows to what workers need.

use super::Switch;
use crate::tables::{Forwarding, Gate, Network, Owned, Peer, PeerSlot, Place, Port, PortSlot, SourceRule};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use violin_common::api::switch::PortKind;
use violin_common::{HostId, Vni};

impl Switch {
    /// The tables as they are to be now.
    pub fn forwarding(&self) -> Forwarding {
        let mut tables = Forwarding::default();
        for (vni, network) in &self.networks {
            let carried = Network {
                mtu: network.spec.mtu,
                ageing: Duration::from_secs(network.spec.ageing_s.into()),
                ports: Vec::new(),
                peers: Vec::new(),
                owned: HashMap::new(),
                fdb: Arc::clone(&network.fdb),
            };
            tables.networks.insert(*vni, carried);
        }
        self.fill_ports(&mut tables);
        self.fill_peers(&mut tables);
        self.fill_owned(&mut tables);
        fill_floods(&mut tables);
        tables
    }

    fn fill_ports(&self, tables: &mut Forwarding) {
        tables.ports.resize_with(self.slots.len(), || None);
        for (id, port) in &self.ports {
            let source = port.spec.owned.as_ref().map_or(SourceRule::Learn, |owned| SourceRule::Only(owned.mac));
            tables.ports[usize::from(port.slot.0)] = Some(Port {
                id: *id,
                vni: port.spec.vni,
                // A port for an owned MAC is closed until the moves say otherwise.
                gate: if port.spec.owned.is_some() { Gate::Closed } else { Gate::Open },
                source,
                gateway: matches!(port.spec.kind, PortKind::Vxlan { .. }),
                traffic: Arc::clone(&port.traffic),
            });
        }
    }

    fn fill_peers(&self, tables: &mut Forwarding) {
        for (host, member, _, link) in self.members.connected_links() {
            let (Some(slot), Some(hello), Some(session)) = (member.slot, link.hello.as_ref(), member.sessions.sending()) else {
                continue;
            };
            let place = usize::from(slot.0);
            if tables.peers.len() <= place {
                tables.peers.resize_with(place + 1, || None);
            }
            tables.by_receiver.extend(member.sessions.all().map(|session| (session.index, (slot, Arc::clone(session)))));
            for vni in &link.networks {
                if let Some(network) = tables.networks.get_mut(vni) {
                    network.peers.push(slot);
                }
            }
            tables.peers[place] = Some(Peer {
                host: host.clone(),
                address: member.address,
                ours: link.ours,
                session: Arc::clone(session),
                max_datagram: hello.max_datagram.min(self.nature.max_datagram),
                networks: link.networks.iter().copied().collect(),
                traffic: Arc::clone(&member.traffic),
            });
        }
    }

    fn fill_owned(&self, tables: &mut Forwarding) {
        for ((vni, mac), view) in self.moves.views() {
            let port = view.port.and_then(|id| self.ports.get(&id)).map(|port| port.slot);
            if let Some(entry) = port.and_then(|slot| tables.ports.get_mut(usize::from(slot.0))).and_then(Option::as_mut) {
                entry.gate = match view.open {
                    Some(true) => Gate::Open,
                    Some(false) => Gate::Closed,
                    None => Gate::Hold,
                };
            }
            let peer = view.host.as_ref().and_then(|host| self.carrying(tables, host, vni)).map(Place::Peer);
            let at = match port.filter(|_| view.here) {
                Some(slot) => Place::Port(slot),
                None => peer.unwrap_or(Place::Nowhere),
            };
            if at == Place::Nowhere && view.host.is_none() && !view.arriving {
                // A port that waits for a move of a MAC nobody owns yet: as if it were unknown.
                continue;
            }
            let owned = Owned { at, arriving: port.filter(|_| view.arriving), forward_late: view.forward_late };
            if let Some(network) = tables.networks.get_mut(&vni) {
                network.owned.insert(mac, owned);
            }
        }
    }

    fn carrying(&self, tables: &Forwarding, host: &HostId, vni: Vni) -> Option<PeerSlot> {
        let slot = self.members.slot(host)?;
        let peer = tables.peers.get(usize::from(slot.0))?.as_ref()?;
        peer.networks.contains(&vni).then_some(slot)
    }
}

/// Where floods go: to every port whose guest is here or arriving. Behind a closed gate nobody reads; a copy there would
/// only pass for a frame that the guest got.
fn fill_floods(tables: &mut Forwarding) {
    for (slot, port) in (0u16..).zip(&tables.ports) {
        if let Some(port) = port.as_ref().filter(|port| port.gate != Gate::Closed)
            && let Some(network) = tables.networks.get_mut(&port.vni)
        {
            network.ports.push(PortSlot(slot));
        }
    }
}
