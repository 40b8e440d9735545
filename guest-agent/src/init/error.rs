//! Why the guest could not boot, in sentences for its console.

use std::io;
use std::path::{Path, PathBuf};

use dhow_protocol::codec::CodecError;

/// A step of the boot that failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InitError {
    /// A system call on a path.
    #[error("cannot {what} {}", path.display())]
    File {
        /// The verb, with its preposition.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The host's boot configuration has another layout.
    #[error("the host's boot configuration cannot be read: host and agent are of different versions")]
    Config(#[source] CodecError),
    /// The secret has a wrong length.
    #[error("the boot secret has {0} bytes instead of 32")]
    Secret(usize),
    /// A disk is missing.
    #[error("the VM has no disk with the serial {0:?}")]
    NoDisk(&'static str),
    /// The data disk has something else on it.
    #[error(
        "the data disk {} holds something that is not Dhow's ext4 filesystem; it was left as it is. Move \
         the profile's disk file away, and Dhow makes a new one", .0.display()
    )]
    Foreign(PathBuf),
    /// The data disk's first block is zeros, but it has been a filesystem.
    #[error(
        "the first block of the data disk {} is gone, but a backup of it is there; it was left as it is. \
         Repair the profile's disk file on the host with `e2fsck -b 32768 -B 4096`, then with `e2fsck -f`",
        .0.display()
    )]
    LostSuperblock(PathBuf),
    /// The data disk can be mounted neither way.
    #[error(
        "the data disk {} cannot be mounted, not even read-only. Repair the profile's disk file on the \
         host with `e2fsck -f`", disk.display()
    )]
    Data {
        /// The block device.
        disk: PathBuf,
        /// Why.
        source: Box<InitError>,
    },
    /// A program of the base failed.
    #[error("{program} {ended}: {said}")]
    Program {
        /// Its path.
        program: &'static str,
        /// How it ended.
        ended: String,
        /// The end of what it said.
        said: String,
    },
    /// The vsock listener.
    #[error("cannot {0} the vsock listener")]
    Listener(&'static str, #[source] io::Error),
    /// Signals, memfds and the like.
    #[error("cannot {0}")]
    System(&'static str, #[source] io::Error),
}

impl InitError {
    /// For `map_err` on whatever becomes an I/O error.
    pub(crate) fn at<E: Into<io::Error>>(
        what: &'static str,
        path: impl AsRef<Path>,
    ) -> impl FnOnce(E) -> Self {
        move |source| Self::File { what, path: path.as_ref().to_owned(), source: source.into() }
    }
}

#[cfg(test)]
mod tests {
    use dhow_protocol::errors::chain;

    use super::*;

    #[test]
    fn each_cause_is_named_once() {
        let inner: Result<(), io::Error> = Err(io::Error::from_raw_os_error(libc::ENOENT));
        let inner = inner.map_err(InitError::at("mount", "/data")).unwrap_err();
        let outer = InitError::Data { disk: "/dev/vdb".into(), source: Box::new(inner) };
        let text = chain(&outer);
        assert!(
            text.ends_with("`e2fsck -f`: cannot mount /data: No such file or directory (os error 2)"),
            "{text}"
        );
        assert_eq!(text.matches("cannot mount /data").count(), 1);
    }
}
