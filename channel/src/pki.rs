//! Certificates for a deployment that has no authority of its own: one authority, one certificate a host.
//!
//! A certificate says *who* (host and domain), never *what it may do*: which networks a host carries is policy. Nothing
//! here reads a clock, so certificates do not expire; whoever wants expiry brings an own authority and the same fields.
//! Only [`write_pki`] touches the file system.

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use violin_common::config::Tls;
use violin_common::{DomainId, HostId};

/// A certificate could not be made or stored.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// The generator refused; its key or parameters are unusable.
    #[error("cannot make the certificate of {subject}: {source}")]
    Make {
        /// Common name of the certificate.
        subject: String,
        /// What the generator said.
        source: rcgen::Error,
    },
    /// Certificate and key in a folder are of two authorities, or nobody can sign with them here.
    #[error("cannot sign with this authority: {0}")]
    Authority(String),
    /// A file could not be written.
    #[error("cannot write {}: {source}; check that the directory is writable and the disk not full", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A certificate with its private key, both PEM.
#[derive(Clone)]
pub struct Pair {
    /// Common name.
    pub name: String,
    /// The certificate.
    pub certificate: String,
    /// Its private key (PKCS #8).
    pub key: String,
}

impl std::fmt::Debug for Pair {
    /// The key stays out of logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pair").field("name", &self.name).finish_non_exhaustive()
    }
}

fn authority_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

/// Makes a self-signed authority with a fresh key.
///
/// Errors: the generator's, never for a `name` that is a host name.
pub fn make_authority(name: &str) -> Result<Pair, PkiError> {
    let make = || {
        let key = KeyPair::generate()?;
        let certificate = authority_params(name).self_signed(&key)?;
        Ok(Pair { name: name.to_owned(), certificate: certificate.pem(), key: key.serialize_pem() })
    };
    make().map_err(|source| PkiError::Make { subject: name.to_owned(), source })
}

/// Takes an authority from its certificate and key, after a look at whether they belong together and whether what
/// [`make_host_certificate`] signs will be accepted under that certificate.
pub fn read_authority(certificate: &str, key: &str) -> Result<Pair, PkiError> {
    let wrong = PkiError::Authority;
    let foreign = "want one made by `violin pki init`; sign with the tools that made this one (common name and DNS name = host, \
                   organisational unit = domain)";
    let (_, pem) = x509_parser::pem::parse_x509_pem(certificate.as_bytes())
        .map_err(|error| wrong(format!("its certificate is no PEM ({error})")))?;
    let parsed = pem.parse_x509().map_err(|error| wrong(format!("its certificate is none ({error})")))?;
    let secret = KeyPair::from_pem(key).map_err(|error| wrong(format!("its key is none that is understood ({error})")))?;
    if *parsed.public_key().subject_public_key.data != *secret.public_key_raw() {
        return Err(wrong(
            "got the certificate of one and the key of another, want a pair; what it signed nobody would accept".into(),
        ));
    }
    if !parsed.is_ca() {
        return Err(wrong("got a certificate that is no authority's, want the authority's own".into()));
    }
    let name = match (parsed.subject().iter_common_name().next().map(|name| name.as_str()), parsed.subject().iter().count()) {
        (Some(Ok(name)), 1) => name.to_owned(),
        _ => return Err(wrong(format!("got {}, {foreign}", parsed.subject()))),
    };
    // Who verifies compares the names byte by byte: an equal text in another encoding is another issuer.
    let own = authority_params(&name).self_signed(&secret).map_err(|source| PkiError::Make { subject: name.clone(), source })?;
    let same =
        x509_parser::parse_x509_certificate(own.der()).is_ok_and(|(_, own)| own.subject().as_raw() == parsed.subject().as_raw());
    if !same {
        return Err(wrong(format!("got {} in an encoding that is not ours, {foreign}", parsed.subject())));
    }
    Ok(Pair { name, certificate: certificate.to_owned(), key: key.to_owned() })
}

/// Makes the certificate of one host, for both ends of a connection, signed by `authority`.
///
/// Shape: common name and DNS name = `host`, organisational unit = `domain`, usable by clients and servers.
pub fn make_host_certificate(authority: &Pair, host: &HostId, domain: &DomainId) -> Result<Pair, PkiError> {
    let make = || {
        // The issuer's name and key identifier follow from its name and key alone, so its certificate need not be read.
        let issuer = Issuer::new(authority_params(&authority.name), KeyPair::from_pem(&authority.key)?);
        let mut params = CertificateParams::new(vec![host.to_string()])?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, host.as_str());
        params.distinguished_name.push(DnType::OrganizationalUnitName, domain.as_str());
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &issuer)?;
        Ok(Pair { name: host.to_string(), certificate: certificate.pem(), key: key.serialize_pem() })
    };
    make().map_err(|source| PkiError::Make { subject: host.to_string(), source })
}

/// Where [`write_pki`] puts the files of `host` (or of `adaptd`, named like a host).
pub fn paths(dir: &Path, host: &HostId) -> Tls {
    Tls { ca: dir.join("ca.pem"), cert: dir.join(format!("{host}.pem")), key: dir.join(format!("{host}.key")) }
}

