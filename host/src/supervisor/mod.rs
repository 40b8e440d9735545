//! The only place with policy: starts, adopts, heals and stops the others, answers the API.
//!
//! ```text
//!              start::bring_up                      API Stop, SIGTERM, or QEMU ends
//!  Starting ───────────────────► Running ──────────────────────────────────────► Stopping ──► the keeper ends
//!      │ a step fails             ▲  │ something dies or fails
//!      ▼          adopt: a VM runs│  ▼
//!   Failed (told once, then ends) Degraded (`problem` says why) ── healed ──► Running
//! ```
//!
//! `state.rs` is what the API shows, `server.rs` the API. `start.rs` has the steps to a VM that boots,
//! `guest_setup.rs` from there to docker, `adopt.rs` from a dead supervisor's VM, `stop.rs` down,
//! `ending.rs` why it ended. `record.rs` is what a successor must know, `ledger.rs` keeps it. `vm.rs` is
//! a running VM, `healing.rs` brings back what dies in it, `paused.rs` a VM without disk. `processes.rs`
//! is what is spawned, `logs.rs` what that says, `network.rs` the VM's network, `routes.rs` whether it hides another,
//! `guest.rs` the way to the agent, `spares.rs` streams that are opened ahead, `turnstile.rs` who may open one,
//! `first_words.rs` what its client has said already, `leavers.rs` who has left before that, `control.rs` the agent's
//! requests; `shares.rs`, `bundles.rs` and `services.rs` are what is done through it.

mod adopt;
mod bundles;
mod control;
mod ending;
mod first_words;
mod guest;
mod guest_setup;
mod healing;
mod leavers;
mod ledger;
mod logs;
mod names;
mod network;
mod paused;
mod processes;
mod record;
mod routes;
mod server;
mod services;
mod shares;
mod spares;
mod start;
mod state;
mod stop;
mod turnstile;
mod vm;

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dhow_parent::{ParentError, ParentLink, Restored};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::config::{ConfigError, Paths, Profile, ProfileName};
use crate::forward::{Forwards, Kept, Policy};
use crate::keeper;
use adopt::Found;
pub(crate) use ending::last_end;
pub(crate) use processes::has_ended;
pub(crate) use record::Record;
pub(crate) use start::context_file;
use start::{Setup, StartError};
use state::State;
use vm::Running;

/// How long a failed start waits for a command that wants to know why.
const TELL_FAILURE: Duration = Duration::from_secs(10);

