//! The parent's side of its worker: started, told, ended.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::poll::{PollTimeout, poll};
use nix::sys::signal::Signal;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::children::{pidfd_of, poll_in};
use crate::message::{Spawn, Tell};
use crate::{link, socket, spawn};

/// The worker's command line.
#[derive(Debug, Clone)]
pub struct WorkerCommand {
    /// Program (absolute path) and arguments, in UTF-8.
    pub argv: Vec<OsString>,
    /// The whole environment.
    pub env: Vec<(String, String)>,
}

pub(crate) struct Worker {
    pub pid: i32,
    pub pidfd: OwnedFd,
    pub socket: OwnedFd,
}

impl Worker {
    /// Starts it; what it is told until [`Worker::never_wait`] may wait for it to read.
    pub(crate) fn start(command: &WorkerCommand) -> io::Result<Self> {
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        socket::enlarge(ours.as_fd())?;
        socket::enlarge(theirs.as_fd())?;
        let argv = command.argv.iter().map(|part| part.to_string_lossy().into_owned()).collect();
        let pid = spawn::spawn(Spawn {
            name: "worker".to_owned(),
            argv,
            env: command.env.clone(),
            fds: vec![(link::SOCKET_NAME.to_owned(), theirs)],
            ..Spawn::default()
        })?;
        tracing::info!(pid, "worker started");
        Ok(Self { pid, pidfd: pidfd_of(pid)?, socket: ours })
    }

    /// A worker that does not read no longer blocks its parent.
    pub(crate) fn never_wait(&self) -> io::Result<()> {
        Ok(rustix::io::ioctl_fionbio(&self.socket, true)?)
    }

    /// Whether the message was sent.
    pub(crate) fn tell(&self, message: &Tell, fds: &[BorrowedFd<'_>]) -> bool {
        let sent = socket::send(self.socket.as_fd(), message, fds);
        if let Err(error) = &sent {
            tracing::warn!(%error, ?message, "the worker does not listen");
        }
        sent.is_ok()
    }

    /// Asks it to end.
    pub(crate) fn terminate(&self) {
        self.signal(Signal::SIGTERM);
    }

    /// Ends it, and waits until it is a zombie: otherwise its closed socket would keep the loop busy.
    pub(crate) fn kill(&self) {
        self.signal(Signal::SIGKILL);
        // EINTR or a time-out only means that the loop comes back here.
        let _ = poll(&mut [poll_in(self.pidfd.as_fd())], PollTimeout::from(1000u16));
    }

    fn signal(&self, signal: Signal) {
        // ESRCH: it has ended already, which is what was wanted.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid), signal);
    }
}
