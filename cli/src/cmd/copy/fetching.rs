//! Out of a node: a file or a folder over one connection, each file in its place when the whole of it has come.

use super::{How, Node, at, name};
use crate::cmd::reach::{MISSING, quoted};
use anyhow::{Context, Result, bail};
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, Metadata, Permissions};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _, fchown};
use std::path::{Component, Path, PathBuf};
use std::process::Stdio;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};
use tempfile::NamedTempFile;

/// The file that is being written, which an end by a signal must not leave.
static PART: Mutex<Option<PathBuf>> = Mutex::new(None);

/// What a signal does before it ends this process: none is begun any more.
pub(super) fn end(status: i32) {
    let part = PART.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(part) = part.as_ref() {
        let _ = fs::remove_file(part);
    }
    std::process::exit(status);
}

/// Tells of files and folders in a node's shell's words: mode, time, length and name, then the content of a file, no more
/// than was told. What cannot be looked at, a broken link for one, is told with zeros.
const TELLING: &str = r#"for path; do
    told=$(stat -L -c "%f %Y %s" "$path") || told="0 0 0"
    printf "%s\n%s\000" "$told" "$path"
    if [ -f "$path" ] && [ "${told##* }" != 0 ]; then head -c "${told##* }" "$path"; fi
done"#;

pub(super) fn fetch(node: &Node<'_>, path: &str, local: &Path, how: How) -> Result<()> {
    let of_folder = if how.recursive {
        format!("cd \"$path\" && exec find -L . -exec sh -c {} sh {{}} +", quoted(TELLING))
    } else {
        r#"echo "got the folder $path, want a file, or -r" >&2"#.to_owned()
    };
    let script = format!(
        "path={}\nif [ -d \"$path\" ]; then\n    {of_folder}\n    exit 1\nfi\n\
         stat -L -c '%f %Y %s' \"$path\" && printf '\\000' && cat \"$path\"",
        at(path)
    );
    let mut child = node.shell(&script).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context(MISSING)?;
    let mut from = BufReader::new(child.stdout.take().context("no output of ssh")?);
    let place = name(path).filter(|_| local.is_dir()).map_or_else(|| local.to_owned(), |name| local.join(name));
    let done = receive(&mut from, &place, local, how);
    // Whoever still writes hears that nobody reads.
    drop(from);
    let status = child.wait()?;
    match done? {
        _ if !status.success() => bail!("copy failed: {status}"),
        Done::Nothing => bail!("copy failed: the node said nothing"),
        Done::File(part) => part.finish(&place),
        Done::Folder { left_out: 0 } => Ok(()),
        Done::Folder { left_out } => bail!("{left_out} of the folder left out"),
    }
}

/// What has come.
#[derive(Debug)]
enum Done {
    Nothing,
    File(Part),
    Folder { left_out: u64 },
}

fn receive(from: &mut impl BufRead, place: &Path, local: &Path, how: How) -> Result<Done> {
    let Some(first) = Told::read(from)? else { return Ok(Done::Nothing) };
    if first.is_folder() {
        return folder(from, first, place, how);
    }
    if local.as_os_str().as_bytes().ends_with(b"/") && !local.is_dir() {
        bail!("got {}, want a folder that is there", local.display());
    }
    let (part, came) = take(from, &first, place, how).with_context(|| format!("cannot write {}", place.display()))?;
    // Files of the kernel's say that they are empty, pipes and devices say nothing.
    if first.is_file() && came < first.len {
        bail!("got {came} bytes, want {}: try again", first.len);
    }
    Ok(Done::File(part))
}

fn folder(from: &mut impl BufRead, first: Told, place: &Path, how: How) -> Result<Done> {
    let mut left_out = 0;
    let mut folders = Vec::new();
    let mut next = Some(first);
    while let Some(told) = next {
        let to = place.join(within(&told.name)?);
        let mut content = from.take(if told.is_file() { told.len } else { 0 });
        let done = if told.is_file() {
            take(&mut content, &told, &to, how).and_then(|(part, came)| if came < told.len { Ok(()) } else { part.finish(&to) })
        } else if told.is_folder() {
            let made = if to.is_dir() { Ok(()) } else { DirBuilder::new().mode(told.mode & 0o777 | 0o700).create(&to) };
            made.map_err(Into::into)
        } else {
            Err(anyhow::anyhow!("it is neither a file nor a folder"))
        };
        if let Err(error) = done {
            if to == place {
                return Err(error).with_context(|| format!("cannot make {}", to.display()));
            }
            eprintln!("violin: {} is left out: {error:#}", to.display());
            left_out += 1;
        }
        io::copy(&mut content, &mut io::sink())?;
        if content.limit() > 0 {
            bail!("{} broke off or became shorter: try again", to.display());
        }
        if how.preserve && told.is_folder() {
            folders.push((to, told));
        }
        next = Told::read(from)?;
    }
    // When nothing is written in them any more.
    for (folder, told) in folders.iter().rev() {
        told.keep(&File::open(folder)?)?;
    }
    Ok(Done::Folder { left_out })
}

