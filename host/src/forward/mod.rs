//! Host endpoints that lead to guest ones, which (rules, policy, table), over TCP, UDP and unix sockets; what the
//! guest reaches of the host (services); and the guest's names.
//!
//! Nothing here copies a byte of a connection: an accepted socket is handed to the vsock transport,
//! which moves data straight between it and the guest.

mod dns;
mod hosts;
mod kept;
mod news;
mod policy;
mod resolv_conf;
pub mod rules;
mod services;
pub mod sockets;
mod table;
mod tcp;
mod udp;
mod unix;
mod upstream;
mod watched;

use std::future::Future;
use std::os::fd::OwnedFd;

use dhow_protocol::stream::StreamHeader;

pub use dns::serve_dns;
pub use kept::{Change, Kept};
pub use policy::{Decision, HostEnd, Policy};
pub use resolv_conf::{RESOLV_CONF, search_list};
pub use services::{HostServices, serve_host};
pub use table::Forwards;
pub use unix::serve_unix;
pub use watched::Watched;

/// Streams that are being opened at once, for each address or socket of the host.
const MAX_OPENING: usize = 128;

/// A way into the guest: opens a stream and makes a socket its host end.
pub trait Opener: Clone + Send + Sync + 'static {
    /// Opens a stream with `header`, waits for the guest's consent, and attaches `fd`, from which on
    /// the transport owns it. The reason of an error is for a person; `fd` is closed then.
    fn open(&self, header: StreamHeader, fd: OwnedFd) -> impl Future<Output = Result<(), String>> + Send;
}
