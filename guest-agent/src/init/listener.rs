//! The vsock listener, which PID 1 holds so that the host's connections survive a worker.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use dhow_protocol::AGENT_PORT;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, bind, socket};

use super::error::InitError;

/// Connections that wait for the worker: all that the device allows.
const BACKLOG: i32 = 4096;
/// Bytes that the host may send ahead on each connection; accepted sockets inherit it. The kernel's
/// default, 256 KiB, makes bulk data wait for credit.
const BUFFER: u64 = 8 << 20;

/// `SO_VM_SOCKETS_BUFFER_SIZE` and `SO_VM_SOCKETS_BUFFER_MAX_SIZE` of `<linux/vm_sockets.h>`.
const BUFFER_SIZE: libc::c_int = 0;
const BUFFER_MAX_SIZE: libc::c_int = 2;

/// Listens on the agent's port, from any CID: the guest's own is not known before the device is there,
/// and it may come later, or again.
///
/// # Errors
/// As socket(2), setsockopt(2), bind(2), listen(2).
pub(crate) fn open() -> Result<OwnedFd, InitError> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Vsock, SockType::Stream, flags, None)
        .map_err(|error| InitError::Listener("make", error.into()))?;
    // The largest size first: it bounds the other.
    for option in [BUFFER_MAX_SIZE, BUFFER_SIZE] {
        set_option(&listener, option, BUFFER)
            .map_err(|error| InitError::Listener("set the buffer of", error))?;
    }
    bind(listener.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, AGENT_PORT))
        .map_err(|error| InitError::Listener("bind", error.into()))?;
    rustix::net::listen(&listener, BACKLOG)
        .map_err(|error| InitError::Listener("listen on", error.into()))?;
    Ok(listener)
}

fn set_option(socket: &impl AsFd, option: libc::c_int, value: u64) -> io::Result<()> {
    let length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the pointer and the length are those of a u64 that lives through the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::AF_VSOCK,
            option,
            (&raw const value).cast(),
            length,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
