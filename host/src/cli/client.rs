//! The command's side of the API: connect, ask, follow, each with a deadline and a reason when it passes.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use dhow_protocol::codec::{self, CodecError};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::net::UnixStream;

use super::diagnosis;
use super::errors::{CommandError, invocation};
use crate::api::{API_LIMIT, ApiReply, ApiRequest, StatusReport};
use crate::config::Paths;
use crate::keeper;
use crate::supervisor::has_ended;

/// How long an answer may take. The supervisor itself waits up to 7 s for the guest's words.
pub const ANSWER_DEADLINE: Duration = Duration::from_secs(10);
/// How long the guest may take to begin a stream.
pub const OPEN_DEADLINE: Duration = Duration::from_secs(13);
/// How long a stream of progress may be silent until the supervisor is asked whether it lives. With
/// [`ANSWER_DEADLINE`] it is below 15 s.
const HEARTBEAT: Duration = Duration::from_secs(4);
/// Between attempts to reach a keeper that another command is starting.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// Once the sockets are gone, the keeper itself has only to exit.
const LAST_BREATH: Duration = Duration::from_millis(500);

/// A connection to a profile's supervisor.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    paths: Paths,
    /// Whose silence a missing answer is.
    who: &'static str,
}

/// Connects; `None` where nothing runs. Where a VM runs whose keeper and supervisor were killed, it gets
/// new ones first.
///
/// # Errors
/// When the socket is there and cannot be used, or no keeper can be started.
pub async fn connect(paths: &Paths) -> Result<Option<Connection>, CommandError> {
    let deadline = tokio::time::Instant::now() + ANSWER_DEADLINE;
    loop {
        let connection = try_connect(paths).await?;
        let late = tokio::time::Instant::now() >= deadline;
        if connection.is_some() || late || !keeper::vm_runs(paths) {
            return Ok(connection);
        }
        let own = paths.clone();
        let spawning = tokio::task::spawn_blocking(move || keeper::spawn(own.profile(), &own, true));
        match spawning.await {
            Ok(Ok(())) => {}
            // Another command is doing the same.
            Ok(Err(error)) if error.is_locked(paths.profile()) => tokio::time::sleep(LOOK_AGAIN).await,
            Ok(Err(error)) => return Err(error.into()),
            Err(panicked) => {
                return Err(CommandError::system("start the keeper", io::Error::other(panicked)));
            }
        }
    }
}

async fn try_connect(paths: &Paths) -> Result<Option<Connection>, CommandError> {
    let path = paths.api_socket();
    match UnixStream::connect(&path).await {
        Ok(stream) => Ok(Some(Connection { stream, paths: paths.clone(), who: "the supervisor" })),
        // InvalidInput: a path too long for a socket; nobody can listen there.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::InvalidInput
            ) =>
        {
            Ok(None)
        }
        Err(source) => Err(CommandError::Reach { path, source }),
    }
}

/// One request and its one answer.
///
/// # Errors
/// [`CommandError::NotRunning`] where nobody listens, and as [`Connection::reply`].
pub async fn ask(paths: &Paths, request: &ApiRequest) -> Result<ApiReply, CommandError> {
    let (reply, _) = open(paths, request, ANSWER_DEADLINE).await?;
    Ok(reply)
}

