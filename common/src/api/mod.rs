//! What operators and local programs ask a daemon over its Unix socket.
//!
//! One JSON value a line: a request of the daemon in, one [`Response`] out; a watching request is answered by a line for each event
//! until the asker hangs up. The channel crate carries it.

pub mod adapt;
pub mod switch;

use serde::{Deserialize, Serialize};

/// What a daemon answers to one request: the result, or an error in words for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Response<T> {
    /// The request was carried out.
    Ok(T),
    /// It was not; got, wanted, and what to do.
    Error(String),
}

impl<T> From<Response<T>> for Result<T, String> {
    fn from(response: Response<T>) -> Self {
        match response {
            Response::Ok(value) => Ok(value),
            Response::Error(words) => Err(words),
        }
    }
}
