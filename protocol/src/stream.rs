//! What a stream is: the header that follows the hello.

use bincode::{Decode, Encode};

use crate::bundle::BundleOffer;
use crate::exec::ExecStart;
use crate::host_services::Offer;

/// The kind of a stream and what it needs to begin.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum StreamHeader {
    /// Requests and events ([`crate::control`]), one at a time for each host.
    Control,
    /// A command ([`crate::exec`]).
    Exec(ExecStart),
    /// Raw bytes to and from a TCP endpoint of the guest. The reply comes after its connect.
    Tcp {
        /// Address in the guest's root namespace.
        address: std::net::IpAddr,
        /// Port there.
        port: u16,
    },
    /// Raw bytes to and from a unix socket of the guest. The reply comes after its connect.
    Unix {
        /// Absolute path in the guest.
        path: String,
    },
    /// Listening sockets of the guest's root namespace ([`crate::ports`]), guest → host.
    Ports,
    /// Name queries ([`DnsMessage`]), guest → host; the host answers.
    Dns,
    /// File operations of one share ([`crate::files`]); the host answers.
    Files {
        /// The share's number, unique in a boot, as `ControlRequest::Mount` named it.
        share: u32,
        /// Names the session over reconnections.
        session: [u8; 16],
    },
    /// The host offers a bundle ([`crate::bundle`]).
    Bundle(BundleOffer),
    /// A log as raw bytes, guest → host.
    Logs {
        /// Which log.
        source: LogSource,
        /// Start that many lines from the end; all of it where absent.
        tail: Option<u32>,
        /// Go on as lines are added.
        follow: bool,
    },
    /// Datagrams ([`crate::datagram`]) to and from a UDP endpoint of the guest, for one client of the host.
    Udp {
        /// Address in the guest's root namespace.
        address: std::net::IpAddr,
        /// Port there.
        port: u16,
    },
    /// What the guest may reach of the host ([`crate::host_services`]): the guest asks, the host dials.
    HostServices(Offer),
    /// Raw bytes to and from a service of the host that the guest has asked for.
    Dialled {
        /// As in [`crate::host_services::Dial`].
        id: u64,
    },
}

/// A log that the guest keeps.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum LogSource {
    /// The agent's own, worker and PID 1.
    Agent,
    /// The kernel's ring buffer.
    Kernel,
    /// A daemon's, by its name in `bundle.toml` ("dockerd").
    Daemon(String),
}

/// A name query, or its answer with the same id: one DNS message in wire format (RFC 1035, 4.1).
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct DnsMessage {
    /// Pairs answer and query; not the id within the message.
    pub id: u64,
    /// The message. An empty answer means that the host could not resolve at all (SERVFAIL).
    pub message: Vec<u8>,
}
