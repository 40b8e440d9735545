//! What a quiet forward keeps of its rates while somebody floods another one, or the guest floods the host.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use dhow_tests::command::Running;
use dhow_tests::net::{connect, free_port, local};
use dhow_tests::{TOOL, Vm};

use crate::connections;

/// How long a rate is sampled.
const SAMPLE: Duration = Duration::from_secs(3);
/// For one read.
const PATIENCE: Duration = Duration::from_secs(120);
/// Connections that are held open.
const HELD: usize = 2000;
/// Bytes of an echo.
const PING: usize = 64;

/// Echoes a second on one connection.
fn echoes(address: SocketAddr) -> f64 {
    let mut stream = connect(address);
    stream.set_nodelay(true).expect("TCP_NODELAY");
    stream.set_read_timeout(Some(PATIENCE)).expect("a deadline");
    stream.write_all(b"echo\n").expect("a word to the guest");
    let (begun, mut count, mut bytes) = (Instant::now(), 0u32, [1; PING]);
    while begun.elapsed() < SAMPLE {
        stream.write_all(&bytes).expect("a ping");
        stream.read_exact(&mut bytes).expect("its echo");
        count += 1;
    }
    f64::from(count) / begun.elapsed().as_secs_f64()
}

/// Both rates of a quiet forward: echoes and new connections a second.
fn rates(address: SocketAddr) -> [f64; 2] {
    [echoes(address), connections::rate(address)]
}

fn serve(vm: &Vm, port: u16) -> Running {
    let server = vm.exec(&[TOOL, "serve", &local(port).to_string()]);
    let server = server.deadline(Duration::from_secs(24 * 3600)).spawn();
    server.expect("listening");
    drop(connect(local(port)));
    server
}

/// Connects and leaves, again and again, until told to stop.
fn come_and_go(address: SocketAddr, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        // Who is refused comes again as well.
        let _ = TcpStream::connect(address);
    }
}

/// The rows' names and texts, one after the other, to `row`.
pub fn rows(vm: &Vm, quiet: SocketAddr, row: impl Fn(&str, &str)) {
    let alone = rates(quiet);
    let tell = |name: &str, now: [f64; 2]| {
        let [echoes, new] =
            [0, 1].map(|at| format!("{:.0}/s ({:.0} %)", now[at], now[at] / alone[at] * 100.0));
        row(&format!("hostile: {name}"), &format!("{echoes}, {new}"));
    };
    tell("nothing; echoes and new connections of a quiet forward", alone);

    // What a guest with no processor to spare costs by itself, and a host with one less.
    let busy = vm
        .exec(&["nice", "-n", "19", "sh", "-c", "echo busy; while :; do :; done & while :; do :; done"])
        .spawn();
    busy.expect("busy");
    tell("two programs of the guest that only compute", rates(quiet));
    drop(busy);
    let stop = AtomicBool::new(false);
    let now = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        let now = rates(quiet);
        stop.store(true, Ordering::Relaxed);
        now
    });
    tell("one program of the host that only computes", now);

    let flood = vm.exec(&["nice", "-n", "19", TOOL, "everywhere", "10000", "10000"]).spawn();
    flood.expect("listening on");
    tell("10,000 listeners in the guest, two that flap", rates(quiet));
    drop(flood);

    let port = free_port();
    let server = serve(vm, port);
    let held: Vec<_> = (0..HELD).filter_map(|_| connections::exchange(local(port)).ok()).collect();
    tell(&format!("{} connections to another forward held open", held.len()), rates(quiet));
    drop(held);

    for clients in [1, 4] {
        let stop = AtomicBool::new(false);
        let now = std::thread::scope(|scope| {
            for _ in 0..clients {
                scope.spawn(|| come_and_go(local(port), &stop));
            }
            let now = rates(quiet);
            stop.store(true, Ordering::Relaxed);
            now
        });
        tell(&format!("{clients} that connect to another forward and leave"), now);
    }

    vm.sh(&format!("pkill -STOP -f '^{TOOL} serve 127.0.0.1:{port}$'")).ok();
    let stop = AtomicBool::new(false);
    let now = std::thread::scope(|scope| {
        for _ in 0..4 {
            let mut writer = connect(local(port));
            writer.set_write_timeout(Some(Duration::from_millis(100))).expect("a deadline");
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let _ = writer.write(&[0; 1 << 16]);
                }
            });
        }
        let now = rates(quiet);
        stop.store(true, Ordering::Relaxed);
        now
    });
    tell("4 that write to a server that never reads", now);
    drop(server);
}
