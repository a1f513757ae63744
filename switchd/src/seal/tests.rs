//! Keys of both ends, and what they are derived from.

use super::cipher::{Choice, Cipher, IV_LEN, KEY_LEN, Library};
use super::schedule::{Direction, SECRET_LEN, Secret};
use super::session::Keys;
use crate::drops::DropReason;
use crate::seal::opening::Opener;
use crate::seal::sealing::{Limits, Sealer};
use proptest::prelude::*;
use std::collections::HashSet;
use std::time::Duration;
use violin_common::Instant;
use violin_common::control::mesh::Aead;
use violin_common::wire::mesh::{Kind, OUTER_LEN, Outer, TAG_LEN};

const NOW: Instant = Instant(1_000_000_000);

fn choices() -> impl Iterator<Item = Choice> {
    Aead::ALL.into_iter().flat_map(|aead| Library::ALL.map(|library| Choice { aead, library }))
}

fn ends(limits: Limits) -> (Sealer, Opener) {
    let choice = Choice { aead: Aead::Aes256Gcm, library: Library::Ring };
    let keys = |called| Keys::new(&Secret::new([9; SECRET_LEN]), called, (1, 1), choice);
    let sealer = Sealer::new(NOW, keys(true).take_sealing(0).unwrap(), limits).unwrap();
    (sealer, Opener::new(keys(false).take_opening(0).unwrap()).unwrap())
}

fn datagram(body: &[u8]) -> Vec<u8> {
    [&[0; OUTER_LEN], body, &[0; TAG_LEN]].concat()
}

/// Both libraries make the same bytes; those of RFC 8439 §2.8.2 and of NIST's first vector with a 256-bit key (CAVP
/// gcmEncryptExtIV256, count 0 with 128 bits of plaintext).
#[test]
fn the_ciphers_are_those_of_the_standards() {
    let hex = |text: &str| -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter_map(|byte| char::from(byte).to_digit(16)).map(|digit| digit as u8).collect();
        digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
    };
    let rfc = (
        Aead::ChaCha20Poly1305,
        "808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9f",
        "070000004041424344454647",
        "50515253c0c1c2c3c4c5c6c7",
        hex(
            "4c616469657320616e642047656e746c656d656e206f662074686520636c617373206f66202739393a204966204920636f756c64206f6666657220796f75206f6e6c79206f6e652074697020666f7220746865206675747572652c2073756e73637265656e20776f756c642062652069742e",
        ),
        "1ae10b594f09e26a7e902ecbd0600691",
    );
    let nist = (
        Aead::Aes256Gcm,
        "31bdadd96698c204aa9ce1448ea94ae1fb4a9a0b3c9d773b51bb1822666b8f22",
        "0d18e06c7c725ac9e362e1ce",
        "",
        hex("2db5168e932556f8089a0622981d017d"),
        "d636ac1bbedd5cc3ee727dc2ab4a9489",
    );
    for (aead, key, iv, head, plain, tag) in [rfc, nist] {
        for library in Library::ALL {
            let iv: [u8; IV_LEN] = hex(iv).try_into().unwrap();
            let key: [u8; KEY_LEN] = hex(key).try_into().unwrap();
            let cipher = Cipher::new(Choice { aead, library }, &key, iv).unwrap();
            let mut body = plain.clone();
            // Packet number 0 leaves the nonce as the IV is.
            assert_eq!(cipher.seal(0, &hex(head), &mut body).unwrap(), hex(tag)[..], "{aead:?} {library:?}");
            body.extend(hex(tag));
            assert_eq!(cipher.open(0, &hex(head), &mut body).unwrap(), plain);
        }
    }
}

#[test]
fn each_direction_queue_and_epoch_has_a_key_of_its_own() {
    let mut seen = HashSet::new();
    for (choice, direction, queue) in choices().flat_map(|choice| {
        [Direction::FromCaller, Direction::FromCalled].into_iter().flat_map(move |d| (0..3).map(move |queue| (choice, d, queue)))
    }) {
        let mut chain = super::schedule::Chain::first(&Secret::new([7; SECRET_LEN]), direction, queue, choice);
        for _ in 0..3 {
            let tag = chain.cipher().unwrap().seal(1, &[], &mut []).unwrap();
            seen.insert((choice.aead, tag));
            chain = chain.next();
        }
    }
    // The library makes no difference.
    assert_eq!(seen.len(), 2 * 2 * 3 * 3);
}

