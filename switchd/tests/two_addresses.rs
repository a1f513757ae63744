//! Hosts with two addresses that listen on all of them: whoever joins by the second one is answered from there. Needs root.
#![cfg(feature = "io")]

mod support;

use support::bulk::there_and_back;
use support::site::Site;
use support::until;

/// Two hosts; the first listens on `[::]` or 0.0.0.0 and is joined by the address from which its kernel would not answer.
fn joined_by_the_second_address(wildcard: &str, first: &str, second: &str, caller: &str) {
    let mut site = Site::new(2);
    let plain = |address: &str| address.trim_matches(['[', ']']).to_owned();
    let prefix = if caller.starts_with('[') { 64 } else { 24 };
    for (number, addresses) in [(1, &[first, second][..]), (2, &[caller][..])] {
        site.hosts[&number].run("ip addr flush dev u0");
        for address in addresses {
            let address = plain(address);
            let nodad = if prefix == 64 { "nodad" } else { "" };
            // The kernel chooses the first of IPv4, and of IPv6 none that is on its way out.
            let lifetime = if prefix == 64 && address == plain(second) { "preferred_lft 0" } else { "" };
            site.hosts[&number].run(&format!("ip addr add {address}/{prefix} dev u0 {lifetime} {nodad}"));
        }
    }
    site.listens.insert(1, wildcard.to_owned());
    site.listens.insert(2, caller.to_owned());
    site.joins.insert(2, vec![format!("{second}:7471")]);
    for number in [1, 2] {
        site.guest(number);
        site.start(number);
    }

    until("both are connected", || (1..=2).all(|number| site.connected(number) == 1));
    assert_eq!(site.peers(2)[0].address.to_string(), format!("{second}:7471"));
    let (g1, g2) = (&site.guests[&1], &site.guests[&2]);
    assert_eq!(there_and_back(g1, g2, [192, 168, 5, 2].into(), 1 << 20), Ok(()));
    assert_eq!(there_and_back(g2, g1, [192, 168, 5, 1].into(), 1 << 20), Ok(()));
    for number in [1, 2] {
        assert_eq!(site.counter(number, "drop.wrong-address"), 0, "at h{number}");
        assert_eq!(site.counter(number, "drop.tunnel-error"), 0, "at h{number}");
    }
}

#[test]
#[ignore = "needs root"]
fn a_host_joined_by_its_second_ipv4_address_answers_from_it() {
    joined_by_the_second_address("0.0.0.0", "10.71.0.101", "10.71.0.1", "10.71.0.2");
}

#[test]
#[ignore = "needs root"]
fn a_host_that_listens_with_ipv6_and_is_joined_by_its_second_ipv4_address_answers_from_it() {
    joined_by_the_second_address("[::]", "10.71.0.101", "10.71.0.1", "10.71.0.2");
}

#[test]
#[ignore = "needs root"]
fn a_host_joined_by_its_second_ipv6_address_answers_from_it() {
    joined_by_the_second_address("[::]", "[fd71::101]", "[fd71::1]", "[fd71::2]");
}
