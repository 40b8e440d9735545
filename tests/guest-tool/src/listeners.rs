//! Listens and ceases to at the word of a client, who hears of it by a byte on the connection that is open.
//!
//! ```text
//! open PORT         listens there, and echoes on what it accepts; then "."
//! close PORT        no longer; then "."
//! many FIRST COUNT  listens on that many ports; then "."
//! none              closes all of them; then "."
//! ```

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::thread::JoinHandle;

use crate::serve::say;

/// Serves one client after the other at `address`.
pub fn serve(address: &str) -> io::Result<()> {
    let control = TcpListener::bind(address)?;
    say("listening");
    loop {
        let (client, _) = control.accept()?;
        if let Err(error) = follow(client) {
            say(&format!("the client left: {error}"));
        }
    }
}

/// A listening socket and the thread that accepts; closed when dropped.
struct Listening {
    socket: i32,
    accepting: Option<JoinHandle<()>>,
}

impl Listening {
    fn open(port: u16) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
        let socket = listener.as_raw_fd();
        let accepting = std::thread::Builder::new().stack_size(64 << 10).spawn(move || {
            for mut stream in listener.incoming() {
                let Ok(stream) = &mut stream else { return };
                // A client that leaves is no reason to end.
                let _ = stream.set_nodelay(true).and_then(|()| echo(stream));
            }
        })?;
        Ok(Self { socket, accepting: Some(accepting) })
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        // SAFETY: the fd is the listener's, which its thread holds until it is joined below.
        unsafe { libc::shutdown(self.socket, libc::SHUT_RDWR) };
        // accept(2) fails after that, and the thread drops the listener.
        let _ = self.accepting.take().map(JoinHandle::join);
    }
}

fn echo(stream: &mut TcpStream) -> io::Result<()> {
    let mut bytes = [0; 64];
    loop {
        let length = stream.read(&mut bytes)?;
        if length == 0 {
            return Ok(());
        }
        stream.write_all(&bytes[..length])?;
    }
}

fn follow(mut client: TcpStream) -> io::Result<()> {
    client.set_nodelay(true)?;
    let wrong = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let lines = BufReader::new(client.try_clone()?).lines();
    let (mut one, mut many) = (HashMap::new(), Vec::new());
    for line in lines {
        let line = line?;
        match line.split(' ').collect::<Vec<_>>().as_slice() {
            ["open", port] => {
                let port: u16 = port.parse().map_err(wrong)?;
                one.insert(port, Listening::open(port)?);
            }
            ["close", port] => drop(one.remove(&port.parse().map_err(wrong)?)),
            ["many", first, count] => {
                let (first, count): (u16, u16) =
                    (first.parse().map_err(wrong)?, count.parse().map_err(wrong)?);
                many = (first..first + count).map(Listening::open).collect::<io::Result<Vec<_>>>()?;
            }
            ["none"] => many.clear(),
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        }
        client.write_all(b".")?;
    }
    Ok(())
}
