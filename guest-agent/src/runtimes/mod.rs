//! Installable runtimes: bundles and their daemons.

use std::net::Ipv4Addr;
use std::sync::Arc;

use dhow_parent::{Exit, ParentLink, SpawnedChild};
use dhow_protocol::bundle::BundleOffer;
use dhow_protocol::control::{DaemonStatus, Event};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::broadcast;

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
    /// Where changes of the daemons' states are told.
    pub events: broadcast::Sender<Event>,
}

/// The installed bundles and their daemons.
pub struct Runtimes {}

impl Runtimes {
    /// Takes over what an earlier worker left.
    pub async fn start(_setup: Setup) -> Arc<Self> {
        Arc::new(Self {})
    }

    /// A child of PID 1 has ended; another's child is ignored.
    pub fn exited(&self, _exit: &Exit) {}

    /// Serves one `Bundle` stream to its end.
    pub async fn receive<S: AsyncRead + AsyncWrite + Unpin + Send>(&self, _offer: BundleOffer, _stream: S) {}

    /// Starts a bundle's daemons and waits until they answer.
    ///
    /// # Errors
    /// For a person.
    pub async fn start_runtime(&self, _name: &str) -> Result<(), String> {
        Err("not there".to_owned())
    }

    /// Stops a bundle's daemons.
    ///
    /// # Errors
    /// For a person.
    pub async fn stop_runtime(&self, _name: &str) -> Result<(), String> {
        Err("not there".to_owned())
    }

    /// Stops all daemons, in the reverse order of their start; containers end with them.
    pub async fn stop_all(&self) {}

    /// The daemons' states.
    #[must_use]
    pub fn statuses(&self) -> Vec<DaemonStatus> {
        Vec::new()
    }
}