/// Why the supervisor could not run at all.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    /// No keeper, or it is gone.
    #[error(transparent)]
    Parent(#[from] ParentError),
    /// The settings are wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The keeper did not hand over what it must hold.
    #[error("the keeper did not hand over {0}")]
    Missing(&'static str),
    /// The keeper is gone, and this process could not take its place.
    #[error("the keeper is gone, and the supervisor cannot take its place")]
    Succession(#[source] io::Error),
    /// A socket or the runtime failed.
    #[error("the supervisor cannot begin")]
    Io(#[from] io::Error),
}

/// The supervisor's own `main`; it ends when the keeper ends it. With `adopt_only` it takes over a VM
/// that runs, and starts none.
///
/// # Errors
/// When it cannot begin.
pub fn main(name: &ProfileName, adopt_only: bool) -> Result<(), SupervisorError> {
    let inherited = dhow_parent::inherited_fds()?;
    raise_descriptors();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(run(name, adopt_only, inherited))
}

/// Each client that waits, and each session over UDP, is a descriptor: the soft limit of most systems is low.
fn raise_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    const WANTED: u64 = 1 << 14;
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let most = maximum.unwrap_or(WANTED).min(WANTED);
    if current.is_some_and(|current| current < most) {
        // It works with fewer, until they are used up.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(most), maximum });
    }
}

/// A held fd as tokio's listener.
fn listener(fds: &mut HashMap<String, OwnedFd>, name: &'static str) -> Result<UnixListener, SupervisorError> {
    let fd = fds.remove(name).ok_or(SupervisorError::Missing(name))?;
    let listener = std::os::unix::net::UnixListener::from(fd);
    listener.set_nonblocking(true)?;
    Ok(UnixListener::from_std(listener)?)
}

async fn run(
    name: &ProfileName,
    adopt_only: bool,
    mut inherited: HashMap<String, OwnedFd>,
) -> Result<(), SupervisorError> {
    let (link, restored) = ParentLink::connect_as_heir(&mut inherited)?;
    let supervisor = Supervisor { link: link.clone(), paths: Paths::new(name)?, adopt_only };
    let ending = AtomicBool::new(false);
    tokio::select! {
        result = supervisor.run(name, restored, &ending) => result,
        () = link.gone() => {
            if ending.load(Ordering::Relaxed) {
                return Ok(());
            }
            // Somebody must hold what the keeper held, and start a supervisor when this one dies.
            tracing::warn!("the keeper is gone: this process takes its place");
            Err(SupervisorError::Succession(keeper::succeed(name, link.estate())))
        }
    }
}

struct Supervisor {
    link: ParentLink,
    paths: Paths,
    adopt_only: bool,
}

impl Supervisor {
    /// Supervises a VM until it has ended. `ending` is set when the keeper is about to end, too.
    async fn run(
        &self,
        name: &ProfileName,
        mut restored: Restored,
        ending: &AtomicBool,
    ) -> Result<(), SupervisorError> {
        let api = listener(&mut restored.fds, keeper::API)?;
        let docker = listener(&mut restored.fds, keeper::DOCKER)?;
        let (kept, changes) = Kept::take(&mut restored.fds);
        let holding = tokio::spawn(services::hold_sockets(self.link.clone(), changes));
        let forwards = Forwards::new(Policy::for_this_process(Vec::new()), kept);
        let state = Arc::new(State::new(self.paths.docker_socket()));
        let (stop, mut stops) = mpsc::channel(1);
        let mut terminate = signal(SignalKind::terminate())?;
        // Before anybody is answered: who asks for a VM that runs must not hear that there is none.
        let found = adopt::find(&self.link, &self.paths, &mut restored, &state).await;
        let serving = tokio::spawn(server::serve(api, Arc::clone(&state), stop));
        let mut asked = async || {
            tokio::select! {
                force = stops.recv() => force.unwrap_or(true),
                _ = terminate.recv() => false,
            }
        };

        let begun = tokio::select! {
            begun = self.begin(name, found, docker, forwards, restored, &state) => begun,
            force = asked() => {
                tracing::info!(?force, "stopped while starting");
                Err(StartError::Interrupted)
            }
        };
        match begun {
            Ok(Begun::Running(mut running)) => {
                state.started();
                let force = tokio::select! {
                    force = asked() => force,
                    reason = running.ended() => {
                        tracing::error!(reason, "the VM has ended");
                        ending::note(&self.paths, Some(&reason));
                        state.problem("vm", Some(reason));
                        true
                    }
                };
                state.stopping();
                stop::take_down(&mut running, force, &state).await;
            }
            Ok(Begun::Stopping(mut running)) => {
                state.stopping();
                stop::take_down(&mut running, false, &state).await;
            }
            Ok(Begun::Ended(reason)) => {
                if let Some(reason) = &reason {
                    tracing::error!(reason, "the VM has ended");
                }
                ending::note(&self.paths, reason.as_deref());
            }
            Err(error) => self.failed(&error, &state).await,
        }
        state.stopped();
        // The connections that wait for `Stopped` get it before this process ends.
        let _ = tokio::time::timeout(Duration::from_secs(1), state.drained()).await;
        serving.abort();
        holding.abort();
        ending.store(true, Ordering::Relaxed);
        self.link.shut_down().await?;
        Ok(())
    }

    /// Takes over a VM that runs, or starts one.
    async fn begin(
        &self,
        name: &ProfileName,
        found: Found,
        docker: UnixListener,
        forwards: Arc<Forwards>,
        restored: Restored,
        state: &Arc<State>,
    ) -> Result<Begun, StartError> {
        match found {
            Found::Vm(orphan) => {
                let stopping = orphan.phase == record::Phase::Stopping;
                let link = self.link.clone();
                let running = orphan.adopt(link, &self.paths, docker, forwards, restored, state).await?;
                Ok(if stopping { Begun::Stopping(running) } else { Begun::Running(running) })
            }
            Found::Ended(reason) => Ok(Begun::Ended(Some(reason))),
            Found::Stopped => Ok(Begun::Ended(None)),
            Found::Nothing if self.adopt_only => {
                Ok(Begun::Ended(Some("the VM ended before it could be taken over".to_owned())))
            }
            Found::Nothing => {
                ending::note(&self.paths, None);
                let profile = Profile::load(name, &self.paths)?;
                let (link, paths) = (self.link.clone(), self.paths.clone());
                let setup = Setup { link, profile, paths, docker, forwards };
                start::bring_up(setup, restored, state).await.map(Begun::Running)
            }
        }
    }

    /// A start that failed: ends what was started, and says why to who waits for it.
    async fn failed(&self, error: &StartError, state: &State) {
        let (message, hint) = (crate::errors::chain(error), error.hint());
        tracing::error!(message, "start failed");
        stop::end_all(&self.paths, &[], state).await;
        ending::note(&self.paths, Some(&message));
        state.failed(message, hint);
        // Nobody may be watching; the log has it then.
        let _ = tokio::time::timeout(TELL_FAILURE, state.failure_told()).await;
    }
}

/// How a supervisor began.
enum Begun {
    /// With a VM whose docker answers, or has answered.
    Running(Running),
    /// With a VM that an earlier supervisor was about to stop.
    Stopping(Running),
    /// With what was left of a VM; with how it ended, where that was not asked for.
    Ended(Option<String>),
}
