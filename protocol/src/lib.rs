//! What crosses the wire between Dhow's host and its guest agent.
//!
//! Nothing here opens, listens or connects: types, their bytes, frame reading on streams that
//! somebody else opened, and what either side lets the other cost it (`allowance.rs`).
//!
//! ```text
//! one vsock connection = one stream
//! host ──► Hello (96 bytes, fixed for ever) + StreamHeader (bincode)      hello.rs, stream.rs
//! host ◄── HelloReply (256 bytes, fixed for ever)                         hello.rs
//! host ◄─► frames of the stream's own kind, or raw bytes for forwards     control.rs, exec.rs, …
//! ```

pub mod allowance;
pub mod boot;
pub mod bundle;
pub mod codec;
pub mod control;
pub mod datagram;
pub mod errors;
pub mod exec;
pub mod files;
pub mod hello;
pub mod host_services;
pub mod ports;
pub mod stream;

/// The vsock port that the agent listens on. Below 1024, so that binding it needs CAP_NET_BIND_SERVICE.
pub const AGENT_PORT: u32 = 620;
/// The host's CID (virtio 1.2, 5.10.4: `VMADDR_CID_HOST`); the agent refuses every other peer.
pub const HOST_CID: u32 = 2;
