//! Probe frames: what guests and probers put on the Ethernet.
//!
//! Ethernet II with EtherType [`ETHERTYPE`] (local experimental 1, IEEE 802) and this payload, big endian, padded with zeros:
//!
//! | at | size | what |
//! |---|---|---|
//! | 0 | 4 | magic `VLNP` |
//! | 4 | 1 | version 1 |
//! | 5 | 1 | kind |
//! | 6 | 2 | zero |
//! | 8 | 8 | canary: tag of the environment; else: run of the prober |
//! | 16 | 8 | sequence of the canary; number of the frame; last number of the run |
//! | 24 | 8 | when it was sent, ns of the sender's monotonic clock; an echo carries back the frame's own |
//! | 32 | 8 | echo only: when the frame was received, ns of the receiver's monotonic clock |

/// EtherType of all probe frames.
pub const ETHERTYPE: u16 = 0x88b5;
/// Length of a probe frame on the wire, in bytes, without checksum: the least Ethernet allows.
pub const LENGTH: usize = 60;
/// The broadcast address.
pub const BROADCAST: [u8; 6] = [0xff; 6];

const MAGIC: [u8; 4] = *b"VLNP";
const VERSION: u8 = 1;
const HEADER: usize = 14;
const USED: usize = HEADER + 40;

/// What a probe frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probe {
    /// A guest of the environment with this tag lives.
    Canary {
        /// Tag of the sender's environment.
        tag: u64,
        /// Counts up per sender.
        sequence: u64,
    },
    /// One of a run of numbered frames.
    Numbered {
        /// Run of the prober.
        run: u64,
        /// Number within the run, from 0.
        number: u64,
        /// When sent, ns of the sender's clock.
        sent_ns: u64,
    },
    /// The receiver's answer to a numbered frame.
    Echo {
        /// Run of the prober.
        run: u64,
        /// Number of the frame answered.
        number: u64,
        /// When that frame was sent, ns of the prober's clock.
        sent_ns: u64,
        /// When it was received, ns of the receiver's clock.
        received_ns: u64,
    },
    /// The run is over; tells the receiver of a lost tail.
    End {
        /// Run of the prober.
        run: u64,
        /// Highest number sent.
        last: u64,
    },
}

/// Writes a whole frame.
pub fn encode(destination: [u8; 6], source: [u8; 6], probe: &Probe) -> [u8; LENGTH] {
    let (kind, fields) = match *probe {
        Probe::Canary { tag, sequence } => (1, [tag, sequence, 0, 0]),
        Probe::Numbered { run, number, sent_ns } => (2, [run, number, sent_ns, 0]),
        Probe::Echo { run, number, sent_ns, received_ns } => (3, [run, number, sent_ns, received_ns]),
        Probe::End { run, last } => (4, [run, last, 0, 0]),
    };
    let mut frame = [0; LENGTH];
    frame[..6].copy_from_slice(&destination);
    frame[6..12].copy_from_slice(&source);
    frame[12..14].copy_from_slice(&ETHERTYPE.to_be_bytes());
    frame[HEADER..HEADER + 4].copy_from_slice(&MAGIC);
    frame[HEADER + 4] = VERSION;
    frame[HEADER + 5] = kind;
    for (place, field) in frame[HEADER + 8..USED].chunks_exact_mut(8).zip(fields) {
        place.copy_from_slice(&field.to_be_bytes());
    }
    frame
}

/// Reads a whole frame: its source and what it says. `None` if it is no probe frame of this version.
pub fn decode(frame: &[u8]) -> Option<([u8; 6], Probe)> {
    let frame: &[u8; USED] = frame.get(..USED)?.try_into().ok()?;
    let field = |index: usize| {
        let at = HEADER + 8 + index * 8;
        frame[at..at + 8].iter().fold(0u64, |value, byte| value << 8 | u64::from(*byte))
    };
    if frame[12..14] != ETHERTYPE.to_be_bytes() || frame[HEADER..HEADER + 4] != MAGIC || frame[HEADER + 4] != VERSION {
        return None;
    }
    let probe = match frame[HEADER + 5] {
        1 => Probe::Canary { tag: field(0), sequence: field(1) },
        2 => Probe::Numbered { run: field(0), number: field(1), sent_ns: field(2) },
        3 => Probe::Echo { run: field(0), number: field(1), sent_ns: field(2), received_ns: field(3) },
        4 => Probe::End { run: field(0), last: field(1) },
        _ => return None,
    };
    let mut source = [0; 6];
    source.copy_from_slice(&frame[6..12]);
    Some((source, probe))
}

/// Reads a MAC as operators write it.
///
/// Errors: what was got and what is wanted.
pub fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let wrong = || format!("got MAC {text:?}, want six pairs of hexadecimal digits such as 52:54:00:77:00:02");
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for octet in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2).ok_or_else(wrong)?;
        *octet = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
    }
    if parts.next().is_some() { Err(wrong()) } else { Ok(mac) }
}

/// Writes a MAC as operators do.
pub fn show_mac(mac: [u8; 6]) -> String {
    mac.map(|octet| format!("{octet:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: [u8; 6] = [0x52, 0x54, 0, 0x77, 0, 1];

    #[test]
    fn every_kind_survives_the_wire() {
        for probe in [
            Probe::Canary { tag: 7001, sequence: u64::MAX },
            Probe::Numbered { run: 3, number: 4, sent_ns: 5 },
            Probe::Echo { run: 3, number: 4, sent_ns: 5, received_ns: 6 },
            Probe::End { run: 3, last: 9 },
        ] {
            assert_eq!(decode(&encode(BROADCAST, A, &probe)), Some((A, probe)));
        }
    }

    #[test]
    fn the_layout_is_this_one() {
        let frame = encode(BROADCAST, A, &Probe::Canary { tag: 0x0102, sequence: 3 });
        assert_eq!(&frame[..14], b"\xff\xff\xff\xff\xff\xff\x52\x54\0\x77\0\x01\x88\xb5");
        assert_eq!(&frame[14..38], b"VLNP\x01\x01\0\0\0\0\0\0\0\0\x01\x02\0\0\0\0\0\0\0\x03");
    }

    #[test]
    fn frames_cut_short_or_of_other_kinds_are_none() {
        let frame = encode(A, A, &Probe::End { run: 1, last: 2 });
        for length in 0..USED {
            assert_eq!(decode(&frame[..length]), None, "length {length}");
        }
        for (at, value) in [(12, 8), (14, b'X'), (18, 2), (19, 0), (19, 5)] {
            let mut other = frame;
            other[at] = value;
            assert_eq!(decode(&other), None, "byte {at} = {value}");
        }
    }

    #[test]
    fn macs_round_trip_and_others_are_refused() {
        assert_eq!(parse_mac(&show_mac(A)), Ok(A));
        for wrong in ["", "52:54:00:77:00", "52:54:00:77:00:01:02", "5:54:00:77:00:01", "52-54-00-77-00-01", "zz:54:00:77:00:01"]
        {
            assert!(parse_mac(wrong).is_err(), "{wrong}");
        }
    }
}
