//! Receiving an image: from the stream into a partial file that is hashed on the way, resumed where
//! an earlier transfer broke off.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::path::Path;
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::mpsc;

use super::store::Digest;
use super::text::mebibytes;

/// Bytes that travel at once from the stream to the disk.
const CHUNK: usize = 256 << 10;
/// Chunks that may wait for the disk.
const QUEUE: usize = 4;
/// How long the host may send nothing.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why an image was not received.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The host or the stream went away; what has come is kept.
    #[error("the transfer broke off")]
    Stream(#[source] io::Error),
    /// The disk is full.
    #[error(
        "the guest's data disk is full: the bundle of {} does not fit; remove what is not needed, or enlarge \
         the disk",
        mebibytes(*.size)
    )]
    Full {
        /// Of the bundle, in bytes.
        size: u64,
    },
    /// The disk failed.
    #[error("the bundle cannot be written to the guest's data disk")]
    Write(#[source] io::Error),
    /// Other bytes than were offered.
    #[error("the bundle's SHA-256 is {got}, not {wanted} as offered; it was discarded")]
    Digest {
        /// Of what came.
        got: Digest,
        /// Of what was offered.
        wanted: Digest,
    },
}

impl ReceiveError {
    /// Whether what has come so far may be gone on with.
    #[must_use]
    pub fn is_resumable(&self) -> bool {
        matches!(self, Self::Stream(_))
    }
}

/// Receives the bytes from `offset` on of an image of `size` bytes into the file `part`, which holds
/// those before. When it returns without an error the file is whole, verified, and written back.
///
/// When the disk fails, the rest is taken from the stream nevertheless: the host reads the reason
/// only after it has sent everything.
///
/// # Errors
/// As [`ReceiveError`] says.
pub async fn receive<S>(
    stream: &mut S,
    part: &Path,
    offset: u64,
    size: u64,
    wanted: Digest,
) -> Result<(), ReceiveError>
where
    S: AsyncRead + Unpin,
{
    let (chunks, queue) = mpsc::channel(QUEUE);
    let path = part.to_owned();
    let writing = tokio::task::spawn_blocking(move || write(&path, offset, size, queue));
    let transferred = transfer(stream, size - offset, &chunks).await;
    drop(chunks);
    let written = writing.await.unwrap_or_else(|panic| Err(io::Error::other(panic)));
    transferred.map_err(ReceiveError::Stream)?;
    let got = written.map_err(|error| match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ReceiveError::Full { size },
        _ => ReceiveError::Write(error),
    })?;
    if got == wanted { Ok(()) } else { Err(ReceiveError::Digest { got, wanted }) }
}

/// Takes `left` bytes from the stream; what the writer no longer wants is dropped.
async fn transfer<S>(stream: &mut S, mut left: u64, chunks: &mpsc::Sender<Vec<u8>>) -> io::Result<()>
where
    S: AsyncRead + Unpin,
{
    while left > 0 {
        let length = usize::try_from(left).map_or(CHUNK, |left| left.min(CHUNK));
        let mut chunk = Vec::with_capacity(length);
        let mut limited = (&mut *stream).take(length as u64);
        while chunk.len() < length {
            let read = tokio::time::timeout(PATIENCE, limited.read_buf(&mut chunk))
                .await
                .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))
                .flatten();
            match read {
                Ok(0) => return broken_off(chunks, chunk, io::ErrorKind::UnexpectedEof.into()).await,
                Ok(_) => {}
                Err(error) => return broken_off(chunks, chunk, error).await,
            }
        }
        left -= length as u64;
        // The writer has failed; its reason is told at the end.
        let _ = chunks.send(chunk).await;
    }
    Ok(())
}

/// What has come is kept, to the last byte.
async fn broken_off(chunks: &mpsc::Sender<Vec<u8>>, chunk: Vec<u8>, error: io::Error) -> io::Result<()> {
    // As in `transfer`.
    let _ = chunks.send(chunk).await;
    Err(error)
}

/// Hashes what the file has, appends what comes, and writes it back when it is whole.
fn write(path: &Path, offset: u64, size: u64, mut queue: mpsc::Receiver<Vec<u8>>) -> io::Result<Digest> {
    let mut file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
    file.set_len(offset)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    let mut have = 0;
    file.rewind()?;
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            read => {
                hash.update(&buffer[..read]);
                have += read as u64;
            }
        }
    }
    while let Some(chunk) = queue.blocking_recv() {
        file.write_all(&chunk)?;
        hash.update(&chunk);
        have += chunk.len() as u64;
    }
    if have == size {
        file.sync_all()?;
    }
    Ok(Digest(hash.finalize().into()))
}
