//! UDP: servers of the guest on the host, with a session for each client.

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use dhow_tests::datagrams::{answer, low_port, udp_client};
use dhow_tests::net::{free_port, local};
use dhow_tests::ports::{listed, serve};
use dhow_tests::{SOON, TOOL, Vm, cases, wait_until};

cases![Shared: datagrams_of_several_clients, a_session_of_datagrams_ends, a_name_server_in_a_container,
    clients_of_the_guest_are_no_servers];

fn datagrams_of_several_clients(vm: &Vm) {
    let (port, published) = (low_port(), free_port());
    let server = serve(vm, "datagrams", SocketAddr::from(([0, 0, 0, 0], port)));
    // In the range for clients, too: published is published.
    let publish = format!("{published}:7000/udp");
    let container = vm.container(&["-p", &publish], &["guest-tool", "datagrams", "0.0.0.0:7000"]);
    for port in [port, published] {
        let clients: Vec<_> = (0..10).map(|_| udp_client(port)).collect();
        for (number, client) in (0u8..).zip(&clients) {
            for length in [1, 1400, 8000] {
                let datagram = vec![number; length];
                assert_eq!(answer(client, &datagram), datagram, "to port {port}");
            }
        }
    }
    drop((server, container));
    for port in [port, published] {
        wait_until("the forwards' end", SOON, || listed(vm, "udp", port).is_empty());
        UdpSocket::bind(local(port)).expect("the port is free again");
    }
}

/// The sockets over which the guest's end of a forward speaks with its UDP server at `port`.
fn sessions(vm: &Vm, port: u16) -> usize {
    // proc_net_udp: the fields after the number are the local and the remote address, in hex.
    let script = format!("awk '$3 ~ /:{port:04X}$/' /proc/net/udp | wc -l");
    vm.sh(&script).ok().trim().parse().expect("a number of sockets")
}

/// For how long a client must say nothing to lose its session.
const IDLE: Duration = Duration::from_secs(30);

/// A client that says nothing for 30 s has no session any more; its next datagram begins another one.
fn a_session_of_datagrams_ends(vm: &Vm) {
    let port = low_port();
    let server = serve(vm, "datagrams", local(port));
    let client = udp_client(port);
    let begun = Instant::now();
    assert_eq!(answer(&client, b"first"), b"first");
    assert_eq!(sessions(vm, port), 1);
    // What is said in between puts it off.
    wait_until("half of its time", IDLE, || begun.elapsed() > IDLE / 2);
    let last = Instant::now();
    assert_eq!(answer(&client, b"still here"), b"still here");
    wait_until("the session's end", IDLE + SOON, || sessions(vm, port) == 0);
    assert!(last.elapsed() >= IDLE, "it ended after {:?}", last.elapsed());
    eprintln!("a silent session over UDP was gone after {:?}", last.elapsed());
    assert_eq!(answer(&client, b"again"), b"again");
    assert_eq!(sessions(vm, port), 1);
    drop(server);
}

fn a_name_server_in_a_container(vm: &Vm) {
    let port = free_port();
    let publish = format!("{port}:53/udp");
    let container = vm.container(&["-p", &publish], &["guest-tool", "names", "0.0.0.0:53"]);
    // A query for the address of name.test (RFC 1035, 4.1).
    let query = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x04name\x04test\x00\x00\x01\x00\x01";
    let answered = answer(&udp_client(port), query);
    assert!(answered.starts_with(b"\x12\x34") && answered.ends_with(&[10, 9, 8, 7]), "{answered:?}");
    drop(container);
}

fn clients_of_the_guest_are_no_servers(vm: &Vm) {
    let running = vm.exec(&[TOOL, "datagrams", "0.0.0.0:0"]).spawn();
    running.expect("listening");
    let said = running.stdout();
    let client: u16 = said.trim().rsplit(':').next().unwrap().parse().unwrap_or_else(|_| panic!("{said}"));
    // Whatever comes later is reported, and by then the client would have been.
    let server = serve(vm, "datagrams", SocketAddr::from(([127, 0, 0, 1], low_port())));
    let port: u16 = server.stdout().trim().rsplit(':').next().unwrap().parse().unwrap();
    wait_until("the server's forward", SOON, || !listed(vm, "udp", port).is_empty());
    assert!(listed(vm, "udp", client).is_empty());
}
