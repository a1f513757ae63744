//! What a packet socket's offloads mislabel: tunnels of guests, SCTP, DHCP, and what it cannot hand over at all. Needs root.
#![cfg(feature = "io")]

mod support;

use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};
use std::net::UdpSocket;
use std::os::fd::{AsFd, OwnedFd};
use support::bulk::there_and_back;
use support::{Host, MTU, Namespace, guest, two_hosts, until, vni};
use switchd::io::{link, sys};
use switchd::virtio::{self, Offload, Partial};

/// Bytes that cross each way.
const BYTES: usize = 4 << 20;

fn station(host: &mut Host, number: u8) -> Namespace {
    let station = guest(&host.ns, "p1", &format!("10.5.0.{number}"), MTU);
    station.run(&format!("ip addr add fd05::{number}/64 dev eth0 nodad"));
    host.packet_port(vni(5), "p1", MTU);
    station
}

fn counter(host: &Host, name: &str) -> u64 {
    host.counters.snapshot().into_iter().find(|counter| counter.name == name).map_or(0, |counter| counter.value)
}

#[test]
#[ignore = "needs root"]
fn bulk_tcp_through_a_guests_own_vxlan_arrives_intact_and_soon() {
    let (mut a, mut b) = two_hosts(&[vni(5)], MTU);
    let (g1, g2) = (station(&mut a, 1), station(&mut b, 2));
    for (outer, options) in [
        ("10.5.0.", "dstport 4789 noudpcsum"),
        ("10.5.0.", "dstport 8472 udpcsum"),
        ("fd05::", "dstport 4789"),
        ("fd05::", "dstport 4789 udp6zerocsumtx udp6zerocsumrx"),
    ] {
        for (station, number, other) in [(&g1, 1, 2), (&g2, 2, 1)] {
            station
                .run(&format!("ip link add vx type vxlan id 9 local {outer}{number} remote {outer}{other} dev eth0 {options}"));
            station.run(&format!("ip addr add 10.9.0.{number}/24 dev vx && ip addr add fd09::{number}/64 dev vx nodad"));
            station.run("ip link set vx up");
        }
        for inner in ["10.9.0.2", "fd09::2"] {
            let cut = |host| counter(host, "software-segmentations");
            let before = (cut(&a), cut(&b));

            let carried = there_and_back(&g1, &g2, inner.parse().unwrap(), BYTES);

            assert_eq!(carried, Ok(()), "over {outer} {options} to {inner}: {:?} {:?}", a.drops(), b.drops());
            assert!(cut(&a) > before.0 && cut(&b) > before.1, "no super-frame of the tunnel was seen: {options}");
        }
        g1.run("ip link del vx");
        g2.run("ip link del vx");
    }
    for host in [&a, &b] {
        assert_eq!((counter(host, "drop.segmentation"), counter(host, "drop.too-big")), (0, 0), "{:?}", host.drops());
    }
}

/// A raw socket on a guest's interface that says with each frame what is to be done to it, and hears frames as they come.
struct Raw {
    socket: OwnedFd,
    batch: sys::Batch,
}

impl Raw {
    fn on(ns: &Namespace) -> Self {
        let socket = ns.enter(|| {
            let socket = sys::packet_socket().unwrap();
            // PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING
            sys::set_option(socket.as_fd(), libc::SOL_PACKET, 15, 1i32).unwrap();
            sys::set_option(socket.as_fd(), libc::SOL_PACKET, 23, 1i32).unwrap();
            sys::bind_packet(socket.as_fd(), link::index("eth0").unwrap()).unwrap();
            socket
        });
        Self { socket, batch: sys::Batch::new(64, 70_000, 0) }
    }

    fn say(&self, offload: Offload, frame: &[u8]) {
        let bytes = [&offload.emit()[..], frame].concat();
        assert_eq!(nix::unistd::write(&self.socket, &bytes), Ok(bytes.len()));
    }

    /// Waits for the frame that is wanted; returns it with what is to be done to it.
    fn wait_for(&mut self, what: &str, wanted: impl Fn(&[u8]) -> bool) -> (Offload, Vec<u8>) {
        let mut found = None;
        until(what, || {
            if self.batch.receive(self.socket.as_fd(), true, 64).is_ok() {
                let heard: Vec<_> = self.batch.slots_mut().map(|(got, vnet, slot)| (*vnet, slot[..got.len].to_vec())).collect();
                found = heard.into_iter().find(|(_, frame)| wanted(frame));
            }
            found.is_some()
        });
        let (vnet, frame): ([u8; virtio::LEN], _) = found.expect("waited for");
        (Offload::parse(&vnet).unwrap(), frame)
    }
}

