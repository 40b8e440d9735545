//! The parent's loop: serve the worker, reap children, restart the worker.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::message::{Ask, Spawn, Tell};
use crate::{link, socket, spawn};

/// Exits kept for a worker that is not there to be told; the oldest go first.
const EXITS_LIMIT: usize = 1024;
/// Name of the worker among the children; no spawned child may take it.
const WORKER: &str = "worker";

/// The worker's command line.
#[derive(Debug, Clone)]
pub struct WorkerCommand {
    /// Program (absolute path) and arguments, in UTF-8.
    pub argv: Vec<OsString>,
    /// The whole environment.
    pub env: Vec<(String, String)>,
}

/// How often a worker that dies is started again.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// That many restarts …
    pub restarts: u32,
    /// … within this time; one more and the parent gives up.
    pub window: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { restarts: 10, window: Duration::from_secs(30) }
    }
}

/// Why the loop ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The worker asked for it, or SIGTERM or SIGINT came.
    ShutDown,
    /// The worker died too often.
    GaveUp,
}

struct Child {
    name: String,
    pidfd: OwnedFd,
}

struct Worker {
    pid: i32,
    pidfd: OwnedFd,
    socket: OwnedFd,
}

/// What a wait ended with.
struct Ready {
    signal: bool,
    worker: bool,
    ended: bool,
}

/// A dumb parent: see the crate's page.
pub struct Parent {
    command: WorkerCommand,
    limits: Limits,
    reap_orphans: bool,
    signals: SignalFd,
    held: BTreeMap<String, OwnedFd>,
    children: BTreeMap<i32, Child>,
    untold: VecDeque<Tell>,
    starts: VecDeque<Instant>,
}

