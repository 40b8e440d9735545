//! What is on the disk: images by their digest, partial ones, and which belongs to which bundle.
//!
//! ```text
//! bundles/<sha256>.erofs         verified, whole
//! bundles/<sha256>.erofs.part    on its way
//! bundles/<name>.installed  ──►  the image to start next
//! bundles/<name>.good       ──►  the image that was ready last: the way back
//! mounts/<name>-<16 digits>/     where an image is mounted
//! view/<name>  ──►  mounts/…     the one whose daemons run; daemons and people see this path alone
//! ```
//! Daemons see the stable path, since containerd writes the paths of its shims down and reads them
//! again after an upgrade.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Free space that an installation leaves on the data disk, in bytes.
const RESERVE: u64 = 8 << 20;

/// SHA-256 of an image. It is shown as 64 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest(pub [u8; 32]);

impl fmt::Display for Digest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

/// Text that is not 64 lower-case hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a digest has 64 hexadecimal digits")]
pub struct NoDigest;

impl FromStr for Digest {
    type Err = NoDigest;

    fn from_str(text: &str) -> Result<Self, NoDigest> {
        let digit = |byte: u8| match byte {
            b'0'..=b'9' => Ok(byte - b'0'),
            b'a'..=b'f' => Ok(byte - b'a' + 10),
            _ => Err(NoDigest),
        };
        let text: &[u8; 64] = text.as_bytes().try_into().map_err(|_| NoDigest)?;
        let mut bytes = [0; 32];
        for (byte, digits) in bytes.iter_mut().zip(text.chunks_exact(2)) {
            *byte = digit(digits[0])? << 4 | digit(digits[1])?;
        }
        Ok(Self(bytes))
    }
}

/// What an image is to its bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// To be started next.
    Installed,
    /// Was ready last.
    Good,
}

impl Role {
    fn suffix(self) -> &'static str {
        match self {
            Self::Installed => "installed",
            Self::Good => "good",
        }
    }
}

/// The folders.
#[derive(Debug, Clone)]
pub struct Store {
    /// Images and links to them; on the data disk.
    pub bundles: PathBuf,
    /// Logs of the daemons; on the data disk.
    pub logs: PathBuf,
    /// Where bundles are seen.
    pub view: PathBuf,
    /// What is forgotten at a reboot: which runtimes are wanted, settings files.
    pub run: PathBuf,
}

impl Default for Store {
    fn default() -> Self {
        Self {
            bundles: "/data/bundles".into(),
            logs: "/data/log".into(),
            view: "/opt/dhow".into(),
            run: "/run/dhow/runtimes".into(),
        }
    }
}

impl Store {
    /// Makes the folders.
    ///
    /// # Errors
    /// When one cannot be made.
    pub fn prepare(&self) -> io::Result<()> {
        let mut private = fs::DirBuilder::new();
        private.recursive(true).mode(0o700);
        private.create(&self.bundles)?;
        private.create(&self.run)?;
        let mut shared = fs::DirBuilder::new();
        shared.recursive(true).mode(0o755);
        shared.create(&self.logs)?;
        shared.create(self.view.join(".mounts"))
    }

    /// A verified image's file.
    #[must_use]
    pub fn image(&self, digest: Digest) -> PathBuf {
        self.bundles.join(format!("{digest}.erofs"))
    }

    /// A partial image's file.
    #[must_use]
    pub fn part(&self, digest: Digest) -> PathBuf {
        self.bundles.join(format!("{digest}.erofs.part"))
    }

    /// Where an image of the bundle is mounted.
    #[must_use]
    pub fn mount_folder(&self, name: &str, digest: Digest) -> PathBuf {
        self.view.join(".mounts").join(folder_name(name, digest))
    }

