//! A server over TCP, or over vsock, whose client says in its first line what is to be done:
//!
//! ```text
//! echo               every byte back, until the client's end
//! sink               read to the client's end, then answer "SIZE DIGEST\n"
//! source SIZE SEED   send that much of the pattern, then end
//! drain              read to the client's end, then answer "SIZE\n": no digest slows that down
//! flood MS WRITE     send zeros in writes of that many bytes for that many milliseconds, then end
//! close-first        answer "bye\n", end this side, read on; print "close-first SIZE DIGEST"
//! reset              reset the connection
//! expect-reset       answer "ready\n", read on; print how the client ended: "reset" or "end"
//! ```

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::Scope;
use std::time::{Duration, Instant};

use dhow_guest_tool::{Pattern, Summary};

use crate::vsock;

const CHUNK: usize = 64 << 10;
/// What a drain reads at once, and the most that a flood writes at once.
const BULK: usize = 1 << 20;
const LINE_LIMIT: usize = 128;

/// Serves for ever; a thread for each connection that is open. `address` is "IP:PORT" or "vsock:PORT".
pub fn serve(address: &str) -> io::Result<()> {
    let wrong = |_| io::Error::from(io::ErrorKind::InvalidInput);
    match address.strip_prefix("vsock:") {
        Some(port) => {
            let listener = vsock::listener(port.parse().map_err(wrong)?)?;
            serve_each(|| vsock::accept(&listener))
        }
        None => {
            let listener = TcpListener::bind(address)?;
            serve_each(|| {
                let (stream, _) = listener.accept()?;
                // As servers that answer small requests do.
                stream.set_nodelay(true)?;
                Ok(stream)
            })
        }
    }
}

/// Serves one connection, and listens no longer meanwhile.
pub fn serve_one(address: &str) -> io::Result<()> {
    let listener = TcpListener::bind(address)?;
    say("listening");
    let (stream, _) = listener.accept()?;
    drop(listener);
    connection(stream)
}

fn serve_each(accept: impl Fn() -> io::Result<TcpStream> + Sync) -> io::Result<()> {
    say("listening");
    let idle = AtomicUsize::new(0);
    std::thread::scope(|scope| serve_in_turn(scope, &accept, &idle))
}

/// Accepts for ever, and leaves an idle thread behind whenever it serves. Threads are used again: to make one for each
/// connection would cost an emulated guest more than the connection.
fn serve_in_turn<'scope>(
    scope: &'scope Scope<'scope, '_>,
    accept: &'scope (impl Fn() -> io::Result<TcpStream> + Sync),
    idle: &'scope AtomicUsize,
) -> io::Result<()> {
    loop {
        idle.fetch_add(1, Ordering::Relaxed);
        let stream = accept()?;
        if idle.fetch_sub(1, Ordering::Relaxed) == 1 {
            scope.spawn(|| {
                if let Err(error) = serve_in_turn(scope, accept, idle) {
                    say(&format!("no further connections: {error}"));
                }
            });
        }
        if let Err(error) = connection(stream) {
            say(&format!("connection failed: {error}"));
        }
    }
}

/// Prints a line at once: standard output may be a pipe.
pub fn say(line: &str) {
    let mut stdout = io::stdout().lock();
    // Nobody may be reading any more; the connections matter.
    let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
}

fn connection(mut stream: TcpStream) -> io::Result<()> {
    let line = line(&mut stream)?;
    let words: Vec<&str> = line.split(' ').collect();
    match words.as_slice() {
        ["echo"] => {
            let mut from = stream.try_clone()?;
            copy(&mut from, CHUNK, |bytes| stream.write_all(bytes))?;
            stream.shutdown(Shutdown::Write)
        }
        ["sink"] => {
            let summary = summary(&mut stream)?;
            stream.write_all(format!("{summary}\n").as_bytes())
        }
        ["source", size, seed] => {
            let wrong = |_| io::Error::from(io::ErrorKind::InvalidInput);
            send(&mut stream, seed.parse().map_err(wrong)?, size.parse().map_err(wrong)?)
        }
        ["drain"] => {
            let mut size = 0;
            copy(&mut stream, BULK, |bytes| {
                size += bytes.len();
                Ok(())
            })?;
            stream.write_all(format!("{size}\n").as_bytes())
        }
        ["flood", milliseconds, write] => {
            let wrong = |_| io::Error::from(io::ErrorKind::InvalidInput);
            let until = Instant::now() + Duration::from_millis(milliseconds.parse().map_err(wrong)?);
            let zeros = vec![0; write.parse::<usize>().map_err(wrong)?.clamp(1, BULK)];
            while Instant::now() < until {
                stream.write_all(&zeros)?;
            }
            stream.shutdown(Shutdown::Write)
        }
        ["close-first"] => {
            stream.write_all(b"bye\n")?;
            stream.shutdown(Shutdown::Write)?;
            let summary = summary(&mut stream)?;
            say(&format!("close-first {summary}"));
            Ok(())
        }
        ["reset"] => reset(stream),
        ["expect-reset"] => {
            stream.write_all(b"ready\n")?;
            let ended = summary(&mut stream);
            say(match ended {
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => "expect-reset reset",
                Err(_) => "expect-reset error",
                Ok(_) => "expect-reset end",
            });
            Ok(())
        }
        _ => Err(io::Error::other(format!("unknown request {line:?}"))),
    }
}

/// The first line, without reading beyond it.
fn line(stream: &mut TcpStream) -> io::Result<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.len() < LINE_LIMIT {
        stream.read_exact(&mut byte)?;
        if byte == *b"\n" {
            return String::from_utf8(line).map_err(io::Error::other);
        }
        line.push(byte[0]);
    }
    Err(io::Error::other("the first line is too long"))
}

fn copy(from: &mut TcpStream, at_once: usize, mut to: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
    let mut chunk = vec![0; at_once];
    loop {
        match from.read(&mut chunk)? {
            0 => return Ok(()),
            read => to(&chunk[..read])?,
        }
    }
}

fn summary(stream: &mut TcpStream) -> io::Result<String> {
    let mut summary = Summary::default();
    copy(stream, CHUNK, |bytes| {
        summary.update(bytes);
        Ok(())
    })?;
    Ok(summary.finish())
}

/// Sends `size` bytes of the pattern `seed`.
pub fn send(to: &mut impl Write, seed: u64, size: usize) -> io::Result<()> {
    let mut pattern = Pattern::new(seed);
    let mut chunk = vec![0; CHUNK];
    let mut left = size;
    while left > 0 {
        let length = left.min(CHUNK);
        pattern.fill(&mut chunk[..length]);
        to.write_all(&chunk[..length])?;
        left -= length;
    }
    to.flush()
}

/// Closes with a reset: lingering for no time throws away what is unsent (socket(7), SO_LINGER).
fn reset(stream: TcpStream) -> io::Result<()> {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let size = libc::socklen_t::try_from(size_of::<libc::linger>()).map_err(io::Error::other)?;
    // SAFETY: the pointer and the size are those of a live `linger`.
    let result = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            size,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
