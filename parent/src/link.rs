//! The worker's side: what it asks of its parent, and what it is given at its start.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot, watch};

use crate::estate::Estate;
use crate::message::{Ask, Spawn, Tell};
use crate::socket;

/// Name of the worker's fd that leads to its parent.
pub(crate) const SOCKET_NAME: &str = "parent";

/// How long a parent may take to answer: it forks and does no more.
const ASK_DEADLINE: Duration = Duration::from_secs(20);

/// Why the parent did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ParentError {
    /// This process was not started by a parent.
    #[error("this process has no parent to ask: it is started by `dhow` itself, not by hand")]
    NoParent,
    /// The socket failed.
    #[error("the socket to the parent process failed")]
    Socket(#[from] io::Error),
    /// The parent is gone.
    #[error("the parent process is gone")]
    Gone,
    /// The parent does not answer: it may be stopped.
    #[error("the parent process did not {what} within {} s", ASK_DEADLINE.as_secs())]
    Silent {
        /// What was asked.
        what: String,
    },
    /// The parent could not do it.
    #[error("the parent process could not {what}: {reason}")]
    Refused {
        /// What was asked.
        what: String,
        /// The parent's reason.
        reason: String,
    },
}

/// A child of the parent.
#[derive(Debug)]
pub struct SpawnedChild {
    /// The name it was spawned under.
    pub name: String,
    /// Its pid.
    pub pid: i32,
    /// Readable when it has ended.
    pub pidfd: OwnedFd,
}

/// The end of a child.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// The name it was spawned under.
    pub name: String,
    /// Its pid.
    pub pid: i32,
    /// As wait(2) gives it, or [`crate::STATUS_UNKNOWN`].
    pub status: i32,
}

/// What a worker is given at its start.
#[derive(Debug)]
pub struct Restored {
    /// Held fds by name.
    pub fds: HashMap<String, OwnedFd>,
    /// Children that live.
    pub children: Vec<SpawnedChild>,
    /// No worker ran before this one.
    pub first: bool,
    /// Ends of children, also of those that ended while no worker ran.
    pub exits: mpsc::UnboundedReceiver<Exit>,
}

type Answer = Result<Option<(i32, OwnedFd)>, String>;

struct Shared {
    socket: AsyncFd<OwnedFd>,
    next: AtomicU64,
    waiting: Mutex<HashMap<u64, oneshot::Sender<Answer>>>,
    gone: watch::Sender<bool>,
    /// Duplicates of what the parent holds, where this worker is its heir.
    estate: Option<Mutex<Estate>>,
}

/// The way to the parent. Clones share it.
#[derive(Clone)]
pub struct ParentLink {
    shared: Arc<Shared>,
}

impl ParentLink {
    /// Takes the socket out of `inherited` ([`crate::inherited_fds`]), reads what the parent gives
    /// a worker at its start (blocking, it is there at once), then listens in a task.
    ///
    /// # Errors
    /// When there is no parent, or it does not speak.
    pub fn connect(inherited: &mut HashMap<String, OwnedFd>) -> Result<(Self, Restored), ParentError> {
        Self::connect_to(inherited, None)
    }

    /// As [`ParentLink::connect`], and keeps a duplicate of all that the parent holds, for
    /// [`ParentLink::estate`].
    ///
    /// # Errors
    /// Likewise.
    pub fn connect_as_heir(
        inherited: &mut HashMap<String, OwnedFd>,
    ) -> Result<(Self, Restored), ParentError> {
        Self::connect_to(inherited, Some(Estate::default()))
    }

