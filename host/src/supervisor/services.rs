//! What runs for as long as the VM does: docker.sock, port forwards and their sockets' keeping, the clock.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use dhow_parent::ParentLink;
use dhow_protocol::control::{ControlRequest, DaemonState, DaemonStatus};
use dhow_protocol::stream::StreamHeader;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::guest::{OPEN_DEADLINE, OpenError, Opener};
use super::logs;
use super::names;
use super::paused;
use super::state::State;
use super::vm::Vm;
use crate::forward::rules::Side;
use crate::forward::{self, Change, Forwards, HostServices, Policy, sockets};
use crate::vsock::TransportError;

/// The guest's docker socket.
const DOCKER_SOCKET: &str = "/run/docker.sock";
/// How long until an ended stream is opened again.
pub(super) const REOPEN: Duration = Duration::from_millis(200);
/// How often the guest is told the time; it slews in between.
const CLOCK_PERIOD: Duration = Duration::from_secs(10);
/// How often the sizes of logs are looked at.
const LOG_PERIOD: Duration = Duration::from_secs(10);
/// How soon a guest that was silent is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// How long the guest may take to answer that it lives.
const PING_DEADLINE: Duration = Duration::from_secs(10);

/// Between two lines about a flood.
const TELL_AGAIN: Duration = Duration::from_secs(60);

impl forward::Opener for Opener {
    async fn open(&self, header: StreamHeader, fd: OwnedFd) -> Result<(), String> {
        let opened = self.open_with(&header, fd).await;
        if let Err(error @ (OpenError::Left | OpenError::Transport(TransportError::TooMany))) = &opened {
            tell_of_flood(&header, error);
        }
        opened.map_err(|error| crate::errors::chain(&error))
    }
}

/// Says in the log that connections are refused, once a minute for each of the two reasons: who floods is not to fill it.
fn tell_of_flood(header: &StreamHeader, error: &OpenError) {
    static LAST: Mutex<[Option<Instant>; 2]> = Mutex::new([None; 2]);
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    let last = &mut last[usize::from(matches!(error, OpenError::Left))];
    if last.is_none_or(|last| last.elapsed() >= TELL_AGAIN) {
        *last = Some(Instant::now());
        tracing::warn!(error = crate::errors::chain(error), ?header, "connections are refused");
    }
}

/// Nanoseconds since 1970.
pub fn unix_nanos() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Starts the services that need only the agent. Dropping the set ends them.
pub fn start(tasks: &mut JoinSet<()>, vm: &Arc<Vm>) {
    tasks.spawn(tell_time(Arc::clone(vm)));
    tasks.spawn(names::serve(vm.guest.opener.clone()));
    tasks.spawn(names::tell_search_list(vm.guest.clone()));
    let passages = vm.ledger.record().passages;
    let mut policy = Policy::for_this_process(passages.rules);
    // The host's own servers are there: the guest must not take their place while one is restarted.
    policy.denied.extend(passages.host_ports);
    vm.forwards.follow(policy);
    tasks.spawn(follow_ports(vm.guest.opener.clone(), Arc::clone(&vm.forwards)));
    serve_passages(tasks, vm);
}

/// Starts what the profile's rules for sockets and the host's ports ask for.
fn serve_passages(tasks: &mut JoinSet<()>, vm: &Vm) {
    let passages = vm.ledger.record().passages;
    let services = HostServices::new(&passages);
    if !services.is_empty() {
        tasks.spawn(serve_host(vm.guest.opener.clone(), Arc::new(services)));
    }
    for rule in passages.sockets.into_iter().filter(|rule| rule.listen == Side::Host) {
        match sockets::listen(&rule.host) {
            Ok((listener, name)) => {
                let opener = vm.guest.opener.clone();
                tasks.spawn(async move {
                    let _name = name;
                    forward::serve_unix(listener, rule.guest, opener).await;
                });
            }
            Err(error) => {
                let problem = format!("the socket {} cannot be made: {error}", rule.host.display());
                vm.state.problem(&format!("socket {}", rule.host.display()), Some(problem));
            }
        }
    }
}

async fn serve_host(opener: Opener, services: Arc<HostServices>) {
    loop {
        match opener.open_here(&StreamHeader::HostServices(services.offer()), OPEN_DEADLINE).await {
            Ok(stream) => {
                let ended = forward::serve_host(stream, Arc::clone(&services), opener.clone()).await;
                tracing::info!(?ended, "the stream of the host's services ended");
            }
            Err(error) => tracing::warn!(error = crate::errors::chain(&error), "no stream of services"),
        }
        tokio::time::sleep(REOPEN).await;
    }
}

/// Adds docker.sock, once docker answers.
pub fn serve_docker(tasks: &mut JoinSet<()>, listener: tokio::net::UnixListener, vm: &Vm) {
    tasks.spawn(forward::serve_unix(listener, DOCKER_SOCKET.to_owned(), vm.guest.opener.clone()));
}

/// Has the keeper hold the sockets of forwards, so that they outlive this process. It ends when
/// `changes` does.
pub async fn hold_sockets(link: ParentLink, mut changes: mpsc::UnboundedReceiver<Change>) {
    while let Some(change) = changes.recv().await {
        let held = match &change {
            Change::Hold(name, fd) => link.hold(name, fd.as_fd()).await,
            Change::Release(name) => link.release(name).await,
        };
        if let Err(error) = held {
            // The forward works; only a client that connects while the supervisor is dead is refused.
            tracing::warn!(error = crate::errors::chain(&error), ?change, "the keeper does not follow");
        }
    }
}

/// Notes a daemon's state.
pub fn learn_daemon(state: &State, status: DaemonStatus) {
    let failure = match &status.state {
        DaemonState::Failed(reason) => Some(format!("{} has failed: {reason}", status.name)),
        _ => None,
    };
    tracing::info!(?status, "daemon");
    state.problem(&format!("daemon {}", status.name), failure);
    state.learn_daemon(status);
}

/// Keeps the logs bounded, whether or not the guest answers: it fills its console's as fast as it likes.
pub async fn bound_logs(vm: Arc<Vm>) {
    loop {
        logs::bound(&vm.paths.log_dir());
        tokio::time::sleep(LOG_PERIOD).await;
    }
}

/// Tells the guest the time, and learns from it whether the guest answers.
async fn tell_time(vm: Arc<Vm>) {
    const TOPIC: &str = "silence";
    loop {
        vm.guest.answers().await;
        let request = ControlRequest::SetClock { unix_nanos: unix_nanos() };
        let pause = match vm.guest.request(request, PING_DEADLINE).await {
            Ok(_) => {
                vm.state.problem(TOPIC, None);
                paused::answers(&vm);
                CLOCK_PERIOD
            }
            Err(error) => {
                vm.state.problem(TOPIC, Some(crate::errors::chain(&error)));
                paused::look(&vm).await;
                ASK_AGAIN
            }
        };
        tokio::time::sleep(pause).await;
    }
}

async fn follow_ports(opener: Opener, forwards: Arc<Forwards>) {
    loop {
        match opener.open_here(&StreamHeader::Ports, OPEN_DEADLINE).await {
            Ok(mut stream) => {
                let ended = forwards.serve(&mut stream, &opener).await;
                tracing::info!(?ended, "the stream of listeners ended");
            }
            Err(error) => tracing::warn!(error = crate::errors::chain(&error), "no stream of listeners"),
        }
        tokio::time::sleep(REOPEN).await;
    }
}
