//! Services of the host in the guest: listens where the host says, and has the host dial.
//!
//! ```text
//! container ──► host.docker.internal:PORT ─┐
//!                                          ├─► HostServices ──Dial{id}──► host: allowed? connect
//! program ──► a socket's path ─────────────┘         ▲
//!                                                    └── Dialled{id}: a stream that the host opens
//! ```
//! What listens stays when the stream of requests ends: clients wait for the next one. A client whose
//! service cannot be reached sees a reset.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dhow_parent::unix::is_dead;
use dhow_protocol::codec::{self, DATA_LIMIT};
use dhow_protocol::errors::chain;
use dhow_protocol::host_services::{Dial, Offer, Refusal, Service};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::serve::relay;
use crate::serve::stream::Stream;

/// How long a client waits for the host, all in all.
const DEADLINE: Duration = Duration::from_secs(10);
/// Clients that wait at once; further ones stay in their listener's backlog.
const MAX_WAITING: usize = 512;
/// Until a place that somebody else has is tried again.
const LISTEN_AGAIN: Duration = Duration::from_secs(3);
/// Until accepting is tried again when descriptors have run out.
const RETRY: Duration = Duration::from_millis(100);

/// What asks for dials on the current stream.
type Link = Option<mpsc::Sender<Dial>>;

/// The host's services.
#[derive(Debug)]
pub struct HostServices {
    /// Where the host's ports are in the guest; none without a network.
    address: Option<Ipv4Addr>,
    link: watch::Sender<Link>,
    waiting: Mutex<HashMap<u64, oneshot::Sender<Stream>>>,
    listening: Mutex<BTreeMap<Service, Listening>>,
    /// Begins anywhere: a stream that an earlier worker has asked for is nobody's.
    next_id: AtomicU64,
    room: Arc<Semaphore>,
}

/// A listening socket; closed when dropped, its connections live on.
#[derive(Debug)]
struct Listening {
    /// Of a unix socket.
    path: Option<String>,
    accepting: JoinHandle<()>,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.accepting.abort();
        if let Some(path) = &self.path {
            // Somebody else may have removed it.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Of either kind.
enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    async fn accept(&self) -> io::Result<OwnedFd> {
        match self {
            Self::Tcp(listener) => {
                let (client, _) = listener.accept().await?;
                client.set_nodelay(true)?;
                Ok(client.into_std()?.into())
            }
            Self::Unix(listener) => Ok(listener.accept().await?.0.into_std()?.into()),
        }
    }
}

impl HostServices {
    /// Nothing listens yet; ports will at `address`.
    #[must_use]
    pub fn new(address: Option<Ipv4Addr>) -> Arc<Self> {
        Arc::new(Self {
            address,
            link: watch::Sender::new(None),
            waiting: Mutex::default(),
            listening: Mutex::default(),
            next_id: AtomicU64::new(RandomState::new().build_hasher().finish()),
            room: Arc::new(Semaphore::new(MAX_WAITING)),
        })
    }

    /// Serves a stream until it ends: listens for what is offered, and no longer for anything else. A newer
    /// stream replaces an older one.
    pub async fn serve<S: AsyncRead + AsyncWrite>(self: &Arc<Self>, stream: S, offer: Offer) {
        let mut missing = self.listen(&offer, true).await;
        let (mut reader, mut writer) = tokio::io::split(stream);
        let (dials, mut outgoing) = mpsc::channel::<Dial>(64);
        self.link.send_replace(Some(dials.clone()));
        let send = async {
            while let Some(dial) = outgoing.recv().await {
                codec::write_frame(&mut writer, &dial, DATA_LIMIT).await?;
            }
            Ok(())
        };
        let receive = async {
            while let Some(Refusal { id }) = codec::read_frame(&mut reader, DATA_LIMIT).await? {
                self.lock_waiting().remove(&id);
            }
            Ok::<(), codec::CodecError>(())
        };
        // Somebody in the guest may have a port for now.
        let again = async {
            while missing {
                tokio::time::sleep(LISTEN_AGAIN).await;
                missing = self.listen(&offer, false).await;
            }
            std::future::pending().await
        };
        let ended =
            tokio::select! { ended = send => ended, ended = receive => ended, ended = again => ended };
        if let Err(error) = ended {
            tracing::warn!(error = chain(&error), "the stream for the host's services ended");
        }
        self.link.send_if_modified(|current| {
            let ours = current.as_ref().is_some_and(|current| current.same_channel(&dials));
            if ours {
                *current = None;
            }
            ours
        });
    }

