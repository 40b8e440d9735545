//! The API: one request a connection, answered from the state or by a stream.

use std::sync::Arc;
use std::time::Duration;

use dhow_protocol::codec;
use dhow_protocol::stream::StreamHeader;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

use super::guest::{Guest, OPEN_DEADLINE};
use super::state::{Snapshot, State};
use crate::api::{API_LIMIT, ApiReply, ApiRequest, StatusReport, VmState};
use dhow_parent::procfs::is_stopped;

/// How long a command may take to send its request.
const REQUEST_DEADLINE: Duration = Duration::from_secs(5);
/// How long `status` waits for the guest's own words.
const INFO_DEADLINE: Duration = Duration::from_secs(5);

/// Serves the API for as long as the supervisor lives. `stop` carries the stops that were asked for.
pub async fn serve(listener: UnixListener, state: Arc<State>, stop: mpsc::Sender<bool>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let (state, stop) = (Arc::clone(&state), stop.clone());
                tokio::spawn(async move {
                    if let Err(error) = connection(stream, &state, &stop).await {
                        tracing::debug!(error = crate::errors::chain(&error), "a command went away");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "the API cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

type Served = Result<(), codec::CodecError>;

async fn reply(stream: &mut UnixStream, reply: &ApiReply) -> Served {
    codec::write_frame(stream, reply, API_LIMIT).await
}

async fn refuse(stream: &mut UnixStream, message: impl Into<String>, hint: Option<&str>) -> Served {
    let error = ApiReply::Error { message: message.into(), hint: hint.map(str::to_owned) };
    reply(stream, &error).await
}

async fn connection(mut stream: UnixStream, state: &State, stop: &mpsc::Sender<bool>) -> Served {
    let same_user = stream.peer_cred().is_ok_and(|peer| {
        let ours = rustix::process::geteuid().as_raw();
        peer.uid() == ours || peer.uid() == 0
    });
    if !same_user {
        return refuse(&mut stream, "this VM belongs to another user", None).await;
    }
    let request = tokio::time::timeout(REQUEST_DEADLINE, codec::read_frame(&mut stream, API_LIMIT));
    let request = match request.await {
        Ok(Ok(Some(request))) => request,
        Ok(Ok(None)) | Err(_) => return Ok(()),
        Ok(Err(error)) => {
            let message = format!("the running supervisor does not understand this command: {error}");
            let hint = "it may be of another version: `dhow restart` brings both to one";
            return refuse(&mut stream, message, Some(hint)).await;
        }
    };
    match request {
        ApiRequest::Status => {
            let report = status(state).await;
            reply(&mut stream, &ApiReply::Status(Box::new(report))).await
        }
        ApiRequest::WatchStart => watch_start(&mut stream, state).await,
        ApiRequest::Stop { force } => watch_stop(&mut stream, state, stop, force).await,
        ApiRequest::Mounts => reply(&mut stream, &ApiReply::Mounts(state.facts().mounts)).await,
        ApiRequest::Ports { watch } => ports(&mut stream, state, watch).await,
        ApiRequest::Exec(start) => open(stream, state, StreamHeader::Exec(start)).await,
        ApiRequest::Logs { source, tail, follow } => {
            open(stream, state, StreamHeader::Logs { source, tail, follow }).await
        }
    }
}

async fn status(state: &State) -> StatusReport {
    let snapshot = state.subscribe().borrow().clone();
    let facts = state.facts();
    let (mut guest_info, mut silence) = (None, None);
    if let Some(guest) = state.guest() {
        match guest.info(INFO_DEADLINE).await {
            Ok(info) => guest_info = Some(info),
            Err(error) => silence = Some(crate::errors::chain(&error)),
        }
    }
    let problem = snapshot.problem().or(silence);
    let state_now = match (snapshot.vm, &problem) {
        (VmState::Running, Some(_)) => VmState::Degraded,
        (vm, _) => vm,
    };
    StatusReport {
        state: state_now,
        problem: problem.or(snapshot.failure.map(|(message, _)| message)),
        acceleration: facts.acceleration,
        cpus: facts.cpus,
        memory_mib: facts.memory_mib,
        disk_gib: facts.disk_gib,
        docker_socket: state.docker_socket.clone(),
        image: facts.image,
        processes: facts.processes,
        daemons: facts.daemons,
        guest: guest_info,
    }
}

/// Sends each step once, past ones first, until `last` says how it ended.
async fn follow(
    stream: &mut UnixStream,
    state: &State,
    last: impl Fn(&Snapshot) -> Option<ApiReply>,
) -> Served {
    let _watcher = state.watcher();
    let mut snapshots = state.subscribe();
    let mut sent = 0;
    loop {
        let snapshot = snapshots.borrow_and_update().clone();
        for step in snapshot.progress.iter().skip(sent) {
            reply(stream, &ApiReply::Progress(step.clone())).await?;
        }
        sent = snapshot.progress.len();
        if let Some(last) = last(&snapshot) {
            return reply(stream, &last).await;
        }
        if snapshots.changed().await.is_err() {
            return Ok(());
        }
    }
}

async fn watch_start(stream: &mut UnixStream, state: &State) -> Served {
    let ended = |snapshot: &Snapshot| match (&snapshot.failure, snapshot.vm) {
        (Some((message, hint)), _) => Some(ApiReply::Error { message: message.clone(), hint: hint.clone() }),
        (None, VmState::Running | VmState::Degraded) => Some(ApiReply::Started),
        (None, VmState::Stopping | VmState::Stopped) => {
            let hint = Some("wait for it, then start again".to_owned());
            Some(ApiReply::Error { message: "the VM is being stopped".to_owned(), hint })
        }
        (None, VmState::Starting) => None,
    };
    follow(stream, state, ended).await?;
    if state.subscribe().borrow().failure.is_some() {
        state.tell_failure();
    }
    Ok(())
}

async fn watch_stop(
    stream: &mut UnixStream,
    state: &State,
    stop: &mpsc::Sender<bool>,
    force: bool,
) -> Served {
    // Full: a stop is under way already, and this command follows it. A failed start ends anyway.
    let _ = stop.try_send(force);
    if state.subscribe().borrow().failure.is_some() {
        state.tell_failure();
    }
    // The start's steps are not this command's.
    let mut snapshots = state.subscribe();
    let _ = snapshots.wait_for(|snapshot| matches!(snapshot.vm, VmState::Stopping | VmState::Stopped)).await;
    follow(stream, state, |snapshot| (snapshot.vm == VmState::Stopped).then_some(ApiReply::Stopped)).await
}

async fn ports(stream: &mut UnixStream, state: &State, watch: bool) -> Served {
    let Some(forwards) = state.forwards() else {
        return reply(stream, &ApiReply::Ports(Vec::new())).await;
    };
    let mut changes = forwards.watch();
    let mut sent = None;
    loop {
        changes.mark_unchanged();
        let now = forwards.reports();
        if sent.as_ref() != Some(&now) {
            reply(stream, &ApiReply::Ports(now.clone())).await?;
            sent = Some(now);
        }
        if !watch || changes.changed().await.is_err() {
            return Ok(());
        }
    }
}

/// Opens a stream whose host side is this very connection.
async fn open(mut stream: UnixStream, state: &State, header: StreamHeader) -> Served {
    let Some(guest) = state.guest() else {
        let hint = Some("`dhow start` shows how far it is");
        return refuse(&mut stream, "the VM is not up yet", hint).await;
    };
    match attach(&mut stream, &guest, &header).await {
        Ok(()) => Ok(()),
        Err(error) => {
            let stopped: Vec<_> =
                state.facts().processes.into_iter().filter(|(_, pid)| is_stopped(*pid)).collect();
            let mut message = crate::errors::chain(&error);
            for (name, pid) in &stopped {
                message.push_str(&format!("; the {name} process {pid} is stopped by a signal"));
            }
            let pids: Vec<String> = stopped.iter().map(|(_, pid)| pid.to_string()).collect();
            let hint = (!pids.is_empty()).then(|| format!("`kill -CONT {}` lets it go on", pids.join(" ")));
            refuse(&mut stream, message, hint.as_deref()).await
        }
    }
}

async fn attach(
    stream: &mut UnixStream,
    guest: &Guest,
    header: &StreamHeader,
) -> Result<(), super::guest::OpenError> {
    use std::os::fd::AsFd;
    let pending = guest.opener.open(header, OPEN_DEADLINE).await?;
    // Before the attachment, after which the guest's bytes follow at once.
    if reply(stream, &ApiReply::Opened).await.is_err() {
        return Ok(());
    }
    let fd = stream.as_fd().try_clone_to_owned()?;
    Ok(pending.attach(fd).await?)
}