impl Parent {
    /// Blocks SIGCHLD, SIGTERM and SIGINT for this thread and all that it starts. With
    /// `reap_orphans` every child of this process is reaped, as PID 1 must.
    ///
    /// # Errors
    /// When the signals cannot be redirected.
    pub fn new(command: WorkerCommand, limits: Limits, reap_orphans: bool) -> io::Result<Self> {
        let mut mask = SigSet::empty();
        for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT] {
            mask.add(signal);
        }
        mask.thread_block()?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Self {
            command,
            limits,
            reap_orphans,
            signals,
            held: BTreeMap::new(),
            children: BTreeMap::new(),
            untold: VecDeque::new(),
            starts: VecDeque::new(),
        })
    }

    /// Holds an fd for the worker from its first start on.
    pub fn hold(&mut self, name: &str, fd: OwnedFd) {
        self.held.insert(name.to_owned(), fd);
    }

    /// Names and pids of the children that still live, without the worker.
    #[must_use]
    pub fn children(&self) -> Vec<(String, i32)> {
        self.children.iter().map(|(pid, child)| (child.name.clone(), *pid)).collect()
    }

    /// Starts the worker, serves it, restarts it; returns when it is to end. The worker, where it
    /// still lives, gets SIGTERM then; the children are the caller's to end.
    pub fn run(&mut self) -> Outcome {
        let mut worker: Option<Worker> = None;
        loop {
            if worker.is_none() {
                if !self.may_start() {
                    return Outcome::GaveUp;
                }
                match self.start_worker() {
                    Ok(started) => worker = Some(started),
                    Err(error) => {
                        tracing::error!(%error, "cannot start the worker");
                        std::thread::sleep(Duration::from_millis(100));
                        continue;
                    }
                }
            }
            let ready = match self.wait(worker.as_ref(), PollTimeout::NONE) {
                Ok(ready) => ready,
                Err(error) => {
                    tracing::error!(%error, "poll");
                    continue;
                }
            };
            if ready.worker
                && let Some(current) = &worker
                && self.serve(current)
            {
                self.end_worker(worker.as_ref());
                return Outcome::ShutDown;
            }
            let end = ready.signal && self.told_to_end();
            if ready.signal || ready.ended {
                self.reap(&mut worker);
            }
            if end {
                self.end_worker(worker.as_ref());
                return Outcome::ShutDown;
            }
        }
    }

    /// Holds and reaps without a worker for `pause`, after [`Outcome::GaveUp`]; the next worker is
    /// told of what ended. [`Outcome::ShutDown`] when SIGTERM or SIGINT came meanwhile.
    pub fn rest(&mut self, pause: Duration) -> Option<Outcome> {
        let end = Instant::now() + pause;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            // Rounded up, so that the last wait is not a busy one.
            let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            match self.wait(None, timeout) {
                Ok(ready) => {
                    let end = ready.signal && self.told_to_end();
                    if ready.signal || ready.ended {
                        self.reap(&mut None);
                    }
                    if end {
                        return Some(Outcome::ShutDown);
                    }
                }
                Err(error) => tracing::error!(%error, "poll"),
            }
        }
    }

    /// Takes the signals that wait; true when one of them asks for the end.
    fn told_to_end(&self) -> bool {
        let mut end = false;
        while let Ok(Some(signal)) = self.signals.read_signal() {
            end |= signal.ssi_signo != Signal::SIGCHLD as u32;
        }
        end
    }

    /// Whether another start is within the limits; counts it.
    fn may_start(&mut self) -> bool {
        let now = Instant::now();
        while self.starts.front().is_some_and(|start| now.duration_since(*start) > self.limits.window) {
            self.starts.pop_front();
        }
        if self.starts.len() as u64 > u64::from(self.limits.restarts) {
            return false;
        }
        self.starts.push_back(now);
        true
    }

    fn start_worker(&mut self) -> io::Result<Worker> {
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        socket::enlarge(ours.as_fd())?;
        socket::enlarge(theirs.as_fd())?;
        let argv = self.command.argv.iter().map(|part| part.to_string_lossy().into_owned()).collect();
        let pid = spawn::spawn(Spawn {
            name: WORKER.to_owned(),
            argv,
            env: self.command.env.clone(),
            fds: vec![(link::SOCKET_NAME.to_owned(), theirs)],
            ..Spawn::default()
        })?;
        tracing::info!(pid, "worker started");
        let worker = Worker { pid, pidfd: pidfd_of(pid)?, socket: ours };
        // A send can fail only when the worker is dead already: SIGCHLD tells.
        for (name, fd) in &self.held {
            self.tell(&worker, &Tell::Held { name: name.clone() }, &[fd.as_fd()]);
        }
        for (pid, child) in &self.children {
            self.tell(&worker, &Tell::Child { name: child.name.clone(), pid: *pid }, &[child.pidfd.as_fd()]);
        }
        self.tell(&worker, &Tell::Ready, &[]);
        for exit in self.untold.drain(..).collect::<Vec<_>>() {
            self.tell(&worker, &exit, &[]);
        }
        // Only now: a worker that never reads must not block the loop above for ever, but what it
        // is given at its start fits the socket's buffer.
        rustix::io::ioctl_fionbio(&worker.socket, true)?;
        Ok(worker)
    }

    fn tell(&self, worker: &Worker, message: &Tell, fds: &[std::os::fd::BorrowedFd<'_>]) {
        if let Err(error) = socket::send(worker.socket.as_fd(), message, fds) {
            tracing::warn!(%error, ?message, "the worker does not listen");
        }
    }

    /// Waits until a signal came, the worker wrote, or a child ended. SIGCHLD alone would not do: it
    /// is lost in a process with a thread that does not block it.
    fn wait(&self, worker: Option<&Worker>, timeout: PollTimeout) -> nix::Result<Ready> {
        let poll_in = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds = vec![poll_in(self.signals.as_fd())];
        fds.extend(self.children.values().map(|child| poll_in(child.pidfd.as_fd())));
        let worker_at = fds.len();
        if let Some(worker) = worker {
            fds.push(poll_in(worker.pidfd.as_fd()));
            fds.push(poll_in(worker.socket.as_fd()));
        }
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
        let ready = |fd: &PollFd<'_>| fd.any().unwrap_or(false);
        Ok(Ready {
            signal: ready(&fds[0]),
            worker: fds.get(worker_at + 1).is_some_and(ready),
            ended: fds[1..fds.len().min(worker_at + 1)].iter().any(ready),
        })
    }

    /// Answers one message of the worker; true when it asks for the end.
    fn serve(&mut self, worker: &Worker) -> bool {
        let (ask, fds) = match socket::receive::<Ask>(worker.socket.as_fd()) {
            Ok(Some(message)) => message,
            // It closed its end: it is ending, or broken. Without its socket it is of no use.
            Ok(None) => {
                kill(worker.pid, Signal::SIGKILL);
                wait_for_end(worker);
                return false;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
            Err(error) => {
                tracing::error!(%error, "unreadable message of the worker");
                return false;
            }
        };
        match ask {
            Ask::Spawn { id, spawn } => self.spawn(worker, id, spawn.into_spawn(fds)),
            Ask::Hold { id, name } => {
                if let Some(fd) = fds.into_iter().next() {
                    self.held.insert(name, fd);
                    self.tell(worker, &Tell::Done { id }, &[]);
                } else {
                    self.tell(worker, &Tell::Refused { id, reason: "no fd came along".to_owned() }, &[]);
                }
            }
            Ask::Release { id, name } => {
                self.held.remove(&name);
                self.tell(worker, &Tell::Done { id }, &[]);
            }
            Ask::ShutDown { id } => {
                self.tell(worker, &Tell::Done { id }, &[]);
                return true;
            }
        }
        false
    }

    fn spawn(&mut self, worker: &Worker, id: u64, request: Option<Spawn>) {
        let name = request.as_ref().map(|request| request.name.clone()).unwrap_or_default();
        let result = request
            .ok_or_else(|| io::Error::other("fds are missing"))
            .and_then(spawn::spawn)
            .and_then(|pid| Ok((pid, pidfd_of(pid)?)));
        match result {
            Ok((pid, pidfd)) => {
                self.tell(worker, &Tell::Spawned { id, pid }, &[pidfd.as_fd()]);
                self.children.insert(pid, Child { name, pidfd });
            }
            Err(error) => self.tell(worker, &Tell::Refused { id, reason: error.to_string() }, &[]),
        }
    }

    /// Reaps what has ended: the worker, children, and with `reap_orphans` whatever else.
    fn reap(&mut self, worker: &mut Option<Worker>) {
        let mut ended = Vec::new();
        if self.reap_orphans {
            while let Some(exit) = wait_any() {
                ended.push(exit);
            }
        } else {
            let pids = self.children.keys().copied().chain(worker.as_ref().map(|worker| worker.pid));
            ended.extend(pids.filter_map(wait_one));
        }
        for (pid, status) in ended {
            if worker.as_ref().is_some_and(|worker| worker.pid == pid) {
                tracing::warn!(pid, status, "the worker ended");
                *worker = None;
            } else if let Some(child) = self.children.remove(&pid) {
                tracing::info!(pid, status, name = child.name, "child ended");
                self.untold.push_back(Tell::Exited { name: child.name, pid, status });
            }
        }
        while self.untold.len() > EXITS_LIMIT {
            self.untold.pop_front();
        }
        if let Some(worker) = worker {
            for exit in self.untold.drain(..).collect::<Vec<_>>() {
                self.tell(worker, &exit, &[]);
            }
        }
    }

    fn end_worker(&self, worker: Option<&Worker>) {
        if let Some(worker) = worker {
            kill(worker.pid, Signal::SIGTERM);
        }
    }
}

/// Waits until a killed worker is a zombie; otherwise its closed socket would keep the loop busy.
fn wait_for_end(worker: &Worker) {
    let mut fds = [PollFd::new(worker.pidfd.as_fd(), PollFlags::POLLIN)];
    // EINTR or a time-out only means that the loop comes back here.
    let _ = poll(&mut fds, PollTimeout::from(1000u16));
}

fn kill(pid: i32, signal: Signal) {
    // ESRCH: it has ended already, which is what was wanted.
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
}

fn pidfd_of(pid: i32) -> io::Result<OwnedFd> {
    let pid = rustix::process::Pid::from_raw(pid).ok_or_else(|| io::Error::other("pid 0"))?;
    Ok(rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?)
}

fn wait_any() -> Option<(i32, i32)> {
    wait_raw(-1)
}

fn wait_one(pid: i32) -> Option<(i32, i32)> {
    wait_raw(pid)
}

/// wait4(2) without blocking: pid and raw status of a child that has ended.
fn wait_raw(pid: i32) -> Option<(i32, i32)> {
    let mut status = 0;
    // SAFETY: `status` is a valid place for the result and outlives the call.
    let got = unsafe { libc::waitpid(pid, &mut status, libc::WNOHANG) };
    (got > 0).then_some((got, status))
}
