//! One UDP forward: a session for each client, each a stream of its own into the guest.
//!
//! ```text
//! client ──datagram──► socket ──► session of the client's address ──► Udp stream ──► the guest's socket
//!        ◄────────────────────────────────────────────────────────────
//! ```
//! A session ends when nothing has gone either way for [`IDLE`], or when others need its place. What cannot
//! be passed on at once is dropped, as UDP may: a client that floods fills its own session's queue only.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use dhow_protocol::datagram;
use dhow_protocol::ports::Listener;
use dhow_protocol::stream::StreamHeader;
use tokio::net::{UdpSocket, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Opener;
use super::policy::endpoint;

mod places;

pub(super) use places::Budget;
use places::{Activity, MAX_SESSIONS};

/// A session without a datagram for that long is over.
const IDLE: Duration = Duration::from_secs(30);
/// Datagrams of a client that wait for the stream, and their bytes.
const QUEUE: usize = 64;
const QUEUE_BYTES: usize = 256 << 10;

/// A session as its forward sees it.
struct Client {
    queue: mpsc::Sender<Vec<u8>>,
    state: Arc<Activity>,
}

impl Client {
    /// Passes a datagram on; where there is no room it is lost, as a datagram may be.
    fn pass(&self, datagram: &[u8]) {
        let queued = &self.state.queued;
        if queued.fetch_add(datagram.len(), Ordering::Relaxed) + datagram.len() > QUEUE_BYTES
            || self.queue.try_send(datagram.to_vec()).is_err()
        {
            queued.fetch_sub(datagram.len(), Ordering::Relaxed);
        }
    }
}

/// Serves `socket` for ever: drop or abort the future to end it and its sessions.
pub(super) async fn serve<O: Opener>(socket: UdpSocket, guest: Listener, opener: O, budget: Budget) {
    serve_with(socket, guest, opener, budget, IDLE).await;
}

async fn serve_with<O: Opener>(
    socket: UdpSocket,
    guest: Listener,
    opener: O,
    budget: Budget,
    patience: Duration,
) {
    let forward = budget.join();
    let socket = Arc::new(socket);
    let mut clients: HashMap<SocketAddr, Client> = HashMap::new();
    let mut sessions = JoinSet::new();
    let mut buffer = vec![0; datagram::MAX_DATAGRAM];
    let mut full = false;
    loop {
        let (length, client) = tokio::select! {
            received = socket.recv_from(&mut buffer) => match received {
                Ok(received) => received,
                // It tells of an earlier answer that could not be delivered, and is told once.
                Err(_) => continue,
            },
            Some(_) = sessions.join_next() => {
                clients.retain(|_, client| !client.queue.is_closed());
                continue;
            }
        };
        if let Some(known) = clients.get(&client).filter(|known| !known.queue.is_closed()) {
            known.pass(&buffer[..length]);
            continue;
        }
        let Some(permit) = budget.place() else {
            budget.make_room();
            if !std::mem::replace(&mut full, true) {
                tracing::warn!(
                    port = guest.port,
                    "{MAX_SESSIONS} clients over UDP at once: the most silent ones go"
                );
            }
            continue;
        };
        let (queue, datagrams) = mpsc::channel(QUEUE);
        let state = Activity::new();
        let (socket, opener, activity) = (Arc::clone(&socket), opener.clone(), Arc::clone(&state));
        let task = sessions.spawn(async move {
            let _permit = permit;
            if let Err(error) = session(&socket, client, guest, &opener, datagrams, &activity, patience).await
            {
                tracing::debug!(error, port = guest.port, "a session over UDP failed");
            }
        });
        budget.note(forward, &state, task);
        let new = Client { queue, state };
        new.pass(&buffer[..length]);
        clients.insert(client, new);
    }
}

/// Carries one client's datagrams until none has come for long.
async fn session<O: Opener>(
    socket: &UdpSocket,
    client: SocketAddr,
    guest: Listener,
    opener: &O,
    mut datagrams: mpsc::Receiver<Vec<u8>>,
    activity: &Activity,
    patience: Duration,
) -> Result<(), String> {
    let told = |error: io::Error| error.to_string();
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(told)?;
    ours.set_nonblocking(true).map_err(told)?;
    let mut ours = UnixStream::from_std(ours).map_err(told)?;
    let target = endpoint(&guest);
    opener.open(StreamHeader::Udp { address: target.ip(), port: target.port() }, theirs.into()).await?;
    let (mut reader, mut writer) = ours.split();
    let there = async {
        while let Some(bytes) = datagrams.recv().await {
            activity.queued.fetch_sub(bytes.len(), Ordering::Relaxed);
            activity.note();
            datagram::write(&mut writer, &bytes).await?;
        }
        Ok(())
    };
    let back = async {
        let mut bytes = Vec::new();
        while datagram::read(&mut reader, &mut bytes).await? {
            activity.note();
            // A client that is gone, or an answer that is too large for it.
            let _ = socket.send_to(&bytes, client).await;
        }
        Ok(())
    };
    let idle = async {
        loop {
            let over = activity.last() + patience;
            if Instant::now() >= over {
                return Ok(());
            }
            tokio::time::sleep_until(over).await;
        }
    };
    let ended: io::Result<()> =
        tokio::select! { ended = there => ended, ended = back => ended, ended = idle => ended };
    ended.map_err(told)
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;
    use dhow_protocol::ports::Protocol;

    /// Echoes datagrams on each stream, and counts the streams.
    #[derive(Clone)]
    struct Echo(mpsc::UnboundedSender<StreamHeader>);

    impl Opener for Echo {
        async fn open(&self, header: StreamHeader, fd: OwnedFd) -> Result<(), String> {
            self.0.send(header).unwrap();
            let stream = std::os::unix::net::UnixStream::from(fd);
            stream.set_nonblocking(true).unwrap();
            let mut stream = UnixStream::from_std(stream).unwrap();
            tokio::spawn(async move {
                let mut bytes = Vec::new();
                while datagram::read(&mut stream, &mut bytes).await.is_ok_and(|more| more) {
                    datagram::write(&mut stream, &bytes).await.unwrap();
                }
            });
            Ok(())
        }
    }

    async fn answer(client: &UdpSocket) -> Vec<u8> {
        let mut bytes = vec![0; 70_000];
        let received = tokio::time::timeout(Duration::from_secs(20), client.recv(&mut bytes));
        let length = received.await.expect("an answer").unwrap();
        bytes[..length].to_vec()
    }

    #[tokio::test]
    async fn each_client_has_a_session_of_its_own() {
        let (asked, mut headers) = mpsc::unbounded_channel();
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let guest = Listener { protocol: Protocol::Udp, address: [0, 0, 0, 0].into(), port: 53 };
        let serving = tokio::spawn(serve(socket, guest, Echo(asked), Budget::default()));
        for number in 0..3u8 {
            let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            client.connect(address).await.unwrap();
            for length in [0, 1, 1400, 9000] {
                client.send(&vec![number; length]).await.unwrap();
                assert_eq!(answer(&client).await, vec![number; length]);
            }
            let header = headers.recv().await.unwrap();
            assert_eq!(header, StreamHeader::Udp { address: [127, 0, 0, 1].into(), port: 53 });
        }
        assert!(headers.try_recv().is_err(), "one stream for each client");
        serving.abort();
    }

    #[tokio::test]
    async fn a_silent_session_ends_and_a_new_datagram_begins_another() {
        let (asked, mut headers) = mpsc::unbounded_channel();
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        client.connect(socket.local_addr().unwrap()).await.unwrap();
        let guest = Listener { protocol: Protocol::Udp, address: [0, 0, 0, 0].into(), port: 53 };
        let patience = Duration::from_millis(5);
        let serving = tokio::spawn(serve_with(socket, guest, Echo(asked), Budget::default(), patience));
        let again = async {
            for _ in 0..3 {
                // Within the old session it begins none; some time later it does.
                while headers.try_recv().is_err() {
                    client.send(b"x").await.unwrap();
                    tokio::time::sleep(patience * 2).await;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(20), again).await.expect("new sessions");
        serving.abort();
    }

    /// A server's forward within `budget`: where it is, its task, and the streams that it asks for.
    async fn forward(
        budget: &Budget,
    ) -> (SocketAddr, tokio::task::JoinHandle<()>, mpsc::UnboundedReceiver<StreamHeader>) {
        let (asked, headers) = mpsc::unbounded_channel();
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let guest = Listener { protocol: Protocol::Udp, address: [0, 0, 0, 0].into(), port: 53 };
        (address, tokio::spawn(serve(socket, guest, Echo(asked), budget.clone())), headers)
    }

    async fn client_of(address: SocketAddr) -> UdpSocket {
        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        client.connect(address).await.unwrap();
        client
    }

    /// Says `number` until it comes back: the first attempt may only make the room.
    async fn served(client: &UdpSocket, number: u8) {
        let mut said = [0; 9];
        let served = async {
            loop {
                client.send(&[number]).await.unwrap();
                let wait = tokio::time::timeout(Duration::from_millis(20), client.recv(&mut said));
                if let Ok(Ok(length)) = wait.await {
                    assert_eq!(&said[..length], [number]);
                    return;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(20), served).await.expect("a place");
    }

    #[tokio::test]
    async fn the_most_silent_client_makes_room() {
        let (address, serving, mut headers) = forward(&Budget::of(2)).await;
        for number in 0..5 {
            served(&client_of(address).await, number).await;
            headers.recv().await.unwrap();
        }
        serving.abort();
    }

    #[tokio::test]
    async fn the_forward_that_has_most_makes_room_for_the_others() {
        let budget = Budget::of(3);
        let (crowded, one, _asked) = forward(&budget).await;
        let (quiet, two, mut asked_by_quiet) = forward(&budget).await;
        let first = client_of(quiet).await;
        served(&first, 1).await;
        for number in 2..9 {
            served(&client_of(crowded).await, number).await;
        }
        // It was silent for longest, and has kept its session.
        served(&first, 9).await;
        asked_by_quiet.recv().await.unwrap();
        assert!(asked_by_quiet.try_recv().is_err(), "its session had ended");
        served(&client_of(quiet).await, 10).await;
        one.abort();
        two.abort();
    }
}