    /// Where images of the bundle are mounted, or were.
    #[must_use]
    pub fn mount_folders(&self, name: &str) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(self.view.join(".mounts")) else { return Vec::new() };
        let of_bundle = |path: &PathBuf| {
            let folder = path
                .file_name()
                .and_then(|folder| folder.to_str())
                .and_then(|folder| folder.rsplit_once('-'));
            folder.is_some_and(|(bundle, _)| bundle == name)
        };
        entries.flatten().map(|entry| entry.path()).filter(of_bundle).collect()
    }

    /// Where daemons and people see the bundle.
    #[must_use]
    pub fn seen(&self, name: &str) -> PathBuf {
        self.view.join(name)
    }

    /// Folder of the daemons' settings files.
    #[must_use]
    pub fn configs(&self) -> &Path {
        &self.run
    }

    /// A daemon's log.
    #[must_use]
    pub fn log(&self, daemon: &str) -> PathBuf {
        self.logs.join(format!("{daemon}.log"))
    }

    /// The image that has `role` for the bundle; none where there is none or it is not whole.
    #[must_use]
    pub fn digest(&self, name: &str, role: Role) -> Option<Digest> {
        let target = fs::read_link(self.link(name, role)).ok()?;
        let digest = target.to_str()?.strip_suffix(".erofs")?.parse().ok()?;
        self.image(digest).is_file().then_some(digest)
    }

    /// Gives `role` to an image, at once and for good.
    ///
    /// # Errors
    /// When the link cannot be written.
    pub fn set(&self, name: &str, role: Role, digest: Digest) -> io::Result<()> {
        if self.digest(name, role) == Some(digest) {
            return Ok(());
        }
        replace_link(&PathBuf::from(format!("{digest}.erofs")), &self.link(name, role))?;
        self.sync()
    }

    /// Lets daemons and people see this image of the bundle.
    ///
    /// # Errors
    /// When the link cannot be written.
    pub fn show(&self, name: &str, digest: Digest) -> io::Result<()> {
        replace_link(&Path::new(".mounts").join(folder_name(name, digest)), &self.seen(name))
    }

    /// Notes that the daemons of this image are to run, until the next boot or [`Store::forget`].
    ///
    /// # Errors
    /// When the note cannot be written.
    pub fn want(&self, name: &str, digest: Digest) -> io::Result<()> {
        fs::write(self.run.join(format!("{name}.wanted")), digest.to_string())
    }

    /// Takes [`Store::want`] back.
    ///
    /// # Errors
    /// When the note cannot be removed.
    pub fn forget(&self, name: &str) -> io::Result<()> {
        absent_is_fine(fs::remove_file(self.run.join(format!("{name}.wanted"))))
    }

    /// The bundles whose daemons are to run, and of which image.
    #[must_use]
    pub fn wanted(&self) -> Vec<(String, Digest)> {
        let Ok(entries) = fs::read_dir(&self.run) else { return Vec::new() };
        let wanted = |entry: fs::DirEntry| {
            let name = entry.file_name().into_string().ok()?.strip_suffix(".wanted")?.to_owned();
            let digest = fs::read_to_string(entry.path()).ok()?.parse().ok()?;
            Some((name, digest))
        };
        entries.flatten().filter_map(wanted).collect()
    }

    /// Removes images without a role and partial ones, but what is `kept`.
    pub fn sweep(&self, kept: Digest) {
        let Ok(entries) = fs::read_dir(&self.bundles) else { return };
        let entries: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        let mut used: HashSet<OsString> =
            entries.iter().filter_map(|path| fs::read_link(path).ok()).map(Into::into).collect();
        used.extend(
            [self.image(kept), self.part(kept)].iter().filter_map(|path| path.file_name()).map(Into::into),
        );
        for path in entries {
            let image = path.extension().is_some_and(|extension| extension == "erofs" || extension == "part");
            if image && !path.is_symlink() && path.file_name().is_some_and(|name| !used.contains(name)) {
                match fs::remove_file(&path) {
                    Ok(()) => tracing::info!(path = %path.display(), "old bundle removed"),
                    Err(error) => tracing::warn!(%error, path = %path.display(), "old bundle stays"),
                }
            }
        }
    }

    /// Bytes that can still be written for an installation.
    ///
    /// # Errors
    /// As statvfs(3).
    pub fn free(&self) -> io::Result<u64> {
        let disk = rustix::fs::statvfs(&self.bundles)?;
        Ok(disk.f_bavail.saturating_mul(disk.f_frsize).saturating_sub(RESERVE))
    }

    /// Writes the bundles folder's entries back.
    ///
    /// # Errors
    /// As fsync(2).
    pub fn sync(&self) -> io::Result<()> {
        fs::File::open(&self.bundles)?.sync_all()
    }

    fn link(&self, name: &str, role: Role) -> PathBuf {
        self.bundles.join(format!("{name}.{}", role.suffix()))
    }
}

