//! What each control request does.

use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dhow_parent::ParentLink;
use dhow_protocol::control::{ControlError, ControlRequest, ControlResponse, GuestInfo};
use dhow_protocol::errors::chain;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::clock::Clock;
use super::control::Handler;
use super::info;
use crate::mounts::Mounts;
use crate::resolv_conf;
use crate::runtimes::Runtimes;

/// How long the answer to a power-off may take on its way.
const ANSWER_DEADLINE: Duration = Duration::from_secs(1);
/// How long the daemons may take to stop; they keep to a bound of their own below it.
const STOP_DEADLINE: Duration = Duration::from_secs(40);
/// How long the shares may take to be unmounted.
const UNMOUNT_DEADLINE: Duration = Duration::from_secs(5);

/// Fulfils requests.
pub(super) struct Requests {
    pub(super) link: ParentLink,
    pub(super) runtimes: Arc<Runtimes>,
    pub(super) mounts: Arc<Mounts>,
    pub(super) clock: Clock,
    /// Who answers the guest's name queries; none without a network.
    pub(super) name_server: Option<Ipv4Addr>,
    pub(super) powering_off: AtomicBool,
}

impl Handler for Requests {
    async fn handle(
        &self,
        request: ControlRequest,
        answered: oneshot::Receiver<()>,
    ) -> Result<ControlResponse, ControlError> {
        let done = match request {
            ControlRequest::Ping => return Ok(ControlResponse::Pong),
            ControlRequest::Info => return Ok(ControlResponse::Info(self.info())),
            ControlRequest::SetClock { unix_nanos } => self
                .clock
                .follow(unix_nanos)
                .map_err(|error| format!("cannot set the guest's clock: {error}")),
            ControlRequest::Mount(request) => self.mounts.mount(request).await,
            ControlRequest::Unmount { share } => self.mounts.unmount(share).await,
            ControlRequest::StartRuntime { name } => self.runtimes.start_runtime(&name).await,
            ControlRequest::StopRuntime { name } => self.runtimes.stop_runtime(&name).await,
            ControlRequest::PowerOff => {
                self.power_off(answered);
                Ok(())
            }
            ControlRequest::SetSearch(search) => resolv_conf::write(self.name_server, &search)
                .map_err(|error| format!("cannot write {}: {error}", resolv_conf::PATH)),
        };
        done.map(|()| ControlResponse::Done).map_err(ControlError::Failed)
    }
}

impl Requests {
    fn info(&self) -> GuestInfo {
        GuestInfo {
            agent: env!("CARGO_PKG_VERSION").to_owned(),
            kernel: info::kernel(),
            uptime_ms: u64::try_from(info::uptime().as_millis()).unwrap_or(u64::MAX),
            daemons: self.runtimes.statuses(),
            mounts: self.mounts.paths(),
            memory: info::memory(),
            disk: info::disk(Path::new(info::DATA)),
        }
    }

    /// Goes on in a task of its own: the control stream may end meanwhile.
    fn power_off(&self, answered: oneshot::Receiver<()>) {
        if self.powering_off.swap(true, Ordering::Relaxed) {
            return;
        }
        let (link, runtimes, mounts) =
            (self.link.clone(), Arc::clone(&self.runtimes), Arc::clone(&self.mounts));
        tokio::spawn(async move {
            // Whether or not the host learns of it.
            let _ = timeout(ANSWER_DEADLINE, answered).await;
            tracing::info!("powering off");
            if timeout(STOP_DEADLINE, runtimes.stop_all()).await.is_err() {
                tracing::warn!("the daemons did not stop in time: PID 1 ends them");
            }
            if timeout(UNMOUNT_DEADLINE, mounts.unmount_all()).await.is_err() {
                tracing::warn!("the shares were not unmounted in time");
            }
            if let Err(error) = link.shut_down().await {
                tracing::error!(error = chain(&error), "PID 1 cannot be told to power off");
            }
        });
    }
}
