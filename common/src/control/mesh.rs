//! What two switches tell each other on the control channel.
//!
//! One QUIC connection with mutual TLS between each two switches, one bidirectional stream on it, opened by the caller;
//! each end sends [`Message::Hello`] first. Messages arrive in order; those lost with a connection are made up for by what
//! is told again on the next one: HELLO, members, owned MACs, steps of moves that have not ended. Every message may
//! therefore arrive more than once. What a message says of its sender is bound to the host named in its certificate.

use crate::{DomainId, Epoch, HostId, MacAddr, VmId, Vni};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// Version of this surface. Raised when the meaning of an existing message changes.
pub const PROTOCOL: u16 = 1;
/// Oldest version still spoken.
pub const OLDEST: u16 = 1;

/// Abilities beyond the protocol's version, or-ed together in [`Hello::features`]; unknown bits are ignored.
pub mod feature {
    /// Senders can hold frames for a MAC while it moves. Reserved: no switch offers it yet.
    pub const HOLD: u64 = 1;
    /// Understands [`super::Message::Forgotten`]; to others it is not sent.
    pub const FORGET: u64 = 2;
    /// Understands [`super::Message::Mtus`]; to others it is not sent.
    pub const MTUS: u64 = 4;
}

/// First message of either end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Oldest version the sender speaks.
    pub oldest: u16,
    /// Newest version the sender speaks.
    pub newest: u16,
    /// [`feature`]s.
    pub features: u64,
    /// Its host; must be the one in its certificate.
    pub host: HostId,
    /// Its domain; must be the one in its certificate.
    pub domain: DomainId,
    /// Drawn anew at each start of the daemon: another one means that everything told before is forgotten there.
    pub boot: u64,
    /// Index the receiver of this message must write into every datagram it sends to the sender.
    pub receiver: u32,
    /// How the sender seals data; both ends must say the same.
    pub aead: Aead,
    /// Largest UDP payload the sender takes, in bytes.
    pub max_datagram: u16,
    /// Networks it carries.
    pub networks: Vec<Vni>,
}

/// How data is sealed, as spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Aead {
    /// Not at all.
    None,
    /// AES-256-GCM. Reserved.
    Aes256Gcm,
    /// ChaCha20-Poly1305. Reserved.
    ChaCha20Poly1305,
}

/// Somebody the sender is connected with. A hint where to call: who answers must prove the name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its host.
    pub host: HostId,
    /// Its mesh port as the sender sees it.
    pub address: SocketAddr,
}

/// A MAC the sender owns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnedAt {
    /// Network.
    pub vni: Vni,
    /// Address.
    pub mac: MacAddr,
    /// Since which epoch.
    pub epoch: Epoch,
}

/// A step of a move; the epoch it belongs to travels beside it. See docs/architecture.md, Moves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// Source → destination: you may own the MAC with this epoch once the VM runs at your place.
    Grant {
        /// Its VM.
        vm: VmId,
    },
    /// Destination → source: I am PREPARED.
    Granted,
    /// Source → destination: forget the grant.
    Release,
    /// Destination → source: I have forgotten it for ever; why, in words, if nobody asked for it.
    Released {
        /// Empty when it was asked for.
        why: String,
    },
    /// Destination → source: the VM runs here; fence your port.
    Fence,
    /// Source → destination: nothing of mine enters the network with this MAC any more.
    Fenced,
    /// To the owner of that epoch: the VM runs at my place without your grant (moved behind our back).
    Claim,
    /// Reserved for moves without loss: keep frames for this MAC until it is owned anew, or for the lease. Ignored so far.
    Hold {
        /// Milliseconds.
        lease_ms: u16,
    },
    /// Destination → source: no port waits for that MAC here, perhaps not yet again; a later grant may be taken, this one
    /// never will.
    Unready {
        /// In words.
        why: String,
    },
}

