//! The host's end of a connection: one stream socket, non-blocking, watched while it is open.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use rustix::net::{SendFlags, Shutdown, SocketType};
use vm_memory::{ReadVolatile, VolatileMemoryError, WriteVolatile};

use super::queue::Segments;

/// Why a transfer stopped.
#[derive(Debug)]
pub enum End {
    /// All that was asked for is done, or the kernel chose to do less: more may be possible.
    More,
    /// Nothing more until the next event.
    Blocked,
    /// Reading: the other side has finished.
    Eof,
    /// The socket is broken. Said once: the kernel forgets an error that it has reported.
    Failed(io::Error),
}

/// A stream socket that was handed over. Dropping it ends the watch too: the socket itself may live on in another
/// process, and then closing alone would leave it in the epoll set for ever.
#[derive(Debug)]
pub struct HostFd {
    fd: OwnedFd,
    epoll: Arc<Epoll>,
}

impl HostFd {
    /// Takes a socket over: makes it non-blocking (a flag that its duplicates share) and watches it, edge-triggered,
    /// under `token`.
    pub fn adopt(fd: OwnedFd, epoll: &Arc<Epoll>, token: u64) -> Result<Self, (OwnedFd, io::Error)> {
        let prepared = (|| {
            if rustix::net::sockopt::socket_type(&fd)? != SocketType::STREAM {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            rustix::io::ioctl_fionbio(&fd, true)?;
            let events =
                EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
            epoll.add(&fd, EpollEvent::new(events, token))?;
            Ok(())
        })();
        match prepared {
            Ok(()) => Ok(Self { fd, epoll: Arc::clone(epoll) }),
            Err(error) => Err((fd, error)),
        }
    }

    /// Reads straight into guest memory.
    pub fn read_into(&self, segments: &Segments<'_>) -> (usize, End) {
        let mut done = 0;
        for piece in segments.pieces() {
            let mut piece = *piece;
            loop {
                match self.fd.as_fd().read_volatile(&mut piece) {
                    Ok(0) => return (done, End::Eof),
                    Ok(n) => {
                        done += n;
                        if n < piece.len() {
                            return (done, End::More);
                        }
                        break;
                    }
                    Err(error) => match classify(volatile(error)) {
                        None => continue,
                        Some(end) => return (done, end),
                    },
                }
            }
        }
        (done, End::More)
    }

    /// Writes straight from guest memory.
    pub fn write_from(&self, segments: &Segments<'_>) -> (usize, End) {
        let mut done = 0;
        for piece in segments.pieces() {
            let mut rest = *piece;
            while !rest.is_empty() {
                match self.fd.as_fd().write_volatile(&rest) {
                    Ok(n) => {
                        done += n;
                        match rest.offset(n) {
                            Ok(after) => rest = after,
                            Err(_) => break,
                        }
                    }
                    Err(error) => match classify(volatile(error)) {
                        None => continue,
                        Some(end) => return (done, end),
                    },
                }
            }
        }
        (done, End::More)
    }

    /// Writes bytes that the device holds.
    pub fn write(&self, bytes: &[u8]) -> (usize, End) {
        let mut done = 0;
        while done < bytes.len() {
            match rustix::net::send(&self.fd, &bytes[done..], SendFlags::NOSIGNAL) {
                Ok(n) => done += n,
                Err(error) => match classify(error.into()) {
                    None => continue,
                    Some(end) => return (done, end),
                },
            }
        }
        (done, End::More)
    }

    /// Tells the other side that no more comes.
    pub fn finish_writing(&self) {
        // ENOTCONN: the other side is gone, and the next transfer says so.
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Write);
    }

    /// Refuses what the other side may still send.
    pub fn finish_reading(&self) {
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Read);
    }

    /// The error that an event spoke of, if there is one.
    pub fn error(&self) -> Option<io::Error> {
        match rustix::net::sockopt::socket_error(&self.fd) {
            Ok(Ok(())) => None,
            Ok(Err(error)) | Err(error) => Some(error.into()),
        }
    }

    /// Closes after everything was delivered.
    pub fn close(self) {
        self.finish_writing();
        // Unread bytes would turn the close into a reset, and that can overtake the last bytes to the client.
        let mut scratch = [0; 4096];
        for _ in 0..16 {
            match rustix::io::read(&self.fd, &mut scratch) {
                Ok(1..) => {}
                _ => break,
            }
        }
    }

    /// Closes so that a TCP client sees a reset: data was cut.
    pub fn reset(self) {
        reset(&self.fd);
    }
}

impl Drop for HostFd {
    fn drop(&mut self) {
        let _ = self.epoll.delete(&self.fd);
    }
}

/// Makes the last close of a socket a reset, where the socket knows such a thing. There is no `shutdown` here: its
/// FIN would tell the client that all is well before the RST could say otherwise.
pub fn reset(fd: &OwnedFd) {
    let _ = rustix::net::sockopt::set_socket_linger(fd, Some(Duration::ZERO));
}

fn volatile(error: VolatileMemoryError) -> io::Error {
    match error {
        VolatileMemoryError::IOError(error) => error,
        other => io::Error::other(other),
    }
}

fn classify(error: io::Error) -> Option<End> {
    match error.kind() {
        io::ErrorKind::Interrupted => None,
        io::ErrorKind::WouldBlock => Some(End::Blocked),
        _ => Some(End::Failed(error)),
    }
}
