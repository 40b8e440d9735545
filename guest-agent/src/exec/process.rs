//! Starts a command, waits for it and signals it.
//!
//! Each has a thread of its own. Starting blocks until the child has executed its program, which may
//! be on a share that this very worker serves; PR_SET_PDEATHSIG is tied to the thread that forked;
//! and a thread that waits for one pid takes no other's exit status.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::mpsc;

use dhow_protocol::exec::ExitStatus;
use nix::unistd::{Gid, Uid};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, WaitIdStatus};
use tokio::sync::oneshot;

use super::Prepared;

/// A thread that forks and waits needs little.
const STACK: usize = 256 << 10;
/// Largest errno of Linux; what is above in the child's error says at which step it failed.
const ERRNO_MASK: i32 = 0xfff;
const STEP_SHIFT: u32 = 12;
/// The step of a child that enters its working folder.
const STEP_FOLDER: i32 = 1;
/// The step of a child that becomes its user.
const STEP_USER: i32 = 2;

/// A command's ends of its standard streams.
pub(super) struct Stdio {
    pub stdin: OwnedFd,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
    /// They are a terminal, to be the controlling one.
    pub terminal: bool,
}

/// Why a command does not run.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    /// No such program.
    #[error("command not found")]
    NotFound,
    /// It is no program, or may not be executed.
    #[error("cannot be executed: {0}")]
    NotExecutable(io::Error),
    /// The working folder cannot be entered, by this user at least.
    #[error("the working folder cannot be entered: {0}")]
    Folder(io::Error),
    /// The child could not become its user.
    #[error("the user cannot be taken on: {0}")]
    User(io::Error),
    /// There is no process or thread to be had.
    #[error("cannot be started: {0}")]
    Other(io::Error),
}

/// The process group of a running command, its leader. Until this is dropped its number belongs to
/// nobody else, even when the command has ended. All of it is killed then, unless it is left.
#[derive(Debug)]
pub(super) struct Group {
    pid: Pid,
    left: bool,
    /// The thread reaps when this is dropped.
    _reap: mpsc::Sender<()>,
}

/// Tells a command's end.
#[derive(Debug)]
pub(super) struct Exit {
    receiver: oneshot::Receiver<ExitStatus>,
}

/// Starts `prepared` on `stdio`.
///
/// # Errors
/// As [`StartError`] says; nothing runs then.
pub(super) async fn start(prepared: &Prepared, stdio: Stdio) -> Result<(Group, Exit), StartError> {
    let command = command(prepared, stdio)?;
    let (started, start) = oneshot::channel();
    std::thread::Builder::new()
        .name("exec".to_owned())
        .stack_size(STACK)
        .spawn(move || run(command, started))
        .map_err(StartError::Other)?;
    match start.await {
        Ok(result) => result,
        Err(_) => Err(StartError::Other(io::Error::other("its thread ended"))),
    }
}

impl Group {
    /// Signals all of it.
    ///
    /// # Errors
    /// The number is no signal, or nobody is left.
    pub(super) fn signal(&self, number: i32) -> io::Result<()> {
        signal_group(self.pid, number)
    }

    /// Lets what the command has left in the background go on.
    pub(super) fn leave(mut self) {
        self.left = true;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if !self.left {
            // ESRCH: nobody is left, which was wanted.
            let _ = self.signal(libc::SIGKILL);
        }
    }
}

impl Exit {
    /// Waits for the end; asked again after it was told, it is pending for ever.
    pub(super) async fn status(&mut self) -> ExitStatus {
        if self.receiver.is_terminated() {
            return std::future::pending().await;
        }
        // The thread always tells; if it cannot, the command's end is unknown.
        (&mut self.receiver).await.unwrap_or(ExitStatus::Signal(libc::SIGKILL))
    }
}

