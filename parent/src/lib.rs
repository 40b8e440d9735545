//! The dumb parent of each side: the keeper on the host, PID 1 in the guest.
//!
//! A parent holds what must not be lost (file descriptors, children) and restarts its worker, which
//! may die. It decides nothing: the worker asks it to spawn, to hold and to release, and a new
//! worker is first given everything that is held.
//!
//! ```text
//!            parent (poll loop, no async)                worker (tokio)
//!   ┌─ held fds, by name ─────────────┐   SEQPACKET   ┌──────────────────┐
//!   │  children: name, pid, pidfd     │◄─────────────►│ ParentLink       │
//!   │  exits not yet told             │  + SCM_RIGHTS │ Restored         │
//!   └─────────────────────────────────┘               └──────────────────┘
//!        worker dies ─► restarted, at most `Limits::restarts` times in `Limits::window`
//! ```
//!
//! `message.rs` has what they say, `socket.rs` how a message and its fds travel, `parent.rs` the
//! loop, `worker.rs` and `children.rs` whom it serves and watches, `spawn.rs` fork and exec, `link.rs`
//! the worker's side, `procfs.rs` what /proc says of a process, `unix.rs` whether a socket's path leads anywhere, `estate.rs` what passes to a worker that becomes the parent when its own has died.

mod children;
mod estate;
mod link;
mod message;
mod parent;
pub mod procfs;
mod socket;
mod spawn;
pub mod unix;
mod worker;

pub use children::STATUS_UNKNOWN;
pub use estate::Estate;
pub use link::{Exit, ParentError, ParentLink, Restored, SpawnedChild};
pub use message::Spawn;
pub use parent::{Idle, Limits, Outcome, Parent};
pub use spawn::{FDS_VARIABLE, inherited_fds};
pub use worker::WorkerCommand;
