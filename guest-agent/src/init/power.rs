//! The end: processes, filesystems, power.

use std::time::{Duration, Instant};

use dhow_parent::Parent;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::mountinfo::{self, Mount};
use super::{console, log, processes};

/// What processes have for their end after SIGTERM, as `docker stop` gives a container.
const PATIENCE: Duration = Duration::from_secs(10);
/// After SIGKILL. What is left then is stuck in the kernel.
const AFTER_KILL: Duration = Duration::from_secs(5);

/// Ends all processes, writes back, unmounts, powers off.
///
/// Closing what `parent` holds, its last fds of FUSE among them, aborts the requests of processes
/// that wait for a mount whose server is gone; so it comes before the SIGKILL.
pub(crate) fn off(parent: Option<Parent>) -> ! {
    tracing::info!("powering off");
    signal_all(Signal::SIGTERM);
    let left = wait_for_all(PATIENCE);
    drop(parent);
    if !left.is_empty() {
        tracing::warn!(processes = left.join(", "), "killed at power-off");
        signal_all(Signal::SIGKILL);
        let stuck = wait_for_all(AFTER_KILL);
        if !stuck.is_empty() {
            tracing::error!(processes = stuck.join(", "), "not ended by SIGKILL");
        }
    }
    tracing::info!("unmounting");
    log::close();
    nix::unistd::sync();
    unmount_all();
    switch_off()
}

/// Powers off at once, but for writing back. For a panic, where nothing else can be trusted.
pub(crate) fn switch_off() -> ! {
    nix::unistd::sync();
    loop {
        let Err(error) = reboot(RebootMode::RB_POWER_OFF);
        console::error(&format!("cannot power off: {error}"));
        // PID 1 must not end, or the kernel panics.
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn signal_all(signal: Signal) {
    // kill(2): -1 is every process but PID 1. ESRCH: there is none, which is what is wanted.
    let _ = kill(Pid::from_raw(-1), signal);
}

/// Reaps until no process but this one and the kernel's threads is left; the names of those that
/// are.
fn wait_for_all(patience: Duration) -> Vec<String> {
    let deadline = Instant::now() + patience;
    loop {
        while !matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Err(_) | Ok(WaitStatus::StillAlive)) {}
        let left = processes::others();
        if left.is_empty() || Instant::now() >= deadline {
            return left;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Unmounts from the top of the pile down, as often as that frees something; what stays in use is
/// made read-only, which leaves it as clean.
fn unmount_all() {
    loop {
        let freed = mountinfo::read()
            .iter()
            .rev()
            .filter(|mount| mount.is_ours())
            .filter(|mount| unmount(mount))
            .count();
        if freed == 0 {
            break;
        }
    }
    for left in mountinfo::read().iter().rev().filter(|mount| mount.is_ours() && mount.has_disk()) {
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        if let Err(error) = mount(None::<&str>, &left.target, None::<&str>, flags, None::<&str>) {
            console::error(&format!("{} was not unmounted cleanly: {error}", left.target.display()));
        }
    }
    nix::unistd::sync();
}

fn unmount(mount: &Mount) -> bool {
    let mut flags = MntFlags::UMOUNT_NOFOLLOW;
    if mount.is_fuse() {
        // Its server is gone; a plain unmount could wait for it.
        flags |= MntFlags::MNT_FORCE | MntFlags::MNT_DETACH;
    }
    umount2(&mount.target, flags).is_ok()
}
