//! What two switches tell each other on the control channel.
//!
//! One QUIC connection with mutual TLS between each two switches, one bidirectional stream on it, opened by the caller;
//! each end sends [`Message::Hello`] first. Messages arrive in order; those lost with a connection are made up for by what
//! is told again on the next one: HELLO, members, owned MACs, steps of moves that have not ended. Every message may
//! therefore arrive more than once. What a message says of its sender is bound to the host named in its certificate.

use crate::{DomainId, Epoch, HostId, MacAddr, VmId, Vni};
use serde::{Deserialize, Deserializer, Serialize};
use std::net::SocketAddr;

/// Version of this surface. Raised when the meaning of an existing message changes. 2: data is sealed.
pub const PROTOCOL: u16 = 2;
/// Oldest version still spoken.
pub const OLDEST: u16 = 2;

/// Abilities beyond the protocol's version, or-ed together in [`Hello::features`]; unknown bits are ignored.
pub mod feature {
    /// Senders can hold frames for a MAC while it moves. Reserved: no switch offers it yet.
    pub const HOLD: u64 = 1;
    /// Understands [`super::Message::Forgotten`]; to others it is not sent.
    pub const FORGET: u64 = 2;
    /// Understands [`super::Message::Mtus`]; to others it is not sent.
    pub const MTUS: u64 = 4;
}

/// First message of either end. What version 1 knows of it comes first, so that either end can name the other's version.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
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
    /// 0: in version 1 "data is not sealed".
    pub reserved: u8,
    /// Largest UDP payload the sender takes, in bytes.
    pub max_datagram: u16,
    /// Networks it carries.
    pub networks: Vec<Vni>,
    /// How it can protect data; none: it speaks version 1, which ends here.
    #[serde(deserialize_with = "absent_at_the_end")]
    pub offer: Option<Offer>,
}

/// Bytes that are not there are no offer.
fn absent_at_the_end<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Offer>, D::Error> {
    Ok(Option::deserialize(deserializer).unwrap_or_default())
}

/// How the sender can protect data.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Offer {
    /// The ciphers it has.
    pub ciphers: Vec<Cipher>,
    /// Queues it sends from, numbered from 0.
    pub queues: u16,
    /// The sender's configuration lets data to the receiver's domain go plain on the way of this connection; then this is the
    /// cookie (48 bits) in every plain datagram to the sender. Data goes plain only if both ends say so.
    pub plain: Option<u64>,
}

/// One cipher of the sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Cipher {
    /// See [`Aead::code`]; unknown ones are ignored.
    pub code: u8,
    /// How long it takes there to seal 1,400 bytes, in nanoseconds: the pair's slower end decides.
    pub ns: u32,
}

/// How data is sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Aead {
    /// AES-256-GCM (RFC 5116).
    Aes256Gcm,
    /// ChaCha20-Poly1305 (RFC 8439).
    ChaCha20Poly1305,
}

impl Aead {
    /// All there are.
    pub const ALL: [Self; 2] = [Self::Aes256Gcm, Self::ChaCha20Poly1305];

    /// Its number in [`Cipher::code`].
    pub const fn code(self) -> u8 {
        match self {
            Self::Aes256Gcm => 1,
            Self::ChaCha20Poly1305 => 2,
        }
    }

    /// The one of that number.
    pub fn of_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|aead| aead.code() == code)
    }

    /// As it is written in configuration and answers.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Aes256Gcm => "aes-256-gcm",
            Self::ChaCha20Poly1305 => "chacha20-poly1305",
        }
    }
}

/// Somebody the sender is connected with. A hint where to call: who answers must prove the name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Member {
    /// Its host.
    pub host: HostId,
    /// Its mesh port as the sender sees it.
    pub address: SocketAddr,
}

/// A MAC the sender owns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct OwnedAt {
    /// Network.
    pub vni: Vni,
    /// Address.
    pub mac: MacAddr,
    /// Since which epoch.
    pub epoch: Epoch,
}

/// A step of a move; the epoch it belongs to travels beside it. See docs/architecture.md, Moves.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
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
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
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
    /// The sender has read the receiver's HELLO: data of the session that this connection has made is understood from now on.
    Ready,
    /// Something the receiver sealed has opened under this epoch for the first time: it may go on to the next.
    Opened {
        /// The index the sender gave the receiver in the session's HELLO.
        receiver: u32,
        /// The receiver's queue.
        queue: u16,
        /// Since when.
        epoch: u64,
    },
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
        let cases: [(Message, Vec<u8>); 10] = [
            (Message::Networks(vec![Vni::new(300).unwrap()]), vec![2, 1, 0xac, 2]),
            (Message::Owned { all: true, macs: vec![owned] }, [&[3, 1, 1][..], &owned_bytes].concat()),
            (Message::Disowned(owned), [&[4][..], &owned_bytes].concat()),
            (Message::Move { owned, step: Step::Fence }, [&[7][..], &owned_bytes, &[4]].concat()),
            (Message::Move { owned, step: Step::Hold { lease_ms: 500 } }, [&[7][..], &owned_bytes, &[7, 0xf4, 3]].concat()),
            (Message::Leave, vec![8]),
            (forgotten, [&[9, 5, 1, 0xac, 2][..], mac].concat()),
            (Message::Mtus(vec![(Vni::new(5).unwrap(), 1400)]), vec![10, 1, 5, 0xf8, 0x0a]),
            (Message::Ready, vec![11]),
            (Message::Opened { receiver: 300, queue: 1, epoch: 2 }, vec![12, 0xac, 2, 1, 2]),
        ];
        for (message, bytes) in cases {
            assert_eq!(postcard::to_stdvec(&message).unwrap(), bytes, "{message:?}");
            assert_eq!(postcard::from_bytes::<Message>(&bytes).unwrap(), message);
        }
        let hello = |offer| Hello {
            oldest: 1,
            newest: 1,
            features: 0,
            host: "h1".parse().unwrap(),
            domain: "d1".parse().unwrap(),
            boot: 7,
            receiver: 9,
            reserved: 0,
            max_datagram: 1472,
            networks: vec![],
            offer,
        };
        let version_1 = b"\x00\x01\x01\x00\x02h1\x02d1\x07\x09\x00\xc0\x0b\x00";
        let offer = Offer { ciphers: vec![Cipher { code: 1, ns: 300 }], queues: 2, plain: Some(5) };
        let version_2 = [&version_1[..], &[1, 1, 1, 0xac, 2, 2, 1, 5]].concat();
        assert_eq!(postcard::to_stdvec(&Message::Hello(hello(Some(offer.clone())))).unwrap(), version_2);
        for (bytes, offer) in [(&version_1[..], None), (&version_2, Some(offer))] {
            assert_eq!(postcard::from_bytes::<Message>(bytes).unwrap(), Message::Hello(hello(offer)));
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_a_message_or_refused(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
            let _ = postcard::from_bytes::<Message>(&bytes);
        }
    }
}
