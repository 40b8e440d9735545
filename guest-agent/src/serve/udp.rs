//! Carries one client's datagrams between a stream of the host and a UDP socket of the guest.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use dhow_protocol::datagram;
use tokio::net::UdpSocket;

use super::stream::Stream;

/// A socket that is connected to `target`. To the server it is one client, as long as the session lasts.
///
/// # Errors
/// No socket, or no way to the target.
pub(super) async fn connect(target: SocketAddr) -> io::Result<UdpSocket> {
    let any = match target {
        SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(target).await?;
    Ok(socket)
}

/// Relays until the host ends the stream; the host also counts the idle time.
///
/// # Errors
/// The stream failed.
pub(super) async fn relay(stream: &Stream, socket: &UdpSocket) -> io::Result<()> {
    let there = async {
        let (mut reader, mut bytes) = (stream, Vec::new());
        while datagram::read(&mut reader, &mut bytes).await? {
            // Nobody listens for now, or it is too large: lost, as a datagram may be.
            let _ = socket.send(&bytes).await;
        }
        Ok(())
    };
    let back = async {
        let (mut writer, mut bytes) = (stream, vec![0; datagram::MAX_DATAGRAM]);
        loop {
            // An error tells of an earlier datagram that nobody took, and is told once.
            if let Ok(length) = socket.recv(&mut bytes).await {
                datagram::write(&mut writer, &bytes[..length]).await?;
            }
        }
    };
    tokio::select! { ended = there => ended, ended = back => ended }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::testing::{pair, within};

    #[tokio::test]
    async fn datagrams_go_both_ways_and_refusals_end_nothing() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = server.local_addr().unwrap();
        drop(server);
        let (stream, mut host) = pair();
        let relaying = tokio::spawn(async move {
            let socket = connect(address).await?;
            relay(&stream, &socket).await
        });
        // Nobody is there: the kernel reports it on the next call.
        for _ in 0..3 {
            within(datagram::write(&mut host, b"lost")).await.unwrap();
        }
        let server = UdpSocket::bind(address).await.unwrap();
        let mut bytes = vec![0; 70_000];
        for length in [0, 1, 1400, 60_000] {
            // What was sent before may still arrive.
            let client = loop {
                within(datagram::write(&mut host, &vec![7; length])).await.unwrap();
                let (got, client) = within(server.recv_from(&mut bytes)).await.unwrap();
                if got == length && bytes[..got].iter().all(|byte| *byte == 7) {
                    break client;
                }
            };
            server.send_to(&vec![8; length], client).await.unwrap();
            let mut answer = Vec::new();
            assert!(within(datagram::read(&mut host, &mut answer)).await.unwrap());
            assert_eq!(answer, vec![8; length]);
        }
        drop(host);
        // A reset counts as an end here: the host is gone either way.
        let _ = within(relaying).await.unwrap();
    }
}
