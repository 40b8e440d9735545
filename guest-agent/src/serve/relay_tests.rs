use std::os::fd::OwnedFd;
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::task::JoinHandle;

use super::*;
use crate::serve::direction::CHUNK;
use crate::serve::testing::{pair, within};

/// A TCP connection: the relay's end and the server's.
async fn tcp_pair() -> (Stream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (client, server) = tokio::join!(TcpStream::connect(address), listener.accept());
    let client = OwnedFd::from(client.unwrap().into_std().unwrap());
    (Stream::new(client).unwrap(), server.unwrap().0)
}

/// A relay between a host's socket and a TCP server's.
async fn host_and_server() -> (UnixStream, TcpStream, JoinHandle<io::Result<Carried>>) {
    let (agent, host) = pair();
    let (client, server) = tcp_pair().await;
    (host, server, tokio::spawn(relay(agent, client)))
}

/// As [`host_and_server`], for sockets that cannot be spliced.
async fn copying_host_and_server() -> (UnixStream, TcpStream, JoinHandle<io::Result<Carried>>) {
    let (agent, host) = pair();
    let (client, server) = tcp_pair().await;
    let relay = Relay { first: agent, second: client, there: plain(), back: plain() };
    (host, server, tokio::spawn(run_out(relay)))
}

async fn run_out(relay: Relay) -> io::Result<Carried> {
    match relay.run(Load::Any).await {
        Step::Ended(ended) => ended,
        Step::Leaves(_) => unreachable!("there is no other lane"),
    }
}

fn plain() -> Direction {
    let mut direction = Direction::default();
    direction.plain = true;
    direction
}

