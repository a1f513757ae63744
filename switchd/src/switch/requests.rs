//! What operators and monitors ask.

use super::command::Nic;
use super::{Command, Expecting, Net, PortState, Switch, Ticket, WAIT, Waiter, Wanted};
use crate::moves::{Key, Until};
use crate::tables::{Place, PortSlot};
use std::sync::Arc;
use violin_common::api::switch::{
    FdbEntry, FdbPlace, NetworkSpec, Ownership, PortKind, PortSeen, PortSpec, SwitchReply, SwitchRequest, SwitchStatus,
};
use violin_common::control::mesh::Message;
use violin_common::id::INTERFACE_NAME;
use violin_common::{HostId, Instant, MacAddr, PortId, Vni, is_interface_name};

/// The interface a port is attached to, and the network namespace where that is not the switch's.
fn interface(kind: &PortKind) -> Option<(&str, Option<&str>)> {
    match kind {
        PortKind::Packet { interface } => Some((interface, None)),
        PortKind::Tap { interface, netns } => Some((interface, netns.as_deref())),
        PortKind::Vxlan { .. } => None,
    }
}

impl Switch {
    /// A request came; [`Command::Answer`] carries its answer, now or later. Counters, traffic and the conditions of ports
    /// are the data plane's.
    pub fn handle_request(&mut self, now: Instant, ticket: Ticket, request: SwitchRequest) {
        let reply = match request {
            SwitchRequest::Status => Ok(SwitchReply::Status(self.status(now))),
            SwitchRequest::NetworkAdd(spec) => self.network_add(spec).map(|()| SwitchReply::Done),
            SwitchRequest::NetworkRemove { vni } => self.network_remove(vni).map(|()| SwitchReply::Done),
            SwitchRequest::NetworkList => {
                Ok(SwitchReply::Networks(self.networks.values().map(|network| network.spec.clone()).collect()))
            }
            SwitchRequest::PortAdd(spec) => match self.port_add(now, Some(ticket), spec, false) {
                Ok(None) => return,
                Ok(Some(id)) => Ok(SwitchReply::Port(id)),
                Err(why) => Err(why),
            },
            SwitchRequest::PortRemove { port } => {
                self.port_remove(now, port);
                Ok(SwitchReply::Done)
            }
            SwitchRequest::PortList => Ok(SwitchReply::Ports(self.port_list())),
            SwitchRequest::PeerList => Ok(SwitchReply::Peers(self.peer_list(now))),
            SwitchRequest::FdbList { vni } => Ok(SwitchReply::Fdb(self.fdb_list(now, vni))),
            SwitchRequest::FdbFlush { vni } => match self.networks.get(&vni) {
                Some(network) => {
                    network.fdb.flush();
                    Ok(SwitchReply::Done)
                }
                None => Err(no_network(vni)),
            },
            SwitchRequest::Counters => Ok(SwitchReply::Counters(Vec::new())),
            SwitchRequest::Traffic => Ok(SwitchReply::Traffic(Vec::new())),
            SwitchRequest::PortConditions => Ok(SwitchReply::PortConditions(Vec::new())),
            SwitchRequest::MoveGrant { vni, mac, to } => match self.move_grant(now, (vni, mac), &to) {
                Ok(()) => return self.wait(now, ticket, (vni, mac), Until::Granted),
                Err(why) => Err(why),
            },
            SwitchRequest::MoveStopped { vni, mac } => {
                self.dirty = true;
                self.moves.stopped(now, (vni, mac)).map(|()| SwitchReply::Done)
            }
            SwitchRequest::MoveRunning { vni, mac } => {
                self.dirty = true;
                match self.moves.running(now, (vni, mac)) {
                    Ok(()) => return self.wait(now, ticket, (vni, mac), Until::Owned),
                    Err(why) => Err(why),
                }
            }
            SwitchRequest::MoveAbort { vni, mac } => {
                self.dirty = true;
                match self.moves.abort(now, (vni, mac)) {
                    Ok(()) => return self.wait(now, ticket, (vni, mac), Until::Released),
                    Err(why) => Err(why),
                }
            }
            SwitchRequest::MoveStatus { vni, mac } => match self.moves.seen((vni, mac)) {
                Some(seen) => Ok(SwitchReply::Move(seen)),
                None => Err(format!("MAC {mac} of network {vni} is not known to be owned")),
            },
        };
        self.commands.push(Command::Answer { ticket, reply });
    }

    fn wait(&mut self, now: Instant, ticket: Ticket, key: Key, until: Until) {
        self.waiters.push(Waiter { ticket, key, until, deadline: now + WAIT });
    }