/// A path below the folder that is copied. The guest names it, so it is not believed.
fn within(path: &Path) -> Result<PathBuf> {
    let parts = path.components().filter(|part| *part != Component::CurDir);
    if parts.clone().any(|part| !matches!(part, Component::Normal(_))) {
        bail!("the node names {}, want a path within the folder", path.display());
    }
    Ok(parts.collect())
}

/// What a node says of a file before it sends it.
#[derive(Debug)]
struct Told {
    mode: u32,
    time: i64,
    len: u64,
    name: PathBuf,
}

impl Told {
    /// `None`: it has said everything.
    fn read(from: &mut impl BufRead) -> Result<Option<Self>> {
        let mut line = Vec::new();
        from.take(100).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Ok(None);
        }
        let mut name = Vec::new();
        // The longest path a kernel takes.
        from.take(4096).read_until(0, &mut name)?;
        let told = || {
            let words = str::from_utf8(line.strip_suffix(b"\n")?).ok()?;
            let mut words = words.split(' ');
            let mode = u32::from_str_radix(words.next()?, 16).ok()?;
            let (time, len) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
            Some(Self { mode, time, len, name: OsStr::from_bytes(name.strip_suffix(b"\0")?).into() })
        };
        told().map(Some).with_context(|| {
            let line = String::from_utf8_lossy(&line);
            format!("got {line:?}, want mode, time and length of a file: it broke off or became shorter, try again")
        })
    }

    const fn is_file(&self) -> bool {
        self.mode & 0o170_000 == 0o100_000
    }

    const fn is_folder(&self) -> bool {
        self.mode & 0o170_000 == 0o040_000
    }

    /// Gives mode and time, whatever the umask.
    fn keep(&self, file: &File) -> io::Result<()> {
        file.set_permissions(Permissions::from_mode(self.mode & 0o777))?;
        let span = Duration::from_secs(self.time.unsigned_abs());
        let time =
            if self.time < 0 { SystemTime::UNIX_EPOCH.checked_sub(span) } else { SystemTime::UNIX_EPOCH.checked_add(span) };
        time.map_or(Ok(()), |time| file.set_modified(time))
    }
}

/// A copy that is complete and not yet in its place; nothing where it was written as it came.
#[derive(Debug)]
struct Part(Option<NamedTempFile>);

impl Part {
    fn finish(self, local: &Path) -> Result<()> {
        if let Some(part) = self.0 {
            // What a link names is replaced, not the link.
            let local = fs::canonicalize(local).unwrap_or_else(|_| local.to_owned());
            part.persist(&local).with_context(|| format!("cannot write {}", local.display()))?;
        }
        Ok(())
    }
}

/// Writes what comes; how much that was.
fn take(from: &mut impl Read, told: &Told, local: &Path, how: How) -> Result<(Part, u64)> {
    let there = fs::metadata(local).ok();
    if there.as_ref().is_some_and(Metadata::is_dir) {
        bail!("it is a folder here");
    }
    if there.as_ref().is_some_and(|meta| !meta.is_file()) {
        // A pipe or device is written as it comes.
        return Ok((Part(None), io::copy(from, &mut File::create(local)?)?));
    }
    let local = fs::canonicalize(local).unwrap_or_else(|_| local.to_owned());
    let folder = local.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    let mut part = tempfile::Builder::new();
    // As any new file: the umask is taken off.
    part.prefix(".violin-").suffix(".part").permissions(Permissions::from_mode(told.mode & 0o777));
    let part = {
        let mut current = PART.lock().unwrap_or_else(PoisonError::into_inner);
        let part = part.tempfile_in(folder)?;
        *current = Some(part.path().to_owned());
        part
    };
    let came = io::copy(from, &mut part.as_file())?;
    if let Some(there) = &there {
        fchown(part.as_file(), Some(there.uid()), Some(there.gid()))?;
    }
    if how.preserve {
        told.keep(part.as_file())?;
    } else if let Some(there) = there {
        part.as_file().set_permissions(there.permissions())?;
    }
    Ok((Part(Some(part)), came))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_named_by_a_guest_stays_within_the_folder() {
        for bad in ["/etc/passwd", "../x", "./a/../../x"] {
            assert!(within(Path::new(bad)).is_err(), "{bad}");
        }
        assert_eq!(within(Path::new("./a/b")).unwrap(), Path::new("a/b"));
        assert_eq!(within(Path::new(".")).unwrap(), Path::new(""));
    }

    #[test]
    fn what_a_node_tells_is_cut_or_nonsense_is_refused_and_nothing_panics() {
        let good = b"81a4 -5 3\n./a\0".as_slice();
        assert_eq!(Told::read(&mut &*good).unwrap().unwrap().time, -5);
        for cut in 1..good.len() {
            assert!(Told::read(&mut &good[..cut]).is_err(), "{cut}");
        }
        for bad in ["x 1 1\na\0", "81a4 1 -1\na\0", "81a4 1\na\0", "81a4 99999999999999999999 1\na\0", "\n\0", "\u{fffd}"] {
            assert!(Told::read(&mut bad.as_bytes()).is_err(), "{bad:?}");
        }
        assert!(Told::read(&mut &[][..]).unwrap().is_none());
    }
}
