//! The runtimes that run: start, upgrade and the way back, stop, adoption by a new worker.
//!
//! Starts and stops run in tasks of their own, one at a time, so that a caller who gives up leaves
//! nothing half done. A stop interrupts a start that is waiting.

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dhow_parent::{Exit, SpawnedChild};
use dhow_protocol::control::{DaemonStatus, Event};
use dhow_protocol::errors::chain;
use tokio::sync::{broadcast, watch};
use tokio::task::JoinSet;

use super::install::{self, Library};
use super::launch::{ChildName, Launch, environment};
use super::leftovers;
use super::log::Log;
use super::manifest::{DaemonSpec, Manifest, is_name};
use super::store::{Digest, Role};
use super::supervise::{Daemon, Plan, Stop};

/// How long a runtime may take to answer before the way back is taken. A host that waits 240 s
/// for the start learns of it.
const START_PATIENCE: Duration = Duration::from_secs(150);
/// How long a runtime may take to stop.
const STOP_PATIENCE: Duration = Duration::from_secs(60);
/// How long all may take together before what is left is killed: the host waits 60 s for the whole of
/// the power-off, in which PID 1 has its part.
const STOP_ALL_PATIENCE: Duration = Duration::from_secs(25);
/// How long containers have that their daemon did not end …
const GRACE: Duration = Duration::from_secs(10);
/// … and where the daemons used up all the time.
const LEAST_GRACE: Duration = Duration::from_secs(5);
/// Bound of [`Engine::stop_all`] whatever happens.
const STOP_ALL_BOUND: Duration = Duration::from_secs(35);

/// A bundle whose daemons run, or have been stopped.
struct Runtime {
    digest: Digest,
    manifest: Manifest,
    daemons: Vec<Daemon>,
}

/// See the module.
pub struct Engine {
    library: Arc<Library>,
    launch: Arc<dyn Launch>,
    environment: Vec<(String, String)>,
    events: broadcast::Sender<Event>,
    /// In the order of their start.
    runtimes: Mutex<Vec<Runtime>>,
    /// Held by the start or stop that is going on.
    changing: Arc<tokio::sync::Mutex<()>>,
    /// Counts the stops that were asked for.
    stops: watch::Sender<u64>,
}

impl Engine {
    /// Nothing runs yet.
    #[must_use]
    pub fn new(
        library: Library,
        launch: Arc<dyn Launch>,
        environment: Vec<(String, String)>,
        events: broadcast::Sender<Event>,
    ) -> Self {
        Self {
            library: Arc::new(library),
            launch,
            environment,
            events,
            runtimes: Mutex::new(Vec::new()),
            changing: Arc::default(),
            stops: watch::Sender::new(0),
        }
    }

    /// The disk.
    #[must_use]
    pub fn library(&self) -> &Arc<Library> {
        &self.library
    }

    /// Warns when containers would not ask the agent's DNS forwarder.
    pub fn check_names(&self, dns: Ipv4Addr) {
        let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        let wanted = ["nameserver".to_owned(), dns.to_string()];
        if !text.lines().any(|line| line.split_whitespace().eq(wanted.iter().map(String::as_str))) {
            self.warn(format!(
                "/etc/resolv.conf does not name {dns}: containers may not resolve the host's names"
            ));
        }
    }

