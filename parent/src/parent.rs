//! The parent's loop: serve the worker, reap children, restart the worker.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::estate::Estate;
use crate::message::{Ask, Spawn, Tell};
use crate::{link, socket, spawn};

/// Exits kept for a worker that is not there to be told; the oldest go first.
const EXITS_LIMIT: usize = 1024;
/// Name of the worker among the children; no spawned child may take it.
const WORKER: &str = "worker";
/// Status of a child whose end was seen and whose status went to another process.
pub const STATUS_UNKNOWN: i32 = -1;

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

/// Why [`Parent::idle`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Idle {
    /// The fd is readable.
    Wanted,
    /// No child is left.
    Childless,
    /// SIGTERM or SIGINT came.
    ShutDown,
}

struct Child {
    name: String,
    pidfd: OwnedFd,
    /// A child in the kernel's eyes, too: it is reaped, and its status known.
    ours: bool,
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
    /// How long a worker may take from SIGTERM to its own [`Ask::ShutDown`].
    stop_grace: Duration,
    /// A worker was started before, perhaps by an earlier parent.
    begun: bool,
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
            stop_grace: Duration::ZERO,
            begun: false,
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

    /// SIGTERM is passed to the worker, which may take that long to put things in order and ask for the
    /// end. SIGINT, or a second SIGTERM, ends the loop at once, as both do without this.
    pub fn stop_orderly(&mut self, grace: Duration) {
        self.stop_grace = grace;
    }

    /// Takes over what an earlier parent held; its children are watched, but their status is not known.
    pub fn inherit(&mut self, estate: Estate) {
        self.begun = true;
        self.held.extend(estate.fds);
        let children = estate.children.into_iter();
        self.children.extend(children.map(|child| {
            let link::SpawnedChild { name, pid, pidfd } = child;
            (pid, Child { name, pidfd, ours: false })
        }));
    }

