//! Endpoints and connections of daemons that have a UDP port of their own.

use crate::seldom::Seldom;
use crate::start::patiently;
use crate::tls::{Credentials, Identity, Timing, TlsError, endpoint_config, peer_identity};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};
use violin_common::HostId;

/// Handshakes of callers under way at most.
pub const CALLERS: usize = 256;
/// Longest time a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// What is spoken on a connection; both ends must name the same (ALPN).
pub mod alpn {
    /// Switch to switch.
    pub const MESH: &[u8] = b"violin-mesh/1";
    /// Monitor to manager.
    pub const MONITOR: &[u8] = b"violin-monitor/1";
    /// Monitor to monitor: images.
    pub const IMAGE: &[u8] = b"violin-image/1";
}

/// A connection could not be made.
#[derive(Debug, thiserror::Error)]
pub enum QuicError {
    /// The socket could not be opened.
    #[error("could not open UDP {address}: {why}")]
    Socket {
        /// Where.
        address: SocketAddr,
        /// Why.
        why: io::Error,
    },
    /// Certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Nobody there.
    #[error("could not connect to {address}: no answer")]
    Silent {
        /// Who was called.
        address: SocketAddr,
    },
    /// The handshake failed.
    #[error("could not connect to {address}: {why}")]
    Connect {
        /// Who was called.
        address: SocketAddr,
        /// Why.
        why: String,
    },
    /// A caller's handshake failed.
    #[error("refused a caller from {address}: {why}")]
    Refused {
        /// Who called.
        address: SocketAddr,
        /// Why.
        why: String,
    },
}

/// A UDP port that calls and is called.
#[derive(Debug, Clone)]
pub struct Endpoint {
    quinn: quinn::Endpoint,
    credentials: Arc<Credentials>,
    alpn: &'static [u8],
    timing: Timing,
}

/// Opens a port on which callers are admitted. Must be called inside a tokio runtime.
pub fn listen(
    address: SocketAddr,
    credentials: Arc<Credentials>,
    alpn: &'static [u8],
    timing: Timing,
) -> Result<Endpoint, QuicError> {
    let socket = UdpSocket::bind(address).map_err(|why| QuicError::Socket { address, why })?;
    over(socket, credentials, alpn, timing, true)
}

/// Likewise, and waits until this host has the address: see [`patiently`].
pub async fn listen_patiently(
    address: SocketAddr,
    credentials: Arc<Credentials>,
    alpn: &'static [u8],
    timing: Timing,
) -> Result<Endpoint, QuicError> {
    let socket = patiently(address, || UdpSocket::bind(address)).await;
    over(socket.map_err(|why| QuicError::Socket { address, why })?, credentials, alpn, timing, true)
}

/// Opens a port that only calls, of the address family of `remote`. Must be called inside a tokio runtime.
pub fn dialler(
    remote: SocketAddr,
    credentials: Arc<Credentials>,
    alpn: &'static [u8],
    timing: Timing,
) -> Result<Endpoint, QuicError> {
    let any: SocketAddr = if remote.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
    let socket = UdpSocket::bind(any).map_err(|why| QuicError::Socket { address: any, why })?;
    over(socket, credentials, alpn, timing, false)
}

fn over(
    socket: UdpSocket,
    credentials: Arc<Credentials>,
    alpn: &'static [u8],
    timing: Timing,
    called: bool,
) -> Result<Endpoint, QuicError> {
    let server = if called { Some(credentials.server(alpn, timing)?) } else { None };
    let address = socket.local_addr().unwrap_or_else(|_| (Ipv4Addr::UNSPECIFIED, 0).into());
    let quinn = quinn::Endpoint::new(endpoint_config(), server, socket, Arc::new(quinn::TokioRuntime))
        .map_err(|why| QuicError::Socket { address, why })?;
    Ok(Endpoint { quinn, credentials, alpn, timing })
}

impl Endpoint {
    /// Wraps an endpoint made elsewhere, such as on a shared port.
    pub const fn over(quinn: quinn::Endpoint, credentials: Arc<Credentials>, alpn: &'static [u8], timing: Timing) -> Self {
        Self { quinn, credentials, alpn, timing }
    }

    /// Calls `address`; `expected` refuses everybody else who might answer there.
    pub async fn connect(
        &self,
        address: SocketAddr,
        expected: Option<&HostId>,
    ) -> Result<(quinn::Connection, Identity), QuicError> {
        let failed = |why: String| QuicError::Connect { address, why };
        let config = self.credentials.client(self.alpn, expected.cloned(), self.timing)?;
        // The name is not looked at: who answers is told by the certificate.
        let connecting = self.quinn.connect_with(config, address, "violin").map_err(|error| failed(error.to_string()))?;
        let connection =
            tokio::time::timeout(HANDSHAKE, connecting).await.map_err(|_| QuicError::Silent { address })?.map_err(|error| {
                match error {
                    quinn::ConnectionError::TimedOut => QuicError::Silent { address },
                    other => failed(other.to_string()),
                }
            })?;
        let identity = peer_identity(&connection)?;
        Ok((connection, identity))
    }

