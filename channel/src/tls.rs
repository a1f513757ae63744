//! Who a peer is: certificates of one authority, checked both ways.
//!
//! TLS 1.3 only, no resumption, no 0-RTT: every connection proves the key anew. A daemon's certificate has the host as
//! common name and DNS name, the domain as organisational unit.

use crate::quic::alpn;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::Resumption;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{DigitallySignedStruct, RootCertStore, SignatureScheme};
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use violin_common::config::Tls;
use violin_common::{DomainId, HostId};
use x509_parser::prelude::{FromDer, GeneralName, Validity, X509Certificate};

/// Bytes of one connection that may wait here for whoever reads: some of the longest messages.
const WINDOW: u32 = 4 << 20;
/// Likewise where images are fetched, one stream at a time: 16 MiB a round trip.
const IMAGE_WINDOW: u32 = 16 << 20;
/// Streams that the other end may have open: a request or a command each.
const STREAMS: u32 = 100;
/// Likewise where one stream carries everything, as between switches and for a monitor's reports.
const MESH_STREAMS: u32 = 4;

/// Whom a certificate names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity {
    /// Common name.
    pub host: HostId,
    /// Organisational unit.
    pub domain: DomainId,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.host, self.domain)
    }
}

/// Certificates could not be used, or a peer is not who it should be.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A PEM file could not be read.
    #[error("could not read {what} from {path}: {why}")]
    File {
        /// What it should hold.
        what: &'static str,
        /// Its path.
        path: String,
        /// What is wrong.
        why: String,
    },
    /// Certificate and key were refused by the TLS library.
    #[error("could not use the certificate: {0}")]
    Unusable(String),
    /// A certificate does not name a host and a domain as ours do.
    #[error("got a certificate {0}, want common name and DNS name = host, organisational unit = domain")]
    Nameless(String),
    /// The peer showed no certificate.
    #[error("the peer showed no certificate")]
    Anonymous,
    /// The peer is another host than the one called.
    #[error("got host {got}, want {wanted}")]
    OtherHost {
        /// Who answered.
        got: HostId,
        /// Who was called.
        wanted: HostId,
    },
}

/// Reads host and domain from a certificate in DER form. Checks no signature.
pub fn identity(certificate: &[u8]) -> Result<Identity, TlsError> {
    let nameless = |what: String| TlsError::Nameless(what);
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|error| nameless(format!("that is none ({error})")))?;
    let one = |mut values: Vec<&str>, what: &str| -> Result<String, TlsError> {
        match (values.pop(), values.pop()) {
            (Some(value), None) => Ok(value.to_owned()),
            (None, _) => Err(nameless(format!("without {what}"))),
            (Some(_), Some(_)) => Err(nameless(format!("with more than one {what}"))),
        }
    };
    let subject = parsed.subject();
    let host = one(subject.iter_common_name().filter_map(|name| name.as_str().ok()).collect(), "common name")?;
    let domain = one(subject.iter_organizational_unit().filter_map(|name| name.as_str().ok()).collect(), "organisational unit")?;
    let dns_agrees = parsed.subject_alternative_name().ok().flatten().is_some_and(|names| {
        names.value.general_names.iter().any(|name| matches!(name, GeneralName::DNSName(dns) if *dns == host))
    });
    if !dns_agrees {
        return Err(nameless(format!("without DNS name {host:?}")));
    }
    Ok(Identity {
        host: host.parse().map_err(|error| nameless(format!("with a bad common name: {error}")))?,
        domain: domain.parse().map_err(|error| nameless(format!("with a bad organisational unit: {error}")))?,
    })
}

/// A daemon's certificate, its key and the authority it trusts.
pub struct Credentials {
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    identity: Identity,
    provider: Arc<CryptoProvider>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("identity", &self.identity).finish_non_exhaustive()
    }
}

fn certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let wrong = |why: String| TlsError::File { what, path: path.display().to_string(), why };
    let found = CertificateDer::pem_file_iter(path)
        .and_then(|found| found.collect::<Result<Vec<_>, _>>())
        .map_err(|error| wrong(error.to_string()))?;
    if found.is_empty() { Err(wrong("no certificate in it".into())) } else { Ok(found) }
}

/// Whether a certificate is refused only for the time.
fn is_of_time(error: &rustls::Error) -> bool {
    use rustls::CertificateError::{Expired, ExpiredContext, NotValidYet, NotValidYetContext};
    let rustls::Error::InvalidCertificate(why) = error else { return false };
    matches!(why, Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. })
}

/// What both ends of every connection must have: all of them are ours, so there is one key exchange, which a recording of
/// today does not give to a quantum computer of tomorrow (draft-ietf-tls-ecdhe-mlkem).
fn provider() -> CryptoProvider {
    use rustls::crypto::aws_lc_rs::{default_provider, kx_group::X25519MLKEM768};
    CryptoProvider { kx_groups: vec![X25519MLKEM768], ..default_provider() }
}

