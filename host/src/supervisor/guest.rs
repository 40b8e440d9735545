//! The way to the agent: opens streams with the hello and hands over their host side.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use dhow_protocol::AGENT_PORT;
use dhow_protocol::hello::{Hello, HelloError, HelloReply, REPLY_LEN, Secret};
use dhow_protocol::stream::StreamHeader;
use tokio::net::UnixStream;

use super::control::Control;
use crate::vsock::client::DeviceClient;
use crate::vsock::{OpenRequest, PendingStream, Transport, TransportError};

/// How long the guest may take to answer a hello; a forward's connect is in it.
pub const OPEN_DEADLINE: Duration = Duration::from_secs(15);

/// Why a stream could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The device could not reach the agent.
    #[error("the guest cannot be reached")]
    Transport(#[from] TransportError),
    /// The agent refused, or is not ours.
    #[error(transparent)]
    Hello(#[from] HelloError),
    /// No socket pair or no random numbers on the host.
    #[error("no stream could be made on the host")]
    Host(#[from] io::Error),
}

/// Opens streams to this boot's agent. Clones share the device.
#[derive(Clone)]
pub struct Opener {
    device: DeviceClient,
    secret: Secret,
}

impl Opener {
    /// Opens streams through `device`, proving `secret`.
    #[must_use]
    pub fn new(device: DeviceClient, secret: Secret) -> Self {
        Self { device, secret }
    }

    /// Opens a stream as far as the agent's consent; the host side is attached by the caller.
    ///
    /// # Errors
    /// As [`OpenError`] says; the agent's refusal is [`HelloError::Refused`].
    pub async fn open(&self, header: &StreamHeader, deadline: Duration) -> Result<PendingStream, OpenError> {
        let mut nonce = [0; 32];
        getrandom::fill(&mut nonce).map_err(|error| io::Error::other(error.to_string()))?;
        let preamble = Hello::preamble(&self.secret, nonce, header)?;
        let request = OpenRequest { guest_port: AGENT_PORT, preamble, reply_len: REPLY_LEN, deadline };
        let pending = self.device.open(request).await?;
        HelloReply::parse(pending.reply(), &self.secret, &nonce)?;
        Ok(pending)
    }

    /// Opens a stream whose host side is `fd`, a connected stream socket.
    ///
    /// # Errors
    /// As [`Opener::open`].
    pub async fn open_with(&self, header: &StreamHeader, fd: OwnedFd) -> Result<(), OpenError> {
        Ok(self.open(header, OPEN_DEADLINE).await?.attach(fd).await?)
    }

    /// Opens a stream that this process itself reads and writes.
    ///
    /// # Errors
    /// As [`Opener::open`].
    pub async fn open_here(&self, header: &StreamHeader) -> Result<UnixStream, OpenError> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let ours = UnixStream::from_std(ours)?;
        self.open_with(header, theirs.into()).await?;
        Ok(ours)
    }
}

/// A guest that answers.
pub struct Guest {
    /// Opens further streams.
    pub opener: Opener,
    /// Requests.
    pub control: Control,
}
