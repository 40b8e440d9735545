use std::sync::atomic::{AtomicUsize, Ordering};

use dhow_protocol::hello::{HelloError, HelloReply};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{Mutex, mpsc};

use super::*;
use crate::serve::testing::{SECRET, preamble, raw_pair, reply, within};

/// Connections that a test makes.
struct Fake {
    incoming: Mutex<mpsc::UnboundedReceiver<io::Result<(OwnedFd, u32)>>>,
    accepted: Arc<AtomicUsize>,
}

impl Listener for Fake {
    async fn accept(&self) -> io::Result<(OwnedFd, u32)> {
        match self.incoming.lock().await.recv().await {
            Some(next) => {
                self.accepted.fetch_add(1, Ordering::Relaxed);
                next
            }
            None => std::future::pending().await,
        }
    }
}

/// An accept loop whose streams are accepted and held open until the host leaves.
struct Guest {
    connections: mpsc::UnboundedSender<io::Result<(OwnedFd, u32)>>,
    accepted: Arc<AtomicUsize>,
    served: mpsc::UnboundedReceiver<StreamHeader>,
}

impl Guest {
    fn start(limits: Limits) -> Self {
        let (connections, incoming) = mpsc::unbounded_channel();
        let (serving, served) = mpsc::unbounded_channel();
        let accepted = Arc::new(AtomicUsize::new(0));
        let fake = Fake { incoming: Mutex::new(incoming), accepted: Arc::clone(&accepted) };
        tokio::spawn(run(fake, SECRET, limits, move |arrival| {
            let serving = serving.clone();
            async move {
                let Arrival { stream, header, answer, room: _room } = arrival;
                answer.accept(&stream).await.unwrap();
                serving.send(header).unwrap();
                stream.hung_up().await;
            }
        }));
        Self { connections, accepted, served }
    }

    fn connect_from(&self, cid: u32) -> UnixStream {
        let (agent, host) = raw_pair();
        self.connections.send(Ok((agent, cid))).unwrap();
        host
    }

    fn connect(&self) -> UnixStream {
        self.connect_from(HOST_CID)
    }

    async fn say(&self, bytes: &[u8]) -> UnixStream {
        let mut host = self.connect();
        host.write_all(bytes).await.unwrap();
        host
    }

    async fn open(&self, header: &StreamHeader) -> (UnixStream, Result<HelloReply, HelloError>) {
        let mut host = self.say(&preamble(&SECRET, header)).await;
        let reply = reply(&mut host).await;
        (host, reply)
    }
}

async fn is_closed_in_silence(mut host: UnixStream) {
    let mut rest = Vec::new();
    // A socket that is closed with unread bytes is reset.
    let read = within(host.read_to_end(&mut rest)).await;
    assert!(read.is_ok() || read.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionReset));
    assert_eq!(rest, []);
}

fn patient() -> Limits {
    Limits { deadline: Duration::from_secs(3600), ..Limits::default() }
}

#[tokio::test]
async fn the_host_is_served() {
    let mut guest = Guest::start(patient());
    let header = StreamHeader::Unix { path: "/run/docker.sock".to_owned() };
    let (_host, opened) = guest.open(&header).await;
    opened.unwrap();
    assert_eq!(guest.served.recv().await.unwrap(), header);
}

#[tokio::test]
async fn a_hello_in_pieces_is_one() {
    let guest = Guest::start(patient());
    let mut host = guest.connect();
    for byte in preamble(&SECRET, &StreamHeader::Ports) {
        host.write_all(&[byte]).await.unwrap();
        tokio::task::yield_now().await;
    }
    reply(&mut host).await.unwrap();
}

#[tokio::test]
async fn another_secret_is_refused() {
    let mut guest = Guest::start(patient());
    let mut host = guest.say(&preamble(&Secret([8; 32]), &StreamHeader::Control)).await;
    assert!(matches!(reply(&mut host).await, Err(HelloError::Refused { status: Status::Proof, .. })));
    is_closed_in_silence(host).await;
    assert!(guest.served.try_recv().is_err());
}

/// HMAC (RFC 2104) under the test's secret, for hellos that no build of ours makes.
fn proof(message: &[u8]) -> [u8; 32] {
    let pad = |with: u8| {
        let mut block = [with; 64];
        block.iter_mut().zip(SECRET.0).for_each(|(byte, key)| *byte ^= key);
        block
    };
    let inner = Sha256::new().chain_update(pad(0x36)).chain_update(message).finalize();
    Sha256::new().chain_update(pad(0x5c)).chain_update(inner).finalize().into()
}

