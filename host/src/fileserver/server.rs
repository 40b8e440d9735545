//! Sessions: a few threads read requests from one stream, do them and answer in any order.
//!
//! A thread reads a frame while it holds the reading side, lets the next thread read, and then does
//! what it read itself, so no request is handed from thread to thread. A guest that sends more than
//! is done waits in the stream: nothing is queued here.

use std::fs::File;
use std::io::{BufReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};

use dhow_protocol::codec::{self, CodecError, FILE_LIMIT};
use dhow_protocol::files::{Errno, FileAnswer, FileOp, FileReply, FileRequest};
use rustix::net::{SendFlags, Shutdown};

use super::operations;
use super::replies::{Admission, Replies};
use super::share::Share;

/// Threads of a session.
const THREADS: usize = 4;
/// Bytes that are read ahead of a frame.
const READ_AHEAD: usize = 64 << 10;

/// Serves the sessions of one share.
#[derive(Clone)]
pub struct Server {
    shared: Arc<Shared>,
}

struct Shared {
    share: Arc<Share>,
    replies: Mutex<Replies>,
    mount: Mutex<Mount>,
}

#[derive(Default)]
struct Mount {
    id: Option<[u8; 16]>,
    /// Streams that were attached; the newest one's number.
    streams: u64,
    stream: Weak<Stream>,
}

/// What a stream is to its mount.
#[derive(Debug, Clone, Copy)]
struct Attachment {
    /// The mount, as [`Replies`] knows it.
    epoch: u64,
    /// Which of its streams.
    number: u64,
}

/// One stream of a mount.
struct Stream {
    fd: OwnedFd,
    /// `None` after the end or what is no frame: nothing that follows can be trusted to be one.
    reader: Mutex<Option<BufReader<File>>>,
    writer: Mutex<()>,
}

/// A session's threads.
pub struct Session {
    thread: JoinHandle<()>,
}

impl Session {
    /// Whether it has ended.
    pub fn is_over(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits for its end.
    pub fn wait(self) {
        if self.thread.join().is_err() {
            tracing::error!("a session of the file server panicked");
        }
    }
}

impl Server {
    /// A server without a session.
    pub fn new(share: Arc<Share>) -> Self {
        let shared = Shared { share, replies: Mutex::default(), mount: Mutex::default() };
        Self { shared: Arc::new(shared) }
    }

    /// Serves a stream until it ends.
    pub fn serve(&self, fd: OwnedFd) -> std::io::Result<Session> {
        rustix::io::ioctl_fionbio(&fd, false)?;
        let reader = BufReader::with_capacity(READ_AHEAD, File::from(fd.try_clone()?));
        let stream = Arc::new(Stream { fd, reader: Mutex::new(Some(reader)), writer: Mutex::new(()) });
        let shared = Arc::clone(&self.shared);
        let thread = thread::Builder::new().name("session".to_owned()).spawn(move || {
            if let Err(error) = shared.session(&stream) {
                tracing::warn!(error = &error as &dyn std::error::Error, "a file session failed");
            }
            stream.end();
        })?;
        Ok(Session { thread })
    }
}

impl Shared {
    fn session(&self, stream: &Arc<Stream>) -> Result<(), CodecError> {
        let Some(first) = stream.read()? else { return Ok(()) };
        let FileOp::Attach { mount } = first.op else {
            stream.answer(first.unique, Err(Errno(libc::EPROTO)))?;
            return Ok(());
        };
        let (resumed, attachment) = self.attach(mount, stream);
        stream.answer(first.unique, Ok(FileAnswer::Attached { resumed }))?;
        thread::scope(|scope| {
            let threads: Vec<_> =
                (0..THREADS).map(|_| scope.spawn(|| self.work(stream, attachment))).collect();
            threads.into_iter().try_for_each(|thread| thread.join().unwrap_or(Ok(())))
        })
    }

    /// Makes `stream` the mount's; true when the mount is the one of before.
    fn attach(&self, id: [u8; 16], stream: &Arc<Stream>) -> (bool, Attachment) {
        let mut mount = self.mount.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = mount.stream.upgrade() {
            old.end();
        }
        let resumed = mount.id == Some(id);
        if !resumed {
            // Not while a request of the mount before notes what it found.
            let _names = self.share.names_changing();
            self.replies().next_epoch();
            self.share.nodes().clear();
        }
        *mount = Mount { id: Some(id), streams: mount.streams + 1, stream: Arc::downgrade(stream) };
        (resumed, Attachment { epoch: self.replies().epoch(), number: mount.streams })
    }

