//! Which of the guest's ports are where on the host, and when.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dhow_tests::command::{Cmd, Running};
use dhow_tests::net::{accepts, ask, check_echo, connect, free_port, local, try_connect};
use dhow_tests::{IMAGE, Pty, SOON, TOOL, Vm, cases, wait_for, wait_until};

cases![Shared: every_address_of_the_guest, two_listeners_on_one_port, a_range_of_ports, a_compose_stack,
    a_server_in_a_shell, a_port_below_1024, ports_are_watched,
    datagrams_of_several_clients, a_name_server_in_a_container, clients_of_the_guest_are_no_servers,
    without_the_userland_proxy, there_when_docker_run_returns, twenty_published_at_once,
    published_again_and_again, connections_outlive_their_listener, a_restart_of_dockerd_refuses_nobody,
    a_guest_that_listens_everywhere, a_flood_of_connections_leaves_room, clients_that_leave_without_a_word,
    a_guest_that_never_reads];

/// How long dockerd may take to come back on a loaded machine.
const RETURN: Duration = Duration::from_secs(90);

/// How often a case repeats what must never fail once: more often in a soak.
fn rounds() -> u32 {
    let soak = std::env::var("DHOW_SOAK").ok();
    soak.map_or(5, |count| count.parse::<u32>().expect("DHOW_SOAK is a number") * 10)
}

/// A server of the guest tool in the guest, at an address with a port.
fn serve(vm: &Vm, kind: &str, address: SocketAddr) -> Running {
    let running = vm.exec(&[TOOL, kind, &address.to_string()]).spawn();
    running.expect("listening");
    running
}

/// The host's endpoints of a guest's port, as `dhow ports` tells them, and the reasons of those without.
fn listed(vm: &Vm, protocol: &str, port: u16) -> Vec<(String, Result<String, String>)> {
    let all = vm.json(&["ports", "--json"]);
    let entries = all.as_array().expect("a list").iter().filter(|entry| {
        let guest = entry["guest"].as_str().unwrap_or_default();
        entry["protocol"] == protocol && guest.ends_with(&format!(":{port}"))
    });
    let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
    entries
        .map(|entry| {
            let host = text(&entry["host"]).ok_or_else(|| text(&entry["reason"]).unwrap_or_default());
            (text(&entry["guest"]).unwrap_or_default(), host)
        })
        .collect()
}

fn host_has_ipv6() -> bool {
    TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok()
}

fn every_address_of_the_guest(vm: &Vm) {
    let own =
        vm.sh("ip -4 -o addr show scope global | awk '$2 !~ /docker|lo|br-/ {print $4}' | cut -d/ -f1").ok();
    let own: IpAddr = own.trim().parse().unwrap_or_else(|error| panic!("{own:?}: {error}"));
    let (v4, v6): (IpAddr, IpAddr) = (Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into());
    let second = IpAddr::from([127, 0, 0, 2]);
    let table: [(&str, IpAddr, bool, &[IpAddr]); 7] = [
        ("any IPv4", Ipv4Addr::UNSPECIFIED.into(), false, &[v4]),
        ("loopback", v4, false, &[v4]),
        ("another loopback", second, false, &[v4]),
        ("the guest's own", own, false, &[v4]),
        ("any, dual-stack", Ipv6Addr::UNSPECIFIED.into(), false, &[v4, v6]),
        ("any IPv6 alone", Ipv6Addr::UNSPECIFIED.into(), true, &[v4, v6]),
        ("IPv6 loopback", v6, false, &[v6]),
    ];
    for (what, address, v6_only, hosts) in table {
        let port = free_port();
        if v6_only {
            vm.sh("echo 1 >/proc/sys/net/ipv6/bindv6only").ok();
        }
        let server = serve(vm, "serve", SocketAddr::new(address, port));
        if v6_only {
            vm.sh("echo 0 >/proc/sys/net/ipv6/bindv6only").ok();
        }
        let hosts: Vec<_> = hosts.iter().filter(|host| host.is_ipv4() || host_has_ipv6()).collect();
        for host in &hosts {
            let at = SocketAddr::new(**host, port);
            drop(connect(at));
            check_echo(at, 1, 10_000);
        }
        let there = listed(vm, "tcp", port);
        assert_eq!(there.len(), hosts.len().max(1), "{what}: {there:?}");
        drop(server);
        wait_until("the forward's end", SOON, || hosts.iter().all(|host| !accepts(**host, port)));
    }
}

