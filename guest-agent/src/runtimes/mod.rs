//! Installable runtimes: bundles and their daemons.
//!
//! ```text
//! offer ─► install.rs ─► receive.rs ─► store.rs, mount.rs     what is on the disk
//!                                         │ manifest.rs        what it says of itself
//! start ─► engine.rs ─► supervise.rs ─► launch.rs ─► PID 1     one task a daemon
//!            │            ├ ready.rs  restarts.rs  log.rs  child.rs
//! stop ──────┴──────────► leftovers.rs                         shims and containers
//! ```
//! Daemons are children of PID 1 and outlive the worker; a new worker finds the mounts and adopts
//! the daemons. Containers ask the agent's DNS forwarder because PID 1 names it in
//! /etc/resolv.conf, which dockerd hands on: its address is none of the loopback network's.

mod child;
mod engine;
mod install;
mod launch;
mod leftovers;
mod log;
mod manifest;
mod mount;
mod ready;
mod receive;
mod restarts;
mod store;
mod supervise;
#[cfg(test)]
mod tests;
mod text;

use std::net::Ipv4Addr;
use std::sync::Arc;

use dhow_parent::{Exit, ParentLink, SpawnedChild};
use dhow_protocol::bundle::BundleOffer;
use dhow_protocol::control::{DaemonStatus, Event};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Mutex, broadcast};

use engine::Engine;
use install::Library;
use manifest::Variables;
use mount::LoopMount;
use store::Store;

/// What the runtimes need.
pub struct Setup {
    /// Spawns the daemons, which are PID 1's children.
    pub link: ParentLink,
    /// Daemons of an earlier worker that still run.
    pub children: Vec<SpawnedChild>,
    /// Environment of the daemons (proxies).
    pub environment: Vec<(String, String)>,
    /// The agent's DNS forwarder: where containers ask.
    pub dns: Option<Ipv4Addr>,
    /// What daemons' command lines may name, as `{NAME}`.
    pub variables: Variables,
    /// Where changes of the daemons' states are told.
    pub events: broadcast::Sender<Event>,
}

/// The installed bundles and their daemons.
pub struct Runtimes {
    engine: Arc<Engine>,
    /// Held by the offer that is served.
    receiving: Mutex<()>,
}

impl Runtimes {
    /// Takes over what an earlier worker left.
    pub async fn start(setup: Setup) -> Arc<Self> {
        let library = Library {
            store: Store::default(),
            mount: Box::new(LoopMount),
            base: base_release(),
            variables: setup.variables,
        };
        let engine = Engine::new(library, Arc::new(setup.link), setup.environment, setup.events);
        if let Some(dns) = setup.dns {
            engine.check_names(dns);
        }
        Self::with(engine, setup.children).await
    }

    async fn with(engine: Engine, children: Vec<SpawnedChild>) -> Arc<Self> {
        let engine = Arc::new(engine);
        engine.adopt(children).await;
        Arc::new(Self { engine, receiving: Mutex::new(()) })
    }

    /// A child of PID 1 has ended; another's child is ignored.
    pub fn exited(&self, exit: &Exit) {
        self.engine.exited(exit);
    }

    /// Serves one `Bundle` stream to its end. One is served at a time; another waits.
    pub async fn receive<S: AsyncRead + AsyncWrite + Unpin + Send>(&self, offer: BundleOffer, mut stream: S) {
        let _receiving = self.receiving.lock().await;
        install::serve(self.engine.library(), offer, &mut stream).await;
    }

    /// Starts a bundle's daemons and waits until they answer; returns at once where they do.
    ///
    /// Daemons of another version are replaced, and their containers go on. When the new version
    /// does not answer, the one that last did is started again, and a warning says so.
    ///
    /// # Errors
    /// For a person.
    pub async fn start_runtime(&self, name: &str) -> Result<(), String> {
        self.engine.start(name).await
    }

    /// Stops a bundle's daemons, and the containers with them.
    ///
    /// # Errors
    /// For a person.
    pub async fn stop_runtime(&self, name: &str) -> Result<(), String> {
        self.engine.stop(name).await
    }

    /// Stops all daemons, in the reverse order of their start; containers end with them. Bundles are
    /// no longer mounted then. It takes 35 s at the most.
    pub async fn stop_all(&self) {
        self.engine.stop_all().await;
    }

    /// Whether a daemon that is to run does not: it has ended and is started again, or is about to end.
    #[must_use]
    pub fn is_away(&self, daemon: &str) -> bool {
        self.engine.is_away(daemon)
    }

    /// The daemons' states.
    #[must_use]
    pub fn statuses(&self) -> Vec<DaemonStatus> {
        self.engine.statuses()
    }
}

/// Release of the guest's base, os-release(5).
fn base_release() -> Option<String> {
    let text = std::fs::read_to_string("/etc/os-release").ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="))?;
    Some(value.trim_matches('"').to_owned())
}
