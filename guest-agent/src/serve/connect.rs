//! Connects to a forward's target in the guest.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use dhow_protocol::hello::Status;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, timeout, timeout_at};

use super::stream::Stream;

/// How long a target may take; the host gives up after 15 s.
const DEADLINE: Duration = Duration::from_secs(10);
/// How long a target is asked again that refuses: dockerd's rules come some time after its port shows,
/// and a server that has just been started may not listen yet.
const REFUSED_FOR: Duration = Duration::from_secs(1);
/// Between two of these.
const RETRY: Duration = Duration::from_millis(15);
/// How long the first attempt may go unanswered before a new one is made; doubled each time. A SYN
/// that is dropped while dockerd changes its rules would be sent again only after a second.
const FIRST_ATTEMPT: Duration = Duration::from_millis(50);

/// Why there is no connection: what the host is told.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub status: Status,
    pub detail: String,
}

/// Connects to a TCP endpoint of the root namespace.
///
/// # Errors
/// As the target says, or that it says nothing.
pub(super) async fn tcp(target: SocketAddr) -> Result<Stream, Refusal> {
    let connected = persist(|| TcpStream::connect(target)).await.and_then(|stream| {
        stream.set_nodelay(true)?;
        Stream::new(OwnedFd::from(stream.into_std()?))
    });
    connected.map_err(|error| refusal(&error, &target.to_string()))
}

/// Connects to a unix socket.
///
/// # Errors
/// As [`tcp`].
pub(super) async fn unix(path: &str) -> Result<Stream, Refusal> {
    let connected = persist(|| UnixStream::connect(path))
        .await
        .and_then(|stream| Stream::new(OwnedFd::from(stream.into_std()?)));
    connected.map_err(|error| refusal(&error, path))
}

fn refusal(error: &io::Error, target: &str) -> Refusal {
    let (status, reason) = match error.kind() {
        io::ErrorKind::ConnectionRefused => (Status::Refused, "it refuses".to_owned()),
        io::ErrorKind::NotFound => (Status::NotFound, "there is no such socket".to_owned()),
        io::ErrorKind::InvalidInput => (Status::Malformed, "it is no address".to_owned()),
        io::ErrorKind::TimedOut => (Status::Failed, "it does not answer".to_owned()),
        io::ErrorKind::WouldBlock => (Status::Busy, "its backlog is full".to_owned()),
        _ => (Status::Failed, error.to_string()),
    };
    Refusal { status, detail: format!("cannot connect to {target} in the guest: {reason}") }
}

/// Tries again while the target refuses, and anew while it does not answer.
async fn persist<T, F>(connect: impl Fn() -> F) -> io::Result<T>
where
    F: Future<Output = io::Result<T>>,
{
    let start = Instant::now();
    let mut patience = FIRST_ATTEMPT;
    loop {
        let attempt = async { timeout(patience, connect()).await };
        let error = match timeout_at(start + DEADLINE, attempt).await {
            Err(_) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(Err(_)) => {
                patience *= 2;
                continue;
            }
            Ok(Ok(Ok(connected))) => return Ok(connected),
            Ok(Ok(Err(error))) => error,
        };
        // A unix socket says EAGAIN when its backlog is full (unix(7)).
        let passing = matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::WouldBlock);
        if !passing || start.elapsed() >= REFUSED_FOR {
            return Err(error);
        }
        tokio::time::sleep(RETRY).await;
    }
}