fn proven(mut fixed: Vec<u8>, header: &[u8]) -> Vec<u8> {
    fixed.truncate(64);
    let message = [b"dhow host hello 1", &fixed[..], header].concat();
    fixed.extend_from_slice(&proof(&message));
    fixed.extend_from_slice(header);
    fixed
}

#[tokio::test]
async fn versions_and_headers_of_a_proven_host_are_refused_in_words() {
    let guest = Guest::start(patient());
    let good = preamble(&SECRET, &StreamHeader::Control);
    assert_eq!(proven(good.clone(), &good[96..]), good);

    let mut newer = good.clone();
    newer[8..12].copy_from_slice(&[0xff, 0xff, 0xff, 0xff]);
    let mut host = guest.say(&proven(newer, &good[96..])).await;
    assert!(matches!(reply(&mut host).await, Err(HelloError::Refused { status: Status::Version, .. })));

    let mut unknown = good.clone();
    unknown[12] = 1;
    let mut host = guest.say(&proven(unknown, &[200])).await;
    assert!(matches!(reply(&mut host).await, Err(HelloError::Refused { status: Status::Malformed, .. })));
}

#[tokio::test]
async fn strangers_are_closed_in_silence() {
    let mut guest = Guest::start(patient());
    for cid in [0, 1, 3, u32::MAX] {
        let mut host = guest.connect_from(cid);
        // It may be closed before it speaks.
        let _ = host.write_all(&preamble(&SECRET, &StreamHeader::Control)).await;
        is_closed_in_silence(host).await;
    }
    is_closed_in_silence(guest.say(&[b'x'; 200]).await).await;
    let mut long = preamble(&SECRET, &StreamHeader::Control);
    long[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    is_closed_in_silence(guest.say(&long).await).await;
    let mut cut = guest.say(&preamble(&SECRET, &StreamHeader::Control)[..50]).await;
    cut.shutdown().await.unwrap();
    is_closed_in_silence(cut).await;
    assert!(guest.served.try_recv().is_err());
}

#[tokio::test]
async fn the_unproven_are_few_and_others_wait() {
    let guest = Guest::start(Limits { unproven: 2, ..patient() });
    let (first, _second) = (guest.connect(), guest.connect());
    let mut third = guest.say(&preamble(&SECRET, &StreamHeader::Control)).await;
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert_eq!(guest.accepted.load(Ordering::Relaxed), 2);
    drop(first);
    reply(&mut third).await.unwrap();
}

#[tokio::test]
async fn half_a_hello_has_a_deadline() {
    let guest =
        Guest::start(Limits { unproven: 1, deadline: Duration::from_millis(20), ..Limits::default() });
    let cut = guest.say(&preamble(&SECRET, &StreamHeader::Control)[..1]).await;
    is_closed_in_silence(cut).await;
    let (_host, opened) = guest.open(&StreamHeader::Control).await;
    opened.unwrap();
}

#[tokio::test]
async fn a_stream_may_be_opened_ahead_of_its_use() {
    let deadline = Duration::from_millis(20);
    let guest = Guest::start(Limits { deadline, ..Limits::default() });
    let (mut used, unused) = (guest.connect(), guest.connect());
    tokio::time::sleep(deadline * 3).await;
    used.write_all(&preamble(&SECRET, &StreamHeader::Control)).await.unwrap();
    reply(&mut used).await.unwrap();
    drop(unused);
}

#[tokio::test]
async fn streams_are_limited_and_come_free() {
    let mut guest = Guest::start(Limits { streams: 2, ..patient() });
    let (first, opened) = guest.open(&StreamHeader::Ports).await;
    opened.unwrap();
    let (_second, opened) = guest.open(&StreamHeader::Ports).await;
    opened.unwrap();
    let (_, refused) = guest.open(&StreamHeader::Ports).await;
    assert!(matches!(refused, Err(HelloError::Refused { status: Status::Busy, .. })));
    drop(first);
    // It comes free when its task has seen the end.
    within(async {
        while guest.open(&StreamHeader::Dns).await.1.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(guest.served.recv().await.unwrap(), StreamHeader::Ports);
}

#[tokio::test]
async fn a_failed_accept_is_not_the_last() {
    let guest = Guest::start(Limits { pause: Duration::from_millis(1), ..patient() });
    for _ in 0..3 {
        guest.connections.send(Err(io::Error::from_raw_os_error(libc::EMFILE))).unwrap();
    }
    let (_host, opened) = guest.open(&StreamHeader::Control).await;
    opened.unwrap();
}
