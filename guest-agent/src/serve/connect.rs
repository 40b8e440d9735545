//! Connects to a forward's target in the guest.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use dhow_protocol::hello::Status;
use rustix::io::Errno;
use rustix::net::addr::SocketAddrArg;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use tokio::time::{Instant, timeout, timeout_at};

use super::stream::Stream;

/// How long a target may take, that refuses or that says nothing: dockerd's rules come some time after its
/// port shows, a server that has just been started may not listen yet, and a static forward is there before
/// its server. The host waits a little longer.
const DEADLINE: Duration = Duration::from_secs(10);
/// Until a target that refused is asked again; doubled each time …
const FIRST_PAUSE: Duration = Duration::from_millis(5);
/// … up to this.
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// How long the first attempt may go unanswered before a new one is made; doubled each time. A SYN
/// that is dropped while dockerd changes its rules would be sent again only after a second.
const FIRST_ATTEMPT: Duration = Duration::from_millis(50);

/// Why there is no connection: what the host is told.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub status: Status,
    pub detail: String,
}

/// Connects to a TCP endpoint of the root namespace; the socket is non-blocking.
///
/// # Errors
/// As the target says, or that it says nothing.
pub(super) async fn tcp(target: SocketAddr) -> Result<OwnedFd, Refusal> {
    let family = if target.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let connected = persist(DEADLINE, || connect(family, &target)).await.and_then(|socket| {
        sockopt::set_tcp_nodelay(&socket, true)?;
        Ok(socket)
    });
    connected.map_err(|error| refusal(&error, &target.to_string()))
}

/// Connects to a unix socket; it is non-blocking.
///
/// # Errors
/// As [`tcp`].
pub(super) async fn unix(path: &str) -> Result<OwnedFd, Refusal> {
    let connected = match SocketAddrUnix::new(path) {
        Ok(address) => persist(DEADLINE, || connect(AddressFamily::UNIX, &address)).await,
        // Longer than a socket's path can be (unix(7)), or with a NUL.
        Err(_) => Err(io::ErrorKind::InvalidInput.into()),
    };
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

/// Connects once. Within the guest a connection is mostly there when connect(2) returns, which a
/// non-blocking socket learns by asking a second time: the reactor hears of the socket when it carries data.
async fn connect(family: AddressFamily, target: &impl SocketAddrArg) -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    for _ in 0..2 {
        match rustix::net::connect(&socket, target) {
            Ok(()) | Err(Errno::ISCONN) => return Ok(socket),
            Err(Errno::INPROGRESS | Errno::ALREADY) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let stream = Stream::new(socket)?;
    stream.connected().await?;
    Ok(stream.into_fd())
}

/// Tries again while the target refuses, and anew while it does not answer; `deadline` at the most.
async fn persist<T, F>(deadline: Duration, connect: impl Fn() -> F) -> io::Result<T>
where
    F: Future<Output = io::Result<T>>,
{
    let end = Instant::now() + deadline;
    let (mut patience, mut pause) = (FIRST_ATTEMPT, FIRST_PAUSE);
    loop {
        let attempt = async { timeout(patience, connect()).await };
        let error = match timeout_at(end, attempt).await {
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
        if !passing || Instant::now() + pause >= end {
            return Err(error);
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::serve::testing::within;

    fn free() -> SocketAddr {
        TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
    }

    #[tokio::test]
    async fn a_listener_is_reached_and_nagle_is_off() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else { continue };
            let socket = within(tcp(listener.local_addr().unwrap())).await.unwrap();
            let (_, client) = listener.accept().unwrap();
            assert!(sockopt::tcp_nodelay(&socket).unwrap());
            Stream::new(socket).unwrap().try_write(b"x").unwrap();
            assert!(client.ip().is_loopback());
        }
    }

    #[tokio::test]
    async fn who_listens_later_is_reached_later() {
        let address = free();
        let listening = async {
            // After some refusals.
            tokio::time::sleep(FIRST_PAUSE * 4).await;
            TcpListener::bind(address).unwrap()
        };
        let (socket, listener) = within(async { tokio::join!(tcp(address), listening) }).await;
        socket.unwrap();
        listener.accept().unwrap();
    }

    #[tokio::test]
    async fn a_refusal_is_told_in_the_end() {
        let address = free();
        let family = AddressFamily::INET;
        let error = persist(FIRST_PAUSE * 3, || connect(family, &address)).await.unwrap_err();
        assert_eq!(refusal(&error, "it").status, Status::Refused);
    }

    #[tokio::test]
    async fn paths_that_are_no_socket() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let long = "/x".repeat(200);
        for (path, status) in [
            (path.to_str().unwrap(), Status::NotFound),
            (long.as_str(), Status::Malformed),
            ("/with\0nul", Status::Malformed),
        ] {
            assert_eq!(within(unix(path)).await.unwrap_err().status, status, "{path}");
        }
        let listener = UnixListener::bind(&path).unwrap();
        within(unix(path.to_str().unwrap())).await.unwrap();
        listener.accept().unwrap();
    }
}
