//! Listening sockets of the guest on the host's loopback.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener};

use dhow_guest_tool::{Pattern, Summary};
use nix::sys::socket::{setsockopt, sockopt};

use dhow_tests::command::Running;
use dhow_tests::net::{
    accepts, ask, ask_at, check_download, check_echo, check_upload, connect, free_port, local, own_address,
    read_all,
};
use dhow_tests::sockets::listening;
use dhow_tests::{SOON, TOOL, Vm, cases, wait_for, wait_until};

cases![Shared: a_published_port_serves_on_the_loopback_alone, sizes_both_ways, fifty_connections_at_once,
    half_close_from_either_side, a_reset_stays_a_reset, a_guest_that_refuses_is_a_reset, a_port_in_use_is_told,
    a_listener_of_the_host_network, ipv6_listeners, a_port_comes_and_goes_again_and_again,
    a_slow_reader_does_not_hold_up_others, ten_thousand_short_exchanges];

/// The guest tool's server in the guest's root namespace; it ends when this is dropped.
struct Server {
    running: Running,
    port: u16,
}

impl Server {
    fn on(vm: &Vm, address: &str) -> Self {
        Self::at(vm, address, free_port())
    }

    fn at(vm: &Vm, address: &str, port: u16) -> Self {
        let running = vm.exec(&[TOOL, "serve", &format!("{address}:{port}")]).spawn();
        running.expect("listening");
        Self { running, port }
    }
}

fn a_published_port_serves_on_the_loopback_alone(vm: &Vm) {
    let port = free_port();
    let script = "mkdir /www && echo served >/www/index.html && exec httpd -f -p 80 -h /www";
    let publish = format!("{port}:80");
    let container = vm.container(&["-p", &publish], &["sh", "-c", script]);
    // docker-proxy listens before the server does.
    wait_for("the page", SOON, || {
        let mut stream = connect(local(port));
        let mut page = String::new();
        let got = stream.write_all(b"GET / HTTP/1.0\r\n\r\n").and_then(|()| stream.read_to_string(&mut page));
        if page.ends_with("served\n") { Ok(()) } else { Err(format!("{got:?} {page:?}")) }
    });
    assert!(!accepts(own_address(), port), "the port is open to the network");
    let listed = vm.dhow(&["ports"]).ok();
    assert!(listed.contains(&format!("127.0.0.1:{port}")), "{listed}");
    let mut processes = vm.processes();
    let mut bound = listening(&processes, "tcp");
    assert!(bound.contains(&local(port)), "{bound:?}");
    // passt has sockets of its own for what the guest sends outwards over UDP.
    processes.retain(|process| !process.line.contains("passt "));
    bound.extend(listening(&processes, "udp"));
    assert!(bound.iter().all(|address| address.ip().is_loopback()), "open to the network: {bound:?}");
    drop(container);
    wait_until("the forward's end", SOON, || !accepts(Ipv4Addr::LOCALHOST, port));
}

/// Around the guest's buffers (4 KiB), the packets of other devices (32 KiB), and the largest packet (64 KiB).
const SIZES: [usize; 8] = [0, 1, 4096, 32_767, 32_768, 32_769, 65_536, 1_000_000];

fn sizes_both_ways(vm: &Vm) {
    let server = Server::on(vm, "127.0.0.1");
    let address = local(server.port);
    for (seed, size) in (0..).zip(SIZES) {
        check_upload(address, seed, size);
        check_download(address, seed, size);
        check_echo(address, seed, size);
    }
    check_upload(address, 100, 20_000_000);
    check_download(address, 101, 20_000_000);
    // The same through docker's own proxy.
    let port = free_port();
    let container = vm.container(&["-p", &format!("{port}:7000")], &["guest-tool", "serve", "0.0.0.0:7000"]);
    wait_until("the server in the container", SOON, || container.logs().contains("listening"));
    for (seed, size) in (0..).zip(SIZES) {
        check_echo(local(port), seed, size);
    }
}

fn fifty_connections_at_once(vm: &Vm) {
    let server = Server::on(vm, "127.0.0.1");
    let address = local(server.port);
    let begin = std::sync::Arc::new(std::sync::Barrier::new(50));
    let clients: Vec<_> = (0..50)
        .map(|seed| {
            let begin = begin.clone();
            std::thread::spawn(move || {
                begin.wait();
                check_echo(address, seed, 200_000);
            })
        })
        .collect();
    let failed = clients.into_iter().filter_map(|client| client.join().err()).count();
    assert_eq!(failed, 0, "of fifty connections");
}

fn half_close_from_either_side(vm: &Vm) {
    let server = Server::on(vm, "127.0.0.1");
    // The client ends first: the answer comes after all was read.
    check_upload(local(server.port), 1, 100_000);
    // The guest ends first: its client may still send.
    let mut stream = ask(server.port, "close-first");
    assert_eq!(read_all(&mut stream), b"bye\n");
    let bytes = Pattern::bytes(2, 300_000);
    stream.write_all(&bytes).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    server.running.expect(&format!("close-first {}", Summary::of(&bytes)));
}

fn a_reset_stays_a_reset(vm: &Vm) {
    let server = Server::on(vm, "127.0.0.1");
    let mut stream = ask(server.port, "reset");
    let error = stream.read(&mut [0]).expect_err("a reset by the guest");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);

    let mut stream = ask(server.port, "expect-reset");
    let mut ready = [0; 6];
    stream.read_exact(&mut ready).unwrap();
    setsockopt(&stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 }).unwrap();
    drop(stream);
    server.running.expect("expect-reset reset");
}

