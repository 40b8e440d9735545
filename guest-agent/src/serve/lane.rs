//! Threads with a reactor of their own, between which the kernel shares out the processors more finely than a thread does
//! between its tasks.
//!
//! ```text
//! opening ─► quick (the worker's first thread) ◄─► bulk
//! ```
//! `opening.rs` says what is done on the first, `bulk_lane.rs` what on the last. A socket belongs to the reactor of the
//! thread that registered it, so it changes lanes as a bare descriptor.

use std::io;

use tokio::runtime::Handle;
use tokio::task::JoinHandle;

/// Tasks that have their turn before sockets are looked at again. With tokio's 61 a small request waited for 61 turns
/// of relays that are just becoming bulk.
pub(super) const TURNS: u32 = 8;

/// A thread that runs tasks. Clones are of the same.
#[derive(Debug, Clone)]
pub(super) struct Lane(Handle);

impl Lane {
    /// The one that the caller's task runs on.
    pub(super) fn current() -> Self {
        Self(Handle::current())
    }

    /// A new one, which stays for as long as the process does.
    ///
    /// # Errors
    /// There is no thread or no descriptor left for it.
    pub(super) fn start(name: &str) -> io::Result<Self> {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().event_interval(TURNS).build()?;
        let handle = runtime.handle().clone();
        let thread = std::thread::Builder::new().name(name.into());
        thread.spawn(move || runtime.block_on(std::future::pending::<()>()))?;
        Ok(Self(handle))
    }

    /// Runs a task on it.
    pub(super) fn spawn<F>(&self, task: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        self.0.spawn(task)
    }
}
