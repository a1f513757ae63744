//! Messages on a QUIC stream: a length of four bytes, network order, then that many bytes of postcard.

use quinn::{ReadExactError, RecvStream, SendStream};
use serde::{Serialize, de::DeserializeOwned};

/// Longest message, in bytes.
pub const MAX: usize = 1 << 20;

/// A message could not be sent or understood.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Longer than [`MAX`]: ours was not sent, theirs was not read.
    #[error("got a message of {0} bytes, want at most 1048576")]
    TooLong(usize),
    /// The bytes are not the message that was expected here.
    #[error("could not read a message of {len} bytes: {why}; do both ends run the same version?")]
    Malformed {
        /// Its length.
        len: usize,
        /// What postcard says.
        why: postcard::Error,
    },
    /// The stream ended in the middle of a message.
    #[error("the stream ended in the middle of a message")]
    Cut,
    /// The stream or its connection broke.
    #[error("the stream broke: {0}")]
    Broken(String),
}

/// A message as it travels.
///
/// *Errors*: [`FrameError::TooLong`].
pub fn encode<T: Serialize + ?Sized>(message: &T) -> Result<Vec<u8>, FrameError> {
    let mut bytes = postcard::to_extend(message, vec![0; 4]).map_err(|why| FrameError::Malformed { len: 0, why })?;
    let len = bytes.len() - 4;
    let Some(prefix) = u32::try_from(len).ok().filter(|_| len <= MAX) else { return Err(FrameError::TooLong(len)) };
    bytes[..4].copy_from_slice(&prefix.to_be_bytes());
    Ok(bytes)
}

/// Sends one message.
pub async fn send<T: Serialize + ?Sized>(stream: &mut SendStream, message: &T) -> Result<(), FrameError> {
    let bytes = encode(message)?;
    stream.write_all(&bytes).await.map_err(|error| FrameError::Broken(error.to_string()))
}

/// Waits for one message.
///
/// `None`: the other end finished the stream behind a whole message. After an error the stream must not be read again.
/// Cancelling it in the middle of a message loses the message's place: do not use it as a branch of `select!` in a loop.
pub async fn recv<T: DeserializeOwned>(stream: &mut RecvStream) -> Result<Option<T>, FrameError> {
    let mut prefix = [0; 4];
    match stream.read_exact(&mut prefix).await {
        Ok(()) => {}
        Err(ReadExactError::FinishedEarly(0)) => return Ok(None),
        Err(ReadExactError::FinishedEarly(_)) => return Err(FrameError::Cut),
        Err(ReadExactError::ReadError(error)) => return Err(FrameError::Broken(error.to_string())),
    }
    let len = u32::from_be_bytes(prefix) as usize;
    if len > MAX {
        return Err(FrameError::TooLong(len));
    }
    // Grows with what really arrives: a length alone reserves nothing.
    let mut bytes = Vec::new();
    while bytes.len() < len {
        match stream.read_chunk(len - bytes.len(), true).await {
            Ok(Some(chunk)) => bytes.extend_from_slice(&chunk.bytes),
            Ok(None) => return Err(FrameError::Cut),
            Err(error) => return Err(FrameError::Broken(error.to_string())),
        }
    }
    match postcard::take_from_bytes(&bytes) {
        // Bytes behind the message are what a newer version appended to it.
        Ok((message, _)) => Ok(Some(message)),
        Err(why) => Err(FrameError::Malformed { len, why }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_preceded_by_its_length() {
        assert_eq!(encode(&(1u8, 2u8)).unwrap(), [0, 0, 0, 2, 1, 2]);
    }

    #[test]
    fn a_message_over_one_mebibyte_is_not_sent() {
        assert!(matches!(encode(&vec![0u8; MAX]), Err(FrameError::TooLong(_))));
    }
}
