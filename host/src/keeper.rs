//! The dumb parent of the host side: it holds the disk lock, the listening sockets and the children,
//! and restarts the supervisor. No parsing, no policy.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use dhow_parent::{Limits, Parent, WorkerCommand};
use rustix::fs::FlockOperation;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::config::{ConfigError, Paths, ProfileName};

/// Name of the held fd with the profile's lock.
const LOCK: &str = "lock";
/// Name of the held fd of the data disk: open and locked. QEMU inherits it, so that the lock lasts
/// as long as anything can write to the disk.
pub const DISK: &str = "disk";
/// Name of the held listening socket of the API.
pub const API: &str = "api";
/// Name of the held listening socket that is docker.sock.
pub const DOCKER: &str = "docker";
/// Name of the held listening socket where QEMU finds the vsock device.
pub const DEVICE: &str = "device";
/// Name of the held listening socket where the supervisor finds the vsock device.
pub const DEVICE_CONTROL: &str = "device-control";

/// What a keeper says to the command that started it when it is ready.
const READY: &str = "ready";
/// Most bytes of an error that a keeper tells.
const REPORT_LIMIT: u64 = 64 << 10;
/// Connections that wait on a listening socket; more wait in the kernel of the client.
const BACKLOG: i32 = 512;
/// How long children may take from SIGTERM to their end.
const GRACE: Duration = Duration::from_secs(5);

/// Why there is no keeper.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// A folder could not be made, or a path is too long.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Another keeper has the profile.
    #[error("profile {0} is already being started or is running")]
    Locked(String),
    /// Somebody else has the disk.
    #[error(
        "the data disk {0} is in use by another process; a VM that was left behind may still write to it"
    )]
    DiskInUse(PathBuf),
    /// A file or a socket could not be made.
    #[error("cannot {what} {path}")]
    Make {
        /// "open", "bind".
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The process could not be started.
    #[error("cannot start the keeper process")]
    Spawn(#[source] io::Error),
    /// The keeper failed before it was ready; its own words.
    #[error("{0}")]
    Reported(String),
}

/// Starts a keeper for `profile` in the background and returns when its sockets accept connections.
///
/// # Errors
/// With the keeper's own words where it fails.
pub fn spawn(profile: &ProfileName, paths: &Paths) -> Result<(), KeeperError> {
    paths.create()?;
    let log = paths.log_dir().join("keeper.log");
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&log)
        .map_err(|source| KeeperError::Make { what: "open", path: log, source })?;
    let program = std::env::current_exe().map_err(KeeperError::Spawn)?;
    let mut command = Command::new(program);
    command.arg("keeper").arg(profile.as_str()).current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
    for (name, value) in std::env::vars_os() {
        if name.to_str().is_none() || value.to_str().is_none() {
            // What is passed on from there is text.
            command.env_remove(name);
        } else if name == "DHOW_HOME" && !value.is_empty() {
            // The keeper works in /, where a relative path would lead elsewhere.
            command.env(name, std::path::absolute(value).map_err(KeeperError::Spawn)?);
        }
    }
    // SAFETY: setsid is async-signal-safe; a new session keeps the terminal's signals away.
    unsafe {
        command.pre_exec(|| Ok(nix::unistd::setsid().map(drop)?));
    }
    let mut child = command.spawn().map_err(KeeperError::Spawn)?;
    let mut report = String::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(REPORT_LIMIT).read_to_string(&mut report).map_err(KeeperError::Spawn)?;
    }
    if report == READY {
        return Ok(());
    }
    // It is ending: its report came, or its pipe closed. Reap it.
    let status = child.wait().map_err(KeeperError::Spawn)?;
    if report.is_empty() {
        report = format!("the keeper process ended at once ({status})");
    }
    Err(KeeperError::Reported(report))
}

