//! Images between two stores over QUIC on the loopback.
#![cfg(feature = "io")]

use monitord::images::{Entry, FILES, MANIFEST, Manifest, hex};
use monitord::io::images::Images;
use sha2::{Digest, Sha256};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use tokio::runtime::Runtime;
use violin_channel::quic::{Endpoint, alpn, dialler, listen};
use violin_channel::tls::{Credentials, Timing};
use violin_common::control::monitor::ImageDigest;

/// Larger than one chunk.
const LARGE: usize = 3_000_001;

/// Writes an image into a store; returns its digest.
fn image(store: &Path) -> ImageDigest {
    image_of(store, 7)
}

fn image_of(store: &Path, byte: u8) -> ImageDigest {
    let content = |name: &str| if name == "root.img" { vec![byte; LARGE] } else { name.as_bytes().to_vec() };
    let entry = |name: &str| {
        let bytes = content(name);
        Entry { name: name.into(), size: bytes.len() as u64, sha256: hex(&Sha256::digest(&bytes)) }
    };
    let manifest = serde_json::to_vec(&Manifest { files: FILES.iter().map(|name| entry(name)).collect() }).unwrap();
    let digest = hex(&Sha256::digest(&manifest));
    let dir = store.join(&digest);
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join(MANIFEST), manifest).unwrap();
    FILES.iter().for_each(|name| std::fs::write(dir.join(name), content(name)).unwrap());
    ImageDigest::try_from(digest).unwrap()
}

struct World {
    dir: tempfile::TempDir,
    runtime: Runtime,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let hosts = ["h1", "h2"].map(|host| (host.parse().unwrap(), "d1".parse().unwrap()));
        violin_channel::pki::write_pki(&dir.path().join("pki"), "test", &hosts).unwrap();
        Self { dir, runtime: Runtime::new().unwrap() }
    }

    fn credentials(&self, host: &str) -> Arc<Credentials> {
        let files = violin_channel::pki::paths(&self.dir.path().join("pki"), &host.parse().unwrap());
        Arc::new(Credentials::load(&files).unwrap())
    }

    fn open(&self, host: &str, endpoint: Endpoint) -> Arc<Images> {
        let store = self.dir.path().join(host);
        Arc::new(Images::open(&store, Some((endpoint, self.runtime.handle().clone()))).unwrap())
    }

    /// A store that serves; returns where.
    fn serve(&self, host: &str) -> SocketAddr {
        let _inside = self.runtime.enter();
        let any = "127.0.0.1:0".parse().unwrap();
        let endpoint = listen(any, self.credentials(host), alpn::IMAGE, Timing::CALM).unwrap();
        let address = endpoint.local_addr().unwrap();
        self.runtime.spawn(self.open(host, endpoint.clone()).serve(endpoint));
        address
    }

    /// A store that fetches.
    fn fetcher(&self, host: &str, remote: SocketAddr) -> Arc<Images> {
        let _inside = self.runtime.enter();
        self.open(host, dialler(remote, self.credentials(host), alpn::IMAGE, Timing::CALM).unwrap())
    }
}

#[test]
fn an_image_is_fetched_whole_and_found_from_then_on() {
    let world = World::new();
    let digest = image(&world.dir.path().join("h1"));
    let source = world.serve("h1");
    let images = world.fetcher("h2", source);
    assert!(images.list().is_empty());

    let files = images.ensure(&digest, &[source], &mut |_, _| {}).unwrap();

    assert_eq!(std::fs::read(&files.root).unwrap(), vec![7; LARGE]);
    assert_eq!(images.list(), std::slice::from_ref(&digest));
    images.ensure(&digest, &[], &mut |_, _| panic!("fetched again")).unwrap();
}

#[test]
fn a_fetch_keeps_neither_images_that_are_here_nor_other_fetches_waiting() {
    let world = World::new();
    let digest = image(&world.dir.path().join("h1"));
    let (here, nowhere) = (image_of(&world.dir.path().join("h2"), 8), image_of(&world.dir.path().join("other"), 9));
    let source = world.serve("h1");
    let images = world.fetcher("h2", source);
    let mut in_the_fetch = None;

    let fetched = images.ensure(&digest, &[source], &mut |_, _| {
        let (images, here, nowhere) = (Arc::clone(&images), here.clone(), nowhere.clone());
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let found = images.ensure(&here, &[], &mut |_, _| {}).is_ok();
            let _ = sender.send(found && images.ensure(&nowhere, &[], &mut |_, _| {}).is_err());
        });
        in_the_fetch = in_the_fetch.or_else(|| Some(receiver.recv_timeout(std::time::Duration::from_secs(120)).ok()));
    });

    assert!(fetched.is_ok());
    assert_eq!(in_the_fetch, Some(Some(true)));
}

#[test]
fn an_image_nobody_has_is_refused_with_what_each_said() {
    let world = World::new();
    let source = world.serve("h1");
    let images = world.fetcher("h2", source);
    let digest = ImageDigest::try_from("0".repeat(64)).unwrap();

    let error = images.ensure(&digest, &[source], &mut |_, _| {}).unwrap_err().to_string();

    assert!(error.contains(&source.to_string()) && error.contains("No such file"), "{error}");
    assert!(images.ensure(&digest, &[], &mut |_, _| {}).unwrap_err().to_string().contains("no source was named"));
}

#[test]
fn a_file_that_is_not_what_the_manifest_says_is_not_taken() {
    let world = World::new();
    let digest = image(&world.dir.path().join("h1"));
    let root = world.dir.path().join("h1").join(digest.as_str()).join("root.img");
    let mut bytes = std::fs::read(&root).unwrap();
    bytes[LARGE / 2] ^= 1;
    std::fs::write(&root, bytes).unwrap();
    let source = world.serve("h1");
    let images = world.fetcher("h2", source);

    let error = images.ensure(&digest, &[source], &mut |_, _| {}).unwrap_err().to_string();

    assert!(error.contains("root.img: got SHA-256"), "{error}");
    assert!(images.list().is_empty());
    assert_eq!(std::fs::read_dir(world.dir.path().join("h2")).unwrap().count(), 0);
}