    fn move_grant(&mut self, now: Instant, key: Key, to: &HostId) -> Result<(), String> {
        if self.members.link_to(to).is_none() {
            return Err(format!("got destination {to}, which is not connected: see the list of peers"));
        }
        self.dirty = true;
        self.moves.grant(now, key, to)
    }

    fn status(&self, now: Instant) -> SwitchStatus {
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        SwitchStatus {
            host: self.nature.host.clone(),
            domain: self.nature.domain.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            listen: self.nature.listen,
            uptime_s: now.since(self.started).as_secs(),
            peers: count(self.members.connected_links().count()),
            networks: count(self.networks.len()),
            ports: count(self.ports.len()),
        }
    }

    /// Carries a network. The same again is fine; its ageing may change any time, its MTU only while it has no ports.
    pub fn network_add(&mut self, spec: NetworkSpec) -> Result<(), String> {
        if !(576..=9000).contains(&spec.mtu) {
            return Err(format!("got mtu {}, want 576 to 9000", spec.mtu));
        }
        if !(10..=3600).contains(&spec.ageing_s) {
            return Err(format!("got ageing-s {}, want 10 to 3600", spec.ageing_s));
        }
        let has_ports = self.ports.values().any(|port| port.spec.vni == spec.vni);
        match self.networks.get_mut(&spec.vni) {
            Some(known) if known.spec.mtu != spec.mtu && has_ports => {
                return Err(format!(
                    "got mtu {} for network {}, which has ports and mtu {}: remove its ports first",
                    spec.mtu, spec.vni, known.spec.mtu
                ));
            }
            Some(known) if known.spec == spec => return Ok(()),
            Some(known) => known.spec = spec.clone(),
            None => {
                self.networks.insert(spec.vni, Net { spec: spec.clone(), fdb: Arc::default() });
                self.announce_networks();
            }
        }
        self.announce_mtu(spec.vni, spec.mtu);
        self.dirty = true;
        Ok(())
    }

    fn announce_networks(&mut self) {
        let all = self.networks.keys().copied().collect();
        self.tell_all(&Message::Networks(all));
    }

    /// Stops carrying a network. One that is not carried is no error.
    ///
    /// *Errors*: it still has ports.
    pub fn network_remove(&mut self, vni: Vni) -> Result<(), String> {
        if let Some((id, _)) = self.ports.iter().find(|(_, port)| port.spec.vni == vni) {
            return Err(format!("network {vni} has port {id}: remove its ports first"));
        }
        if self.networks.remove(&vni).is_some() {
            self.moves.network_removed(vni);
            self.announce_networks();
            self.dirty = true;
        }
        Ok(())
    }

    /// Makes a port. `None`: the answer comes when it is attached. The very same port again: its number.
    pub fn port_add(
        &mut self,
        now: Instant,
        ticket: Option<Ticket>,
        spec: PortSpec,
        patient: bool,
    ) -> Result<Option<PortId>, String> {
        let network = self.networks.get(&spec.vni).ok_or_else(|| no_network(spec.vni))?;
        let mtu = network.spec.mtu;
        if let Some((id, _)) = self.ports.iter().find(|(_, port)| port.spec == spec && port.ticket.is_none()) {
            return Ok(Some(*id));
        }
        self.check_port(&spec)?;
        let free = self.slots.iter().position(Option::is_none).unwrap_or(self.slots.len());
        let slot = PortSlot(u16::try_from(free).map_err(|_| "got one more port, want at most 65536".to_owned())?);
        let id = PortId(self.next_port);
        let expecting = match &spec.owned {
            Some(owned) if owned.ownership == Ownership::Arriving => Expecting::Arrival,
            _ if patient => Expecting::Later,
            _ => Expecting::Now,
        };
        if let Some(owned) = &spec.owned {
            let key = (spec.vni, owned.mac);
            self.moves.port_added(now, key, id, owned.vm.clone(), owned.ownership, self.settled)?;
            self.flush_owned(key);
        }
        self.next_port += 1;
        if free == self.slots.len() {
            self.slots.push(Some(id));
        } else {
            self.slots[free] = Some(id);
        }
        self.flush_place(Place::Port(slot));
        self.dirty = true;
        let (interface, _) = interface(&spec.kind).unwrap_or_default();
        let nic = Nic::new(&self.nature.host, spec.vni, mtu, interface);
        self.commands.push(Command::Attach { slot, id, kind: spec.kind.clone(), nic, expecting });
        self.ports.insert(id, PortState { slot, spec, traffic: Arc::default(), ticket });
        Ok(None)
    }

