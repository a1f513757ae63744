//! Frames for the conformance tests.

use violin_common::MacAddr;

/// A frame from `source` to `destination` with an EtherType and payload.
pub fn frame(destination: MacAddr, source: MacAddr, ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(14 + payload.len());
    frame.extend(destination.0);
    frame.extend(source.0);
    frame.extend(ethertype.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A frame of the local experimental EtherType with a label to recognise it by.
pub fn labelled(destination: MacAddr, source: MacAddr, label: &str) -> Vec<u8> {
    let mut payload = label.as_bytes().to_vec();
    payload.resize(64, 0);
    frame(destination, source, 0x88b5, &payload)
}

/// Whether a frame carries the label.
pub fn has_label(frame: &[u8], label: &str) -> bool {
    frame.len() > 14 && frame[12..14] == [0x88, 0xb5] && frame[14..].starts_with(label.as_bytes())
}

/// A generated list of frames: what each is, and its bytes. At least 200, none longer than the network takes.
pub fn zoo(destination: MacAddr, source: MacAddr, mtu: usize) -> Vec<(String, Vec<u8>)> {
    let mut frames = Vec::new();
    let body = |len: usize, seed: usize| -> Vec<u8> { (0..len).map(|i| (i * 31 + seed * 7 + 5) as u8).collect() };
    // Any EtherType, known or not; below 0x0600 it is an 802.3 length.
    for (index, ethertype) in [
        0x0000, 0x0026, 0x05dc, 0x0600, 0x0800, 0x0801, 0x0806, 0x0842, 0x22f3, 0x6003, 0x8035, 0x809b, 0x80f3, 0x8137, 0x86dd,
        0x8808, 0x8809, 0x8847, 0x8848, 0x8863, 0x8864, 0x886d, 0x8870, 0x887b, 0x888e, 0x8892, 0x889a, 0x88a2, 0x88a4, 0x88ab,
        0x88b5, 0x88b6, 0x88b7, 0x88cc, 0x88cd, 0x88e1, 0x88e3, 0x88e5, 0x88e7, 0x88f7, 0x88f8, 0x8902, 0x8906, 0x8914, 0x8915,
        0x891d, 0x892f, 0x9000, 0xf1c1, 0xffff,
    ]
    .into_iter()
    .enumerate()
    {
        frames.push((format!("ethertype {ethertype:#06x}"), frame(destination, source, ethertype, &body(46 + index, index))));
    }
    // Every length near the edges, and steps between.
    for len in (0..=64).step_by(4).chain((100..mtu).step_by(61)).chain([mtu - 2, mtu - 1, mtu]) {
        frames.push((format!("payload of {len} bytes"), frame(destination, source, 0x88b5, &body(len, len))));
    }
    // VLAN tags: identifiers, priorities, drop eligibility, two tags, three tags, a tag cut off.
    for tci in [0x0000u16, 0x0001, 0x0002, 0x0fff, 0x1001, 0x2005, 0x3064, 0x5190, 0x7ffe, 0x8001, 0x9fff, 0xe00a, 0xf001, 0xffff]
    {
        let mut tagged = tci.to_be_bytes().to_vec();
        tagged.extend(0x88b5u16.to_be_bytes());
        tagged.extend(body(60, usize::from(tci)));
        frames.push((format!("802.1Q tci {tci:#06x}"), frame(destination, source, 0x8100, &tagged)));
        frames.push((format!("802.1ad tci {tci:#06x}"), frame(destination, source, 0x88a8, &tagged)));
        let mut double = tci.to_be_bytes().to_vec();
        double.extend(0x8100u16.to_be_bytes());
        double.extend(&tagged);
        frames.push((format!("QinQ outer {tci:#06x}"), frame(destination, source, 0x88a8, &double)));
        frames.push((format!("802.1Q in 802.1Q {tci:#06x}"), frame(destination, source, 0x8100, &double)));
    }
    // IPv4 and IPv6, with headers that are right, wrong, fragmented, with options, of unknown protocols.
    for (index, protocol) in [0u8, 1, 2, 6, 17, 41, 47, 50, 51, 58, 89, 112, 115, 132, 136, 253, 255].into_iter().enumerate() {
        let mut ip = vec![0x45, 0, 0, 84, 0, index as u8, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        ip.extend(body(64, index));
        frames.push((format!("IPv4 protocol {protocol}, checksum left wrong"), frame(destination, source, 0x0800, &ip)));
        let mut fragment = ip.clone();
        fragment[6..8].copy_from_slice(&[0x20, 0x10]);
        frames.push((format!("IPv4 fragment of protocol {protocol}"), frame(destination, source, 0x0800, &fragment)));
        let mut six = vec![0x60, 0, 0, 0, 0, 64, protocol, 64];
        six.extend([0xfd; 32]);
        six.extend(body(64, index));
        frames.push((format!("IPv6 next header {protocol}"), frame(destination, source, 0x86dd, &six)));
    }
    for (what, first) in [("IPv4 with 40 bytes of options", 0x4f), ("IPv4 of header length 0", 0x40), ("IPv4 of version 7", 0x75)]
    {
        let mut ip = body(120, 1);
        ip[0] = first;
        frames.push((what.to_owned(), frame(destination, source, 0x0800, &ip)));
    }
    // ARP as it should be and as it should not.
    for operation in [0u16, 1, 2, 3, 4, 8, 9, 25, 0xffff] {
        let mut arp = vec![0, 1, 8, 0, 6, 4];
        arp.extend(operation.to_be_bytes());
        arp.extend(body(20, usize::from(operation)));
        frames.push((format!("ARP operation {operation}"), frame(destination, source, 0x0806, &arp)));
    }
    for (what, head) in [
        ("ARP for hardware type 6", vec![0, 6, 8, 0, 6, 4, 0, 1]),
        ("ARP with addresses of 255 bytes", vec![0, 1, 8, 0, 255, 255, 0, 1]),
        ("ARP for IPv6", vec![0, 1, 0x86, 0xdd, 6, 16, 0, 1]),
    ] {
        let mut arp = head;
        arp.extend(body(40, 3));
        frames.push((what.to_owned(), frame(destination, source, 0x0806, &arp)));
    }
    // Groups: broadcast, IPv4 and IPv6 multicast, spanning tree of others, Cisco's, a locally administered group.
    for group in [
        "ff:ff:ff:ff:ff:ff",
        "01:00:5e:00:00:01",
        "01:00:5e:7f:ff:fa",
        "33:33:00:00:00:01",
        "33:33:ff:12:34:56",
        "01:00:0c:cc:cc:cd",
        "03:00:00:00:00:01",
    ] {
        let group: MacAddr = group.parse().expect("a legal MAC");
        for ethertype in [0x0800, 0x86dd, 0x88b5] {
            frames.push((format!("to group {group}, ethertype {ethertype:#06x}"), frame(group, source, ethertype, &body(70, 9))));
        }
    }
    frames
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_zoo_has_at_least_200_different_frames() {
        let frames = zoo(MacAddr([2, 0, 0, 0, 0, 2]), MacAddr([2, 0, 0, 0, 0, 1]), 1400);
        let different: std::collections::BTreeSet<_> = frames.iter().map(|(_, bytes)| bytes).collect();
        assert!(different.len() >= 200, "{}", different.len());
    }
}
