//! The thread that serves all mounts, apart from the worker's other work.
//!
//! Whoever touches a path may wait for a share: a command that is started in a shared folder, a
//! mount below one. If that were done on the thread that also answers the share's requests, it would
//! wait for itself.

use std::io;

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

/// The thread; it ends when this is dropped.
#[derive(Debug)]
pub struct Thread {
    handle: Handle,
    _end: oneshot::Sender<()>,
}

impl Thread {
    /// Starts it.
    ///
    /// # Errors
    /// When there can be no thread or no epoll.
    pub fn start() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_io().enable_time().build()?;
        let handle = runtime.handle().clone();
        let (end, ended) = oneshot::channel::<()>();
        std::thread::Builder::new().name("shares".to_owned()).spawn(move || {
            // An error is the sender's end, which is what is waited for.
            let _ = runtime.block_on(ended);
        })?;
        Ok(Self { handle, _end: end })
    }

    /// Its runtime.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }
}
