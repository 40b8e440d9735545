//! Round trips of 64 bytes: how many a second, and how long each takes.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::ways::ask;

/// How long one sample is taken.
const SAMPLE: Duration = Duration::from_secs(1);
const SIZE: usize = 64;
/// For one round trip.
const PATIENCE: u16 = 60_000;

/// One sample.
#[derive(Debug, Clone, Copy)]
pub struct Echo {
    /// Round trips a second of all connections together.
    pub rate: f64,
    /// Median of a round trip, in milliseconds.
    pub p50: f64,
    /// 99th percentile, in milliseconds.
    pub p99: f64,
}

struct Client {
    stream: TcpStream,
    sent: Instant,
    got: usize,
}

/// `connections` clients, each with one round trip under way at any time.
///
/// # Panics
/// When one fails.
pub fn sample(address: SocketAddr, connections: usize) -> Echo {
    let mut clients: Vec<_> = (0..connections)
        .map(|_| Client { stream: ask(address, "echo"), sent: Instant::now(), got: 0 })
        .collect();
    // One round trip each before the clock starts: all are connected to their ends then.
    for client in &mut clients {
        client.stream.write_all(&[0; SIZE]).expect("a first ping");
        client.stream.read_exact(&mut [0; SIZE]).expect("a first pong");
    }
    let begin = Instant::now();
    for client in &mut clients {
        client.send();
    }
    let mut trips = Vec::new();
    while begin.elapsed() < SAMPLE {
        let mut fds: Vec<_> =
            clients.iter().map(|client| PollFd::new(client.stream.as_fd(), PollFlags::POLLIN)).collect();
        let ready = poll(&mut fds, PollTimeout::from(PATIENCE)).expect("poll");
        assert!(ready > 0, "no answer for {PATIENCE} ms");
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        for (client, _) in clients.iter_mut().zip(ready).filter(|(_, ready)| *ready) {
            if client.receive() {
                trips.push(client.sent.elapsed().as_secs_f64() * 1000.0);
                client.send();
            }
        }
    }
    let rate = trips.len() as f64 / begin.elapsed().as_secs_f64();
    trips.sort_by(f64::total_cmp);
    let at = |part: f64| trips[((trips.len() - 1) as f64 * part) as usize];
    assert!(!trips.is_empty(), "no round trip in {} s", SAMPLE.as_secs());
    Echo { rate, p50: at(0.5), p99: at(0.99) }
}

impl Client {
    fn send(&mut self) {
        self.got = 0;
        self.sent = Instant::now();
        self.stream.write_all(&[0; SIZE]).expect("a ping");
    }

    /// Whether the answer is whole.
    fn receive(&mut self) -> bool {
        let got = self.stream.read(&mut [0; SIZE]).expect("a pong");
        assert!(got > 0, "the connection ended");
        self.got += got;
        self.got == SIZE
    }
}
