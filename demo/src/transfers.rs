//! Rate-limited, checksummed TCP between pairs that cover all of beta's compute nodes: the connections no move may break.

use crate::shell::{Held, Operator};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::process::Stdio;
use std::time::Duration;

const PAIRS: [(&str, &str); 2] = [("c1", "c2"), ("c3", "c4")];
/// Bytes per second of each connection: a block of one segment every 250 ms. Enough to notice a stall, little enough to cost no
/// rank its core: under translation 50 blocks of 1200 bytes a second took 0.4 of a core of the lab.
const RATE: &str = "4800";

/// What the receiving end of one connection saw.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Transfer {
    /// `c1 -> c2`.
    #[serde(default)]
    pub(crate) pair: String,
    /// Bytes received.
    pub(crate) bytes: u64,
    /// Whether every block and the whole were as sent, and the end was the sender's.
    pub(crate) intact: bool,
    /// What broke, if anything did.
    pub(crate) error: Option<String>,
    /// Longest time without a byte.
    pub(crate) longest_stall_ms: f64,
}

/// Connections under way.
#[derive(Debug)]
pub(crate) struct Transfers(Vec<Connection>);

#[derive(Debug)]
struct Connection {
    pair: String,
    server: Held,
    sender: Held,
}

fn open(operator: &Operator, from: &str, to: &str, port: u16, until: &[&str]) -> Result<Connection> {
    let number: u8 = to.trim_start_matches('c').parse().context("a compute node's name is c1, c2, …")?;
    let address = format!("10.77.0.{}:{port}", number + 1);
    let port = port.to_string();
    let server =
        Held::spawn(operator.on("beta", to, &["violin-probe", "transfer-serve", "--port", &port]).stdout(Stdio::piped()))?;
    let mut words = vec!["violin-probe", "transfer-send", "--to", &address, "--rate", RATE];
    words.extend(until);
    let sender = Held::spawn(operator.on("beta", from, &words).stdin(Stdio::piped()).stdout(Stdio::null()))?;
    Ok(Connection { pair: format!("{from} -> {to}"), server, sender })
}

impl Connection {
    fn close(self) -> Result<Transfer> {
        self.sender.finish(Duration::from_secs(30)).with_context(|| format!("sender of {}", self.pair))?;
        let text = self.server.finish(Duration::from_secs(30)).with_context(|| format!("receiver of {}", self.pair))?;
        let mut transfer: Transfer =
            serde_json::from_str(text.trim()).with_context(|| format!("receiver of {} said {text:?}", self.pair))?;
        transfer.pair = self.pair;
        Ok(transfer)
    }
}

impl Transfers {
    /// Opens a connection for each pair.
    pub(crate) fn start(operator: &Operator, port: u16) -> Result<Self> {
        PAIRS.iter().map(|(from, to)| open(operator, from, to, port, &["--until-stdin-closes"])).collect::<Result<_>>().map(Self)
    }

    /// Ends them from the sender's side and collects what the receivers saw.
    pub(crate) fn finish(self) -> Result<Vec<Transfer>> {
        self.0.into_iter().map(Connection::close).collect()
    }
}

/// Place of the byte changed on purpose: in the second block.
const CORRUPT_AT: u64 = 2000;

/// The positive control: a connection on which one byte is changed after it was hashed. What its receiver saw.
pub(crate) fn corrupted(operator: &Operator) -> Result<Transfer> {
    // The sender's two seconds begin with the connection, however long that takes.
    let until = &["--duration", "2s", "--corrupt-at", &CORRUPT_AT.to_string()];
    open(operator, "c1", "c2", 5099, until)?.close()
}

impl Transfer {
    /// Whether the changed byte arrived and was noticed by its block's checksum; a connection that broke proves nothing.
    pub(crate) fn noticed_corruption(&self) -> bool {
        let named = self.error.as_ref().is_some_and(|error| error.contains("checksum"));
        !self.intact && named && self.bytes > CORRUPT_AT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_checksum_that_differs_counts_as_corruption_noticed() {
        let saw = |bytes, intact, error: Option<&str>| {
            let error = error.map(str::to_owned);
            Transfer { pair: String::new(), bytes, intact, error, longest_stall_ms: 0.0 }.noticed_corruption()
        };
        assert!(saw(28_000, false, Some("block 1: checksum differs")));
        assert!(!saw(28_000, false, Some("no byte for 60 s")));
        assert!(!saw(0, false, Some("no sender within 60 s")));
        assert!(!saw(28_000, true, None));
    }
}
