//! One `Files` stream: frames in and out of a connected stream socket.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use dhow_protocol::codec::{self, CodecError, FILE_LIMIT};
use dhow_protocol::files::{DataReply, FileAnswer, FileReply};
use rustix::net::{RecvFlags, SendFlags, Shutdown};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Bytes that are read at once.
const READ_AT_ONCE: usize = 64 << 10;
/// The rest of a frame that has begun comes within this time, or the stream is broken. A host that
/// is only stopped for a while comes back in it.
const FRAME_DEADLINE: Duration = Duration::from_secs(120);

/// A stream; reading and writing share it.
#[derive(Debug)]
pub struct Stream {
    fd: AsyncFd<OwnedFd>,
}

impl Stream {
    /// Takes a connected stream socket, within the runtime that serves it.
    ///
    /// # Errors
    /// epoll(7)'s.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        // SAFETY: the fd is owned by the AsyncFd and never taken out or replaced while it lives.
        Ok(Self { fd: unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)? })
    }

    /// Sends `bytes`, all of them.
    ///
    /// # Errors
    /// send(2)'s.
    pub async fn send(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let send = |fd: &OwnedFd| match rustix::net::send(fd, bytes, SendFlags::NOSIGNAL) {
                Err(rustix::io::Errno::INTR) => Ok(0),
                result => Ok(result?),
            };
            let sent = self.fd.async_io(Interest::WRITABLE, send).await?;
            bytes = &bytes[sent..];
        }
        Ok(())
    }

    /// Ends it in both directions; whoever reads or writes it learns so.
    pub fn end(&self) {
        // It may have ended already.
        let _ = rustix::net::shutdown(self.fd.get_ref().as_fd(), Shutdown::Both);
    }

    /// Reads what is there; 0 at the end.
    async fn receive(&self, to: &mut [u8]) -> io::Result<usize> {
        loop {
            let receive = |fd: &OwnedFd| Ok(rustix::net::recv(fd, &mut *to, RecvFlags::empty())?.1);
            match self.fd.async_io(Interest::READABLE, receive).await {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(0),
                result => return result,
            }
        }
    }
}

/// A reply; the bytes of a file are not copied.
#[derive(Debug, PartialEq, Eq)]
pub enum Reply<'a> {
    /// Bytes of a file.
    Data(DataReply<'a>),
    /// Anything else.
    Other(FileReply),
}

impl From<Reply<'_>> for FileReply {
    fn from(reply: Reply<'_>) -> Self {
        match reply {
            Reply::Data(DataReply { unique, data }) => {
                Self { unique, result: Ok(FileAnswer::Data(data.to_vec())) }
            }
            Reply::Other(reply) => reply,
        }
    }
}

/// Reads replies of a stream.
#[derive(Debug, Default)]
pub struct Replies {
    buffer: Vec<u8>,
    /// Where in `buffer` what was received and not taken yet begins and ends.
    begin: usize,
    end: usize,
}

