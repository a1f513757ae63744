//! The directory through which the monitors of one machine hand sandbox guests to each other.
//!
//! Each guest has a directory with `guest.json` (what never changes) and exactly one marker file whose *name* says whose it
//! is: `at.HOST` (it belongs to HOST) or `to.HOST` (offered to HOST, which may take it). A marker changes hands by one
//! rename, which the kernel does for one asker only; so at any kill a guest belongs to exactly one host.

use crate::io::private;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use violin_common::control::monitor::VmSpec;
use violin_common::{HostId, Instant, VmId};

/// What stays the same for a guest's whole life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Guest {
    /// As it was asked for.
    pub spec: VmSpec,
    /// Its first process, as the host numbers it.
    pub init: i32,
    /// When that started; a reused number has another.
    pub started: u64,
    /// Name of the host's end of its veth.
    pub interface: String,
}

impl Guest {
    /// Whether its first process, and with it the guest, lives.
    pub(crate) fn is_alive(&self) -> bool {
        crate::io::proc::start_time(self.init) == Some(self.started)
    }
}

/// One end of a move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct End {
    /// Host.
    pub host: HostId,
    /// Path of its network namespace.
    pub netns: PathBuf,
}

/// Content of the marker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Marker {
    /// Where the guest ran last.
    pub from: End,
    /// Where it is being moved; what of it was done is found by looking.
    pub to: Option<End>,
    /// When it began to run at the place the marker names; none while it does not.
    pub running: Option<Instant>,
    /// The clock that says so: see [`violin_channel::clock::name`]; none: a monitor of an earlier version wrote it.
    #[serde(default)]
    pub clock: Option<String>,
}

impl Marker {
    /// Of a guest that runs since then, on this host's clock.
    pub(crate) fn running(from: End, since: Instant) -> Self {
        Self { from, to: None, running: Some(since), clock: Some(violin_channel::clock::name()) }
    }
}

/// Whose a guest is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// This host's.
    At(HostId),
    /// Offered to this host.
    To(HostId),
}

impl Place {
    fn file(&self) -> String {
        match self {
            Self::At(host) => format!("at.{host}"),
            Self::To(host) => format!("to.{host}"),
        }
    }

    fn parse(name: &str) -> Option<Self> {
        if let Some(host) = name.strip_prefix("at.") {
            return Some(Self::At(host.parse().ok()?));
        }
        Some(Self::To(name.strip_prefix("to.")?.parse().ok()?))
    }
}

/// The directory itself.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    root: PathBuf,
}

fn read<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    serde_json::from_slice(&fs::read(path)?)
        .map_err(|error| io::Error::other(format!("{}: got {error}, want a file this driver wrote", path.display())))
}

/// Writes a file for root alone, whole or not at all.
pub(crate) fn write_whole(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_vec_pretty(value).map_err(io::Error::other)?;
    let temporary =
        path.with_file_name(format!(".{}.{}", path.file_name().unwrap_or_default().to_string_lossy(), std::process::id()));
    private::write(&temporary, text)?;
    fs::rename(&temporary, path)
}

impl Store {
    pub(crate) fn open(root: &Path) -> io::Result<Self> {
        fs::create_dir_all(root)?;
        let store = Self { root: root.canonicalize()? };
        for vm in store.names()? {
            let dir = store.dir(&vm);
            // An earlier version left them open to all users, keys and all.
            if dir.is_dir()
                && let Err(error) = private::close(&dir)
            {
                tracing::error!(vm = %vm, %error, "closing a guest's folder to other users; it holds keys");
            }
        }
        Ok(store)
    }

    /// Name of the control group above those of the guests, which all hosts of one deployment share.
    pub(crate) fn group(&self, mark: Option<&str>) -> String {
        let from_folder = || format!("{:08x}", fnv(self.root.as_os_str().as_encoded_bytes()));
        format!("violin-{}.sandbox", mark.map_or_else(from_folder, str::to_owned))
    }

    pub(crate) fn dir(&self, vm: &VmId) -> PathBuf {
        self.root.join(vm.as_str())
    }

    pub(crate) fn console(&self, vm: &VmId) -> PathBuf {
        self.dir(vm).join("console.log")
    }

