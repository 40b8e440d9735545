//! A message and its fds on a SOCK_SEQPACKET socket.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use bincode::{Decode, Encode};
use dhow_protocol::codec;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use crate::message::{FDS_LIMIT, MESSAGE_LIMIT};

fn invalid(reason: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

/// Sends one message; `WouldBlock` when the socket is full and non-blocking.
pub(crate) fn send<T: Encode>(socket: BorrowedFd<'_>, message: &T, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let bytes = codec::to_bytes(message).map_err(invalid)?;
    if bytes.len() > MESSAGE_LIMIT || fds.len() > FDS_LIMIT {
        return Err(invalid("message to or from the parent is above its limit"));
    }
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_LIMIT))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(invalid("too many fds for one message"));
    }
    let slices = [IoSlice::new(&bytes)];
    loop {
        match rustix::net::sendmsg(socket, &slices, &mut control, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => {}
            result => return result.map(drop).map_err(Into::into),
        }
    }
}

/// Receives one message and its fds (close-on-exec); `None` when the other side is gone.
pub(crate) fn receive<T: Decode<()>>(socket: BorrowedFd<'_>) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut bytes = vec![0; MESSAGE_LIMIT];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_LIMIT))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut slices = [IoSliceMut::new(&mut bytes)];
        match rustix::net::recvmsg(socket, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result?,
        }
    };
    let fds = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect::<Vec<_>>();
    if received.bytes == 0 {
        return Ok(None);
    }
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(invalid("message to or from the parent was cut"));
    }
    let message = codec::from_bytes(&bytes[..received.bytes]).map_err(invalid)?;
    Ok(Some((message, fds)))
}

/// Room for several whole messages on the socket; the default may be below one of the largest.
pub(crate) fn enlarge(socket: BorrowedFd<'_>) -> io::Result<()> {
    rustix::net::sockopt::set_socket_send_buffer_size(socket, 4 * MESSAGE_LIMIT)?;
    tracing::trace!(fd = socket.as_raw_fd(), "socket to the worker enlarged");
    Ok(())
}
