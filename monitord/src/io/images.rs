//! The image store of this host, and fetching between hosts.
//!
//! An image appears in the store by one rename after everything in it was checked against its digest, so what is there is
//! whole. Over the wire: the asker opens a stream and sends an [`Ask`]; the answer is a frame with the length or the reason why not, then
//! the bytes.

use super::each::OneEach;
use crate::hypervisor::ImageFiles;
use crate::images::{Entry, FILE_LIMIT, MANIFEST, MANIFEST_LIMIT, Manifest, hex};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use violin_channel::frame;
use violin_channel::quic::Endpoint;
use violin_common::control::monitor::ImageDigest;

/// Bytes read and written at a time.
const CHUNK: usize = 256 << 10;
/// A source silent for so long is given up.
const SILENCE: Duration = Duration::from_secs(20);

/// Asks for one file of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// Image.
    pub digest: ImageDigest,
    /// File; none: the manifest.
    pub file: Option<String>,
}

/// An image cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Nobody has it, or not whole.
    #[error(
        "image {digest} is not on this host and could not be fetched: {tried}; copy it to {store} or name a host that has it"
    )]
    Nowhere {
        /// Image.
        digest: String,
        /// What each source said.
        tried: String,
        /// The store.
        store: PathBuf,
    },
    /// The store cannot be written.
    #[error("image store: {0}")]
    Store(#[from] io::Error),
}

/// The store.
#[derive(Debug)]
pub struct Images {
    store: PathBuf,
    endpoint: Option<(Endpoint, tokio::runtime::Handle)>,
    /// One fetch of an image at a time: two starts of the same one fetch it once.
    fetching: OneEach<ImageDigest>,
}

