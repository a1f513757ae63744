//! A guest image, put into one host's store.

use crate::error::{Doing, LabError, Result};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use violin_common::control::monitor::ImageDigest;

/// Files of an image.
const FILES: [&str; 4] = ["manifest.json", "vmlinuz", "initrd", "root.img"];

/// An image's folder and its digest: SHA-256 of the manifest.
#[derive(Debug)]
pub(crate) struct Image {
    dir: PathBuf,
    pub(crate) digest: ImageDigest,
}

impl Image {
    /// Looks at a folder. Errors: one of the files is missing.
    pub(crate) fn read(dir: &Path) -> Result<Self> {
        for file in FILES {
            let path = dir.join(file);
            if !path.exists() {
                let wanted = "a folder with manifest.json, vmlinuz, initrd and root.img: build it with `make image`".to_owned();
                return Err(LabError::Missing { path, wanted });
            }
        }
        let manifest = fs::read(dir.join("manifest.json")).doing(|| format!("reading {}/manifest.json", dir.display()))?;
        let digest: String = Sha256::digest(&manifest).iter().map(|byte| format!("{byte:02x}")).collect();
        let digest = ImageDigest::try_from(digest).map_err(|error| LabError::Name(error.to_string()))?;
        Ok(Self { dir: dir.to_owned(), digest })
    }

    /// Puts it into a store, as `DIGEST/`.
    pub(crate) fn put_into(&self, store: &Path) -> Result<()> {
        let to = store.join(self.digest.as_str());
        fs::create_dir_all(&to).doing(|| format!("making {}", to.display()))?;
        for file in FILES {
            let (from, to) = (self.dir.join(file), to.join(file));
            // A link is enough where both lie on one file system; images are never written.
            if fs::hard_link(&from, &to).is_err() {
                fs::copy(&from, &to).doing(|| format!("copying {} to {}", from.display(), to.display()))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_lies_in_the_store_under_the_digest_of_its_manifest() {
        let dir = tempfile::tempdir().unwrap();
        for file in FILES {
            fs::write(dir.path().join(file), "").unwrap();
        }
        let store = dir.path().join("store");

        Image::read(dir.path()).unwrap().put_into(&store).unwrap();

        // SHA-256 of nothing.
        let digest = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert!(store.join(digest).join("root.img").exists());
        fs::remove_file(dir.path().join("initrd")).unwrap();
        assert!(Image::read(dir.path()).unwrap_err().to_string().contains("initrd"));
    }
}