fn a_guest_that_refuses_is_a_reset(vm: &Vm) {
    let server = Server::on(vm, "127.0.0.1");
    check_echo(local(server.port), 1, 10);
    let rule = format!("OUTPUT -o lo -p tcp --dport {} --syn -j REJECT --reject-with tcp-reset", server.port);
    vm.sh(&format!("iptables -I {rule}")).ok();
    let mut stream = connect(local(server.port));
    let refused = stream.read(&mut [0]);
    vm.sh(&format!("iptables -D {rule}")).ok();
    let error = refused.expect_err("an empty success where the guest refused");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    check_echo(local(server.port), 2, 10);
}

fn a_port_in_use_is_told(vm: &Vm) {
    let taken = TcpListener::bind(local(0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let _server = Server::at(vm, "127.0.0.1", port);
    let line = wait_for("the listener in `dhow ports`", SOON, || {
        let listed = vm.dhow(&["ports"]).ok();
        let line = listed.lines().find(|line| line.contains(&port.to_string())).map(str::to_owned);
        line.ok_or(listed)
    });
    assert!(line.contains("in use"), "{line}");
    let log = std::fs::read_to_string(vm.data("log/keeper.log")).unwrap();
    let told = |line: &str| line.contains("not forwarded") && line.contains(&format!(":{port}"));
    assert!(log.lines().any(told), "nothing about port {port} in the log:\n{log}");
    drop(taken);
    wait_until("the forward once the port is free", SOON, || accepts(Ipv4Addr::LOCALHOST, port));
    check_echo(local(port), 1, 1000);
}

fn a_listener_of_the_host_network(vm: &Vm) {
    let port = free_port();
    let serve = format!("0.0.0.0:{port}");
    let container = vm.container(&["--network", "host"], &["guest-tool", "serve", &serve]);
    check_echo(local(port), 1, 50_000);
    drop(container);
    wait_until("the forward's end", SOON, || !accepts(Ipv4Addr::LOCALHOST, port));
}

fn ipv6_listeners(vm: &Vm) {
    let host_has_ipv6 = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok();
    let wildcard = Server::on(vm, "[::]");
    check_echo(local(wildcard.port), 1, 1000);
    let loopback = Server::on(vm, "[::1]");
    if host_has_ipv6 {
        for port in [wildcard.port, loopback.port] {
            let mut stream = ask_at(SocketAddr::from((Ipv6Addr::LOCALHOST, port)), "source 1000 5");
            assert!(read_all(&mut stream) == Pattern::bytes(5, 1000));
        }
    } else {
        wait_until("the listener in `dhow ports`", SOON, || {
            vm.dhow(&["ports"]).ok().contains(&loopback.port.to_string())
        });
    }
}

fn a_port_comes_and_goes_again_and_again(vm: &Vm) {
    let port = free_port();
    for seed in 0..10 {
        let server = Server::at(vm, "127.0.0.1", port);
        check_echo(local(port), seed, 100);
        drop(server);
        wait_until("the forward's end", SOON, || !accepts(Ipv4Addr::LOCALHOST, port));
    }
}

fn a_slow_reader_does_not_hold_up_others(vm: &Vm) {
    let server = Server::on(vm, "127.0.0.1");
    // More than every buffer on the way, and nobody reads it.
    let slow: Vec<_> = (0..8).map(|seed| ask(server.port, &format!("source 50000000 {seed}"))).collect();
    for seed in 0..10 {
        check_echo(local(server.port), seed, 300_000);
    }
    // What waited comes whole.
    let mut slow = slow.into_iter().next().unwrap();
    let mut start = vec![0; 1_000_000];
    slow.read_exact(&mut start).unwrap();
    assert!(start == Pattern::bytes(0, 1_000_000));
}

/// As docker's clients do: connect, ask, end one's side, read to the end. Nothing is lost, and nothing is left.
fn ten_thousand_short_exchanges(vm: &Vm) {
    const THREADS: u64 = 8;
    const EXCHANGES: u64 = 1250;
    let server = Server::on(vm, "127.0.0.1");
    let address = local(server.port);
    let exchange = move |seed: u64| check_upload(address, seed, seed as usize % 3000);
    let storm = move |each: u64| {
        let threads = (0..THREADS).map(|thread| {
            std::thread::spawn(move || (0..each).for_each(|number| exchange(thread * EXCHANGES + number)))
        });
        let failed = threads.collect::<Vec<_>>().into_iter().filter_map(|thread| thread.join().err()).count();
        assert_eq!(failed, 0, "of {THREADS} threads");
    };
    // What is made once, for the first connections, is made now.
    storm(1);
    let mut before = open_fds(vm);
    wait_until("the first connections' end", SOON, || std::mem::replace(&mut before, open_fds(vm)) == before);
    storm(EXCHANGES);
    wait_for("every descriptor to be closed", SOON, || {
        let now = open_fds(vm);
        if now.iter().zip(before).all(|(now, before)| *now <= before) {
            Ok(())
        } else {
            Err(format!("{now:?} of device, supervisor and worker, {before:?} before"))
        }
    });
}

/// Descriptors of the vsock device, the supervisor, and the worker in the guest.
fn open_fds(vm: &Vm) -> [usize; 3] {
    let [device, supervisor] = [" vsock-device ", " supervisor "].map(|part| {
        let folder = format!("/proc/{}/fd", vm.pid_of(part));
        std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{folder}: {error}")).count()
    });
    let script = "ls /proc/$(pgrep -x -f '.*dhow-agent serve')/fd | wc -l";
    [device, supervisor, vm.sh(script).ok().parse().expect("a number of descriptors")]
}
