//! Listening sockets of forwards that outlive the supervisor: what it binds is also held by the keeper,
//! and a new supervisor finds it. A client that connects in between waits in the socket's backlog.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};

use dhow_protocol::ports::Protocol;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use tokio::net::{TcpListener, TcpSocket, UdpSocket};
use tokio::sync::mpsc;

use super::policy::HostEnd;

/// Before protocol and address in the name of a held socket.
const PREFIX: &str = "forward:";
/// Connections that wait for a supervisor; more wait in the client's kernel.
const BACKLOG: u32 = 1024;

/// What is to be held, in order.
#[derive(Debug)]
pub enum Change {
    /// Hold a duplicate of a listening socket under this name.
    Hold(String, OwnedFd),
    /// Close what is held under this name.
    Release(String),
}

/// The sockets that an earlier supervisor left, and the way to have others held.
#[derive(Debug, Default)]
pub struct Kept {
    inherited: HashMap<HostEnd, OwnedFd>,
    changes: Option<mpsc::UnboundedSender<Change>>,
}

impl Kept {
    /// Takes the sockets of forwards out of what the keeper holds. The receiver tells what it is to
    /// hold from here on.
    #[must_use]
    pub fn take(held: &mut HashMap<String, OwnedFd>) -> (Self, mpsc::UnboundedReceiver<Change>) {
        let (sender, changes) = mpsc::unbounded_channel();
        let names: Vec<String> = held.keys().filter(|name| name.starts_with(PREFIX)).cloned().collect();
        let mut inherited = HashMap::new();
        for name in names {
            match (end_of(&name), held.remove(&name)) {
                (Some(end), Some(socket)) if is_bound_to(&socket, end.address) => {
                    inherited.insert(end, socket);
                }
                _ => {
                    tracing::warn!(name, "a held socket is not what it is called");
                    // The receiver is in this function's hands.
                    let _ = sender.send(Change::Release(name));
                }
            }
        }
        (Self { inherited, changes: Some(sender) }, changes)
    }

    /// A listening socket at `address`: an earlier supervisor's, or a new one.
    ///
    /// # Errors
    /// When it cannot be bound.
    pub fn bind_tcp(&mut self, address: SocketAddr) -> io::Result<TcpListener> {
        let end = HostEnd { protocol: Protocol::Tcp, address };
        if let Some(socket) = self.inherited.remove(&end) {
            let listener = std::net::TcpListener::from(socket);
            listener.set_nonblocking(true)?;
            return TcpListener::from_std(listener);
        }
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        // Past connections in TIME_WAIT do not keep a forward from coming back.
        socket.set_reuseaddr(true)?;
        if address.is_ipv6() {
            // IPv4 is a host address of its own.
            sockopt::set_ipv6_v6only(&socket, true)?;
        }
        socket.bind(address)?;
        let listener = socket.listen(BACKLOG)?;
        self.hold(end, listener.as_fd().try_clone_to_owned()?);
        Ok(listener)
    }

    /// A UDP socket at `address`, likewise.
    ///
    /// # Errors
    /// When it cannot be bound.
    pub fn bind_udp(&mut self, address: SocketAddr) -> io::Result<UdpSocket> {
        let end = HostEnd { protocol: Protocol::Udp, address };
        let socket = match self.inherited.remove(&end) {
            Some(socket) => std::net::UdpSocket::from(socket),
            None => {
                let socket = new_udp(address)?;
                self.hold(end, socket.as_fd().try_clone_to_owned()?);
                socket
            }
        };
        socket.set_nonblocking(true)?;
        UdpSocket::from_std(socket)
    }

    /// The socket at `end` is no longer wanted.
    pub fn release(&self, end: HostEnd) {
        if let Some(changes) = &self.changes {
            let _ = changes.send(Change::Release(name(end)));
        }
    }

    /// Closes what an earlier supervisor left and nobody has bound: the guest no longer listens there.
    pub fn release_inherited(&mut self) {
        for end in std::mem::take(&mut self.inherited).into_keys() {
            self.release(end);
        }
    }

    fn hold(&self, end: HostEnd, socket: OwnedFd) {
        if let Some(changes) = &self.changes {
            // Without a receiver the supervisor is ending.
            let _ = changes.send(Change::Hold(name(end), socket));
        }
    }
}