    pub(crate) fn guest(&self, vm: &VmId) -> io::Result<Option<Guest>> {
        match read(&self.dir(vm).join("guest.json")) {
            Ok(guest) => Ok(Some(guest)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes the guest known as belonging to `marker.from`. `guest.json` comes first: a marker without it is never seen.
    pub(crate) fn add(&self, guest: &Guest, marker: &Marker) -> io::Result<()> {
        write_whole(&self.dir(&guest.spec.vm).join("guest.json"), guest)?;
        self.write_marker(&guest.spec.vm, &Place::At(marker.from.host.clone()), marker)
    }

    /// Whose the guest is; `None`: nobody's, it is not complete or not there.
    pub(crate) fn place(&self, vm: &VmId) -> io::Result<Option<Place>> {
        let entries = match fs::read_dir(self.dir(vm)) {
            // A file among the folders is none of ours.
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(None),
            other => other?,
        };
        for entry in entries {
            if let Some(place) = entry?.file_name().to_str().and_then(Place::parse) {
                return Ok(Some(place));
            }
        }
        Ok(None)
    }

    /// All guests with a marker.
    pub(crate) fn all(&self) -> io::Result<Vec<(VmId, Place)>> {
        let mut found = Vec::new();
        for vm in self.names()? {
            if let Some(place) = self.place(&vm)? {
                found.push((vm, place));
            }
        }
        Ok(found)
    }

    /// Everything here that is named as a guest may be, in order; whether it is one is not looked at.
    pub(crate) fn names(&self) -> io::Result<Vec<VmId>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.root)? {
            found.extend(entry?.file_name().to_str().and_then(|name| name.parse::<VmId>().ok()));
        }
        found.sort();
        Ok(found)
    }

    pub(crate) fn marker(&self, vm: &VmId, place: &Place) -> io::Result<Marker> {
        read(&self.dir(vm).join(place.file()))
    }

    pub(crate) fn write_marker(&self, vm: &VmId, place: &Place, marker: &Marker) -> io::Result<()> {
        write_whole(&self.dir(vm).join(place.file()), marker)
    }

    /// Gives the guest from one place to another; `false`: it is not at `from` (any more).
    pub(crate) fn pass(&self, vm: &VmId, from: &Place, to: &Place) -> io::Result<bool> {
        let dir = self.dir(vm);
        match fs::rename(dir.join(from.file()), dir.join(to.file())) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Forgets the guest.
    pub(crate) fn remove(&self, vm: &VmId) -> io::Result<()> {
        match fs::remove_dir_all(self.dir(vm)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}

/// FNV-1a, 32 bits: a short name for a longer one; nothing depends on its being hard to forge.
pub(crate) fn fnv(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        (dir, store)
    }

    fn marker() -> Marker {
        Marker { from: End { host: "h1".parse().unwrap(), netns: "/x".into() }, to: None, running: None, clock: None }
    }

    #[test]
    fn an_offered_guest_is_taken_by_one_side_only() {
        let (_dir, store) = store();
        let vm: VmId = "alpha-c1".parse().unwrap();
        let (h1, h2) = ("h1".parse::<HostId>().unwrap(), "h2".parse::<HostId>().unwrap());
        fs::create_dir_all(store.dir(&vm)).unwrap();
        store.write_marker(&vm, &Place::At(h1.clone()), &marker()).unwrap();

        assert!(store.pass(&vm, &Place::At(h1.clone()), &Place::To(h2.clone())).unwrap());
        let taken = store.pass(&vm, &Place::To(h2.clone()), &Place::At(h2.clone())).unwrap();
        let taken_back = store.pass(&vm, &Place::To(h2.clone()), &Place::At(h1)).unwrap();

        assert!(taken && !taken_back);
        assert_eq!(store.place(&vm).unwrap(), Some(Place::At(h2)));
    }

    #[test]
    fn a_half_written_marker_is_no_marker() {
        let (_dir, store) = store();
        let vm: VmId = "alpha-c1".parse().unwrap();
        fs::create_dir_all(store.dir(&vm)).unwrap();
        fs::write(store.dir(&vm).join(".at.h1.77"), "{").unwrap();

        assert_eq!(store.place(&vm).unwrap(), None);
        assert!(store.all().unwrap().is_empty());
    }
}
