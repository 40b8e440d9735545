//! A unix socket of the host that leads to one of the guest: docker.sock.

use std::sync::Arc;
use std::time::Duration;

use dhow_protocol::stream::StreamHeader;
use tokio::net::UnixListener;
use tokio::sync::Semaphore;

use super::{MAX_OPENING, Opener};

/// Accepts on `listener` and hands each connection over to the guest's socket at `guest_path`, for
/// ever: drop or abort the future to end it. Where the guest refuses, the connection is closed.
pub async fn serve_unix<O: Opener>(listener: UnixListener, guest_path: String, opener: O) {
    let opening = Arc::new(Semaphore::new(MAX_OPENING));
    loop {
        // The permit comes first: who cannot be served yet waits in the kernel's queue.
        let Ok(permit) = Arc::clone(&opening).acquire_owned().await else { return };
        let client = match listener.accept().await {
            Ok((client, _)) => client.into_std(),
            Err(error) => Err(error),
        };
        let client = match client {
            Ok(client) => client,
            // Out of descriptors: others must close theirs first.
            Err(error) => {
                tracing::warn!(%error, path = guest_path, "a socket forward cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (path, opener) = (guest_path.clone(), opener.clone());
        tokio::spawn(async move {
            if let Err(error) = opener.open(StreamHeader::Unix { path: path.clone() }, client.into()).await {
                tracing::debug!(%error, path, "a connection to a guest's socket was refused");
            }
            drop(permit);
        });
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;

    /// Greets and echoes, or refuses a path.
    #[derive(Clone)]
    struct Echo;

    impl Opener for Echo {
        async fn open(&self, header: StreamHeader, fd: OwnedFd) -> Result<(), String> {
            let StreamHeader::Unix { path } = header else { panic!("{header:?}") };
            if path == "/gone" {
                return Err("no such file".into());
            }
            let mut stream = UnixStream::from_std(fd.into()).unwrap();
            tokio::spawn(async move {
                let mut said = Vec::new();
                stream.read_to_end(&mut said).await.unwrap();
                stream.write_all(&said).await.unwrap();
            });
            Ok(())
        }
    }

    #[tokio::test]
    async fn connections_are_handed_over_and_refusals_closed() {
        let folder = tempfile::tempdir().unwrap();
        for (guest, expected) in [("/run/docker.sock", &b"hello"[..]), ("/gone", b"")] {
            let socket = folder.path().join(guest.trim_start_matches('/').replace('/', "-"));
            let listener = UnixListener::bind(&socket).unwrap();
            let serving = tokio::spawn(serve_unix(listener, guest.into(), Echo));
            let mut client = UnixStream::connect(&socket).await.unwrap();
            let _ = client.write_all(b"hello").await;
            let _ = client.shutdown().await;
            let mut answer = Vec::new();
            // A close with unread bytes is a reset on a unix socket.
            let _ = client.read_to_end(&mut answer).await;
            assert_eq!(answer, expected);
            serving.abort();
        }
    }
}
