//! Files that are there whole or not at all.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Replaces `path` by a file of `bytes` that only its owner reads. After a crash, a power cut or a full
/// disk the old or the new content is there, never a part.
///
/// # Errors
/// When it cannot be written; the old file is untouched then.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    let written = write(&new, bytes).and_then(|()| std::fs::rename(&new, path));
    if written.is_err() {
        // A part of it must not fill a full disk further; the error above is the one to tell.
        let _ = std::fs::remove_file(&new);
        return written;
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_file_is_replaced_and_survives_a_failure() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("record.bin");
        super::replace(&file, b"one").unwrap();
        super::replace(&file, b"two").unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), b"two");
        // A folder in the way of the new file.
        std::fs::create_dir(file.with_extension("new")).unwrap();
        super::replace(&file, b"three").unwrap_err();
        assert_eq!(std::fs::read(&file).unwrap(), b"two");
    }
}
