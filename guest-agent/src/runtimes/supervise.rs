//! One daemon from its start to its stop: readiness, restarts, its end.
//!
//! ```text
//!           ┌────────────────── restart after a pause ──────────────┐
//!           ▼                                                       │
//!  spawn ► Starting ──answers──► Ready ──ended──► BackingOff ───────┘
//!  adopt ►    └─────────────ended──────────────►    │
//!                                                   └─too often─► Failed(reason)
//!  a stop leads from anywhere to Stopped
//! ```
//! Each daemon is a task of its own; [`Daemon`] is the handle to it. When all handles are gone the
//! task ends and leaves the process running, for the next worker to adopt.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use dhow_parent::procfs::is_dying;
use dhow_parent::{Exit, SpawnedChild};
use dhow_protocol::control::{DaemonState, DaemonStatus, Event};
use dhow_protocol::errors::chain;
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use super::child::Child;
use super::launch::{self, ChildName, Launch};
use super::log::Log;
use super::manifest::{DaemonSpec, EndConfig};
use super::ready;
use super::restarts::{HEALTHY, Restarts};
use super::text;

/// Between looks at the size of the log.
const LOG_LOOK: Duration = Duration::from_secs(10);
/// How long a daemon may take to end after SIGTERM: dockerd gives containers 10 s of it.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long it may take to read its last settings.
const END_CONFIG_PATIENCE: Duration = Duration::from_secs(10);
/// Between asking whether it has.
const END_CONFIG_PAUSE: Duration = Duration::from_millis(50);
/// How long the kernel may take to end a killed process.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// What a daemon's task works with.
pub struct Plan {
    /// Its name as a child of PID 1.
    pub name: ChildName,
    /// What to run.
    pub spec: DaemonSpec,
    /// Its environment.
    pub environment: Vec<(String, String)>,
    /// Its log.
    pub log: Log,
    /// Starts it.
    pub launch: Arc<dyn Launch>,
    /// Where its states are told.
    pub events: broadcast::Sender<Event>,
}

/// How a daemon is stopped.
#[derive(Debug, Clone, Copy)]
pub struct Stop {
    /// With all that it would leave running.
    pub whole: bool,
    /// SIGKILL then at the latest.
    pub deadline: Instant,
}

enum Order {
    Exited(Exit),
    Stop(Stop, oneshot::Sender<()>),
}

/// A daemon under supervision.
#[derive(Clone)]
pub struct Daemon {
    /// Its name in its bundle.
    pub name: String,
    status: watch::Receiver<DaemonStatus>,
    /// Of the process that is followed; 0 where there is none.
    pid: Arc<AtomicI32>,
    orders: mpsc::UnboundedSender<Order>,
}

impl Daemon {
    /// Starts the daemon, or takes over the one that runs.
    #[must_use]
    pub fn start(plan: Plan, adopted: Option<SpawnedChild>) -> Self {
        let name = plan.spec.name.clone();
        let first = DaemonStatus { name: name.clone(), state: DaemonState::Starting, restarts: 0 };
        let (sender, status) = watch::channel(first);
        let (orders, receiver) = mpsc::unbounded_channel();
        let restarts = Restarts::new(adopted.is_some());
        let pid = Arc::new(AtomicI32::new(0));
        let task = Task {
            plan,
            status: sender,
            pid: Arc::clone(&pid),
            orders: receiver,
            pending: None,
            log_begin: 0,
            restarts,
        };
        tokio::spawn(task.run(adopted));
        Self { name, status, pid, orders }
    }

    /// What it is doing.
    #[must_use]
    pub fn status(&self) -> DaemonStatus {
        self.status.borrow().clone()
    }

    /// Whether it runs, or is started again soon.
    #[must_use]
    pub fn is_live(&self) -> bool {
        !matches!(self.status.borrow().state, DaemonState::Stopped | DaemonState::Failed(_))
    }

    /// Whether it is to run and does not, or is about to end: what it has spawned ends with it, and may be
    /// seen to have ended a moment earlier.
    #[must_use]
    pub fn is_away(&self) -> bool {
        match self.status.borrow().state {
            DaemonState::Starting | DaemonState::BackingOff => true,
            DaemonState::Ready => is_dying(self.pid.load(Ordering::Relaxed)),
            DaemonState::Stopped | DaemonState::Failed(_) => false,
        }
    }

    /// A child of PID 1 has ended; another's is ignored.
    pub fn exited(&self, exit: &Exit) {
        // A task that has ended has no use for it.
        let _ = self.orders.send(Order::Exited(exit.clone()));
    }

