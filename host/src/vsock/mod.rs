//! Streams to the guest: what the supervisor asks for, whatever carries it.
//!
//! Opening is one request: where the guest listens, what to send first, and how long its answer is. Only then does
//! the stream get the fd whose bytes it carries, so that no byte of a handshake reaches a client, and a guest that
//! refuses becomes a reset of the client's connection instead of an empty success.

use std::future::Future;
use std::os::fd::OwnedFd;
use std::time::Duration;

pub mod client;
pub mod device;

pub use device::control::{MAX_PREAMBLE, MAX_REPLY, Reason};

/// What stream to open.
#[derive(Clone, Debug)]
pub struct OpenRequest {
    /// Where the guest listens.
    pub guest_port: u32,
    /// Sent first; at most [`MAX_PREAMBLE`] bytes.
    pub preamble: Vec<u8>,
    /// Length of the guest's answer to it; at most [`MAX_REPLY`].
    pub reply_len: usize,
    /// How long until the answer must be there. A guest that is still booting is waited for.
    pub deadline: Duration,
}

/// A way to open streams to the guest.
pub trait Transport: Send + Sync + 'static {
    /// Opens a stream, sends the preamble and waits for the reply. Dropping the future gives the stream up.
    fn open(
        &self,
        request: OpenRequest,
    ) -> impl Future<Output = Result<PendingStream, TransportError>> + Send;
}

/// An open stream that waits for its fd. Dropping it without [`PendingStream::attach`] resets the guest's connection.
#[derive(Debug)]
pub struct PendingStream {
    reply: Vec<u8>,
    inner: client::Ticket,
}

impl PendingStream {
    /// The guest's answer to the preamble, as long as was asked for.
    pub fn reply(&self) -> &[u8] {
        &self.reply
    }

    /// Has the stream say `preamble` and waits for a reply of `reply_len` bytes. So one can be opened ahead of its use,
    /// with nothing to say at first. Dropping the future gives the stream up.
    pub async fn exchange(
        self,
        preamble: Vec<u8>,
        reply_len: usize,
        deadline: Duration,
    ) -> Result<Self, TransportError> {
        let (reply, inner) = self.inner.exchange(preamble, reply_len, deadline).await?;
        Ok(Self { reply, inner })
    }

    /// Hands over the stream socket whose bytes the stream carries from now on, beginning with any that the guest
    /// sent after its reply. The socket becomes non-blocking, for all its duplicates too. On failure a TCP client
    /// sees a reset.
    pub async fn attach(self, fd: OwnedFd) -> Result<(), TransportError> {
        self.inner.attach(0, fd).await
    }

    /// Likewise, as one of `group` (not 0), which has no more streams than it leaves room for others: beyond,
    /// [`TransportError::TooMany`].
    pub async fn attach_of(self, group: u32, fd: OwnedFd) -> Result<(), TransportError> {
        self.inner.attach(group, fd).await
    }
}

/// Why there is no stream.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// Nobody listens there.
    #[error("nothing in the guest listens on vsock port {0}")]
    Refused(u32),
    /// It took too long.
    #[error("the guest did not answer within {:.0} s", .0.as_secs_f64())]
    Deadline(Duration),
    /// No room for another one.
    #[error(
        "there are too many streams to the guest ({max} at the most), or to this place in it",
        max = device::MAX_CONNECTIONS
    )]
    TooMany,
    /// The guest or the device ended it.
    #[error("the stream to the guest was reset ({0:?})")]
    Reset(Reason),
    /// The fd cannot carry a stream.
    #[error("the file descriptor is not a stream socket")]
    BadFd,
    /// The request cannot be sent.
    #[error("{what} of {have} bytes is above the limit of {limit}")]
    TooLong {
        /// What is too long.
        what: &'static str,
        /// Its length.
        have: usize,
        /// What is allowed.
        limit: usize,
    },
    /// The device had ended before it was asked.
    #[error("the vsock device is gone")]
    DeviceGone,
    /// The device does not answer, or has ended since it was asked: whether the guest learnt of it is not known.
    #[error("the vsock device ended before it answered")]
    DeviceLost,
}
