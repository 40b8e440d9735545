//! What a client has said before its stream is open: it travels with the hello.
//!
//! A client of most protocols speaks first, and has done so by the time its stream is opened. Its first bytes reach the
//! guest with the hello and need no round trip of their own; the agent relays nothing before it has consented.

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
    /// These bytes, which are taken off the socket.
    Some(Vec<u8>),
    /// Nothing, and nothing comes: the client has left, or finished sending.
    Never,
    /// The client has reset the connection, of which the socket tells once.
    Reset,
}

impl FirstWords {
    /// Takes them off a stream socket.
    pub fn take(client: impl AsFd) -> Self {
        let mut bytes = vec![0; MOST];
        loop {
            match rustix::net::recv(&client, &mut bytes[..], RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return Self::Never,
                Ok((_, length)) => {
                    bytes.truncate(length);
                    return Self::Some(bytes);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Self::None,
                Err(_) => return Self::Reset,
            }
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
        assert_eq!(FirstWords::take(&client), FirstWords::None);
        peer.write_all(&[7; MOST + 1]).unwrap();
        assert_eq!(FirstWords::take(&client), FirstWords::Some(vec![7; MOST]));
        let mut rest = [0; 2];
        assert_eq!(client.read(&mut rest).unwrap(), 1);
        peer.shutdown(Shutdown::Write).unwrap();
        assert_eq!(FirstWords::take(&client), FirstWords::Never);
        // Closed with something unread: a reset.
        let (client, peer) = UnixStream::pair().unwrap();
        (&client).write_all(b"x").unwrap();
        drop(peer);
        assert_eq!(FirstWords::take(&client), FirstWords::Reset);
    }
}
