//! The guest's name server: containers and the guest ask here, the host answers over a stream.
//!
//! ```text
//! container ──UDP/TCP 53──► Dns ──DnsMessage──► host: its own hosts file, its own name servers
//!           ◄─────────────      ◄─────────────  (VPN names and split DNS work as on the host)
//! ```
//! A few names mean the host itself and are answered here. Queries wait a little for a stream, are
//! asked again on the next one when theirs breaks, and end in SERVFAIL, never in silence.

mod answer;

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use dhow_protocol::codec::{self, DATA_LIMIT};
use dhow_protocol::stream::DnsMessage;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::tcp::OwnedWriteHalf;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Queries that wait for the host at once; further ones get SERVFAIL.
const MAX_OUTSTANDING: usize = 512;
/// TCP connections at once; further ones are closed.
const MAX_TCP: usize = 64;
/// A TCP connection without a query for that long is closed (RFC 7766, 6.2.3).
const TCP_IDLE: Duration = Duration::from_secs(30);

/// How long a query waits.
#[derive(Debug, Clone, Copy)]
struct Patience {
    /// For a stream to be there.
    stream: Duration,
    /// For the answer, all in all.
    answer: Duration,
}

const PATIENCE: Patience = Patience { stream: Duration::from_secs(5), answer: Duration::from_secs(10) };

/// The name server.
#[derive(Debug)]
pub struct Dns {
    host: Ipv4Addr,
    patience: Patience,
    link: watch::Sender<Option<Arc<Link>>>,
    next_id: AtomicU64,
    outstanding: Arc<Semaphore>,
    connections: Arc<Semaphore>,
}

/// One stream to the host, and who waits for answers on it.
#[derive(Debug)]
struct Link {
    queries: mpsc::Sender<DnsMessage>,
    /// `None` when the stream is over: nobody may wait on it any more.
    waiting: Mutex<Option<HashMap<u64, oneshot::Sender<Vec<u8>>>>>,
}

impl Dns {
    /// Listens on port 53 of `address`; `host_address` is what the host's own names resolve to.
    ///
    /// # Errors
    /// The address cannot be bound.
    pub async fn start(address: Ipv4Addr, host_address: Ipv4Addr) -> io::Result<Arc<Self>> {
        Ok(Self::start_on((address, 53).into(), host_address, PATIENCE).await?.0)
    }

    async fn start_on(
        address: SocketAddr,
        host: Ipv4Addr,
        patience: Patience,
    ) -> io::Result<(Arc<Self>, SocketAddr)> {
        let udp = UdpSocket::bind(address).await?;
        let address = udp.local_addr()?;
        let tcp = TcpListener::bind(address).await?;
        let dns = Arc::new(Self {
            host,
            patience,
            link: watch::Sender::new(None),
            next_id: AtomicU64::new(0),
            outstanding: Arc::new(Semaphore::new(MAX_OUTSTANDING)),
            connections: Arc::new(Semaphore::new(MAX_TCP)),
        });
        tokio::spawn(Arc::clone(&dns).serve_udp(udp));
        tokio::spawn(Arc::clone(&dns).serve_tcp(tcp));
        Ok((dns, address))
    }

    /// Sends queries to the host over `stream` until it ends. A newer stream replaces an older one.
    pub async fn serve<S: AsyncRead + AsyncWrite>(&self, stream: S) {
        let (mut reader, mut writer) = tokio::io::split(stream);
        let (queries, mut outgoing) = mpsc::channel::<DnsMessage>(64);
        let link = Arc::new(Link { queries, waiting: Mutex::new(Some(HashMap::new())) });
        self.link.send_replace(Some(Arc::clone(&link)));
        let send = async {
            while let Some(query) = outgoing.recv().await {
                codec::write_frame(&mut writer, &query, DATA_LIMIT).await?;
            }
            Ok(())
        };
        let receive = async {
            while let Some(answer) = codec::read_frame::<DnsMessage, _>(&mut reader, DATA_LIMIT).await? {
                // An answer that nobody waits for came too late.
                if let Some(waiter) = link.take(answer.id) {
                    let _ = waiter.send(answer.message);
                }
            }
            Ok::<(), codec::CodecError>(())
        };
        let ended = tokio::select! { ended = send => ended, ended = receive => ended };
        if let Err(error) = ended {
            tracing::warn!(%error, "the stream for name queries ended");
        }
        self.link.send_if_modified(|current| {
            let ours = current.as_ref().is_some_and(|current| Arc::ptr_eq(current, &link));
            if ours {
                *current = None;
            }
            ours
        });
        // Whoever waits notices, and asks again on the next stream.
        link.close();
    }