    /// Takes over daemons that run: those that are wanted are watched, and started where they ended
    /// meanwhile; others are ended.
    pub async fn adopt(self: &Arc<Self>, children: Vec<SpawnedChild>) {
        if let Err(error) = self.library.store.prepare() {
            tracing::error!(%error, "the folders of the runtimes cannot be made");
        }
        let mut children: Vec<_> =
            children.into_iter().filter_map(|child| Some((ChildName::parse(&child.name)?, child))).collect();
        for (name, digest) in self.library.store.wanted() {
            match install::open(&self.library, &name, digest).await {
                Ok(manifest) => {
                    let mut take = |spec: &DaemonSpec| {
                        let mine = ChildName { bundle: name.clone(), daemon: spec.name.clone(), digest };
                        let at = children.iter().position(|(name, _)| *name == mine)?;
                        Some(children.swap_remove(at).1)
                    };
                    let daemons: Vec<_> =
                        manifest.daemons.iter().map(|spec| (spec.clone(), take(spec))).collect();
                    let adopted = daemons.iter().filter(|(_, child)| child.is_some()).count();
                    tracing::info!(name, adopted, of = daemons.len(), "daemons adopted");
                    let daemons = daemons
                        .into_iter()
                        .map(|(spec, child)| Daemon::start(self.plan(&name, digest, spec), child))
                        .collect();
                    self.runtimes().push(Runtime { digest, manifest, daemons });
                }
                // They are better left alone than ended.
                Err(error) => {
                    tracing::error!(name, error = chain(&error), "the daemons of a bundle cannot be adopted");
                    children.retain(|(child, _)| child.bundle != name);
                }
            }
        }
        if !children.is_empty() {
            // Before anything is started.
            let changing = Arc::clone(&self.changing).lock_owned().await;
            let engine = Arc::clone(self);
            tokio::spawn(async move {
                engine.end_unwanted(children).await;
                drop(changing);
            });
        }
    }

    /// Goes on with a stop or an upgrade in which the earlier worker died.
    async fn end_unwanted(&self, children: Vec<(ChildName, SpawnedChild)>) {
        let mut left_behind = Vec::new();
        // PID 1 tells children in the order of their pids; as a rule that is the order of their start.
        for (name, child) in children.into_iter().rev() {
            tracing::warn!(%name, "a daemon that is not wanted is ended");
            let Ok(manifest) = install::open(&self.library, &name.bundle, name.digest).await else {
                continue;
            };
            let Some(spec) = manifest.daemons.into_iter().find(|spec| spec.name == name.daemon) else {
                continue;
            };
            let whole = !self.runtimes().iter().any(|runtime| runtime.manifest.name == name.bundle);
            let daemon = Daemon::start(self.plan(&name.bundle, name.digest, spec), Some(child));
            daemon.stop(Stop { whole, deadline: Instant::now() + STOP_PATIENCE }).await;
            if whole {
                left_behind.extend(manifest.left_behind);
            }
        }
        leftovers::end(&left_behind, GRACE).await;
    }

    /// A child of PID 1 has ended.
    pub fn exited(&self, exit: &Exit) {
        let Some(name) = ChildName::parse(&exit.name) else { return };
        for runtime in self.runtimes().iter().filter(|runtime| runtime.manifest.name == name.bundle) {
            runtime
                .daemons
                .iter()
                .filter(|daemon| daemon.name == name.daemon)
                .for_each(|daemon| daemon.exited(exit));
        }
    }

    /// Whether a daemon that is to run does not.
    pub fn is_away(&self, name: &str) -> bool {
        self.runtimes()
            .iter()
            .flat_map(|runtime| &runtime.daemons)
            .any(|daemon| daemon.name == name && daemon.is_away())
    }

    /// The daemons' states.
    #[must_use]
    pub fn statuses(&self) -> Vec<DaemonStatus> {
        self.runtimes().iter().flat_map(|runtime| runtime.daemons.iter().map(Daemon::status)).collect()
    }

    /// Starts the installed image's daemons.
    ///
    /// # Errors
    /// For a person.
    pub async fn start(self: &Arc<Self>, name: &str) -> Result<(), String> {
        known(name)?;
        let (engine, name) = (Arc::clone(self), name.to_owned());
        let stops = self.stops.subscribe();
        let started = tokio::spawn(async move { engine.start_or_go_back(&name, stops).await });
        started.await.unwrap_or_else(|panic| Err(panic.to_string()))
    }

