//! Bare vsock: clients of a TCP port are handed to the device as Dhow's forwards are, but what they reach is
//! a vsock server in the guest, with no agent and no relay between.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use dhow::vsock::client::DeviceClient;
use dhow::vsock::{OpenRequest, Transport};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use tokio::runtime::Runtime;

const DEADLINE: Duration = Duration::from_secs(30);

/// The port; dropping it closes it, and cuts nobody who is connected.
#[derive(Debug)]
pub struct Bare {
    /// Where clients connect.
    pub address: SocketAddr,
    _runtime: Runtime,
}

impl Bare {
    /// Connects to the device's control socket, which serves more than the supervisor, and listens.
    ///
    /// # Panics
    /// When either fails.
    pub fn listen(control: &Path, guest_port: u32) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let control_fd = seqpacket(control).unwrap_or_else(|error| panic!("{}: {error}", control.display()));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        listener.set_nonblocking(true).expect("a listener for tokio");
        let address = listener.local_addr().expect("its address");
        let guard = runtime.enter();
        let client = DeviceClient::new(control_fd).expect("the device");
        let listener = tokio::net::TcpListener::from_std(listener).expect("a listener for tokio");
        drop(guard);
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(hand_over(client.clone(), stream, guest_port));
            }
        });
        Self { address, _runtime: runtime }
    }
}

async fn hand_over(client: DeviceClient, stream: tokio::net::TcpStream, guest_port: u32) {
    let request = OpenRequest { guest_port, preamble: Vec::new(), reply_len: 0, deadline: DEADLINE };
    let handed = async {
        stream.set_nodelay(true)?;
        let stream = OwnedFd::from(stream.into_std()?);
        let pending = client.open(request).await.map_err(std::io::Error::other)?;
        pending.attach(stream).await.map_err(std::io::Error::other)
    };
    if let Err(error) = handed.await {
        eprintln!("bare vsock: {error}");
    }
}

fn seqpacket(path: &Path) -> nix::Result<OwnedFd> {
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    connect(std::os::fd::AsRawFd::as_raw_fd(&fd), &UnixAddr::new(path)?)?;
    Ok(fd)
}
