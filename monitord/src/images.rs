//! What a guest image is: a directory named by a digest, holding a manifest and the files it lists.
//!
//! The digest is the SHA-256 of the manifest's bytes and the manifest has the SHA-256 of each file, so whoever knows the
//! digest can check everything and needs to trust nobody who sends it.

use serde::{Deserialize, Serialize};

/// Name of the manifest in an image's directory.
pub const MANIFEST: &str = "manifest.json";
/// Files of every image: kernel, initial RAM disk, read-only root file system.
pub const FILES: [&str; 3] = ["vmlinuz", "initrd", "root.img"];
/// Largest manifest read, in bytes.
pub const MANIFEST_LIMIT: u64 = 64 << 10;
/// Largest file taken, in bytes.
pub const FILE_LIMIT: u64 = 64 << 30;

/// `manifest.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// One entry for each of [`FILES`].
    pub files: Vec<Entry>,
}

/// One file of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Name, one of [`FILES`].
    pub name: String,
    /// Length, in bytes.
    pub size: u64,
    /// SHA-256, 64 hexadecimal digits.
    pub sha256: String,
}

/// A manifest was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadManifest {
    /// Not JSON of the right shape.
    #[error("manifest: {0}")]
    Json(String),
    /// Files missing, doubled or strange.
    #[error("manifest: got files {got:?}, want exactly {FILES:?}")]
    Files {
        /// Names found.
        got: Vec<String>,
    },
    /// A file too large to take.
    #[error("manifest: got {name} of {size} bytes, want at most {FILE_LIMIT}")]
    Size {
        /// File.
        name: String,
        /// Bytes.
        size: u64,
    },
}

impl Manifest {
    /// Reads and checks a manifest. Names are compared with [`FILES`], so none can lead out of the directory.
    pub fn parse(bytes: &[u8]) -> Result<Self, BadManifest> {
        let manifest: Self = serde_json::from_slice(bytes).map_err(|error| BadManifest::Json(error.to_string()))?;
        let names: Vec<_> = manifest.files.iter().map(|entry| entry.name.clone()).collect();
        if names.len() != FILES.len() || !FILES.iter().all(|file| names.iter().any(|name| name == file)) {
            return Err(BadManifest::Files { got: names });
        }
        match manifest.files.iter().find(|entry| entry.size > FILE_LIMIT) {
            Some(entry) => Err(BadManifest::Size { name: entry.name.clone(), size: entry.size }),
            None => Ok(manifest),
        }
    }
}

/// Bytes as lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(names: &[&str]) -> Vec<u8> {
        let files = names.iter().map(|name| Entry { name: (*name).into(), size: 1, sha256: "0".repeat(64) }).collect();
        serde_json::to_vec(&Manifest { files }).unwrap()
    }

    #[test]
    fn a_manifest_lists_each_file_once() {
        assert!(Manifest::parse(&manifest(&["root.img", "vmlinuz", "initrd"])).is_ok());
        for bad in [&["vmlinuz", "initrd"][..], &["vmlinuz", "vmlinuz", "initrd"], &["vmlinuz", "initrd", "../root.img"]] {
            assert!(matches!(Manifest::parse(&manifest(bad)), Err(BadManifest::Files { .. })), "{bad:?}");
        }
        assert!(matches!(Manifest::parse(b"{"), Err(BadManifest::Json(_))));
    }
}
