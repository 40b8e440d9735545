//! The host's end of a connection: one stream socket, non-blocking, watched while it is open.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use rustix::net::{AddressFamily, SendFlags, Shutdown, SocketType};

use super::queue::Segments;

/// Pieces of guest memory in one read or write: 16 receive buffers of a Linux guest, or one of its largest packets.
const MOST_PIECES: usize = 64;

/// What is watched, edge-triggered.
const EVENTS: EpollFlags =
    EpollFlags::EPOLLIN.union(EpollFlags::EPOLLOUT).union(EpollFlags::EPOLLRDHUP).union(EpollFlags::EPOLLET);

/// Reads of bytes that nobody wants in one go, of 16 KiB: a client may send them as fast as they are read.
const DISCARDS: usize = 32;

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
    token: u64,
    local: bool,
}

impl HostFd {
    /// Takes a socket over: makes it non-blocking (a flag that its duplicates share) and watches it, edge-triggered,
    /// under `token`.
    pub fn adopt(fd: OwnedFd, epoll: &Arc<Epoll>, token: u64) -> Result<Self, (OwnedFd, io::Error)> {
        let prepared = (|| {
            if rustix::net::sockopt::socket_type(&fd)? != SocketType::STREAM {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            let local = rustix::net::sockopt::socket_domain(&fd)? == AddressFamily::UNIX;
            rustix::io::ioctl_fionbio(&fd, true)?;
            epoll.add(&fd, EpollEvent::new(EVENTS, token))?;
            Ok(local)
        })();
        match prepared {
            Ok(local) => Ok(Self { fd, epoll: Arc::clone(epoll), token, local }),
            Err(error) => Err((fd, error)),
        }
    }

    /// Reads once, straight into guest memory.
    pub fn read_into(&self, segments: &Segments<'_>) -> (usize, End) {
        let (pieces, count) = pieces(segments);
        loop {
            // SAFETY: the first `count` pieces are mapped guest memory for as long as `segments` lives. Anybody may
            // write to it at any time, so that no reference to it exists.
            let got = unsafe { libc::readv(self.fd.as_raw_fd(), pieces.as_ptr(), count as libc::c_int) };
            match usize::try_from(got) {
                Ok(0) => return (0, End::Eof),
                Ok(some) => return (some, End::More),
                Err(_) => {
                    if let Some(end) = classify(io::Error::last_os_error()) {
                        return (0, end);
                    }
                }
            }
        }
    }

    /// Writes straight from guest memory, until all is written or the socket takes no more.
    pub fn write_from(&self, segments: &Segments<'_>) -> (usize, End) {
        let len = segments.len();
        let mut done = 0;
        while done < len {
            let rest = segments.range(done, len - done);
            let (mut pieces, count) = pieces(&rest);
            // SAFETY: an all-zero message header is a valid one without address, data and ancillary data.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = pieces.as_mut_ptr();
            message.msg_iovlen = count as _;
            // SAFETY: as in `read_into`; the kernel reads `count` pieces and keeps nothing.
            let sent = unsafe { libc::sendmsg(self.fd.as_raw_fd(), &message, libc::MSG_NOSIGNAL) };
            match usize::try_from(sent) {
                Ok(some) => done += some,
                Err(_) => {
                    if let Some(end) = classify(io::Error::last_os_error()) {
                        return (done, end);
                    }
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
        // TCP takes data after that all the same; but once our FIN is out it answers data with an RST, and throws away
        // what the client has not read (Linux, `tcp_rcv_state_process`).
        if self.local {
            let _ = rustix::net::shutdown(&self.fd, Shutdown::Read);
        }
    }

    /// The error that an event spoke of, if there is one.
    pub fn error(&self) -> Option<io::Error> {
        match rustix::net::sockopt::socket_error(&self.fd) {
            Ok(Ok(())) => None,
            Ok(Err(error)) | Err(error) => Some(error.into()),
        }
    }

    /// Ends it so that all that was written arrives; `Some` where it must be kept for that until
    /// [`Self::delivered`] says so.
    pub fn close(self) -> Option<Self> {
        self.finish_writing();
        self.finish_reading();
        if self.delivered() { None } else { Some(self) }
    }

    /// Discards what still comes, and tells whether nothing is lost when the socket is closed now.
    pub fn delivered(&self) -> bool {
        // Unread bytes would turn the close into a reset, and that throws away what the client has not read.
        let mut scratch = [0; 16 << 10];
        for _ in 0..DISCARDS {
            match rustix::io::read(&self.fd, &mut scratch) {
                Ok(1..) | Err(rustix::io::Errno::INTR) => {}
                Ok(0) => return self.local || self.acknowledged(),
                // A local client has the bytes, and can send no more.
                Err(rustix::io::Errno::AGAIN) => return self.local,
                Err(_) => return true,
            }
        }
        // Watched anew, it makes an event again if there is more.
        let _ = self.epoll.modify(&self.fd, &mut EpollEvent::new(EVENTS, self.token));
        false
    }

    /// Whether the other side's kernel has everything that was written. Where a socket cannot tell, it has.
    pub fn acknowledged(&self) -> bool {
        let mut unsent: libc::c_int = 0;
        // SAFETY: TIOCOUTQ (SIOCOUTQ, tcp(7)) stores one int.
        let told = unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TIOCOUTQ, &mut unsent) };
        told != 0 || unsent == 0
    }

    /// Closes so that a TCP client sees a reset: data was cut.
    pub fn reset(self) {
        reset(&self.fd);
    }
}

impl Drop for HostFd {
    fn drop(&mut self) {
        let _ = self.epoll.delete(self.fd.as_fd());
    }
}

/// Makes the last close of a socket a reset, where the socket knows such a thing. There is no `shutdown` here: its
/// FIN would tell the client that all is well before the RST could say otherwise.
pub fn reset(fd: &OwnedFd) {
    let _ = rustix::net::sockopt::set_socket_linger(fd, Some(Duration::ZERO));
}

/// The first pieces of `segments` for the kernel, and how many they are.
fn pieces(segments: &Segments<'_>) -> ([libc::iovec; MOST_PIECES], usize) {
    let none = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
    let mut pieces = [none; MOST_PIECES];
    let mut count = 0;
    for (piece, slice) in pieces.iter_mut().zip(segments.pieces()) {
        piece.iov_base = slice.ptr_guard_mut().as_ptr().cast();
        piece.iov_len = slice.len();
        count += 1;
    }
    (pieces, count)
}

fn classify(error: io::Error) -> Option<End> {
    match error.kind() {
        io::ErrorKind::Interrupted => None,
        io::ErrorKind::WouldBlock => Some(End::Blocked),
        _ => Some(End::Failed(error)),
    }
}
