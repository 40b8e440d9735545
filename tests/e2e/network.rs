//! The way out: names as on the host, servers of the host's network, and not the host's loopback.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dhow_tests::greeter::Greeter;
use dhow_tests::net::{local, own_address, try_connect};
use dhow_tests::{SOON, Vm, cases, wait_for, wait_until};

cases![Shared: names_of_the_hosts_file, a_server_of_the_hosts_network, the_hosts_loopback_is_closed,
    names_of_dhow, containers_reach_each_other; Own: names_proxies_and_name_servers_of_the_host];

/// What a container hears from `address`. It does not end its own half first: after that Debian 12's passt
/// (2023-03) loses the end of the server's.
fn heard(vm: &Vm, address: IpAddr, port: u16) -> String {
    let script = format!("mkfifo /never && nc -w 20 {address} {port} <>/never");
    vm.docker_run(&[], &["sh", "-c", &script]).run().text()
}

/// The addresses that `nslookup` in a container finds, without that of the server.
fn lookup(vm: &Vm, name: &str) -> String {
    vm.docker_run(&[], &["nslookup", "-type=a", name]).run().text()
}

fn names_of_the_hosts_file(vm: &Vm) {
    // Not localhost where there is another one: some resolvers know that by themselves.
    let hosts = std::fs::read_to_string("/etc/hosts").unwrap();
    let mut names: Vec<(&str, Ipv4Addr)> = hosts
        .lines()
        .filter_map(|line| line.split('#').next())
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let address = words.next()?.parse().ok()?;
            Some(words.map(move |name| (name, address)))
        })
        .flatten()
        .collect();
    names.sort_by_key(|(name, _)| *name == "localhost");
    let (name, address) = names.first().expect("a name in /etc/hosts");
    let answer = lookup(vm, name);
    assert!(answer.contains(&format!("Address: {address}")), "{name} is {address} on the host: {answer}");
    // Of the guest itself, too.
    let answer = vm.exec(&["getent", "ahostsv4", name]).ok();
    assert!(answer.contains(&address.to_string()), "{answer}");
}

fn a_server_of_the_hosts_network(vm: &Vm) {
    let server = Greeter::at(own_address(), "reached");
    assert_eq!(heard(vm, server.address.ip(), server.address.port()), "reached");
}

fn the_hosts_loopback_is_closed(vm: &Vm) {
    // As `heard`: the clients do not end their own halves first. In the guest itself, and in a container.
    let heard = |addresses: &[&str], port: u16| {
        let script = |nc: &str, fifo: &str| {
            let each = format!("{nc} -w 5 $address {port} <>{fifo} &");
            format!("mkfifo {fifo}; for address in {}; do {each} done; wait; rm {fifo}", addresses.join(" "))
        };
        let inside = vm.sh(&script("busybox nc", "/tmp/never")).run();
        [inside, vm.docker_run(&[], &["sh", "-c", &script("nc", "/never")]).run()].map(|heard| heard.all())
    };
    let own = own_address().to_string();
    let open = Greeter::at(own_address(), "open");
    for heard in heard(&[&own], open.address.port()) {
        assert!(heard.contains("open"), "{heard}");
    }
    let server = Greeter::at(Ipv4Addr::LOCALHOST, "secret");
    let port = server.address.port();
    let mut here = String::new();
    try_connect(local(port)).unwrap().read_to_string(&mut here).unwrap();
    assert_eq!(here, "secret");
    let gateway = vm.sh("ip -4 route show default | cut -d' ' -f3").ok();
    let names = ["127.0.0.1", "10.0.2.2", "172.17.0.1", "host.docker.internal", "host.dhow.internal"];
    for heard in heard(&[&[gateway.as_str(), &own][..], &names].concat(), port) {
        assert!(!heard.contains("secret"), "{heard}");
    }
}

fn names_of_dhow(vm: &Vm) {
    for name in ["host.docker.internal", "host.dhow.internal"] {
        let answer = lookup(vm, name);
        let found =
            answer.rsplit("Address: ").next().and_then(|address| address.trim().parse::<Ipv4Addr>().ok());
        assert!(answer.contains(name) && found.is_some(), "{answer}");
    }
}

