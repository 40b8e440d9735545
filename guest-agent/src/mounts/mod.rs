//! Shares of the host, mounted by FUSE.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use dhow_parent::ParentLink;
use dhow_protocol::control::MountRequest;

/// The mounted shares.
pub struct Mounts {}

impl Mounts {
    /// Takes over the mounts of an earlier worker: their fds are among those that PID 1 holds
    /// (taken out of `held` by their names).
    pub async fn start(_link: ParentLink, _held: &mut HashMap<String, OwnedFd>) -> Arc<Self> {
        Arc::new(Self {})
    }

    /// Serves a `Files` stream of a share until it ends: requests of its mount go out on it. `stream`
    /// is a connected vsock or unix stream socket, non-blocking.
    pub async fn serve_files(&self, _share: u32, _session: [u8; 16], _stream: OwnedFd) {}

    /// Mounts a share whose `Files` stream is there, or comes within a few seconds.
    ///
    /// # Errors
    /// For a person.
    pub async fn mount(&self, _request: MountRequest) -> Result<(), String> {
        Err("not there".to_owned())
    }

    /// Unmounts a share.
    ///
    /// # Errors
    /// For a person.
    pub async fn unmount(&self, _share: u32) -> Result<(), String> {
        Err("not there".to_owned())
    }

    /// Unmounts all shares, lazily where they are in use.
    pub async fn unmount_all(&self) {}

    /// Paths of the mounted shares.
    #[must_use]
    pub fn paths(&self) -> Vec<String> {
        Vec::new()
    }
}