    /// Gives a stream that the host has opened to the client that waits for it.
    ///
    /// # Errors
    /// The stream, when nobody waits any more.
    pub fn dialled(&self, id: u64, stream: Stream) -> Result<(), Stream> {
        match self.lock_waiting().remove(&id) {
            Some(waiter) => waiter.send(stream),
            None => Err(stream),
        }
    }

    /// Whether a client waits for this dial.
    #[must_use]
    pub fn expects(&self, id: u64) -> bool {
        self.lock_waiting().get(&id).is_some_and(|waiter| !waiter.is_closed())
    }

    /// Listens where it does not yet; whether something is missing, which is told when `loud`.
    async fn listen(self: &Arc<Self>, offer: &Offer, loud: bool) -> bool {
        let mut missing = false;
        let ports = offer.ports.iter().map(|port| (Service::Port(*port), None));
        let sockets = (0..).zip(&offer.sockets).map(|(at, path)| (Service::Socket(at), Some(path.clone())));
        let wanted: BTreeMap<Service, Option<String>> = ports.chain(sockets).collect();
        let known: Vec<Service> = {
            let mut listening = self.lock_listening();
            listening.retain(|service, now| wanted.get(service) == Some(&now.path));
            listening.keys().copied().collect()
        };
        for (service, path) in wanted.into_iter().filter(|(service, _)| !known.contains(service)) {
            let accepting = match &path {
                None => self.listen_port(service).await,
                Some(path) => self.listen_socket(service, path),
            };
            match accepting {
                Ok(accepting) => {
                    self.lock_listening().insert(service, Listening { path, accepting });
                }
                Err(error) => {
                    missing = true;
                    if loud {
                        tracing::warn!(%error, ?service, path, "a service of the host has no place here yet");
                    }
                }
            }
        }
        missing
    }

    async fn listen_port(self: &Arc<Self>, service: Service) -> io::Result<JoinHandle<()>> {
        let (Some(address), Service::Port(port)) = (self.address, service) else {
            return Err(io::ErrorKind::AddrNotAvailable.into());
        };
        let listener = TcpListener::bind((address, port)).await?;
        Ok(tokio::spawn(Arc::clone(self).accept(service, Listener::Tcp(listener))))
    }

    fn listen_socket(self: &Arc<Self>, service: Service, path: &str) -> io::Result<JoinHandle<()>> {
        if let Some(folder) = Path::new(path).parent() {
            std::fs::create_dir_all(folder)?;
        }
        // An earlier worker's; what is no socket, or is listened at, is somebody's.
        let is_socket = std::fs::symlink_metadata(path).is_ok_and(|there| there.file_type().is_socket());
        if is_socket && is_dead(Path::new(path)) {
            std::fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)?;
        // For every user of the guest and its containers: the rule is the permission.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))?;
        Ok(tokio::spawn(Arc::clone(self).accept(service, Listener::Unix(listener))))
    }

