//! Takes connections in, lets the host's alone pass, and hands over those that have proven it.

use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use dhow_protocol::HOST_CID;
use dhow_protocol::errors::chain;
use dhow_protocol::hello::{Secret, Status};
use dhow_protocol::stream::StreamHeader;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_vsock::VsockListener;

use super::hello::{self, Answer, HandshakeError};
use super::stream::Stream;

/// How much is taken in at once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Streams that have proven themselves; the device has no more either.
    pub streams: usize,
    /// Connections that have not yet, some of them opened ahead of their use; further ones wait in the listener's
    /// backlog.
    pub unproven: usize,
    /// How long a connection may take to prove itself once it speaks.
    pub deadline: Duration,
    /// Pause after a failed accept: out of descriptors, others must close theirs first.
    pub pause: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            streams: 4095,
            unproven: 32,
            deadline: Duration::from_secs(5),
            pause: Duration::from_millis(100),
        }
    }
}

/// A stream that has proven itself and waits for its answer.
pub(super) struct Arrival {
    /// The host's.
    pub stream: Stream,
    /// What it is to be.
    pub header: StreamHeader,
    /// The right to answer it.
    pub answer: Answer,
    /// Its room among [`Limits::streams`], which it has until its end.
    pub room: OwnedSemaphorePermit,
}

/// Where connections come from.
pub(super) trait Listener {
    /// The next connection and its peer's CID.
    fn accept(&self) -> impl Future<Output = io::Result<(OwnedFd, u32)>> + Send;
}

impl Listener for VsockListener {
    async fn accept(&self) -> io::Result<(OwnedFd, u32)> {
        let (stream, peer) = std::future::poll_fn(|cx| self.poll_accept_std(cx)).await?;
        Ok((OwnedFd::from(stream), peer.cid()))
    }
}

/// Accepts for ever; each stream that proved itself is given to `serve` in a task of its own.
pub(super) async fn run<L, S, F>(listener: L, secret: Secret, limits: Limits, serve: S)
where
    L: Listener,
    S: Fn(Arrival) -> F + Clone + Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let unproven = Arc::new(Semaphore::new(limits.unproven));
    let streams = Arc::new(Semaphore::new(limits.streams));
    // Neither semaphore is ever closed, so neither acquire fails.
    while let Ok(proving) = Arc::clone(&unproven).acquire_owned().await {
        let accepted = listener.accept().await;
        let stream = match accepted {
            Ok((_, cid)) if cid != HOST_CID => {
                tracing::warn!(cid, "connection refused: not from the host");
                continue;
            }
            Ok((socket, _)) => Stream::new(socket),
            Err(error) => Err(error),
        };
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "no connection can be taken in");
                tokio::time::sleep(limits.pause).await;
                continue;
            }
        };
        let (secret, streams, serve) = (secret.clone(), Arc::clone(&streams), serve.clone());
        tokio::spawn(async move {
            let (header, answer) = match hello::handshake(&stream, &secret, limits.deadline).await {
                Ok(opened) => opened,
                Err(HandshakeError::Unused) => return,
                Err(error) => {
                    tracing::warn!(error = chain(&error), "connection refused");
                    return;
                }
            };
            drop(proving);
            let Ok(room) = streams.try_acquire_owned() else {
                let detail = format!("there are {} streams already", limits.streams);
                answer.refuse(&stream, Status::Busy, &detail).await;
                return;
            };
            serve(Arrival { stream, header, answer, room }).await;
        });
    }
}

#[cfg(test)]
#[path = "accept_tests.rs"]
mod tests;
