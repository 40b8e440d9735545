//! Listening sockets of the guest's root network namespace, as the guest reports them. The host decides.

use bincode::{Decode, Encode};
use std::net::IpAddr;

/// A listening (TCP) or bound (UDP) socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Encode, Decode)]
pub struct Listener {
    /// Transport protocol.
    pub protocol: Protocol,
    /// Bound address in the guest; `0.0.0.0` and `::` are wildcards.
    pub address: IpAddr,
    /// Bound port.
    pub port: u16,
}

/// A transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Encode, Decode)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Guest → host.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum PortsEvent {
    /// All there are; the first event of a stream, and whenever the guest lost track.
    All(Vec<Listener>),
    /// What came and what went since the event before.
    Changed {
        /// New ones.
        added: Vec<Listener>,
        /// Gone ones.
        removed: Vec<Listener>,
    },
}