fn two_listeners_on_one_port(vm: &Vm) {
    let port = free_port();
    let first = serve(vm, "serve", local(port));
    check_echo(local(port), 1, 100);
    let second = serve(vm, "serve", SocketAddr::from(([127, 0, 0, 2], port)));
    let reason = wait_for("the second listener", SOON, || {
        let all = listed(vm, "tcp", port);
        let other = all.iter().find(|(guest, _)| guest.starts_with("127.0.0.2"));
        other.and_then(|(_, host)| host.clone().err()).ok_or_else(|| format!("{all:?}"))
    });
    assert!(reason.contains("leads to 127.0.0.1"), "{reason}");
    // Its turn comes when the port is free.
    drop(first);
    wait_for("the second one's forward", SOON, || {
        let all = listed(vm, "tcp", port);
        if all.iter().any(|(guest, host)| guest.starts_with("127.0.0.2") && host.is_ok()) {
            Ok(())
        } else {
            Err(format!("{all:?}"))
        }
    });
    check_echo(local(port), 2, 100);
    drop(second);
}

/// Ports in a row that are free on the host now.
fn free_range(count: u16) -> u16 {
    let is_free = |first: &u16| (*first..first + count).all(|port| TcpListener::bind(local(port)).is_ok());
    (20_000..30_000).step_by(usize::from(count)).find(is_free).expect("a free range")
}

fn a_range_of_ports(vm: &Vm) {
    let first = free_range(11);
    let range = format!("{first}-{}", first + 10);
    let script = "for p in 0 1 2 3 4 5 6 7 8 9; do guest-tool serve 0.0.0.0:700$p & done; exec guest-tool serve 0.0.0.0:7010";
    let container = vm.container(&["-p", &format!("{range}:7000-7010")], &["sh", "-c", script]);
    wait_until("all servers", SOON, || container.logs().matches("listening").count() == 11);
    for port in first..=first + 10 {
        check_echo(local(port), port.into(), 1000);
    }
}

/// Two services, one of which has a range of ports.
fn a_compose_stack(vm: &Vm) {
    let (first, single) = (free_range(11), free_port());
    let last = first + 10;
    let stack = format!(
        r#"
services:
  many:
    image: {IMAGE}
    command: sh -c 'for port in $$(seq {first} {last}); do guest-tool serve 0.0.0.0:$$port & done; wait'
    init: true
    ports: ["{first}-{last}:{first}-{last}"]
  single:
    image: {IMAGE}
    command: guest-tool serve 0.0.0.0:7000
    init: true
    ports: ["127.0.0.1:{single}:7000"]
"#
    );
    let compose = |what: &[&str]| {
        let command = vm.exec(&["docker", "compose", "-p", "e2e", "-f", "-"]).args(what);
        command.stdin(stack.clone()).deadline(RETURN).run()
    };
    let up = compose(&["up", "-d"]);
    let worked = std::panic::catch_unwind(|| {
        assert!(up.status.success(), "{up}");
        for port in (first..=last).chain([single]) {
            check_echo(local(port), u64::from(port), 1000);
        }
    });
    let down = compose(&["down", "-t", "1"]);
    worked.unwrap_or_else(|failure| std::panic::resume_unwind(failure));
    assert!(down.status.success(), "{down}");
    wait_until("the ports' end", SOON, || {
        !(first..=last).chain([single]).any(|port| accepts(Ipv4Addr::LOCALHOST, port))
    });
}

fn a_server_in_a_shell(vm: &Vm) {
    let port = free_port();
    let mut shell = Pty::spawn(vm.dhow(&["shell"]), 24, 80);
    shell.send(&format!("{TOOL} serve 127.0.0.1:{port}\r"));
    shell.expect("listening");
    check_echo(local(port), 1, 1000);
    shell.send("\x03");
    shell.send("exit\r");
    shell.wait();
    wait_until("the forward's end", SOON, || !accepts(Ipv4Addr::LOCALHOST, port));
}

