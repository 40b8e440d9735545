//! A program in the guest that listens at the host's word, and how long that takes to be seen.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use dhow_tests::command::Running;
use dhow_tests::net::{connect, free_port, local};
use dhow_tests::{TOOL, Vm};

/// Whatever takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(60);
/// First port of the listeners that others have.
pub const OTHERS_FROM: u16 = 10_000;
/// Between attempts of a client that is refused.
const PAUSE: Duration = Duration::from_micros(100);

/// The program and the way to it.
pub struct Listener {
    control: TcpStream,
    _running: Running,
}

/// Connects, and sends `said` until `length` bytes have come back, again and again until it succeeds.
pub fn until_exchanged(port: u16, said: &[u8], length: usize) {
    let begun = Instant::now();
    loop {
        let attempt = || -> std::io::Result<()> {
            let mut stream = TcpStream::connect(local(port))?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(said)?;
            stream.read_exact(&mut vec![0; length])
        };
        match attempt() {
            Ok(()) => return,
            Err(error) => assert!(begun.elapsed() < PATIENCE, "port {port}: {error}"),
        }
        std::thread::sleep(PAUSE);
    }
}

/// Milliseconds until `port` of the host can be bound.
pub fn until_free(port: u16) -> f64 {
    let begun = Instant::now();
    while TcpListener::bind(local(port)).is_err() {
        assert!(begun.elapsed() < PATIENCE, "port {port} is not free again");
        std::thread::sleep(PAUSE);
    }
    milliseconds(begun)
}

pub fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

impl Listener {
    /// Starts it.
    pub fn start(vm: &Vm) -> Self {
        let port = free_port();
        let running = vm.exec(&[TOOL, "listeners", &format!("127.0.0.1:{port}")]);
        let running = running.deadline(Duration::from_secs(24 * 3600)).spawn();
        running.expect("listening");
        let control = connect(local(port));
        control.set_nodelay(true).expect("TCP_NODELAY");
        Self { control, _running: running }
    }

    fn word(&mut self, line: &str) {
        self.control.write_all(format!("{line}\n").as_bytes()).expect("a word to the guest");
        self.control.read_exact(&mut [0]).expect("a byte of the guest");
    }

    /// Milliseconds until a listener is reached, and until its host port is free again.
    pub fn round(&mut self, port: u16) -> (f64, f64) {
        self.word(&format!("open {port}"));
        let begun = Instant::now();
        until_exchanged(port, b"x", 1);
        let there = milliseconds(begun);
        self.word(&format!("close {port}"));
        (there, until_free(port))
    }

    /// Listens on many ports.
    pub fn many(&mut self, count: usize) {
        self.word(&format!("many {OTHERS_FROM} {count}"));
    }

    /// Closes those.
    pub fn none(&mut self) {
        self.word("none");
    }

    /// Milliseconds until a program that polls has seen a listener, on the same way out.
    pub fn polled(&mut self, vm: &Vm, period: u64, rounds: usize) -> Vec<f64> {
        let polling = vm.exec(&[TOOL, "poll", &period.to_string()]);
        let polling = polling.deadline(Duration::from_secs(24 * 3600)).spawn();
        (0..rounds)
            .map(|_| {
                let port = free_port();
                self.word(&format!("open {port}"));
                let begun = Instant::now();
                while !polling.stdout().lines().any(|line| line == format!("+{port}")) {
                    assert!(begun.elapsed() < PATIENCE, "the poll does not see port {port}");
                    std::thread::sleep(PAUSE);
                }
                let seen = milliseconds(begun);
                self.word(&format!("close {port}"));
                seen
            })
            .collect()
    }
}
