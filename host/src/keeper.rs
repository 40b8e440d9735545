//! The dumb parent of the host side: it holds the disk lock, the listening sockets and the children,
//! and restarts the supervisor. No parsing, no policy.
//!
//! A keeper that is killed is followed by its supervisor, which becomes the keeper ([`succeed`]). When
//! both are killed QEMU goes on, with the disk's lock; the next command starts a keeper, which has no
//! disk to hold, and whose supervisor adopts what runs.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use dhow_parent::{Estate, Idle, Limits, Outcome, Parent, WorkerCommand};
use rustix::fs::FlockOperation;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::config::{ConfigError, Paths, ProfileName};
use crate::supervisor::Record;

/// Name of the held fd with the profile's lock.
const LOCK: &str = "lock";
/// Name of the held fd of the data disk: open and locked. QEMU inherits it, so that the lock lasts
/// as long as anything can write to the disk. Absent where somebody else has the lock.
pub const DISK: &str = "disk";
/// Name of the held listening socket of the API.
pub const API: &str = "api";
/// Name of the held listening socket that is docker.sock.
pub const DOCKER: &str = "docker";
/// Argument of a keeper and a supervisor that are to take over a VM and to start none.
pub const ADOPT_ONLY: &str = "--adopt-only";

/// What a keeper says to the command that started it when it is ready.
const READY: &str = "ready";
/// Most bytes of an error that a keeper tells.
const REPORT_LIMIT: u64 = 64 << 10;
/// Connections that wait on a listening socket; more wait in the kernel of the client.
const BACKLOG: i32 = 512;
/// How long children may take from SIGTERM to their end.
const GRACE: Duration = Duration::from_secs(5);
/// How long a QEMU that was killed may take to let go of the disk.
const LOCK_DEADLINE: Duration = Duration::from_secs(5);
/// How long a supervisor that died too often is left alone, whoever wants it.
const REST: Duration = Duration::from_secs(3);
/// How long the supervisor may take from SIGTERM to its VM's end: above what it gives the guest.
const STOP_GRACE: Duration = Duration::from_secs(90);

/// Why there is no keeper.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// A folder could not be made, or a path is too long.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Another keeper has the profile.
    #[error("profile {0} is already being started or is running")]
    Locked(String),
    /// What this process was handed is not whole.
    #[error("the keeper before this one did not hand over {0}")]
    Missing(&'static str),
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

impl KeeperError {
    /// Whether another keeper has the profile.
    #[must_use]
    pub fn is_locked(&self, profile: &ProfileName) -> bool {
        match self {
            Self::Locked(_) => true,
            // A keeper's own words come as text.
            Self::Reported(text) => *text == Self::Locked(profile.to_string()).to_string(),
            _ => false,
        }
    }
}

/// Path of this very program, also where the file was replaced by an update since it was started.
///
/// # Errors
/// When `/proc` does not tell.
pub fn own_program() -> io::Result<PathBuf> {
    let program = std::env::current_exe()?;
    // The link itself leads to the program that runs, whatever has become of its path.
    Ok(if program.exists() { program } else { PathBuf::from("/proc/self/exe") })
}

/// Whether a VM of the profile runs. Where nobody listens on its API socket, its keeper and its
/// supervisor were killed, and a new keeper can take it over.
#[must_use]
pub fn vm_runs(paths: &Paths) -> bool {
    Record::read(paths).is_some_and(|record| record.runs())
}

/// Starts a keeper for `profile` in the background and returns when its sockets accept connections.
/// With `adopt_only` it takes over a VM that runs, and starts none.
///
/// # Errors
/// With the keeper's own words where it fails.
pub fn spawn(profile: &ProfileName, paths: &Paths, adopt_only: bool) -> Result<(), KeeperError> {
    paths.create()?;
    let log = paths.log_dir().join("keeper.log");
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&log)
        .map_err(|source| KeeperError::Make { what: "open", path: log, source })?;
    let mut command = Command::new(own_program().map_err(KeeperError::Spawn)?);
    command.arg("keeper").arg(profile.as_str()).args(adopt_only.then_some(ADOPT_ONLY)).current_dir("/");
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
    // SAFETY: setsid and close_range are async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            // A new session keeps the terminal's signals away. What else this command was given, a
            // shell's pipe perhaps, the keeper must not keep open for as long as the VM runs.
            nix::unistd::setsid()?;
            close_on_exec_from_3();
            Ok(())
        });
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

/// Marks every fd above standard error as close-on-exec. Kernels below 5.11 cannot: then it is as it was.
fn close_on_exec_from_3() {
    // SAFETY: close_range(2) with CLOSE_RANGE_CLOEXEC closes nothing in this process.
    unsafe {
        libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC);
    }
}

/// The supervisor's keeper is gone: makes this process the keeper, with what the old one held. Returns
/// only when that failed.
pub fn succeed(profile: &ProfileName, estate: Estate) -> io::Error {
    let program = match own_program() {
        Ok(program) => program,
        Err(error) => return error,
    };
    let argv = [program.into_os_string(), "keeper".into(), profile.as_str().into()];
    estate.exec(&argv)
}

