use super::*;
use crate::tables::{PeerSlot, PortSlot};
use proptest::prelude::*;

const AGEING: Duration = Duration::from_secs(300);
const PORT: Place = Place::Port(PortSlot(1));
const PEER: Place = Place::Peer(PeerSlot(1));

fn mac(number: u64) -> MacAddr {
    MacAddr::from_u64(0x5254_0000_0000 | number)
}

fn at(seconds: u64) -> Instant {
    Instant(seconds * 1_000_000_000)
}

#[test]
fn what_is_learned_is_found_until_it_ages() {
    let fdb = Fdb::default();
    assert_eq!(fdb.learn(at(1), 0, mac(1), PORT), Learned::New);
    assert_eq!(fdb.lookup(at(300), 0, mac(1), AGEING), Some(PORT));
    assert_eq!(fdb.lookup(at(301), 0, mac(1), AGEING), None);
    assert_eq!(fdb.age(at(301), AGEING), 1);
    assert!(fdb.is_empty());
}

#[test]
fn the_first_frame_from_a_new_place_moves_the_entry() {
    let fdb = Fdb::default();
    fdb.learn(at(1), 0, mac(1), PORT);
    assert_eq!(fdb.learn(at(2), 0, mac(1), PEER), Learned::Moved { from: PORT });
    assert_eq!(fdb.lookup(at(2), 0, mac(1), AGEING), Some(PEER));
    assert_eq!(fdb.flush_place(PORT), 0);
    assert_eq!(fdb.flush_place(PEER), 1);
}

#[test]
fn an_announcement_corrects_what_is_settled_and_disputes_what_is_fresh() {
    let fdb = Fdb::default();
    let elsewhere = Place::Peer(PeerSlot(2));
    fdb.correct(at(1), 0, mac(1), PEER, AGEING);
    assert!(fdb.is_empty(), "an announcement fills no table");
    fdb.learn(at(1), 0, mac(1), PEER);
    fdb.learn(at(9), 0, mac(1), PEER);
    fdb.correct(at(9), 0, mac(1), elsewhere, AGEING);
    assert_eq!(fdb.lookup(at(9), 0, mac(1), AGEING), Some(elsewhere), "it had been there for long");
    fdb.correct(at(9), 0, mac(1), elsewhere, AGEING);
    assert_eq!(fdb.lookup(at(9), 0, mac(1), AGEING), Some(elsewhere), "agreement changes nothing");
    fdb.correct(at(9), 0, mac(1), PEER, AGEING);
    assert_eq!(fdb.lookup(at(9), 0, mac(1), AGEING), None, "either may be the older one: flood");
}

#[test]
fn vlans_learn_apart() {
    let fdb = Fdb::default();
    fdb.learn(at(1), 5, mac(1), PORT);
    assert_eq!(fdb.lookup(at(1), 0, mac(1), AGEING), None);
    assert_eq!(fdb.lookup(at(1), 5, mac(1), AGEING), Some(PORT));
}

#[test]
fn group_and_zero_addresses_are_never_learned() {
    let fdb = Fdb::default();
    for bad in [MacAddr::BROADCAST, MacAddr([1, 0, 0x5e, 0, 0, 1]), MacAddr([0; 6])] {
        assert_eq!(fdb.learn(at(1), 0, bad, PORT), Learned::Refused);
    }
    assert!(fdb.is_empty());
}

#[test]
fn a_noisy_place_pushes_out_its_own_entries_only() {
    let fdb = Fdb::new(64);
    for number in 0..8 {
        fdb.learn(at(1), 0, mac(number), PORT);
    }
    for number in 100..100_000 {
        fdb.learn(at(2), 0, mac(number), PEER);
    }
    assert_eq!(fdb.len(), 64);
    for number in 0..8 {
        assert_eq!(fdb.lookup(at(2), 0, mac(number), AGEING), Some(PORT));
    }
}

#[test]
fn a_flapping_mac_stays_put_for_a_while() {
    let fdb = Fdb::default();
    let places = [PORT, PEER];
    for turn in 0..=FLAP_LIMIT as usize {
        assert_ne!(fdb.learn(at(1), 0, mac(1), places[turn % 2]), Learned::Flapping);
    }
    assert_eq!(fdb.learn(at(1), 0, mac(1), places[(FLAP_LIMIT as usize + 1) % 2]), Learned::Flapping);
    assert!(matches!(fdb.learn(at(3), 0, mac(1), places[(FLAP_LIMIT as usize + 1) % 2]), Learned::Moved { .. }));
}

proptest! {
    #[test]
    fn counts_and_queues_stay_true_and_bounded(steps in proptest::collection::vec((0u64..40, 0u16..4, 0u64..600), 0..400)) {
        let fdb = Fdb::new(16);
        for (number, place, second) in steps {
            let place = Place::Port(PortSlot(place));
            let learned = fdb.learn(at(second), 0, mac(number), place);
            if learned != Learned::Flapping {
                prop_assert_eq!(fdb.lookup(at(second), 0, mac(number), AGEING), Some(place));
            }
            prop_assert!(fdb.len() <= 16);
            let inner = fdb.lock();
            let counted: usize = inner.places.values().map(|(count, _)| count).sum();
            prop_assert_eq!(counted, inner.entries.len());
            for (count, queue) in inner.places.values() {
                prop_assert!(queue.len() <= 2 * count + 17);
            }
        }
    }
}