    async fn start_or_go_back(&self, name: &str, stops: watch::Receiver<u64>) -> Result<(), String> {
        let _changing = self.changing.lock().await;
        let store = &self.library.store;
        let wanted = store
            .digest(name, Role::Installed)
            .ok_or_else(|| format!("no runtime {name} is installed in the guest"))?;
        let good = store.digest(name, Role::Good);
        let Err(reason) = self.bring_up(name, wanted, &stops).await else {
            if let Err(error) = store.set(name, Role::Good, wanted) {
                tracing::warn!(%error, name, "it cannot be noted that the runtime is good");
            }
            self.library.detach(name, Some(wanted));
            return Ok(());
        };
        let interrupted = stops.has_changed().unwrap_or(true);
        let Some(good) = good.filter(|good| *good != wanted && !interrupted) else { return Err(reason) };
        tracing::error!(name, reason, "the new version does not start; going back");
        let told =
            |what: &str| format!("the new version of {name} does not start, {what} (reason: {reason})");
        match self.bring_up(name, good, &stops).await {
            Ok(()) => {
                if let Err(error) = store.set(name, Role::Installed, good) {
                    tracing::warn!(%error, name, "the way back is not noted");
                }
                self.library.detach(name, Some(good));
                self.warn(told("the one before it runs again"));
                Ok(())
            }
            Err(second) => Err(told(&format!("nor does the one before it: {second}"))),
        }
    }

    /// Has the daemons of exactly this image run, and waits until they answer.
    async fn bring_up(&self, name: &str, digest: Digest, stops: &watch::Receiver<u64>) -> Result<(), String> {
        let stopped = || format!("{name} is being stopped");
        if stops.has_changed().unwrap_or(true) {
            return Err(stopped());
        }
        let manifest = install::open(&self.library, name, digest)
            .await
            .map_err(|error| format!("the runtime {name} is of no use: {}", chain(&error)))?;
        let before = {
            let mut runtimes = self.runtimes();
            let at =
                runtimes.iter().position(|runtime| runtime.manifest.name == name && runtime.digest != digest);
            at.map(|at| runtimes.remove(at))
        };
        if let Some(before) = before {
            // Containers go on without their daemons.
            stop_daemons(&before.daemons, Stop { whole: false, deadline: Instant::now() + STOP_PATIENCE })
                .await;
        }
        let store = &self.library.store;
        store
            .show(name, digest)
            .and_then(|()| store.want(name, digest))
            .map_err(|error| format!("the guest cannot make {name} seen: {error}"))?;

        let daemons = self.start_missing(name, digest, manifest);
        let mut settling = JoinSet::new();
        for daemon in daemons {
            settling.spawn(async move { daemon.settled().await });
        }
        let settled = async {
            while let Some(settled) = settling.join_next().await {
                settled.unwrap_or_else(|panic| Err(panic.to_string()))?;
            }
            Ok(())
        };
        // A clone, so that the caller still sees the change.
        let mut stop = stops.clone();
        tokio::select! {
            settled = tokio::time::timeout(START_PATIENCE, settled) => settled.unwrap_or_else(|_| {
                Err(format!("{} did not answer within {} s", self.unsettled(name), START_PATIENCE.as_secs()))
            }),
            _ = stop.changed() => Err(stopped()),
        }
    }

    /// Starts those daemons that do not run; all of the runtime, in order.
    fn start_missing(&self, name: &str, digest: Digest, manifest: Manifest) -> Vec<Daemon> {
        let mut runtimes = self.runtimes();
        let at = runtimes.iter().position(|runtime| runtime.manifest.name == name);
        let running = at.map(|at| runtimes.remove(at).daemons).unwrap_or_default();
        let daemon = |spec: &DaemonSpec| {
            let live = running.iter().find(|daemon| daemon.name == spec.name && daemon.is_live());
            live.cloned().unwrap_or_else(|| Daemon::start(self.plan(name, digest, spec.clone()), None))
        };
        let daemons: Vec<_> = manifest.daemons.iter().map(daemon).collect();
        runtimes.push(Runtime { digest, manifest, daemons: daemons.clone() });
        daemons
    }

