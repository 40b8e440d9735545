//! Where an image is found and what it says of itself.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use dhow_protocol::bundle::BundleOffer;
use serde::Deserialize;
use sha2::{Digest, Sha256};

/// The manifest's name in an image's folder. It is written last: a folder with one is whole.
const MANIFEST: &str = "manifest.toml";
/// The manifest's format that this build reads.
const FORMAT: u32 = 1;
/// File names of an image.
const KERNEL: &str = "vmlinuz";
const INITRAMFS: &str = "initramfs.cpio.zst";
const BASE: &str = "base.erofs";

/// Why there is no image to boot.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// None at all.
    #[error("no system image in {0}")]
    None(PathBuf),
    /// The manifest cannot be read.
    #[error("{} is no system image: its {MANIFEST} cannot be read", folder.display())]
    Unreadable {
        /// The image's folder.
        folder: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The manifest is malformed.
    #[error("{} is malformed", .0.display())]
    Malformed(PathBuf, #[source] toml::de::Error),
    /// A newer image.
    #[error("{} has image format {got}, this dhow reads {FORMAT}", folder.display())]
    Format {
        /// The image's folder.
        folder: PathBuf,
        /// Its format.
        got: u32,
    },
    /// A file that the manifest should name and the folder hold.
    #[error("the system image in {} has no whole {name}", folder.display())]
    File {
        /// The image's folder.
        folder: PathBuf,
        /// The file.
        name: String,
    },
}

#[derive(Debug, Deserialize)]
struct Manifest {
    format: u32,
    kernel: String,
    docker: String,
    files: BTreeMap<String, ManifestFile>,
}

#[derive(Debug, Deserialize)]
struct ManifestFile {
    size: u64,
    sha256: String,
}

/// A whole image.
#[derive(Debug)]
pub struct Image {
    folder: PathBuf,
    manifest: Manifest,
}

impl Image {
    /// The image in `chosen`, or the newest one below `store`.
    ///
    /// # Errors
    /// As [`ImageError`] says. Sizes are checked here, digests where the files go to the guest.
    pub fn find(chosen: Option<&Path>, store: &Path) -> Result<Self, ImageError> {
        let folder = match chosen {
            Some(folder) => folder.to_owned(),
            None => newest(store).ok_or_else(|| ImageError::None(store.to_owned()))?,
        };
        let path = folder.join(MANIFEST);
        let text = std::fs::read_to_string(&path)
            .map_err(|source| ImageError::Unreadable { folder: folder.clone(), source })?;
        let manifest: Manifest = toml::from_str(&text).map_err(|error| ImageError::Malformed(path, error))?;
        if manifest.format != FORMAT {
            return Err(ImageError::Format { folder, got: manifest.format });
        }
        let image = Self { folder, manifest };
        for name in [KERNEL, INITRAMFS, BASE] {
            image.file(name)?;
        }
        Ok(image)
    }

    /// Its folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Release of its kernel.
    #[must_use]
    pub fn kernel_release(&self) -> &str {
        &self.manifest.kernel
    }

    /// Path of the kernel.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.folder.join(KERNEL)
    }

    /// Path of the initramfs, without an agent.
    #[must_use]
    pub fn initramfs(&self) -> PathBuf {
        self.folder.join(INITRAMFS)
    }

    /// Path of the base.
    #[must_use]
    pub fn base(&self) -> PathBuf {
        self.folder.join(BASE)
    }

    /// A bundle of the image: what to offer the guest, and its file. The guest checks the digest of
    /// every byte that it takes.
    ///
    /// # Errors
    /// [`ImageError::File`] when the image has no such bundle.
    pub fn bundle(&self, name: &str) -> Result<(BundleOffer, PathBuf), ImageError> {
        let file_name = format!("{name}.erofs");
        let file = self.file(&file_name)?;
        let sha256 = parse_digest(&file.sha256).ok_or_else(|| self.missing(&file_name))?;
        let offer = BundleOffer {
            name: name.to_owned(),
            version: self.manifest.docker.clone(),
            sha256,
            size: file.size,
        };
        Ok((offer, self.folder.join(file_name)))
    }

    /// The manifest's word on a file, whose size on disk must be as it says.
    fn file(&self, name: &str) -> Result<&ManifestFile, ImageError> {
        let file = self.manifest.files.get(name).ok_or_else(|| self.missing(name))?;
        match self.folder.join(name).metadata() {
            Ok(meta) if meta.is_file() && meta.len() == file.size => Ok(file),
            _ => Err(self.missing(name)),
        }
    }

    fn missing(&self, name: &str) -> ImageError {
        ImageError::File { folder: self.folder.clone(), name: name.to_owned() }
    }
}

/// The folder below `store` with the newest manifest.
fn newest(store: &Path) -> Option<PathBuf> {
    std::fs::read_dir(store)
        .ok()?
        .filter_map(|entry| {
            let folder = entry.ok()?.path();
            let modified = folder.join(MANIFEST).metadata().ok()?.modified().ok()?;
            Some((modified, folder))
        })
        .max()
        .map(|(_, folder)| folder)
}

/// 64 hexadecimal digits as 32 bytes.
fn parse_digest(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    let mut digest = [0; 32];
    for (byte, at) in digest.iter_mut().zip((0..64).step_by(2)) {
        *byte = u8::from_str_radix(&text[at..at + 2], 16).ok()?;
    }
    Some(digest)
}

/// SHA-256 of `bytes` as hexadecimal digits.
#[must_use]
pub fn hex_digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write_image(folder: &Path, kernel: &[u8]) {
        let mut manifest = "format = 1\nkernel = \"6.12\"\ndocker = \"26.1\"\n".to_owned();
        for name in [KERNEL, INITRAMFS, BASE, "docker.erofs"] {
            std::fs::write(folder.join(name), b"abc").unwrap();
            let digest = hex_digest(b"abc");
            manifest.push_str(&format!("[files.\"{name}\"]\nsize = 3\nsha256 = \"{digest}\"\n"));
        }
        std::fs::write(folder.join(KERNEL), kernel).unwrap();
        std::fs::write(folder.join(MANIFEST), manifest).unwrap();
    }

    #[test]
    fn a_whole_image_is_found_and_offers_its_bundle() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("one");
        std::fs::create_dir(&folder).unwrap();
        write_image(&folder, b"abc");
        let image = Image::find(None, dir.path()).unwrap();
        assert_eq!(image.folder(), folder);
        let (offer, path) = image.bundle("docker").unwrap();
        assert_eq!((offer.size, path), (3, folder.join("docker.erofs")));
        assert!(hex_digest(b"abc").starts_with(&format!("{:02x}", offer.sha256[0])));
        assert!(matches!(image.bundle("podman"), Err(ImageError::File { .. })));
    }

    #[test]
    fn a_cut_file_and_an_empty_store_are_named() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Image::find(None, dir.path()), Err(ImageError::None(_))));
        write_image(dir.path(), b"ab");
        let error = Image::find(Some(dir.path()), dir.path()).unwrap_err();
        assert!(error.to_string().contains("no whole vmlinuz"), "{error}");
    }
}
