//! Which of the guest's TCP ports are where on the host, and when.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};

use dhow_tests::net::{accepts, ask, check_echo, connect, free_port, local};
use dhow_tests::ports::{host_has_ipv6, listed, published, serve};
use dhow_tests::{IMAGE, Pty, SOON, TOOL, Vm, cases, wait_for, wait_until};

cases![Shared: every_address_of_the_guest, two_listeners_on_one_port, a_range_of_ports, a_compose_stack,
    a_server_in_a_shell, a_port_below_1024, a_port_that_is_denied, ports_are_watched,
    connections_outlive_their_listener];

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
        command.stdin(stack.clone()).run()
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

/// SSH's port is the host's own, whatever the guest does.
fn a_port_that_is_denied(vm: &Vm) {
    let server = serve(vm, "serve", SocketAddr::from(([0, 0, 0, 0], 22)));
    let reason = wait_for("the denied port", SOON, || match listed(vm, "tcp", 22).as_slice() {
        [(_, Err(reason))] => Ok(reason.clone()),
        other => Err(format!("{other:?}")),
    });
    assert!(reason.contains("only where a rule of the profile says so"), "{reason}");
    let log = std::fs::read_to_string(vm.data("log/keeper.log")).unwrap();
    let told = |line: &&str| line.contains("not forwarded") && line.contains("127.0.0.1:22 ");
    // Or in the number of those that are told of together, after many others.
    let others = log.contains("more ports are not forwarded");
    assert!(log.lines().any(|line| told(&line)) || others, "nothing about port 22 in the log:\n{log}");
    drop(server);
}

fn connections_outlive_their_listener(vm: &Vm) {
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
