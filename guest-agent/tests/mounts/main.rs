//! Shares for real: the kernel's FUSE, the agent's mounts below a parent, and the host's file server.
//!
//! ```text
//! test ──► host folder ◄── file server (a process) ◄── stream ──► worker ◄── /dev/fuse ◄── kernel
//!   │                                                    └─ below a parent, in a mount namespace
//!   └────► mounted folder, through /proc/<parent>/root ─────────────────────────────────────┘
//! ```
//! All processes are this binary, started again as one of its ignored "tests". The mount namespace
//! ends with its processes, whatever happens to a test, so no mount is ever left behind.
//!
//! Needs root and /dev/fuse.

#![allow(clippy::unwrap_used, reason = "a test may fail loudly")]

mod breaks;
mod content;
mod harness;
mod hostile;
mod operations;

#[test]
#[ignore = "the file server of the other tests, not a test"]
fn role_file_server() {
    harness::server::role();
}

#[test]
#[ignore = "the parent of the worker, not a test"]
fn role_parent() {
    harness::guest::role_parent();
}

#[test]
#[ignore = "the worker, not a test"]
fn role_worker() {
    harness::guest::role_worker();
}
