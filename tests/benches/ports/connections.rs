//! New connections to the guest tool's server: one after another, many at once, and a crowd.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How long a rate is sampled.
const SAMPLE: Duration = Duration::from_secs(3);
/// Clients at once.
const MANY: usize = 16;
/// Connections of a crowd.
const CROWD: usize = 1000;
/// For one read.
const PATIENCE: Duration = Duration::from_secs(120);

/// Connects and has one byte come back.
///
/// # Errors
/// It was refused, or did not come back.
pub fn exchange(address: SocketAddr) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"echo\nx")?;
    stream.read_exact(&mut [0])?;
    Ok(stream)
}

/// Exchanges a second of one client.
pub fn rate(address: SocketAddr) -> f64 {
    let (begun, mut count) = (Instant::now(), 0u32);
    while begun.elapsed() < SAMPLE {
        exchange(address).unwrap_or_else(|error| panic!("{address}: {error}"));
        count += 1;
    }
    f64::from(count) / begun.elapsed().as_secs_f64()
}

/// Exchanges a second of several clients together.
pub fn rate_of_many(address: SocketAddr) -> f64 {
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..MANY).map(|_| scope.spawn(|| rate(address))).collect();
        clients.into_iter().map(|client| client.join().expect("a client")).sum()
    })
}

/// Seconds until a thousand connections, all of them open, have exchanged; or how many failed.
pub fn crowd(address: SocketAddr) -> String {
    let failed = AtomicUsize::new(0);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..MANY)
            .map(|_| {
                scope.spawn(|| {
                    let streams = (0..CROWD.div_ceil(MANY)).filter_map(|_| {
                        exchange(address).inspect_err(|_| _ = failed.fetch_add(1, Ordering::Relaxed)).ok()
                    });
                    streams.collect::<Vec<_>>()
                })
            })
            .collect();
        // All stay open until the last one has exchanged.
        clients.into_iter().map(|client| client.join().expect("a client")).collect::<Vec<_>>()
    });
    match failed.into_inner() {
        0 => format!("{:.2}", begun.elapsed().as_secs_f64()),
        failed => format!("{failed} failed"),
    }
}
