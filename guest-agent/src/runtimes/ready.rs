//! Whether a daemon answers: a connection to its unix socket, and an HTTP GET where it has one.

use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::manifest::Readiness;

/// Between the first tries; under emulation a daemon takes seconds, elsewhere a fraction of one.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Between later tries.
const LAST_PAUSE: Duration = Duration::from_millis(250);
/// For one try: a busy machine may take its time, a hung daemon must not stop the next try.
const DEADLINE: Duration = Duration::from_secs(10);
/// Longest answer, head and body, in bytes.
const ANSWER_LIMIT: u64 = 256 << 10;

/// Returns when the daemon answers; never when it does not.
pub async fn wait(ready: Option<&Readiness>) {
    let Some(ready) = ready else { return };
    let mut pause = FIRST_PAUSE;
    loop {
        match answers(ready).await {
            Ok(()) => return,
            Err(error) => tracing::trace!(%error, socket = %ready.socket.display(), "not yet ready"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 5 / 4).min(LAST_PAUSE);
    }
}

async fn answers(ready: &Readiness) -> io::Result<()> {
    match &ready.path {
        None => within_deadline(UnixStream::connect(&ready.socket)).await.map(drop),
        Some(path) => get(&ready.socket, path).await.map(drop),
    }
}

/// The body of the answer to a GET of `path`.
///
/// # Errors
/// When the socket does not take a connection, there is no whole answer in time, or its status is
/// not 200.
pub async fn get(socket: &Path, path: &str) -> io::Result<Vec<u8>> {
    within_deadline(exchange(socket, path)).await
}

async fn within_deadline<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(DEADLINE, work).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// HTTP/1.0 (RFC 1945): the answer ends with the connection and is not chunked.
async fn exchange(socket: &Path, path: &str) -> io::Result<Vec<u8>> {
    let mut stream = UnixStream::connect(socket).await?;
    let request = format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(ANSWER_LIMIT).read_to_end(&mut answer).await?;
    body(answer)
}

/// The body of an HTTP/1 answer with status 200.
fn body(mut answer: Vec<u8>) -> io::Result<Vec<u8>> {
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "not an HTTP answer");
    let head = answer.windows(4).position(|window| window == b"\r\n\r\n").ok_or_else(malformed)?;
    let status = answer.get(..13).ok_or_else(malformed)?;
    if !(status.starts_with(b"HTTP/1.0 ") || status.starts_with(b"HTTP/1.1 ")) {
        return Err(malformed());
    }
    if &status[9..12] != b"200" || status[12].is_ascii_digit() {
        let status = String::from_utf8_lossy(&status[9..12]);
        return Err(io::Error::other(format!("HTTP status {}", status.escape_default())));
    }
    answer.drain(..head + 4);
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    #[test]
    fn only_a_whole_answer_with_200_counts() {
        assert_eq!(body(b"HTTP/1.0 200 OK\r\nA: b\r\n\r\nOK".to_vec()).unwrap(), b"OK");
        assert_eq!(body(b"HTTP/1.1 200\r\n\r\n".to_vec()).unwrap(), b"");
        for bad in [
            "",
            "\r\n\r\n",
            "HTTP/1.0 200 OK\r\n",
            "HTTP/1.1 503 Service Unavailable\r\n\r\n",
            "HTTP/1.1 2000\r\n\r\n",
            "HTTP/2.0 200 OK\r\n\r\n",
            "HTTP/1.0 \u{1b}[3\r\n\r\n",
        ] {
            assert!(body(bad.as_bytes().to_vec()).is_err(), "{bad:?}");
        }
    }

    #[tokio::test]
    async fn a_daemon_is_waited_for_over_its_refusals() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("x.sock");
        // A socket that nobody listens on, as a killed daemon leaves it.
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        let ready = Readiness { socket: socket.clone(), path: Some("/_ping".to_owned()) };
        assert!(answers(&ready).await.is_err());
        let waiting = tokio::spawn(async move { wait(Some(&ready)).await });
        std::fs::remove_file(&socket).unwrap();
        let listener = UnixListener::bind(&socket).unwrap();
        for answer in ["", "HTTP/1.0 503 Wait\r\n\r\n", "HTTP/1.0 200 OK\r\n\r\nOK"] {
            assert!(!waiting.is_finished());
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 64];
            let length = stream.read(&mut request).await.unwrap();
            assert!(request[..length].starts_with(b"GET /_ping HTTP/1.0\r\n"));
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
        tokio::time::timeout(Duration::from_secs(60), waiting).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn an_endless_answer_ends() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("x.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let endless = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            while stream.write_all(&[b'x'; 4096]).await.is_ok() {}
        });
        assert!(get(&socket, "/").await.is_err());
        endless.await.unwrap();
    }
}
