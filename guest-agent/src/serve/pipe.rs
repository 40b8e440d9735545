//! Bytes on their way from one socket to another inside the kernel: splice(2) through a pipe.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

/// Bytes that a pipe holds.
pub(super) const CAPACITY: usize = 128 << 10;
/// Empty pipes that are kept for the next bulk transfer of this thread.
const KEPT: usize = 16;

thread_local! {
    static POOL: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
}

/// A pipe and how much is in it.
#[derive(Debug)]
pub(super) struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    held: usize,
}

impl Pipe {
    /// An empty one.
    ///
    /// # Errors
    /// Out of descriptors.
    pub(super) fn take() -> io::Result<Self> {
        if let Some(pipe) = POOL.with_borrow_mut(Vec::pop) {
            return Ok(pipe);
        }
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        // The default of 64 KiB would do as well, in more calls.
        let _ = fcntl_setpipe_size(&write, CAPACITY);
        Ok(Self { read, write, held: 0 })
    }

    /// Gives it back for another transfer. One that is not empty is closed.
    pub(super) fn put_back(self) {
        POOL.with_borrow_mut(|pool| {
            if self.held == 0 && pool.len() < KEPT {
                pool.push(self);
            }
        });
    }

    pub(super) fn held(&self) -> usize {
        self.held
    }

    /// Takes in what `from` has; 0 at its end. Only while nothing is held: then `WouldBlock` speaks
    /// of `from`.
    ///
    /// # Errors
    /// As splice(2): `InvalidInput` when `from` cannot be spliced.
    pub(super) fn fill(&mut self, from: impl AsFd) -> io::Result<usize> {
        self.held = retry(|| splice(&from, None, &self.write, None, CAPACITY, flags()))?;
        Ok(self.held)
    }

    /// Hands over to `to` what it takes.
    ///
    /// # Errors
    /// As splice(2).
    pub(super) fn drain(&mut self, to: impl AsFd) -> io::Result<()> {
        self.held -= retry(|| splice(&self.read, None, &to, None, self.held, flags()))?;
        Ok(())
    }
}

fn flags() -> SpliceFlags {
    SpliceFlags::MOVE | SpliceFlags::NONBLOCK
}

fn retry(mut call: impl FnMut() -> rustix::io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}
