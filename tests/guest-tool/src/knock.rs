//! A guest that floods the host with requests that it has to refuse.

use std::io;
use std::os::fd::AsRawFd;

use crate::{serve, vsock};

/// Asks the host for vsock connections until it is ended: a guest that floods the device with what it has to refuse.
pub fn knock(threads: &str) -> io::Result<()> {
    let threads: u32 = threads.parse().map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let knocking: Vec<_> = (0..threads).map(|_| std::thread::spawn(knock_for_ever)).collect();
    serve::say("knocking");
    for thread in knocking {
        thread.join().map_err(|_| io::Error::other("a thread panicked"))??;
    }
    Ok(())
}

fn knock_for_ever() -> io::Result<()> {
    loop {
        let socket = vsock::socket()?;
        let (address, size) = vsock::address(libc::VMADDR_CID_HOST, 9)?;
        // SAFETY: the pointer and the size are those of a live `sockaddr_vm`.
        let connected = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), size) };
        if connected == 0 {
            return Err(io::Error::other("the host has let a guest's connection in"));
        }
    }
}
