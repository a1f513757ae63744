//! Endpoints and connections of daemons that have a UDP port of their own.

use crate::tls::{Credentials, Identity, Timing, TlsError, endpoint_config, peer_identity};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;
use violin_common::HostId;

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
    #[error("could not open UDP {address}: {source}")]
    Socket {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// Certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Nobody there, or the handshake failed.
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
    open(address, credentials, alpn, timing, true)
}

/// Opens a port that only calls, of the address family of `remote`. Must be called inside a tokio runtime.
pub fn dialler(
    remote: SocketAddr,
    credentials: Arc<Credentials>,
    alpn: &'static [u8],
    timing: Timing,
) -> Result<Endpoint, QuicError> {
    let any: SocketAddr = if remote.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
    open(any, credentials, alpn, timing, false)
}

fn open(
    address: SocketAddr,
    credentials: Arc<Credentials>,
    alpn: &'static [u8],
    timing: Timing,
    called: bool,
) -> Result<Endpoint, QuicError> {
    let server = if called { Some(credentials.server(alpn, timing)?) } else { None };
    let socket = UdpSocket::bind(address).map_err(|source| QuicError::Socket { address, source })?;
    let quinn = quinn::Endpoint::new(endpoint_config(), server, socket, Arc::new(quinn::TokioRuntime))
        .map_err(|source| QuicError::Socket { address, source })?;
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
        let connection = tokio::time::timeout(HANDSHAKE, connecting)
            .await
            .map_err(|_| failed("no answer within 5 s".into()))?
            .map_err(|error| failed(error.to_string()))?;
        let identity = peer_identity(&connection)?;
        Ok((connection, identity))
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