/// Makes an authority and a certificate for every host, and writes them: `ca.pem`, `ca.key`, `HOST.pem`, `HOST.key`.
///
/// Keys are readable by their owner only, from the moment they exist. Existing files are replaced: old certificates stop
/// being accepted, because the authority is new.
pub fn write_pki(dir: &Path, authority_name: &str, hosts: &[(HostId, DomainId)]) -> Result<(), PkiError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|source| PkiError::Write { path: dir.to_owned(), source })?;
    let authority = make_authority(authority_name)?;
    write_file(&dir.join("ca.pem"), &authority.certificate, 0o644)?;
    write_file(&dir.join("ca.key"), &authority.key, 0o600)?;
    for (host, domain) in hosts {
        let pair = make_host_certificate(&authority, host, domain)?;
        let files = paths(dir, host);
        write_file(&files.cert, &pair.certificate, 0o644)?;
        write_file(&files.key, &pair.key, 0o600)?;
    }
    Ok(())
}

fn write_file(path: &Path, text: &str, mode: u32) -> Result<(), PkiError> {
    let write = || {
        // A file that is already there may be open to others; a new one has the right mode from the start.
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?.write_all(text.as_bytes())
    };
    write().map_err(|source| PkiError::Write { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_host_certificate_names_host_and_domain_and_is_signed_by_its_authority() {
        let authority = make_authority("lab demo").unwrap();
        let pair = make_host_certificate(&authority, &"h1".parse().unwrap(), &"d1".parse().unwrap()).unwrap();

        let (_, pem) = x509_parser::pem::parse_x509_pem(pair.certificate.as_bytes()).unwrap();
        let certificate = pem.parse_x509().unwrap();
        let subject = certificate.subject();
        assert_eq!(subject.iter_common_name().next().unwrap().as_str().unwrap(), "h1");
        assert_eq!(subject.iter_organizational_unit().next().unwrap().as_str().unwrap(), "d1");
        let usage = certificate.extended_key_usage().unwrap().unwrap().value;
        assert!(usage.client_auth && usage.server_auth);
        let names = &certificate.subject_alternative_name().unwrap().unwrap().value.general_names;
        assert_eq!(names.as_slice(), [x509_parser::extensions::GeneralName::DNSName("h1")]);
        assert_eq!(certificate.issuer().iter_common_name().next().unwrap().as_str().unwrap(), "lab demo");
    }

    fn issuer(certificate: &str) -> Vec<u8> {
        let (_, pem) = x509_parser::pem::parse_x509_pem(certificate.as_bytes()).unwrap();
        pem.parse_x509().unwrap().issuer().as_raw().to_vec()
    }

    #[test]
    fn an_authority_that_was_read_signs_in_its_own_name() {
        let made = make_authority("another").unwrap();

        let read = read_authority(&made.certificate, &made.key).unwrap();
        let host = make_host_certificate(&read, &"h1".parse().unwrap(), &"d1".parse().unwrap()).unwrap();

        assert_eq!(issuer(&host.certificate), issuer(&made.certificate));
    }

    #[test]
    fn an_authority_in_whose_name_nothing_can_be_signed_is_refused() {
        let (one, other) = (make_authority("one").unwrap(), make_authority("one").unwrap());
        let host = make_host_certificate(&one, &"h1".parse().unwrap(), &"d1".parse().unwrap()).unwrap();
        let foreign = |names: &[(DnType, rcgen::DnValue)]| {
            let key = KeyPair::generate().unwrap();
            let mut params = authority_params("x");
            params.distinguished_name = DistinguishedName::new();
            names.iter().for_each(|(kind, name)| params.distinguished_name.push(kind.clone(), name.clone()));
            (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
        };
        let two = foreign(&[(DnType::OrganizationName, "Example".into()), (DnType::CommonName, "Example CA".into())]);
        let printable = rcgen::DnValue::PrintableString("Example CA".try_into().unwrap());
        let encoded = foreign(&[(DnType::CommonName, printable)]);

        for ((certificate, key), wanted) in [
            ((&one.certificate, &other.key), "the certificate of one and the key of another"),
            ((&host.certificate, &host.key), "no authority's"),
            ((&two.0, &two.1), "want one made by `violin pki init`"),
            ((&encoded.0, &encoded.1), "not ours"),
            ((&"nonsense".to_owned(), &one.key), "no PEM"),
            ((&one.certificate, &"nonsense".to_owned()), "its key is none"),
        ] {
            let words = read_authority(certificate, key).unwrap_err().to_string();
            assert!(words.contains(wanted), "{words}");
        }
    }

    #[test]
    fn written_keys_are_readable_by_their_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let host: HostId = "h1".parse().unwrap();
        let pki = dir.path().join("pki");

        write_pki(&pki, "lab demo", &[(host.clone(), "d1".parse().unwrap())]).unwrap();
        write_pki(&pki, "lab demo", &[(host.clone(), "d1".parse().unwrap())]).unwrap();

        for key in [pki.join("ca.key"), paths(&pki, &host).key] {
            assert_eq!(fs::metadata(key).unwrap().permissions().mode() & 0o777, 0o600);
        }
    }
}