fn signal_group(group: Pid, number: i32) -> io::Result<()> {
    if !(1..=libc::SIGRTMAX()).contains(&number) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: kill(2) takes any numbers.
    match unsafe { libc::kill(-group.as_raw_nonzero().get(), number) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn command(prepared: &Prepared, stdio: Stdio) -> Result<Command, StartError> {
    let name = OsStr::new(prepared.argv.first().map_or("", String::as_str));
    let mut command = Command::new(prepared.program.as_ref().map_or(name, |program| program.as_os_str()));
    command
        .arg0(name)
        .args(prepared.argv.iter().skip(1))
        .env_clear()
        .envs(prepared.env.iter().map(|(name, value)| (name, value)))
        .stdin(stdio.stdin)
        .stdout(stdio.stdout)
        .stderr(stdio.stderr);
    let folder = CString::new(prepared.cwd.as_os_str().as_bytes())
        .map_err(|_| StartError::Folder(io::ErrorKind::InvalidInput.into()))?;
    let child = Child {
        folder,
        uid: prepared.user.uid,
        gid: prepared.user.gid,
        groups: prepared.user.groups.clone(),
        terminal: stdio.terminal,
        adjust_oom: is_oom_adjusted(),
        parent: std::process::id(),
    };
    // SAFETY: between fork and exec the closure only makes system calls; it allocates nothing.
    unsafe {
        command.pre_exec(move || child.prepare());
    }
    Ok(command)
}

/// Whether this process is not treated as any other when memory runs out, and its children with it.
fn is_oom_adjusted() -> bool {
    std::fs::read_to_string("/proc/self/oom_score_adj").is_ok_and(|score| score.trim() != "0")
}

/// What a child does to itself before it executes its program.
struct Child {
    folder: CString,
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
    terminal: bool,
    adjust_oom: bool,
    parent: u32,
}

impl Child {
    /// Async-signal-safe calls only.
    fn prepare(&self) -> io::Result<()> {
        nix::unistd::setsid()?;
        if self.terminal {
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
        for signal in 1..=libc::SIGRTMAX() {
            // SAFETY: the default action of any signal may be set; SIGKILL and the like refuse.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
        if self.adjust_oom {
            let flags = nix::fcntl::OFlag::O_WRONLY | nix::fcntl::OFlag::O_CLOEXEC;
            let file = nix::fcntl::open(c"/proc/self/oom_score_adj", flags, nix::sys::stat::Mode::empty())?;
            nix::unistd::write(&file, b"0")?;
        }
        // Ours are all close-on-exec; this is for what this process may have inherited.
        // SAFETY: the call marks fds and closes none.
        unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
        self.become_user().map_err(|error| at_step(STEP_USER, error))?;
        nix::unistd::chdir(self.folder.as_c_str()).map_err(|error| at_step(STEP_FOLDER, error))?;
        // After the change of user, which clears it. A hang-up: without the worker the host is gone.
        nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGHUP)?;
        // The worker may have died before the line above.
        if nix::unistd::getppid().as_raw().unsigned_abs() != self.parent {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        Ok(())
    }

    fn become_user(&self) -> nix::Result<()> {
        // The worker is root in the guest; where it is not, it runs commands as itself alone.
        if self.uid == nix::unistd::geteuid() && !self.uid.is_root() {
            return Ok(());
        }
        nix::unistd::setgroups(&self.groups)?;
        nix::unistd::setgid(self.gid)?;
        nix::unistd::setuid(self.uid)
    }
}

/// The parent sees no more of a child's error than its number, so the step is put into it.
fn at_step(step: i32, error: nix::Error) -> io::Error {
    io::Error::from_raw_os_error((step << STEP_SHIFT) | error as i32)
}

fn start_error(error: io::Error) -> StartError {
    let number = error.raw_os_error().unwrap_or_default();
    let cause = || io::Error::from_raw_os_error(number & ERRNO_MASK);
    match (number >> STEP_SHIFT, number & ERRNO_MASK) {
        (STEP_FOLDER, _) => StartError::Folder(cause()),
        (STEP_USER, _) => StartError::User(cause()),
        (_, libc::ENOENT | libc::ENOTDIR) => StartError::NotFound,
        (_, libc::EACCES | libc::ENOEXEC | libc::EISDIR | libc::EPERM) => StartError::NotExecutable(error),
        _ => StartError::Other(error),
    }
}

/// The thread: starts the command, waits until it has ended and until its pid is no longer needed.
fn run(mut command: Command, started: oneshot::Sender<Result<(Group, Exit), StartError>>) {
    let child = command.spawn();
    // The command's ends of its standard streams go with it.
    drop(command);
    let pid = match child.map(|child| Pid::from_child(&child)) {
        Ok(pid) => pid,
        Err(error) => {
            // Nobody waits any more for what does not run.
            let _ = started.send(Err(start_error(error)));
            return;
        }
    };
    let (told, receiver) = oneshot::channel();
    let (reap, reaped) = mpsc::channel();
    // When nobody waits, since the host has left meanwhile, this kills it.
    drop(started.send(Ok((Group { pid, left: false, _reap: reap }, Exit { receiver }))));
    let status = wait(pid, WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
    let _ = told.send(status);
    // An error is the signal: the sender was dropped.
    let _ = reaped.recv();
    wait(pid, WaitIdOptions::EXITED);
}

fn wait(pid: Pid, options: WaitIdOptions) -> ExitStatus {
    loop {
        match rustix::process::waitid(WaitId::Pid(pid), options) {
            Ok(Some(status)) => return exit_status(&status),
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "a command cannot be waited for");
                return ExitStatus::Signal(Signal::KILL.as_raw());
            }
        }
    }
}

fn exit_status(status: &WaitIdStatus) -> ExitStatus {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => ExitStatus::Code(u8::try_from(code & 0xff).unwrap_or(u8::MAX)),
        (None, signal) => ExitStatus::Signal(signal.unwrap_or(Signal::KILL.as_raw())),
    }
}
