//! The only place with policy: starts and stops the others, answers the API.
//!
//! ```text
//!              start::bring_up                    API Stop, or QEMU ends
//!  Starting ───────────────────► Running ───────────────────────────► Stopping ──► the keeper ends
//!      │ a step fails                │ a daemon or a share fails
//!      ▼                             ▼
//!   Failed (told once, then ends)  Degraded (`problem` says why)
//! ```
//!
//! `state.rs` is what the API shows; `start.rs` the steps up and `stop.rs` down; `network.rs` the VM's network; `processes.rs` what
//! is spawned; `guest.rs` the way to the agent; `control.rs` its requests; `shares.rs`, `bundles.rs`
//! and `services.rs` what is done through it; `server.rs` the API.

mod bundles;
mod control;
mod ending;
mod guest;
mod network;
mod processes;
mod server;
mod services;
mod shares;
mod start;
mod state;
mod stop;

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use dhow_parent::{ParentError, ParentLink};

use crate::config::{ConfigError, Paths, Profile, ProfileName};
use crate::keeper;
pub(crate) use ending::end_file;
pub(crate) use processes::has_ended;
pub(crate) use start::context_file;
use state::State;

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
    /// A socket or the runtime failed.
    #[error("the supervisor cannot begin")]
    Io(#[from] io::Error),
}

/// The supervisor's own `main`; it ends when the keeper ends it.
///
/// # Errors
/// When it cannot begin.
pub fn main(name: &ProfileName) -> Result<(), SupervisorError> {
    let inherited = dhow_parent::inherited_fds()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(run(name, inherited))
}

/// A held fd as tokio's listener.
fn listener(
    fds: &mut HashMap<String, OwnedFd>,
    name: &'static str,
) -> Result<tokio::net::UnixListener, SupervisorError> {
    let fd = fds.remove(name).ok_or(SupervisorError::Missing(name))?;
    let listener = std::os::unix::net::UnixListener::from(fd);
    listener.set_nonblocking(true)?;
    Ok(tokio::net::UnixListener::from_std(listener)?)
}

async fn run(name: &ProfileName, mut inherited: HashMap<String, OwnedFd>) -> Result<(), SupervisorError> {
    let (link, mut restored) = ParentLink::connect(&mut inherited)?;
    let paths = Paths::new(name)?;
    let api = listener(&mut restored.fds, keeper::API)?;
    let docker = listener(&mut restored.fds, keeper::DOCKER)?;
    let state = Arc::new(State::new(paths.docker_socket()));
    let (stop, mut stops) = tokio::sync::mpsc::channel(1);
    let serving = tokio::spawn(server::serve(api, Arc::clone(&state), stop));

    ending::note(&paths, None);
    let profile = Profile::load(name, &paths);
    let mut vm = None;
    let outcome = match profile {
        Err(error) => Err(start::StartError::from(error)),
        Ok(profile) => {
            let setup = start::Setup { link: link.clone(), profile, paths: paths.clone(), docker };
            tokio::select! {
                result = start::bring_up(setup, restored, &state) => result,
                force = stops.recv() => {
                    tracing::info!(?force, "stopped while starting");
                    Err(start::StartError::Interrupted)
                }
            }
        }
    };
    match outcome {
        Ok(started) => {
            state.started();
            let running = vm.insert(started);
            let force = tokio::select! {
                force = stops.recv() => force.unwrap_or(true),
                reason = running.ended() => {
                    ending::note(&paths, Some(&reason));
                    state.problem(Some(reason));
                    true
                }
            };
            state.stopping();
            stop::take_down(running, force, &state).await;
        }
        Err(error) => {
            let (message, hint) = (crate::errors::chain(&error), error.hint());
            tracing::error!(message, "start failed");
            ending::note(&paths, Some(&message));
            state.failed(message, hint);
            // Nobody may be watching; the log has it then.
            let _ = tokio::time::timeout(TELL_FAILURE, state.failure_told()).await;
        }
    }
    state.stopped();
    // The connections that wait for `Stopped` get it before this process ends.
    let _ = tokio::time::timeout(Duration::from_secs(1), state.drained()).await;
    serving.abort();
    link.shut_down().await?;
    Ok(())
}
