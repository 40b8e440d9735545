//! Shares: a file server on the host, a session stream, a mount in the guest; kept for as long as the VM
//! runs.
//!
//! ```text
//!   server dead? ─► a new one ─► a session: stream to the guest, its host end to the server ─► mounted?
//!        ▲                                                                                        │
//!        └───────── the server dies, the stream ends, or the agent is a new one ◄─────────────────┘
//! ```
//! The mount in the guest waits meanwhile: its requests are sent again on the next session.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use dhow_parent::{ParentError, SpawnedChild};
use dhow_protocol::control::{ControlRequest, MountRequest};
use dhow_protocol::stream::StreamHeader;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

use super::control::RequestError;
use super::guest::OpenError;
use super::healing::Pause;
use super::processes::{ProcessError, ended, file_server_name, has_ended};
use super::record::ShareRecord;
use super::vm::Vm;
use crate::api::MountReport;

/// How long a guest may take to mount one share.
const MOUNT_DEADLINE: Duration = Duration::from_secs(30);

/// Why a share is not mounted.
#[derive(Debug, thiserror::Error)]
enum ShareError {
    /// Its file server is not there.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// No session with the guest.
    #[error("no session for the share")]
    Open(#[from] OpenError),
    /// The guest did not mount it.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The keeper did not take an fd.
    #[error(transparent)]
    Parent(#[from] ParentError),
    /// A socket could not be made or used.
    #[error("the session could not be handed to the file server")]
    Socket(#[from] io::Error),
}

/// A file server and the socket over which it is given sessions.
pub struct Server {
    /// The process.
    pub child: SpawnedChild,
    /// The socket.
    pub control: OwnedFd,
}

/// A session that is under way.
struct Session {
    /// The server's end of the stream, watched for its end and never read.
    stream: AsyncFd<OwnedFd>,
}

/// Keeps one share mounted; `server` is the one that there is, if any. `first` is told when the first
/// attempt has ended, well or not.
pub async fn keep(vm: Arc<Vm>, share: ShareRecord, mut server: Option<Server>, first: oneshot::Sender<()>) {
    let topic = format!("share {}", share.number);
    let mut first = Some(first);
    let mut pause = Pause::new(Duration::from_millis(50), Duration::from_secs(5));
    loop {
        let mounted = mount(&vm, &share, &mut server).await;
        let problem = mounted.as_ref().err().map(|error| crate::errors::chain(error));
        report(&vm, &share, problem.clone());
        vm.state.problem(
            &topic,
            problem.map(|problem| format!("{} is not mounted: {problem}", share.path.display())),
        );
        if let Some(first) = first.take() {
            // Nobody waits for the shares of an adopted VM.
            let _ = first.send(());
        }
        match &mounted {
            Ok(session) => {
                pause.reset();
                until_lost(&vm, session, server.as_ref()).await;
                tracing::info!(share = share.number, "the file session has ended");
            }
            // It will not say otherwise before something has changed.
            Err(ShareError::Request(RequestError::Guest(_))) => vm.guest.renewed().await,
            Err(_) => pause.wait().await,
        }
    }
}

async fn mount(vm: &Vm, share: &ShareRecord, server: &mut Option<Server>) -> Result<Session, ShareError> {
    let server = match server {
        Some(server) if !has_ended(&server.child.pidfd) => server,
        _ => server.insert(start_server(vm, share).await?),
    };
    let session = open_session(vm, share, server.control.as_fd()).await?;
    let path = share.path.display().to_string();
    let request = MountRequest { share: share.number, path, read_only: share.read_only };
    vm.guest.request(ControlRequest::Mount(request), MOUNT_DEADLINE).await?;
    Ok(session)
}

async fn start_server(vm: &Vm, share: &ShareRecord) -> Result<Server, ShareError> {
    let (control, theirs) = pair(SocketType::SEQPACKET)?;
    let child = vm.processes().file_server(share.number, &share.spec(), theirs).await?;
    // So that a later supervisor can hand this server a session, too.
    vm.link.hold(&file_server_name(share.number), control.as_fd()).await?;
    Ok(Server { child, control })
}

async fn open_session(
    vm: &Vm,
    share: &ShareRecord,
    server: std::os::fd::BorrowedFd<'_>,
) -> Result<Session, ShareError> {
    let (device_end, server_end) = pair(SocketType::STREAM)?;
    let header = StreamHeader::Files { share: share.number, session: share.session };
    vm.guest.opener.open_with(&header, device_end).await?;
    crate::fileserver::hand_over(server, server_end.as_fd())?;
    // Priority data never comes: only the stream's end wakes this task, not its traffic.
    // SAFETY: the fd is owned by the AsyncFd and never taken out or replaced while it lives.
    let stream = unsafe { AsyncFd::register_with_interest(server_end, Interest::PRIORITY) };
    Ok(Session { stream: stream.map_err(io::Error::from)? })
}

/// Waits until the session is of no use any more.
async fn until_lost(vm: &Vm, session: &Session, server: Option<&Server>) {
    let dead = async {
        match server {
            Some(server) => ended(&server.child.pidfd).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = dead => {}
        _ = session.stream.ready(Interest::PRIORITY) => {}
        () = vm.guest.renewed() => {}
    }
}

fn report(vm: &Vm, share: &ShareRecord, problem: Option<String>) {
    let report = MountReport {
        path: share.path.clone(),
        read_only: share.read_only,
        mounted: problem.is_none(),
        problem,
    };
    vm.state.learn(|facts| match facts.mounts.iter_mut().find(|mount| mount.path == report.path) {
        Some(mount) => *mount = report,
        None => facts.mounts.push(report),
    });
}

fn pair(kind: SocketType) -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[tokio::test]
    async fn a_session_wakes_at_its_end_and_not_at_traffic() {
        let (device_end, server_end) = pair(SocketType::STREAM).unwrap();
        let copy = server_end.try_clone().unwrap();
        // SAFETY: the fd is owned by the AsyncFd.
        let stream = unsafe { AsyncFd::register_with_interest(server_end, Interest::PRIORITY) }.unwrap();
        let (mut device, mut server) = (UnixStream::from(device_end), UnixStream::from(copy));
        device.write_all(b"request").unwrap();
        server.write_all(b"reply").unwrap();
        let mut said = [0; 7];
        server.read_exact(&mut said).unwrap();
        let traffic = tokio::time::timeout(Duration::from_millis(50), stream.ready(Interest::PRIORITY));
        assert!(traffic.await.is_err());
        drop(device);
        assert!(stream.ready(Interest::PRIORITY).await.unwrap().ready().is_read_closed());
    }
}