impl Credentials {
    /// Reads the files and checks that the certificate names a host and a domain, is of the authority, and has this key; not that
    /// it is valid now, for which see [`Self::must_be_valid`].
    pub fn load(tls: &Tls) -> Result<Self, TlsError> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates("the authority's certificate", &tls.ca)? {
            roots.add(certificate).map_err(|error| TlsError::Unusable(format!("{}: {error}", tls.ca.display())))?;
        }
        let chain = certificates("the certificate", &tls.cert)?;
        let key = PrivateKeyDer::from_pem_file(&tls.key).map_err(|error| TlsError::File {
            what: "the private key",
            path: tls.key.display().to_string(),
            why: error.to_string(),
        })?;
        let identity = identity(&chain[0])?;
        let provider = Arc::new(provider());
        CertifiedKey::from_der(chain.clone(), key.clone_key(), &provider).map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => TlsError::Unusable(format!(
                "{} is not the key of {}: want the two that were made together",
                tls.key.display(),
                tls.cert.display()
            )),
            error => TlsError::Unusable(format!("{}: {error}", tls.key.display())),
        })?;
        let credentials = Self { roots: Arc::new(roots), chain, key, identity, provider };
        match credentials.verify(SystemTime::now()) {
            // A host may start with a clock that is not set yet; and a switch without peers still serves its own host.
            Err(why) if !is_of_time(&why) => {
                let (cert, ca) = (tls.cert.display(), tls.ca.display());
                let words = format!("{cert} is not good by the authority in {ca} ({why}): want one made by that authority");
                Err(TlsError::Unusable(words))
            }
            _ => Ok(credentials),
        }
    }

    fn validity(&self) -> Result<Validity, TlsError> {
        let unusable = |error: &dyn fmt::Display| TlsError::Unusable(error.to_string());
        let (_, parsed) = X509Certificate::from_der(&self.chain[0]).map_err(|error| unusable(&error))?;
        Ok(parsed.validity().clone())
    }

    /// Whether those whom it calls, and who call it, will find the certificate good at a time.
    fn verify(&self, at: SystemTime) -> Result<(), rustls::Error> {
        let at = UnixTime::since_unix_epoch(at.duration_since(UNIX_EPOCH).unwrap_or_default());
        let general = |error: &dyn fmt::Display| rustls::Error::General(error.to_string());
        let (own, rest) = self.chain.split_first().ok_or_else(|| general(&"no certificate"))?;
        let builder = WebPkiServerVerifier::builder_with_provider(Arc::clone(&self.roots), Arc::clone(&self.provider));
        let name = ServerName::try_from(self.identity.host.as_str()).map_err(|error| general(&error))?;
        builder.build().map_err(|error| general(&error))?.verify_server_cert(own, rest, &name, &[], at)?;
        let builder = WebPkiClientVerifier::builder_with_provider(Arc::clone(&self.roots), Arc::clone(&self.provider));
        builder.build().map_err(|error| general(&error))?.verify_client_cert(own, rest, at).map(|_| ())
    }

    /// Refuses a certificate that is not valid yet or any more: everybody would. Not by [`Self::load`], for a daemon that starts
    /// before its host's clock is set is to run all the same.
    pub fn must_be_valid(&self, now: SystemTime) -> Result<(), TlsError> {
        let Err(why) = self.verify(now) else { return Ok(()) };
        let Validity { not_before: from, not_after: until } = self.validity()?;
        Err(TlsError::Unusable(format!(
            "it is valid from {from} to {until}, and the authority's perhaps for less: not now ({why}); set the clock, or make a new one"
        )))
    }

    /// Whom our certificate names.
    pub const fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Refuses a configuration that calls this host something else than its certificate does.
    pub fn must_name(&self, host: &HostId, domain: &DomainId) -> Result<(), TlsError> {
        if self.identity.host == *host && self.identity.domain == *domain {
            return Ok(());
        }
        Err(TlsError::Nameless(format!("of {}, but the configuration says {host} of {domain}", self.identity)))
    }

    /// Configuration of the side that is called: asks for a certificate of the same authority.
    pub fn server(&self, alpn: &[u8], timing: Timing) -> Result<quinn::ServerConfig, TlsError> {
        let crypto = QuicServerConfig::try_from(self.server_tls(alpn)?).map_err(|error| TlsError::Unusable(error.to_string()))?;
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        server.transport_config(timing.transport(alpn, false));
        // A peer's address is that of its connection; between switches one that roams is followed once it has proved itself.
        server.migration(alpn == alpn::MESH);
        Ok(server)
    }

    fn server_tls(&self, alpn: &[u8]) -> Result<rustls::ServerConfig, TlsError> {
        let unusable = |error: &dyn fmt::Display| TlsError::Unusable(error.to_string());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&self.roots), Arc::clone(&self.provider))
            .build()
            .map_err(|error| unusable(&error))?;
        let mut config = rustls::ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| unusable(&error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.chain.clone(), self.key.clone_key())
            .map_err(|error| unusable(&error))?;
        config.alpn_protocols = vec![alpn.to_vec()];
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.max_early_data_size = 0;
        Ok(config)
    }

    /// Configuration of the side that calls: accepts `expected` only, or anybody the authority knows.
    pub fn client(&self, alpn: &[u8], expected: Option<HostId>, timing: Timing) -> Result<quinn::ClientConfig, TlsError> {
        let config = self.client_tls(alpn, expected)?;
        let crypto = QuicClientConfig::try_from(config).map_err(|error| TlsError::Unusable(error.to_string()))?;
        let mut client = quinn::ClientConfig::new(Arc::new(crypto));
        client.transport_config(timing.transport(alpn, true));
        Ok(client)
    }

    fn client_tls(&self, alpn: &[u8], expected: Option<HostId>) -> Result<rustls::ClientConfig, TlsError> {
        let unusable = |error: &dyn fmt::Display| TlsError::Unusable(error.to_string());
        let inner = WebPkiServerVerifier::builder_with_provider(Arc::clone(&self.roots), Arc::clone(&self.provider))
            .build()
            .map_err(|error| unusable(&error))?;
        let mut config = rustls::ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| unusable(&error))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(MemberVerifier { inner, expected }))
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())
            .map_err(|error| unusable(&error))?;
        config.alpn_protocols = vec![alpn.to_vec()];
        config.resumption = Resumption::disabled();
        config.enable_early_data = false;
        Ok(config)
    }
}