/// At the same number where the host lets this user bind it, and not at all where it does not.
fn a_port_below_1024(vm: &Vm) {
    let try_bind = |port: &u16| TcpListener::bind(local(*port)).map_err(|error| error.kind());
    let port = (600..1024).find(|port| !matches!(try_bind(port), Err(ErrorKind::AddrInUse))).unwrap();
    let may_bind = try_bind(&port).is_ok();
    let container = published(vm, port);
    if may_bind {
        check_echo(local(port), 1, 1000);
    } else {
        wait_until("its reason", SOON, || listed(vm, "tcp", port).iter().any(|(_, host)| host.is_err()));
        assert!(!accepts(Ipv4Addr::LOCALHOST, port));
    }
    drop(container);
}

fn ports_are_watched(vm: &Vm) {
    let watching = vm.dhow(&["ports", "--watch"]).spawn();
    let port = free_port();
    let server = serve(vm, "serve", local(port));
    watching.expect(&format!("+ tcp 127.0.0.1:{port} -> 127.0.0.1:{port}"));
    drop(server);
    watching.expect(&format!("- tcp 127.0.0.1:{port} -> 127.0.0.1:{port}"));
}

/// What comes back to `client` for a datagram; sent again when it is lost.
fn answer(client: &UdpSocket, datagram: &[u8]) -> Vec<u8> {
    client.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    let mut bytes = vec![0; 65_535];
    wait_for("an answer over UDP", SOON, || {
        // Where nothing is bound yet the kernel says so.
        client.send(datagram).map_err(|error| error.to_string())?;
        let length = client.recv(&mut bytes).map_err(|error| error.to_string())?;
        Ok(bytes[..length].to_vec())
    })
}

/// A UDP port that is free on the host, below the range for clients.
fn low_port() -> u16 {
    let start = 20_000 + free_port() % 10_000;
    let is_free = |port: &u16| UdpSocket::bind(local(*port)).is_ok();
    (start..32_000).find(is_free).expect("a free port")
}

fn udp_client(port: u16) -> UdpSocket {
    let client = UdpSocket::bind(local(0)).unwrap();
    client.connect(local(port)).unwrap();
    client
}

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

/// Kills dockerd and waits until another one answers.
fn restart_dockerd(vm: &Vm) {
    let before = vm.sh("pgrep -x dockerd").ok();
    vm.sh(&format!("kill -9 {}", before.trim())).ok();
    wait_until("docker's return", RETURN, || {
        let quick = |command: Cmd| command.deadline(Duration::from_secs(40)).spawn().try_wait();
        let is_new =
            quick(vm.sh("pgrep -x dockerd")).is_ok_and(|now| now.status.success() && now.text() != before);
        is_new && quick(vm.docker(&["version"])).is_ok_and(|output| output.status.success())
    });
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
    let connected = TcpStream::connect(local(port)).map(drop);
    wait_for("the first exchange", SOON, || first_exchange(port));
    check_echo(local(port), 1, 300_000);
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
    connected.unwrap_or_else(|refused| panic!("when docker run returned: {refused}"));
}

/// The first exchange with a container's server that was published just now; `Err` with how it was refused.
fn first_exchange(port: u16) -> Result<(), String> {
    use std::io::{Read, Write};
    let mut stream = TcpStream::connect(local(port)).map_err(|error| format!("connect: {error}"))?;
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.write_all(b"source 5 1\n").map_err(|error| format!("write: {error}"))?;
    match stream.read_to_end(&mut Vec::new()) {
        Ok(5) => Ok(()),
        Ok(other) => Err(format!("{other} bytes")),
        // docker's proxy has nobody to pass it on to yet.
        Err(error) => Err(format!("read: {error}")),
    }
}

/// A container whose server is published at `port`. docker's proxy listens when this returns; the server itself may be
/// a moment late.
fn published<'a>(vm: &'a Vm, port: u16) -> dhow_tests::container::Container<'a> {
    vm.container(&["-p", &format!("{port}:7000")], &["guest-tool", "serve", "0.0.0.0:7000"])
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
        wait_until("the forward's end", SOON, || !accepts(Ipv4Addr::LOCALHOST, port));
        vm.docker(&["start", &container.name]).ok();
        if let Err(refused) = try_connect(local(port)) {
            panic!("round {round}: {refused}");
        }
    }
}

fn connections_outlive_their_listener(vm: &Vm) {
    use std::io::{Read, Write};
    let port = free_port();
    let server = serve(vm, "serve-one", local(port));
    // A connection that asks nothing would be the one.
    let mut stream = ask(port, "echo");
    wait_until("the forward's end", SOON, || listed(vm, "tcp", port).is_empty());
    stream.write_all(b"still here").unwrap();
    let mut said = [0; 10];
    stream.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"still here");
    drop((stream, server));
}

