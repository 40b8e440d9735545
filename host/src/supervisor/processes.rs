//! What is spawned through the keeper: the vsock device, passt, file servers, QEMU; and how it ends.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use dhow_parent::{ParentError, ParentLink, Spawn, SpawnedChild};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::Signal;
use tokio::io::unix::AsyncFd;

use super::ledger::Ledger;
use super::logs::{self, log_end};
use super::state::State;
use crate::config::{MountSpec, Paths};
use crate::keeper;
use crate::qemu::acceleration::{QEMU, find_in_path};
use crate::qemu::command::Vm;

/// How long a process may take to make its socket.
const SOCKET_DEADLINE: Duration = Duration::from_secs(10);

/// Why a process of the host side is not there.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The keeper could not start it.
    #[error(transparent)]
    Parent(#[from] ParentError),
    /// Its program is missing.
    #[error("{0} is not installed (looked for it in PATH)")]
    Missing(&'static str),
    /// A file that it needs could not be made.
    #[error("cannot {what} {path}")]
    File {
        /// "open", "write".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It did not come up.
    #[error("{name} did not come up within {seconds} s{log}")]
    Deadline {
        /// Its name.
        name: &'static str,
        /// The deadline.
        seconds: u64,
        /// The end of its log.
        log: String,
    },
}

/// Names that processes are spawned under.
pub const QEMU_NAME: &str = "qemu";
/// Likewise.
pub const DEVICE_NAME: &str = "vsock-device";
/// Likewise.
pub const PASST_NAME: &str = "passt";

/// Name of a share's file server, and of the held socket over which it is given sessions.
pub fn file_server_name(share: u32) -> String {
    format!("file-server-{share}")
}

/// Starts processes for one profile and notes them for `dhow status` and for a successor.
pub struct Processes<'a> {
    /// The way to the keeper.
    pub link: &'a ParentLink,
    /// Where sockets and logs lie.
    pub paths: &'a Paths,
    /// Where pids are noted for people.
    pub state: &'a State,
    /// Where they are noted for a successor.
    pub ledger: &'a Ledger,
}

impl Processes<'_> {
    /// A vsock device, which listens on two sockets that are made for it. There must be no other one.
    ///
    /// # Errors
    /// As [`ProcessError`] says; likewise below.
    pub async fn vsock_device(&self) -> Result<SpawnedChild, ProcessError> {
        let argv = self.own(&["vsock-device", self.paths.profile().as_str()])?;
        let vhost = listen(&self.paths.device_socket(), SocketType::STREAM)?;
        let control = listen(&self.paths.device_control_socket(), SocketType::SEQPACKET)?;
        let fds = vec![("vhost".to_owned(), vhost), ("control".to_owned(), control)];
        self.spawn(DEVICE_NAME, argv, fds).await
    }

    /// The file server of one share; `control` is where it is handed sessions.
    pub async fn file_server(
        &self,
        number: u32,
        share: &MountSpec,
        control: OwnedFd,
    ) -> Result<SpawnedChild, ProcessError> {
        let mut arguments = vec!["file-server".to_owned(), share.path.display().to_string()];
        if share.read_only {
            arguments.push("--read-only".to_owned());
        }
        for masked in self.paths.own_dirs() {
            arguments.extend(["--mask".to_owned(), masked.display().to_string()]);
        }
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let argv = self.own(&arguments)?;
        self.spawn(&file_server_name(number), argv, vec![("control".to_owned(), control)]).await
    }

    /// passt, listening on its socket; `None` where it is not installed. It ends with QEMU's connection.
    pub async fn passt(&self, arguments: &[String]) -> Result<Option<SpawnedChild>, ProcessError> {
        let Some(program) = find_in_path(PASST_NAME) else {
            return Ok(None);
        };
        let socket = self.paths.passt_socket();
        // A stale one of a killed run; passt does not replace it.
        let _ = std::fs::remove_file(&socket);
        let mut argv = vec![program.display().to_string(), "--socket".to_owned()];
        argv.push(socket.display().to_string());
        argv.extend_from_slice(arguments);
        let child = self.spawn(PASST_NAME, argv, Vec::new()).await?;
        self.wait_for_socket(PASST_NAME, &socket, &child).await?;
        Ok(Some(child))
    }

    /// QEMU. It inherits the data disk's locked fd.
    pub async fn qemu(&self, vm: &Vm, disk: OwnedFd) -> Result<SpawnedChild, ProcessError> {
        let program = find_in_path(QEMU).ok_or(ProcessError::Missing(QEMU))?;
        let mut argv = vec![program.display().to_string()];
        argv.extend(vm.arguments());
        let _ = std::fs::remove_file(&vm.qmp_socket);
        open_log(&vm.console)?;
        self.spawn(QEMU_NAME, argv, vec![("disk".to_owned(), disk)]).await
    }

    /// A command line of this very program.
    fn own(&self, arguments: &[&str]) -> Result<Vec<String>, ProcessError> {
        let program = keeper::own_program().map_err(|source| ProcessError::File {
            what: "find",
            path: "the dhow program".into(),
            source,
        })?;
        let program = program.display().to_string();
        Ok(std::iter::once(program).chain(arguments.iter().map(|part| (*part).to_owned())).collect())
    }

    async fn spawn(
        &self,
        name: &str,
        argv: Vec<String>,
        fds: Vec<(String, OwnedFd)>,
    ) -> Result<SpawnedChild, ProcessError> {
        let log = open_log(&self.paths.log_dir().join(format!("{name}.log")))?;
        let copy = |file: &File| {
            file.as_fd().try_clone_to_owned().map_err(|source| ProcessError::File {
                what: "duplicate the log of",
                path: name.into(),
                source,
            })
        };
        let spawn = Spawn {
            name: name.to_owned(),
            argv,
            env: std::env::vars().collect(),
            cwd: Some("/".to_owned()),
            stdout: Some(copy(&log)?),
            stderr: Some(copy(&log)?),
            fds,
            oom_score_adj: None,
            die_with_parent: false,
        };
        let child = self.link.spawn(spawn).await?;
        self.state.learn(|facts| {
            facts.processes.retain(|(known, _)| known != name);
            facts.processes.push((name.to_owned(), child.pid));
        });
        self.ledger.change(|record| record.note(&child));
        Ok(child)
    }

    async fn wait_for_socket(
        &self,
        name: &'static str,
        socket: &Path,
        child: &SpawnedChild,
    ) -> Result<(), ProcessError> {
        let deadline = tokio::time::Instant::now() + SOCKET_DEADLINE;
        loop {
            if socket.exists() {
                return Ok(());
            }
            if tokio::time::Instant::now() >= deadline || has_ended(&child.pidfd) {
                let log = log_end(&self.paths.log_dir().join(format!("{name}.log")), 5);
                return Err(ProcessError::Deadline { name, seconds: SOCKET_DEADLINE.as_secs(), log });
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

fn open_log(path: &Path) -> Result<File, ProcessError> {
    logs::open(path).map_err(|source| ProcessError::File { what: "open", path: path.to_owned(), source })
}

/// A listening unix socket at `path`, in the place of one that a process left which has ended.
fn listen(path: &Path, kind: SocketType) -> Result<OwnedFd, ProcessError> {
    let make = || -> io::Result<OwnedFd> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        // QEMU, and a supervisor with its successor.
        rustix::net::listen(&socket, 8)?;
        Ok(socket)
    };
    make().map_err(|source| ProcessError::File { what: "listen on", path: path.to_owned(), source })
}

/// Waits until the process of `pidfd` has ended; it need not be a child of this one.
pub async fn ended(pidfd: &OwnedFd) {
    /// Between looks, where there are too many open files to be woken.
    const LOOK_AGAIN: Duration = Duration::from_secs(1);
    // SAFETY: the duplicate is owned by the AsyncFd and never taken out or replaced while it lives.
    let watched = pidfd.try_clone().and_then(|fd| unsafe { AsyncFd::register(fd) }.map_err(Into::into));
    if let Ok(watched) = watched
        && watched.readable().await.is_ok()
    {
        return;
    }
    while !has_ended(pidfd) {
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// Ends a process: with SIGTERM, and where it has not gone within `grace` with SIGKILL. Whether it is
/// gone.
pub async fn end(child: &SpawnedChild, grace: Duration) -> bool {
    for signal in [Signal::TERM, Signal::KILL] {
        // ESRCH: it has ended.
        if !has_ended(&child.pidfd) && rustix::process::pidfd_send_signal(&child.pidfd, signal).is_ok() {
            tracing::info!(name = child.name, pid = child.pid, ?signal, "ending a process");
        }
        if tokio::time::timeout(grace, ended(&child.pidfd)).await.is_ok() {
            return true;
        }
    }
    false
}

/// Whether the process of `pidfd` has ended; it need not be a child of this one.
pub fn has_ended(pidfd: &OwnedFd) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1))
}
