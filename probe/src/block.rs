//! The blocks of a checksummed transfer: bytes in, bytes out.
//!
//! A stream is blocks of a header (`VTRB`, length u32, sequence u64, SHA-256 of sequence and data) and data, then an end: a
//! header of length 0 whose sequence is the number of blocks and whose digest is that of all digests in their order.

use sha2::{Digest, Sha256};

/// Length of a block's header, in bytes.
pub const HEADER: usize = 48;
/// Longest data of a block, in bytes.
pub const MAX_DATA: usize = 65_536;

const MAGIC: [u8; 4] = *b"VTRB";

/// Makes blocks.
#[derive(Debug, Default)]
pub struct Writer {
    sequence: u64,
    offset: u64,
    digests: Sha256,
}

impl Writer {
    /// The next block, header and data. `corrupt_at` is a place in the stream's data: if it lies in this block, that byte
    /// is changed after it was hashed.
    pub fn block(&mut self, length: usize, corrupt_at: Option<u64>) -> Vec<u8> {
        let mut block = vec![0; HEADER];
        let mut state = self.sequence.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        while block.len() < HEADER + length {
            // xorshift: data that neither repeats nor compresses.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            block.extend_from_slice(&state.to_be_bytes());
        }
        block.truncate(HEADER + length);
        let digest = digest(self.sequence, &block[HEADER..]);
        self.digests.update(digest);
        block[..HEADER].copy_from_slice(&header(length, self.sequence, &digest));
        if let Some(within) =
            corrupt_at.and_then(|at| usize::try_from(at.checked_sub(self.offset)?).ok()).filter(|at| *at < length)
        {
            block[HEADER + within] ^= 1;
        }
        self.sequence += 1;
        self.offset += length as u64;
        block
    }

    /// The end of the stream.
    pub fn end(self) -> [u8; HEADER] {
        header(0, self.sequence, &self.digests.finalize().into())
    }
}

/// Checks blocks.
#[derive(Debug, Default)]
pub struct Checker {
    sequence: u64,
    digests: Sha256,
}

/// What a header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Header {
    /// So many bytes of data follow; to be checked against the digest.
    Block(usize, [u8; 32]),
    /// The stream is over and whole.
    End,
}

impl Checker {
    /// Reads a header.
    ///
    /// Errors: it is none, out of order, or the end does not fit what came.
    pub fn header(&self, header: &[u8; HEADER]) -> Result<Header, String> {
        if header[..4] != MAGIC {
            return Err(format!("block {}: got magic {:02x?}, want {MAGIC:02x?}", self.sequence, &header[..4]));
        }
        let number = |bytes: &[u8]| bytes.iter().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
        let length = usize::try_from(number(&header[4..8])).unwrap_or(usize::MAX);
        let sequence = number(&header[8..16]);
        if sequence != self.sequence {
            return Err(format!("got block {sequence}, want {}", self.sequence));
        }
        let mut digest = [0; 32];
        digest.copy_from_slice(&header[16..]);
        match length {
            0 if self.digests.clone().finalize()[..] == digest => Ok(Header::End),
            0 => Err("the end's checksum differs from that of the blocks received".into()),
            1..=MAX_DATA => Ok(Header::Block(length, digest)),
            _ => Err(format!("block {sequence}: got {length} bytes, want at most {MAX_DATA}")),
        }
    }

    /// Checks a block's data.
    ///
    /// Errors: it is not what was hashed; the stream may be read on.
    pub fn data(&mut self, data: &[u8], wanted: &[u8; 32]) -> Result<(), String> {
        let got = digest(self.sequence, data);
        self.digests.update(got);
        self.sequence += 1;
        if got == *wanted { Ok(()) } else { Err(format!("block {}: checksum differs", self.sequence - 1)) }
    }
}

fn digest(sequence: u64, data: &[u8]) -> [u8; 32] {
    Sha256::new().chain_update(sequence.to_be_bytes()).chain_update(data).finalize().into()
}

fn header(length: usize, sequence: u64, digest: &[u8; 32]) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..4].copy_from_slice(&MAGIC);
    header[4..8].copy_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
    header[8..16].copy_from_slice(&sequence.to_be_bytes());
    header[16..].copy_from_slice(digest);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(stream: &[u8]) -> Result<u64, String> {
        let (mut checker, mut at, mut bytes) = (Checker::default(), 0, 0);
        loop {
            let header = stream.get(at..at + HEADER).ok_or("cut short")?.try_into().map_err(|_| "cut short")?;
            at += HEADER;
            match checker.header(header)? {
                Header::End => return Ok(bytes),
                Header::Block(length, digest) => {
                    checker.data(stream.get(at..at + length).ok_or("cut short")?, &digest)?;
                    at += length;
                    bytes += length as u64;
                }
            }
        }
    }

    fn stream(corrupt_at: Option<u64>) -> Vec<u8> {
        let mut writer = Writer::default();
        let mut stream = Vec::new();
        for length in [1, 1000, 7, 300] {
            stream.extend(writer.block(length, corrupt_at));
        }
        stream.extend(writer.end());
        stream
    }

    #[test]
    fn a_whole_stream_is_intact() {
        assert_eq!(check(&stream(None)), Ok(1308));
    }

    #[test]
    fn one_byte_changed_anywhere_after_hashing_is_noticed() {
        for at in [0, 1, 500, 1000, 1001, 1307] {
            assert!(check(&stream(Some(at))).is_err(), "data byte {at}");
        }
        let whole = stream(None);
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 0x10;
            assert!(check(&changed).is_err(), "stream byte {at}");
        }
    }

    #[test]
    fn a_stream_cut_short_or_with_a_block_missing_is_noticed() {
        let whole = stream(None);
        assert!(check(&whole[..whole.len() - 1]).is_err());
        let mut without = whole[..HEADER + 1].to_vec();
        without.extend(&whole[HEADER + 1 + HEADER + 1000..]);
        assert!(check(&without).is_err());
    }
}