    /// Names of daemons that do not answer, with the end of their logs.
    fn unsettled(&self, name: &str) -> String {
        use dhow_protocol::control::DaemonState;
        let runtimes = self.runtimes();
        let daemons = runtimes
            .iter()
            .filter(|runtime| runtime.manifest.name == name)
            .flat_map(|runtime| &runtime.daemons);
        let waiting = daemons.filter(|daemon| daemon.status().state != DaemonState::Ready);
        let told = waiting.map(|daemon| {
            format!(
                "{} (its log ends: {})",
                daemon.name,
                Log::new(self.library.store.log(&daemon.name)).end_since(0)
            )
        });
        told.collect::<Vec<_>>().join(" and ")
    }

    fn plan(&self, bundle: &str, digest: Digest, spec: DaemonSpec) -> Plan {
        Plan {
            name: ChildName { bundle: bundle.to_owned(), daemon: spec.name.clone(), digest },
            environment: environment(&self.library.store.seen(bundle), &self.environment),
            log: Log::new(self.library.store.log(&spec.name)),
            spec,
            launch: Arc::clone(&self.launch),
            events: self.events.clone(),
        }
    }

    /// Stops the daemons of a runtime and its containers.
    ///
    /// # Errors
    /// For a person.
    pub async fn stop(self: &Arc<Self>, name: &str) -> Result<(), String> {
        known(name)?;
        let installed = self.library.store.digest(name, Role::Installed).is_some();
        if !installed && !self.runtimes().iter().any(|runtime| runtime.manifest.name == name) {
            return Err(format!("no runtime {name} is installed in the guest"));
        }
        self.stops.send_modify(|stops| *stops += 1);
        let (engine, name) = (Arc::clone(self), name.to_owned());
        let stopped = tokio::spawn(async move {
            let _changing = engine.changing.lock().await;
            engine.take_down(&name, Instant::now() + STOP_PATIENCE).await;
        });
        stopped.await.map_err(|panic| panic.to_string())
    }

    async fn take_down(&self, name: &str, deadline: Instant) {
        if let Err(error) = self.library.store.forget(name) {
            tracing::warn!(%error, name, "the stop is not noted");
        }
        let found = {
            let runtimes = self.runtimes();
            let runtime = runtimes.iter().find(|runtime| runtime.manifest.name == name);
            runtime.map(|runtime| (runtime.daemons.clone(), runtime.manifest.left_behind.clone()))
        };
        let Some((daemons, left_behind)) = found else { return };
        stop_daemons(&daemons, Stop { whole: true, deadline }).await;
        let left = deadline.saturating_duration_since(Instant::now());
        leftovers::end(&left_behind, left.clamp(LEAST_GRACE, GRACE)).await;
    }

    /// Stops everything, for the power-off.
    pub async fn stop_all(self: &Arc<Self>) {
        self.stops.send_modify(|stops| *stops += 1);
        let engine = Arc::clone(self);
        let stopping = tokio::spawn(async move {
            let _changing = engine.changing.lock().await;
            let deadline = Instant::now() + STOP_ALL_PATIENCE;
            let names: Vec<_> =
                engine.runtimes().iter().rev().map(|runtime| runtime.manifest.name.clone()).collect();
            for name in names {
                engine.take_down(&name, deadline).await;
                engine.library.detach(&name, None);
            }
        });
        match tokio::time::timeout(STOP_ALL_BOUND, stopping).await {
            Ok(Ok(())) => {}
            Ok(Err(panic)) => tracing::error!(%panic, "the runtimes are not stopped"),
            Err(_) => tracing::error!("the runtimes did not stop in {} s", STOP_ALL_BOUND.as_secs()),
        }
    }

    fn warn(&self, sentence: String) {
        // Nobody listens: there is no control stream now.
        let _ = self.events.send(Event::Warning(sentence));
    }

    fn runtimes(&self) -> MutexGuard<'_, Vec<Runtime>> {
        self.runtimes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// In the reverse order of their start, one after the other: dockerd needs containerd to its end.
async fn stop_daemons(daemons: &[Daemon], stop: Stop) {
    for daemon in daemons.iter().rev() {
        daemon.stop(stop).await;
    }
}

/// A name that goes into paths.
fn known(name: &str) -> Result<(), String> {
    if is_name(name) { Ok(()) } else { Err("a runtime's name has 1 to 32 of a-z, 0-9 and -".to_owned()) }
}