    /// Takes callers until the endpoint is closed, each in a task of its own, [`CALLERS`] handshakes at once. Who is refused is
    /// told to `refused`, and to the log once a minute for each address.
    pub async fn serve<F: Future<Output = ()> + Send + 'static>(
        self,
        refused: impl Fn() + Clone + Send + 'static,
        admitted: impl Fn(quinn::Connection, Identity) -> F + Clone + Send + 'static,
    ) {
        let under_way = Arc::new(tokio::sync::Semaphore::new(CALLERS));
        let seldom = Arc::new(Seldom::default());
        while let Some(incoming) = self.accept().await {
            if !incoming.remote_address_validated() {
                // One round trip more, and nobody holds a place under an address that is not theirs.
                let _ = incoming.retry();
                continue;
            }
            let Ok(permit) = Arc::clone(&under_way).try_acquire_owned() else {
                refused();
                incoming.refuse();
                continue;
            };
            let (refused, admitted, seldom) = (refused.clone(), admitted.clone(), Arc::clone(&seldom));
            tokio::spawn(async move {
                let address = incoming.remote_address().ip();
                let result = admit(incoming).await;
                drop(permit);
                match result {
                    Ok((connection, who)) => admitted(connection, who).await,
                    Err(error) => {
                        refused();
                        if let Some(before) = seldom.due(Instant::now(), &address.to_string()) {
                            tracing::warn!(%error, unsaid_before = before, "caller refused");
                        }
                    }
                }
            });
        }
    }

    /// Waits for a caller; give it to [`admit`] in a task of its own, so that a slow one delays nobody. `None`: closed.
    pub async fn accept(&self) -> Option<quinn::Incoming> {
        self.quinn.accept().await
    }

    /// Our address.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.quinn.local_addr()
    }

    /// Ends all connections with a reason and waits until their ends have been told, half a second at most.
    pub async fn close(&self, reason: &str) {
        self.quinn.close(quinn::VarInt::from_u32(0), reason.as_bytes());
        let _ = tokio::time::timeout(Duration::from_millis(500), self.quinn.wait_idle()).await;
    }
}

/// Code of a connection closed because the other end has to be changed: calling again is of no use until then.
pub const REFUSED: u32 = 3;

/// Closes a connection whose other end has to be changed, in words that it will show its operator.
pub fn refuse(connection: &quinn::Connection, why: &str) {
    connection.close(quinn::VarInt::from_u32(REFUSED), why.as_bytes());
}

/// The words of an end that refuses us for good: by [`refuse`], or because it does not take our certificate.
pub fn refusal(connection: &quinn::Connection) -> Option<String> {
    match connection.close_reason()? {
        quinn::ConnectionError::ApplicationClosed(close) if close.error_code == quinn::VarInt::from_u32(REFUSED) => {
            Some(String::from_utf8_lossy(&close.reason).into_owned())
        }
        quinn::ConnectionError::ConnectionClosed(close) => Some(close.to_string()),
        _ => None,
    }
}

/// Frames that came from the other end so far, each proof that it lives and has our keys.
pub fn heard(connection: &quinn::Connection) -> u64 {
    let frames = connection.stats().frame_rx;
    frames.acks + frames.ping + frames.stream
}

/// How long a watched peer's words may have been on their way already when the watch begins.
const ON_ITS_WAY: Duration = Duration::from_millis(100);

/// Waits until the other end is heard again. `false`: the connection has ended. Keep-alives make it one or the other.
pub async fn answers(connection: &quinn::Connection) -> bool {
    tokio::time::sleep(ON_ITS_WAY).await;
    let before = heard(connection);
    loop {
        if connection.close_reason().is_some() {
            return false;
        }
        if heard(connection) > before {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Finishes a caller's handshake and says who it is.
pub async fn admit(incoming: quinn::Incoming) -> Result<(quinn::Connection, Identity), QuicError> {
    let address = incoming.remote_address();
    let refused = |why: String| QuicError::Refused { address, why };
    let connecting = incoming.accept().map_err(|error| refused(error.to_string()))?;
    let connection = tokio::time::timeout(HANDSHAKE, connecting)
        .await
        .map_err(|_| refused("handshake not done within 5 s".into()))?
        .map_err(|error| refused(error.to_string()))?;
    match peer_identity(&connection) {
        Ok(identity) => Ok((connection, identity)),
        Err(error) => {
            connection.close(quinn::VarInt::from_u32(1), error.to_string().as_bytes());
            Err(error.into())
        }
    }
}
