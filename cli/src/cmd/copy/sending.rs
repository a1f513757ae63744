//! Into a node: a file as it is, a folder as one archive.

use super::{How, Node, at, name};
use crate::cmd::reach::{MISSING, quoted};
use anyhow::{Context, Result, bail};
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Seek, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

pub(super) fn send(node: &Node<'_>, from: &str, path: &str, several: bool, how: How) -> Result<()> {
    let local = Path::new(from);
    let cannot = || format!("cannot read {}", local.display());
    let meta = fs::metadata(local).with_context(cannot)?;
    if meta.is_dir() {
        if !how.recursive {
            bail!("got the folder {}, want a file, or -r", local.display());
        }
        return send_folder(node, local, &finding(path, name(from), several), how);
    }
    let file = of_known_length(local).with_context(cannot)?;
    let bytes = file.metadata()?.len();
    let finding = finding(path, name(from), several || path.ends_with('/'));
    pour(file, node.shell(&receiving(&finding, bytes, &meta, how)))
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

/// Gives a node's command its standard input. It passes through here, so that it ends when this process does, and what has
/// not come whole is not kept there.
fn pour(mut from: impl Read, mut command: Command) -> Result<()> {
    let mut child = command.stdin(Stdio::piped()).spawn().context(MISSING)?;
    let mut into = child.stdin.take().context("no input of ssh")?;
    let poured = io::copy(&mut from, &mut into);
    drop((from, into));
    let status = child.wait()?;
    match poured {
        // Whoever hangs up has said why.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error).context("reading failed"),
        _ if !status.success() => bail!("copy failed: {status}"),
        poured => Ok(poured.map(drop)?),
    }
}

/// Finds out on a node where a copy goes, in its shell's words: `path` is that place from then on.
fn finding(path: &str, name: Option<&str>, strict: bool) -> String {
    let path = match path.trim_end_matches('/') {
        "" => "/",
        path => path,
    };
    let inside = name.map_or_else(|| ":".to_owned(), |name| format!("path=${{path%/}}/{}", quoted(name)));
    let otherwise = if strict {
        r#"else
    echo "got $path, want a folder that is there" >&2
    exit 1
"#
    } else {
        ""
    };
    format!("path={}\nif [ -d \"$path\" ]; then\n    {inside}\n{otherwise}fi\n", at(path))
}

/// What `path` really is, a newline at its end included, which `$(...)` alone takes off.
const RESOLVE: &str = r#"path=$(readlink -f -- "$path" && echo .) ||
    { echo "got $path, want a place in a folder that is there" >&2; exit 1; }
path=${path%??}
"#;

/// Receives a file on a node, in its shell's words. A connection that breaks ends `cat` as a whole file does: only the length
/// tells them apart. A pipe, a device or a file of the kernel's is written as it comes; a link stays one; the mode of what was
/// there stays unless modes are kept, its owner always.
fn receiving(finding: &str, bytes: u64, meta: &Metadata, how: How) -> String {
    let (mode, time) = (meta.permissions().mode(), meta.mtime());
    let new = format!("chmod \"$(printf %o $((0{:o} & ~$mask)))\" \"$part\" || exit 1", mode & 0o777);
    let keep = format!("chmod {:o} \"$part\" && touch -m -d @{time} \"$part\" || exit 1", mode & 0o7777);
    let (new, old, keep) =
        if how.preserve { ("true", "true", &*keep) } else { (&*new, r#"chmod "$(stat -c %a "$path")" "$part""#, "") };
    format!(
        r#"mask=0$(umask)
{finding}{RESOLVE}if [ -d "$path" ]; then echo "got $path, which is a folder, want to write a file" >&2; exit 1; fi
case $path in /proc/*|/sys/*) exec cat > "$path";; esac
if [ -e "$path" ] && [ ! -f "$path" ]; then exec cat > "$path"; fi
part=${{path%/*}}/.violin.$$.part
set -C
: > "$part" || exit 1
set +C
trap 'rm -f "$part"' EXIT
trap 'exit 1' HUP INT TERM PIPE
cat > "$part" || exit 1
came=$(wc -c < "$part")
[ "$came" -ge {bytes} ] || {{ echo "got $came bytes, want {bytes}: try again" >&2; exit 1; }}
if [ -e "$path" ]; then
    chown "$(stat -c %u:%g "$path")" "$part" && {old} || exit 1
else
    {new}
fi
{keep}
mv -f "$part" "$path""#
    )
}

/// What of a folder is copied: links are followed, as scp does.
#[derive(Debug, Default)]
struct Found {
    /// Paths from the folder on, each with a NUL behind it; a folder before what is in it.
    names: Vec<u8>,
    /// Those of folders once more.
    folders: Vec<u8>,
    count: u64,
    left_out: u64,
}

impl Found {
    /// Looks through `root`/`inside`; `above` are the folders on the way there.
    fn look(&mut self, root: &Path, inside: &Path, above: &mut Vec<(u64, u64)>) {
        let path = root.join(inside);
        if let Err(why) = self.add(root, inside, &path, above) {
            eprintln!("violin: {} is left out: {why:#}", path.display());
            self.left_out += 1;
        }
    }

    fn add(&mut self, root: &Path, inside: &Path, path: &Path, above: &mut Vec<(u64, u64)>) -> Result<()> {
        let meta = fs::metadata(path)?;
        let this = (meta.dev(), meta.ino());
        let mut entries = Vec::new();
        if meta.is_dir() {
            if above.contains(&this) {
                bail!("it is a folder that it is in");
            }
            entries = fs::read_dir(path)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<_>>()?;
        } else if meta.is_file() {
            File::open(path)?;
        } else {
            bail!("it is neither a file nor a folder");
        }
        let name = [inside.as_os_str().as_bytes(), b"\0"].concat();
        self.names.extend_from_slice(&name);
        if meta.is_dir() {
            self.folders.extend_from_slice(&name);
        }
        self.count += 1;
        above.push(this);
        for entry in entries {
            self.look(root, &inside.join(entry), above);
        }
        above.pop();
        Ok(())
    }
}

/// Unpacks an archive beside what is there, in words of a node's shell, and puts it in its place when the whole has come. The
/// end of a connection between two files is no error to `tar`: only their number tells.
fn unpacking(finding: &str, count: u64, how: How) -> String {
    let (kept, folder, old) = if how.preserve {
        ("-p", r#"chmod "$mode" "$path" && touch -m -d "@$time" "$path" || failed=1"#, "true")
    } else {
        ("-m --no-same-permissions", ":", r#"chmod "$(stat -c %a "$path")" "$each""#)
    };
    format!(
        r#"{finding}if [ -d "$path" ]; then
    part=$path
elif [ -e "$path" ]; then
    echo "got $path, which is no folder, want to write one" >&2
    exit 1
else
    part=${{path%/*}}
fi
part=$(mktemp -d "$part/.violin.XXXXXX") || exit 1
trap 'rm -rf "$part"' EXIT
trap 'exit 1' HUP INT TERM PIPE
tar -x -o {kept} -f - -C "$part" || exit 1
came=$(find "$part" -print0 | tr -dc '\000' | wc -c)
[ "$came" -eq {count} ] || {{ echo "got $came files and folders, want {count}: try again" >&2; exit 1; }}
if [ ! -d "$path" ]; then
    mv "$part" "$path"
    exit
fi
merge() {{
    failed=0
    for each in "$1"/* "$1"/.[!.]* "$1"/..?*; do
        [ -e "$each" ] || continue
        path=$2/${{each##*/}}
        if [ -d "$each" ] && [ -d "$path" ]; then
            mode=$(stat -c %a "$each") time=$(stat -c %Y "$each")
            (merge "$each" "$path") || failed=1
            {folder}
        elif [ -d "$path" ] || {{ [ -d "$each" ] && [ -e "$path" ]; }}; then
            echo "$path is left as it is: a folder does not replace a file, nor a file a folder" >&2
            failed=1
        elif [ -e "$path" ]; then
            {RESOLVE}            chown "$(stat -c %u:%g "$path")" "$each" && {old} && mv -f "$each" "$path" || failed=1
        else
            mv -f "$each" "$path" || failed=1
        fi
    done
    return $failed
}}
failed=0
mode=$(stat -c %a "$part") time=$(stat -c %Y "$part")
(merge "$part" "$path") || failed=1
rm -rf "$part"
{folder}
exit $failed"#
    )
}

fn send_folder(node: &Node<'_>, local: &Path, finding: &str, how: How) -> Result<()> {
    let mut found = Found::default();
    found.look(local, Path::new("."), &mut Vec::new());
    let mut names = tempfile::tempfile()?;
    names.write_all(&found.names)?;
    if how.preserve {
        // Not every tar gives a folder its time after what is written in it.
        names.write_all(&found.folders)?;
    }
    names.rewind()?;
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(PathBuf::from(".").join(local)).args(["-c", "-h", "--no-recursion", "--null", "-T", "-", "-f", "-"]);
    let mut tar = tar.stdin(names).stdout(Stdio::piped()).spawn().context("cannot run tar")?;
    let archive = tar.stdout.take().context("no output of tar")?;
    let sent = pour(archive, node.shell(&unpacking(finding, found.count, how)));
    let packed = tar.wait()?;
    sent?;
    if !packed.success() {
        bail!("packing {} failed: tar: {packed}", local.display());
    }
    if found.left_out > 0 {
        bail!("{} of the folder left out", found.left_out);
    }
    Ok(())
}
