//! A pseudoterminal: the command gets the terminal, this side its other end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use dhow_protocol::exec::TtySize;
use nix::unistd::{Gid, Uid};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{
    InputModes, LocalModes, OptionalActions, SpecialCodeIndex, Winsize, tcgetattr, tcsetattr, tcsetwinsize,
};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::process::Stdio;
use super::user::User;

/// Group of terminals in Debian, as devpts is mounted with `gid=5`.
const TTY_GROUP: u32 = 5;

/// This side of a terminal. Closing it hangs up whoever is on the other.
#[derive(Debug)]
pub(super) struct Master {
    master: AsyncFd<OwnedFd>,
}

/// Opens a terminal that `user` owns.
pub(super) fn open(size: TtySize, user: &User) -> io::Result<(Master, Stdio)> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    unlockpt(&master)?;
    // By ioctl and not by name: the name leads nowhere where another devpts is mounted.
    let slave = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    let mut modes = tcgetattr(&slave)?;
    modes.input_modes |= InputModes::IUTF8;
    tcsetattr(&slave, OptionalActions::Now, &modes)?;
    tcsetwinsize(&master, winsize(size))?;
    if !user.uid.is_root() {
        own(&slave, user.uid)?;
    }
    rustix::io::ioctl_fionbio(&master, true)?;
    // SAFETY: the fd is owned by the AsyncFd and never taken out or replaced while it lives.
    let master = unsafe { AsyncFd::register(master) }.map_err(io::Error::from)?;
    let stdio =
        Stdio { stdin: slave.try_clone()?, stdout: slave.try_clone()?, stderr: slave, terminal: true };
    Ok((Master { master }, stdio))
}

fn winsize(size: TtySize) -> Winsize {
    Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 }
}

/// So that the user can open /dev/tty and its own terminal's name again.
fn own(slave: &OwnedFd, user: Uid) -> io::Result<()> {
    nix::unistd::fchown(slave, Some(user), Some(Gid::from_raw(TTY_GROUP)))?;
    let mode = nix::sys::stat::Mode::from_bits_truncate(0o620);
    Ok(nix::sys::stat::fchmod(slave, mode)?)
}

impl Master {
    /// The kernel sends SIGWINCH to the foreground when the size differs.
    pub(super) fn resize(&self, size: TtySize) -> io::Result<()> {
        Ok(tcsetwinsize(self, winsize(size))?)
    }

    /// What to type for an end of input after `last` was typed: nothing where a program reads keys
    /// one by one. In the middle of a line the first end only hands the line over (termios(3), VEOF).
    pub(super) fn end_of_input(&self, last: Option<u8>) -> Vec<u8> {
        let Ok(modes) = tcgetattr(self) else { return Vec::new() };
        if !modes.local_modes.contains(LocalModes::ICANON) {
            return Vec::new();
        }
        let end = modes.special_codes[SpecialCodeIndex::VEOF];
        match last {
            None | Some(b'\n' | b'\r') => vec![end],
            Some(_) => vec![end; 2],
        }
    }
}

impl AsFd for Master {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.master.get_ref().as_fd()
    }
}

/// One direction of a terminal.
pub(super) struct Half(pub Arc<Master>);

impl AsyncRead for Half {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.master.poll_read_ready(cx))?;
            let read = guard.try_io(|master| Ok(rustix::io::read(master, buffer.initialize_unfilled())?));
            match read {
                Ok(Ok(length)) => {
                    buffer.advance(length);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                // Nobody has the terminal open any more: the end (pty(7)).
                Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => return Poll::Ready(Ok(())),
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Half {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.master.poll_write_ready(cx))?;
            match guard.try_io(|master| Ok(rustix::io::write(master, bytes)?)) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