fn containers_reach_each_other(vm: &Vm) {
    vm.docker(&["network", "create", "e2e-net"]).ok();
    let server = vm.container(
        &["--network", "e2e-net", "--network-alias", "server"],
        &["sh", "-c", "mkdir /www; echo hello >/www/index.html; exec httpd -f -h /www"],
    );
    let script = "for i in 1 2 3 4 5 6 7 8 9; do wget -qO- http://server/ && exit; sleep 1; done; exit 1";
    assert_eq!(vm.docker_run(&["--network", "e2e-net"], &["sh", "-c", script]).ok(), "hello");
    drop(server);
    vm.docker(&["network", "rm", "e2e-net"]).ok();
}

/// A name server at `address`:53 that knows two names, one of which has so many addresses that it tells them over TCP
/// only; until dropped.
struct NameServer {
    address: Ipv4Addr,
    end: Arc<AtomicBool>,
}

impl NameServer {
    fn at(address: Ipv4Addr, answer: Ipv4Addr) -> std::io::Result<Self> {
        let socket = UdpSocket::bind((address, 53))?;
        let listener = TcpListener::bind((address, 53))?;
        let end = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&end);
        std::thread::spawn(move || {
            let mut query = [0; 512];
            while let Ok((length, client)) = socket.recv_from(&mut query) {
                if ended.load(Ordering::Relaxed) {
                    return;
                }
                let _ = socket.send_to(&name_answer(&query[..length], answer, false), client);
            }
        });
        let ended = Arc::clone(&end);
        std::thread::spawn(move || {
            for mut client in listener.incoming().flatten() {
                if ended.load(Ordering::Relaxed) {
                    return;
                }
                // A client may leave in its middle.
                let _ = answer_over_tcp(&mut client, answer);
            }
        });
        Ok(Self { address, end })
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        let wake = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))
            .and_then(|socket| socket.send_to(&[0], (self.address, 53)));
        let _ = (wake, TcpStream::connect((self.address, 53)));
    }
}

/// RFC 1035, 4.2.2: messages with their lengths in front.
fn answer_over_tcp(client: &mut TcpStream, address: Ipv4Addr) -> std::io::Result<()> {
    let mut length = [0; 2];
    client.read_exact(&mut length)?;
    let mut query = vec![0; u16::from_be_bytes(length).into()];
    client.read_exact(&mut query)?;
    let answer = name_answer(&query, address, true);
    let length = u16::try_from(answer.len()).expect("a short answer");
    client.write_all(&[&length.to_be_bytes()[..], &answer].concat())
}

/// Addresses of the name that has many: more than fit 512 bytes.
const MANY: u8 = 60;

/// RFC 1035, 4.1: the query with the answer for `vpn.corp.test` or `many.corp.test`, or with NXDOMAIN. An additional
/// section (EDNS) is cut off.
fn name_answer(query: &[u8], address: Ipv4Addr, over_tcp: bool) -> Vec<u8> {
    let Some(end) =
        query.get(12..).and_then(|rest| rest.iter().position(|byte| *byte == 0)).map(|at| 12 + at + 5)
    else {
        return Vec::new();
    };
    let Some(question) = query.get(12..end) else { return Vec::new() };
    let known = if question.starts_with(b"\x03vpn\x04corp\x04test\x00") {
        1
    } else if question.starts_with(b"\x04many\x04corp\x04test\x00") {
        MANY
    } else {
        0
    };
    let count = if question.ends_with(&[0, 1, 0, 1]) { known } else { 0 };
    // "TrunCation - specifies that this message was truncated".
    let cut = count == MANY && !over_tcp;
    let count = if cut { 0 } else { count };
    let mut answer = query[..2].to_vec();
    answer.extend([0x81 | if cut { 2 } else { 0 }, if known > 0 { 0x80 } else { 0x83 }]);
    answer.extend([0, 1, 0, count, 0, 0, 0, 0]);
    answer.extend(question);
    for number in 0..count {
        let [a, b, c, d] = address.octets();
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4, a, b, c, d + number]);
    }
    answer
}

/// The addresses of a name as programs look it up in a container, which completes it if it is short.
fn pinged(vm: &Vm, options: &[&str], name: &str) -> String {
    // Of "PING name (address): 56 data bytes" the first line is enough: nobody may be there.
    vm.docker_run(options, &["ping", "-c", "1", "-w", "1", name]).run().all()
}

