//! Installing a bundle: answer the host's offer, receive the image, make it the one to start next.

use std::fs;
use std::io;
use std::sync::Arc;

use dhow_protocol::bundle::{BundleAnswer, BundleOffer, BundleResult};
use dhow_protocol::codec::{self, CONTROL_LIMIT, CodecError};
use dhow_protocol::errors::chain;
use tokio::io::{AsyncRead, AsyncWrite};

use super::manifest::{Manifest, ManifestError, Variables, is_name, is_version};
use super::mount::Mount;
use super::receive::{ReceiveError, receive};
use super::store::{Digest, Role, Store};
use super::text::{escape, mebibytes};

/// Longest `bundle.toml`, in bytes.
const MANIFEST_LIMIT: u64 = 64 << 10;

/// Why a bundle is not installed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The offer is malformed.
    #[error("the bundle's {0} is not one that the guest takes")]
    Offer(&'static str),
    /// Too large for the disk.
    #[error(
        "the bundle needs {} and the guest's data disk has {} left; remove what is not needed, or enlarge the disk",
        mebibytes(*.needed),
        mebibytes(*.free)
    )]
    Space {
        /// Bytes that are still to come.
        needed: u64,
        /// Bytes that the disk takes.
        free: u64,
    },
    /// Not received.
    #[error(transparent)]
    Receive(#[from] ReceiveError),
    /// The stream failed in an answer.
    #[error("the host does not take the answer")]
    Answer(#[source] CodecError),
    /// The store failed.
    #[error("the guest's store of bundles failed")]
    Store(#[source] io::Error),
    /// Not to be used.
    #[error("the bundle is of no use")]
    Open(#[from] OpenError),
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The kernel refused.
    #[error("its image cannot be mounted")]
    Mount(#[source] io::Error),
    /// It cannot be read.
    #[error("its bundle.toml cannot be read")]
    Read(#[source] io::Error),
    /// It says nothing sensible.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// It is another bundle.
    #[error("it was offered as {offered} and calls itself {found}")]
    Name {
        /// Name in the offer.
        offered: String,
        /// Name in `bundle.toml`.
        found: String,
    },
    /// It is for another base.
    #[error(
        "it was made for the base release {made_for}, and the guest's is {here}; update the system image"
    )]
    Base {
        /// Release in `bundle.toml`.
        made_for: String,
        /// Release of the guest.
        here: String,
    },
}

/// The disk, how images are mounted there, and for which base.
pub struct Library {
    /// The folders.
    pub store: Store,
    /// Mounts images.
    pub mount: Box<dyn Mount>,
    /// Release of the guest's base, where it is known.
    pub base: Option<String>,
    /// What daemons' command lines may name.
    pub variables: Variables,
}

impl Library {
    /// Mounts an image where it is not, and reads what it says of itself.
    ///
    /// # Errors
    /// As [`OpenError`] says.
    pub fn open(&self, name: &str, digest: Digest) -> Result<Manifest, OpenError> {
        let folder = self.store.mount_folder(name, digest);
        let mounted = self.mount.is_mounted(&folder).and_then(|mounted| {
            if mounted {
                return Ok(());
            }
            fs::create_dir_all(&folder)?;
            self.mount.mount(&self.store.image(digest), &folder)
        });
        mounted.map_err(OpenError::Mount)?;
        let text = read_limited(&folder.join("bundle.toml")).map_err(OpenError::Read)?;
        let manifest = Manifest::parse(&text, &self.store.seen(name), self.store.configs(), &self.variables)?;
        if manifest.name != name {
            return Err(OpenError::Name { offered: name.to_owned(), found: manifest.name });
        }
        match &self.base {
            Some(here) if *here != manifest.base => {
                Err(OpenError::Base { made_for: manifest.base, here: here.clone() })
            }
            _ => Ok(manifest),
        }
    }

    /// Takes the mounts of the bundle out of sight, but that of the image `kept`.
    pub fn detach(&self, name: &str, kept: Option<Digest>) {
        let kept = kept.map(|digest| self.store.mount_folder(name, digest));
        for folder in self.store.mount_folders(name) {
            if kept.as_ref() != Some(&folder) {
                self.detach_folder(&folder);
            }
        }
    }

    fn detach_folder(&self, folder: &std::path::Path) {
        let detached = self
            .mount
            .is_mounted(folder)
            .and_then(|mounted| if mounted { self.mount.detach(folder) } else { Ok(()) })
            .and_then(|()| super::store::absent_is_fine(fs::remove_dir(folder)));
        if let Err(error) = detached {
            tracing::warn!(%error, folder = %folder.display(), "an old bundle stays mounted");
        }
    }

    /// Discards an image that is of no use.
    fn discard(&self, name: &str, digest: Digest) {
        self.detach_folder(&self.store.mount_folder(name, digest));
        if let Err(error) = fs::remove_file(self.store.image(digest)) {
            tracing::warn!(%error, %digest, "a useless bundle stays on the disk");
        }
    }
}

/// Serves one offer to its end; the caller lets one be served at a time.
pub async fn serve<S>(library: &Arc<Library>, offer: BundleOffer, stream: &mut S)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    // What the host names goes to the log.
    let (name, version) = (escape(&offer.name, 64), escape(&offer.version, 64));
    let result: BundleResult = match install(library, &offer, stream).await {
        Ok(()) => Ok(()),
        Err(error) => Err(chain(&error)),
    };
    match &result {
        Ok(()) => tracing::info!(name, version, "bundle installed"),
        Err(reason) => tracing::error!(name, version, reason, "bundle not installed"),
    }
    if let Err(error) = codec::write_frame(stream, &result, CONTROL_LIMIT).await {
        tracing::warn!(%error, "the host did not hear how the installation ended");
    }
}

async fn install<S>(library: &Arc<Library>, offer: &BundleOffer, stream: &mut S) -> Result<(), InstallError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let digest = Digest(offer.sha256);
    let store = &library.store;
    let begun = begin(library, offer, digest).await;
    let answer = match &begun {
        Ok(Begin::Have) => BundleAnswer::Have,
        Ok(Begin::Send { offset }) => BundleAnswer::Send { offset: *offset },
        // Nothing of it is wanted; the reason follows.
        Err(_) => BundleAnswer::Send { offset: offer.size },
    };
    codec::write_frame(stream, &answer, CONTROL_LIMIT).await.map_err(InstallError::Answer)?;
    if let Begin::Send { offset } = begun? {
        let part = store.part(digest);
        let received = receive(stream, &part, offset, offer.size, digest).await;
        if let Err(error) = received {
            if !error.is_resumable() {
                super::store::absent_is_fine(fs::remove_file(&part)).map_err(InstallError::Store)?;
            }
            return Err(error.into());
        }
        fs::rename(&part, store.image(digest)).and_then(|()| store.sync()).map_err(InstallError::Store)?;
        if let Err(error) = open(library, &offer.name, digest).await {
            library.discard(&offer.name, digest);
            return Err(error.into());
        }
    }
    store.set(&offer.name, Role::Installed, digest).map_err(InstallError::Store)?;
    store.sweep(digest);
    Ok(())
}

enum Begin {
    Have,
    Send { offset: u64 },
}

async fn begin(library: &Arc<Library>, offer: &BundleOffer, digest: Digest) -> Result<Begin, InstallError> {
    let store = &library.store;
    let fits =
        [("name", is_name(&offer.name)), ("version", is_version(&offer.version)), ("size", offer.size > 0)];
    if let Some((what, _)) = fits.into_iter().find(|(_, fits)| !fits) {
        return Err(InstallError::Offer(what));
    }
    store.prepare().map_err(InstallError::Store)?;
    if store.image(digest).is_file() {
        match open(library, &offer.name, digest).await {
            Ok(_) => return Ok(Begin::Have),
            Err(error) => {
                tracing::warn!(
                    error = chain(&error),
                    "the bundle on the disk is of no use; it is asked for again"
                );
                library.discard(&offer.name, digest);
            }
        }
    }
    store.sweep(digest);
    let have = fs::metadata(store.part(digest)).map_or(0, |part| part.len());
    // A part that is longer than the whole is none of it.
    let offset = if have <= offer.size { have } else { 0 };
    let free = store.free().map_err(InstallError::Store)?.saturating_add(have - offset);
    let needed = offer.size - offset;
    if needed > free {
        return Err(InstallError::Space { needed, free });
    }
    Ok(Begin::Send { offset })
}

/// [`Library::open`] away from the streams that are served: it waits for the disk.
pub async fn open(library: &Arc<Library>, name: &str, digest: Digest) -> Result<Manifest, OpenError> {
    let (library, name) = (Arc::clone(library), name.to_owned());
    tokio::task::spawn_blocking(move || library.open(&name, digest))
        .await
        .unwrap_or_else(|panic| Err(OpenError::Mount(io::Error::other(panic))))
}

fn read_limited(path: &std::path::Path) -> io::Result<String> {
    use std::io::Read;
    let mut text = String::new();
    fs::File::open(path)?.take(MANIFEST_LIMIT + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MANIFEST_LIMIT {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "above 64 KiB"));
    }
    Ok(text)
}
