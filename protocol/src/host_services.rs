//! Services of the host that the guest may reach: asked for by number, dialled by the host.
//!
//! ```text
//! host  ──► StreamHeader::HostServices(Offer)      what the guest may listen for; the stream stays open
//! guest ──► Dial { id, service }                   a client has connected to one of them
//! host  ──► StreamHeader::Dialled { id }           a new stream: from here on the service's raw bytes
//! host  ──► Refusal { id }                         or, on the first stream: it cannot be reached
//! ```
//! The guest never connects to the host: every stream is the host's. What is asked for is checked against
//! the profile each time; the offer is a convenience for an honest guest, not a permission.

use bincode::{Decode, Encode};

/// What the guest is to listen for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct Offer {
    /// TCP ports of the host's loopback, at `host.docker.internal` in the guest.
    pub ports: Vec<u16>,
    /// Paths of unix sockets in the guest, each for one of the host.
    pub sockets: Vec<String>,
}

/// One of an [`Offer`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Encode, Decode)]
pub enum Service {
    /// A TCP port of the host's loopback.
    Port(u16),
    /// The socket at this place of [`Offer::sockets`].
    Socket(u16),
}

/// Guest → host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Dial {
    /// Chosen by the guest, not reused while it waits.
    pub id: u64,
    /// What its client wants.
    pub service: Service,
}

/// Host → guest: there will be no stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Refusal {
    /// As in [`Dial`].
    pub id: u64,
}
