//! Handshakes in memory, with the very configurations that connections use.

use super::*;
use crate::pki;
use rustls::NamedGroup;
use rustls::crypto::aws_lc_rs::kx_group::X25519;
use rustls::quic::{ClientConnection, ServerConnection, Version};

fn credentials(directory: &Path) -> Credentials {
    let (host, domain): (HostId, DomainId) = ("h1".parse().unwrap(), "d1".parse().unwrap());
    pki::write_pki(directory, "a test's", &[(host.clone(), domain)]).unwrap();
    Credentials::load(&pki::paths(directory, &host)).unwrap()
}

/// Lets both ends talk until neither has anything to say; each level of keys is a flight of its own.
fn shake(client: &mut ClientConnection, server: &mut ServerConnection) -> Result<(), rustls::Error> {
    loop {
        let mut said = false;
        let mut flight = Vec::new();
        while client.write_hs(&mut flight).is_some() || !flight.is_empty() {
            server.read_hs(&std::mem::take(&mut flight))?;
            said = true;
        }
        while server.write_hs(&mut flight).is_some() || !flight.is_empty() {
            client.read_hs(&std::mem::take(&mut flight))?;
            said = true;
        }
        if !said {
            return Ok(());
        }
    }
}

fn ends(client: rustls::ClientConfig, server: rustls::ServerConfig) -> (ClientConnection, ServerConnection) {
    let name = ServerName::try_from("violin").unwrap();
    let client = ClientConnection::new(Arc::new(client), Version::V1, name, vec![]).unwrap();
    (client, ServerConnection::new(Arc::new(server), Version::V1, vec![]).unwrap())
}

#[test]
fn the_key_exchange_is_post_quantum_and_nothing_less_is_taken() {
    let directory = tempfile::tempdir().unwrap();
    let ours = credentials(&directory.path().join("pki"));
    let (client, server) = (|| ours.client_tls(alpn::MESH, None).unwrap(), || ours.server_tls(alpn::MESH).unwrap());

    let (mut at_client, mut at_server) = ends(client(), server());
    shake(&mut at_client, &mut at_server).unwrap();
    assert!(!at_client.is_handshaking() && !at_server.is_handshaking());
    for group in [at_client.negotiated_key_exchange_group(), at_server.negotiated_key_exchange_group()] {
        assert_eq!(group.map(|group| group.name()), Some(NamedGroup::X25519MLKEM768));
    }

    let mut classic = Credentials::load(&pki::paths(&directory.path().join("pki"), &ours.identity.host)).unwrap();
    classic.provider = Arc::new(CryptoProvider { kx_groups: vec![X25519], ..provider() });
    for (client, server) in
        [(classic.client_tls(alpn::MESH, None).unwrap(), server()), (client(), classic.server_tls(alpn::MESH).unwrap())]
    {
        let (mut at_client, mut at_server) = ends(client, server);
        let error = shake(&mut at_client, &mut at_server).unwrap_err();
        assert!(matches!(error, rustls::Error::PeerIncompatible(_)), "{error}");
    }
}