impl Images {
    /// Opens the store; `endpoint` calls other monitors, from the runtime it belongs to.
    pub fn open(store: &Path, endpoint: Option<(Endpoint, tokio::runtime::Handle)>) -> io::Result<Self> {
        fs::create_dir_all(store)?;
        // What a killed fetch left behind.
        for entry in fs::read_dir(store)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "part") {
                fs::remove_dir_all(path)?;
            }
        }
        Ok(Self { store: store.to_owned(), endpoint, fetching: OneEach::default() })
    }

    /// Images that are here.
    pub fn list(&self) -> Vec<ImageDigest> {
        let Ok(entries) = fs::read_dir(&self.store) else { return Vec::new() };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut found: Vec<_> =
            names.filter_map(|name| ImageDigest::try_from(name).ok()).filter(|digest| self.find(digest).is_ok()).collect();
        found.sort();
        found
    }

    /// An image's files, if they are here: the manifest is checked by its digest, the files by their lengths (their content
    /// was, when they came).
    pub fn find(&self, digest: &ImageDigest) -> io::Result<ImageFiles> {
        let dir = self.store.join(digest.as_str());
        let manifest = self.manifest(digest)?;
        for entry in &manifest.files {
            let len = fs::metadata(dir.join(&entry.name))?.len();
            if len != entry.size {
                return Err(wrong(format!("{}: got {len} bytes, want {}", entry.name, entry.size)));
            }
        }
        Ok(ImageFiles { kernel: dir.join("vmlinuz"), initrd: dir.join("initrd"), root: dir.join("root.img") })
    }

    fn manifest(&self, digest: &ImageDigest) -> io::Result<Manifest> {
        let mut bytes = Vec::new();
        File::open(self.store.join(digest.as_str()).join(MANIFEST))?.take(MANIFEST_LIMIT).read_to_end(&mut bytes)?;
        checked(digest, &bytes)
    }

    /// Finds an image here, or fetches it from the first source that has it. Blocks; not to be called from a runtime's thread.
    pub fn ensure(
        &self,
        digest: &ImageDigest,
        sources: &[SocketAddr],
        tell: &mut dyn FnMut(Option<f64>, String),
    ) -> Result<ImageFiles, ImageError> {
        if let Ok(files) = self.find(digest) {
            return Ok(files);
        }
        self.fetching.alone(digest, || self.fetch(digest, sources, tell))
    }

    fn fetch(
        &self,
        digest: &ImageDigest,
        sources: &[SocketAddr],
        tell: &mut dyn FnMut(Option<f64>, String),
    ) -> Result<ImageFiles, ImageError> {
        // Another start may have fetched it meanwhile.
        let mut tried = match self.find(digest) {
            Ok(files) => return Ok(files),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => vec![format!("here: {error}")],
        };
        for source in sources {
            tell(None, format!("fetching image {} from {source}", &digest.as_str()[..12]));
            match self.fetch_from(digest, *source, tell) {
                Ok(()) => return Ok(self.find(digest)?),
                Err(error) => tried.push(format!("{source}: {error}")),
            }
        }
        if tried.is_empty() {
            tried.push("no source was named".into());
        }
        Err(ImageError::Nowhere { digest: digest.as_str().into(), tried: tried.join("; "), store: self.store.clone() })
    }

    fn fetch_from(&self, digest: &ImageDigest, source: SocketAddr, tell: &mut dyn FnMut(Option<f64>, String)) -> io::Result<()> {
        let Some((endpoint, runtime)) = &self.endpoint else { return Err(wrong("this monitor has no network".into())) };
        let part = self.store.join(format!("{}.part", digest.as_str()));
        let whole = self.store.join(digest.as_str());
        let fetched = runtime.block_on(async {
            fs::create_dir_all(&part)?;
            let (connection, peer) = endpoint.connect(source, None).await.map_err(io::Error::other)?;
            tracing::info!(%source, %peer, digest = digest.as_str(), "fetching an image");
            let manifest = fetch_manifest(&connection, digest, &part).await?;
            let total: u64 = manifest.files.iter().map(|entry| entry.size).sum();
            let mut done = 0;
            for entry in &manifest.files {
                fetch_file(&connection, digest, entry, &part).await?;
                done += entry.size;
                #[allow(clippy::cast_precision_loss)] // A progress figure.
                tell(Some(done as f64 / total.max(1) as f64), format!("fetched {} from {source}", entry.name));
            }
            connection.close(quinn::VarInt::from_u32(0), b"done");
            Ok(())
        });
        let placed = fetched.and_then(|()| {
            // A broken one in its place gives way: nothing runs from it, or its files stay open.
            if whole.exists() {
                fs::remove_dir_all(&whole)?;
            }
            fs::rename(&part, &whole)
        });
        if placed.is_err() {
            let _ = fs::remove_dir_all(&part);
        }
        placed
    }

    /// Gives images to other monitors for as long as the endpoint is open.
    pub async fn serve(self: Arc<Self>, endpoint: Endpoint) {
        let admitted = move |connection: quinn::Connection, identity| {
            let images = Arc::clone(&self);
            async move {
                tracing::debug!(%identity, "asks for images");
                while let Ok((send, recv)) = connection.accept_bi().await {
                    let images = Arc::clone(&images);
                    tokio::spawn(async move { images.answer(send, recv).await });
                }
            }
        };
        endpoint.serve(|| (), admitted).await;
    }

    /// Serves one asker's stream.
    async fn answer(&self, mut send: quinn::SendStream, mut recv: quinn::RecvStream) {
        let served: Result<(), Box<dyn std::error::Error + Send + Sync>> = async {
            let Some(ask) = frame::recv::<Ask>(&mut recv).await? else { return Ok(()) };
            match self.open_file(&ask) {
                Ok((file, len)) => {
                    frame::send(&mut send, &Ok::<u64, String>(len)).await?;
                    let mut file = tokio::fs::File::from_std(file).take(len);
                    let mut buffer = vec![0; CHUNK];
                    loop {
                        let read = file.read(&mut buffer).await?;
                        if read == 0 {
                            break;
                        }
                        send.write_all(&buffer[..read]).await?;
                    }
                }
                Err(error) => frame::send(&mut send, &Err::<u64, String>(error.to_string())).await?,
            }
            send.finish()?;
            Ok(())
        }
        .await;
        if let Err(error) = served {
            tracing::debug!(%error, "serving an image");
        }
    }

    /// Opens a file that may be given away: only what a whole image's manifest lists.
    fn open_file(&self, ask: &Ask) -> io::Result<(File, u64)> {
        let dir = self.store.join(ask.digest.as_str());
        let manifest = self.manifest(&ask.digest)?;
        let name = match &ask.file {
            None => MANIFEST,
            Some(name) => {
                let entry = manifest.files.iter().find(|entry| &entry.name == name);
                &entry.ok_or_else(|| wrong(format!("got file {name:?}, want one the manifest lists")))?.name
            }
        };
        let file = File::open(dir.join(name))?;
        let len = file.metadata()?.len();
        Ok((file, len))
    }
}

