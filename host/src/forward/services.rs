//! Services of the host that the guest may reach by rule: dialled here, when the guest asks.
//!
//! The guest is hostile: what it asks for is looked up in the profile's list each time, and a bounded
//! number is dialled at once.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dhow_protocol::codec::{self, CodecError, DATA_LIMIT};
use dhow_protocol::host_services::{Dial, Offer, Refusal, Service};
use dhow_protocol::stream::StreamHeader;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;

use super::Opener;
use super::rules::{Passages, Side};

/// Services that are being dialled at once; the stream's own flow control holds back the rest.
const MAX_DIALLING: usize = 128;
/// How long a refused dial keeps its place among those.
const REFUSAL_PAUSE: Duration = Duration::from_millis(100);
/// How long a service of the host may take to accept.
const DEADLINE: Duration = Duration::from_secs(5);

/// What the guest may reach.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostServices {
    ports: Vec<u16>,
    /// Path in the guest and on the host.
    sockets: Vec<(String, PathBuf)>,
}

impl HostServices {
    /// What a profile allows.
    #[must_use]
    pub fn new(passages: &Passages) -> Self {
        let guests = passages.sockets.iter().filter(|rule| rule.listen == Side::Guest);
        let sockets = guests.map(|rule| (rule.guest.clone(), rule.host.clone())).collect();
        Self { ports: passages.host_ports.clone(), sockets }
    }

    /// Whether that is nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ports.is_empty() && self.sockets.is_empty()
    }

    /// What the guest is told to listen for.
    #[must_use]
    pub fn offer(&self) -> Offer {
        let sockets = self.sockets.iter().map(|(guest, _)| guest.clone()).collect();
        Offer { ports: self.ports.clone(), sockets }
    }

    /// Connects to a service, if it is allowed.
    async fn dial(&self, service: Service) -> Result<OwnedFd, String> {
        let told = |error: std::io::Error| error.to_string();
        match service {
            Service::Port(port) if self.ports.binary_search(&port).is_ok() => {
                let stream = match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
                    // Some servers listen on one of the two only.
                    Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                        TcpStream::connect((Ipv6Addr::LOCALHOST, port)).await.map_err(|_| told(error))?
                    }
                    other => other.map_err(told)?,
                };
                stream.set_nodelay(true).map_err(told)?;
                Ok(stream.into_std().map_err(told)?.into())
            }
            Service::Socket(index) if usize::from(index) < self.sockets.len() => {
                let (_, path) = &self.sockets[usize::from(index)];
                let stream = UnixStream::connect(path).await;
                let stream = stream.map_err(|error| format!("{}: {error}", path.display()))?;
                Ok(stream.into_std().map_err(told)?.into())
            }
            Service::Port(_) | Service::Socket(_) => Err("the profile does not allow it".to_owned()),
        }
    }
}

/// Serves a `HostServices` stream until it ends.
///
/// # Errors
/// The stream failed, or what it said was no frame.
pub async fn serve_host<S, O>(stream: S, services: Arc<HostServices>, opener: O) -> Result<(), CodecError>
where
    S: AsyncRead + AsyncWrite,
    O: Opener,
{
    let (mut reader, mut writer) = tokio::io::split(stream);
    let (refusals, mut refused) = mpsc::channel::<Refusal>(MAX_DIALLING);
    let dialling = Arc::new(Semaphore::new(MAX_DIALLING));
    let receive = async {
        loop {
            let Ok(permit) = Arc::clone(&dialling).acquire_owned().await else { return Ok(()) };
            let asked = codec::read_frame::<Dial, _>(&mut reader, DATA_LIMIT).await?;
            let Some(Dial { id, service }) = asked else { return Ok(()) };
            let (services, opener, refusals) = (Arc::clone(&services), opener.clone(), refusals.clone());
            tokio::spawn(async move {
                let dialled = timeout(DEADLINE, services.dial(service)).await;
                let opened = match dialled.unwrap_or_else(|_| Err("it does not accept".to_owned())) {
                    Ok(fd) => opener.open(StreamHeader::Dialled { id }, fd).await,
                    Err(error) => Err(error),
                };
                if let Err(error) = opened {
                    tracing::debug!(error, ?service, "a service of the host was not reached");
                    let _ = refusals.send(Refusal { id }).await;
                    // A guest that asks in vain again and again does so slowly.
                    tokio::time::sleep(REFUSAL_PAUSE).await;
                }
                drop(permit);
            });
        }
    };
    let send = async {
        while let Some(refusal) = refused.recv().await {
            codec::write_frame(&mut writer, &refusal, DATA_LIMIT).await?;
        }
        Ok(())
    };
    tokio::select! { ended = receive => ended, ended = send => ended }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forward::rules::SocketRule;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// A guest that greets on every stream that it is given.
    #[derive(Clone)]
    struct Guest(mpsc::UnboundedSender<u64>);

    impl Opener for Guest {
        async fn open(&self, header: StreamHeader, fd: OwnedFd) -> Result<(), String> {
            let StreamHeader::Dialled { id } = header else { panic!("{header:?}") };
            let stream = std::os::unix::net::UnixStream::from(fd);
            UnixStream::from_std(stream).unwrap().write_all(b"hello").await.unwrap();
            self.0.send(id).unwrap();
            Ok(())
        }
    }

    #[tokio::test]
    async fn what_is_allowed_is_dialled_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let socket = tokio::net::UnixListener::bind(&path).unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let [port, secret] = [&listener, &closed].map(|listener| listener.local_addr().unwrap().port());
        let rule = |listen, guest: &str| SocketRule { listen, host: path.clone(), guest: guest.to_owned() };
        let passages = Passages {
            host_ports: vec![port],
            sockets: vec![rule(Side::Host, "/run/in"), rule(Side::Guest, "/run/out")],
            rules: Vec::new(),
        };
        let services = HostServices::new(&passages);
        assert_eq!(services.offer(), Offer { ports: vec![port], sockets: vec!["/run/out".to_owned()] });
        let (opened, mut ids) = mpsc::unbounded_channel();
        let (mut guest, theirs) = tokio::io::duplex(1 << 16);
        let serving = tokio::spawn(serve_host(theirs, Arc::new(services), Guest(opened)));
        let asked = [(7, Service::Port(port)), (8, Service::Socket(0))];
        for (id, service) in asked {
            codec::write_frame(&mut guest, &Dial { id, service }, DATA_LIMIT).await.unwrap();
            assert_eq!(ids.recv().await, Some(id));
        }
        let mut said = [0; 5];
        listener.accept().await.unwrap().0.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"hello");
        socket.accept().await.unwrap().0.read_exact(&mut said).await.unwrap();
        for service in
            [Service::Port(secret), Service::Port(0), Service::Socket(1), Service::Socket(u16::MAX)]
        {
            codec::write_frame(&mut guest, &Dial { id: 9, service }, DATA_LIMIT).await.unwrap();
            let refusal = codec::read_frame::<Refusal, _>(&mut guest, DATA_LIMIT).await.unwrap();
            assert_eq!(refusal, Some(Refusal { id: 9 }), "{service:?}");
        }
        drop(listener);
        let dial = Dial { id: 10, service: Service::Port(port) };
        codec::write_frame(&mut guest, &dial, DATA_LIMIT).await.unwrap();
        let refusal = codec::read_frame::<Refusal, _>(&mut guest, DATA_LIMIT).await.unwrap();
        assert_eq!(refusal, Some(Refusal { id: 10 }), "nobody listens there any more");
        drop(guest);
        serving.await.unwrap().unwrap();
        drop(closed);
    }
}
