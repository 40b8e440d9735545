//! The device's end of a control connection: records in, records out, never waiting.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use super::control::{FromDevice, MAX_MESSAGE};

/// A record with the fd that came along.
#[derive(Debug)]
pub struct Record {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Its fd, if there was exactly one.
    pub fd: Option<OwnedFd>,
}

/// Receives one record from a SOCK_SEQPACKET socket; `None` at its end. Fds are close-on-exec. Where there are several,
/// or the kernel had to leave some out, all are closed: which of them was meant cannot be told.
pub fn receive(socket: impl AsFd) -> io::Result<Option<Record>> {
    let mut bytes = vec![0; MAX_MESSAGE + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        match rustix::net::recvmsg(&socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other?,
        }
    };
    let mut fds: Vec<OwnedFd> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    // > MSG_CTRUNC indicates that some control data was discarded due to lack of space in the buffer for ancillary
    // > data (recvmsg(2)); also when the table of open files is full.
    let truncated = received.flags.contains(ReturnFlags::CTRUNC);
    if truncated || fds.len() > 1 {
        tracing::warn!(
            kept = fds.len(),
            truncated,
            "a control record came with too many fds, or there was no room"
        );
        fds.clear();
    }
    let fd = fds.pop();
    if received.flags.contains(ReturnFlags::TRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "control record too long"));
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    bytes.truncate(received.bytes);
    Ok(Some(Record { bytes, fd }))
}

/// Sends one record, with an fd where there is one.
pub fn send(socket: impl AsFd, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other("no room for an fd"));
    }
    loop {
        match rustix::net::sendmsg(&socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => return Ok(()),
        }
    }
}

/// One supervisor's connection.
#[derive(Debug)]
pub struct ControlSocket {
    socket: OwnedFd,
    unsent: VecDeque<Vec<u8>>,
    /// Whether it is watched for room instead of requests.
    pub watched_for_room: bool,
}

impl ControlSocket {
    /// Takes over a connected, non-blocking socket.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, unsent: VecDeque::new(), watched_for_room: false }
    }

    /// Queues an answer.
    pub fn push(&mut self, message: &FromDevice) {
        self.unsent.push_back(message.encode());
    }

    /// Whether answers wait for the supervisor: then it is not asked for more.
    pub fn congested(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Sends what the socket takes.
    pub fn flush(&mut self) -> io::Result<()> {
        while let Some(bytes) = self.unsent.front() {
            match send(&self.socket, bytes, None) {
                Ok(()) => drop(self.unsent.pop_front()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The next record; an error of kind `WouldBlock` when there is none now.
    pub fn receive(&self) -> io::Result<Option<Record>> {
        receive(&self.socket)
    }
}

impl AsFd for ControlSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
