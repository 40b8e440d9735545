//! A small text file of the host, read again when it changes.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Device, inode, time of the last change of either (seconds and nanoseconds), and size. Not the time of the content's
/// change: files from an image or a store all have the same.
type Stamp = (u64, u64, i64, i64, u64);

/// A small text file and what it means, parsed again when its stamp changes.
#[derive(Debug)]
pub struct Watched<T> {
    path: PathBuf,
    parse: fn(&str) -> T,
    now: Mutex<(Option<Stamp>, Arc<T>)>,
}

impl<T> Watched<T> {
    /// Reads nothing yet.
    pub fn new(path: &Path, parse: fn(&str) -> T) -> Self {
        // Not read yet: whatever is there differs from no time at all.
        Self { path: path.to_owned(), parse, now: Mutex::new((None, Arc::new(parse("")))) }
    }

    /// What the file means now; that of an empty one where it cannot be read.
    pub fn get(&self) -> Arc<T> {
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        // Of the file that a symlink leads to.
        let stamp = std::fs::metadata(&self.path)
            .ok()
            .map(|file| (file.dev(), file.ino(), file.ctime(), file.ctime_nsec(), file.len()));
        if now.0 != stamp {
            let text = std::fs::read(&self.path).unwrap_or_default();
            *now = (stamp, Arc::new((self.parse)(&String::from_utf8_lossy(&text))));
        }
        Arc::clone(&now.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_seen_and_a_missing_file_is_empty() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hosts");
        let watched = Watched::new(&path, str::to_owned);
        assert!(watched.get().is_empty());
        std::fs::write(&path, "10.0.0.1 a\n").unwrap();
        assert!(watched.get().contains("a"));
        std::fs::write(&path, "10.0.0.1 a longer\n").unwrap();
        assert!(watched.get().contains("longer"));
        std::fs::remove_file(&path).unwrap();
        assert!(watched.get().is_empty());
    }

    #[test]
    fn another_file_of_the_same_length_and_time_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let [link, file, new] = ["link", "file", "new"].map(|name| folder.path().join(name));
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let watched = Watched::new(&link, str::to_owned);
        for text in ["one", "two"] {
            std::fs::write(&new, text).unwrap();
            std::fs::File::open(&new).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
            std::fs::rename(&new, &file).unwrap();
            assert_eq!(*watched.get(), text);
        }
    }
}