    fn check_port(&self, spec: &PortSpec) -> Result<(), String> {
        if let Some(place @ (name, _)) = interface(&spec.kind) {
            if !is_interface_name(name) {
                return Err(format!("got interface {name:?}, want {INTERFACE_NAME}"));
            }
            let taken = self.ports.iter().find(|(_, port)| interface(&port.spec.kind) == Some(place));
            if let Some((id, _)) = taken {
                return Err(format!("got interface {name} for a second port, but port {id} has it: remove that first"));
            }
        }
        if let Some(owned) = &spec.owned
            && (owned.mac.is_group() || owned.mac == MacAddr([0; 6]))
        {
            return Err(format!("got owned MAC {}, want an individual address", owned.mac));
        }
        Ok(())
    }

    /// Attaching a port has ended: `Ok` too when its interface is still waited for.
    pub fn handle_attached(&mut self, now: Instant, id: PortId, result: Result<(), String>) {
        let Some(port) = self.ports.get_mut(&id) else { return };
        let ticket = port.ticket.take();
        let reply = match result {
            Ok(()) => Ok(SwitchReply::Port(id)),
            Err(why) => {
                tracing::warn!(port = %id, %why, "port refused");
                self.port_remove(now, id);
                Err(why)
            }
        };
        if let Some(ticket) = ticket {
            self.commands.push(Command::Answer { ticket, reply });
        }
    }

    /// Removes a port. One that does not exist is no error.
    pub fn port_remove(&mut self, now: Instant, id: PortId) {
        let Some(port) = self.ports.remove(&id) else { return };
        self.slots[usize::from(port.slot.0)] = None;
        if let Some(key) = port.key() {
            self.moves.port_removed(now, key);
        }
        self.forget_stations(|slot| slot == port.slot);
        self.dirty = true;
        self.commands.push(Command::Detach { slot: port.slot, id, keep: false });
        if let Some(ticket) = port.ticket {
            let reply = Err("the port was removed before it was attached".into());
            self.commands.push(Command::Answer { ticket, reply });
        }
    }

    /// The configuration file says what it wants; what cannot be done is logged and the rest is done.
    pub fn handle_config(&mut self, now: Instant, wanted: Wanted) {
        let refused = |why: String| tracing::error!(%why, "configuration not carried out in full");
        self.members.set_join(now, &wanted.join);
        for spec in wanted.remove_ports {
            // What moved or was added by request since is not the file's.
            let found = self.ports.iter().find(|(_, port)| port.spec == spec).map(|(id, _)| *id);
            if let Some(id) = found {
                self.port_remove(now, id);
            }
        }
        for vni in wanted.remove_networks {
            self.network_remove(vni).unwrap_or_else(refused);
        }
        for spec in wanted.networks {
            self.network_add(spec).unwrap_or_else(refused);
        }
        for spec in wanted.ports {
            self.port_add(now, None, spec, true).map(drop).unwrap_or_else(refused);
        }
    }

    fn port_list(&self) -> Vec<PortSeen> {
        let seen = self.ports.iter().map(|(id, port)| {
            let moved = port.key().and_then(|key| self.moves.seen(key));
            PortSeen {
                port: *id,
                spec: port.spec.clone(),
                state: moved.as_ref().map(|seen| seen.state),
                epoch: moved.as_ref().map(|seen| seen.epoch),
                traffic: port.traffic.snapshot(),
            }
        });
        seen.collect()
    }

    fn fdb_list(&self, now: Instant, only: Option<Vni>) -> Vec<FdbEntry> {
        let mut entries = Vec::new();
        for (key, view) in self.moves.views().filter(|(key, _)| only.is_none_or(|vni| vni == key.0)) {
            let place = match (view.here, view.port, view.host) {
                (true, Some(port), _) => FdbPlace::Port(port),
                (_, _, Some(host)) => FdbPlace::Host(host),
                _ => continue,
            };
            let epoch = self.moves.seen(key).map(|seen| seen.epoch);
            entries.push(FdbEntry { vni: key.0, vid: 0, mac: key.1, place, idle_s: None, epoch });
        }
        for (vni, network) in self.networks.iter().filter(|(vni, _)| only.is_none_or(|only| only == **vni)) {
            for row in network.fdb.entries() {
                let place = match row.place {
                    Place::Port(slot) => self.port_of(slot).map(FdbPlace::Port),
                    Place::Peer(slot) => self.host_of(slot).map(FdbPlace::Host),
                    Place::Nowhere => None,
                };
                let Some(place) = place else { continue };
                let idle_s = u32::try_from(now.since(row.seen).as_secs()).ok();
                entries.push(FdbEntry { vni: *vni, vid: row.vid, mac: row.mac, place, idle_s, epoch: None });
            }
        }
        entries.sort_by_key(|entry| (entry.vni, entry.mac, entry.vid));
        entries
    }
}

fn no_network(vni: Vni) -> String {
    format!("got network {vni}, which this switch does not carry: add it first")
}
