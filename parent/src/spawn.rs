//! Fork and exec of a child with exactly the fds that it was given.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use crate::message::Spawn;

/// Number of the first fd that a child is given beyond standard error.
const FIRST_FD: RawFd = 3;
/// Environment variable with the names of the child's fds, one a line. It is of that process alone, not
/// of those that it starts.
pub const FDS_VARIABLE: &str = "DHOW_FDS";

/// Starts the child and returns its pid. The caller reaps it.
///
/// The child is a session leader of its own, so that a terminal's signals do not reach it, and has
/// all signals unblocked and at their defaults.
pub(crate) fn spawn(spawn: Spawn) -> io::Result<i32> {
    let Some((program, arguments)) = spawn.argv.split_first() else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "an empty argument vector"));
    };
    let (names, sources) = lift(&spawn.fds)?;
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(spawn.env.iter().cloned()).stdin(Stdio::null());
    if names.is_empty() {
        // The environment may be a copy of a process's that was given fds.
        command.env_remove(FDS_VARIABLE);
    } else {
        command.env(FDS_VARIABLE, names);
    }
    if let Some(cwd) = &spawn.cwd {
        command.current_dir(cwd);
    }
    if let Some(stdout) = spawn.stdout {
        command.stdout(Stdio::from(stdout));
    }
    if let Some(stderr) = spawn.stderr {
        command.stderr(Stdio::from(stderr));
    }
    let numbers: Vec<RawFd> = sources.iter().map(AsRawFd::as_raw_fd).collect();
    let parent = std::process::id();
    let oom_score_adj = spawn.oom_score_adj.map(|score| score.to_string());
    let die_with_parent = spawn.die_with_parent;
    // SAFETY: between fork and exec the closure only makes system calls; it allocates nothing.
    unsafe {
        command.pre_exec(move || {
            prepare_child(&numbers, oom_score_adj.as_deref(), die_with_parent.then_some(parent))
        });
    }
    let child = command.spawn()?;
    drop(sources);
    i32::try_from(child.id()).map_err(io::Error::other)
}

/// Duplicates `fds` above all targets of [`place`], so that no dup2 overwrites a later source, and
/// gives their names as [`inherited_fds`] reads them.
pub(crate) fn lift(fds: &[(String, OwnedFd)]) -> io::Result<(String, Vec<OwnedFd>)> {
    if let Some((name, _)) = fds.iter().find(|(name, _)| name.is_empty() || name.contains('\n')) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{name:?} is no name of an fd")));
    }
    let top = FIRST_FD + RawFd::try_from(fds.len()).map_err(io::Error::other)?;
    let lifted = fds
        .iter()
        .map(|(_, fd)| rustix::io::fcntl_dupfd_cloexec(fd, top.max(100)))
        .collect::<Result<_, _>>()?;
    let names: Vec<&str> = fds.iter().map(|(name, _)| name.as_str()).collect();
    Ok((names.join("\n"), lifted))
}

/// Puts lifted fds at 3, 4, … without close-on-exec. Async-signal-safe.
pub(crate) fn place(numbers: &[RawFd]) -> io::Result<()> {
    for (target, source) in (FIRST_FD..).zip(numbers) {
        // SAFETY: plain dup2 on numbers that this process owns; whoever calls this is about to exec.
        if unsafe { libc::dup2(*source, target) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Runs in the child between fork and exec: async-signal-safe calls only.
fn prepare_child(numbers: &[RawFd], oom_score_adj: Option<&str>, die_with: Option<u32>) -> io::Result<()> {
    use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
    nix::unistd::setsid()?;
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
    if let Some(parent) = die_with {
        nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
        // The parent may have died before the line above.
        if nix::unistd::getppid().as_raw().unsigned_abs() != parent {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
    }
    if let Some(score) = oom_score_adj {
        let file = nix::fcntl::open(
            c"/proc/self/oom_score_adj",
            nix::fcntl::OFlag::O_WRONLY | nix::fcntl::OFlag::O_CLOEXEC,
            nix::sys::stat::Mode::empty(),
        )?;
        nix::unistd::write(&file, score.as_bytes())?;
    }
    place(numbers)
}

/// The fds that this process was given by [`Spawn::fds`], by name. Call it once, early in `main`.
///
/// # Errors
/// When a named fd is not open.
pub fn inherited_fds() -> io::Result<HashMap<String, OwnedFd>> {
    let Ok(names) = std::env::var(FDS_VARIABLE) else {
        return Ok(HashMap::new());
    };
    let mut fds = HashMap::new();
    for (number, name) in (FIRST_FD..).zip(names.split('\n')) {
        // SAFETY: F_GETFD on any number is harmless and says whether it is open.
        if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("fd {number} ({name}) is not open")));
        }
        // SAFETY: open, as was just checked, and ours alone: the parent gave it to us at exec.
        fds.insert(name.to_owned(), unsafe { OwnedFd::from_raw_fd(number) });
    }
    Ok(fds)
}