fn bytes(length: usize) -> Vec<u8> {
    (0..length as u64).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

fn hash(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

async fn send(mut writer: impl AsyncWrite + Unpin, bytes: &[u8]) {
    within(writer.write_all(bytes)).await.unwrap();
    writer.shutdown().await.unwrap();
}

async fn receive(mut reader: impl AsyncRead + Unpin) -> Vec<u8> {
    let mut received = Vec::new();
    within(reader.read_to_end(&mut received)).await.unwrap();
    received
}

async fn both_directions_at_once(
    length: usize,
    (host, server, relaying): (UnixStream, TcpStream, JoinHandle<io::Result<Carried>>),
) {
    let (host_reader, host_writer) = host.into_split();
    let (server_reader, server_writer) = server.into_split();
    let (there, back) = (bytes(length), bytes(length / 2 + 1));
    let ((), (), at_server, at_host) = tokio::join!(
        send(host_writer, &there),
        send(server_writer, &back),
        receive(server_reader),
        receive(host_reader),
    );
    assert_eq!(hash(&at_server), hash(&there), "{length}");
    assert_eq!(hash(&at_host), hash(&back), "{length}");
    let carried = within(relaying).await.unwrap().unwrap();
    assert_eq!(carried, Carried { there: there.len() as u64, back: back.len() as u64 });
}

#[tokio::test]
async fn both_directions_at_once_in_all_sizes() {
    for length in [0, 1, 4_096, 32_767, 32_768, 32_769, 65_536, CHUNK, CHUNK + 1, 1_000_000, 5_000_000] {
        both_directions_at_once(length, host_and_server().await).await;
        both_directions_at_once(length, copying_host_and_server().await).await;
    }
}

#[tokio::test]
async fn the_hosts_half_close_travels_and_the_answer_comes_after_it() {
    let (mut host, mut server, relaying) = host_and_server().await;
    send(&mut host, b"question").await;
    assert_eq!(receive(&mut server).await, b"question");
    send(&mut server, &bytes(300_000)).await;
    assert_eq!(hash(&receive(&mut host).await), hash(&bytes(300_000)));
    within(relaying).await.unwrap().unwrap();
}

#[tokio::test]
async fn the_servers_half_close_travels_and_the_host_goes_on() {
    let (mut host, mut server, relaying) = host_and_server().await;
    send(&mut server, b"greeting").await;
    assert_eq!(receive(&mut host).await, b"greeting");
    send(&mut host, &bytes(300_000)).await;
    assert_eq!(hash(&receive(&mut server).await), hash(&bytes(300_000)));
    within(relaying).await.unwrap().unwrap();
}

/// splice(2) stops in front of an urgent byte (tcp(7), "MSG_OOB") as if there were nothing, or the end.
#[tokio::test]
async fn what_follows_urgent_data_is_not_lost() {
    use rustix::net::SendFlags;
    use std::io::Write;
    for end_first in [false, true] {
        let (agent, mut host) = pair();
        let (client, server) = tcp_pair().await;
        let mut server = server.into_std().unwrap();
        let urgent = rustix::net::send(&server, b"!", SendFlags::OOB).unwrap();
        server.write_all(b"after it").unwrap();
        if end_first {
            server.shutdown(std::net::Shutdown::Write).unwrap();
        }
        let mut bulk = Direction::default();
        bulk.bulk = true;
        let relay = Relay { first: agent, second: client, there: Direction::default(), back: bulk };
        let relaying = tokio::spawn(run_out(relay));
        let mut got = [0; 8];
        within(host.read_exact(&mut got)).await.unwrap();
        assert_eq!((urgent, &got), (1, b"after it"));
        server.shutdown(std::net::Shutdown::Write).unwrap();
        send(&mut host, b"").await;
        assert_eq!(receive(&mut host).await, b"");
        within(relaying).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_slow_reader_loses_nothing_and_holds_its_writer_up() {
    let (mut host, server, relaying) = host_and_server().await;
    let sent = bytes(20_000_000);
    let mut server = server;
    let (hashed, ()) = tokio::join!(
        async {
            let (mut hasher, mut piece) = (Sha256::new(), vec![0; 10_000]);
            loop {
                let length = within(server.read(&mut piece)).await.unwrap();
                if length == 0 {
                    break <[u8; 32]>::from(hasher.finalize());
                }
                hasher.update(&piece[..length]);
                tokio::task::yield_now().await;
            }
        },
        send(&mut host, &sent),
    );
    assert_eq!(hashed, hash(&sent));
    server.shutdown().await.unwrap();
    assert_eq!(receive(&mut host).await, b"");
    within(relaying).await.unwrap().unwrap();
}

async fn leaves(relay: Relay, load: Load) -> Relay {
    match within(relay.run(load)).await {
        Step::Leaves(relay) => relay,
        Step::Ended(ended) => panic!("ended: {ended:?}"),
    }
}

/// Sends `count` pieces of `size` and has each read before the next is sent.
async fn exchange(
    mut from: impl AsyncWrite + Unpin,
    mut to: impl AsyncRead + Unpin,
    size: usize,
    count: usize,
) {
    let piece = bytes(size);
    let mut got = vec![0; size];
    for _ in 0..count {
        let (sent, received) = tokio::join!(from.write_all(&piece), to.read_exact(&mut got));
        sent.unwrap();
        received.unwrap();
        assert!(got == piece);
    }
}

#[tokio::test]
async fn bulk_data_leaves_the_quick_lane_and_small_pieces_the_bulk_lane() {
    let (agent, mut host) = pair();
    let (client, mut server) = tcp_pair().await;
    let exchanging = tokio::spawn(async move {
        exchange(&mut host, &mut server, 4 << 20, 4).await;
        exchange(&mut host, &mut server, 64, 500).await;
        exchange(&mut server, &mut host, 64, 500).await;
    });
    let relay = leaves(Relay::new(agent, client), Load::Light).await;
    let relay = leaves(relay.pack().unpack().unwrap(), Load::Bulk).await;
    let carried = within(run_out(relay.pack().unpack().unwrap())).await.unwrap();
    assert_eq!(carried, Carried { there: (16 << 20) + 500 * 64, back: 500 * 64 });
    exchanging.await.unwrap();
}

#[tokio::test]
async fn a_relay_leaves_the_lane_of_new_ones_after_some_pieces() {
    let (agent, mut host) = pair();
    let (client, mut server) = tcp_pair().await;
    let exchanging = tokio::spawn(async move {
        exchange(&mut host, &mut server, 64, 100).await;
        exchange(&mut server, &mut host, 64, 100).await;
    });
    let relay = leaves(Relay::new(agent, client), Load::New).await;
    let lane = Lane::start("quick").unwrap();
    let moving = relay.pack();
    let ran = lane.spawn(async move { go_on(moving.unpack().unwrap()).await });
    let carried = within(ran).await.unwrap().unwrap();
    assert_eq!(carried, Carried { there: 100 * 64, back: 100 * 64 });
    exchanging.await.unwrap();
    // One exchange is none of them.
    let (agent, mut host) = pair();
    let (client, mut server) = tcp_pair().await;
    let exchanging = tokio::spawn(async move {
        exchange(&mut host, &mut server, 64, 1).await;
        exchange(&mut server, &mut host, 64, 1).await;
    });
    let step = within(Relay::new(agent, client).run(Load::New)).await;
    assert!(matches!(step, Step::Ended(Ok(Carried { there: 64, back: 64 }))), "{step:?}");
    exchanging.await.unwrap();
}

/// On whatever lane a relay is, and while it changes between them.
#[tokio::test]
async fn nothing_is_lost_between_the_lanes() {
    let (mut host, mut server, relaying) = host_and_server().await;
    for _ in 0..5 {
        exchange(&mut host, &mut server, 3_000_000, 1).await;
        exchange(&mut host, &mut server, 64, 100).await;
        exchange(&mut server, &mut host, 3_000_000, 1).await;
        exchange(&mut server, &mut host, 64, 100).await;
    }
    drop(host);
    assert_eq!(receive(server).await, b"");
    within(relaying).await.unwrap().unwrap();
}

fn reset(stream: TcpStream) {
    rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
    drop(stream);
}

async fn is_reset(mut stream: impl AsyncRead + Unpin) {
    let error = within(stream.read_to_end(&mut Vec::new())).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_servers_reset_cuts_the_host() {
    let (mut host, server, relaying) = host_and_server().await;
    reset(server);
    assert!(within(relaying).await.unwrap().is_err());
    // A unix socket has no reset: closed, and nothing is taken any more.
    assert_eq!(receive(&mut host).await, b"");
    assert!(host.write_all(b"x").await.is_err());
}

#[tokio::test]
async fn a_servers_reset_after_its_half_close_is_noticed_in_silence() {
    let (mut host, mut server, relaying) = host_and_server().await;
    server.shutdown().await.unwrap();
    assert_eq!(receive(&mut host).await, b"");
    reset(server);
    assert!(within(relaying).await.unwrap().is_err());
}

#[tokio::test]
async fn a_hosts_reset_becomes_the_servers() {
    // TCP on both sides, so that the host's end can be reset.
    let (agent, host) = tcp_pair().await;
    let (client, server) = tcp_pair().await;
    let relaying = tokio::spawn(relay(agent, client));
    reset(host);
    assert!(within(relaying).await.unwrap().is_err());
    is_reset(server).await;
}

#[tokio::test]
async fn a_servers_last_words_reach_a_host_that_it_no_longer_hears() {
    let (mut host, mut server, relaying) = host_and_server().await;
    server.write_all(b"413 too large").await.unwrap();
    // What it has not read makes its close a reset, as of any server that refuses an upload.
    let (read, _) = tokio::join!(
        async {
            let mut words = [0; 13];
            within(host.read_exact(&mut words)).await.unwrap();
            words
        },
        async { server.shutdown().await },
    );
    assert_eq!(&read, b"413 too large");
    drop(server);
    let upload = bytes(8_000_000);
    assert!(within(host.write_all(&upload)).await.is_err());
    assert!(within(relaying).await.unwrap().is_err());
}

/// Whether something is under way.
fn holds(direction: &Direction) -> bool {
    !direction.rest.is_empty() || direction.pipe.as_ref().is_some_and(|pipe| pipe.held() > 0)
}

/// Writes into a direction whose sink is not read until nothing more is taken, then reads it empty.
async fn fill_and_empty(mut direction: Direction) {
    let (from, source) = pair();
    let (to, sink) = pair();
    let piece = bytes(256 << 10);
    let mut sent = Vec::new();
    while !holds(&direction) {
        // The socket takes less than a piece when its reader does not read.
        if let Ok(length) = source.try_write(&piece) {
            sent.extend_from_slice(&piece[..length]);
        }
        let polled = poll_fn(|cx| Poll::Ready(direction.poll(&from, &to, false, cx))).await;
        assert!(polled.is_pending());
        tokio::task::yield_now().await;
    }
    let read = async {
        let (mut sink, mut received) = (sink, vec![0; sent.len()]);
        within(sink.read_exact(&mut received)).await.unwrap();
        (received, sink)
    };
    let carry = poll_fn(|cx| match direction.poll(&from, &to, false, cx) {
        Poll::Pending if direction.carried == sent.len() as u64 && !holds(&direction) => Poll::Ready(()),
        Poll::Pending => Poll::Pending,
        Poll::Ready(result) => panic!("{result:?}"),
    });
    let ((received, _sink), ()) = tokio::join!(read, carry);
    assert_eq!(hash(&received), hash(&sent));
    assert_eq!(direction.rest.capacity(), 0);
    assert!(direction.pipe.is_none());
}

#[tokio::test]
async fn a_silent_direction_has_neither_buffer_nor_pipe() {
    fill_and_empty(Direction::default()).await;
    fill_and_empty(plain()).await;
}
