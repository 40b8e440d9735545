//! The supervisor's client against the device, with a guest that answers by itself.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::super::super::client::DeviceClient;
use super::super::super::{OpenRequest, PendingStream, Transport, TransportError};
use super::super::packet::{Op, SHUTDOWN_SEND};
use super::guest::{Guest, Stream};

/// A guest in a thread of its own: refuses port 1, is silent on port 2, echoes on others.
struct Running {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Running {
    fn start() -> (Self, OwnedFd) {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let (give, take) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let mut guest = Guest::new();
            give.send(guest.connect()).unwrap();
            while !stopped.load(Ordering::Relaxed) {
                guest.step();
                while let Some((header, payload)) = guest.inbox.pop_front() {
                    let stream = Stream {
                        host_port: header.src_port,
                        guest_port: header.dst_port,
                        buf_alloc: 1 << 20,
                        fwd_cnt: 0,
                    };
                    match (Op::from_wire(header.op), header.dst_port) {
                        (Some(Op::Request), 1) => guest.send(stream.header(Op::Rst), &[], &[]),
                        (Some(Op::Request), 2) => {}
                        (Some(Op::Request), _) => guest.send(stream.header(Op::Response), &[], &[]),
                        (Some(Op::Rw), _) => guest.send(stream.header(Op::Rw), &payload, &[]),
                        (Some(Op::Shutdown), _) if header.flags == SHUTDOWN_SEND => guest.finish(&stream),
                        (Some(Op::Shutdown), _) => guest.send(stream.header(Op::Rst), &[], &[]),
                        _ => {}
                    }
                }
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        let control = take.recv().unwrap();
        (Self { stop, thread: Some(thread) }, control)
    }

    fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop();
    }
}

fn request(guest_port: u32, preamble: &[u8], deadline: Duration) -> OpenRequest {
    OpenRequest { guest_port, preamble: preamble.to_vec(), reply_len: preamble.len(), deadline }
}

async fn eventually_empty(client: &DeviceClient) {
    for _ in 0..1000 {
        if client.stats().await.unwrap().connections == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("connections are left");
}

const LONG: Duration = Duration::from_secs(10);

/// Gives the stream an fd, through which the guest echoes.
async fn attach_and_echo(pending: PendingStream) {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    pending.attach(theirs.into()).await.unwrap();
    let echoed = tokio::task::spawn_blocking(move || {
        ours.write_all(b"and more").unwrap();
        ours.shutdown(std::net::Shutdown::Write).unwrap();
        let mut got = Vec::new();
        ours.read_to_end(&mut got).unwrap();
        got
    });
    assert_eq!(echoed.await.unwrap(), b"and more");
}

#[tokio::test]
async fn open_attach_and_echo() {
    let (_guest, control) = Running::start();
    let client = DeviceClient::new(control).unwrap();
    let pending = client.open(request(1000, b"hello", LONG)).await.unwrap();
    assert_eq!(pending.reply(), b"hello");
    attach_and_echo(pending).await;
    eventually_empty(&client).await;
}

#[tokio::test]
async fn a_stream_opened_ahead_is_told_later_what_it_is() {
    let (_guest, control) = Running::start();
    let client = DeviceClient::new(control).unwrap();
    let spare = client.open(request(1000, b"", LONG)).await.unwrap();
    assert_eq!(spare.reply(), b"");
    let pending = spare.exchange(b"hello".to_vec(), 5, LONG).await.unwrap();
    assert_eq!(pending.reply(), b"hello");
    // And once more, before it gets its fd.
    let pending = pending.exchange(b"again".to_vec(), 5, LONG).await.unwrap();
    assert_eq!(pending.reply(), b"again");
    attach_and_echo(pending).await;
    // One that is dropped, or whose reply does not come, is gone.
    drop(client.open(request(1000, b"", LONG)).await.unwrap());
    let spare = client.open(request(1000, b"", LONG)).await.unwrap();
    let late = spare.exchange(b"x".to_vec(), 2, Duration::from_millis(30)).await;
    assert!(matches!(late, Err(TransportError::Deadline(_))), "{late:?}");
    eventually_empty(&client).await;
}

#[tokio::test]
async fn many_at_once() {
    let (_guest, control) = Running::start();
    let client = DeviceClient::new(control).unwrap();
    let opens = (0..50u8).map(|i| {
        let client = client.clone();
        tokio::spawn(async move {
            let pending = client.open(request(1000, &[i; 20], LONG)).await.unwrap();
            assert_eq!(pending.reply(), [i; 20]);
            pending
        })
    });
    let mut pending = Vec::new();
    for open in opens.collect::<Vec<_>>() {
        pending.push(open.await.unwrap());
    }
    assert_eq!(client.stats().await.unwrap().connections, 50);
    drop(pending);
    eventually_empty(&client).await;
}

#[tokio::test]
async fn refusal_deadline_and_limits() {
    let (_guest, control) = Running::start();
    let client = DeviceClient::new(control).unwrap();
    let refused = client.open(request(1, b"x", LONG)).await;
    assert!(matches!(refused, Err(TransportError::Refused(1))), "{refused:?}");
    let late = client.open(request(2, b"x", Duration::from_millis(30))).await;
    assert!(matches!(late, Err(TransportError::Deadline(_))), "{late:?}");
    let long = client.open(request(1000, &[0; 60 * 1024 + 1], LONG)).await;
    assert!(matches!(long, Err(TransportError::TooLong { have: 61441, .. })), "{long:?}");
    eventually_empty(&client).await;
}

#[tokio::test]
async fn a_dropped_future_gives_the_stream_up() {
    let (_guest, control) = Running::start();
    let client = DeviceClient::new(control).unwrap();
    let open = tokio::time::timeout(Duration::from_millis(50), client.open(request(2, b"x", LONG)));
    assert!(open.await.is_err());
    eventually_empty(&client).await;
}

#[tokio::test]
async fn a_dead_device_is_told_apart() {
    let (mut guest, control) = Running::start();
    let client = DeviceClient::new(control).unwrap();
    let pending = client.open(request(1000, b"x", LONG)).await.unwrap();
    guest.stop();
    let again = client.open(request(1000, b"x", LONG)).await;
    assert!(matches!(again, Err(TransportError::DeviceGone)), "{again:?}");
    let (_ours, theirs) = UnixStream::pair().unwrap();
    assert!(matches!(pending.attach(theirs.into()).await, Err(TransportError::DeviceGone)));
}