    /// Waits until it answers.
    ///
    /// # Errors
    /// When it was given up or stopped, for a person.
    pub async fn settled(&self) -> Result<(), String> {
        let mut status = self.status.clone();
        let settled = status
            .wait_for(|status| !matches!(status.state, DaemonState::Starting | DaemonState::BackingOff))
            .await;
        match settled.as_deref().map(|status| &status.state) {
            Ok(DaemonState::Ready) => Ok(()),
            Ok(DaemonState::Failed(reason)) => Err(reason.clone()),
            Ok(_) | Err(_) => Err(format!("{} was stopped", self.name)),
        }
    }

    /// Ends it; returns when it has ended.
    pub async fn stop(&self, stop: Stop) {
        let (sender, done) = oneshot::channel();
        if self.orders.send(Order::Stop(stop, sender)).is_ok() {
            // An error says that the task is gone, and then nothing is supervised any more.
            let _ = done.await;
        }
    }
}

/// Why a task no longer watches its child.
enum Left {
    Ended(String),
    Stopped(Stop, oneshot::Sender<()>),
    Abandoned,
}

struct Task {
    plan: Plan,
    status: watch::Sender<DaemonStatus>,
    pid: Arc<AtomicI32>,
    orders: mpsc::UnboundedReceiver<Order>,
    /// A stop that came while something else was waited for.
    pending: Option<(Stop, oneshot::Sender<()>)>,
    /// Length of the log when the daemon was started, in bytes.
    log_begin: u64,
    restarts: Restarts,
}

impl Task {
    async fn run(mut self, mut adopted: Option<SpawnedChild>) {
        loop {
            self.set(DaemonState::Starting);
            let child = match adopted.take() {
                Some(child) => Child::new(child).map_err(|error| chain(&error)),
                None => self.spawn().await,
            };
            let reason = match child {
                Err(reason) => format!("{} cannot be started: {reason}", self.plan.spec.name),
                Ok(child) => match self.watch(&child).await {
                    Left::Ended(reason) => reason,
                    Left::Stopped(stop, done) => {
                        self.terminate(&child, stop).await;
                        return self.stopped(done);
                    }
                    Left::Abandoned => return,
                },
            };
            let Some(pause) = self.restarts.ended(Instant::now()) else {
                tracing::error!(reason, "daemon given up");
                self.set(DaemonState::Failed(reason));
                if let Some((_, done)) = self.stop_order().await {
                    self.stopped(done);
                }
                return;
            };
            tracing::warn!(reason, ?pause, "daemon is started again");
            self.warn(format!("{reason}; it is started again in {pause:?}"));
            self.set(DaemonState::BackingOff);
            tokio::select! {
                order = self.stop_order() => {
                    if let Some((_, done)) = order {
                        self.stopped(done);
                    }
                    return;
                }
                () = tokio::time::sleep(pause) => {}
            }
            self.status.send_modify(|status| status.restarts = status.restarts.saturating_add(1));
        }
    }

    async fn spawn(&mut self) -> Result<Child, String> {
        let plan = &self.plan;
        if let Some(config) = &plan.spec.config {
            copy(&config.source, &config.file)?;
        }
        plan.log.bound();
        self.log_begin = plan.log.length();
        let request = launch::request(&plan.name, &plan.spec, &plan.environment, &plan.log)
            .map_err(|error| chain(&error))?;
        let child = plan.launch.spawn(request).await.map_err(|error| chain(&error))?;
        tracing::info!(name = plan.spec.name, pid = child.pid, "daemon started");
        Child::new(child).map_err(|error| chain(&error))
    }

