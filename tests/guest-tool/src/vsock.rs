//! Sockets of vsock(7), which the standard library does not know.

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const BACKLOG: i32 = 128;

/// Listens on a vsock port (vsock(7)) of this guest.
pub fn listener(port: u32) -> io::Result<OwnedFd> {
    let socket = socket()?;
    let (address, size) = address(libc::VMADDR_CID_ANY, port)?;
    // SAFETY: the pointer and the size are those of a live `sockaddr_vm`.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) })?;
    // SAFETY: the call has no pointers.
    check(unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) })?;
    Ok(socket)
}

/// A stream socket.
pub fn socket() -> io::Result<OwnedFd> {
    // SAFETY: the call has no pointers.
    let fd = check(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: it was just made, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// An address, and its size for the system calls.
pub fn address(cid: u32, port: u32) -> io::Result<(libc::sockaddr_vm, libc::socklen_t)> {
    // SAFETY: all zeros is a valid `sockaddr_vm`.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    let size = libc::socklen_t::try_from(size_of::<libc::sockaddr_vm>()).map_err(io::Error::other)?;
    Ok((address, size))
}

/// The next connection, as a stream whose reads, writes and half-close are those of any socket.
pub fn accept(listener: &OwnedFd) -> io::Result<TcpStream> {
    let none = std::ptr::null_mut();
    // SAFETY: null pointers ask for no address.
    let fd = check(unsafe {
        libc::accept4(listener.as_raw_fd(), none, std::ptr::null_mut(), libc::SOCK_CLOEXEC)
    })?;
    // SAFETY: it was just made, and nobody else knows it.
    Ok(TcpStream::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