fn a_restart_of_dockerd_refuses_nobody(vm: &Vm) {
    let port = free_port();
    let container = published(vm, port);
    wait_for("the server", SOON, || first_exchange(port));
    let mut live = ask(port, "echo");
    let before = vm.sh("pgrep -x dockerd").ok();
    vm.sh(&format!("kill -9 {}", before.trim())).ok();
    // From the kill until docker answers again, nobody who comes is refused.
    let mut served = 0;
    wait_until("docker's return", RETURN, || {
        let stream = TcpStream::connect(local(port)).unwrap_or_else(|error| panic!("refused: {error}"));
        drop(stream);
        served += u32::from(first_exchange(port).is_ok());
        let output = vm.docker(&["version"]).deadline(Duration::from_secs(40)).spawn().try_wait();
        output.is_ok_and(|output| output.status.success())
    });
    wait_for("the server after dockerd's return", SOON, || first_exchange(port));
    assert!(served > 0, "nobody was served");
    // docker's proxy has ended with it, and this connection with the proxy: it ends, and does not hang.
    use std::io::Read;
    live.set_read_timeout(Some(SOON)).unwrap();
    let ended = live.read(&mut [0]);
    let reset = |error: &std::io::Error| error.kind() == std::io::ErrorKind::ConnectionReset;
    assert!(matches!(&ended, Ok(0)) || ended.as_ref().is_err_and(reset), "{ended:?}");
    drop(container);
    wait_until("the forward's end", SOON, || !accepts(Ipv4Addr::LOCALHOST, port));
}

/// Ten thousand listeners, and two that flap as fast as the guest can: bounded, and nobody else is disturbed.
fn a_guest_that_listens_everywhere(vm: &Vm) {
    let port = free_port();
    let server = serve(vm, "serve", local(port));
    check_echo(local(port), 1, 1000);
    let flood = vm.exec(&["nice", "-n", "19", TOOL, "everywhere", "10000", "10000"]).spawn();
    flood.expect("listening on");
    wait_for("as many forwards as are allowed", SOON, || {
        let all = vm.json(&["ports", "--json"]);
        let all = all.as_array().expect("a list");
        let bound = all.iter().filter(|entry| !entry["host"].is_null()).count();
        let told = all
            .iter()
            .filter(|entry| entry["reason"].as_str().is_some_and(|why| why.contains("most allowed")));
        let (told, listed) = (told.count(), all.len());
        if bound == 256 && told > 1000 {
            Ok(())
        } else {
            Err(format!("{bound} bound, {told} told, of {listed}"))
        }
    });
    for seed in 0..5 {
        check_echo(local(port), seed, 100_000);
        vm.exec(&["true"]).ok();
    }
    // Its own log does not grow by it.
    let log = vm.data("log/keeper.log");
    let size = || std::fs::metadata(&log).map_or(0, |log| log.len());
    let before = size();
    check_echo(local(port), 9, 1_000_000);
    assert!(size() < before + 100_000, "the log grows from {before} to {}", size());
    drop(flood);
    wait_until("the forwards' end", SOON, || {
        vm.json(&["ports", "--json"]).as_array().is_some_and(|all| all.len() < 20)
    });
    check_echo(local(port), 10, 1000);
    drop(server);
}

/// More connections than one forward may have at a time, which is half of all that there are.
const FLOOD: usize = 2600;
/// Who makes them.
const FLOODERS: usize = 8;

/// A connection to a server that echoes; `None` where it is refused.
fn held_open(port: u16) -> Option<TcpStream> {
    use std::io::{Read, Write};
    let mut stream = TcpStream::connect(local(port)).ok()?;
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.write_all(b"echo\nx").ok()?;
    stream.read_exact(&mut [0]).ok()?;
    Some(stream)
}

