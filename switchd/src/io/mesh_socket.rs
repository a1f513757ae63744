//! QUIC's half of the mesh port: sends on the descriptor it shares with the data plane, reads what that hands over.

use super::dataplane::QuicDatagram;
use super::udp;
use crate::counters::Counters;
use crate::drops::DropReason;
use crate::slice::Way;
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use tokio::sync::mpsc::Receiver;

/// The mesh port as quinn sees it.
#[derive(Debug)]
pub struct MeshSocket {
    socket: UdpSocket,
    /// Of IPv6, which speaks with IPv4 by mapped addresses.
    v6: bool,
    received: Mutex<Receiver<QuicDatagram>>,
    counters: Arc<Counters>,
}

impl MeshSocket {
    /// `socket` must be non-blocking; nobody reads it here.
    pub fn new(socket: UdpSocket, received: Receiver<QuicDatagram>, counters: Arc<Counters>) -> Self {
        let v6 = socket.local_addr().is_ok_and(|address| address.is_ipv6());
        Self { socket, v6, received: Mutex::new(received), counters }
    }

    /// The data plane knows IPv4 members by their plain addresses; quinn calls them by mapped ones on an IPv6 socket, and
    /// takes an answer from any other address for a stranger's.
    fn as_quinn_calls_it(&self, from: SocketAddr) -> SocketAddr {
        match from {
            SocketAddr::V4(v4) if self.v6 => (IpAddr::from(v4.ip().to_ipv6_mapped()), v4.port()).into(),
            other => other,
        }
    }
}

/// Always ready: what the underlay does not take is lost, and QUIC repeats it.
#[derive(Debug)]
struct Ready;

impl UdpPoller for Ready {
    fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl AsyncUdpSocket for MeshSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Ready)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let way = Way { to: transmit.destination, from: transmit.src_ip, interface: 0 };
        match udp::send_from(self.socket.as_fd(), way, transmit.contents, None) {
            Ok(()) => Ok(()),
            // A host that cannot be reached now is like one that loses every datagram: the idle timeout tells.
            Err(error) => {
                tracing::trace!(%error, to = %transmit.destination, "control datagram lost");
                Ok(())
            }
        }
    }

    fn poll_recv(&self, cx: &mut Context<'_>, bufs: &mut [IoSliceMut<'_>], meta: &mut [RecvMeta]) -> Poll<io::Result<usize>> {
        let mut received = self.received.lock().unwrap_or_else(PoisonError::into_inner);
        let mut count = 0;
        while count < bufs.len().min(meta.len()) {
            match received.poll_recv(cx) {
                Poll::Ready(Some(datagram)) => {
                    let bytes = &datagram.bytes;
                    let Some(place) = bufs[count].get_mut(..bytes.len()) else {
                        // Larger than what we told our peers to send.
                        self.counters.drops.count(DropReason::BadDatagram);
                        continue;
                    };
                    place.copy_from_slice(bytes);
                    let (addr, len) = (self.as_quinn_calls_it(datagram.from), bytes.len());
                    let dst_ip = datagram.to;
                    meta[count] = RecvMeta { addr, len, stride: len, dst_ip, ..RecvMeta::default() };
                    count += 1;
                }
                // When the data plane has stopped nothing comes any more: at the switch's end no error, and else told by that itself.
                Poll::Ready(None) | Poll::Pending if count == 0 => return Poll::Pending,
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        Poll::Ready(Ok(count))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// The data plane decides about fragmentation on this port; QUIC stays at 1200 bytes, which pass everywhere.
    fn may_fragment(&self) -> bool {
        true
    }
}
