//! Two switches with one certificate: the one that answers stays, the newcomer is refused.
//!
//! A host that starts anew has another boot too. It comes from the address of the one before, or that one answers no more;
//! who is seen to answer beside the newcomer is a second switch.

use super::{LinkId, Members};
use std::net::SocketAddr;
use std::time::Duration;
use violin_common::{HostId, Instant};

/// How long after the loss of a connection the refused one is still refused: whoever it rivals calls again meanwhile.
const GRACE: Duration = Duration::from_secs(10);
/// A rival that has not called for so long is forgotten.
const FORGET: Duration = Duration::from_secs(60);
/// Rivals of one host that are remembered: a bound on what holders of one certificate can make us remember and log.
const LIMIT: usize = 8;

/// A switch that was refused because another one has its certificate.
#[derive(Debug)]
struct Rival {
    boot: u64,
    address: SocketAddr,
    since: Instant,
    last: Instant,
    calls: u64,
}

/// All rivals of one host.
#[derive(Debug, Default)]
pub struct Rivals(Vec<Rival>);

impl Rivals {
    /// One has called. Returns whether that is news.
    fn came(&mut self, now: Instant, boot: u64, address: SocketAddr) -> bool {
        self.0.retain(|rival| now.since(rival.last) < FORGET);
        if let Some(rival) = self.0.iter_mut().find(|rival| rival.boot == boot) {
            (rival.address, rival.last, rival.calls) = (address, now, rival.calls + 1);
            return false;
        }
        let room = self.0.len() < LIMIT;
        if room {
            self.0.push(Rival { boot, address, since: now, last: now, calls: 1 });
        }
        room
    }

    fn has(&self, boot: u64) -> bool {
        self.0.iter().any(|rival| rival.boot == boot)
    }

    pub(super) fn remove(&mut self, boot: u64) {
        self.0.retain(|rival| rival.boot != boot);
    }

    /// Those that have called lately: where each is, since when it calls, and words about it.
    pub fn recent(&self, now: Instant) -> impl Iterator<Item = (SocketAddr, Instant, String)> {
        self.0.iter().filter(move |rival| now.since(rival.last) < FORGET).map(move |rival| {
            let words = format!(
                "a second switch with this certificate calls from {} and is refused ({} calls, the last {} s ago): {ADVICE}",
                rival.address,
                rival.calls,
                now.since(rival.last).as_secs()
            );
            (rival.address, rival.since, words)
        })
    }
}

const ADVICE: &str = "want a certificate of its own on each host (`violin pki host`)";

impl Members {
    /// Whether somebody else with the certificate of a caller has to be asked for first: the connection on which to look.
    ///
    /// *Errors*: the caller is known to be the second one.
    pub(super) fn contested(&mut self, now: Instant, id: LinkId, boot: u64) -> Result<Option<LinkId>, String> {
        let Some(link) = self.links.get(&id) else { return Ok(None) };
        let Some(member) = self.hosts.get(&link.host) else { return Ok(None) };
        if member.boot.is_none_or(|known| known == boot) {
            return Ok(None);
        }
        match member.link.and_then(|standing| Some((standing, self.links.get(&standing)?.address))) {
            // Who speaks from the same port has taken it over: the one before is gone.
            Some((_, address)) if address == link.address => Ok(None),
            Some((standing, _)) => Ok(Some(standing)),
            None if member.rivals.has(boot) && member.lost.is_some_and(|lost| now.since(lost) < GRACE) => {
                Err(self.refuse_rival(now, id, boot))
            }
            None => Ok(None),
        }
    }

    /// The other switch with this caller's certificate has answered. Returns what the caller is told.
    pub fn refuse_rival(&mut self, now: Instant, id: LinkId, boot: u64) -> String {
        self.twins_refused += 1;
        let Some((host, address)) = self.links.get(&id).map(|link| (link.host.clone(), link.address)) else {
            return "this connection is closed".into();
        };
        let Some(member) = self.hosts.get_mut(&host) else { return "this connection is closed".into() };
        let stays = member.address;
        if member.rivals.came(now, boot, address) {
            tracing::warn!(
                peer = %host, %stays, refused = %address,
                "two switches with one certificate: the one at {stays} stays, the one at {address} is refused; {ADVICE}"
            );
        }
        second(&host, stays)
    }

    /// Another switch has our own name. Returns what it is told.
    pub(super) fn twin_came(&mut self, now: Instant, id: LinkId, boot: u64) -> String {
        self.twins_refused += 1;
        if let Some(address) = self.links.get(&id).map(|link| link.address)
            && self.twins.came(now, boot, address)
        {
            tracing::warn!(host = %self.host, refused = %address, "another switch has our certificate, at {address}; {ADVICE}");
        }
        format!("two switches are called {}: names must differ; {ADVICE}", self.host)
    }

    /// Who else has our own name.
    pub const fn twins(&self) -> &Rivals {
        &self.twins
    }
}

fn second(host: &HostId, stays: SocketAddr) -> String {
    format!("another switch with the certificate of {host} answers at {stays}: {ADVICE}")
}
