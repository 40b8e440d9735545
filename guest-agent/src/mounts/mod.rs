//! Shares of the host, mounted by FUSE.
//!
//! ```text
//! process ─► kernel ─► /dev/fuse ─► pump.rs ─► stream of the share ─► file server on the host
//!                                   request.rs    ledger.rs: what is open, who is known (known.rs)
//! process ◄─ kernel ◄─ /dev/fuse ◄─ answer.rs ◄─ replies
//! ```
//! `registry.rs` has the shares, `share.rs` the life of one, `device.rs` its fd, `uapi.rs` the bytes,
//! `mount_point.rs` mount(2), `thread.rs` where it all runs.
//!
//! **A mount outlives the worker.** PID 1 holds the device (`fuse-<share>`) and what a new worker must
//! know (`fuse-<share>-state`, `state.rs`). A new worker takes both over, has the kernel ask again for
//! what the last one read and did not answer (FUSE_NOTIFY_RESEND, Linux 6.9), and goes on; processes
//! only see that something took longer. The same is done when a stream breaks. That is why the read
//! loop is our own and not `fuser`'s: its `Session` begins with waiting for INIT, which a mount that
//! lives already never sends again, and it keeps no request apart from the answer that it wants.
//!
//! **Nothing is applied twice.** Requests keep the kernel's number, also when they are asked again,
//! and the file server remembers what it answered. A new server is told the nodes that the kernel
//! knows (`Restore`) and gets what was open with care (`ledger.rs`). A new worker knows no nodes: if
//! the server dies as well before they were looked up again, what is open gives ESTALE once, and
//! paths work as before.
//!
//! **What the host changes is seen within a second** (`answer::TTL`), with one exception: a change
//! that leaves size and mtime of a file as they were, within the resolution of the host's clock (4 ms
//! on older kernels), after the guest has cached the file. Locks are the guest's own. Two programs
//! that create one name at the same time, one here and one on the host, both without O_EXCL: the one
//! here may see EEXIST.

mod answer;
mod device;
mod known;
mod ledger;
mod listings;
mod mount_point;
mod pump;
mod registry;
mod request;
mod share;
mod state;
mod stream;
mod thread;
mod uapi;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use dhow_parent::ParentLink;
use dhow_protocol::control::MountRequest;

use registry::Registry;

/// The mounted shares.
pub struct Mounts {
    registry: Arc<Registry>,
}

impl Mounts {
    /// Takes over the mounts of an earlier worker: their fds are among those that PID 1 holds
    /// (taken out of `held` by their names).
    pub async fn start(link: ParentLink, held: &mut HashMap<String, OwnedFd>) -> Arc<Self> {
        Arc::new(Self { registry: Arc::new(Registry::start(link, held).await) })
    }

    /// Serves a `Files` stream of a share until it ends: requests of its mount go out on it. `stream`
    /// is a connected vsock or unix stream socket, non-blocking.
    pub async fn serve_files(&self, share: u32, session: [u8; 16], stream: OwnedFd) {
        self.registry.serve_files(share, session, stream).await;
    }

    /// Mounts a share whose `Files` stream is there, or comes within a few seconds. It is mounted when
    /// this returns; mounting it once more does nothing.
    ///
    /// # Errors
    /// For a person.
    pub async fn mount(&self, request: MountRequest) -> Result<(), String> {
        let registry = Arc::clone(&self.registry);
        whole(async move { registry.mount(request).await }).await
    }

    /// Unmounts a share.
    ///
    /// # Errors
    /// For a person.
    pub async fn unmount(&self, share: u32) -> Result<(), String> {
        let registry = Arc::clone(&self.registry);
        whole(async move { registry.unmount(share).await }).await
    }

    /// Unmounts all shares, lazily where they are in use.
    pub async fn unmount_all(&self) {
        for share in self.registry.deepest_first() {
            if let Err(error) = self.unmount(share).await {
                tracing::warn!(error, share, "unmount");
            }
        }
    }

    /// Paths of the mounted shares.
    #[must_use]
    pub fn paths(&self) -> Vec<String> {
        self.registry.paths()
    }
}

/// Does something to its end, also when who asked for it is gone: half a mount would make everybody
/// wait who touches it.
async fn whole<F>(work: F) -> Result<(), String>
where
    F: Future<Output = Result<(), String>> + Send + 'static,
{
    tokio::spawn(work).await.unwrap_or_else(|error| Err(error.to_string()))
}
