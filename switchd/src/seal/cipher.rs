//! One key of an authenticated cipher (RFC 5116), by whichever library is faster on this machine.

use std::fmt;
use violin_common::control::mesh::Aead;
use violin_common::wire::mesh::TAG_LEN;

/// Bytes of a key, of both ciphers.
pub const KEY_LEN: usize = 32;
/// Bytes of a nonce, and of the IV it is made from.
pub const IV_LEN: usize = 12;

/// Who does the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Library {
    /// `ring`: ahead with AES-NI, VAES and AVX2.
    Ring,
    /// `aws-lc-rs`: ahead with AVX-512.
    AwsLc,
}

impl Library {
    /// All there are.
    pub const ALL: [Self; 2] = [Self::Ring, Self::AwsLc];

    /// As it is written in the configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ring => "ring",
            Self::AwsLc => "aws-lc-rs",
        }
    }
}

/// A cipher and who computes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Choice {
    /// What both ends agree on.
    pub aead: Aead,
    /// Each end's own business.
    pub library: Library,
}

/// Ring's schedule lies here, not behind a pointer: each datagram reads it.
#[allow(clippy::large_enum_variant)]
enum Key {
    Ring(ring::aead::LessSafeKey),
    AwsLc(aws_lc_rs::aead::LessSafeKey),
}

/// A key and its IV. The nonce of a datagram is the IV with the packet number exclusive-ored into its end (RFC 8446 §5.3).
pub struct Cipher {
    key: Key,
    iv: [u8; IV_LEN],
}

impl fmt::Debug for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cipher").finish_non_exhaustive()
    }
}

impl Cipher {
    /// A cipher ready for use. `None` cannot happen with keys of [`KEY_LEN`] bytes, which both libraries take.
    pub fn new(choice: Choice, key: &[u8; KEY_LEN], iv: [u8; IV_LEN]) -> Option<Self> {
        let key = match choice.library {
            Library::Ring => {
                use ring::aead::{AES_256_GCM, CHACHA20_POLY1305, LessSafeKey, UnboundKey};
                let algorithm = match choice.aead {
                    Aead::Aes256Gcm => &AES_256_GCM,
                    Aead::ChaCha20Poly1305 => &CHACHA20_POLY1305,
                };
                Key::Ring(LessSafeKey::new(UnboundKey::new(algorithm, key).ok()?))
            }
            Library::AwsLc => {
                use aws_lc_rs::aead::{AES_256_GCM, CHACHA20_POLY1305, LessSafeKey, UnboundKey};
                let algorithm = match choice.aead {
                    Aead::Aes256Gcm => &AES_256_GCM,
                    Aead::ChaCha20Poly1305 => &CHACHA20_POLY1305,
                };
                Key::AwsLc(LessSafeKey::new(UnboundKey::new(algorithm, key).ok()?))
            }
        };
        Some(Self { key, iv })
    }

    fn nonce(&self, number: u64) -> [u8; IV_LEN] {
        let mut nonce = self.iv;
        for (byte, number) in nonce[IV_LEN - 8..].iter_mut().zip(number.to_be_bytes()) {
            *byte ^= number;
        }
        nonce
    }

    /// Encrypts `body` in place and returns its tag, which covers `head` too. `None`: larger than the cipher takes, which no
    /// datagram is.
    pub(super) fn seal(&self, number: u64, head: &[u8], body: &mut [u8]) -> Option<[u8; TAG_LEN]> {
        let nonce = self.nonce(number);
        let mut out = [0; TAG_LEN];
        match &self.key {
            Key::Ring(key) => {
                use ring::aead::{Aad, Nonce};
                let nonce = Nonce::assume_unique_for_key(nonce);
                out.copy_from_slice(key.seal_in_place_separate_tag(nonce, Aad::from(head), body).ok()?.as_ref());
            }
            Key::AwsLc(key) => {
                use aws_lc_rs::aead::{Aad, Nonce};
                let nonce = Nonce::assume_unique_for_key(nonce);
                out.copy_from_slice(key.seal_in_place_separate_tag(nonce, Aad::from(head), body).ok()?.as_ref());
            }
        }
        Some(out)
    }

    /// Does what sealing does, for those who want to know how long that takes.
    pub fn seal_for_measuring(&self, number: u64, body: &mut [u8]) -> Option<[u8; TAG_LEN]> {
        self.seal(number, &[0; violin_common::wire::mesh::OUTER_LEN], body)
    }

    /// Decrypts `sealed`, a body with its tag behind it, in place. `None`: not made with this key, number and head; the bytes
    /// are spoilt then.
    pub(super) fn open<'b>(&self, number: u64, head: &[u8], sealed: &'b mut [u8]) -> Option<&'b mut [u8]> {
        let nonce = self.nonce(number);
        match &self.key {
            Key::Ring(key) => {
                use ring::aead::{Aad, Nonce};
                key.open_in_place(Nonce::assume_unique_for_key(nonce), Aad::from(head), sealed).ok()
            }
            Key::AwsLc(key) => {
                use aws_lc_rs::aead::{Aad, Nonce};
                key.open_in_place(Nonce::assume_unique_for_key(nonce), Aad::from(head), sealed).ok()
            }
        }
    }
}