    fn work(&self, stream: &Stream, at: Attachment) -> Result<(), CodecError> {
        let result = self.work_until_end(stream, at);
        // The other threads must not wait for frames that nobody can answer.
        stream.end();
        result
    }

    fn work_until_end(&self, stream: &Stream, at: Attachment) -> Result<(), CodecError> {
        while let Some(FileRequest { unique, op }) = stream.read()? {
            if !Replies::counts(&op) {
                if self.replies().epoch() != at.epoch {
                    return Ok(());
                }
                if let Some(result) = self.handle(op) {
                    stream.answer(unique, result)?;
                }
                continue;
            }
            let admission = self.replies().admit(at.epoch, unique, at.number);
            match admission {
                Admission::Over => return Ok(()),
                Admission::Running => {}
                Admission::Done(frame) => stream.send(&frame)?,
                Admission::New => {
                    let result = self.handle(op).unwrap_or(Ok(FileAnswer::Done));
                    let frame = Arc::new(codec::to_frame(&FileReply { unique, result }, FILE_LIMIT)?);
                    let again = self.replies().finish(at.epoch, unique, &frame);
                    if let Some(other) =
                        again.filter(|other| *other != at.number).and_then(|n| self.stream(n))
                    {
                        other.send(&frame)?;
                    }
                    stream.send(&frame)?;
                }
            }
        }
        Ok(())
    }

    /// The mount's newest stream, if it has this number; one that was replaced waits for nothing.
    fn stream(&self, number: u64) -> Option<Arc<Stream>> {
        let mount = self.mount.lock().unwrap_or_else(PoisonError::into_inner);
        if mount.streams == number { mount.stream.upgrade() } else { None }
    }

    /// Does what is asked. A panic is a bug of ours that must not leave the guest waiting for ever.
    fn handle(&self, op: FileOp) -> Option<Result<FileAnswer, Errno>> {
        match catch_unwind(AssertUnwindSafe(|| operations::handle(&self.share, op))) {
            Ok(result) => result.map(|result| result.map_err(errno)),
            Err(_) => {
                tracing::error!("a file operation panicked; the guest is told EIO");
                Some(Err(Errno(libc::EIO)))
            }
        }
    }

    fn replies(&self) -> MutexGuard<'_, Replies> {
        self.replies.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stream {
    fn read(&self) -> Result<Option<FileRequest>, CodecError> {
        let mut turn = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(reader) = turn.as_mut() else { return Ok(None) };
        // Decoded while the others wait: after a frame that is none, nobody reads on.
        let frame =
            Self::read_frame(reader).and_then(|body| body.map(|body| codec::from_bytes(&body)).transpose());
        if !matches!(frame, Ok(Some(_))) {
            *turn = None;
        }
        frame
    }

    fn read_frame(reader: &mut BufReader<File>) -> Result<Option<Vec<u8>>, CodecError> {
        let mut header = [0; 4];
        let mut have = 0;
        while have < header.len() {
            match reader.read(&mut header[have..]) {
                Ok(0) if have == 0 => return Ok(None),
                Ok(0) => return Err(CodecError::Truncated),
                Ok(some) => have += some,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Ok(None),
                Err(error) => return Err(CodecError::Io(error)),
            }
        }
        let mut body = vec![0; codec::body_length(header, FILE_LIMIT)?];
        reader.read_exact(&mut body).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => CodecError::Truncated,
            _ => CodecError::Io(error),
        })?;
        Ok(Some(body))
    }

    fn answer(&self, unique: u64, result: Result<FileAnswer, Errno>) -> Result<(), CodecError> {
        self.send(&codec::to_frame(&FileReply { unique, result }, FILE_LIMIT)?)
    }

    /// Sends a frame whole. A stream that is gone is no error: the guest asks again on the next one.
    fn send(&self, mut frame: &[u8]) -> Result<(), CodecError> {
        let _turn = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        while !frame.is_empty() {
            match rustix::net::send(self.fd.as_fd(), frame, SendFlags::NOSIGNAL) {
                Ok(sent) => frame = &frame[sent..],
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => {
                    self.end();
                    return Ok(());
                }
                Err(error) => return Err(CodecError::Io(error.into())),
            }
        }
        Ok(())
    }

    fn end(&self) {
        // It may have ended already.
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Both);
    }
}

fn errno(error: rustix::io::Errno) -> Errno {
    Errno(error.raw_os_error())
}
