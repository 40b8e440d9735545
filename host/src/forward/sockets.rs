//! Makes the sockets of rules, in the place of what an earlier supervisor left.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;

/// A socket's name, which goes when this is dropped.
#[derive(Debug)]
pub struct Name(PathBuf);

impl Drop for Name {
    fn drop(&mut self) {
        // Somebody else may have removed it.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Listens at `path`, for its owner alone; the folder is made where there is none. A socket on which nobody
/// listens any more is replaced; anything else is left alone.
///
/// # Errors
/// When it cannot be made, or something is there (`AddrInUse`).
pub fn listen(path: &Path) -> io::Result<(UnixListener, Name)> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let dead = match std::fs::symlink_metadata(path) {
        Ok(there) if there.file_type().is_socket() => dhow_parent::unix::is_dead(path),
        _ => false,
    };
    if dead {
        std::fs::remove_file(path)?;
    }
    // The umask is 077 since the keeper's start.
    Ok((UnixListener::bind(path)?, Name(path.to_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_dead_socket_is_replaced_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/socket");
        let (listener, name) = listen(&path).unwrap();
        assert_eq!(listen(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse, "somebody listens");
        drop(listener);
        // As of a process that was killed.
        std::mem::forget(name);
        let (listener, name) = listen(&path).unwrap();
        std::os::unix::net::UnixStream::connect(&path).unwrap();
        listener.accept().await.unwrap();
        drop(name);
        assert!(!path.exists());
        let file = folder.path().join("file");
        std::fs::write(&file, "mine").unwrap();
        assert!(listen(&file).is_err());
        assert_eq!(std::fs::read(&file).unwrap(), b"mine");
    }
}
