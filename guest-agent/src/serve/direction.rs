//! One direction of a relay: from its source to its sink, by copies or by splices.

use std::cell::RefCell;
use std::io;
use std::task::{Context, Poll, ready};

use super::pipe::Pipe;
use super::stream::Stream;

/// Bytes that are read at once. Larger pieces are carried with fewer packets.
pub(super) const CHUNK: usize = 128 << 10;
/// With less than that at once, copying is cheaper than a pipe.
const BULK: usize = 64 << 10;
/// Bytes after which other relays have their turn: some milliseconds' worth in an emulated guest.
const TURN: usize = 128 << 10;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; CHUNK]);
}

/// Reads over which the mean of their sizes is taken, roughly.
const MEMORY: usize = 16;

/// One direction and what is under way in it.
#[derive(Debug, Default)]
pub(super) struct Direction {
    /// Bytes that were read.
    pub carried: u64,
    /// How often something was read, or the end.
    pub reads: u64,
    /// The sink was told the end, or takes no more: nothing is left to do.
    pub done: bool,
    /// The sink took no more. What it sent before it left is still carried, then both are cut.
    pub failed: Option<io::Error>,
    /// Cannot be spliced, or there are no more pipes.
    pub plain: bool,
    /// Read and not yet written.
    pub rest: Vec<u8>,
    /// So much of `rest` is written.
    written: usize,
    /// Read and not yet written, of bulk data.
    pub pipe: Option<Pipe>,
    /// Whether much came at once the last time.
    pub bulk: bool,
    /// Mean of what came at once lately, in bytes.
    pub mean: usize,
    /// The last read took all: the next one waits until there is more.
    empty: bool,
    /// The source has ended.
    ended: bool,
    /// The source will not change any more.
    settled: bool,
}

impl Direction {
    /// Carries what can be carried now; ready when nothing is left to do. An error is the source's.
    /// `back_done`: nothing more goes the other way.
    pub(super) fn poll(
        &mut self,
        from: &Stream,
        to: &Stream,
        back_done: bool,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        let mut carried = 0;
        while carried < TURN {
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
            let spliced = if self.bulk && !self.plain { self.splice(from)? } else { 0 };
            let length = if spliced > 0 { spliced } else { ready!(self.copy(from, to, cx))? };
            self.carried += length as u64;
            self.reads += 1;
            carried += length;
            self.bulk = length >= BULK;
            self.mean = self.mean - self.mean / MEMORY + length / MEMORY;
            self.ended = length == 0;
            if self.ended && !back_done && from.is_reset() {
                return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// The source has ended while the way back goes on, which nothing may be written to for long: asks
    /// whether it was reset.
    pub(super) fn watch(&mut self, from: &Stream, cx: &mut Context<'_>) -> io::Result<()> {
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

    /// What it waited for was told to another reactor: it looks by itself again.
    pub(super) fn look_again(&mut self) {
        self.empty = false;
    }

    fn write_rest(&mut self, to: &Stream, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let written = match &mut self.pipe {
                Some(pipe) if pipe.held() > 0 => pipe.drain(to),
                _ if self.written < self.rest.len() => {
                    to.try_write(&self.rest[self.written..]).map(|length| self.written += length)
                }
                _ => break,
            };
            let blocked = |error: &io::Error| error.kind() == io::ErrorKind::WouldBlock;
            let result = match written {
                Err(error) if blocked(&error) => ready!(to.poll_writable(cx)),
                result => result,
            };
            if let Err(error) = result {
                self.fail(error);
                break;
            }
        }
        // Memory and descriptors go, too: the next rest may be long in coming.
        self.rest = Vec::new();
        self.written = 0;
        if self.done || !self.bulk {
            self.put_pipe_back();
        }
        Poll::Ready(())
    }

    /// Takes one chunk into the pipe; 0 where a read must tell: nothing is there, or the end, or what splice(2)
    /// does not pass, such as an urgent byte (tcp(7)), in front of which it says either.
    fn splice(&mut self, from: &Stream) -> io::Result<usize> {
        let pipe = match &mut self.pipe {
            Some(pipe) => pipe,
            none => match Pipe::take() {
                Ok(pipe) => none.insert(pipe),
                Err(error) => {
                    tracing::debug!(%error, "no pipe for a forwarded connection: it is copied");
                    self.plain = true;
                    return Ok(0);
                }
            },
        };
        let filled = match pipe.fill(from) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            // "One or both file descriptors are not valid" for it (splice(2)).
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                self.plain = true;
                Ok(0)
            }
            result => result,
        };
        if !matches!(filled, Ok(1..)) {
            self.put_pipe_back();
        }
        filled
    }

    /// Reads one chunk, and keeps what the sink does not take at once.
    fn copy(&mut self, from: &Stream, to: &Stream, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        BUFFER.with_borrow_mut(|buffer| {
            let length = loop {
                if self.empty {
                    // Its readiness is cleared before the read, so that what comes after it is told anew.
                    ready!(from.poll_readable(cx))?;
                    self.empty = false;
                }
                match from.try_read(buffer) {
                    Ok(length) => break length,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.empty = true,
                    Err(error) => return Poll::Ready(Err(error)),
                }
            };
            self.empty = length < buffer.len() && from.short_reads_take_all();
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

    fn put_pipe_back(&mut self) {
        if let Some(pipe) = self.pipe.take() {
            pipe.put_back();
        }
    }

    fn fail(&mut self, error: io::Error) {
        self.failed = Some(error);
        self.done = true;
    }
}
