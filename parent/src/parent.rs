//! The parent's loop: serve the worker, reap children, restart the worker.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::children::{self, Child, is_ready, pidfd_of, poll_in};
use crate::estate::Estate;
use crate::message::{Ask, Spawn, Tell};
use crate::worker::{Worker, WorkerCommand};
use crate::{link, socket, spawn};

/// Exits kept for a worker that is not there to be told; the oldest go first.
const EXITS_LIMIT: usize = 1024;

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

/// What a wait ended with.
struct Ready {
    signal: bool,
    /// It wrote, or its socket is closed.
    worker: bool,
    /// It takes what it has not been told yet.
    takes: bool,
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
                worker.iter().for_each(Worker::terminate);
                return Outcome::ShutDown;
            }
            let signal = if ready.signal { self.signalled() } else { None };
            if ready.signal || ready.ended {
                self.reap(&mut worker);
            }
            if ready.takes
                && let Some(current) = &worker
            {
                self.tell_exits(current);
            }
            let late = stop_by.is_some_and(|deadline| Instant::now() >= deadline);
            if late || signal.is_some() {
                worker.iter().for_each(Worker::terminate);
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
        let worker = Worker::start(&self.command)?;
        // A send can fail only when the worker is dead already: SIGCHLD tells.
        for (name, fd) in &self.held {
            worker.tell(&Tell::Held { name: name.clone() }, &[fd.as_fd()]);
        }
        for (pid, child) in &self.children {
            worker.tell(&Tell::Child { name: child.name.clone(), pid: *pid }, &[child.pidfd.as_fd()]);
        }
        worker.tell(&Tell::Ready { first: !self.begun }, &[]);
        self.begun = true;
        self.tell_exits(&worker);
        worker.never_wait()?;
        Ok(worker)
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
            let mut flags = PollFlags::POLLIN;
            // A worker that was stopped, or slow, takes what it has not been told when it goes on.
            flags.set(PollFlags::POLLOUT, !self.untold.is_empty());
            fds.push(PollFd::new(worker.socket.as_fd(), flags));
        }
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
        Ok(Ready {
            signal: is_ready(&fds[0]),
            worker: fds.get(worker_at + 1).is_some_and(|fd| has(fd, !PollFlags::POLLOUT)),
            takes: fds.get(worker_at + 1).is_some_and(|fd| has(fd, PollFlags::POLLOUT)),
            ended: fds[1..fds.len().min(worker_at + 1)].iter().any(is_ready),
        })
    }

    /// Answers one message of the worker; true when it asks for the end.
    fn serve(&mut self, worker: &Worker) -> bool {
        let (ask, fds) = match socket::receive::<Ask>(worker.socket.as_fd()) {
            Ok(Some(message)) => message,
            // It closed its end: it is ending, or broken. Without its socket it is of no use.
            Ok(None) => {
                worker.kill();
                return false;
            }
            // As above, with messages that it has not read.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                worker.kill();
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
                    worker.tell(&Tell::Done { id }, &[]);
                } else {
                    worker.tell(&Tell::Refused { id, reason: "no fd came along".to_owned() }, &[]);
                }
            }
            Ask::Release { id, name } => {
                self.held.remove(&name);
                worker.tell(&Tell::Done { id }, &[]);
            }
            Ask::Adopt { id, name, pid } => {
                if let Some(pidfd) = fds.into_iter().next() {
                    self.children.insert(pid, Child { name, pidfd, ours: false });
                    worker.tell(&Tell::Done { id }, &[]);
                } else {
                    worker.tell(&Tell::Refused { id, reason: "no pidfd came along".to_owned() }, &[]);
                }
            }
            Ask::ShutDown { id } => {
                worker.tell(&Tell::Done { id }, &[]);
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
                worker.tell(&Tell::Spawned { id, pid }, &[pidfd.as_fd()]);
                self.children.insert(pid, Child { name, pidfd, ours: true });
            }
            Err(error) => {
                worker.tell(&Tell::Refused { id, reason: error.to_string() }, &[]);
            }
        }
    }

    /// Reaps what has ended: the worker, children, and with `reap_orphans` whatever else.
    fn reap(&mut self, worker: &mut Option<Worker>) {
        let ended =
            children::ended(&self.children, worker.as_ref().map(|worker| worker.pid), self.reap_orphans);
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
            self.tell_exits(worker);
        }
    }

    /// Tells the exits that no worker was told; one that has died does not take them with it.
    fn tell_exits(&mut self, worker: &Worker) {
        while let Some(exit) = self.untold.front()
            && worker.tell(exit, &[])
        {
            self.untold.pop_front();
        }
    }
}

fn has(fd: &PollFd<'_>, flags: PollFlags) -> bool {
    fd.revents().is_some_and(|events| events.intersects(flags))
}
