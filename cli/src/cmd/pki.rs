//! `pki`: certificates for a deployment that has no authority of its own.

use crate::table::Output;
use anyhow::{Context, Result, bail};
use std::fs::Permissions;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use violin_channel::pki;
use violin_common::{DomainId, HostId};

/// Common name of the authorities made here.
const AUTHORITY: &str = "violin";

/// `violin pki …`
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Pki {
    /// Make an authority: DIR/ca.pem (give it to every host) and DIR/ca.key (keep it).
    Init {
        /// Folder.
        dir: PathBuf,
    },
    /// Make a host's certificate, signed by the authority in DIR: DIR/HOST.pem and DIR/HOST.key.
    Host {
        /// Folder of the authority.
        dir: PathBuf,
        /// Host, as in its switchd.toml; `adaptd` for the manager.
        host: HostId,
        /// Its domain.
        #[arg(long)]
        domain: DomainId,
    },
}

/// Runs `violin pki …`.
pub(crate) fn run(command: Pki, output: Output) -> Result<()> {
    match command {
        Pki::Init { dir } => {
            // A host has only the certificate of the authority it trusts: that must not be replaced either.
            if ["ca.key", "ca.pem"].iter().any(|name| dir.join(name).exists()) {
                bail!("{} has an authority already; certificates of a new one would not be accepted beside it", dir.display());
            }
            pki::write_pki(&dir, AUTHORITY, &[])?;
            output.words(&format!("made {0}/ca.pem (for every host) and {0}/ca.key (keep it)", dir.display()));
        }
        Pki::Host { dir, host, domain } => {
            let read = |name: &str| {
                let path = dir.join(name);
                std::fs::read_to_string(&path).with_context(|| {
                    format!("cannot read {}: make an authority with `violin pki init {}`", path.display(), dir.display())
                })
            };
            let authority = pki::read_authority(&read("ca.pem")?, &read("ca.key")?)
                .with_context(|| format!("{0}/ca.pem and {0}/ca.key", dir.display()))?;
            let pair = pki::make_host_certificate(&authority, &host, &domain)?;
            let files = pki::paths(&dir, &host);
            write(&[(&files.cert, &pair.certificate, 0o644), (&files.key, &pair.key, 0o600)])?;
            output.words(&format!("made {} and {} for {host} in {domain}", files.cert.display(), files.key.display()));
        }
    }
    Ok(())
}

/// Writes files that must not exist yet, each whole or not at all, and none if one of them cannot be made.
fn write(files: &[(&Path, &str, u32)]) -> Result<()> {
    let made = |path: &Path| format!("cannot make {} (an existing file is not replaced)", path.display());
    if let Some((path, ..)) = files.iter().find(|(path, ..)| path.symlink_metadata().is_ok()) {
        bail!("{}: it exists", made(path));
    }
    let mut parts = Vec::new();
    for (path, text, mode) in files {
        let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
        // Gone by itself when this ends by an error.
        let mut part = tempfile::Builder::new()
            .permissions(Permissions::from_mode(*mode))
            .tempfile_in(folder)
            .with_context(|| made(path))?;
        part.write_all(text.as_bytes()).and_then(|()| part.as_file().sync_all()).with_context(|| made(path))?;
        parts.push((part, path));
    }
    for (part, path) in parts {
        part.persist_noclobber(path).with_context(|| made(path))?;
    }
    Ok(())
}
