//! A server over UDP that sends every datagram back to where it came from.

use std::io;
use std::net::UdpSocket;

use crate::serve::say;

/// Serves for ever. Port 0 is the kernel's choice, as of a client; the address is printed.
pub fn serve(address: &str) -> io::Result<()> {
    let socket = UdpSocket::bind(address)?;
    say(&format!("listening {}", socket.local_addr()?));
    let mut bytes = vec![0; 65_535];
    loop {
        let (length, client) = socket.recv_from(&mut bytes)?;
        // A client that is gone is no reason to end.
        let _ = socket.send_to(&bytes[..length], client);
    }
}