impl Replies {
    /// The next reply; `None` at the end of the stream. Not cancellation safe.
    ///
    /// # Errors
    /// As [`CodecError`] says.
    pub async fn next(&mut self, stream: &Stream) -> Result<Option<Reply<'_>>, CodecError> {
        if self.begin == self.end && self.receive(stream, 4).await? == 0 {
            return Ok(None);
        }
        let length = match self.frame()? {
            Ok(length) => length,
            Err(_) => tokio::time::timeout(FRAME_DEADLINE, self.rest(stream))
                .await
                .map_err(|_| CodecError::Io(io::ErrorKind::TimedOut.into()))??,
        };
        let body = &self.buffer[self.begin + 4..self.begin + length];
        self.begin += length;
        Ok(Some(match DataReply::parse(body) {
            Some(data) => Reply::Data(data),
            None => Reply::Other(codec::from_bytes(body)?),
        }))
    }

    /// Length of the next frame with its header, or how many bytes it has at least when not all of it
    /// is here.
    fn frame(&self) -> Result<Result<usize, usize>, CodecError> {
        let here = &self.buffer[self.begin..self.end];
        let Some(header) = here.first_chunk::<4>() else { return Ok(Err(4)) };
        let length = 4 + codec::body_length(*header, FILE_LIMIT)?;
        Ok(if here.len() < length { Err(length) } else { Ok(length) })
    }

    /// Receives the rest of a frame.
    async fn rest(&mut self, stream: &Stream) -> Result<usize, CodecError> {
        loop {
            match self.frame()? {
                Ok(length) => return Ok(length),
                Err(wanted) if self.receive(stream, wanted).await? == 0 => return Err(CodecError::Truncated),
                Err(_) => {}
            }
        }
    }

    /// Receives on, with room for a frame of `wanted` bytes.
    async fn receive(&mut self, stream: &Stream, wanted: usize) -> Result<usize, CodecError> {
        self.buffer.copy_within(self.begin..self.end, 0);
        self.end -= self.begin;
        self.begin = 0;
        let room = wanted.max(READ_AT_ONCE);
        if self.buffer.len() < room {
            self.buffer.resize(room, 0);
        }
        let got = stream.receive(&mut self.buffer[self.end..]).await.map_err(CodecError::Io)?;
        self.end += got;
        Ok(got)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dhow_protocol::files::Errno;
    use std::os::unix::net::UnixStream;

    fn pair() -> (Stream, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Stream::new(ours.into()).unwrap(), theirs)
    }

    fn reply(unique: u64, bytes: usize) -> FileReply {
        FileReply { unique, result: Ok(FileAnswer::Data(vec![unique as u8; bytes])) }
    }

    #[tokio::test]
    async fn replies_come_whole_however_they_are_cut() {
        use std::io::Write;
        let (stream, mut host) = pair();
        let sizes = [0, 1, 100, 70_000, 1 << 20, 3, 200_000];
        let refused = FileReply { unique: 7, result: Err(Errno(2)) };
        let mut bytes = Vec::new();
        for (unique, size) in sizes.iter().enumerate() {
            codec::append_frame(&mut bytes, &reply(unique as u64, *size), FILE_LIMIT).unwrap();
        }
        codec::append_frame(&mut bytes, &refused, FILE_LIMIT).unwrap();
        let writer = std::thread::spawn(move || {
            // Odd pieces, so that frames and headers are cut.
            bytes.chunks(4093).for_each(|piece| host.write_all(piece).unwrap());
        });
        let mut replies = Replies::default();
        for (unique, size) in sizes.iter().enumerate() {
            let next = replies.next(&stream).await.unwrap().unwrap();
            assert!(matches!(next, Reply::Data(_)));
            assert_eq!(FileReply::from(next), reply(unique as u64, *size));
        }
        assert_eq!(replies.next(&stream).await.unwrap(), Some(Reply::Other(refused)));
        assert!(replies.next(&stream).await.unwrap().is_none());
        writer.join().unwrap();
    }

    #[tokio::test]
    async fn a_cut_frame_and_garbage_are_errors() {
        use std::io::Write;
        for (bytes, huge) in [(&[9u8, 0, 0, 0, 1][..], false), (&[0xff; 8][..], true)] {
            let (stream, mut host) = pair();
            host.write_all(bytes).unwrap();
            drop(host);
            let error = Replies::default().next(&stream).await.unwrap_err();
            assert_eq!(matches!(error, CodecError::TooLong { .. }), huge, "{error}");
            assert_eq!(matches!(error, CodecError::Truncated), !huge, "{error}");
        }
        let (stream, mut host) = pair();
        host.write_all(&[3, 0, 0, 0, 1, 9, 9]).unwrap();
        assert!(matches!(Replies::default().next(&stream).await, Err(CodecError::Decode(_))));
    }

    #[tokio::test]
    async fn a_stream_that_was_ended_is_at_its_end() {
        let (stream, host) = pair();
        stream.end();
        assert!(Replies::default().next(&stream).await.unwrap().is_none());
        assert!(stream.send(&[0; 9]).await.is_err());
        drop(host);
    }
}
