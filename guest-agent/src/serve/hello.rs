//! The guest's part of a stream's opening: the hello is read and checked, the answer is sent.

use std::io;
use std::time::Duration;

use dhow_protocol::hello::{HELLO_LEN, Hello, HelloError, HelloReply, Secret, Status};
use dhow_protocol::stream::StreamHeader;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::stream::Stream;

/// How long the host may take to receive an answer of 256 bytes.
const REPLY_DEADLINE: Duration = Duration::from_secs(5);

/// Why there is no stream.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandshakeError {
    /// The host had opened it ahead and has no use for it.
    #[error("the stream ended without a hello")]
    Unused,
    /// The hello did not come in time.
    #[error("no complete hello within {0:?}")]
    Deadline(Duration),
    /// The peer left, or the socket failed.
    #[error("the stream ended in its hello")]
    Io(#[from] io::Error),
    /// The hello is not acceptable.
    #[error("the hello was not accepted")]
    Hello(#[from] HelloError),
}

/// The right to answer a hello, once.
#[derive(Debug)]
pub(super) struct Answer {
    secret: Secret,
    nonce: [u8; 32],
}

impl Answer {
    /// Opens the stream.
    ///
    /// # Errors
    /// The host has left, or does not read.
    pub(super) async fn accept(self, stream: &Stream) -> io::Result<()> {
        self.send(stream, &HelloReply::ok()).await
    }

    /// Refuses the stream and ends it. A host that has left learns nothing more.
    pub(super) async fn refuse(self, stream: &Stream, status: Status, detail: &str) {
        tracing::debug!(?status, detail, "stream refused");
        if let Err(error) = self.send(stream, &HelloReply::refused(status, detail)).await {
            tracing::debug!(%error, "the host did not wait for its refusal");
            return;
        }
        // ENOTCONN: it has left meanwhile.
        let _ = stream.shutdown_write();
    }

    async fn send(self, mut stream: &Stream, reply: &HelloReply) -> io::Result<()> {
        let bytes = reply.to_bytes(&self.secret, &self.nonce);
        timeout(REPLY_DEADLINE, stream.write_all(&bytes)).await?
    }
}

/// Reads and checks a hello. It may be long in coming, as the host opens streams ahead of their use, and has to be
/// complete `deadline` after it has begun. An unacceptable one is answered where it is one at all.
///
/// # Errors
/// The stream is of no use, and its peer has been told.
pub(super) async fn handshake(
    stream: &Stream,
    secret: &Secret,
    deadline: Duration,
) -> Result<(StreamHeader, Answer), HandshakeError> {
    let mut fixed = [0; HELLO_LEN];
    let mut reader = stream;
    let begun = match reader.read(&mut fixed).await {
        Ok(0) | Err(_) => return Err(HandshakeError::Unused),
        Ok(begun) => begun,
    };
    let rest = timeout(deadline, read(stream, fixed, begun));
    let (hello, header) = rest.await.map_err(|_| HandshakeError::Deadline(deadline))??;
    let answer = Answer { secret: secret.clone(), nonce: hello.nonce() };
    match hello.accept(secret, &header) {
        Ok(header) => Ok((header, answer)),
        Err(error) => {
            let status = match error {
                HelloError::Version { .. } => Status::Version,
                HelloError::Proof => Status::Proof,
                _ => Status::Malformed,
            };
            answer.refuse(stream, status, &error.to_string()).await;
            Err(error.into())
        }
    }
}

/// Reads the rest of a hello whose first `begun` bytes are in `fixed`.
async fn read(
    mut stream: &Stream,
    mut fixed: [u8; HELLO_LEN],
    begun: usize,
) -> Result<(Hello, Vec<u8>), HandshakeError> {
    stream.read_exact(&mut fixed[begun..]).await?;
    let hello = Hello::parse(fixed)?;
    // Parsed, so it is below its limit.
    let mut header = vec![0; hello.header_len()];
    stream.read_exact(&mut header).await?;
    Ok((hello, header))
}
