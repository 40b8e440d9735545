//! A client: says something, ends its half, and prints the answer.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// For one read or write.
const PATIENCE: Option<Duration> = Some(Duration::from_secs(30));

/// `target` is "HOST:PORT" or a unix socket's absolute path.
pub fn ask(target: &str, text: &str) -> io::Result<()> {
    let mut answer = Vec::new();
    if target.starts_with('/') {
        let mut stream = UnixStream::connect(target)?;
        stream.set_read_timeout(PATIENCE)?;
        stream.write_all(text.as_bytes())?;
        stream.shutdown(Shutdown::Write)?;
        stream.read_to_end(&mut answer)?;
    } else {
        let mut stream = TcpStream::connect(target)?;
        stream.set_read_timeout(PATIENCE)?;
        stream.write_all(text.as_bytes())?;
        stream.shutdown(Shutdown::Write)?;
        stream.read_to_end(&mut answer)?;
    }
    io::stdout().lock().write_all(&answer)
}
