//! Bytes over TCP between two namespaces, compared one by one.

use super::Namespace;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// How long a stream may stand still.
const STANDSTILL: Duration = Duration::from_secs(120);
/// How long it may take: a second would do.
const CREEPING: Duration = Duration::from_secs(60);

/// Bytes that differ from place to place, so that none can take another's.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len as u64).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

fn speak(mut stream: &TcpStream, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes)?;
    stream.shutdown(Shutdown::Write)
}

fn hear(mut stream: &TcpStream) -> io::Result<Vec<u8>> {
    let (mut heard, mut bytes, deadline) = (Vec::new(), vec![0; 1 << 16], Instant::now() + CREEPING);
    loop {
        match stream.read(&mut bytes)? {
            0 => return Ok(heard),
            len => heard.extend_from_slice(&bytes[..len]),
        }
        if Instant::now() > deadline {
            return Err(io::Error::other(format!("only {} bytes within {} s", heard.len(), CREEPING.as_secs())));
        }
    }
}

fn patient(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(STANDSTILL))?;
    stream.set_write_timeout(Some(STANDSTILL))
}

/// Sends `len` bytes from one namespace to an address of another, and the same back. An error when they stand still or
/// differ.
pub fn there_and_back(from: &Namespace, to: &Namespace, address: IpAddr, len: usize) -> Result<(), String> {
    let listener = to.enter(|| TcpListener::bind((address, 0))).map_err(|error| format!("listen on {address}: {error}"))?;
    let place: SocketAddr = listener.local_addr().map_err(|error| error.to_string())?;
    let bytes = pattern(len);
    let compare = |what: &str, heard: &[u8]| {
        let same = heard.iter().zip(&bytes).take_while(|(heard, said)| heard == said).count();
        if heard == bytes { Ok(()) } else { Err(format!("{what}: {} of {len} bytes, {same} as they were", heard.len())) }
    };
    std::thread::scope(|scope| {
        let answering = scope.spawn(|| {
            let (stream, _) = listener.accept()?;
            patient(&stream)?;
            let heard = hear(&stream)?;
            speak(&stream, &heard)?;
            io::Result::Ok(heard)
        });
        let asked = from.enter(|| {
            let stream = TcpStream::connect_timeout(&place, STANDSTILL)?;
            patient(&stream)?;
            speak(&stream, &bytes)?;
            hear(&stream)
        });
        if asked.is_err() {
            // The other side may still wait for a caller.
            let _ = to.enter(|| TcpStream::connect_timeout(&place, STANDSTILL));
        }
        let there = answering.join().expect("no panic").map_err(|error| format!("there: {error}"));
        let back = asked.map_err(|error| format!("to {place}: {error}"))?;
        compare("there", &there?)?;
        compare("back", &back)
    })
}
