//! The Unix socket for operators and neighbours: one JSON value a line, requests in, [`Response`] lines out.
//!
//! A connection may ask several times, one after the other. Only the daemon's own user can open the socket. Askers are bounded: the
//! one that has been idle for longest goes to make room for another.

pub mod blocking;
mod idle;

use crate::seldom::Seldom;
use idle::Idle;
use serde::{Serialize, de::DeserializeOwned};
use std::future::Future;
use std::io;
use std::marker::PhantomData;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use violin_common::api::Response;

/// Longest line, in bytes.
pub const MAX_LINE: u64 = 4 << 20;

/// A bound socket; its file is removed when this is dropped.
#[derive(Debug)]
pub struct Listener {
    inner: UnixListener,
    path: PathBuf,
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

const EMFILE: i32 = nix::errno::Errno::EMFILE as i32;
const ENFILE: i32 = nix::errno::Errno::ENFILE as i32;

/// How long a killed daemon may take to let go of its socket: it does when its last thread has ended.
const LET_GO: Duration = Duration::from_secs(3);

/// Whether there is nothing at a path but a socket, if anything.
///
/// *Errors*: something else is there, which is left alone.
pub fn must_be_socket(path: &Path) -> io::Result<()> {
    match path.symlink_metadata() {
        Ok(found) if !found.file_type().is_socket() => {
            let words =
                format!("got {} for the local socket, which is there and is no socket: want another path", path.display());
            Err(io::Error::new(io::ErrorKind::AlreadyExists, words))
        }
        _ => Ok(()),
    }
}

/// Binds the socket, mode 0600. A socket nobody listens on, as a killed daemon leaves it, is replaced; for one that dies just now
/// it waits.
///
/// *Errors*: somebody listens there already, or the directory cannot be made or written.
pub fn bind(path: &Path) -> io::Result<Listener> {
    let explain = |what: &str, error: io::Error| io::Error::new(error.kind(), format!("{what} {}: {error}", path.display()));
    if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        std::fs::create_dir_all(directory).map_err(|error| explain("could not make the directory of", error))?;
    }
    let deadline = Instant::now() + LET_GO;
    let mut answer = std::os::unix::net::UnixStream::connect(path);
    while answer.is_ok() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
        answer = std::os::unix::net::UnixStream::connect(path);
    }
    match answer {
        Ok(_) => {
            let taken = format!("somebody listens on {} already: stop it, or choose another `socket`", path.display());
            return Err(io::Error::new(io::ErrorKind::AddrInUse, taken));
        }
        // Told of anything else that is there, too.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            must_be_socket(path)?;
            std::fs::remove_file(path).map_err(|error| explain("could not remove the stale socket", error))?;
        }
        Err(_) => {}
    }
    let inner = UnixListener::bind(path).map_err(|error| explain("could not bind", error))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .map_err(|error| explain("could not restrict", error))?;
    Ok(Listener { inner, path: path.to_owned() })
}

/// The asker has hung up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the asker has hung up")]
pub struct HungUp;

/// Where answers to one request go: one, or many for a watching request.
#[derive(Debug)]
pub struct Sink<A> {
    lines: mpsc::Sender<Vec<u8>>,
    answer: PhantomData<fn(A)>,
}

impl<A> Clone for Sink<A> {
    fn clone(&self) -> Self {
        Self { lines: self.lines.clone(), answer: PhantomData }
    }
}

impl<A: Serialize> Sink<A> {
    /// Sends one line.
    pub async fn send(&self, answer: Response<A>) -> Result<(), HungUp> {
        let line = line_of(&answer).unwrap_or_else(|error| {
            let error = Response::<()>::Error(format!("could not write the answer: {error}"));
            line_of(&error).unwrap_or_default()
        });
        self.lines.send(line).await.map_err(|_| HungUp)
    }

    /// Sends a result.
    pub async fn finish(&self, result: Result<A, String>) -> Result<(), HungUp> {
        self.send(match result {
            Ok(answer) => Response::Ok(answer),
            Err(words) => Response::Error(words),
        })
        .await
    }

