//! Children of a parent: which have ended, and how.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Status of a child whose end was seen and whose status went to another process.
pub const STATUS_UNKNOWN: i32 = -1;

pub(crate) struct Child {
    pub name: String,
    pub pidfd: OwnedFd,
    /// A child in the kernel's eyes, too: it is reaped, and its status known.
    pub ours: bool,
}

/// Pids and statuses of those that have ended among `children` and `worker`; with `orphans` of whatever
/// else this process has to reap.
pub(crate) fn ended(children: &BTreeMap<i32, Child>, worker: Option<i32>, orphans: bool) -> Vec<(i32, i32)> {
    let foreign = children.iter().filter(|(_, child)| !child.ours && has_ended(child));
    let mut ended: Vec<_> = foreign.map(|(pid, _)| (*pid, STATUS_UNKNOWN)).collect();
    if orphans {
        /// wait4(2): "-1 meaning wait for any child process".
        const ANY: i32 = -1;
        ended.extend(std::iter::from_fn(|| wait(ANY)));
    } else {
        let ours = children.iter().filter(|(_, child)| child.ours);
        ended.extend(ours.map(|(pid, _)| *pid).chain(worker).filter_map(wait));
    }
    ended
}

fn has_ended(child: &Child) -> bool {
    matches!(poll(&mut [poll_in(child.pidfd.as_fd())], PollTimeout::ZERO), Ok(1))
}

/// wait4(2) without blocking: pid and raw status of a child that has ended.
fn wait(pid: i32) -> Option<(i32, i32)> {
    let mut status = 0;
    // SAFETY: `status` is a valid place for the result and outlives the call.
    let got = unsafe { libc::waitpid(pid, &mut status, libc::WNOHANG) };
    (got > 0).then_some((got, status))
}

pub(crate) fn pidfd_of(pid: i32) -> io::Result<OwnedFd> {
    let pid = rustix::process::Pid::from_raw(pid).ok_or_else(|| io::Error::other("pid 0"))?;
    Ok(rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?)
}

pub(crate) fn poll_in(fd: BorrowedFd<'_>) -> PollFd<'_> {
    PollFd::new(fd, PollFlags::POLLIN)
}

pub(crate) fn is_ready(fd: &PollFd<'_>) -> bool {
    fd.any().unwrap_or(false)
}