#[test]
#[ignore = "needs root"]
fn an_sctp_packet_whose_crc_is_left_to_the_interface_arrives_with_a_right_one() {
    let (mut a, mut b) = two_hosts(&[vni(5)], MTU);
    let (g1, g2) = (station(&mut a, 1), station(&mut b, 2));
    let (from, mut to) = (Raw::on(&g1), Raw::on(&g2));
    // Ports 7 and 9, tag 0, no checksum yet, a chunk of 1000 bytes.
    let sctp = [&[0, 7, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0][..], &[0x2a; 1000]].concat();
    let mut frame = Vec::new();
    let builder = PacketBuilder::ethernet2([0x52, 0x54, 0, 0, 1, 1], [0xff; 6]).ipv4([10, 5, 0, 1], [10, 5, 0, 2], 9);
    builder.write(&mut frame, 132.into(), &sctp).unwrap();

    from.say(Offload { checksum: Some(Partial { start: 34, offset: 8 }), ..Offload::default() }, &frame);

    let (offload, heard) = to.wait_for("the packet", |frame| frame.len() == 46 + 1000);
    assert_eq!(offload.checksum, None, "nothing is left to do");
    assert_eq!(heard[42..46], SCTP_CRC, "{:02x?}", &heard[34..46]);
    assert_eq!(counter(&a, "software-checksums"), 1);
}

/// CRC-32C of that packet with the field zero, worked out bit by bit elsewhere; the least significant byte first.
const SCTP_CRC: [u8; 4] = [0x6b, 0x98, 0xf6, 0xe3];

#[test]
#[ignore = "needs root"]
fn a_dhcp_answer_arrives_with_its_checksum_complete() {
    let (mut a, mut b) = two_hosts(&[vni(5)], MTU);
    let (g1, g2) = (station(&mut a, 1), station(&mut b, 2));
    let mut to = Raw::on(&g2);
    let server = g1.enter(|| UdpSocket::bind("10.5.0.1:67").unwrap());
    server.set_broadcast(true).unwrap();

    g1.enter(|| server.send_to(&[7; 300], "10.5.0.255:68").unwrap());

    let (offload, heard) = to.wait_for("the answer", |frame| frame.len() == 342);
    assert_eq!(offload, Offload::default(), "nothing is left to do");
    let parsed = SlicedPacket::from_ethernet(&heard).unwrap();
    let (Some(etherparse::NetSlice::Ipv4(ip)), Some(TransportSlice::Udp(udp))) = (parsed.net, parsed.transport) else {
        panic!("not UDP")
    };
    let right = udp.to_header().calc_checksum_ipv4(&ip.header().to_header(), udp.payload());
    assert_eq!(udp.checksum(), right.unwrap());
}

#[test]
#[ignore = "needs root"]
fn a_super_frame_that_the_kernel_cannot_hand_over_is_counted_and_the_port_lives_on() {
    let (mut a, mut b) = two_hosts(&[vni(5)], MTU);
    let g2 = station(&mut b, 2);
    // A hypervisor's TAP: its descriptor side passes fragmented UDP (UFO) on, as some guests make it.
    let tap = a.ns.enter(|| {
        let file = std::fs::File::options().read(true).write(true).open("/dev/net/tun").unwrap();
        let flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        sys::interface_request(file.as_fd(), libc::TUNSETIFF as _, "p1", |request| request.ifr_ifru.ifru_flags = flags).unwrap();
        file
    });
    a.packet_port(vni(5), "p1", MTU);
    let mut to = Raw::on(&g2);
    let mut frame = Vec::new();
    let builder = PacketBuilder::ethernet2([0x52, 0x54, 0, 0, 1, 1], [0xff; 6]).ipv4([10, 5, 0, 1], [10, 5, 0, 2], 9);
    builder.udp(7, 9).write(&mut frame, &[7; 4000]).unwrap();
    let size = 1376u16.to_ne_bytes();
    let ufo = [1, 3, 42, 0, size[0], size[1], 34, 0, 6, 0];
    let say = |header: &[u8], frame: &[u8]| nix::unistd::write(&tap, &[header, frame].concat()).unwrap();

    say(&ufo, &frame);
    say(&[0; 10], &frame[..200]);

    let (_, heard) = to.wait_for("the frame behind it", |frame| frame.len() == 200);
    assert_eq!(heard, frame[..200]);
    assert_eq!(counter(&a, "drop.segmentation"), 1, "{:?}", a.drops());
}