/// Frozen: both ends derive the same, of whatever version.
#[test]
fn the_schedule_is_frozen() {
    let choice = Choice { aead: Aead::Aes256Gcm, library: Library::Ring };
    let chain = super::schedule::Chain::first(&Secret::new([7; SECRET_LEN]), Direction::FromCalled, 3, choice).next();
    assert_eq!(chain.cipher().unwrap().seal(1, b"head", &mut []).unwrap(), GOLDEN);
}

/// Computed with another implementation (Python's hmac and cryptography).
const GOLDEN: [u8; TAG_LEN] = [57, 212, 91, 49, 188, 40, 206, 148, 170, 140, 212, 182, 35, 244, 57, 87];

#[test]
fn a_key_is_replaced_by_time_too_and_the_one_before_goes_after_a_while() {
    let (mut sealer, mut opener) = ends(Limits::default());
    let mut seal = |now| {
        let mut datagram = datagram(b"abc");
        sealer.seal((now, 0), (Kind::Data, 0, 5), &mut datagram).unwrap();
        datagram
    };
    let later = NOW + super::REKEY_AFTER;
    let (first, late, last) = (seal(NOW), seal(NOW), seal(NOW));
    let second = seal(later);
    let mut open = |now, mut datagram: Vec<u8>| {
        let outer = Outer::parse(&datagram).unwrap();
        opener.open(now, &outer, &mut datagram).map(|body| body.to_vec())
    };
    assert_eq!(open(NOW, first), Ok(b"abc".to_vec()));
    assert_eq!(open(later, second), Ok(b"abc".to_vec()));
    assert_eq!(open(later + super::OLD_KEY - Duration::from_millis(1), late), Ok(b"abc".to_vec()));
    assert_eq!(open(later + super::OLD_KEY, last), Err(DropReason::UnknownEpoch));
}

#[test]
fn a_large_datagram_lowers_the_limit_of_its_key() {
    let limits = Limits { after: Duration::from_secs(3600), small: 1000, large: 10 };
    let mut sealer = ends(limits).0;
    let mut seal = |len: usize| sealer.seal((NOW, 0), (Kind::Data, 0, 5), &mut vec![0; len]).map(|()| sealer.epoch());
    for _ in 0..8 {
        assert_eq!(seal(2048), Ok(0));
    }
    assert_eq!(seal(2049), Ok(0), "the ninth of ten");
    // Half of ten is passed: the second key follows, and small ones are its.
    assert_eq!(seal(2048), Ok(1));
}

proptest! {
    /// Whatever is lost, repeated or out of order: what opens is what was sealed, once, and nothing that was sealed and came
    /// within the window and the time of its key is refused.
    #[test]
    fn rekeying_loses_nothing_on_a_bad_path(order in proptest::collection::vec((0usize..6, any::<bool>()), 1..400)) {
        let limits = Limits { after: Duration::from_secs(3600), small: 40, large: 40 };
        let (mut sealer, mut opener) = ends(limits);
        let (mut under_way, mut acknowledged, mut opened) = (Vec::new(), 0, HashSet::new());
        for (number, (delay, repeated)) in order.into_iter().enumerate() {
            let mut datagram = datagram(&number.to_be_bytes());
            // The peer hears of each new key as soon as it has opened something.
            prop_assert_eq!(sealer.seal((NOW, acknowledged), (Kind::Data, 0, 5), &mut datagram), Ok(()));
            let at = under_way.len().saturating_sub(delay);
            under_way.insert(at, (number, datagram.clone()));
            if repeated {
                under_way.push((number, datagram));
            }
            while under_way.len() > 8 {
                let (number, mut datagram) = under_way.remove(0);
                let outer = Outer::parse(&datagram).unwrap();
                match opener.open(NOW, &outer, &mut datagram) {
                    Ok(body) => {
                        prop_assert_eq!(&*body, &number.to_be_bytes());
                        prop_assert!(opened.insert(number), "{} opened twice", number);
                    }
                    Err(reason) => prop_assert!(reason == DropReason::Replayed && opened.contains(&number), "{:?}", reason),
                }
                acknowledged = opener.epoch();
            }
        }
    }

    #[test]
    fn nothing_forged_opens(bytes in proptest::collection::vec(any::<u8>(), OUTER_LEN..200), epoch in 0u8..3) {
        let mut opener = ends(Limits::default()).1;
        let mut bytes = bytes;
        (bytes[0], bytes[1]) = (Kind::Data as u8, epoch);
        let outer = Outer::parse(&bytes).unwrap();
        prop_assert!(opener.open(NOW, &outer, &mut bytes).is_err());
        prop_assert_eq!(opener.epoch(), 0);
    }
}
