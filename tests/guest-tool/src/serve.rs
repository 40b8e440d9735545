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
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use dhow_guest_tool::{Pattern, Summary};

const CHUNK: usize = 64 << 10;
/// What a drain reads at once, and the most that a flood writes at once.
const BULK: usize = 1 << 20;
const LINE_LIMIT: usize = 128;
const BACKLOG: i32 = 128;

/// Serves for ever; a thread a connection. `address` is "IP:PORT" or "vsock:PORT".
pub fn serve(address: &str) -> io::Result<()> {
    let wrong = |_| io::Error::from(io::ErrorKind::InvalidInput);
    match address.strip_prefix("vsock:") {
        Some(port) => {
            let listener = vsock_listener(port.parse().map_err(wrong)?)?;
            serve_each(|| vsock_accept(&listener))
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

fn serve_each(accept: impl Fn() -> io::Result<TcpStream>) -> io::Result<()> {
    say("listening");
    loop {
        let stream = accept()?;
        std::thread::spawn(move || {
            if let Err(error) = connection(stream) {
                say(&format!("connection failed: {error}"));
            }
        });
    }
}

/// Listens on a vsock port (vsock(7)) of this guest.
fn vsock_listener(port: u32) -> io::Result<OwnedFd> {
    let socket = vsock_socket()?;
    let (address, size) = vsock_address(libc::VMADDR_CID_ANY, port)?;
    // SAFETY: the pointer and the size are those of a live `sockaddr_vm`.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) })?;
    // SAFETY: the call has no pointers.
    check(unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) })?;
    Ok(socket)
}

/// Asks the host for vsock connections until it is ended: a guest that floods the device with what it has to refuse.
pub fn knock(threads: &str) -> io::Result<()> {
    let threads: u32 = threads.parse().map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let knocking: Vec<_> = (0..threads).map(|_| std::thread::spawn(knock_for_ever)).collect();
    say("knocking");
    for thread in knocking {
        thread.join().map_err(|_| io::Error::other("a thread panicked"))??;
    }
    Ok(())
}

fn knock_for_ever() -> io::Result<()> {
    loop {
        let socket = vsock_socket()?;
        let (address, size) = vsock_address(libc::VMADDR_CID_HOST, 9)?;
        // SAFETY: the pointer and the size are those of a live `sockaddr_vm`.
        let connected = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), size) };
        if connected == 0 {
            return Err(io::Error::other("the host has let a guest's connection in"));
        }
    }
}

fn vsock_socket() -> io::Result<OwnedFd> {
    // SAFETY: the call has no pointers.
    let fd = check(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: it was just made, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn vsock_address(cid: u32, port: u32) -> io::Result<(libc::sockaddr_vm, libc::socklen_t)> {
    // SAFETY: all zeros is a valid `sockaddr_vm`.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    let size = libc::socklen_t::try_from(size_of::<libc::sockaddr_vm>()).map_err(io::Error::other)?;
    Ok((address, size))
}

/// The next connection, as a stream whose reads, writes and half-close are those of any socket.
fn vsock_accept(listener: &OwnedFd) -> io::Result<TcpStream> {
    let none = std::ptr::null_mut();
    // SAFETY: null pointers ask for no address.
    let fd = check(unsafe {
        libc::accept4(listener.as_raw_fd(), none, std::ptr::null_mut(), libc::SOCK_CLOEXEC)
    })?;
    // SAFETY: it was just made, and nobody else knows it.
    Ok(TcpStream::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Prints a line at once: standard output may be a pipe.
fn say(line: &str) {
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
