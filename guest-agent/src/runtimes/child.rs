//! A running child of PID 1, watched and signalled by its pidfd alone: a pid may be another's by now.

use std::io;
use std::os::fd::OwnedFd;

use dhow_parent::SpawnedChild;
use rustix::process::{Signal, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A child that runs, or has just ended.
pub struct Child {
    /// For comparison with what PID 1 tells.
    pub pid: i32,
    pidfd: AsyncFd<OwnedFd>,
}

impl Child {
    /// Watches a child.
    ///
    /// # Errors
    /// When the pidfd cannot be watched.
    pub fn new(child: SpawnedChild) -> io::Result<Self> {
        // SAFETY: the fd is owned by the AsyncFd and never taken out or replaced while it lives.
        let pidfd = unsafe { AsyncFd::register_with_interest(child.pidfd, Interest::READABLE) }?;
        Ok(Self { pid: child.pid, pidfd })
    }

    /// Returns when it has ended.
    pub async fn ended(&self) {
        // pidfd_open(2): readable when the process has ended, and so for ever.
        if let Err(error) = self.pidfd.readable().await {
            tracing::error!(%error, pid = self.pid, "a daemon cannot be watched");
            std::future::pending::<()>().await;
        }
    }

    /// Sends a signal; one that has ended needs none.
    pub fn signal(&self, signal: Signal) {
        match pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => tracing::warn!(%error, pid = self.pid, ?signal, "cannot signal a daemon"),
        }
    }
}
