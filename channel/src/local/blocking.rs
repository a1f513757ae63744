//! The same without a runtime, for programs that ask and print.

use super::{answer_in, broke, line_of, unreachable};
use serde::{Serialize, de::DeserializeOwned};
use std::io::{BufRead, BufReader, Write};
use std::marker::PhantomData;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// Asks once and waits for the one answer.
pub fn ask<Q: Serialize, A: DeserializeOwned>(path: &Path, request: &Q) -> Result<A, String> {
    stream(path, request)?.next().unwrap_or_else(|| Err(broke(path, &"it hung up without an answer")))
}

/// Answers of a watching request, as they come; ends when the daemon ends the connection.
#[derive(Debug)]
pub struct Stream<A> {
    reader: BufReader<UnixStream>,
    path: PathBuf,
    answer: PhantomData<fn() -> A>,
}

impl<A: DeserializeOwned> Iterator for Stream<A> {
    type Item = Result<A, String>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut line = Vec::new();
        match self.reader.read_until(b'\n', &mut line) {
            Ok(0) => None,
            Ok(_) if line.ends_with(b"\n") => Some(answer_in(&self.path, &line)),
            Ok(_) => Some(Err(broke(&self.path, &"in the middle of an answer"))),
            Err(error) => Some(Err(broke(&self.path, &error))),
        }
    }
}

/// Asks and hands out the answers one by one. Dropping the stream hangs up.
pub fn stream<Q: Serialize, A: DeserializeOwned>(path: &Path, request: &Q) -> Result<Stream<A>, String> {
    let mut socket = UnixStream::connect(path).map_err(|error| unreachable(path, &error))?;
    let line = line_of(request).map_err(|error| format!("could not write the request: {error}"))?;
    socket.write_all(&line).map_err(|error| broke(path, &error))?;
    Ok(Stream { reader: BufReader::new(socket), path: path.to_owned(), answer: PhantomData })
}
