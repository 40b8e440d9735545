//! The truth about listening sockets: a `NETLINK_SOCK_DIAG` dump of this network namespace.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use dhow_protocol::ports::{Listener, Protocol};
use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, InetResponseHeader, SocketId, StateFlags};
use netlink_packet_sock_diag::{SOCK_DIAG_BY_FAMILY, SockDiagMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_SOCK_DIAG};

use super::clients::Clients;
use super::scope::Scope;

/// Groups of `linux/sock_diag.h` (`enum sknetlink_groups`) that tell of UDP sockets that are gone. Those of TCP tell
/// of every connection, which costs it a fifth of a millisecond in an emulated guest; the trace tells of listeners.
const SKNLGRP_INET_UDP_DESTROY: u32 = 2;
const SKNLGRP_INET6_UDP_DESTROY: u32 = 4;

/// Room for one answer of the kernel: it fills at most 32 KiB (`NETLINK_GOODSIZE` and up).
const BUFFER: usize = 64 << 10;
/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// In a request: whatever the port.
const ALL_PORTS: u16 = 0;

/// A socket for dumps.
pub(super) struct Diag {
    socket: Socket,
    buffer: Vec<u8>,
    /// Addresses at which only the agent's own servers are.
    own: Vec<IpAddr>,
    clients: Clients,
}

impl Diag {
    /// Leaves out what listens at one of the addresses `own`.
    pub(super) fn open(own: Vec<IpAddr>) -> io::Result<Self> {
        let socket = bound()?;
        // The kernel answers while it takes the request; the deadline is against the unforeseen.
        let deadline = Duration::from_secs(2);
        rustix::net::sockopt::set_socket_timeout(
            &socket,
            rustix::net::sockopt::Timeout::Recv,
            Some(deadline),
        )?;
        Ok(Self { socket, buffer: Vec::with_capacity(BUFFER), own, clients: Clients::new() })
    }

    /// TCP sockets that listen and UDP sockets that are bound and not connected, as far as `scope` asks for them,
    /// without the agent's own servers and without UDP sockets that are clients ([`Clients`]).
    pub(super) fn dump(&mut self, scope: &Scope) -> io::Result<Vec<Listener>> {
        let mut found = Vec::new();
        for family in [AF_INET, AF_INET6] {
            if scope.all_tcp {
                self.dump_one(family, Protocol::Tcp, ALL_PORTS, &mut found)?;
            }
            for port in &scope.ports {
                self.dump_one(family, Protocol::Tcp, *port, &mut found)?;
            }
            if scope.udp {
                self.dump_one(family, Protocol::Udp, ALL_PORTS, &mut found)?;
            }
        }
        found.retain(|(listener, _)| !self.own.contains(&listener.address.to_canonical()));
        if scope.udp {
            self.clients.remove_from(&mut found);
        }
        Ok(found.into_iter().map(|(listener, _)| listener).collect())
    }

    /// Sockets of one family and protocol at one port. The kernel compares it itself (`idiag_sport`), so that a
    /// socket among thousands costs little more than one alone.
    fn dump_one(
        &mut self,
        family: u8,
        protocol: Protocol,
        port: u16,
        found: &mut Vec<(Listener, u32)>,
    ) -> io::Result<()> {
        // An unconnected UDP socket is in state TCP_CLOSE (7).
        let (number, states) = match protocol {
            Protocol::Tcp => (IPPROTO_TCP, StateFlags::LISTEN),
            Protocol::Udp => (IPPROTO_UDP, StateFlags::CLOSE),
        };
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        let mut socket_id = if family == AF_INET { SocketId::new_v4() } else { SocketId::new_v6() };
        socket_id.source_port = port;
        let request =
            InetRequest { family, protocol: number, extensions: ExtensionFlags::empty(), states, socket_id };
        let mut message = NetlinkMessage::new(header, SockDiagMessage::InetRequest(request).into());
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        loop {
            self.buffer.clear();
            let length = self.socket.recv(&mut self.buffer, 0)?;
            if length > self.buffer.len() {
                return Err(io::Error::other("an answer of sock_diag is above 64 KiB"));
            }
            for message in messages(&self.buffer) {
                match message {
                    Message::Done => return Ok(()),
                    Message::Error(error) => return Err(error),
                    Message::Socket(socket) => {
                        let id = &socket.socket_id;
                        // Port 0: not bound. A destination: connected.
                        if id.source_port != 0 && id.destination_port == 0 {
                            let listener =
                                Listener { protocol, address: id.source_address, port: id.source_port };
                            found.push((listener, socket.inode));
                        }
                    }
                }
            }
        }
    }
}

/// Hears of UDP sockets that are gone.
pub(super) struct Gone {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Gone {
    pub(super) fn open() -> io::Result<Self> {
        let socket = bound()?;
        for group in [SKNLGRP_INET_UDP_DESTROY, SKNLGRP_INET6_UDP_DESTROY] {
            socket.add_membership(group)?;
        }
        socket.set_non_blocking(true)?;
        Ok(Self { socket, buffer: Vec::with_capacity(BUFFER) })
    }

    /// Reads all that has come, and tells whether any of it was without a peer, as servers are.
    pub(super) fn drain(&mut self) -> bool {
        let mut any = false;
        loop {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, 0) {
                Ok(_) => {
                    any |= messages(&self.buffer).any(|message| match message {
                        Message::Socket(socket) => socket.socket_id.destination_port == 0,
                        _ => true,
                    })
                }
                // Some were lost: a server may have been among them.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => any = true,
                Err(_) => return any,
            }
        }
    }
}

impl AsFd for Gone {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

enum Message {
    Socket(InetResponseHeader),
    Done,
    Error(io::Error),
}

/// The messages of one datagram. Attributes are not looked at.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message> {
    std::iter::from_fn(move || {
        use netlink_packet_core::Parseable;
        if bytes.len() < HEADER {
            return None;
        }
        let length = u32::from_ne_bytes(bytes[..4].try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(bytes[4..6].try_into().ok()?);
        if length < HEADER || length > bytes.len() {
            return Some(Message::Error(io::Error::other("a message of sock_diag is cut off")));
        }
        let (message, rest) = bytes.split_at(length);
        bytes = rest.get(length.next_multiple_of(4) - length..).unwrap_or_default();
        Some(if kind == SOCK_DIAG_BY_FAMILY {
            match InetResponseHeader::parse(&message[HEADER..]) {
                Ok(socket) => Message::Socket(socket),
                Err(error) => Message::Error(io::Error::other(error.to_string())),
            }
        } else {
            match NetlinkMessage::<SockDiagMessage>::deserialize(message).map(|message| message.payload) {
                Ok(NetlinkPayload::Done(_)) => Message::Done,
                Ok(NetlinkPayload::Error(error)) => Message::Error(error.to_io()),
                _ => Message::Error(io::Error::other(format!("sock_diag sent a message of kind {kind}"))),
            }
        })
    })
}

fn bound() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind(&SocketAddr::new(0, 0))?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}
