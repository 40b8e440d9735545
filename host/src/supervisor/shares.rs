//! Shares: a file server on the host, a session stream, a mount in the guest.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use dhow_parent::ParentError;
use dhow_protocol::control::{ControlRequest, MountRequest};
use dhow_protocol::stream::StreamHeader;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::control::RequestError;
use super::guest::{Guest, OpenError};
use super::processes::{ProcessError, Processes};
use crate::api::MountReport;
use crate::config::MountSpec;

/// How long a guest may take to mount one share.
const MOUNT_DEADLINE: Duration = Duration::from_secs(30);

/// Why a share is not mounted.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
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

/// Serves and mounts one share; the report says how it ended.
pub async fn mount(processes: &Processes<'_>, guest: &Guest, number: u32, share: &MountSpec) -> MountReport {
    let problem = match try_mount(processes, guest, number, share).await {
        Ok(()) => None,
        Err(error) => Some(crate::errors::chain(&error)),
    };
    MountReport { path: share.path.clone(), read_only: share.read_only, mounted: problem.is_none(), problem }
}

async fn try_mount(
    processes: &Processes<'_>,
    guest: &Guest,
    number: u32,
    share: &MountSpec,
) -> Result<(), ShareError> {
    let (ours, theirs) = pair(SocketType::SEQPACKET)?;
    processes.file_server(number, share, theirs).await?;
    // Held, so that a later supervisor can hand this server a session, too.
    processes.link.hold(&format!("file-server-{number}"), ours.as_fd()).await?;
    let mut session = [0; 16];
    getrandom::fill(&mut session).map_err(|error| io::Error::other(error.to_string()))?;
    let (device_end, server_end) = pair(SocketType::STREAM)?;
    let header = StreamHeader::Files { share: number, session };
    guest.opener.open_with(&header, device_end).await?;
    crate::fileserver::hand_over(ours.as_fd(), server_end.as_fd())?;
    let request =
        MountRequest { share: number, path: share.path.display().to_string(), read_only: share.read_only };
    guest.control.request(ControlRequest::Mount(request), MOUNT_DEADLINE).await?;
    Ok(())
}

fn pair(kind: SocketType) -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?)
}
