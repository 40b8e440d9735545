//! Parts of the `dhow` binary; `main.rs` dispatches to them.
//!
//! The library exists for tests and benches; it is no public interface.

pub mod api;
pub mod cli;
pub mod config;
pub mod docker;
pub mod files;
pub mod fileserver;
pub mod forward;
pub mod images;
pub mod keeper;
pub mod qemu;
pub mod supervisor;
pub mod vsock;

pub use dhow_protocol::errors;
