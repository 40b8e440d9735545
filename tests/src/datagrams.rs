//! Clients of UDP servers.

use std::net::UdpSocket;
use std::time::Duration;

use super::net::{free_port, local};
use super::wait::{SOON, wait_for};

/// What comes back to `client` for a datagram; sent again when it is lost.
///
/// # Panics
/// When nothing does.
pub fn answer(client: &UdpSocket, datagram: &[u8]) -> Vec<u8> {
    client.set_read_timeout(Some(Duration::from_secs(1))).expect("a deadline");
    let mut bytes = vec![0; 65_535];
    wait_for("an answer over UDP", SOON, || {
        // Where nothing is bound yet the kernel says so.
        client.send(datagram).map_err(|error| error.to_string())?;
        let length = client.recv(&mut bytes).map_err(|error| error.to_string())?;
        Ok(bytes[..length].to_vec())
    })
}

/// A UDP port that is free on the host, below the range for clients.
///
/// # Panics
/// When there is none.
pub fn low_port() -> u16 {
    let start = 20_000 + free_port() % 10_000;
    let is_free = |port: &u16| UdpSocket::bind(local(*port)).is_ok();
    (start..32_000).find(is_free).expect("a free port")
}

/// A client of the server at `port` of the host, over UDP.
///
/// # Panics
/// When it gets no socket.
pub fn udp_client(port: u16) -> UdpSocket {
    let client = UdpSocket::bind(local(0)).expect("a socket");
    client.connect(local(port)).expect("a peer");
    client
}