/// Everything two switches tell each other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// First of all.
    Hello(Hello),
    /// Members to get connected with.
    Members(Vec<Member>),
    /// All networks the sender carries from now on.
    Networks(Vec<Vni>),
    /// MACs the sender owns now, of networks the receiver carries.
    Owned {
        /// Whether these are all; then others that it owned before are no more.
        all: bool,
        /// Which.
        macs: Vec<OwnedAt>,
    },
    /// The VM behind a MAC the sender owned has ended; everything known of it may be forgotten.
    Disowned(OwnedAt),
    /// To somebody who thinks otherwise: the MAC is owned by that host since that epoch.
    Moved {
        /// What is known.
        owned: OwnedAt,
        /// The owner.
        host: HostId,
    },
    /// A learned MAC was heard at the sender's place for the first time, or again after having been elsewhere.
    Learned {
        /// Network.
        vni: Vni,
        /// Outer VLAN identifier, 0 for untagged.
        vid: u16,
        /// Address.
        mac: MacAddr,
    },
    /// A step of a move.
    Move {
        /// Which MAC, and the epoch of the step.
        owned: OwnedAt,
        /// What.
        step: Step,
    },
    /// The sender leaves: do not call it again.
    Leave,
    /// Stations learned at a port of the sender that has lost its interface, or was removed, are not there any more. Only for
    /// peers with [`feature::FORGET`].
    Forgotten {
        /// Network.
        vni: Vni,
        /// Outer VLAN identifier and address of each.
        stations: Vec<(u16, MacAddr)>,
    },
    /// MTUs of networks the sender carries: of some, or of one that has changed. Only for peers with [`feature::MTUS`].
    Mtus(Vec<(Vni, u16)>),
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Golden bytes: whoever changes them must raise [`PROTOCOL`].
    #[test]
    fn messages_are_frozen() {
        let owned = OwnedAt { vni: Vni::new(5).unwrap(), mac: MacAddr([2, 0, 0, 0, 0, 1]), epoch: Epoch::FIRST };
        let mac = b"\x1102:00:00:00:00:01";
        let owned_bytes = [&[5][..], mac, &[1, 1]].concat();
        let forgotten = Message::Forgotten { vni: Vni::new(5).unwrap(), stations: vec![(300, MacAddr([2, 0, 0, 0, 0, 1]))] };
        let cases: [(Message, Vec<u8>); 8] = [
            (Message::Networks(vec![Vni::new(300).unwrap()]), vec![2, 1, 0xac, 2]),
            (Message::Owned { all: true, macs: vec![owned] }, [&[3, 1, 1][..], &owned_bytes].concat()),
            (Message::Disowned(owned), [&[4][..], &owned_bytes].concat()),
            (Message::Move { owned, step: Step::Fence }, [&[7][..], &owned_bytes, &[4]].concat()),
            (Message::Move { owned, step: Step::Hold { lease_ms: 500 } }, [&[7][..], &owned_bytes, &[7, 0xf4, 3]].concat()),
            (Message::Leave, vec![8]),
            (forgotten, [&[9, 5, 1, 0xac, 2][..], mac].concat()),
            (Message::Mtus(vec![(Vni::new(5).unwrap(), 1400)]), vec![10, 1, 5, 0xf8, 0x0a]),
        ];
        for (message, bytes) in cases {
            assert_eq!(postcard::to_stdvec(&message).unwrap(), bytes, "{message:?}");
            assert_eq!(postcard::from_bytes::<Message>(&bytes).unwrap(), message);
        }
        let hello = Message::Hello(Hello {
            oldest: 1,
            newest: 1,
            features: 0,
            host: "h1".parse().unwrap(),
            domain: "d1".parse().unwrap(),
            boot: 7,
            receiver: 9,
            aead: Aead::None,
            max_datagram: 1472,
            networks: vec![],
        });
        assert_eq!(postcard::to_stdvec(&hello).unwrap(), b"\x00\x01\x01\x00\x02h1\x02d1\x07\x09\x00\xc0\x0b\x00");
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_a_message_or_refused(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
            let _ = postcard::from_bytes::<Message>(&bytes);
        }
    }
}
