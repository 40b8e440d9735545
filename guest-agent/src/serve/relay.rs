//! Carries bytes between two sockets until both directions have ended, or one side was reset.
//!
//! ```text
//! EOF on one side   ─► the rest is written, then shutdown(WRITE) on the other: a half-close travels
//! reset of one side ─► both are cut at once
//! both have ended   ─► both are closed
//! ```
//! One task serves both directions. Small pieces are copied, out of one buffer that all relays of the
//! thread share: it is filled only when there is something to read, and only what the other side does
//! not take at once is kept. Bulk data is spliced ([`Pipe`]), which saves the kernel one of two copies
//! and carried 1.5 times as much in the guest. A silent relay has neither buffer nor pipe.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::task::{Context, Poll, ready};

use super::pipe::Pipe;
use super::stream::Stream;

/// Bytes that are read at once. Larger pieces are carried with fewer packets.
const CHUNK: usize = 128 << 10;
/// With less than that at once, copying is cheaper than a pipe.
const BULK: usize = 64 << 10;
/// Chunks of one direction after which other tasks have their turn.
const TURN: usize = 8;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; CHUNK]);
}

/// Bytes that went from the first side to the second, and back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Carried {
    /// From the first side.
    pub there: u64,
    /// From the second side.
    pub back: u64,
}

/// Relays until the end.
///
/// # Errors
/// One side failed or was reset; the other was cut then.
pub async fn relay(first: Stream, second: Stream) -> io::Result<Carried> {
    let (mut there, mut back) = (Direction::default(), Direction::default());
    let carried = poll_fn(|cx| {
        // Both are polled, whatever the first one says.
        let one = there.poll(&first, &second, back.done, cx)?;
        let other = back.poll(&second, &first, there.done, cx)?;
        match (one, other) {
            (Poll::Ready(()), Poll::Ready(())) => return Poll::Ready(Ok(())),
            (Poll::Ready(()), Poll::Pending) => there.watch(&first, cx)?,
            (Poll::Pending, Poll::Ready(())) => back.watch(&second, cx)?,
            (Poll::Pending, Poll::Pending) => {}
        }
        Poll::Pending
    });
    let carried: io::Result<()> = carried.await;
    match carried.err().or(there.failed).or(back.failed) {
        None => Ok(Carried { there: there.carried, back: back.carried }),
        Some(error) => {
            first.cut();
            second.cut();
            Err(error)
        }
    }
}

/// One direction of a relay.
#[derive(Debug, Default)]
struct Direction {
    /// Read and not yet written.
    rest: Vec<u8>,
    /// So much of `rest` is written.
    written: usize,
    /// Read and not yet written, of bulk data.
    pipe: Option<Pipe>,
    /// Whether much came at once the last time.
    bulk: bool,
    /// The source cannot be spliced.
    plain: bool,
    /// The source has ended.
    ended: bool,
    /// The sink was told so, or takes no more: nothing is left to do.
    done: bool,
    /// The sink took no more. What it sent before it left is still carried, then both are cut.
    failed: Option<io::Error>,
    /// The source will not change any more.
    settled: bool,
    carried: u64,
}

impl Direction {
    /// Carries what can be carried now; ready when nothing is left to do. An error is the source's.
    fn poll(
        &mut self,
        from: &Stream,
        to: &Stream,
        back_done: bool,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        for _ in 0..TURN {
            if !self.done {
                ready!(self.write_rest(to, cx));
            }
            if self.ended && !self.done {
                self.failed = to.shutdown_write().err();
                self.done = true;
            }
            if self.done {
                return Poll::Ready(Ok(()));
            }
            ready!(self.carry(from, to, cx))?;
            if self.ended && !back_done && from.is_reset() {
                return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn write_rest(&mut self, to: &Stream, cx: &mut Context<'_>) -> Poll<()> {
        let failed = loop {
            let written = match &mut self.pipe {
                Some(pipe) if pipe.held() > 0 => pipe.drain(to),
                _ if self.written < self.rest.len() => {
                    to.try_write(&self.rest[self.written..]).map(|length| self.written += length)
                }
                _ => break None,
            };
            match written {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => match ready!(to.poll_writable(cx)) {
                    Ok(()) => {}
                    Err(error) => break Some(error),
                },
                Err(error) => break Some(error),
            }
        };
        if let Some(error) = failed {
            self.fail(error);
        }
        // Its memory goes, too: the next rest may be long in coming.
        self.rest = Vec::new();
        self.written = 0;
        Poll::Ready(())
    }

    /// Reads as much as there is at once.
    fn carry(&mut self, from: &Stream, to: &Stream, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let length = match self.bulk && !self.plain {
            true => ready!(self.splice(from, cx)),
            false => ready!(self.copy(from, to, cx)),
        };
        match length {
            Ok(length) => {
                self.ended = length == 0;
                self.bulk = length >= BULK;
                self.carried += length as u64;
                if !self.bulk && self.pipe.as_ref().is_some_and(|pipe| pipe.held() == 0) {
                    self.pipe.take().map(Pipe::put_back);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidInput && !self.plain => self.plain = true,
            Err(error) => return Poll::Ready(Err(error)),
        }
        Poll::Ready(Ok(()))
    }

    /// Takes in one chunk that the sink is still to be given.
    fn splice(&mut self, from: &Stream, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let pipe = match &mut self.pipe {
            Some(pipe) => pipe,
            none => none.insert(Pipe::take()?),
        };
        loop {
            match pipe.fill(from) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if from.poll_readable(cx)?.is_pending() {
                        self.pipe.take().map(Pipe::put_back);
                        return Poll::Pending;
                    }
                }
                result => return Poll::Ready(result),
            }
        }
    }

    /// Reads one chunk, and keeps what the sink does not take at once.
    fn copy(&mut self, from: &Stream, to: &Stream, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        BUFFER.with_borrow_mut(|buffer| {
            let length = loop {
                match from.try_read(buffer) {
                    Ok(length) => break length,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready!(from.poll_readable(cx))?,
                    Err(error) => return Poll::Ready(Err(error)),
                }
            };
            if length > 0 {
                match to.try_write(&buffer[..length]) {
                    Ok(taken) => self.rest.extend_from_slice(&buffer[taken..length]),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        self.rest.extend_from_slice(&buffer[..length]);
                    }
                    Err(error) => self.fail(error),
                }
            }
            Poll::Ready(Ok(length))
        })
    }

    fn fail(&mut self, error: io::Error) {
        self.failed = Some(error);
        self.done = true;
    }

    /// The source has ended while the way back goes on, which nothing may be written to for long: asks
    /// whether it was reset.
    fn watch(&mut self, from: &Stream, cx: &mut Context<'_>) -> io::Result<()> {
        while self.ended && !self.settled {
            if from.is_reset() {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            match from.poll_changed(cx) {
                Poll::Ready(true) => {}
                Poll::Ready(false) => self.settled = true,
                Poll::Pending => break,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "relay_tests.rs"]
mod tests;