    fn connect_to(
        inherited: &mut HashMap<String, OwnedFd>,
        mut estate: Option<Estate>,
    ) -> Result<(Self, Restored), ParentError> {
        let socket = inherited.remove(SOCKET_NAME).ok_or(ParentError::NoParent)?;
        let mut fds = HashMap::new();
        let mut children: Vec<SpawnedChild> = Vec::new();
        let first = loop {
            let (tell, mut given) = socket::receive::<Tell>(socket.as_fd())?.ok_or(ParentError::Gone)?;
            match (tell, given.pop()) {
                (Tell::Held { name }, Some(fd)) => {
                    if let Some(estate) = &mut estate {
                        estate.fds.insert(name.clone(), fd.try_clone()?);
                    }
                    fds.insert(name, fd);
                }
                (Tell::Child { name, pid }, Some(pidfd)) => {
                    let child = SpawnedChild { name, pid, pidfd };
                    if let Some(estate) = &mut estate {
                        estate.children.push(child.try_clone()?);
                    }
                    children.push(child);
                }
                (Tell::Ready { first }, None) => break first,
                (other, _) => tracing::warn!(?other, "unexpected message of the parent"),
            }
        };
        rustix::io::ioctl_fionbio(&socket, true).map_err(io::Error::from)?;
        // SAFETY: the fd is owned by the AsyncFd and never taken out or replaced while it lives.
        let socket = unsafe { AsyncFd::register(socket) }.map_err(io::Error::from)?;
        let shared = Arc::new(Shared {
            socket,
            next: AtomicU64::new(1),
            waiting: Mutex::new(HashMap::new()),
            gone: watch::Sender::new(false),
            estate: estate.map(Mutex::new),
        });
        let (sender, exits) = mpsc::unbounded_channel();
        tokio::spawn(listen(Arc::clone(&shared), sender));
        Ok((Self { shared }, Restored { fds, children, first, exits }))
    }

    /// Starts a child of the parent, which outlives this worker.
    ///
    /// # Errors
    /// When the parent could not start it, with its reason.
    pub async fn spawn(&self, spawn: Spawn) -> Result<SpawnedChild, ParentError> {
        let name = spawn.name.clone();
        let what = format!("start {name} ({})", spawn.argv.first().map_or("", String::as_str));
        let (spawn, fds) = spawn.into_message();
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        match self.ask(&what, |id| Ask::Spawn { id, spawn }, &fds).await? {
            Some((pid, pidfd)) => {
                let child = SpawnedChild { name, pid, pidfd };
                self.inherit_child(&child)?;
                Ok(child)
            }
            None => Err(ParentError::Refused { what, reason: "it named no process".to_owned() }),
        }
    }

    /// Has the parent watch a process that an earlier parent spawned as if it were its own child; how
    /// it ends stays unknown.
    ///
    /// # Errors
    /// When the parent is gone.
    pub async fn adopt(&self, child: &SpawnedChild) -> Result<(), ParentError> {
        let ask = |id| Ask::Adopt { id, name: child.name.clone(), pid: child.pid };
        self.ask(&format!("adopt {}", child.name), ask, &[child.pidfd.as_fd()]).await?;
        self.inherit_child(child)
    }

    /// Has the parent hold `fd`; it replaces one of the same name.
    ///
    /// # Errors
    /// When the parent is gone.
    pub async fn hold(&self, name: &str, fd: BorrowedFd<'_>) -> Result<(), ParentError> {
        // First, so that it is not lost where the parent dies over it.
        if let Some(mut estate) = self.shared.estate() {
            estate.fds.insert(name.to_owned(), fd.try_clone_to_owned()?);
        }
        let ask = |id| Ask::Hold { id, name: name.to_owned() };
        self.ask(&format!("hold {name}"), ask, &[fd]).await.map(drop)
    }

    /// Has the parent close a held fd.
    ///
    /// # Errors
    /// When the parent is gone.
    pub async fn release(&self, name: &str) -> Result<(), ParentError> {
        if let Some(mut estate) = self.shared.estate() {
            estate.fds.remove(name);
        }
        let ask = |id| Ask::Release { id, name: name.to_owned() };
        self.ask(&format!("release {name}"), ask, &[]).await.map(drop)
    }

    /// Has the parent end its loop; it sends this worker SIGTERM.
    ///
    /// # Errors
    /// When the parent is gone.
    pub async fn shut_down(&self) -> Result<(), ParentError> {
        self.ask("shut down", |id| Ask::ShutDown { id }, &[]).await.map(drop)
    }