fn folder_name(name: &str, digest: Digest) -> String {
    format!("{name}-{}", &digest.to_string()[..16])
}

/// Makes `link` lead to `target`, also where it was something else before.
fn replace_link(target: &Path, link: &Path) -> io::Result<()> {
    let mut fresh = link.as_os_str().to_owned();
    fresh.push(".new");
    absent_is_fine(fs::remove_file(&fresh))?;
    std::os::unix::fs::symlink(target, &fresh)?;
    fs::rename(&fresh, link)
}

/// A removal of what is not there has its result.
pub(super) fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(root: &Path) -> Store {
        let store = Store {
            bundles: root.join("bundles"),
            logs: root.join("log"),
            view: root.join("view"),
            run: root.join("run"),
        };
        store.prepare().unwrap();
        store
    }

    #[test]
    fn a_digest_is_64_digits_and_comes_back() {
        let digest = Digest(std::array::from_fn(|at| at as u8 * 8 + 3));
        assert_eq!(digest.to_string().parse(), Ok(digest));
        for bad in ["", "0", &"g".repeat(64), &"A".repeat(64), &"0".repeat(65), &"ä".repeat(32)] {
            assert_eq!(bad.parse::<Digest>(), Err(NoDigest), "{bad}");
        }
    }

    #[test]
    fn roles_keep_images_and_the_rest_goes() {
        let root = tempfile::tempdir().unwrap();
        let store = store(root.path());
        let [one, two, three, four] = [1, 2, 3, 4].map(|byte| Digest([byte; 32]));
        assert_eq!(store.digest("docker", Role::Installed), None);
        for digest in [one, two, three] {
            fs::write(store.image(digest), "").unwrap();
        }
        for digest in [one, four] {
            fs::write(store.part(digest), "").unwrap();
        }
        store.set("docker", Role::Good, one).unwrap();
        store.set("docker", Role::Installed, one).unwrap();
        store.set("docker", Role::Installed, two).unwrap();
        assert_eq!(store.digest("docker", Role::Good), Some(one));
        assert_eq!(store.digest("docker", Role::Installed), Some(two));
        store.sweep(four);
        let mut left: Vec<_> =
            fs::read_dir(&store.bundles).unwrap().map(|entry| entry.unwrap().path()).collect();
        left.sort();
        let mut expected = vec![store.image(one), store.image(two), store.part(four)];
        expected.extend([store.bundles.join("docker.good"), store.bundles.join("docker.installed")]);
        expected.sort();
        assert_eq!(left, expected);
        // A link to what is gone is no image.
        fs::remove_file(store.image(two)).unwrap();
        assert_eq!(store.digest("docker", Role::Installed), None);
    }

    #[test]
    fn the_view_moves_at_once_and_wishes_last_for_the_boot() {
        let root = tempfile::tempdir().unwrap();
        let store = store(root.path());
        let [one, two] = [1, 2].map(|byte| Digest([byte; 32]));
        for digest in [one, two] {
            fs::create_dir(store.mount_folder("docker", digest)).unwrap();
            fs::write(store.mount_folder("docker", digest).join("which"), digest.to_string()).unwrap();
            store.show("docker", digest).unwrap();
            assert_eq!(fs::read_to_string(store.seen("docker").join("which")).unwrap(), digest.to_string());
        }
        store.want("docker", one).unwrap();
        assert_eq!(store.wanted(), [("docker".to_owned(), one)]);
        store.forget("docker").unwrap();
        store.forget("docker").unwrap();
        assert_eq!(store.wanted(), []);
    }
}
