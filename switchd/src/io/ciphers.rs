//! Which cipher and library are fastest on this machine: measured at the start, a few milliseconds each.

use super::now;
use crate::seal::cipher::{Choice, Cipher, IV_LEN, KEY_LEN, Library};
use crate::switch::Ability;
use std::time::Duration;
use violin_common::config::switch::{AeadChoice, LibraryChoice};
use violin_common::control::mesh::Aead;

/// Bytes that are sealed: a datagram of a full segment.
const BYTES: usize = 1400;
/// Datagrams in one round; the fastest of the rounds counts, for the others were disturbed.
const ROUND: u32 = 200;
/// Rounds of each.
const ROUNDS: u32 = 12;

/// Seals and returns how long a datagram takes, in nanoseconds.
fn measure(choice: Choice) -> Option<u32> {
    let cipher = Cipher::new(choice, &[7; KEY_LEN], [7; IV_LEN])?;
    let mut body = [7; BYTES];
    let mut best = Duration::MAX;
    for _ in 0..ROUNDS {
        let began = now();
        for number in 0..ROUND {
            std::hint::black_box(cipher.seal_for_measuring(number.into(), &mut body)?);
        }
        best = best.min(now().since(began));
    }
    u32::try_from(best.as_nanos() / u128::from(ROUND)).ok()
}

/// The ciphers a configuration allows, each with the library that is faster with it here, or that it names.
pub fn abilities(aead: AeadChoice, library: LibraryChoice) -> Vec<Ability> {
    let wanted = |one: Aead| matches!(aead, AeadChoice::Auto) || aead == AeadChoice::Only(one);
    let allowed = |one: Library| match library {
        LibraryChoice::Auto => true,
        LibraryChoice::Ring => one == Library::Ring,
        LibraryChoice::AwsLcRs => one == Library::AwsLc,
    };
    let ability = |aead: Aead| {
        let of = |library| measure(Choice { aead, library }).map(|ns| Ability { choice: Choice { aead, library }, ns });
        Library::ALL.into_iter().filter(|one| allowed(*one)).filter_map(of).min_by_key(|ability| ability.ns)
    };
    Aead::ALL.into_iter().filter(|one| wanted(*one)).filter_map(ability).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_named_is_what_is_offered() {
        let all = abilities(AeadChoice::Auto, LibraryChoice::Auto);
        assert_eq!(all.iter().map(|can| can.choice.aead).collect::<Vec<_>>(), Aead::ALL);
        let one = abilities(AeadChoice::Only(Aead::ChaCha20Poly1305), LibraryChoice::AwsLcRs);
        assert_eq!(
            one.iter().map(|can| can.choice).collect::<Vec<_>>(),
            [Choice { aead: Aead::ChaCha20Poly1305, library: Library::AwsLc }]
        );
        assert!(all.iter().chain(&one).all(|can| can.ns > 0));
    }
}