    /// Waits until the asker has hung up.
    pub async fn closed(&self) {
        self.lines.closed().await;
    }
}

fn line_of<T: Serialize>(value: &T) -> serde_json::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(line)
}

/// Askers at a time at most.
pub const ASKERS: usize = 256;

/// Serves requests for ever: `handler` is called for each and answers through its sink.
///
/// A handler is carried to its end even if the asker hangs up; one that watches should end when the sink says so.
pub async fn serve<Q, A, H, F>(listener: Listener, handler: H)
where
    Q: DeserializeOwned + Send + 'static,
    A: Serialize + Send + 'static,
    H: Fn(Q, Sink<A>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let (idle, room, said) = (Idle::default(), Arc::new(Semaphore::new(ASKERS)), Seldom::default());
    loop {
        match listener.inner.accept().await {
            Ok((stream, _)) => {
                let place = match Arc::clone(&room).try_acquire_owned() {
                    Ok(place) => Some(place),
                    // Whoever has asked for nothing for longest goes, at once.
                    Err(_) if idle.close_oldest() => Arc::clone(&room).acquire_owned().await.ok(),
                    Err(_) => None,
                };
                let Some(place) = place else {
                    tokio::spawn(tell_full(stream));
                    continue;
                };
                let (handler, idle) = (handler.clone(), idle.clone());
                tokio::spawn(async move {
                    let _place = place;
                    if let Err(error) = converse(stream, handler, idle).await {
                        tracing::debug!(%error, "local connection ended");
                    }
                });
            }
            Err(error) => {
                let full = matches!(error.raw_os_error(), Some(code) if [EMFILE, ENFILE].contains(&code));
                let closed = full && idle.close_oldest();
                if let Some(unsaid) = said.due(Instant::now(), &error.to_string()) {
                    let advice =
                        if full { "; idle askers are closed; want a higher limit (LimitNOFILE), or fewer askers" } else { "" };
                    tracing::warn!(unsaid, "could not accept a local connection: {error}{advice}");
                }
                // What was closed is free in a moment; others may free some, too.
                tokio::time::sleep(Duration::from_millis(if closed { 5 } else { 100 })).await;
            }
        }
    }
}

async fn tell_full(mut stream: UnixStream) {
    let words = format!("got one more asker than {ASKERS} that all wait for answers: ask again when some have ended");
    let line = line_of(&Response::<()>::Error(words)).unwrap_or_default();
    let _ = tokio::time::timeout(Duration::from_secs(1), stream.write_all(&line)).await;
}

async fn converse<Q, A, H, F>(mut stream: UnixStream, handler: H, idle: Idle) -> io::Result<()>
where
    Q: DeserializeOwned + Send + 'static,
    A: Serialize + Send + 'static,
    H: Fn(Q, Sink<A>) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let mut rest = Vec::new();
    loop {
        let waiting = idle.begin();
        let line = tokio::select! {
            line = read_line(&mut stream, &mut rest) => line?,
            () = waiting.closed() => {
                let words = "the connection was idle and was closed to make room for others: ask again".to_owned();
                stream.write_all(&line_of(&Response::<()>::Error(words))?).await?;
                return Ok(());
            }
        };
        drop(waiting);
        let Some(line) = line else { return Ok(()) };
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let (lines, mut answers) = mpsc::channel(64);
        let sink = Sink { lines, answer: PhantomData };
        match serde_json::from_slice::<Q>(&line) {
            Ok(request) => {
                tokio::spawn(handler(request, sink));
            }
            Err(error) => {
                let words = format!("could not read the request: {error}");
                let _ = sink.send(Response::Error(words)).await;
                drop(sink);
            }
        }
        loop {
            tokio::select! {
                answer = answers.recv() => match answer {
                    Some(line) => stream.write_all(&line).await?,
                    None => break,
                },
                () = hung_up(&stream) => return Ok(()),
            }
        }
    }
}