/// When a silent connection is poked and when it is given up.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// Time of silence after which a ping is sent.
    pub keep_alive: Duration,
    /// Time of silence after which the peer is lost; several pings long.
    pub idle: Duration,
}

impl Timing {
    /// Between daemons that must notice each other's death soon: lost after 1.5 s.
    pub const BRISK: Self = Self { keep_alive: Duration::from_millis(400), idle: Duration::from_millis(1500) };
    /// Between daemons that can wait: lost after 6 s.
    pub const CALM: Self = Self { keep_alive: Duration::from_secs(1), idle: Duration::from_secs(6) };

    /// The end that calls pokes; that it is answered is a sign of life to it, and the poke one to the other end.
    fn transport(self, alpn: &[u8], calls: bool) -> Arc<quinn::TransportConfig> {
        let mut transport = quinn::TransportConfig::default();
        let idle_ms = u32::try_from(self.idle.as_millis()).unwrap_or(u32::MAX);
        let window = quinn::VarInt::from_u32(if alpn == alpn::IMAGE { IMAGE_WINDOW } else { WINDOW });
        let streams = if alpn == alpn::MESH { MESH_STREAMS } else { STREAMS };
        // One stream is mostly all there is: it may fill the connection's window.
        transport.receive_window(window).stream_receive_window(window).datagram_receive_buffer_size(None);
        transport.max_concurrent_bidi_streams(streams.into()).max_concurrent_uni_streams(MESH_STREAMS.into());
        transport
            .keep_alive_interval(calls.then_some(self.keep_alive))
            .max_idle_timeout(Some(quinn::VarInt::from_u32(idle_ms).into()));
        Arc::new(transport)
    }
}

/// Configuration of an endpoint. The fixed bit is never greased: it tells QUIC from mesh data on a shared port.
pub fn endpoint_config() -> quinn::EndpointConfig {
    let mut config = quinn::EndpointConfig::default();
    config.grease_quic_bit(false);
    config
}

/// Whom the certificate at the other end of a connection names; the handshake has checked its signature.
pub fn peer_identity(connection: &quinn::Connection) -> Result<Identity, TlsError> {
    let shown = connection.peer_identity().ok_or(TlsError::Anonymous)?;
    let chain = shown.downcast::<Vec<CertificateDer<'static>>>().map_err(|_| TlsError::Anonymous)?;
    identity(chain.first().ok_or(TlsError::Anonymous)?)
}

/// Accepts a server by its certificate's own host name: members are called by address, often without knowing their names.
/// Signature, validity and use are checked by the library as always.
#[derive(Debug)]
struct MemberVerifier {
    inner: Arc<WebPkiServerVerifier>,
    expected: Option<HostId>,
}

impl ServerCertVerifier for MemberVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let general = |error: &TlsError| rustls::Error::General(error.to_string());
        let found = identity(end_entity).map_err(|error| general(&error))?;
        let name = ServerName::try_from(found.host.as_str()).map_err(|error| rustls::Error::General(error.to_string()))?;
        let verified = self.inner.verify_server_cert(end_entity, intermediates, &name, ocsp_response, now)?;
        match &self.expected {
            Some(wanted) if *wanted != found.host => {
                Err(general(&TlsError::OtherHost { got: found.host, wanted: wanted.clone() }))
            }
            _ => Ok(verified),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tests;
