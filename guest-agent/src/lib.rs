//! Parts of the `dhow-agent` binary; `main.rs` dispatches to PID 1 or to the worker.
//!
//! The library exists for tests and benches; it is no public interface.

pub mod dns;
pub mod exec;
pub mod host_services;
pub mod init;
pub mod logs;
pub mod mounts;
pub mod ports;
mod resolv_conf;
pub mod runtimes;
pub mod serve;
