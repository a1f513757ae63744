//! Why a frame, slice or datagram was refused. Every refusal has one variant, one sentence and one counter.

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal,)+) => {
        /// Why something did not go further. Counters are called `drop.` and the text form.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(usize)]
        pub enum DropReason {
            $($(#[doc = $doc])+ $name,)+
        }

        impl DropReason {
            /// All reasons there are, in order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// The reason as it appears in the counter's name.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)+
                }
            }
        }
    };
}

reasons! {
    /// The frame is shorter than an Ethernet header.
    Runt = "runt",
    /// The layer-3 packet (or one segment of a super-frame) is larger than 9000 bytes; from a gateway, than the network's MTU.
    TooBig = "too-big",
    /// The source address is a group address or zero, which no station has.
    BadSource = "bad-source",
    /// The source is not the one address this port may use.
    ForeignSource = "foreign-source",
    /// The source is a MAC that somebody else owns.
    StolenMac = "stolen-mac",
    /// The port's gate is closed: its VM does not own its MAC (any more).
    GateClosed = "gate-closed",
    /// The port's gate is on hold and its queue is full.
    HoldFull = "hold-full",
    /// 01:80:C2:00:00:00 to :0F, which a bridge must not forward.
    LinkLocal = "link-local",
    /// The destination is behind the port the frame came from.
    Hairpin = "hairpin",
    /// The destination's owner is known, but cannot be reached.
    OwnerUnreachable = "owner-unreachable",
    /// The network is not (or no longer) carried here, or the port is not (or no longer) known.
    NoNetwork = "no-network",
    /// The place is a port or peer that has gone since the FDB was written, or a peer that carries the network no more.
    Gone = "gone",
    /// The port's interface is not there (yet), and its waiting queue is full or it may not wait; or the port went first.
    NotAttached = "not-attached",
    /// The frame waited for an interface longer than it was worth.
    WaitedTooLong = "waited-too-long",
    /// The interface or the guest behind it takes no more now.
    PortBusy = "port-busy",
    /// The interface refused the frame.
    PortError = "port-error",
    /// The interface brought frames faster than they were read, or the foreign tunnel end of a gateway datagrams.
    PortOverrun = "port-overrun",
    /// Segmentation that nobody here can do: marked as one thing while the frame is another and no tunnel's, or of a kind the
    /// kernel has no word for (SCTP, UFO).
    Segmentation = "segmentation",
    /// The checksum is to be completed at a place where none is.
    Checksum = "checksum",
    /// The underlay takes no more now.
    TunnelBusy = "tunnel-busy",
    /// The underlay refused a datagram.
    TunnelError = "tunnel-error",
    /// The mesh port was brought datagrams faster than they were read, of QUIC too.
    TunnelOverrun = "tunnel-overrun",
    /// A datagram on the mesh port is empty, or neither QUIC nor of the mesh format, or of QUIC and larger than QUIC's are here.
    BadDatagram = "bad-datagram",
    /// A datagram came with a receiver index that we gave to nobody, or whose session has ended.
    UnknownReceiver = "unknown-receiver",
    /// A plain datagram came from another address than the peer's. (A sealed one says who it is from.)
    WrongAddress = "wrong-address",
    /// A plain datagram came through another interface than the configuration names.
    WrongInterface = "wrong-interface",
    /// A plain datagram without the cookie that we gave its sender.
    BadCookie = "bad-cookie",
    /// A plain datagram of a peer whose data is sealed, or the other way round.
    WrongProtection = "wrong-protection",
    /// A sealed datagram of a queue that its sender did not tell of.
    UnknownQueue = "unknown-queue",
    /// A sealed datagram of an epoch for which there is no key here (any more, or yet).
    UnknownEpoch = "unknown-epoch",
    /// A sealed datagram that came before, or so late that nobody can tell.
    Replayed = "replayed",
    /// A sealed datagram that was not made with the session's key: forged, or spoilt on the way.
    NotAuthentic = "not-authentic",
    /// There is no key for it: the session is not, or no longer, this worker's.
    NoKey = "no-key",
    /// The key has sealed all that it may, and the peer has not said that it has the next one.
    KeyExhausted = "key-exhausted",
    /// A peer sent data of a network it may not carry or we do not carry.
    ForeignNetwork = "foreign-network",
    /// A slice's header contradicts itself or its bytes.
    BadSlice = "bad-slice",
    /// What came from a tunnel may not enter a tunnel.
    SplitHorizon = "split-horizon",
    /// A frame in slices was not complete in time.
    ReassemblyTimeout = "reassembly-timeout",
    /// A peer has too many unfinished frames; its oldest went.
    ReassemblyFull = "reassembly-full",
    /// A slice came twice or overlaps another.
    ReassemblyOverlap = "reassembly-overlap",
    /// QUIC's queue is full; QUIC repeats itself.
    QuicBusy = "quic-busy",
    /// A gateway's foreign tunnel end cannot take a packet this large; the sender was told where possible.
    GatewayTooBig = "gateway-too-big",
    /// A datagram to a gateway came from somebody else than its foreign tunnel end.
    GatewayStranger = "gateway-stranger",
    /// A datagram to a gateway is not VXLAN or has another identifier.
    GatewayMalformed = "gateway-malformed",
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_reason_has_a_name_of_its_own() {
        let names: HashSet<_> = DropReason::ALL.iter().map(|reason| reason.name()).collect();
        assert_eq!(names.len(), DropReason::ALL.len());
        for (index, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
        }
    }
}