/// Somebody on the host opens connections without end: they are bounded, it is told once, and nobody else is shut out.
fn a_flood_of_connections_leaves_room(vm: &Vm) {
    let [quiet, flooded] = [0; 2].map(|_| free_port());
    let servers = [quiet, flooded].map(|port| serve(vm, "serve", local(port)));
    for port in [quiet, flooded] {
        check_echo(local(port), 1, 1000);
    }
    let others_work = || {
        check_echo(local(quiet), 2, 100_000);
        vm.exec(&["true"]).ok();
        vm.docker(&["version"]).ok();
    };
    let log = vm.data("log/keeper.log");
    let told = || std::fs::read_to_string(&log).unwrap().matches("connections are refused").count();
    let before = told();
    let held: Vec<TcpStream> = std::thread::scope(|scope| {
        let one = || (0..FLOOD / FLOODERS).filter_map(|_| held_open(flooded)).collect::<Vec<_>>();
        let flooders: Vec<_> = (0..FLOODERS).map(|_| scope.spawn(one)).collect();
        others_work();
        flooders.into_iter().flat_map(|flooder| flooder.join().unwrap()).collect()
    });
    assert!((1024..FLOOD - 100).contains(&held.len()), "{} of {FLOOD} are open", held.len());
    others_work();
    assert_eq!(told() - before, 1, "lines about it");
    drop(held);
    wait_for("room for new ones", SOON, || held_open(flooded).map(drop).ok_or_else(|| "refused".to_owned()));
    check_echo(local(flooded), 3, 100_000);
    drop(servers);
}

/// Dropping it ends a flood, also where a case fails.
struct EndOfFlood<'a>(&'a AtomicBool);

impl Drop for EndOfFlood<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// Clients that connect and leave as fast as they can: others go on, also who finishes sending before he has said a word.
fn clients_that_leave_without_a_word(vm: &Vm) {
    use std::io::Read;
    let [quiet, flooded, greeter] = [0; 3].map(|_| free_port());
    let servers = [quiet, flooded].map(|port| serve(vm, "serve", local(port)));
    for port in [quiet, flooded] {
        check_echo(local(port), 1, 1000);
    }
    let listen = ["nc", "-ll", "-p", &greeter.to_string(), "-e", "echo", "welcome"];
    let container = vm.container(&["--network", "host"], &listen);
    let greeted = || {
        wait_for("a greeting", SOON, || {
            let mut stream = TcpStream::connect(local(greeter)).map_err(|error| error.to_string())?;
            stream.shutdown(Shutdown::Write).map_err(|error| error.to_string())?;
            let mut text = String::new();
            stream.read_to_string(&mut text).map_err(|error| error.to_string())?;
            if text == "welcome\n" { Ok(()) } else { Err(text) }
        });
    };
    greeted();
    let log = vm.data("log/keeper.log");
    let told = || std::fs::read_to_string(&log).unwrap().matches("connections are refused").count();
    let before = told();
    let flooding = AtomicBool::new(true);
    std::thread::scope(|scope| {
        let _end = EndOfFlood(&flooding);
        for _ in 0..2 {
            scope.spawn(|| {
                while flooding.load(Ordering::Relaxed) {
                    let _ = TcpStream::connect(local(flooded));
                }
            });
        }
        check_echo(local(quiet), 2, 300_000);
        vm.exec(&["true"]).ok();
        greeted();
        // Its own clients are not shut out either.
        check_echo(local(flooded), 3, 1000);
    });
    // Once a minute, for all floods.
    assert!(told() <= before + 1, "it is told again and again");
    check_echo(local(flooded), 4, 100_000);
    drop((servers, container));
}

/// A server that takes connections and reads nothing: what is on its way to it is bounded, and others go on.
fn a_guest_that_never_reads(vm: &Vm) {
    use std::io::{Read, Write};
    let [quiet, deaf] = [0; 2].map(|_| free_port());
    let servers = [quiet, deaf].map(|port| serve(vm, "serve", local(port)));
    for port in [quiet, deaf] {
        check_echo(local(port), 1, 1000);
    }
    vm.sh(&format!("pkill -STOP -f '^{TOOL} serve 127.0.0.1:{deaf}$'")).ok();
    let mut clients: Vec<TcpStream> = (0..4).map(|_| connect(local(deaf))).collect();
    for client in &mut clients {
        client.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
        let (mut taken, chunk) = (0, vec![0; 1 << 20]);
        while let Ok(written) = client.write(&chunk) {
            taken += written;
            assert!(taken < 64 << 20, "it takes without end");
        }
    }
    check_echo(local(quiet), 2, 300_000);
    vm.exec(&["true"]).ok();
    drop(servers);
    // It ends with its reader, and says so.
    for client in &mut clients {
        client.set_read_timeout(Some(SOON)).unwrap();
        let ended = client.read(&mut [0]);
        assert!(
            !ended.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock),
            "{ended:?}"
        );
    }
}