    /// Waits until the parent is gone.
    pub async fn gone(&self) {
        // The sender lives in `self`.
        let _ = self.shared.gone.subscribe().wait_for(|gone| *gone).await;
    }

    /// What the parent held when it was last heard of, for whom takes its place; nothing is kept here
    /// any more. Empty but for an heir.
    #[must_use]
    pub fn estate(&self) -> Estate {
        self.shared.estate().map(|mut estate| std::mem::take(&mut *estate)).unwrap_or_default()
    }

    fn inherit_child(&self, child: &SpawnedChild) -> Result<(), ParentError> {
        if let Some(mut estate) = self.shared.estate() {
            estate.children.push(child.try_clone()?);
        }
        Ok(())
    }

    async fn ask(
        &self,
        what: &str,
        ask: impl FnOnce(u64) -> Ask,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Option<(i32, OwnedFd)>, ParentError> {
        let id = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        self.waiting().insert(id, sender);
        let ask = ask(id);
        let socket = &self.shared.socket;
        let sent = socket.async_io(Interest::WRITABLE, |fd| socket::send(fd.as_fd(), &ask, fds)).await;
        if let Err(error) = sent {
            self.waiting().remove(&id);
            return Err(error.into());
        }
        match tokio::time::timeout(ASK_DEADLINE, receiver).await {
            Ok(Ok(Ok(answer))) => Ok(answer),
            Ok(Ok(Err(reason))) => Err(ParentError::Refused { what: what.to_owned(), reason }),
            Ok(Err(_)) => Err(ParentError::Gone),
            Err(_) => {
                self.waiting().remove(&id);
                Err(ParentError::Silent { what: what.to_owned() })
            }
        }
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, HashMap<u64, oneshot::Sender<Answer>>> {
        self.shared.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SpawnedChild {
    /// Another handle to the same process.
    ///
    /// # Errors
    /// When there are too many open files.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { name: self.name.clone(), pid: self.pid, pidfd: self.pidfd.try_clone()? })
    }
}

impl Shared {
    fn estate(&self) -> Option<std::sync::MutexGuard<'_, Estate>> {
        self.estate.as_ref().map(|estate| estate.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Reads the parent's messages until it is gone; then everyone who waits learns it.
async fn listen(shared: Arc<Shared>, exits: mpsc::UnboundedSender<Exit>) {
    loop {
        let read = shared.socket.async_io(Interest::READABLE, |fd| socket::receive::<Tell>(fd.as_fd())).await;
        let (tell, mut fds) = match read {
            Ok(Some(message)) => message,
            Ok(None) => break,
            Err(error) => {
                tracing::error!(%error, "the socket to the parent failed");
                break;
            }
        };
        let (id, answer) = match tell {
            Tell::Spawned { id, pid } => {
                (id, fds.pop().map(|fd| (pid, fd)).ok_or_else(|| "no pidfd".to_owned()).map(Some))
            }
            Tell::Done { id } => (id, Ok(None)),
            Tell::Refused { id, reason } => (id, Err(reason)),
            Tell::Exited { name, pid, status } => {
                if let Some(mut estate) = shared.estate() {
                    estate.children.retain(|child| child.pid != pid);
                }
                // Nobody listens any more: the worker is ending.
                let _ = exits.send(Exit { name, pid, status });
                continue;
            }
            other => {
                tracing::warn!(?other, "unexpected message of the parent");
                continue;
            }
        };
        let waiter = shared.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        let unheard = match waiter {
            Some(waiter) => waiter.send(answer).err(),
            None => Some(answer),
        };
        // The asker has given up; a process that nobody knows of must not stay.
        if let Some(Ok(Some((pid, pidfd)))) = unheard {
            tracing::warn!(pid, "a child came too late");
            let killed = rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL);
            tracing::debug!(?killed, pid, "ending it");
        }
    }
    shared.gone.send_replace(true);
    shared.waiting.lock().unwrap_or_else(PoisonError::into_inner).clear();
}