/// The keeper's own `main`: returns when the VM is stopped and no child is left.
///
/// # Errors
/// When it cannot even begin; the same words go to the command that waits.
pub fn main(profile: &ProfileName) -> Result<(), KeeperError> {
    let mut stdout = io::stdout();
    let (mut parent, sockets) = match prepare(profile) {
        Ok(prepared) => prepared,
        Err(error) => {
            // Where nobody reads any more, the log has it too.
            let _ = stdout.write_all(crate::errors::chain(&error).as_bytes());
            return Err(error);
        }
    };
    let _ = stdout.write_all(READY.as_bytes()).and_then(|()| stdout.flush());
    // Closing the pipe is the signal; the number stays taken, so that no later file becomes fd 1.
    if let Ok(null) = File::options().write(true).open("/dev/null") {
        rustix::stdio::dup2_stdout(&null).map_err(|error| KeeperError::Spawn(error.into()))?;
    }
    let outcome = parent.run();
    tracing::info!(?outcome, "ending");
    end_children(&parent);
    for socket in sockets {
        // It may be gone already; a new keeper replaces it anyhow.
        let _ = std::fs::remove_file(socket);
    }
    Ok(())
}

fn prepare(profile: &ProfileName) -> Result<(Parent, Vec<PathBuf>), KeeperError> {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let paths = Paths::new(profile)?;
    paths.create()?;
    let lock = open_locked(&paths.keeper_lock(), || KeeperError::Locked(profile.to_string()))?;
    let disk = open_locked(&paths.disk(), || KeeperError::DiskInUse(paths.disk()))?;
    let program = std::env::current_exe().map_err(KeeperError::Spawn)?;
    let worker = WorkerCommand {
        argv: vec![program.into(), "supervisor".into(), profile.as_str().into()],
        env: std::env::vars().collect(),
    };
    let mut parent = Parent::new(worker, Limits::default(), false).map_err(KeeperError::Spawn)?;
    let mut sockets = Vec::new();
    for (name, path, kind) in [
        (API, paths.api_socket(), SocketType::STREAM),
        (DOCKER, paths.docker_socket(), SocketType::STREAM),
        (DEVICE, paths.device_socket(), SocketType::STREAM),
        (DEVICE_CONTROL, paths.device_control_socket(), SocketType::SEQPACKET),
    ] {
        let socket = listen(&path, kind).map_err(|source| KeeperError::Make {
            what: "listen on",
            path: path.clone(),
            source,
        })?;
        parent.hold(name, socket);
        sockets.push(path);
    }
    parent.hold(LOCK, lock);
    parent.hold(DISK, disk);
    Ok((parent, sockets))
}

/// Opens (and makes) a file and takes its flock, or says who has it.
fn open_locked(path: &Path, taken: impl FnOnce() -> KeeperError) -> Result<OwnedFd, KeeperError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|source| KeeperError::Make { what: "open", path: path.to_owned(), source })?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file.into()),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(taken()),
        Err(error) => Err(KeeperError::Make { what: "lock", path: path.to_owned(), source: error.into() }),
    }
}

/// A listening unix socket at `path`; a stale one is replaced, which the profile's lock allows.
fn listen(path: &Path, kind: SocketType) -> io::Result<OwnedFd> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// SIGTERM to what is left, SIGKILL after [`GRACE`]; returns when all have ended.
fn end_children(parent: &Parent) {
    let children: Vec<_> = parent
        .children()
        .into_iter()
        .filter_map(|(name, pid)| Some((name, rustix::process::Pid::from_raw(pid)?)))
        .filter_map(|(name, pid)| {
            let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok()?;
            Some((name, pidfd))
        })
        .collect();
    for signal in [rustix::process::Signal::TERM, rustix::process::Signal::KILL] {
        for (name, pidfd) in &children {
            // ESRCH: it has ended.
            if rustix::process::pidfd_send_signal(pidfd, signal).is_ok() {
                tracing::info!(name, ?signal, "ending a child");
            }
        }
        let deadline = std::time::Instant::now() + GRACE;
        let all_ended = children.iter().all(|(_, pidfd)| ended_by(pidfd.as_fd(), deadline));
        if all_ended {
            return;
        }
    }
}

/// Whether the process of `pidfd` has ended by `deadline`.
fn ended_by(pidfd: std::os::fd::BorrowedFd<'_>, deadline: std::time::Instant) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let left = deadline.saturating_duration_since(std::time::Instant::now());
    let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
    let mut fds = [PollFd::new(pidfd, PollFlags::POLLIN)];
    matches!(poll(&mut fds, timeout), Ok(1))
}