/// Ends when the other end is closed for good; one that has only finished asking still reads.
async fn hung_up(stream: &UnixStream) {
    loop {
        match stream.ready(Interest::WRITABLE).await {
            Ok(ready) if !ready.is_write_closed() => tokio::time::sleep(std::time::Duration::from_millis(200)).await,
            _ => return,
        }
    }
}

async fn read_line(stream: &mut UnixStream, rest: &mut Vec<u8>) -> io::Result<Option<Vec<u8>>> {
    let mut searched = 0;
    loop {
        if let Some(end) = rest[searched..].iter().position(|&byte| byte == b'\n') {
            let tail = rest.split_off(searched + end + 1);
            return Ok(Some(std::mem::replace(rest, tail)));
        }
        searched = rest.len();
        if rest.len() as u64 > MAX_LINE {
            return Err(io::Error::other("a request line of more than 4 MiB"));
        }
        if stream.read_buf(rest).await? == 0 {
            return Ok((!rest.is_empty()).then(|| std::mem::take(rest)));
        }
    }
}

/// In words: what could not be reached and what to look at.
fn unreachable(path: &Path, error: &io::Error) -> String {
    let daemon = path.file_stem().map_or_else(|| "the daemon".into(), |stem| stem.to_string_lossy());
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            format!("cannot reach {daemon} at {}: is it running?", path.display())
        }
        io::ErrorKind::PermissionDenied => {
            format!("cannot reach {daemon} at {}: permission denied; ask as the user it runs as", path.display())
        }
        _ => format!("cannot reach {daemon} at {}: {error}", path.display()),
    }
}

fn broke(path: &Path, error: &dyn std::fmt::Display) -> String {
    format!("the connection to {} broke: {error}", path.display())
}

fn answer_in<A: DeserializeOwned>(path: &Path, line: &[u8]) -> Result<A, String> {
    serde_json::from_slice::<Response<A>>(line)
        .map_err(|error| format!("could not read the answer of {}: {error}; do both run the same version?", path.display()))
        .and_then(Result::from)
}

/// Asks once and waits for the one answer.
pub async fn ask<Q: Serialize, A: DeserializeOwned>(path: &Path, request: &Q) -> Result<A, String> {
    watch(path, request).await?.next().await.unwrap_or_else(|| Err(broke(path, &"it hung up without an answer")))
}

/// Answers of a watching request, as they come.
#[derive(Debug)]
pub struct Watch<A> {
    reader: BufReader<UnixStream>,
    path: PathBuf,
    line: Vec<u8>,
    answer: PhantomData<fn() -> A>,
}

impl<A: DeserializeOwned> Watch<A> {
    /// The next answer; `None`: the daemon has ended the connection. May be cancelled without losing anything.
    pub async fn next(&mut self) -> Option<Result<A, String>> {
        let room = MAX_LINE.saturating_sub(self.line.len() as u64);
        let read = (&mut self.reader).take(room).read_until(b'\n', &mut self.line).await;
        let line = std::mem::take(&mut self.line);
        match read {
            Ok(_) if line.is_empty() => None,
            Ok(_) if line.ends_with(b"\n") => Some(answer_in(&self.path, &line)),
            Ok(_) => Some(Err(broke(&self.path, &"in the middle of an answer"))),
            Err(error) => Some(Err(broke(&self.path, &error))),
        }
    }
}

/// Asks and hands out the answers one by one. Dropping the watch hangs up.
pub async fn watch<Q: Serialize, A: DeserializeOwned>(path: &Path, request: &Q) -> Result<Watch<A>, String> {
    let mut stream = UnixStream::connect(path).await.map_err(|error| unreachable(path, &error))?;
    let line = line_of(request).map_err(|error| format!("could not write the request: {error}"))?;
    stream.write_all(&line).await.map_err(|error| broke(path, &error))?;
    Ok(Watch { reader: BufReader::new(stream), path: path.to_owned(), line: Vec::new(), answer: PhantomData })
}
