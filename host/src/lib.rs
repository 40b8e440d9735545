//! Parts of the `dhow` binary; `main.rs` dispatches to them.

pub mod vsock;
