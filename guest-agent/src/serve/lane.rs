//! Threads with a reactor of their own, between which the kernel shares out the processors more finely than a thread does
//! between its tasks.
//!
//! ```text
//! opening ─► quick (the worker's first thread) ◄─► bulk
//! ```
//! `opening.rs` says what is done on the first, `bulk_lane.rs` what on the last. A socket belongs to the reactor of the
//! thread that registered it, so it changes lanes as a bare descriptor.

use std::io;

use tokio::runtime::{Handle, Runtime};
use tokio::task::JoinHandle;

/// Tasks that have their turn before sockets are looked at again. With tokio's 61 a small request waited for 61 turns
/// of relays that are just becoming bulk.
const TURNS: u32 = 8;

/// A reactor and its tasks, for one thread.
///
/// # Errors
/// There is no descriptor left for it.
pub(super) fn runtime() -> io::Result<Runtime> {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    // What other threads hand over is looked at as often as sockets are.
    runtime.enable_all().event_interval(TURNS).global_queue_interval(TURNS).build()
}

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
        let (told, started) = std::sync::mpsc::sync_channel(1);
        // The runtime is made by its thread: one that is dropped on another runtime's thread panics.
        let run = move || match runtime() {
            Ok(runtime) => {
                // Who waits for it is there.
                let _ = told.send(Ok(runtime.handle().clone()));
                runtime.block_on(std::future::pending::<()>());
            }
            Err(error) => _ = told.send(Err(error)),
        };
        std::thread::Builder::new().name(name.into()).spawn(run)?;
        started.recv().map_err(io::Error::other)?.map(Self)
    }

    /// Runs a task on it.
    pub(super) fn spawn<F>(&self, task: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        self.0.spawn(task)
    }
}
