//! What a daemon needs of its host to start: its own address, which may come late, and folders.

use nix::unistd::{AccessFlags, access};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How often an address that is not there yet is tried.
const AGAIN: Duration = Duration::from_millis(500);

/// How long a killed daemon may take to let go of its port: it does when its last thread has ended.
const LET_GO: (Duration, Duration) = (Duration::from_secs(3), Duration::from_millis(50));

/// Opens what listens at an address with `bind`. While no interface of this host has the address, as before DHCP has answered, it
/// waits, which the log says once. For a port that a killed daemon is letting go of just now it waits some seconds.
///
/// *Errors*: any other, such as the port being taken.
pub async fn patiently<T>(address: SocketAddr, mut bind: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let (mut waited, began) = (false, Instant::now());
    loop {
        match bind() {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && began.elapsed() < LET_GO.0 => {
                tokio::time::sleep(LET_GO.1).await;
            }
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {
                if !waited {
                    tracing::warn!(%address, "no interface of this host has the `listen` address (yet): waiting for it");
                }
                waited = true;
                tokio::time::sleep(AGAIN).await;
            }
            bound => {
                if waited && bound.is_ok() {
                    tracing::info!(%address, "the `listen` address is there");
                }
                return bound;
            }
        }
    }
}

/// Whether a folder is there, or can be made with all above it. Makes nothing.
///
/// *Errors*: what stands in the way, in words.
pub fn folder_can_be(path: &Path) -> io::Result<()> {
    let absolute = std::path::absolute(path)?;
    let there = absolute.ancestors().find(|above| above.symlink_metadata().is_ok());
    let there = there.map_or_else(|| PathBuf::from("/"), Path::to_path_buf);
    let refused = |kind, what: &str| {
        let words = format!("got folder {}, but {} {what}: want a folder that can be written", path.display(), there.display());
        Err(io::Error::new(kind, words))
    };
    if !there.is_dir() {
        return refused(io::ErrorKind::NotADirectory, "is no folder");
    }
    match access(&there, AccessFlags::W_OK | AccessFlags::X_OK) {
        Ok(()) => Ok(()),
        Err(error) => refused(io::Error::from(error).kind(), &format!("cannot be written ({})", error.desc())),
    }
}

/// Whether the folder of a file is there, or can be made.
pub fn folder_of_can_be(file: &Path) -> io::Result<()> {
    folder_can_be(file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or_else(|| Path::new(".")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;

    #[test]
    fn a_folder_that_cannot_be_is_told_with_what_stands_in_its_way() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();

        folder_can_be(&folder.path().join("a/b/c")).unwrap();
        assert!(!folder.path().join("a").exists());
        folder_of_can_be(Path::new("socket")).unwrap();
        let error = folder_can_be(&file.join("b/c")).unwrap_err().to_string();
        assert!(error.contains("b/c, but ") && error.contains("file is no folder"), "{error}");
        let error = folder_can_be(Path::new("/proc/sys/a")).unwrap_err().to_string();
        assert!(error.contains("/proc/sys cannot be written"), "{error}");
    }

    #[tokio::test]
    async fn an_address_that_is_taken_is_an_error_after_some_seconds_and_none_if_it_is_let_go() {
        let taken = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();

        let error = patiently(address, || UdpSocket::bind(address)).await.unwrap_err();

        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        let mut tries = 0;
        let mut killed = Some(taken);
        let bind = || {
            tries += 1;
            if tries == 3 {
                killed = None;
            }
            UdpSocket::bind(address)
        };
        patiently(address, bind).await.unwrap();
    }

    #[tokio::test]
    async fn an_address_that_comes_late_is_waited_for() {
        let mut tries = 0;
        let bind = || {
            tries += 1;
            if tries < 3 { Err(io::ErrorKind::AddrNotAvailable.into()) } else { UdpSocket::bind("127.0.0.1:0") }
        };

        patiently("192.0.2.1:7471".parse().unwrap(), bind).await.unwrap();

        assert_eq!(tries, 3);
    }
}
