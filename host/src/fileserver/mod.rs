//! The process that serves one granted host folder, and nothing else.
//!
//! ```text
//! supervisor ──SEQPACKET: one stream socket a message──► server.rs   sessions, threads
//!                                                          │ replies.rs   nothing applied twice
//! guest ◄──FileRequest / FileReply over that socket──────► operations.rs, changes.rs
//!                                                          │ share.rs     node id → place, checked
//!                                                          │ nodes.rs     what a node id means
//!                                                          │ masks.rs     Dhow's own folders
//!                                                          │ ownership.rs owner and mode as the guest sees them
//!                                                          ▼ host_fs.rs   the system calls
//! ```
//! The guest is hostile. Three walls stand one behind the other: a request can only name one
//! component in a known folder ([`dhow_protocol::files::Name`]); folders are opened by `openat2`
//! beneath the root, never through a symlink, and every node is compared with what it was when the
//! guest learnt of it; and the process itself may touch nothing else (`sandbox.rs`).

mod changes;
mod host_fs;
mod masks;
mod nodes;
mod operations;
mod ownership;
mod replies;
mod sandbox;
mod server;
mod share;

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::net;

/// What a file server is started with.
#[derive(Debug)]
pub struct FileServerArgs {
    /// The granted folder, absolute.
    pub root: PathBuf,
    /// Refuse every change.
    pub read_only: bool,
    /// Dhow's own folders: invisible and unreachable in the share. They should exist: of one that
    /// does not, the first component that is missing is masked.
    pub masked: Vec<PathBuf>,
    /// From the supervisor, SOCK_SEQPACKET: each message carries one connected stream socket
    /// ([`hand_over`]).
    pub control: OwnedFd,
}

/// Why a file server ended.
#[derive(Debug, thiserror::Error)]
pub enum FileServerError {
    /// The folder cannot be served.
    #[error("{} cannot be shared", path.display())]
    Root {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The server could not confine itself, so it does not serve.
    #[error("the file server could not confine itself: {0}")]
    Sandbox(String),
    /// The socket to the supervisor failed.
    #[error("the file server's socket to the supervisor failed")]
    Control(#[source] std::io::Error),
}

/// Serves one folder until `control` is at its end and no session is left.
///
/// Confines the calling thread for good, so it belongs into a process of its own.
///
/// # Errors
/// As [`FileServerError`] says.
pub fn run(args: FileServerArgs) -> Result<(), FileServerError> {
    let FileServerArgs { root, read_only, masked, control } = args;
    let share = share::Share::open(&root, read_only, &masked)
        .map_err(|source| FileServerError::Root { path: root, source: source.into() })?;
    // The guest has applied its own.
    rustix::process::umask(rustix::fs::Mode::empty());
    ignore_file_size_signal();
    sandbox::enter(share.root_fd(), read_only)?;
    let server = server::Server::new(Arc::new(share));
    let mut sessions = Vec::new();
    while let Some(stream) = receive_stream(control.as_fd()).map_err(FileServerError::Control)? {
        sessions.retain(|session: &server::Session| !session.is_over());
        match server.serve(stream) {
            Ok(session) => sessions.push(session),
            // Out of fds or threads for now: the guest loses this stream, not its mount.
            Err(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "a file session was not started");
            }
        }
    }
    sessions.into_iter().for_each(server::Session::wait);
    Ok(())
}

/// A write beyond RLIMIT_FSIZE is to be told to the guest (EFBIG), not to end the server.
fn ignore_file_size_signal() {
    // SAFETY: ignoring a signal installs no handler, so none can run in a wrong place.
    let ignored = unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    if ignored == libc::SIG_ERR {
        tracing::warn!("SIGXFSZ cannot be ignored");
    }
}

/// Gives a file server a connected stream socket to serve a session on.
///
/// # Errors
/// When the server is gone.
pub fn hand_over(control: BorrowedFd<'_>, stream: BorrowedFd<'_>) -> std::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = net::SendAncillaryBuffer::new(&mut space);
    let fds = [stream];
    ancillary.push(net::SendAncillaryMessage::ScmRights(&fds));
    net::sendmsg(control, &[IoSlice::new(&[0])], &mut ancillary, net::SendFlags::NOSIGNAL)?;
    Ok(())
}

/// The next stream; `None` at the end. A message without an fd is skipped.
fn receive_stream(control: BorrowedFd<'_>) -> std::io::Result<Option<OwnedFd>> {
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = net::RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0; 64];
        let mut parts = [IoSliceMut::new(&mut byte)];
        let flags = net::RecvFlags::CMSG_CLOEXEC;
        let got = match net::recvmsg(control, &mut parts, &mut ancillary, flags) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        let fd = ancillary.drain().find_map(|message| match message {
            net::RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        match (got.bytes, fd) {
            (_, Some(fd)) => return Ok(Some(fd)),
            (0, None) => return Ok(None),
            (_, None) => tracing::warn!("a message of the supervisor carried no stream"),
        }
    }
}

#[cfg(test)]
mod tests;
