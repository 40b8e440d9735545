//! `make bench-ports`: how soon a listener of the guest is reached and gone, beside polling and `ssh -L`.
//!
//! The clocks of guest and host differ, so the guest says by a byte on an open connection that it listens;
//! from that byte on the host's clock counts until an exchange through the host's port has succeeded.
//! DHOW_BENCH narrows the rows to those whose names hold it.

#![allow(missing_docs)]

#[path = "../transport/bare.rs"]
mod bare;
mod connections;
mod cost;
mod hostile;
mod listener;
#[path = "../transport/ways.rs"]
#[allow(dead_code, reason = "this bench needs fewer of the ways")]
mod ways;

use std::net::TcpStream;
use std::time::Instant;

use dhow_tests::net::{free_port, local};
use dhow_tests::{Vm, report};
use listener::Listener;
use ways::Ways;

/// Rounds of a latency.
const ROUNDS: usize = 200;
/// Rounds with polls of 1 and 3 s. Each listens when the one before was seen, so it waits a whole period: half of that in the mean
/// where it is not so.
const POLLS: [(&str, u64, usize); 2] = [("a poll of 1 s", 1000, 30), ("a poll of 3 s", 3000, 10)];
/// Listeners that others have.
const OTHERS: usize = 500;

fn main() {
    report::bench(measure);
}

/// Says a row, at once.
fn row(name: &str, value: &str) {
    println!("| {name:60} | {value:32} |");
}

/// The value below which `share` of the samples are.
fn quantile(samples: &mut [f64], share: f64) -> f64 {
    samples.sort_by(f64::total_cmp);
    let at = (samples.len() as f64 * share).ceil() as usize;
    samples[at.clamp(1, samples.len()) - 1]
}

/// "p50 … p99 …" of milliseconds.
fn quantiles(mut samples: Vec<f64>) -> String {
    let [half, most, worst] = [0.5, 0.99, 1.0].map(|share| quantile(&mut samples, share));
    format!("p50 {half:.1}, p99 {most:.1}, most {worst:.1}")
}

fn measure() {
    let chosen = std::env::var("DHOW_BENCH").unwrap_or_default();
    let wanted = |name: &str| name.contains(&chosen);
    // As many as that are not forwarded by default; the agent and the host look at them all the same.
    let last = listener::OTHERS_FROM + OTHERS as u16;
    let ignore = format!("[[forward]]\nguest = \"{}-{last}\"\nignore = true\n", listener::OTHERS_FROM);
    let ways = Ways::with_profile(&ignore);
    let vm = &ways.vm;
    vm.import_image();
    println!("emulated; {ROUNDS} rounds where nothing else is said\n");
    row("", "");
    row("---", "---");
    if wanted("idle") {
        for (name, percent) in cost::idle(vm) {
            row(&format!("{name}, 60 s idle, % of a core"), &format!("{percent:.2}"));
        }
    }
    latencies(vm, &wanted);
    if wanted("connections") {
        for (way, address) in ways::WAYS.iter().zip(ways.servers).take(3) {
            let rates = (0..5).map(|_| connections::rate(address)).collect();
            row(&format!("new connections/s, one after another, {way}"), &median(rates));
            let rates = (0..5).map(|_| connections::rate_of_many(address)).collect();
            row(&format!("new connections/s, 16 at once, {way}"), &median(rates));
            row(&format!("1,000 at once, s until all have exchanged, {way}"), &connections::crowd(address));
        }
    }
    if wanted("hostile") {
        hostile::rows(vm, ways.servers[0], row);
    }
    ways.stop();
}

/// "MEDIAN (LEAST–MOST)".
fn median(mut samples: Vec<f64>) -> String {
    let [least, middle, most] = [0.0, 0.5, 1.0].map(|share| quantile(&mut samples, share));
    format!("{middle:.0} ({least:.0}–{most:.0})")
}

fn latencies(vm: &Vm, wanted: &impl Fn(&str) -> bool) {
    let mut listener = Listener::start(vm);
    for others in [0, OTHERS] {
        if !wanted("listen") {
            continue;
        }
        if others > 0 {
            let spent = cost::during(vm, || listener.many(others));
            row(&format!("burst of {others} listeners, CPU ms of agent and supervisor"), &spent);
        }
        let rounds: Vec<_> = (0..ROUNDS).map(|_| listener.round(free_port())).collect();
        let (there, gone) = rounds.into_iter().unzip();
        row(&format!("listen() → first exchange, {others} others, ms"), &quantiles(there));
        row(&format!("close() → the host's port is free, {others} others, ms"), &quantiles(gone));
        if wanted("docker run") {
            published(vm, others);
        }
    }
    listener.none();
    for (name, period, rounds) in POLLS {
        if wanted("poll") {
            let there = listener.polled(vm, period, rounds);
            row(
                &format!("listen() just after a look → seen by {name}, ms ({rounds} rounds)"),
                &quantiles(there),
            );
        }
    }
}

/// What becomes of ports that docker publishes. The container's server begins to listen after `docker run` has returned, so
/// that its own start is in the first of these.
fn published(vm: &Vm, others: usize) {
    let (mut refused, mut there, mut gone) = (0, Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let port = free_port();
        let publish = format!("{port}:7000");
        let container = vm.container(&["-p", &publish], &["guest-tool", "serve", "0.0.0.0:7000"]);
        let begun = Instant::now();
        refused += usize::from(TcpStream::connect(local(port)).is_err());
        listener::until_exchanged(port, b"echo\nx", 1);
        there.push(listener::milliseconds(begun));
        drop(container);
        gone.push(listener::until_free(port));
    }
    row(&format!("docker run -p returns → first exchange, {others} others, ms"), &quantiles(there));
    row(
        &format!("… of which the first connect was refused, {others} others"),
        &format!("{refused} of {ROUNDS}"),
    );
    row(&format!("docker rm -f returns → the host's port is free, {others} others, ms"), &quantiles(gone));
}
