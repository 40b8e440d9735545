//! The vhost-user virtio-vsock device: a process that moves bytes between fds and guest memory, and no more.
//!
//! ```text
//!  supervisor ──SEQPACKET──► control_socket ─► reactor ─► muxer ─► connection ◄─► host_fd ◄── client's socket
//!                                                           ▲           │
//!  QEMU ──vhost-user socket──► backend ─► queue ◄───────────┴───────────┘ packet, credit
//!          guest memory, kicks
//! ```
//!
//! The data path is one thread, the event loop of `vhost-user-backend`; the thread that reads vhost-user messages
//! stops it by the backend's lock. After start the device opens no file and creates no socket: it accepts
//! supervisors and receives fds, and can do nothing else (`confine.rs`).

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::{Error as DaemonError, VhostUserDaemon};
use vm_memory::GuestMemoryAtomic;
use vmm_sys_util::epoll::EventSet;

mod backend;
mod confine;
mod connection;
pub mod control;
pub(super) mod control_socket;
mod credit;
mod host_fd;
mod muxer;
mod packet;
mod ports;
mod queue;
mod reactor;
#[cfg(test)]
mod tests;

use backend::{Backend, REACTOR_EVENT, SharedBackend};
use queue::Memory;
use reactor::Reactor;

pub use muxer::MAX_CONNECTIONS;

/// What the device is started with.
#[derive(Debug)]
pub struct DeviceArgs {
    /// A listening AF_UNIX stream socket, to which QEMU's chardev connects.
    pub vhost_listener: OwnedFd,
    /// A listening AF_UNIX SOCK_SEQPACKET socket, to which the supervisor connects, and its successors after it.
    pub control_listener: OwnedFd,
    /// The guest's CID, above 2.
    pub guest_cid: u64,
}

/// Why the device cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The CID is reserved (virtio v1.2, 5.10.4) or does not fit in 32 bits.
    #[error("guest CID {0} is not between 3 and {max}", max = u32::MAX - 1)]
    GuestCid(u64),
    /// Something the device needs from the kernel at its start.
    #[error("the vsock device cannot start")]
    Start(#[source] std::io::Error),
    /// It does not serve without its confinement.
    #[error("the vsock device could not confine itself: {0}")]
    Confine(String),
    /// The vhost-user connection failed.
    #[error("the vsock device's connection to QEMU failed: {0}")]
    VhostUser(String),
}

/// Serves one QEMU until it disconnects. Confines the process for good: it can do nothing else afterwards.
pub fn run(args: DeviceArgs) -> Result<(), DeviceError> {
    if args.guest_cid <= packet::HOST_CID || args.guest_cid >= u64::from(u32::MAX) {
        return Err(DeviceError::GuestCid(args.guest_cid));
    }
    confine::settle_allocator().map_err(DeviceError::Confine)?;
    raise_fd_limit();
    let memory = GuestMemoryAtomic::new(Memory::new());
    let reactor = Reactor::new(args.guest_cid, args.control_listener).map_err(DeviceError::Start)?;
    let backend = Backend::new(args.guest_cid, memory.clone(), reactor);
    let poll_set = backend.poll_set().as_raw_fd();
    let backend: SharedBackend = Arc::new(Mutex::new(backend));

    let mut daemon = VhostUserDaemon::new("vhost-user".into(), backend, memory).map_err(vhost_user)?;
    for handler in daemon.get_epoll_handlers() {
        handler.register_listener(poll_set, EventSet::IN, REACTOR_EVENT).map_err(DeviceError::Start)?;
    }
    let mut listener = Listener::from(UnixListener::from(args.vhost_listener));
    daemon.start(&mut listener).map_err(vhost_user)?;
    drop(listener);
    confine::enter().map_err(DeviceError::Confine)?;
    tracing::info!(guest_cid = args.guest_cid, "QEMU connected");
    let ended = daemon.wait();
    for handler in daemon.get_epoll_handlers() {
        handler.send_exit_event();
    }
    match ended {
        Ok(())
        | Err(DaemonError::HandleRequest(VhostUserError::Disconnected | VhostUserError::PartialMessage)) => {
            tracing::info!("QEMU disconnected");
            Ok(())
        }
        Err(error) => Err(vhost_user(error)),
    }
}

fn vhost_user(error: DaemonError) -> DeviceError {
    // The library's error is no `Send` source; its text says all of it.
    DeviceError::VhostUser(error.to_string())
}

/// Each connection has an fd, and the usual soft limit is 1,024 of them.
fn raise_fd_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(%error, soft, "the limit of open files stays low");
    }
}