fn wrong(words: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, words)
}

/// A manifest whose bytes have the digest.
fn checked(digest: &ImageDigest, bytes: &[u8]) -> io::Result<Manifest> {
    let got = hex(&Sha256::digest(bytes));
    if got != digest.as_str() {
        return Err(wrong(format!("manifest: got SHA-256 {got}, want {}", digest.as_str())));
    }
    Manifest::parse(bytes).map_err(|error| wrong(error.to_string()))
}

/// Opens a stream, asks, and returns it with the length that was answered.
async fn ask(connection: &quinn::Connection, ask: &Ask, limit: u64) -> io::Result<(quinn::RecvStream, u64)> {
    let (mut send, mut recv) = connection.open_bi().await?;
    frame::send(&mut send, ask).await.map_err(io::Error::other)?;
    let answer = tokio::time::timeout(SILENCE, frame::recv::<Result<u64, String>>(&mut recv)).await?.map_err(io::Error::other)?;
    match answer {
        Some(Ok(len)) if len <= limit => Ok((recv, len)),
        Some(Ok(len)) => Err(wrong(format!("got {len} bytes, want at most {limit}"))),
        Some(Err(words)) => Err(wrong(format!("it says {words}"))),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

async fn fetch_manifest(connection: &quinn::Connection, digest: &ImageDigest, part: &Path) -> io::Result<Manifest> {
    let (mut recv, _) = ask(connection, &Ask { digest: digest.clone(), file: None }, MANIFEST_LIMIT).await?;
    let limit = usize::try_from(MANIFEST_LIMIT).unwrap_or(usize::MAX);
    let bytes = tokio::time::timeout(SILENCE, recv.read_to_end(limit)).await?.map_err(io::Error::other)?;
    let manifest = checked(digest, &bytes)?;
    fs::write(part.join(MANIFEST), &bytes)?;
    Ok(manifest)
}

async fn fetch_file(connection: &quinn::Connection, digest: &ImageDigest, entry: &Entry, part: &Path) -> io::Result<()> {
    let (mut recv, len) = ask(connection, &Ask { digest: digest.clone(), file: Some(entry.name.clone()) }, FILE_LIMIT).await?;
    if len != entry.size {
        return Err(wrong(format!("{}: got {len} bytes, want {}", entry.name, entry.size)));
    }
    let mut file = File::create(part.join(&entry.name))?;
    let mut hash = Sha256::new();
    let mut left = len;
    while left > 0 {
        let chunk = tokio::time::timeout(SILENCE, recv.read_chunk(CHUNK, true)).await??;
        let Some(chunk) = chunk else { return Err(io::ErrorKind::UnexpectedEof.into()) };
        left = left.checked_sub(chunk.bytes.len() as u64).ok_or_else(|| wrong(format!("{}: longer than said", entry.name)))?;
        hash.update(&chunk.bytes);
        file.write_all(&chunk.bytes)?;
    }
    file.sync_all()?;
    let got = hex(&hash.finalize());
    if got == entry.sha256 { Ok(()) } else { Err(wrong(format!("{}: got SHA-256 {got}, want {}", entry.name, entry.sha256))) }
}
