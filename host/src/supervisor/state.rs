//! What the API shows: where the start is, what is wrong, what is forwarded and mounted.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use dhow_protocol::control::DaemonStatus;
use tokio::sync::watch;

use crate::api::{MountReport, Progress, VmState};
use crate::forward::Forwards;
use crate::supervisor::guest::Guest;

/// What watchers of a start or a stop see.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Where the VM is in its life.
    pub vm: VmState,
    /// Every step so far.
    pub progress: Vec<Progress>,
    /// Why the start failed, and what to do about it.
    pub failure: Option<(String, Option<String>)>,
    /// What is wrong with a VM that runs, by what it is about.
    pub problems: BTreeMap<String, String>,
}

impl Snapshot {
    /// All that is wrong, as one sentence.
    pub fn problem(&self) -> Option<String> {
        let problems: Vec<&str> = self.problems.values().map(String::as_str).collect();
        (!problems.is_empty()).then(|| problems.join("; "))
    }
}

/// What is known of the VM beyond its state; empty until it is known.
#[derive(Debug, Default, Clone)]
pub struct Facts {
    /// "kvm" or "tcg".
    pub acceleration: String,
    /// Number of virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Size of the data disk in GiB.
    pub disk_gib: u64,
    /// The image's folder.
    pub image: PathBuf,
    /// Host processes: role and pid.
    pub processes: Vec<(String, i32)>,
    /// States of the guest's daemons.
    pub daemons: Vec<DaemonStatus>,
    /// The shares.
    pub mounts: Vec<MountReport>,
}

/// Shared by the start, the stop and the API.
pub struct State {
    snapshot: watch::Sender<Snapshot>,
    facts: Mutex<Facts>,
    guest: Mutex<Option<Guest>>,
    forwards: Mutex<Option<Arc<Forwards>>>,
    told: watch::Sender<bool>,
    watchers: AtomicUsize,
    /// docker.sock on the host.
    pub docker_socket: PathBuf,
}

/// A watcher of the state; the supervisor waits for them before it ends.
pub struct Watcher<'a>(&'a State);

impl Drop for Watcher<'_> {
    fn drop(&mut self) {
        self.0.watchers.fetch_sub(1, Ordering::Relaxed);
        // Wakes `drained`.
        self.0.told.send_modify(|_| {});
    }
}

impl State {
    /// A VM that is starting.
    #[must_use]
    pub fn new(docker_socket: PathBuf) -> Self {
        let (progress, problems) = (Vec::new(), BTreeMap::new());
        let snapshot = Snapshot { vm: VmState::Starting, progress, failure: None, problems };
        Self {
            snapshot: watch::Sender::new(snapshot),
            facts: Mutex::default(),
            guest: Mutex::default(),
            forwards: Mutex::default(),
            told: watch::Sender::new(false),
            watchers: AtomicUsize::new(0),
            docker_socket,
        }
    }

    /// Follows the state.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Snapshot> {
        self.snapshot.subscribe()
    }

    /// Counts a watcher until it is dropped.
    pub fn watcher(&self) -> Watcher<'_> {
        self.watchers.fetch_add(1, Ordering::Relaxed);
        Watcher(self)
    }

    /// Runs one step and shows it with its time.
    pub async fn step<T>(&self, step: &str, work: impl Future<Output = T>) -> T {
        let begun = Instant::now();
        self.progress(Progress::Begin { step: step.to_owned() });
        let result = work.await;
        let milliseconds = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        tracing::info!(step, milliseconds, "step");
        self.progress(Progress::End { step: step.to_owned(), milliseconds });
        result
    }

    /// Shows a notice.
    pub fn notice(&self, text: impl Into<String>) {
        let text = text.into();
        tracing::warn!(text, "notice");
        self.progress(Progress::Notice(text));
    }

    fn progress(&self, progress: Progress) {
        self.snapshot.send_modify(|snapshot| snapshot.progress.push(progress));
    }

    /// Docker answers.
    pub fn started(&self) {
        self.snapshot.send_modify(|snapshot| snapshot.vm = VmState::Running);
    }

    /// On the way down; the progress begins anew.
    pub fn stopping(&self) {
        self.snapshot.send_modify(|snapshot| {
            snapshot.vm = VmState::Stopping;
            snapshot.progress.clear();
        });
    }

    /// Nothing runs any more.
    pub fn stopped(&self) {
        self.snapshot.send_modify(|snapshot| snapshot.vm = VmState::Stopped);
    }

    /// The start failed.
    pub fn failed(&self, message: String, hint: Option<String>) {
        self.snapshot.send_modify(|snapshot| snapshot.failure = Some((message, hint)));
    }

    /// Something is wrong with a VM that runs, or (`None`) no longer. `topic` keeps one problem from
    /// hiding or ending another.
    pub fn problem(&self, topic: &str, problem: Option<String>) {
        self.snapshot.send_if_modified(|snapshot| {
            if snapshot.problems.get(topic) == problem.as_ref() {
                return false;
            }
            match problem {
                Some(problem) => {
                    tracing::warn!(topic, problem, "degraded");
                    snapshot.problems.insert(topic.to_owned(), problem);
                }
                None => {
                    tracing::info!(topic, "no longer degraded");
                    snapshot.problems.remove(topic);
                }
            }
            true
        });
    }

    /// A command has shown why the start failed.
    pub fn tell_failure(&self) {
        self.told.send_replace(true);
    }

    /// Waits for [`State::tell_failure`].
    pub async fn failure_told(&self) {
        // The sender lives in `self`.
        let _ = self.told.subscribe().wait_for(|told| *told).await;
    }

    /// Waits until no watcher is left.
    pub async fn drained(&self) {
        let _ = self.told.subscribe().wait_for(|_| self.watchers.load(Ordering::Relaxed) == 0).await;
    }

    /// Reads the facts.
    #[must_use]
    pub fn facts(&self) -> Facts {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes the facts.
    pub fn learn(&self, change: impl FnOnce(&mut Facts)) {
        change(&mut self.facts.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// A daemon's new state.
    pub fn learn_daemon(&self, status: DaemonStatus) {
        self.learn(|facts| {
            facts.daemons.retain(|daemon| daemon.name != status.name);
            facts.daemons.push(status);
        });
    }

    /// The way to the guest, once there is one.
    #[must_use]
    pub fn guest(&self) -> Option<Guest> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The guest answers, or is gone.
    pub fn set_guest(&self, guest: Option<Guest>) {
        *self.guest.lock().unwrap_or_else(PoisonError::into_inner) = guest;
    }

    /// The port forwards, once there is a guest.
    #[must_use]
    pub fn forwards(&self) -> Option<Arc<Forwards>> {
        self.forwards.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// There is a guest to forward to.
    pub fn set_forwards(&self, forwards: Arc<Forwards>) {
        *self.forwards.lock().unwrap_or_else(PoisonError::into_inner) = Some(forwards);
    }
}
