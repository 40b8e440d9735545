//! Ports that docker publishes: there when `docker run` returns, whichever way docker passes them on, and while dockerd is
//! away.

use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use dhow_tests::datagrams::{answer, low_port, udp_client};
use dhow_tests::net::{accepts, ask, check_echo, free_port, local, try_connect};
use dhow_tests::ports::{first_exchange, first_exchange_at, host_has_ipv6, listed, published};
use dhow_tests::wait::SetOnDrop;
use dhow_tests::{SOON, Vm, cases, wait_for, wait_until};

cases![Shared: without_the_userland_proxy, there_when_docker_run_returns, twenty_published_at_once,
    published_again_and_again, published_at_one_address, a_restart_of_dockerd_refuses_nobody,
    a_dockerd_that_stays_away_frees_its_ports];

/// How long dockerd may take to come back on a loaded machine.
const RETURN: Duration = Duration::from_secs(90);

/// For one question whether docker is back.
const QUICK: Duration = Duration::from_secs(40);

/// How often a case repeats what must never fail once: more often in a soak.
fn rounds() -> u32 {
    let soak = std::env::var("DHOW_SOAK").ok();
    soak.map_or(5, |count| count.parse::<u32>().expect("DHOW_SOAK is a number") * 10)
}

/// The settings that dockerd is started with.
const CONFIG: &str = "/opt/dhow/docker/etc/daemon.json";

/// Other settings in the place of dockerd's; they go when this is dropped.
struct OtherSettings<'a>(&'a Vm);

impl Drop for OtherSettings<'_> {
    fn drop(&mut self) {
        // After a failure nobody else restarts the dockerd that has them.
        let restart = if std::thread::panicking() { "; pkill -9 -x dockerd" } else { "" };
        let _ = self.0.sh(&format!("umount {CONFIG}{restart}")).spawn().try_wait();
    }
}

/// Kills dockerd and waits until another one answers.
fn restart_dockerd(vm: &Vm) {
    let before = vm.sh("pgrep -x dockerd").ok();
    vm.sh(&format!("kill -9 {}", before.trim())).ok();
    wait_for_another_dockerd(vm, &before);
}

/// Waits until docker answers, and not by the process with the pid `before`.
fn wait_for_another_dockerd(vm: &Vm, before: &str) {
    wait_until("docker's return", RETURN, || {
        let now = vm.sh("pgrep -x dockerd").deadline(QUICK).spawn().try_wait();
        now.is_ok_and(|now| now.status.success() && now.text() != before) && docker_answers(vm)
    });
}

fn docker_answers(vm: &Vm) -> bool {
    let answer = vm.docker(&["version"]).deadline(QUICK).spawn().try_wait();
    answer.is_ok_and(|output| output.status.success())
}

fn there_when_docker_run_returns(vm: &Vm) {
    for round in 0..rounds() {
        let port = free_port();
        let container = published(vm, port);
        // Never refused: the host listens. (The server itself may be a moment late: docker's proxy then closes.)
        if let Err(refused) = TcpStream::connect(local(port)) {
            panic!("round {round}: {refused}");
        }
        wait_for("the first exchange", SOON, || first_exchange(port));
        drop(container);
    }
}

fn twenty_published_at_once(vm: &Vm) {
    let begin = Barrier::new(20);
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..20)
            .map(|_| {
                scope.spawn(|| {
                    let port = free_port();
                    begin.wait();
                    let container = published(vm, port);
                    let connected = TcpStream::connect(local(port)).map(drop);
                    wait_for("the first exchange", SOON, || first_exchange(port));
                    drop(container);
                    connected
                })
            })
            .collect();
        for run in runs {
            run.join().unwrap().unwrap_or_else(|refused| panic!("one of twenty: {refused}"));
        }
    });
}

fn published_again_and_again(vm: &Vm) {
    let port = free_port();
    let container = published(vm, port);
    for round in 0..rounds() {
        wait_for("the server", SOON, || first_exchange(port));
        vm.docker(&["stop", "-t", "0", &container.name]).ok();
        let stopped = Instant::now();
        wait_until("the forward's end", SOON, || !accepts(Ipv4Addr::LOCALHOST, port));
        // Long before what a port lingers while dockerd is away, and before a look at all sockets.
        assert!(stopped.elapsed() < LINGER, "the port is free {:?} after docker stop", stopped.elapsed());
        vm.docker(&["start", &container.name]).ok();
        if let Err(refused) = try_connect(local(port)) {
            panic!("round {round}: {refused}");
        }
    }
}

/// Published at one address of the guest by docker, it is where that address is on the host.
fn published_at_one_address(vm: &Vm) {
    for (guest, host) in
        [("127.0.0.2", IpAddr::from(Ipv4Addr::LOCALHOST)), ("[::1]", Ipv6Addr::LOCALHOST.into())]
    {
        if host.is_ipv6() && !host_has_ipv6() {
            eprintln!("this host has no IPv6: {guest} is published, and not tried");
        }
        let port = free_port();
        let container =
            vm.container(&["-p", &format!("{guest}:{port}:7000")], &["guest-tool", "serve", "0.0.0.0:7000"]);
        if host.is_ipv4() || host_has_ipv6() {
            wait_for("the first exchange", SOON, || first_exchange_at(SocketAddr::new(host, port)));
            check_echo(SocketAddr::new(host, port), 1, 100_000);
        }
        wait_until("the published port", SOON, || listed(vm, "tcp", port).len() == 1);
        drop(container);
        wait_until("the forward's end", SOON, || listed(vm, "tcp", port).is_empty());
    }
}

