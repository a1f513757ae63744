//! `cp`: a file into or out of a node. What was there stays until the whole has come.

use super::reach::{Way, quoted};
use crate::target::Target;
use anyhow::{Context, Result, bail};
use std::fs::{self, File, Permissions};
use std::io::{self, Seek};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

/// Copies a file: one side is `ENV:NODE:PATH`.
pub(crate) fn copy(target: &Target, from: &str, to: &str) -> Result<()> {
    let (remote, local, into) = match (from.split_once(':'), to.split_once(':')) {
        (Some(remote), None) => (remote, to, false),
        (None, Some(remote)) => (remote, from, true),
        _ => bail!("got {from:?} and {to:?}, want a local path and ENV:NODE:PATH, in either order"),
    };
    let (node, path) = remote.1.split_once(':').with_context(|| format!("got {:?}, want ENV:NODE:PATH", remote.1))?;
    let way = Way::open(target, &remote.0.parse()?)?;
    let command = way.ssh(way.vm(Some(node))?.address);
    if into { send(command, Path::new(local), path) } else { fetch(command, path, Path::new(local)) }
}

fn succeed(mut command: Command) -> Result<()> {
    let status = command.status().context("cannot run nsenter (Debian package util-linux) and ssh (openssh-client)")?;
    if status.success() { Ok(()) } else { bail!("copy failed: {status}") }
}

fn send(mut command: Command, local: &Path, path: &str) -> Result<()> {
    let file = of_known_length(local).with_context(|| format!("cannot read {}", local.display()))?;
    let bytes = file.metadata()?.len();
    command.arg(receiving(path, bytes)).stdin(file);
    succeed(command)
}

/// The file; of a pipe or device all that comes out of it.
fn of_known_length(local: &Path) -> io::Result<File> {
    let mut file = File::open(local)?;
    if file.metadata()?.is_file() {
        return Ok(file);
    }
    let mut all = tempfile::tempfile()?;
    io::copy(&mut file, &mut all)?;
    all.rewind()?;
    Ok(all)
}

/// Receives a file on a node, in its shell's words. A connection that breaks ends `cat` as a whole file does: only the length
/// tells them apart. A pipe, a device or a file of the kernel's is written as it comes; a link stays one; mode and owner stay.
fn receiving(path: &str, bytes: u64) -> String {
    let path = quoted(path);
    format!(
        r#"path=$(readlink -f -- {path}) || path={path}
case $path in /proc/*|/sys/*) exec cat > "$path";; esac
if [ -e "$path" ] && [ ! -f "$path" ]; then exec cat > "$path"; fi
part=$path.$$.part
set -C
: > "$part" || exit 1
set +C
trap 'rm -f -- "$part"' EXIT
cat > "$part" || exit 1
came=$(wc -c < "$part")
[ "$came" -ge {bytes} ] || {{ echo "got $came bytes, want {bytes}: try again" >&2; exit 1; }}
if [ -e "$path" ]; then
    chown "$(stat -c %u:%g -- "$path")" "$part" && chmod "$(stat -c %a -- "$path")" "$part" || exit 1
fi
mv -f -- "$part" "$path""#
    )
}

fn fetch(mut command: Command, path: &str, local: &Path) -> Result<()> {
    let cannot = || format!("cannot write {}", local.display());
    command.arg(format!("cat -- {}", quoted(path))).stdin(Stdio::null());
    let there = fs::metadata(local).ok();
    if there.as_ref().is_some_and(|meta| !meta.is_file()) {
        // A pipe or device is written as it comes.
        command.stdout(File::create(local).with_context(cannot)?);
        return succeed(command);
    }
    // What a link names is replaced, not the link.
    let local = fs::canonicalize(local).unwrap_or_else(|_| local.to_owned());
    let folder = local.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    // As any new file: the umask is taken off.
    let mode = Permissions::from_mode(0o666);
    let part = tempfile::Builder::new().prefix(".violin-").suffix(".part").permissions(mode).tempfile_in(folder);
    let part = part.with_context(cannot)?;
    if let Some(there) = there {
        part.as_file().set_permissions(there.permissions()).with_context(cannot)?;
    }
    command.stdout(part.as_file().try_clone().with_context(cannot)?);
    succeed(command)?;
    part.persist(&local).with_context(cannot)?;
    Ok(())
}