/// What a container hears over TCP from its name server for the address of `many.corp.test` (RFC 1035, 4.1 and 4.2.2).
fn asked_over_tcp(vm: &Vm, options: &[&str]) -> usize {
    let query = r"\0\040\022\064\001\0\0\001\0\0\0\0\0\0\004many\004corp\004test\0\0\001\0\001";
    // `head` ends with what it wants, and `nc` with the end of its reader or at its deadline.
    let wanted = usize::from(MANY) * 16;
    let script = format!(
        "server=$(awk '/^nameserver/ {{ print $2; exit }}' /etc/resolv.conf); mkfifo /query && exec 3<>/query
        printf '{query}' >&3; nc -w 60 $server 53 <&3 | head -c {wanted} | wc -c"
    );
    vm.docker_run(options, &["sh", "-c", &script]).ok().trim().parse().expect("a number of bytes")
}

/// The host's resolver settings are other ones for the VM's processes alone.
fn names_proxies_and_name_servers_of_the_host() {
    let mut vm = Vm::new().env("HTTP_PROXY", "http://proxy.test:3128").env("no_proxy", "localhost,.test");
    let server = NameServer::at(Ipv4Addr::new(127, 0, 0, 57), Ipv4Addr::new(10, 20, 30, 40)).unwrap();
    let (hosts, resolv) = (vm.home().join("hosts"), vm.home().join("resolv"));
    std::fs::write(&hosts, "127.0.0.1 localhost\n10.9.8.7 db.corp.test db\n").unwrap();
    std::fs::write(&resolv, "nameserver 127.0.0.57\nsearch other.test corp.test\n").unwrap();
    vm.show(&hosts, Path::new("/etc/hosts"));
    vm.show(&resolv, Path::new("/etc/resolv.conf"));
    vm.start(&[]);
    vm.import_image();

    let answer = lookup(&vm, "db.corp.test");
    assert!(answer.contains("Address: 10.9.8.7"), "{answer}");
    let answer = lookup(&vm, "vpn.corp.test");
    assert!(answer.contains("Address: 10.20.30.40"), "{answer}");
    // Of an answer that has no room over UDP, everything: the guest's own resolver asks over TCP as well.
    let answer = vm.exec(&["getent", "ahostsv4", "many.corp.test"]).ok();
    assert_eq!(answer.lines().filter(|line| line.contains("STREAM")).count(), usize::from(MANY), "{answer}");
    let answer = lookup(&vm, "absent.corp.test");
    assert!(answer.contains("NXDOMAIN"), "{answer}");
    vm.docker(&["network", "create", "own"]).ok();
    for options in [&[][..], &["--network", "own"]] {
        let bytes = asked_over_tcp(&vm, options);
        assert_eq!(bytes, usize::from(MANY) * 16, "{bytes} bytes over TCP with {options:?}");
        let answer = pinged(&vm, options, "vpn");
        assert!(answer.contains("(10.20.30.40)"), "a short name with {options:?}: {answer}");
    }
    let answer = vm.exec(&["getent", "ahostsv4", "vpn"]).ok();
    assert!(answer.contains("10.20.30.40"), "{answer}");
    // Another network of the host's: containers that start from then on complete names as it does now.
    for (search, known) in [("other.test", false), ("corp.test", true)] {
        std::fs::write(&resolv, format!("nameserver 127.0.0.57\nsearch {search}\n")).unwrap();
        wait_for(&format!("the search of {search}"), SOON, || {
            let answer = pinged(&vm, &[], "vpn");
            let expected = if known { "(10.20.30.40)" } else { "bad address" };
            if answer.contains(expected) { Ok(()) } else { Err(answer) }
        });
    }
    // The hosts file is read again when it changes; in place, since the mount is of this very file.
    std::fs::write(&hosts, "127.0.0.1 localhost\n10.9.8.8 db.corp.test db\n").unwrap();
    wait_until("the new address", SOON, || lookup(&vm, "db.corp.test").contains("Address: 10.9.8.8"));

    let info = vm.docker(&["info", "--format", "{{.HTTPProxy}} {{.NoProxy}}"]).ok();
    assert_eq!(info, "http://proxy.test:3128 localhost,.test");
    assert_eq!(vm.sh("echo $HTTP_PROXY $no_proxy").ok(), "http://proxy.test:3128 localhost,.test");
    vm.stop();
    drop(server);
}
