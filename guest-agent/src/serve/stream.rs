//! A connected stream socket: the guest's end of a vsock stream, or of a forward's target.
//!
//! Every write tries the system call first and waits for readiness only after `EAGAIN`, and so does every read but
//! the relay's. So whoever waits for another event of the same socket may clear its readiness and disturbs nobody.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, Shutdown, sockopt};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

/// A connected, non-blocking stream socket of any family.
#[derive(Debug)]
pub struct Stream {
    socket: AsyncFd<OwnedFd>,
    family: AddressFamily,
}

impl Stream {
    /// Takes over a connected stream socket and makes it non-blocking.
    ///
    /// # Errors
    /// It is no socket, or the reactor cannot take it.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        let family = sockopt::socket_domain(&socket)?;
        rustix::io::ioctl_fionbio(&socket, true)?;
        // SAFETY: the fd is owned by the AsyncFd and never taken out or replaced while it lives.
        let socket = unsafe { AsyncFd::register(socket) }.map_err(io::Error::from)?;
        Ok(Self { socket, family })
    }

    /// Waits for the end of a connect(2) that is in progress.
    ///
    /// # Errors
    /// As connect(2).
    pub(super) async fn connected(&self) -> io::Result<()> {
        loop {
            // "getsockopt(2) to read the SO_ERROR option" tells how it ended (connect(2)).
            let mut guard = self.socket.writable().await?;
            sockopt::socket_error(&self.socket)??;
            if rustix::net::getpeername(&self.socket).is_ok() {
                return Ok(());
            }
            guard.clear_ready();
        }
    }

    /// The socket alone, still non-blocking.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.socket.into_inner()
    }

    /// Reads what is there; 0 at the end, `WouldBlock` when there is nothing.
    ///
    /// # Errors
    /// As recv(2).
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match rustix::net::recv(&self.socket, &mut *buffer, RecvFlags::DONTWAIT) {
                Err(rustix::io::Errno::INTR) => {}
                result => return Ok(result?.0),
            }
        }
    }

    /// Writes as much as the socket takes; `WouldBlock` when it takes nothing.
    ///
    /// # Errors
    /// As send(2).
    pub fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match rustix::net::send(&self.socket, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Err(rustix::io::Errno::INTR) => {}
                result => return Ok(result?),
            }
        }
    }

    /// Whether a read of less than was asked for has left nothing behind ("Questions and answers" of
    /// epoll(7)). TCP and unix sockets stop in front of urgent data.
    pub(super) fn short_reads_take_all(&self) -> bool {
        self.family == AddressFamily::VSOCK
    }

    /// After a read that has taken all: pending until another may succeed.
    pub(super) fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.socket.poll_read_ready(cx))?.clear_ready();
        Poll::Ready(Ok(()))
    }

    /// After a write that would block: pending until another may succeed.
    pub(super) fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.socket.poll_write_ready(cx))?.clear_ready();
        Poll::Ready(Ok(()))
    }

    /// Tells the peer that no more comes; reading goes on.
    ///
    /// # Errors
    /// As shutdown(2); `NotConnected` when the peer has reset it.
    pub fn shutdown_write(&self) -> io::Result<()> {
        Ok(rustix::net::shutdown(&self.socket, Shutdown::Write)?)
    }

    /// Waits until the peer has finished sending, or has gone. What it sent before may be unread.
    pub async fn hung_up(&self) {
        loop {
            match self.socket.ready(Interest::READABLE).await {
                Ok(mut guard) if !guard.ready().is_read_closed() => guard.clear_ready(),
                // Without a reactor nothing works any more: as good as gone.
                Ok(_) | Err(_) => return,
            }
        }
    }

    /// Waits until the connection has ended both ways, orderly or not. A peer that has finished sending alone
    /// is still there.
    pub async fn gone(&self) {
        loop {
            match self.socket.ready(Interest::WRITABLE).await {
                Ok(mut guard) if !guard.ready().is_write_closed() => guard.clear_ready(),
                Ok(_) | Err(_) => return,
            }
        }
    }

    /// Whether the peer has reset the connection, of which a reader sees no more than the end.
    /// Meaningful only while this side has not shut down its writing.
    pub(super) fn is_reset(&self) -> bool {
        if self.family == AddressFamily::VSOCK {
            // An RST ends both directions without an error (virtio_transport_do_close), but an orderly
            // peer goes on receiving until we have finished: then an empty send fails with EPIPE.
            return rustix::net::send(&self.socket, &[], SendFlags::NOSIGNAL | SendFlags::DONTWAIT).is_err();
        }
        !matches!(sockopt::socket_error(&self.socket), Ok(Ok(())))
    }

    /// Pending until the socket's state may have changed, other than by data to read. `false` when it
    /// will never change again.
    pub(super) fn poll_changed(&self, cx: &mut Context<'_>) -> Poll<bool> {
        match ready!(self.socket.poll_write_ready(cx)) {
            Ok(mut guard) if !guard.ready().is_write_closed() => {
                guard.clear_ready();
                Poll::Ready(true)
            }
            Ok(_) | Err(_) => Poll::Ready(false),
        }
    }

    /// Closes it so that the peer sees a reset where its family has such a thing. Linux sends no RST
    /// on a vsock stream: there, and on unix sockets, the peer sees a close without the shutdown that
    /// would have gone before an orderly one.
    pub fn cut(self) {
        if matches!(self.family, AddressFamily::INET | AddressFamily::INET6) {
            // "l_onoff 1, l_linger 0": the close sends RST (socket(7), tcp(7)). Failing that it is a FIN.
            let _ = sockopt::set_socket_linger(&self.socket, Some(std::time::Duration::ZERO));
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.get_ref().as_fd()
    }
}

/// Reads and writes need no exclusive access, so that both directions go on at once.
impl AsyncRead for &Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            match self.try_read(buffer.initialize_unfilled()) {
                Ok(length) => {
                    buffer.advance(length);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready!(self.poll_readable(cx))?,
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for &Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            match self.try_write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready!(self.poll_writable(cx))?,
                result => return Poll::Ready(result),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.shutdown_write())
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut &*self).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut &*self).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.shutdown_write())
    }
}