    async fn serve_udp(self: Arc<Self>, socket: UdpSocket) {
        let socket = Arc::new(socket);
        let mut buffer = vec![0; 65_535];
        loop {
            // An error here tells of an earlier answer that could not be delivered.
            let Ok((length, client)) = socket.recv_from(&mut buffer).await else { continue };
            let Some(query) = answer::Query::parse(&buffer[..length]) else { continue };
            let Ok(permit) = Arc::clone(&self.outstanding).try_acquire_owned() else {
                let _ = socket.try_send_to(&query.failed(), client);
                continue;
            };
            let (dns, socket) = (Arc::clone(&self), Arc::clone(&socket));
            tokio::spawn(async move {
                let answer = dns.answer(&query).await;
                drop(permit);
                let _ = socket.send_to(&query.fit_udp(answer), client).await;
            });
        }
    }

    async fn serve_tcp(self: Arc<Self>, listener: TcpListener) {
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                // Out of descriptors: others must close theirs first.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let Ok(permit) = Arc::clone(&self.connections).try_acquire_owned() else { continue };
            let dns = Arc::clone(&self);
            tokio::spawn(async move {
                dns.serve_connection(stream).await;
                drop(permit);
            });
        }
    }

    /// Several queries on one connection, answered as answers come (RFC 7766, 6.2.1.1 and 7).
    async fn serve_connection(self: Arc<Self>, stream: TcpStream) {
        let (mut reader, writer) = stream.into_split();
        let writer = Arc::new(tokio::sync::Mutex::new(writer));
        let mut answering = JoinSet::new();
        while let Ok(Ok(length)) = timeout(TCP_IDLE, reader.read_u16()).await {
            let mut message = vec![0; usize::from(length)];
            match timeout(TCP_IDLE, reader.read_exact(&mut message)).await {
                Ok(Ok(_)) => {}
                _ => break,
            }
            let Some(query) = answer::Query::parse(&message) else { break };
            let Ok(permit) = Arc::clone(&self.outstanding).acquire_owned().await else { break };
            let (dns, writer) = (Arc::clone(&self), Arc::clone(&writer));
            answering.spawn(async move {
                let answer = dns.answer(&query).await;
                drop(permit);
                let _ = write_tcp(&mut *writer.lock().await, &answer).await;
            });
            while answering.try_join_next().is_some() {}
        }
        // The client may have closed its half only; it still gets what it asked for.
        while answering.join_next().await.is_some() {}
    }

    /// The complete answer to `query`, of any size.
    async fn answer(&self, query: &answer::Query) -> Vec<u8> {
        if let Some(own) = query.own_answer(self.host) {
            return own;
        }
        match timeout(self.patience.answer, self.ask_host(query.message())).await {
            Ok(Some(answer)) => query.checked(answer),
            _ => query.failed(),
        }
    }

    /// Asks on the current stream, and on the next one where that breaks. `None` without any.
    async fn ask_host(&self, message: &[u8]) -> Option<Vec<u8>> {
        let mut links = self.link.subscribe();
        loop {
            let link =
                timeout(self.patience.stream, links.wait_for(Option::is_some)).await.ok()?.ok()?.clone()?;
            let id = self.next_id.fetch_add(1, Ordering::Relaxed);
            let Some(waiter) = link.register(id) else {
                // This stream has just ended, and is about to be taken away.
                links.changed().await.ok()?;
                continue;
            };
            let sent = link.queries.send(DnsMessage { id, message: message.to_vec() }).await;
            if sent.is_ok()
                && let Ok(answer) = waiter.receive().await
            {
                return Some(answer);
            }
        }
    }
}

impl Link {
    fn register(self: &Arc<Self>, id: u64) -> Option<Waiter> {
        let (sender, receiver) = oneshot::channel();
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.as_mut()?.insert(id, sender);
        Some(Waiter { link: Arc::clone(self), id, receiver })
    }

    fn take(&self, id: u64) -> Option<oneshot::Sender<Vec<u8>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).as_mut()?.remove(&id)
    }

    fn close(&self) {
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// A place among those who wait; given up when dropped, so that a timeout leaves nothing behind.
struct Waiter {
    link: Arc<Link>,
    id: u64,
    receiver: oneshot::Receiver<Vec<u8>>,
}

impl Waiter {
    async fn receive(mut self) -> Result<Vec<u8>, oneshot::error::RecvError> {
        (&mut self.receiver).await
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        drop(self.link.take(self.id));
    }
}

async fn write_tcp(writer: &mut OwnedWriteHalf, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    let mut framed = Vec::with_capacity(message.len() + 2);
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(message);
    writer.write_all(&framed).await
}

#[cfg(test)]
mod tests;
