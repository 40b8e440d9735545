//! /dev/fuse of one mount: requests out of it, answers and notifications into it.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::ledger::Answer;
use super::uapi::{self, NOTIFY_RESEND};

/// Bytes of the largest request: a write of 1 MiB with its headers, rounded up to a page.
pub const BUFFER: usize = dhow_protocol::files::MAX_IO + 4096;

/// What a read of the device gave.
#[derive(Debug, PartialEq, Eq)]
pub enum Read {
    /// A request of so many bytes.
    Request(usize),
    /// Nothing is there now.
    Nothing,
    /// The mount is gone.
    Gone,
}

/// The device of one mount. Its open file is shared with PID 1, which keeps the mount alive.
#[derive(Debug)]
pub struct Device {
    fd: AsyncFd<OwnedFd>,
}

/// Opens the device, non-blocking. It is of use once it is mounted ([`super::mount_point`]).
///
/// # Errors
/// open(2)'s, where the kernel has no FUSE.
pub fn open() -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(rustix::fs::open("/dev/fuse", flags, Mode::empty())?)
}

impl Device {
    /// Takes the fd of a mounted device, within the runtime that serves it.
    ///
    /// # Errors
    /// epoll(7)'s.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        // SAFETY: the fd is owned by the AsyncFd and never taken out or replaced while it lives.
        Ok(Self { fd: unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)? })
    }

    /// Waits until there may be a request.
    ///
    /// # Errors
    /// When the runtime ends.
    pub async fn readable(&self) -> io::Result<()> {
        self.fd.readable().await.map(|mut guard| guard.retain_ready())
    }

    /// The next request, if there is one; `buffer` holds [`BUFFER`] bytes.
    ///
    /// # Errors
    /// read(2)'s, but for those that have a meaning of their own.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<Read> {
        loop {
            let read = self.fd.try_io(Interest::READABLE, |fd| Ok(rustix::io::read(fd, &mut *buffer)?));
            return match read {
                Ok(length) => Ok(Read::Request(length)),
                Err(error) => match error.raw_os_error() {
                    // A request that was taken back while it was being read.
                    Some(libc::ENOENT | libc::EINTR) => continue,
                    // > ENODEV: … the filesystem was unmounted (fuse(4))
                    Some(libc::ENODEV | libc::ECONNABORTED) => Ok(Read::Gone),
                    _ if error.kind() == io::ErrorKind::WouldBlock => Ok(Read::Nothing),
                    _ => Err(error),
                },
            };
        }
    }

    /// Answers a request; false when the kernel does not wait for it any more, so that what the
    /// answer gave is not taken.
    pub fn answer(&self, answer: &Answer<'_>) -> bool {
        let header = uapi::out_header(answer.body.len(), -answer.error, answer.unique);
        match self.write(&[IoSlice::new(&header), IoSlice::new(&answer.body)]) {
            Ok(()) => true,
            Err(error) => {
                // > ENOENT: … the request is not pending (fuse(4)): taken back, or asked again.
                if error.raw_os_error() != Some(libc::ENOENT) {
                    tracing::warn!(%error, answer.unique, "the kernel refused an answer of a share");
                    let header = uapi::out_header(0, -libc::EIO, answer.unique);
                    // Whoever asked must not wait for ever. It may have been woken already.
                    let _ = self.write(&[IoSlice::new(&header)]);
                }
                false
            }
        }
    }

    /// Asks the kernel for everything again that was read and not answered.
    ///
    /// # Errors
    /// EINVAL before Linux 6.9.
    pub fn resend(&self) -> io::Result<()> {
        self.write(&[IoSlice::new(&uapi::out_header(0, NOTIFY_RESEND, 0))])
    }

    /// Whether the mount is gone.
    pub fn is_gone(&self) -> bool {
        let mut fds = [PollFd::new(self.fd.get_ref(), PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        // > POLLERR … the connection has been aborted (fs/fuse/dev.c)
        poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0 && fds[0].revents().contains(PollFlags::ERR))
    }

    fn write(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        loop {
            match rustix::io::writev(self.fd.get_ref(), parts) {
                Err(rustix::io::Errno::INTR) => {}
                result => return result.map(drop).map_err(Into::into),
            }
        }
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.get_ref().as_fd()
    }
}