/// A bound UDP socket; at `::` for IPv6 alone, since IPv4 is a host address of its own.
fn new_udp(address: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = rustix::net::socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    rustix::net::bind(&socket, &address)?;
    Ok(socket.into())
}

fn name(HostEnd { protocol, address }: HostEnd) -> String {
    let protocol = match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    };
    format!("{PREFIX}{protocol}:{address}")
}

fn end_of(name: &str) -> Option<HostEnd> {
    let (protocol, address) = name.strip_prefix(PREFIX)?.split_once(':')?;
    let protocol = match protocol {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        _ => return None,
    };
    Some(HostEnd { protocol, address: address.parse().ok()? })
}

fn is_bound_to(socket: &OwnedFd, address: SocketAddr) -> bool {
    let bound = rustix::net::getsockname(socket).ok().and_then(|bound| SocketAddr::try_from(bound).ok());
    bound == Some(address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    /// What a keeper would hold after these changes.
    fn hold(held: &mut HashMap<String, OwnedFd>, changes: &mut mpsc::UnboundedReceiver<Change>) {
        while let Ok(change) = changes.try_recv() {
            match change {
                Change::Hold(name, fd) => drop(held.insert(name, fd)),
                Change::Release(name) => drop(held.remove(&name)),
            }
        }
    }

    #[tokio::test]
    async fn a_client_of_a_dead_supervisor_is_served_by_the_next() {
        let mut held = HashMap::new();
        let (mut first, mut changes) = Kept::take(&mut held);
        let any = "127.0.0.1:0".parse().unwrap();
        let free = std::net::TcpListener::bind::<SocketAddr>(any).unwrap().local_addr().unwrap();
        let listener = first.bind_tcp(free).unwrap();
        hold(&mut held, &mut changes);
        assert_eq!(held.len(), 1);
        drop((first, listener, changes));

        let mut client = TcpStream::connect(free).await.unwrap();
        let (mut second, mut changes) = Kept::take(&mut held);
        let listener = second.bind_tcp(free).unwrap();
        second.release_inherited();
        assert!(changes.try_recv().is_err(), "what is bound stays held");
        listener.accept().await.unwrap().0.write_all(b"hello").await.unwrap();
        let mut said = [0; 5];
        client.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"hello");
    }

    #[tokio::test]
    async fn a_datagram_of_a_dead_supervisors_client_is_read_by_the_next() {
        let mut held = HashMap::new();
        let (mut first, mut changes) = Kept::take(&mut held);
        let free = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let socket = first.bind_udp(free).unwrap();
        hold(&mut held, &mut changes);
        drop((first, socket, changes));
        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        client.send_to(b"hello", free).await.unwrap();
        let socket = Kept::take(&mut held).0.bind_udp(free).unwrap();
        let mut said = [0; 9];
        assert_eq!(socket.recv_from(&mut said).await.unwrap(), (5, client.local_addr().unwrap()));
    }

    #[tokio::test]
    async fn what_nobody_wants_any_more_is_released() {
        let mut held = HashMap::new();
        let listener = std::net::TcpListener::bind("[::1]:0").unwrap();
        let address = listener.local_addr().unwrap();
        let end = |protocol| HostEnd { protocol, address };
        held.insert(name(end(Protocol::Tcp)), listener.into());
        let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        held.insert("forward:tcp:127.0.0.1:1".to_owned(), other.into());
        held.insert("api".to_owned(), std::fs::File::open("/dev/null").unwrap().into());
        let (mut kept, mut changes) = Kept::take(&mut held);
        kept.release_inherited();
        let mut released = Vec::new();
        while let Ok(change) = changes.try_recv() {
            released.push(format!("{change:?}"));
        }
        assert_eq!(released.len(), 2);
        assert!(released.contains(&format!("Release(\"forward:tcp:{address}\")")), "{released:?}");
        assert_eq!(end_of(&name(end(Protocol::Udp))), Some(end(Protocol::Udp)));
        assert!(TcpStream::connect(address).await.is_err());
        assert_eq!(held.len(), 1);
    }
}
