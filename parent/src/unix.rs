//! Paths of unix sockets.

use std::path::Path;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Whether nobody listens at the socket's path any more. It is asked without waiting: who has a full backlog
/// (EAGAIN, unix(7)) is there.
#[must_use]
pub fn is_dead(path: &Path) -> bool {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let Ok(socket) = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None) else {
        return false;
    };
    let address = SocketAddrUnix::new(path);
    address.is_ok_and(|address| rustix::net::connect(&socket, &address) == Err(Errno::CONNREFUSED))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_socket_without_a_listener_is_dead() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        assert!(!is_dead(&path), "there is none");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        // Until its backlog is full, and then, too.
        let clients: Vec<_> = (0..500)
            .map(|_| {
                assert!(!is_dead(&path));
            })
            .collect();
        drop((clients, listener));
        assert!(is_dead(&path));
    }
}