/// The keeper's own `main`: returns when the VM is stopped and no child is left.
///
/// # Errors
/// When it cannot even begin; the same words go to the command that waits.
pub fn main(profile: &ProfileName, adopt_only: bool) -> Result<(), KeeperError> {
    let mut stdout = io::stdout();
    let (mut parent, sockets) = match prepare(profile, adopt_only) {
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
    parent.stop_orderly(STOP_GRACE);
    while parent.run() == Outcome::GaveUp {
        // The VM is not ended for its supervisor's fault. Who wants something of it causes new attempts.
        tracing::error!("the supervisor has died too often; it is started again when a command comes");
        if parent.rest(REST).is_some() {
            break;
        }
        match parent.idle(API) {
            Idle::Wanted => {}
            Idle::Childless | Idle::ShutDown => break,
        }
    }
    tracing::info!("ending");
    end_children(&parent);
    for socket in sockets {
        // It may be gone already; a new keeper replaces it anyhow.
        let _ = std::fs::remove_file(socket);
    }
    Ok(())
}

fn prepare(profile: &ProfileName, adopt_only: bool) -> Result<(Parent, Vec<PathBuf>), KeeperError> {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let paths = Paths::new(profile)?;
    paths.create()?;
    let mut inherited = dhow_parent::inherited_fds().map_err(KeeperError::Spawn)?;
    let estate = Estate::from_inherited(&mut inherited);
    let supervisor: [OsString; 3] =
        [own_program().map_err(KeeperError::Spawn)?.into(), "supervisor".into(), profile.as_str().into()];
    let adopt_only = adopt_only.then(|| ADOPT_ONLY.into());
    let worker = WorkerCommand {
        argv: supervisor.into_iter().chain(adopt_only).collect(),
        env: std::env::vars().filter(|(name, _)| name != dhow_parent::FDS_VARIABLE).collect(),
    };
    // Children of a supervisor that became this keeper are reaped, too.
    let mut parent = Parent::new(worker, Limits::default(), true).map_err(KeeperError::Spawn)?;
    let sockets = [(API, paths.api_socket()), (DOCKER, paths.docker_socket())];
    match estate {
        Some(estate) => inherit(&mut parent, estate, &sockets)?,
        None => make(&mut parent, profile, &paths, &sockets)?,
    }
    Ok((parent, sockets.into_iter().map(|(_, path)| path).collect()))
}

/// Takes over what the keeper before this one held.
fn inherit(
    parent: &mut Parent,
    estate: Estate,
    sockets: &[(&'static str, PathBuf)],
) -> Result<(), KeeperError> {
    parent.inherit(estate);
    parent.held(LOCK).ok_or(KeeperError::Missing(LOCK))?;
    for (name, path) in sockets {
        let socket = parent.held(name).ok_or(KeeperError::Missing(name))?;
        // Again, so that who connects is told this process's pid and not the dead one's.
        rustix::net::listen(socket, BACKLOG).map_err(|error| KeeperError::Make {
            what: "listen on",
            path: path.clone(),
            source: error.into(),
        })?;
    }
    Ok(())
}

/// Takes the locks and makes the sockets.
fn make(
    parent: &mut Parent,
    profile: &ProfileName,
    paths: &Paths,
    sockets: &[(&'static str, PathBuf)],
) -> Result<(), KeeperError> {
    let lock = open_locked(&paths.keeper_lock())?;
    parent.hold(LOCK, lock.ok_or_else(|| KeeperError::Locked(profile.to_string()))?);
    match lock_disk(paths)? {
        Some(disk) => parent.hold(DISK, disk),
        // QEMU of a VM that was left behind has it, or somebody else: the supervisor finds out.
        None => tracing::warn!(disk = %paths.disk().display(), "the data disk is locked by another process"),
    }
    for (name, path) in sockets {
        let socket = listen(path).map_err(|source| KeeperError::Make {
            what: "listen on",
            path: path.clone(),
            source,
        })?;
        parent.hold(name, socket);
    }
    Ok(())
}

/// The data disk, locked; `None` where a VM of the profile that was left behind has the lock, or somebody
/// else does not let go of it.
fn lock_disk(paths: &Paths) -> Result<Option<OwnedFd>, KeeperError> {
    let deadline = std::time::Instant::now() + LOCK_DEADLINE;
    loop {
        let disk = open_locked(&paths.disk())?;
        if disk.is_some() || vm_runs(paths) || std::time::Instant::now() >= deadline {
            return Ok(disk);
        }
        // A QEMU that was killed has the lock until its memory is given back.
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Opens (and makes) a file and takes its flock, held as long as the fd is open; `None` where somebody
/// else has that.
///
/// # Errors
/// As open(2) and flock(2).
pub fn open_locked(path: &Path) -> Result<Option<OwnedFd>, KeeperError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|source| KeeperError::Make { what: "open", path: path.to_owned(), source })?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file.into())),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(KeeperError::Make { what: "lock", path: path.to_owned(), source: error.into() }),
    }
}

/// A listening unix socket at `path`; a stale one is replaced, which the profile's lock allows.
fn listen(path: &Path) -> io::Result<OwnedFd> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// SIGTERM to what is left, SIGKILL after [`GRACE`]; returns when all have ended.
fn end_children(parent: &Parent) {
    let children = parent.pidfds();
    for signal in [rustix::process::Signal::TERM, rustix::process::Signal::KILL] {
        for (name, pidfd) in &children {
            // ESRCH: it has ended.
            if rustix::process::pidfd_send_signal(pidfd, signal).is_ok() {
                tracing::info!(name, ?signal, "ending a child");
            }
        }
        let deadline = std::time::Instant::now() + GRACE;
        let all_ended = children.iter().all(|(_, pidfd)| ended_by(*pidfd, deadline));
        if all_ended {
            return;
        }
    }
}

/// Whether the process of `pidfd` has ended by `deadline`.
fn ended_by(pidfd: BorrowedFd<'_>, deadline: std::time::Instant) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let left = deadline.saturating_duration_since(std::time::Instant::now());
    let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
    let mut fds = [PollFd::new(pidfd, PollFlags::POLLIN)];
    matches!(poll(&mut fds, timeout), Ok(1))
}
