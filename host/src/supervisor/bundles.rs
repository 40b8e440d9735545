//! Bundles: offer one to the guest, send what it lacks, start its daemons.

use std::io;
use std::path::Path;
use std::time::Duration;

use dhow_protocol::bundle::{BundleAnswer, BundleOffer, BundleResult};
use dhow_protocol::codec::{self, CONTROL_LIMIT, CodecError};
use dhow_protocol::control::ControlRequest;
use dhow_protocol::stream::StreamHeader;
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::control::RequestError;
use super::guest::{Guest, OPEN_DEADLINE, OpenError};

/// How long the guest may take for one step of an installation, or without taking a byte.
const STEP_DEADLINE: Duration = Duration::from_secs(120);
/// How long daemons may take to answer: emulation is slow.
const START_DEADLINE: Duration = Duration::from_secs(480);
/// Bytes read and sent at once.
const CHUNK: usize = 256 << 10;

/// Why a runtime is not there.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The bundle could not be read.
    #[error("the bundle {0} cannot be read")]
    Read(std::path::PathBuf, #[source] io::Error),
    /// No stream for it.
    #[error("the bundle cannot be sent to the guest")]
    Open(#[from] OpenError),
    /// The stream failed.
    #[error("the guest ended the transfer of the bundle")]
    Stream(#[source] CodecError),
    /// No progress.
    #[error("the guest took nothing of the bundle for {} s", STEP_DEADLINE.as_secs())]
    Stalled,
    /// The guest could not install it.
    #[error("the guest could not install the bundle: {0}")]
    Refused(String),
    /// Its daemons did not start.
    #[error("the daemons did not start")]
    Start(#[source] RequestError),
}

/// Installs the bundle in `file` where the guest lacks it. True when it was sent.
///
/// # Errors
/// As [`BundleError`] says.
pub async fn install(guest: &Guest, offer: BundleOffer, file: &Path) -> Result<bool, BundleError> {
    let size = offer.size;
    let mut stream = guest.opener.open_here(&StreamHeader::Bundle(offer), OPEN_DEADLINE).await?;
    let sent = match receive::<BundleAnswer>(&mut stream).await? {
        BundleAnswer::Have => false,
        BundleAnswer::Send { offset } if offset <= size => {
            send(&mut stream, file, offset, size).await?;
            true
        }
        BundleAnswer::Send { offset } => {
            return Err(BundleError::Refused(format!("it wants byte {offset} of {size}")));
        }
    };
    receive::<BundleResult>(&mut stream).await?.map_err(BundleError::Refused)?;
    Ok(sent)
}

/// Starts the daemons of an installed bundle; returns when all answer.
///
/// # Errors
/// As [`BundleError::Start`] says.
pub async fn start(guest: &Guest, name: &str) -> Result<(), BundleError> {
    let request = ControlRequest::StartRuntime { name: name.to_owned() };
    guest.request(request, START_DEADLINE).await.map_err(BundleError::Start).map(drop)
}

async fn receive<T: bincode::Decode<()>>(stream: &mut UnixStream) -> Result<T, BundleError> {
    tokio::time::timeout(STEP_DEADLINE, codec::read_frame(stream, CONTROL_LIMIT))
        .await
        .map_err(|_| BundleError::Stalled)?
        .map_err(BundleError::Stream)?
        .ok_or(BundleError::Stream(CodecError::Truncated))
}

async fn send(stream: &mut UnixStream, file: &Path, offset: u64, size: u64) -> Result<(), BundleError> {
    let read_error = |error| BundleError::Read(file.to_owned(), error);
    let mut source = tokio::fs::File::open(file).await.map_err(read_error)?;
    source.seek(io::SeekFrom::Start(offset)).await.map_err(read_error)?;
    let mut source = source.take(size - offset);
    let mut chunk = vec![0; CHUNK];
    loop {
        let read = source.read(&mut chunk).await.map_err(read_error)?;
        if read == 0 {
            return Ok(());
        }
        tokio::time::timeout(STEP_DEADLINE, stream.write_all(&chunk[..read]))
            .await
            .map_err(|_| BundleError::Stalled)?
            .map_err(|error| BundleError::Stream(CodecError::Io(error)))?;
    }
}
