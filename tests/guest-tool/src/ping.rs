//! How long docker's API takes for its smallest request, asked through a unix socket.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Requests of one sample.
const PINGS: u32 = 30;
const DEADLINE: Duration = Duration::from_secs(60);
/// Larger than any answer to a ping.
const ANSWER_LIMIT: usize = 64 << 10;

/// Milliseconds of a `/_ping` on a connection that is there.
///
/// # Errors
/// When one fails.
pub fn kept(socket: &Path) -> io::Result<f64> {
    let mut stream = connect(socket)?;
    ping(&mut stream)?;
    each(|| ping(&mut stream))
}

/// Milliseconds of connecting, a `/_ping`, and closing.
///
/// # Errors
/// When one fails.
pub fn new(socket: &Path) -> io::Result<f64> {
    each(|| ping(&mut connect(socket)?))
}

fn each(mut ask: impl FnMut() -> io::Result<()>) -> io::Result<f64> {
    let begin = Instant::now();
    for _ in 0..PINGS {
        ask()?;
    }
    Ok(begin.elapsed().as_secs_f64() * 1000.0 / f64::from(PINGS))
}

fn connect(socket: &Path) -> io::Result<UnixStream> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    Ok(stream)
}

fn ping(stream: &mut UnixStream) -> io::Result<()> {
    stream.write_all(b"GET /_ping HTTP/1.1\r\nHost: docker\r\n\r\n")?;
    let mut answer = Vec::new();
    let mut chunk = [0; 4096];
    // The body is "OK", after the empty line.
    while !answer.ends_with(b"\r\n\r\nOK") {
        let got = stream.read(&mut chunk)?;
        answer.extend_from_slice(&chunk[..got]);
        if got == 0 || answer.len() > ANSWER_LIMIT {
            return Err(io::Error::other(format!("docker answers {}", String::from_utf8_lossy(&answer))));
        }
    }
    if answer.starts_with(b"HTTP/1.1 200") {
        return Ok(());
    }
    Err(io::Error::other(String::from_utf8_lossy(&answer).into_owned()))
}
