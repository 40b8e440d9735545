//! What runs for as long as the guest does: docker.sock, port forwards, names, events, the clock.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use dhow_protocol::control::{ControlRequest, DaemonState, Event};
use dhow_protocol::stream::StreamHeader;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::guest::{Guest, Opener};
use super::state::State;
use crate::forward::{self, Forwards};

/// The guest's docker socket.
const DOCKER_SOCKET: &str = "/run/docker.sock";
/// How long until an ended stream is opened again.
const REOPEN: Duration = Duration::from_millis(500);
/// How often the guest is told the time; it slews in between.
const CLOCK_PERIOD: Duration = Duration::from_secs(10);
/// How long the guest may take to answer that it lives.
const PING_DEADLINE: Duration = Duration::from_secs(15);

impl forward::Opener for Opener {
    async fn open(&self, header: StreamHeader, fd: OwnedFd) -> Result<(), String> {
        self.open_with(&header, fd).await.map_err(|error| crate::errors::chain(&error))
    }
}

/// Nanoseconds since 1970.
pub fn unix_nanos() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Starts the services that need only the agent. Dropping the set ends them.
pub fn start(
    state: &Arc<State>,
    guest: &Arc<Guest>,
    forwards: &Arc<Forwards>,
    events: mpsc::Receiver<Event>,
) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    tasks.spawn(follow_events(Arc::clone(state), events));
    tasks.spawn(tell_time(Arc::clone(state), Arc::clone(guest)));
    tasks.spawn(watch_control(Arc::clone(state), Arc::clone(guest)));
    tasks.spawn(serve_names(guest.opener.clone()));
    tasks.spawn(follow_ports(guest.opener.clone(), Arc::clone(forwards)));
    tasks
}

/// Adds docker.sock, once docker answers.
pub fn serve_docker(tasks: &mut JoinSet<()>, listener: tokio::net::UnixListener, guest: &Guest) {
    tasks.spawn(forward::serve_unix(listener, DOCKER_SOCKET.to_owned(), guest.opener.clone()));
}

async fn follow_events(state: Arc<State>, mut events: mpsc::Receiver<Event>) {
    while let Some(event) = events.recv().await {
        match event {
            Event::Daemon(status) => {
                let failure = match &status.state {
                    DaemonState::Failed(reason) => Some(format!("{} has failed: {reason}", status.name)),
                    _ => None,
                };
                tracing::info!(?status, "daemon");
                state.learn_daemon(status);
                if failure.is_some() {
                    state.problem(failure);
                }
            }
            Event::Warning(text) => tracing::warn!(?text, "the guest warns"),
        }
    }
}

/// Tells the guest the time, and learns from it whether the guest answers.
async fn tell_time(state: Arc<State>, guest: Arc<Guest>) {
    let mut silent = false;
    loop {
        let request = ControlRequest::SetClock { unix_nanos: unix_nanos() };
        match guest.control.request(request, PING_DEADLINE).await {
            Ok(_) if silent => {
                silent = false;
                state.problem(None);
            }
            Ok(_) => {}
            Err(error) => {
                silent = true;
                state.problem(Some(crate::errors::chain(&error)));
            }
        }
        tokio::time::sleep(CLOCK_PERIOD).await;
    }
}

async fn watch_control(state: Arc<State>, guest: Arc<Guest>) {
    guest.control.lost().await;
    state.problem(Some("the connection to the guest's agent is lost".to_owned()));
}

async fn serve_names(opener: Opener) {
    loop {
        match opener.open_here(&StreamHeader::Dns).await {
            Ok(stream) => {
                let ended = forward::serve_dns(stream).await;
                tracing::info!(?ended, "the stream of name queries ended");
            }
            Err(error) => tracing::warn!(error = crate::errors::chain(&error), "no stream of name queries"),
        }
        tokio::time::sleep(REOPEN).await;
    }
}

async fn follow_ports(opener: Opener, forwards: Arc<Forwards>) {
    loop {
        match opener.open_here(&StreamHeader::Ports).await {
            Ok(mut stream) => {
                let ended = forwards.serve(&mut stream, &opener).await;
                tracing::info!(?ended, "the stream of listeners ended");
            }
            Err(error) => tracing::warn!(error = crate::errors::chain(&error), "no stream of listeners"),
        }
        tokio::time::sleep(REOPEN).await;
    }
}