    async fn accept(self: Arc<Self>, service: Service, listener: Listener) {
        loop {
            // The permit comes first: who cannot be served yet waits in the kernel's queue.
            let Ok(permit) = Arc::clone(&self.room).acquire_owned().await else { return };
            match listener.accept().await.and_then(Stream::new) {
                Ok(client) => {
                    let services = Arc::clone(&self);
                    tokio::spawn(async move {
                        let connected = services.connect(service, &client).await;
                        drop(permit);
                        match connected {
                            Some(host) => {
                                if let Err(error) = relay::relay(client, host).await {
                                    tracing::debug!(error = chain(&error), ?service, "a connection was cut");
                                }
                            }
                            None => client.cut(),
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, ?service, "a service of the host cannot accept");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    /// Has the host dial; `None` when it refuses, or does not answer in time, or the client leaves.
    async fn connect(&self, service: Service, client: &Stream) -> Option<Stream> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, mut dialled) = oneshot::channel();
        self.lock_waiting().insert(id, sender);
        let _place = Place { services: self, id };
        let asking = async {
            let mut links = self.link.subscribe();
            loop {
                let link = links.wait_for(Option::is_some).await.ok()?.clone()?;
                // Where it fails, the next stream is asked.
                let _ = link.send(Dial { id, service }).await;
                tokio::select! {
                    stream = &mut dialled => return stream.ok(),
                    () = client.gone() => return None,
                    // The host's side was restarted: the next stream is asked, under the same number.
                    changed = links.changed() => changed.ok()?,
                }
            }
        };
        timeout(DEADLINE, asking).await.ok().flatten()
    }

    fn lock_waiting(&self) -> MutexGuard<'_, HashMap<u64, oneshot::Sender<Stream>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_listening(&self) -> MutexGuard<'_, BTreeMap<Service, Listening>> {
        self.listening.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place among those who wait; given up when dropped.
struct Place<'a> {
    services: &'a HostServices,
    id: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        drop(self.services.lock_waiting().remove(&self.id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::testing::{raw_pair, within};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpStream, UnixStream};

    /// The host's end of a stream for `offer`.
    fn host(services: &Arc<HostServices>, offer: Offer) -> tokio::io::DuplexStream {
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        let services = Arc::clone(services);
        tokio::spawn(async move { services.serve(theirs, offer).await });
        ours
    }

    async fn asked(host: &mut tokio::io::DuplexStream) -> Dial {
        within(codec::read_frame(host, DATA_LIMIT)).await.unwrap().unwrap()
    }

    fn free_port() -> u16 {
        std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
    }

    async fn connect(port: u16) -> TcpStream {
        loop {
            // It listens a moment after the offer.
            match TcpStream::connect(("127.0.0.1", port)).await {
                Ok(stream) => return stream,
                Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        }
    }

    /// Answers a dial with a stream that says `word` and then echoes.
    async fn dial(services: &HostServices, Dial { id, .. }: Dial, word: &[u8]) {
        let (agent, mut host) = raw_pair();
        assert!(services.expects(id));
        services.dialled(id, Stream::new(agent).unwrap()).unwrap();
        host.write_all(word).await.unwrap();
        tokio::spawn(async move {
            let mut said = Vec::new();
            host.read_to_end(&mut said).await.unwrap();
            host.write_all(&said).await.unwrap();
        });
    }

    #[tokio::test]
    async fn ports_and_sockets_lead_to_the_host() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/agent.sock");
        let services = HostServices::new(Some(Ipv4Addr::LOCALHOST));
        let port = free_port();
        let offer = Offer { ports: vec![port], sockets: vec![path.to_str().unwrap().to_owned()] };
        let mut stream = host(&services, offer);
        let mut client = within(connect(port)).await;
        let first = asked(&mut stream).await;
        assert_eq!(first.service, Service::Port(port));
        dial(&services, first, b"hello ").await;
        client.write_all(b"me").await.unwrap();
        client.shutdown().await.unwrap();
        let mut said = String::new();
        within(client.read_to_string(&mut said)).await.unwrap();
        assert_eq!(said, "hello me");

        let mut client = within(UnixStream::connect(&path)).await.unwrap();
        let second = asked(&mut stream).await;
        assert_eq!(second.service, Service::Socket(0));
        dial(&services, second, b"hello").await;
        let mut said = [0; 5];
        within(client.read_exact(&mut said)).await.unwrap();
        assert_eq!(&said, b"hello");
        // A new offer without them.
        let _next = host(&services, Offer::default());
        within(async {
            while path.exists() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        assert!(TcpStream::connect(("127.0.0.1", port)).await.is_err());
    }

    #[tokio::test]
    async fn a_refusal_is_a_reset_and_a_client_waits_for_the_next_stream() {
        let services = HostServices::new(Some(Ipv4Addr::LOCALHOST));
        let port = free_port();
        let offer = Offer { ports: vec![port], sockets: Vec::new() };
        let mut stream = host(&services, offer.clone());
        let mut client = within(connect(port)).await;
        let Dial { id, .. } = asked(&mut stream).await;
        codec::write_frame(&mut stream, &Refusal { id }, DATA_LIMIT).await.unwrap();
        let error = within(client.read(&mut [0])).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert!(!services.expects(id));
        drop(stream);
        within(async {
            while services.link.borrow().is_some() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        let mut client = within(connect(port)).await;
        let mut stream = host(&services, offer);
        let next = asked(&mut stream).await;
        dial(&services, next, b"late").await;
        let mut said = [0; 4];
        within(client.read_exact(&mut said)).await.unwrap();
    }

    #[tokio::test]
    async fn a_client_that_leaves_leaves_nothing() {
        let services = HostServices::new(Some(Ipv4Addr::LOCALHOST));
        let port = free_port();
        let mut stream = host(&services, Offer { ports: vec![port], sockets: Vec::new() });
        let client = within(connect(port)).await;
        let Dial { id, .. } = asked(&mut stream).await;
        nix::sys::socket::setsockopt(
            &client,
            nix::sys::socket::sockopt::Linger,
            &libc::linger { l_onoff: 1, l_linger: 0 },
        )
        .unwrap();
        drop(client);
        within(async {
            while services.expects(id) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        let (agent, _host) = raw_pair();
        assert!(services.dialled(id, Stream::new(agent).unwrap()).is_err());
    }
}
