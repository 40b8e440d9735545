//! Bulk data: MB/s of payload, from the first byte asked for until the last one is known to be there.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::ways::ask;

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
    let begin = Instant::now();
    let threads: Vec<_> = (0..streams)
        .map(|_| {
            std::thread::spawn(move || match direction {
                Direction::ToGuest => to_guest(address, write, || begin.elapsed() < SAMPLE),
                Direction::ToHost => to_host(address, write),
            })
        })
        .collect();
    let bytes: u64 = threads.into_iter().map(|thread| thread.join().expect("a stream")).sum();
    bytes as f64 / 1e6 / begin.elapsed().as_secs_f64()
}

fn to_guest(address: SocketAddr, write: usize, more: impl Fn() -> bool) -> u64 {
    let mut stream = ask(address, "drain");
    let zeros = vec![0; write];
    let mut sent = 0;
    while more() {
        stream.write_all(&zeros).expect("a write to the guest");
        sent += write as u64;
    }
    stream.shutdown(Shutdown::Write).expect("the half-close");
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).expect("the guest's count");
    assert_eq!(answer.trim(), sent.to_string(), "bytes that arrived in the guest");
    sent
}

fn to_host(address: SocketAddr, write: usize) -> u64 {
    let mut stream = ask(address, &format!("flood {} {write}", SAMPLE.as_millis()));
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
        let threads = (0..streams)
            .map(|at| {
                let end = Arc::clone(&end);
                std::thread::spawn(move || {
                    if at % 2 == 0 {
                        return to_guest(address, 64 << 10, || !end.load(Ordering::Relaxed));
                    }
                    let mut bytes = 0;
                    while !end.load(Ordering::Relaxed) {
                        bytes += to_host(address, 64 << 10);
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
