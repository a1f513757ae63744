//! Members that are known and cannot be reached, and hosts that disagree, are shown with why and since when. Needs root.
#![cfg(feature = "io")]

mod support;

use support::site::{Site, host};
use support::{Namespace, run, until};
use violin_common::api::switch::{PeerSeen, TroubleKind};

fn peer(site: &Site, at: usize, number: usize) -> Option<PeerSeen> {
    site.peers(at).into_iter().find(|peer| peer.host == Some(host(number)))
}

#[test]
#[ignore = "needs root"]
fn two_members_behind_one_nat_see_that_they_cannot_reach_each_other_why_and_since_when() {
    let mut site = Site::new(3);
    // Hosts 2 and 3 move behind a router with one address outside.
    let nat = Namespace::new("nat");
    let inside = Namespace::new("inside");
    inside.run("ip link add bridge0 type bridge && ip link set bridge0 up");
    let underlay = site.underlay();
    run(&format!(
        "ip -n {0} link add out type veth peer name nat netns {underlay} && ip -n {underlay} link set nat master bridge0 up && \
         ip -n {0} addr add 10.71.0.9/24 dev out && ip -n {0} link set out up && \
         ip -n {0} link add in type veth peer name nat netns {1} && ip -n {1} link set nat master bridge0 up && \
         ip -n {0} addr add 10.72.0.1/24 dev in && ip -n {0} link set in up",
        nat.0, inside.0
    ));
    nat.run("echo 1 > /proc/sys/net/ipv4/ip_forward");
    nat.run(
        "nft add table ip nat && nft add chain ip nat post \"{ type nat hook postrouting priority 100; }\" && \
             nft add rule ip nat post oifname out masquerade",
    );
    for number in [2, 3] {
        let ns = &site.hosts[&number];
        ns.run("ip link del u0");
        run(&format!(
            "ip -n {0} link add u0 mtu 1500 type veth peer name u{number} netns {1} && ip -n {1} link set u{number} master bridge0 up && \
             ip -n {0} addr add 10.72.0.{number}/24 dev u0 && ip -n {0} link set u0 up && ip -n {0} route add default via 10.72.0.1",
            ns.0, inside.0
        ));
        site.listens.insert(number, format!("10.72.0.{number}"));
        site.joins.insert(number, vec!["10.71.0.1:7471".into()]);
    }
    for number in 1..=3 {
        site.start(number);
    }
    until("both reach the one outside", || site.connected(1) == 2);

    for (at, other) in [(2, 3), (3, 2)] {
        let trouble =
            || peer(&site, at, other).and_then(|peer| peer.troubles.into_iter().find(|t| t.kind == TroubleKind::NoAnswer));
        until("it is shown, for some time", || trouble().is_some_and(|trouble| trouble.for_s >= 2));
        let seen = peer(&site, at, other).unwrap();
        assert!(!seen.connected && seen.address.ip().to_string() == "10.71.0.9", "{seen:?}");
        assert!(trouble().unwrap().why.contains("no firewall or NAT shuts"), "{seen:?}");
    }
}

#[test]
#[ignore = "needs root"]
fn hosts_that_carry_a_network_with_different_mtus_both_say_so() {
    let mut site = Site::new(2);
    site.start_with(1, "pki", "[[network]]\nvni = 5\n");
    site.start_with(2, "pki", "[[network]]\nvni = 5\nmtu = 1300\n");

    let why = |at: usize, other: usize| peer(&site, at, other).and_then(|peer| Some(peer.troubles.into_iter().next()?.why));
    until("both say so", || why(1, 2).is_some() && why(2, 1).is_some());

    for (at, other, words) in
        [(1, 2, "network 5 has MTU 1400 here and 1300 there"), (2, 1, "network 5 has MTU 1300 here and 1400 there")]
    {
        assert!(why(at, other).unwrap().starts_with(words), "{:?}", why(at, other));
        assert!(peer(&site, at, other).unwrap().connected);
        assert_eq!(site.log(at).matches(words).count(), 1, "{}", site.log(at));
    }
}