/// `"userland-proxy": false`: no proxy, and docker's rules in the kernel do all the work.
fn without_the_userland_proxy(vm: &Vm) {
    let other = format!(
        "sed '1a \"userland-proxy\": false,' {CONFIG} >/run/daemon.json && mount --bind /run/daemon.json {CONFIG}"
    );
    vm.sh(&other).ok();
    let settings = OtherSettings(vm);
    restart_dockerd(vm);
    assert_eq!(vm.sh("pgrep -x docker-proxy || true").ok(), "");
    let port = free_port();
    let container = published(vm, port);
    // No proxy answers in the server's place: who is too early for it or for docker's rules waits, and is served.
    let first = first_exchange(port);
    wait_for("the first exchange", SOON, || first_exchange(port));
    check_echo(local(port), 1, 300_000);
    let second = free_port();
    let publish = format!("127.0.0.2:{second}:7000");
    let at_one_address = vm.container(&["-p", &publish], &["guest-tool", "serve", "0.0.0.0:7000"]);
    wait_for("the first exchange", SOON, || first_exchange(second));
    drop(at_one_address);
    // Not in the range for clients, where only a proxy tells that it is a server.
    let datagrams = low_port();
    let publish = format!("{datagrams}:7000/udp");
    let over_udp = vm.container(&["-p", &publish], &["guest-tool", "datagrams", "0.0.0.0:7000"]);
    assert_eq!(answer(&udp_client(datagrams), b"hello"), b"hello");
    drop((container, over_udp));
    wait_until("the forward's end", SOON, || !accepts(Ipv4Addr::LOCALHOST, port));
    drop(settings);
    restart_dockerd(vm);
    assert_ne!(
        vm.sh(&format!("grep -c userland-proxy {CONFIG} || true")).ok(),
        "1",
        "the settings are dockerd's own again"
    );
    first.unwrap_or_else(|failure| panic!("when docker run returned: {failure}"));
}

/// Between two clients who try whether they are refused.
const PROBE: Duration = Duration::from_millis(20);

/// Connects every [`PROBE`] while `done` is not set: how many came, and when the first of them was refused.
fn probe(port: u16, done: &AtomicBool) -> (u32, Option<Instant>) {
    let mut probes = 0;
    while !done.load(Ordering::Relaxed) {
        if TcpStream::connect(local(port)).is_err() {
            return (probes, Some(Instant::now()));
        }
        probes += 1;
        std::thread::sleep(PROBE);
    }
    (probes, None)
}

/// For how long a port lingers while dockerd is away, and a client of it waits.
const LINGER: Duration = Duration::from_secs(10);

/// From before the kill until docker answers again nobody who comes is refused, and who comes in the middle is served.
/// On a loaded machine dockerd may take longer than [`LINGER`]; then nobody has lost before that was over.
fn a_restart_of_dockerd_refuses_nobody(vm: &Vm) {
    let port = free_port();
    let container = published(vm, port);
    wait_for("the server", SOON, || first_exchange(port));
    let mut live = ask(port, "echo");
    let before = vm.sh("pgrep -x dockerd").ok();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let probing = scope.spawn(|| probe(port, &done));
        let _end = SetOnDrop(&done);
        vm.sh(&format!("kill -9 {}", before.trim())).ok();
        let killed = Instant::now();
        let waiting = first_exchange(port);
        let waited = killed.elapsed();
        wait_for_another_dockerd(vm, &before);
        done.store(true, Ordering::Relaxed);
        let (probes, refused) = probing.join().unwrap();
        eprintln!(
            "a client of a dockerd that was killed: {waiting:?} after {waited:?}; {probes} others came"
        );
        assert!(waiting.is_ok() || waited >= LINGER, "{waiting:?} after {waited:?}");
        if let Some(refused) = refused {
            let lingered = refused - killed;
            // The kill's own command took a moment to return.
            let least = LINGER - Duration::from_secs(1);
            assert!(lingered >= least, "refused after {lingered:?} and {probes} who were not");
        }
    });
    wait_for("the server after dockerd's return", SOON, || first_exchange(port));
    // docker's proxy has ended with it, and this connection with the proxy: it ends, and does not hang.
    live.set_read_timeout(Some(SOON)).unwrap();
    let ended = live.read(&mut [0]);
    let reset = |error: &std::io::Error| error.kind() == std::io::ErrorKind::ConnectionReset;
    assert!(matches!(&ended, Ok(0)) || ended.as_ref().is_err_and(reset), "{ended:?}");
    drop(container);
    wait_until("the forward's end", SOON, || !accepts(Ipv4Addr::LOCALHOST, port));
}

/// A dockerd that does not come back keeps its ports for a while, and not for ever.
fn a_dockerd_that_stays_away_frees_its_ports(vm: &Vm) {
    let port = free_port();
    let container = published(vm, port);
    wait_for("the server", SOON, || first_exchange(port));
    vm.sh(&format!("echo bad >/run/daemon.json && mount --bind /run/daemon.json {CONFIG}")).ok();
    let settings = OtherSettings(vm);
    let gone = Instant::now();
    vm.sh("pkill -9 -x dockerd").ok();
    wait_until("the port's end", RETURN, || !accepts(Ipv4Addr::LOCALHOST, port));
    assert!(gone.elapsed() >= LINGER, "it was free after {:?}", gone.elapsed());
    assert!(listed(vm, "tcp", port).is_empty());
    drop(settings);
    wait_until("docker's return", RETURN, || docker_answers(vm));
    wait_for("the server after dockerd's return", SOON, || first_exchange(port));
    drop(container);
}