/// One request, its first answer, and the connection for what follows.
///
/// # Errors
/// As [`ask`].
pub async fn open(
    paths: &Paths,
    request: &ApiRequest,
    deadline: Duration,
) -> Result<(ApiReply, Connection), CommandError> {
    let mut tries = 0;
    loop {
        let not_running = || CommandError::NotRunning(paths.profile().clone());
        let mut connection = connect(paths).await?.ok_or_else(not_running)?;
        connection.send(request).await?;
        match connection.reply(deadline).await {
            // It was just ending, or is being replaced: in a moment it is clear which.
            Err(CommandError::Gone) if tries < 20 => {
                tries += 1;
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            reply => return Ok((reply?, connection)),
        }
    }
}

/// What the supervisor says of itself; `None` where there is none.
///
/// # Errors
/// As [`Connection::reply`].
pub async fn status(paths: &Paths) -> Result<Option<StatusReport>, CommandError> {
    match open(paths, &ApiRequest::Status, ANSWER_DEADLINE).await {
        Ok((ApiReply::Status(report), _)) => Ok(Some(*report)),
        Ok(_) => Err(CommandError::Kind),
        Err(CommandError::NotRunning(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

impl Connection {
    /// The stream itself, after `Opened`.
    #[must_use]
    pub fn into_stream(self) -> UnixStream {
        self.stream
    }

    /// Sends the request.
    ///
    /// # Errors
    /// [`CommandError::Gone`] where the other side is.
    pub async fn send(&mut self, request: &ApiRequest) -> Result<(), CommandError> {
        if matches!(request, ApiRequest::Exec(_) | ApiRequest::Logs { .. }) {
            self.who = "the VM";
        }
        let sending = codec::write_frame(&mut self.stream, request, API_LIMIT);
        match tokio::time::timeout(ANSWER_DEADLINE, sending).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(CodecError::Io(_))) => Err(CommandError::Gone),
            Ok(Err(error)) => Err(CommandError::Answer(error)),
            Err(_) => Err(self.silent(ANSWER_DEADLINE)),
        }
    }

    /// The next answer, within `deadline`.
    ///
    /// # Errors
    /// `Error` of the supervisor is [`CommandError::Refused`]; no answer [`CommandError::Silent`].
    pub async fn reply(&mut self, deadline: Duration) -> Result<ApiReply, CommandError> {
        let reading = codec::read_frame(&mut self.stream, API_LIMIT);
        match tokio::time::timeout(deadline, reading).await {
            Ok(read) => understand(read),
            Err(_) => Err(self.silent(deadline)),
        }
    }

    /// The next answer of a stream that may be silent for long: meanwhile the supervisor must show
    /// that it lives.
    ///
    /// # Errors
    /// As [`Connection::reply`].
    pub async fn next(&mut self, paths: &Paths) -> Result<ApiReply, CommandError> {
        let reading = codec::read_frame(&mut self.stream, API_LIMIT);
        tokio::pin!(reading);
        loop {
            if let Ok(read) = tokio::time::timeout(HEARTBEAT, &mut reading).await {
                return understand(read);
            }
            if let Err(error) = status(paths).await {
                // It may have said its last word while it was asked.
                return match tokio::time::timeout(Duration::ZERO, &mut reading).await {
                    Ok(read) => understand(read),
                    Err(_) => Err(error),
                };
            }
        }
    }

    fn silent(&self, deadline: Duration) -> CommandError {
        silence(self.who, deadline, &self.paths)
    }
}

/// A deadline that has passed, with the reason where it can be seen.
fn silence(who: &'static str, deadline: Duration, paths: &Paths) -> CommandError {
    let profile = paths.profile();
    let halted = diagnosis::halted(paths);
    let force = format!("`{} stop --force` ends it, as a power cut would", invocation(profile));
    let (reason, hint) = if halted.is_empty() {
        let logs = format!("`{} logs keeper` may say more", invocation(profile));
        (String::new(), format!("{logs}; {force}"))
    } else {
        let problems: Vec<String> = halted.iter().map(diagnosis::Halted::problem).collect();
        let pids: Vec<String> = halted.iter().map(|process| process.pid.to_string()).collect();
        (
            format!(": {}", problems.join(", ")),
            format!("`kill -CONT {}` lets it go on; {force}", pids.join(" ")),
        )
    };
    CommandError::Silent { who, seconds: deadline.as_secs(), reason, hint }
}

fn understand(read: Result<Option<ApiReply>, CodecError>) -> Result<ApiReply, CommandError> {
    match read {
        Ok(Some(ApiReply::Error { message, hint })) => Err(CommandError::Refused { message, hint }),
        Ok(Some(reply)) => Ok(reply),
        Ok(None) | Err(CodecError::Io(_) | CodecError::Truncated) => Err(CommandError::Gone),
        Err(error) => Err(CommandError::Answer(error)),
    }
}

/// Waits until a keeper that is ending has ended, and what it holds with it; whether it has by
/// `deadline`.
pub async fn keeper_ended(paths: &Paths, deadline: Duration) -> bool {
    let processes: Vec<OwnedFd> = diagnosis::pids(paths)
        .into_iter()
        .filter_map(|pid| pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok())
        .collect();
    // Somebody who listens when all of them have ended is the next keeper, which another command has begun.
    let all_ended = || !processes.is_empty() && processes.iter().all(has_ended);
    let closed = async {
        while diagnosis::somebody_listens(paths) && !all_ended() {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    };
    if tokio::time::timeout(deadline, closed).await.is_err() {
        return false;
    }
    let exit = async {
        while !processes.iter().all(has_ended) {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    };
    let _ = tokio::time::timeout(LAST_BREATH, exit).await;
    true
}
