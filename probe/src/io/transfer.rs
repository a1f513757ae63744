//! A rate-limited TCP stream of checksummed blocks: the connection no move may break.

use super::signal;
use crate::block::{Checker, HEADER, Header, MAX_DATA, Writer};
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// After so long without a byte a connection counts as broken.
pub const STALL_LIMIT: Duration = Duration::from_secs(60);
/// Blocks per second, unless the rate is so low that they would not fill a segment.
const BLOCKS_PER_SECOND: u64 = 10;
/// Data that fits one segment of any network of ours, the block's header beside it.
const SEGMENT: usize = 1200;

/// What one end saw.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TransferResult {
    /// Bytes of data, without headers.
    pub bytes: u64,
    /// Whether every block and the whole were as sent, and the end was the sender's. A sender says whether it could send all.
    pub intact: bool,
    /// What broke first.
    pub error: Option<String>,
    /// Longest time without a byte, or, at the sender, in which none could be sent.
    pub longest_stall_ms: f64,
    /// From the first to the last byte.
    pub seconds: f64,
}

/// What is to be sent.
#[derive(Debug, Clone)]
pub struct Sending {
    /// Receiver.
    pub to: SocketAddr,
    /// Bytes of data per second.
    pub rate: u64,
    /// How long; none: until told to stop.
    pub duration: Option<Duration>,
    /// Place in the data whose byte is changed after it was hashed.
    pub corrupt_at: Option<u64>,
    /// How long the receiver may take to listen.
    pub wait: Duration,
}

/// Sends until told to stop, then ends the stream properly.
pub fn send(sending: &Sending) -> TransferResult {
    let mut result = TransferResult::default();
    match send_all(sending, &mut result) {
        Ok(()) => result.intact = true,
        Err(error) => result.error = Some(error.to_string()),
    }
    result
}

fn send_all(sending: &Sending, result: &mut TransferResult) -> io::Result<()> {
    let mut stream = connect(sending)?;
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(STALL_LIMIT))?;
    let length = usize::try_from(sending.rate / BLOCKS_PER_SECOND).unwrap_or(MAX_DATA).clamp(SEGMENT, MAX_DATA);
    let interval = Duration::from_secs_f64(length as f64 / sending.rate.max(1) as f64);
    let (mut writer, begun) = (Writer::default(), Instant::now());
    let mut due = begun;
    while !signal::stopped() && sending.duration.is_none_or(|span| begun.elapsed() < span) {
        let block = writer.block(length, sending.corrupt_at);
        let before = Instant::now();
        stream.write_all(&block)?;
        result.longest_stall_ms = result.longest_stall_ms.max(before.elapsed().as_secs_f64() * 1e3);
        result.bytes += length as u64;
        result.seconds = begun.elapsed().as_secs_f64();
        due += interval;
        let now = Instant::now();
        // After a stall the rate is kept, the missed part is not caught up beyond a second.
        due = due.max(now.checked_sub(Duration::from_secs(1)).unwrap_or(now));
        std::thread::sleep(due.saturating_duration_since(now));
    }
    stream.write_all(&writer.end())?;
    stream.shutdown(std::net::Shutdown::Write)?;
    // The receiver closes when it has read all: until then the bytes may still be lost.
    stream.set_read_timeout(Some(STALL_LIMIT))?;
    match stream.read(&mut [0; 1])? {
        0 => Ok(()),
        _ => Err(io::Error::other("the receiver sent data, want none")),
    }
}

/// The receiver may be started at the same moment: it is tried until it listens.
fn connect(sending: &Sending) -> io::Result<TcpStream> {
    let deadline = Instant::now() + sending.wait;
    loop {
        let error = match TcpStream::connect_timeout(&sending.to, Duration::from_secs(5)) {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        if signal::stopped() || Instant::now() > deadline {
            let said = format!("nothing listens on {} within {} s: {error}", sending.to, sending.wait.as_secs());
            return Err(io::Error::new(error.kind(), said));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Listens on a port.
///
/// Errors: it is taken.
pub fn listen(port: u16) -> io::Result<TcpListener> {
    TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))
}

/// Receives one connection and checks it. Reads on after a wrong block, so that the sender is not broken off.
pub fn serve(listener: &TcpListener, wait: Duration) -> TransferResult {
    let mut result = TransferResult::default();
    match accept(listener, wait).and_then(|stream| receive(stream, &mut result)) {
        Ok(()) => result.intact = result.error.is_none(),
        Err(error) => result.error = result.error.take().or_else(|| Some(error.to_string())),
    }
    result
}

fn accept(listener: &TcpListener, wait: Duration) -> io::Result<TcpStream> {
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + wait;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
            Err(_) if signal::stopped() || Instant::now() > deadline => {
                return Err(io::Error::other(format!("no sender within {} s", wait.as_secs())));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn receive(mut stream: TcpStream, result: &mut TransferResult) -> io::Result<()> {
    let (mut checker, begun) = (Checker::default(), Instant::now());
    let mut input = Watched { stream: &mut stream, last: begun, longest: Duration::ZERO };
    let mut data = vec![0; MAX_DATA];
    let outcome = loop {
        let mut header = [0; HEADER];
        if let Err(error) = input.fill(&mut header) {
            break Err(error);
        }
        match checker.header(&header) {
            Ok(Header::End) => break Ok(()),
            Ok(Header::Block(length, digest)) => {
                if let Err(error) = input.fill(&mut data[..length]) {
                    break Err(error);
                }
                result.bytes += length as u64;
                if let Err(error) = checker.data(&data[..length], &digest) {
                    result.error.get_or_insert(error);
                }
            }
            // After one wrong block the end's checksum differs, too: it still is the end.
            Err(_) if result.error.is_some() && header[4..8] == [0; 4] => break Ok(()),
            Err(error) => break Err(io::Error::other(error)),
        }
    };
    result.longest_stall_ms = input.longest.as_secs_f64() * 1e3;
    result.seconds = begun.elapsed().as_secs_f64();
    outcome
}

/// A stream whose longest silence is measured.
struct Watched<'a> {
    stream: &'a mut TcpStream,
    last: Instant,
    longest: Duration,
}

impl Watched<'_> {
    fn fill(&mut self, mut buffer: &mut [u8]) -> io::Result<()> {
        self.stream.set_read_timeout(Some(Duration::from_millis(500)))?;
        while !buffer.is_empty() {
            match self.stream.read(buffer) {
                Ok(0) => return Err(io::Error::other("the connection ended before the stream's end")),
                Ok(length) => {
                    self.longest = self.longest.max(self.last.elapsed());
                    self.last = Instant::now();
                    buffer = &mut buffer[length..];
                }
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                    self.longest = self.longest.max(self.last.elapsed());
                    if self.last.elapsed() > STALL_LIMIT {
                        return Err(io::Error::other(format!("no byte for {} s", STALL_LIMIT.as_secs())));
                    }
                    if signal::stopped() {
                        return Err(io::Error::other("told to stop before the stream's end"));
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
