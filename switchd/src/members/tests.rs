use super::*;
use violin_common::control::mesh::{Cipher, OLDEST, PROTOCOL};

const BOOT: u64 = 7;

fn offer() -> Option<Offer> {
    Some(Offer { ciphers: vec![Cipher { code: 1, ns: 400 }], queues: 1, plain: None })
}

fn hello(host: &str) -> Hello {
    Hello {
        oldest: OLDEST,
        newest: PROTOCOL,
        features: 0,
        host: host.parse().unwrap(),
        domain: "d1".parse().unwrap(),
        boot: BOOT,
        receiver: 1,
        reserved: 0,
        offer: offer(),
        max_datagram: 1472,
        networks: Vec::new(),
    }
}

#[test]
fn a_join_address_that_is_a_second_one_of_a_connected_member_is_called_once() {
    let (first, second) = ("10.0.0.101:7471".parse::<SocketAddr>().unwrap(), "10.0.0.1:7471".parse().unwrap());
    let (now, domain) = (Instant(1_000_000_000), "d1".parse::<DomainId>().unwrap());
    let mut members = Members::new(now, ("h2".parse().unwrap(), 1), RENEW, &[second]);
    let (came, called) = (LinkId(1), LinkId(2));
    members.connected(came, ("h1".parse().unwrap(), domain.clone()), first.into(), false, (1, offer().unwrap()));
    members.greet(now, came, hello("h1")).unwrap();
    let calls = members.due(now);
    assert_eq!(calls, [Call { address: second, expected: None }]);

    members.connected(called, ("h1".parse().unwrap(), domain), second.into(), true, (2, offer().unwrap()));
    assert_eq!(members.greet(now, called, hello("h1")), Ok(Greeted::Superseded), "the lower name's call stays");
    members.closed(now, called);
    members.called(now, &calls[0], None);

    let later = now + BACKOFF_MAX * 2;
    assert_eq!(members.due(later), []);
    assert!(members.complete(), "everybody has been reached");

    members.closed(later, came);
    let calls: BTreeSet<_> = members.due(later + BACKOFF_MAX).into_iter().map(|call| call.address).collect();
    assert_eq!(calls, BTreeSet::from([first, second]), "a lost member is looked for everywhere");
}