    /// A held fd.
    #[must_use]
    pub fn held(&self, name: &str) -> Option<BorrowedFd<'_>> {
        self.held.get(name).map(AsFd::as_fd)
    }

    /// Without a worker, after [`Outcome::GaveUp`]: waits until the held fd `wanted` is readable, no
    /// child is left, or a signal asks for the end. The worker's restarts begin anew then.
    pub fn idle(&mut self, wanted: &str) -> Idle {
        loop {
            self.reap(&mut None);
            if self.children.is_empty() {
                return Idle::Childless;
            }
            if self.signalled().is_some() {
                return Idle::ShutDown;
            }
            let mut fds = vec![poll_in(self.signals.as_fd())];
            fds.extend(self.children.values().map(|child| poll_in(child.pidfd.as_fd())));
            fds.extend(self.held.get(wanted).map(|fd| poll_in(fd.as_fd())));
            let at = 1 + self.children.len();
            if let Err(error) = poll(&mut fds, PollTimeout::NONE)
                && error != nix::errno::Errno::EINTR
            {
                tracing::error!(%error, "poll");
            }
            if fds.get(at).is_some_and(is_ready) {
                self.starts.clear();
                return Idle::Wanted;
            }
        }
    }

    /// Names and pids of the children that still live, without the worker.
    #[must_use]
    pub fn children(&self) -> Vec<(String, i32)> {
        self.children.iter().map(|(pid, child)| (child.name.clone(), *pid)).collect()
    }

    /// Names and pidfds of the same children.
    #[must_use]
    pub fn pidfds(&self) -> Vec<(&str, BorrowedFd<'_>)> {
        self.children.values().map(|child| (child.name.as_str(), child.pidfd.as_fd())).collect()
    }

    /// Starts the worker, serves it, restarts it; returns when it is to end. The worker, where it
    /// still lives, gets SIGTERM then; the children are the caller's to end.
    pub fn run(&mut self) -> Outcome {
        let mut worker: Option<Worker> = None;
        let mut stop_by: Option<Instant> = None;
        loop {
            if worker.is_none() {
                if stop_by.is_some() {
                    return Outcome::ShutDown;
                }
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
            let ready = match self.wait(worker.as_ref(), stop_by) {
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
            let signal = if ready.signal { self.signalled() } else { None };
            if ready.signal || ready.ended {
                self.reap(&mut worker);
            }
            let late = stop_by.is_some_and(|deadline| Instant::now() >= deadline);
            if late || signal.is_some() {
                self.end_worker(worker.as_ref());
                let at_once = signal == Some(Signal::SIGINT) || self.stop_grace.is_zero();
                if late || at_once || stop_by.is_some() {
                    return Outcome::ShutDown;
                }
                stop_by = Some(Instant::now() + self.stop_grace);
            }
        }
    }

    /// Holds and reaps without a worker for `pause`, after [`Outcome::GaveUp`]; the next worker is
    /// told of what ended. [`Outcome::ShutDown`] when SIGTERM or SIGINT came meanwhile.
    pub fn rest(&mut self, pause: Duration) -> Option<Outcome> {
        let end = Instant::now() + pause;
        loop {
            if Instant::now() >= end {
                return None;
            }
            match self.wait(None, Some(end)) {
                Ok(ready) => {
                    let ended = ready.signal && self.signalled().is_some();
                    if ready.signal || ready.ended {
                        self.reap(&mut None);
                    }
                    if ended {
                        return Some(Outcome::ShutDown);
                    }
                }
                Err(error) => tracing::error!(%error, "poll"),
            }
        }
    }

    /// Takes the signals that have come; the one among them that asks for the end the soonest.
    fn signalled(&self) -> Option<Signal> {
        let mut asked = None;
        while let Ok(Some(signal)) = self.signals.read_signal() {
            if signal.ssi_signo == Signal::SIGINT as u32 {
                asked = Some(Signal::SIGINT);
            } else if signal.ssi_signo == Signal::SIGTERM as u32 {
                asked = asked.or(Some(Signal::SIGTERM));
            }
        }
        asked
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
        self.tell(&worker, &Tell::Ready { first: !self.begun }, &[]);
        self.begun = true;
        for exit in self.untold.drain(..).collect::<Vec<_>>() {
            self.tell(&worker, &exit, &[]);
        }
        // Only now: a worker that never reads must not block the loop above for ever, but what it
        // is given at its start fits the socket's buffer.
        rustix::io::ioctl_fionbio(&worker.socket, true)?;
        Ok(worker)
    }

    fn tell(&self, worker: &Worker, message: &Tell, fds: &[BorrowedFd<'_>]) {
        if let Err(error) = socket::send(worker.socket.as_fd(), message, fds) {
            tracing::warn!(%error, ?message, "the worker does not listen");
        }
    }

    /// Waits until a signal came, the worker wrote, a child ended, or it is `until`. SIGCHLD alone would
    /// not do: it is lost in a process with a thread that does not block it.
    fn wait(&self, worker: Option<&Worker>, until: Option<Instant>) -> nix::Result<Ready> {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        // A millisecond more: it is late when this ends.
        let timeout = left.map(|left| left + Duration::from_millis(1));
        let timeout =
            timeout.map_or(PollTimeout::NONE, |left| PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX));
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
        Ok(Ready {
            signal: is_ready(&fds[0]),
            worker: fds.get(worker_at + 1).is_some_and(is_ready),
            ended: fds[1..fds.len().min(worker_at + 1)].iter().any(is_ready),
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
            Ask::Adopt { id, name, pid } => {
                if let Some(pidfd) = fds.into_iter().next() {
                    self.children.insert(pid, Child { name, pidfd, ours: false });
                    self.tell(worker, &Tell::Done { id }, &[]);
                } else {
                    self.tell(worker, &Tell::Refused { id, reason: "no pidfd came along".to_owned() }, &[]);
                }
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
                self.children.insert(pid, Child { name, pidfd, ours: true });
            }
            Err(error) => self.tell(worker, &Tell::Refused { id, reason: error.to_string() }, &[]),
        }
    }

    /// Reaps what has ended: the worker, children, and with `reap_orphans` whatever else.
    fn reap(&mut self, worker: &mut Option<Worker>) {
        let foreign = self.children.iter().filter(|(_, child)| !child.ours && has_ended(child));
        let mut ended: Vec<_> = foreign.map(|(pid, _)| (*pid, STATUS_UNKNOWN)).collect();
        if self.reap_orphans {
            while let Some(exit) = wait_any() {
                ended.push(exit);
            }
        } else {
            let ours = self.children.iter().filter(|(_, child)| child.ours);
            let pids = ours.map(|(pid, _)| *pid).chain(worker.as_ref().map(|worker| worker.pid));
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

fn poll_in(fd: BorrowedFd<'_>) -> PollFd<'_> {
    PollFd::new(fd, PollFlags::POLLIN)
}

fn is_ready(fd: &PollFd<'_>) -> bool {
    fd.any().unwrap_or(false)
}

fn has_ended(child: &Child) -> bool {
    matches!(poll(&mut [poll_in(child.pidfd.as_fd())], PollTimeout::ZERO), Ok(1))
}

/// Waits until a killed worker is a zombie; otherwise its closed socket would keep the loop busy.
fn wait_for_end(worker: &Worker) {
    // EINTR or a time-out only means that the loop comes back here.
    let _ = poll(&mut [poll_in(worker.pidfd.as_fd())], PollTimeout::from(1000u16));
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
