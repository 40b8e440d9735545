//! Bulk data: MB/s of payload, from the first byte asked for until the last one is known to be there.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dhow_tests::net;

/// How long a sender sends.
const SAMPLE: Duration = Duration::from_secs(1);

/// Which way the bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Host to guest.
    ToGuest,
    /// Guest to host.
    ToHost,
}

/// MB/s of `streams` together, in writes of `write` bytes.
///
/// # Panics
/// When one fails, or bytes are missing at its end.
pub fn sample(address: SocketAddr, direction: Direction, streams: usize, write: usize) -> f64 {
    let streams = connect_all(address, streams);
    let begin = Instant::now();
    let threads: Vec<_> = streams
        .into_iter()
        .map(|stream| {
            std::thread::spawn(move || match direction {
                Direction::ToGuest => to_guest(stream, write, || begin.elapsed() < SAMPLE),
                Direction::ToHost => to_host(stream, write),
            })
        })
        .collect();
    let bytes: u64 = threads.into_iter().map(|thread| thread.join().expect("a stream")).sum();
    bytes as f64 / 1e6 / begin.elapsed().as_secs_f64()
}

/// One after another and before any clock starts: QEMU's hostfwd has a backlog of one, and a client beyond it tries
/// again after a second.
fn connect_all(address: SocketAddr, streams: usize) -> Vec<TcpStream> {
    (0..streams)
        .map(|_| {
            let stream = net::connect(address);
            stream.set_nodelay(true).expect("TCP_NODELAY");
            stream
        })
        .collect()
}

fn to_guest(mut stream: TcpStream, write: usize, more: impl Fn() -> bool) -> u64 {
    stream.write_all(b"drain\n").expect("a request to the guest tool");
    let zeros = vec![0; write];
    let mut sent = 0;
    while more() {
        stream.write_all(&zeros).expect("a write to the guest");
        sent += write as u64;
    }
    stream.shutdown(Shutdown::Write).expect("the half-close");
    let mut answer = String::new();
    BufReader::new(&stream)
        .read_line(&mut answer)
        .unwrap_or_else(|error| panic!("the guest's count of {sent} bytes ({stream:?}): {error}"));
    assert_eq!(answer.trim(), sent.to_string(), "bytes that arrived in the guest");
    sent
}

fn to_host(mut stream: TcpStream, write: usize) -> u64 {
    let request = format!("flood {} {write}\n", SAMPLE.as_millis());
    stream.write_all(request.as_bytes()).expect("a request to the guest tool");
    let mut bytes = vec![0; 1 << 20];
    let mut got = 0;
    loop {
        match stream.read(&mut bytes).expect("a read from the guest") {
            0 => return got,
            read => got += read as u64,
        }
    }
}

/// Bulk streams in the background, half of them each way, until it is dropped.
#[derive(Debug)]
pub struct Background {
    end: Arc<AtomicBool>,
    threads: Vec<JoinHandle<u64>>,
}

impl Background {
    /// Starts `streams` of them.
    pub fn start(address: SocketAddr, streams: usize) -> Self {
        let end = Arc::new(AtomicBool::new(false));
        let threads = connect_all(address, streams)
            .into_iter()
            .enumerate()
            .map(|(at, stream)| {
                let end = Arc::clone(&end);
                std::thread::spawn(move || {
                    if at % 2 == 0 {
                        return to_guest(stream, 64 << 10, || !end.load(Ordering::Relaxed));
                    }
                    let mut bytes = to_host(stream, 64 << 10);
                    while !end.load(Ordering::Relaxed) {
                        let next = connect_all(address, 1).remove(0);
                        bytes += to_host(next, 64 << 10);
                    }
                    bytes
                })
            })
            .collect();
        Self { end, threads }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            assert!(thread.join().is_ok() || std::thread::panicking(), "a bulk stream failed");
        }
    }
}
