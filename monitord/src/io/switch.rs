//! Asks this host's switch over its local socket.
//!
//! Calls block; each opens its own connection, so a restarted switch is simply found again.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;
use violin_common::api::Response;
use violin_common::api::switch::{MoveSeen, PortKind, PortSeen, PortSpec, SwitchReply, SwitchRequest, TrafficSeen};
use violin_common::{MacAddr, PortId, VmId, Vni};

/// How long an answer may take; a grant waits for another host's switch.
const LIMIT: Duration = Duration::from_secs(15);
/// Longest answer, in bytes: the FDB of a large network.
const ANSWER_LIMIT: u64 = 64 << 20;

/// The switch did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum SwitchError {
    /// It cannot be reached; it may be restarting.
    #[error("switch at {socket} unreachable ({error}); is switchd running?")]
    Unreachable {
        /// Its socket.
        socket: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// It said no, in its own words.
    #[error("switch refused: {0}")]
    Refused(String),
    /// It answered something else than was asked.
    #[error("got {got} from the switch, want {wanted}")]
    Strange {
        /// Answer.
        got: String,
        /// Kind of answer.
        wanted: &'static str,
    },
}

/// This host's switch.
#[derive(Debug, Clone)]
pub struct Switch {
    socket: PathBuf,
}

impl Switch {
    /// The switch behind a socket; it need not run yet.
    pub const fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Asks and waits for the answer.
    pub fn ask(&self, request: &SwitchRequest) -> Result<SwitchReply, SwitchError> {
        let unreachable = |error| SwitchError::Unreachable { socket: self.socket.clone(), error };
        let line = self.exchange(request).map_err(unreachable)?;
        match serde_json::from_str::<Response<SwitchReply>>(&line) {
            Ok(Response::Ok(reply)) => Ok(reply),
            Ok(Response::Error(words)) => Err(SwitchError::Refused(words)),
            Err(error) => Err(SwitchError::Strange { got: format!("{line:?} ({error})"), wanted: "a JSON answer" }),
        }
    }

    fn exchange(&self, request: &SwitchRequest) -> io::Result<String> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        let mut line = serde_json::to_string(request).map_err(io::Error::other)?;
        line.push('\n');
        stream.write_all(line.as_bytes())?;
        let mut answer = String::new();
        BufReader::new(stream.take(ANSWER_LIMIT)).read_line(&mut answer)?;
        if answer.ends_with('\n') {
            Ok(answer)
        } else {
            Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it hung up before its answer was complete"))
        }
    }

    /// Asks for something that has no answer but done.
    pub fn tell(&self, request: &SwitchRequest) -> Result<(), SwitchError> {
        // Some requests are answered with what they did; that is as good.
        self.ask(request).map(drop)
    }

    /// All ports.
    pub fn ports(&self) -> Result<Vec<PortSeen>, SwitchError> {
        match self.ask(&SwitchRequest::PortList)? {
            SwitchReply::Ports(ports) => Ok(ports),
            other => Err(strange(&other, "ports")),
        }
    }

    /// Traffic counters.
    pub fn traffic(&self) -> Result<Vec<TrafficSeen>, SwitchError> {
        match self.ask(&SwitchRequest::Traffic)? {
            SwitchReply::Traffic(traffic) => Ok(traffic),
            other => Err(strange(&other, "traffic")),
        }
    }

    /// What it knows of a MAC.
    pub fn move_status(&self, vni: Vni, mac: MacAddr) -> Result<MoveSeen, SwitchError> {
        match self.ask(&SwitchRequest::MoveStatus { vni, mac })? {
            SwitchReply::Move(seen) => Ok(seen),
            other => Err(strange(&other, "the state of a move")),
        }
    }

    /// Makes a port, in place of any left over for the same VM or interface.
    pub fn add_port(&self, spec: PortSpec) -> Result<PortId, SwitchError> {
        let vm = spec.owned.as_ref().map(|owned| owned.vm.clone());
        for old in self.ports()? {
            let same_vm = vm.is_some() && old.spec.owned.as_ref().map(|owned| owned.vm.clone()) == vm;
            let clash = interface(&old.spec.kind).is_some_and(|old| Some(old) == interface(&spec.kind));
            if same_vm || clash {
                self.tell(&SwitchRequest::PortRemove { port: old.port })?;
            }
        }
        match self.ask(&SwitchRequest::PortAdd(spec))? {
            SwitchReply::Port(port) => Ok(port),
            other => Err(strange(&other, "a port number")),
        }
    }

    /// Removes the ports of a VM, whatever their numbers.
    pub fn remove_ports(&self, vm: &VmId) -> Result<(), SwitchError> {
        self.ports()?
            .into_iter()
            .filter(|port| port.spec.owned.as_ref().is_some_and(|owned| &owned.vm == vm))
            .try_for_each(|port| self.tell(&SwitchRequest::PortRemove { port: port.port }))
    }
}

/// Interface and namespace of a port, by which two of them would clash.
fn interface(kind: &PortKind) -> Option<(&str, Option<&str>)> {
    match kind {
        PortKind::Packet { interface } => Some((interface, None)),
        PortKind::Tap { interface, netns } => Some((interface, netns.as_deref())),
        PortKind::Vxlan { .. } => None,
    }
}

fn strange(got: &SwitchReply, wanted: &'static str) -> SwitchError {
    SwitchError::Strange { got: format!("{got:?}"), wanted }
}
