//! What a client has said before its stream is open: it travels with the hello.
//!
//! A client of most protocols speaks first, and has done so by the time its stream is opened. Its first bytes reach the
//! guest with the hello and need no round trip of their own; the agent relays nothing before it has consented.

use std::io;
use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::net::RecvFlags;

/// Bytes that are taken along at the most: a request's head. The rest follows when the stream is open.
const MOST: usize = 16 << 10;

/// See the module's description.
#[derive(Debug, PartialEq, Eq)]
pub enum FirstWords {
    /// Nothing yet.
    None,
    /// These bytes, which are still to be read: where the stream is not opened, the close of an unread socket is a reset.
    Some(Vec<u8>),
    /// Nothing, and nothing comes: the client has left, or finished sending.
    Never,
    /// The client has reset the connection, of which the socket tells once.
    Reset,
}

impl FirstWords {
    /// Looks at them on a stream socket.
    pub fn of(client: impl AsFd) -> Self {
        let mut bytes = [0; MOST];
        match receive(client, &mut bytes, RecvFlags::PEEK) {
            Ok(0) => Self::Never,
            Ok(length) => Self::Some(bytes[..length].to_vec()),
            Err(Errno::AGAIN) => Self::None,
            Err(_) => Self::Reset,
        }
    }

    /// Takes them off the socket, as they are on their way.
    ///
    /// # Errors
    /// They are not there any more.
    pub fn take_off(client: impl AsFd, words: &[u8]) -> io::Result<()> {
        let mut bytes = [0; MOST];
        let mut left = words.len();
        while left > 0 {
            match receive(&client, &mut bytes[..left], RecvFlags::empty())? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                length => left -= length,
            }
        }
        Ok(())
    }
}

fn receive(client: impl AsFd, bytes: &mut [u8], flags: RecvFlags) -> Result<usize, Errno> {
    loop {
        match rustix::net::recv(&client, &mut *bytes, flags | RecvFlags::DONTWAIT) {
            Err(Errno::INTR) => {}
            result => return Ok(result?.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::Shutdown;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn what_is_said_is_taken_once() {
        let (mut client, mut peer) = UnixStream::pair().unwrap();
        assert_eq!(FirstWords::of(&client), FirstWords::None);
        peer.write_all(&[7; MOST + 1]).unwrap();
        for _ in 0..2 {
            assert_eq!(FirstWords::of(&client), FirstWords::Some(vec![7; MOST]));
        }
        FirstWords::take_off(&client, &[7; MOST]).unwrap();
        let mut rest = [0; 2];
        assert_eq!(client.read(&mut rest).unwrap(), 1);
        peer.shutdown(Shutdown::Write).unwrap();
        assert_eq!(FirstWords::of(&client), FirstWords::Never);
        // Closed with something unread: a reset.
        let (client, peer) = UnixStream::pair().unwrap();
        (&client).write_all(b"x").unwrap();
        drop(peer);
        assert_eq!(FirstWords::of(&client), FirstWords::Reset);
    }
}