    /// Follows the running child until it ends or is to be stopped.
    async fn watch(&mut self, child: &Child) -> Left {
        self.pid.store(child.pid, Ordering::Relaxed);
        let readiness = self.plan.spec.ready.clone();
        let mut ready = pin!(ready::wait(readiness.as_ref()));
        let mut is_ready = false;
        let mut healthy = pin!(tokio::time::sleep(HEALTHY));
        let mut is_healthy = false;
        let mut log_look = tokio::time::interval(LOG_LOOK);
        log_look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = child.ended() => {
                    let how = self.exit_of(child).await;
                    return Left::Ended(self.reason(&how, is_ready));
                }
                order = self.orders.recv() => match order {
                    Some(Order::Stop(stop, done)) => return Left::Stopped(stop, done),
                    Some(Order::Exited(exit)) if exit.pid == child.pid => {
                        return Left::Ended(self.reason(&text::exit(exit.status), is_ready));
                    }
                    Some(Order::Exited(_)) => {}
                    None => return Left::Abandoned,
                },
                () = &mut ready, if !is_ready => {
                    is_ready = true;
                    self.restarts.ready();
                    self.set(DaemonState::Ready);
                    healthy.as_mut().reset(tokio::time::Instant::now() + HEALTHY);
                }
                () = &mut healthy, if is_ready && !is_healthy => {
                    is_healthy = true;
                    self.restarts.healthy();
                }
                _ = log_look.tick() => {
                    let log = self.plan.log.clone();
                    if !log.is_too_long() {
                        continue;
                    }
                    // It fails only by a panic, which its thread has reported.
                    let _ = tokio::task::spawn_blocking(move || log.bound()).await;
                }
            }
        }
    }

    /// The exit status of a child that has ended: PID 1 tells it after it has reaped the child.
    async fn exit_of(&mut self, child: &Child) -> String {
        let told = async {
            loop {
                match self.orders.recv().await {
                    Some(Order::Exited(exit)) if exit.pid == child.pid => return Some(exit.status),
                    Some(Order::Exited(_)) => {}
                    Some(Order::Stop(stop, done)) => {
                        self.pending = Some((stop, done));
                        return None;
                    }
                    None => return None,
                }
            }
        };
        match tokio::time::timeout(Duration::from_secs(2), told).await {
            Ok(Some(status)) => text::exit(status),
            Ok(None) | Err(_) => "ended".to_owned(),
        }
    }

    fn reason(&self, how: &str, was_ready: bool) -> String {
        let name = &self.plan.spec.name;
        let when = if was_ready { "" } else { " before it answered" };
        match self.plan.log.end_since(self.log_begin) {
            end if end.is_empty() => format!("{name} {how}{when}, and logged nothing"),
            end => format!("{name} {how}{when}; its log ends: {end}"),
        }
    }

    async fn terminate(&self, child: &Child, stop: Stop) {
        let name = &self.plan.spec.name;
        let is_ready = self.status.borrow().state == DaemonState::Ready;
        if let Some(end) = self.plan.spec.config.as_ref().and_then(|config| config.end.as_ref())
            && stop.whole
            && is_ready
        {
            let patience = END_CONFIG_PATIENCE.min(stop.deadline.saturating_duration_since(Instant::now()));
            tokio::select! {
                taken = tokio::time::timeout(patience, self.take_end_config(child, end)) => match taken {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::warn!(name, error, "the daemon did not take its last settings"),
                    Err(_) => tracing::warn!(name, "the daemon did not take its last settings in time"),
                },
                () = child.ended() => {}
            }
        }
        child.signal(rustix::process::Signal::TERM);
        let patience = PATIENCE.min(stop.deadline.saturating_duration_since(Instant::now()));
        if tokio::time::timeout(patience, child.ended()).await.is_err() {
            tracing::warn!(name, ?patience, "the daemon does not end; killing it");
            child.signal(rustix::process::Signal::KILL);
            if tokio::time::timeout(KILL_PATIENCE, child.ended()).await.is_err() {
                tracing::error!(name, "the daemon does not even end when killed");
            }
        }
    }

    async fn take_end_config(&self, child: &Child, end: &EndConfig) -> Result<(), String> {
        let spec = &self.plan.spec;
        let (Some(config), Some(ready)) = (&spec.config, &spec.ready) else { return Ok(()) };
        copy(&end.source, &config.file)?;
        child.signal(rustix::process::Signal::HUP);
        loop {
            let answer = ready::get(&ready.socket, &end.path).await.map_err(|error| chain(&error))?;
            if answer.windows(end.text.len()).any(|window| window == end.text.as_bytes()) {
                return Ok(());
            }
            tokio::time::sleep(END_CONFIG_PAUSE).await;
        }
    }

    /// The next order to stop; `None` when all handles are gone.
    async fn stop_order(&mut self) -> Option<(Stop, oneshot::Sender<()>)> {
        if let Some(pending) = self.pending.take() {
            return Some(pending);
        }
        loop {
            if let Order::Stop(stop, done) = self.orders.recv().await? {
                return Some((stop, done));
            }
        }
    }

    fn stopped(&self, done: oneshot::Sender<()>) {
        self.set(DaemonState::Stopped);
        // Whoever asked may have given up.
        let _ = done.send(());
    }

    fn set(&self, state: DaemonState) {
        self.status.send_modify(|status| status.state = state);
        // Nobody listens: there is no control stream now.
        let _ = self.plan.events.send(Event::Daemon(self.status.borrow().clone()));
    }

    fn warn(&self, sentence: String) {
        // As above.
        let _ = self.plan.events.send(Event::Warning(sentence));
    }
}

fn copy(source: &std::path::Path, file: &std::path::Path) -> Result<(), String> {
    let copied = std::fs::read(source).and_then(|content| std::fs::write(file, content));
    copied.map_err(|error| format!("its settings {} cannot be copied: {error}", source.display()))
}
