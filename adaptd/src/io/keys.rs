//! Key pairs of environments: made by `ssh-keygen`, kept beside the journal, written where the operator's command finds them.

use crate::io::secrets::destroy;
use crate::records::Keys;
use anyhow::{Context, bail};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use violin_common::EnvironmentId;

/// How the names of folders begin in which key pairs are being made; no environment's name begins like that.
const NEW: &str = ".new-";

/// Directory of the private keys: `keys/` beside the local socket.
pub fn directory(socket: &Path) -> PathBuf {
    socket.parent().unwrap_or_else(|| Path::new(".")).join("keys")
}

/// Makes an Ed25519 key pair. Its files are in a folder of this call's own meanwhile: no two calls meet.
pub async fn generate(socket: &Path, environment: &EnvironmentId) -> anyhow::Result<Keys> {
    let directory = directory(socket);
    make_directory(&directory)?;
    let workplace = tempfile::Builder::new().prefix(NEW).tempdir_in(&directory).context("making a folder for a new key pair")?;
    let path = workplace.path().join("key");
    let output = tokio::process::Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-C"])
        .arg(format!("violin-{environment}"))
        .arg("-f")
        .arg(&path)
        .stdin(std::process::Stdio::null())
        .output()
        .await
        .context("starting ssh-keygen (package openssh-client)")?;
    if !output.status.success() {
        bail!("ssh-keygen: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    let keys = Keys { public: std::fs::read_to_string(path.with_extension("pub"))?, private: std::fs::read_to_string(&path)? };
    destroy(&path).context("removing the files of a new key pair")?;
    workplace.close().context("removing the files of a new key pair")?;
    Ok(keys)
}

/// Removes what a manager that was killed while it made a key pair has left.
pub fn tidy(socket: &Path) -> anyhow::Result<()> {
    let directory = directory(socket);
    make_directory(&directory)?;
    for entry in std::fs::read_dir(&directory).with_context(|| format!("reading {}", directory.display()))?.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(NEW) {
            std::fs::remove_dir_all(entry.path()).with_context(|| format!("removing {}", entry.path().display()))?;
        } else if name.ends_with(".new") || name.ends_with(".new.pub") {
            // As versions before this one called them; no environment's name has a dot.
            remove(&entry.path())?;
        }
    }
    Ok(())
}

/// Writes an environment's private key, readable by its owner only.
pub fn store(socket: &Path, environment: &EnvironmentId, keys: &Keys) -> anyhow::Result<()> {
    use std::io::Write;
    let directory = directory(socket);
    make_directory(&directory)?;
    let path = directory.join(environment.as_str());
    remove(&path)?;
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("writing {}", path.display()))?;
    file.write_all(keys.private.as_bytes())?;
    Ok(())
}

/// Removes an environment's private key.
pub fn forget(socket: &Path, environment: &EnvironmentId) -> anyhow::Result<()> {
    remove(&directory(socket).join(environment.as_str()))
}

fn make_directory(path: &Path) -> anyhow::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).with_context(|| format!("making {}", path.display()))
}

fn remove(path: &Path) -> anyhow::Result<()> {
    destroy(path).with_context(|| format!("removing {}", path.display()))
}
