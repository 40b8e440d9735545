//! A profile with rules: other ports, other addresses, sockets, and services of the host for the guest.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use dhow_guest_tool::Pattern;
use dhow_tests::command::Cmd;
use dhow_tests::net::{accepts, check_echo, free_port, local, own_address};
use dhow_tests::settings::in_path;
use dhow_tests::{SOON, TOOL, Vm, cases, wait_for, wait_until};

cases![Own: what_a_profile_says];

/// A server of the host that answers what it has heard, upside down, for ever.
fn reverse_tcp() -> u16 {
    let listener = TcpListener::bind(local(0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || listener.incoming().flatten().for_each(|mut stream| reverse(&mut stream)));
    port
}

fn reverse_unix(path: &Path) {
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || listener.incoming().flatten().for_each(|mut stream| reverse(&mut stream)));
}

fn reverse(stream: &mut (impl Read + Write)) {
    let mut said = Vec::new();
    // A client may leave in its middle.
    if stream.read_to_end(&mut said).is_ok() {
        said.reverse();
        let _ = stream.write_all(&said);
    }
}

struct Ports {
    moved: (u16, u16),
    ignored: u16,
    fixed: u16,
    /// Static, and nobody serves it.
    vacant: u16,
    open: u16,
    low: u16,
    /// The first of three, in the guest and on the host.
    range: (u16, u16),
    service: u16,
    secret: u16,
}

/// The first of three free ports, below those that the system gives to clients: of the others UDP servers are not forwarded.
fn free_range() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(20_000);
    loop {
        let first = NEXT.fetch_add(3, Ordering::Relaxed);
        if (first..first + 3).all(|port| TcpListener::bind(local(port)).is_ok()) {
            return first;
        }
    }
}

fn what_a_profile_says() {
    let agent_folder = tempfile::tempdir().unwrap();
    let agent = agent_folder.path().join("agent");
    reverse_unix(&agent);
    let vm = Vm::new().env("SSH_AUTH_SOCK", &agent);
    let ports = Ports {
        moved: (free_port(), free_port()),
        ignored: free_port(),
        fixed: free_port(),
        vacant: free_port(),
        open: free_port(),
        low: free_port(),
        range: (free_range(), free_range()),
        service: reverse_tcp(),
        secret: reverse_tcp(),
    };
    let containerd = vm.home().join("sockets/containerd.sock");
    let backwards = vm.beside("backwards.sock");
    std::fs::create_dir_all(vm.home()).unwrap();
    reverse_unix(&backwards);
    write_profile(&vm, &ports, &containerd, &backwards);
    vm.start(&["--no-mounts"]);
    vm.import_image();
    vm.install_tool();
    forwards_follow_the_rules(&vm, &ports);
    sockets_lead_both_ways(&vm, &containerd);
    the_hosts_services_are_reached(&vm, &ports);
    a_new_supervisor_keeps_the_rules(&vm, &ports);
    sockets_lead_both_ways(&vm, &containerd);
    vm.stop();
    assert!(!containerd.exists(), "the socket goes with the VM");
    assert!(!accepts(Ipv4Addr::LOCALHOST, ports.fixed));
}

fn write_profile(vm: &Vm, ports: &Ports, containerd: &Path, backwards: &Path) {
    let Ports { moved: (guest, host), ignored, fixed, vacant, open, low, range, service, .. } = *ports;
    let text = format!(
        r#"
host-ports = [{service}]
forward-agent = true

[[forward]]
guest = {ignored}
ignore = true

# The first one that fits has decided.
[[forward]]
guest = {ignored}
host = {ignored}

[[forward]]
guest = "{first}-{last}"
host = "{to_first}-{to_last}"
protocol = "tcp"

[[forward]]
guest = "0.0.0.0:{guest}"
host = {host}

[[forward]]
guest = {fixed}
static = true

[[forward]]
guest = {vacant}
static = true

[[forward]]
guest = {open}
host = "0.0.0.0:{open}"
protocol = "tcp"

[[forward]]
guest = 80
host = {low}

[[socket]]
listen = "host"
host = "{containerd}"
guest = "/run/containerd/containerd.sock"

[[socket]]
listen = "guest"
host = "{backwards}"
guest = "/run/test/backwards.sock"
"#,
        first = range.0,
        last = range.0 + 2,
        to_first = range.1,
        to_last = range.1 + 2,
        containerd = containerd.display(),
        backwards = backwards.display()
    );
    let folder = vm.dhow_home().join("config/profiles");
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder).unwrap();
    std::fs::write(folder.join("default.toml"), text).unwrap();
}

fn listed(vm: &Vm) -> String {
    vm.dhow(&["ports"]).ok()
}

/// A client of a forward that nobody serves waits in vain for 10 s, and is reset then.
fn nobody_comes(port: u16) {
    let begun = Instant::now();
    let mut stream = TcpStream::connect(local(port)).expect("a static forward");
    stream.set_read_timeout(Some(SOON)).unwrap();
    let error = stream.read(&mut [0]).expect_err("nobody serves it");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert!(begun.elapsed() >= Duration::from_secs(8), "reset after {:?}", begun.elapsed());
}

fn forwards_follow_the_rules(vm: &Vm, ports: &Ports) {
    let vacant = ports.vacant;
    let waiting = std::thread::spawn(move || nobody_comes(vacant));
    // Static: somebody may come before the server does.
    let early = TcpStream::connect(local(ports.fixed)).expect("a static forward before its server");
    let serve = |port: u16| {
        let running = vm.exec(&[TOOL, "serve", &format!("0.0.0.0:{port}")]).spawn();
        running.expect("listening");
        running
    };
    let [from, to] = [ports.range.0, ports.range.1];
    let guests = [ports.fixed, ports.moved.0, ports.ignored, ports.open, 80, from, from + 2];
    let servers = guests.map(serve);
    // The rule is for TCP: over UDP the port stays the same.
    let datagrams = vm.exec(&[TOOL, "datagrams", &format!("0.0.0.0:{from}")]).spawn();
    datagrams.expect("listening");
    let mut early = early;
    early.set_read_timeout(Some(SOON)).unwrap();
    early.write_all(b"source 5 1\n").unwrap();
    let mut said = Vec::new();
    early.read_to_end(&mut said).expect("who came early is served");
    assert_eq!(said.len(), 5);
    for port in [ports.fixed, ports.moved.1, ports.open, ports.low, to, to + 2] {
        drop(dhow_tests::net::connect(local(port)));
        check_echo(local(port), 1, 10_000);
    }
    check_echo(SocketAddr::from((own_address(), ports.open)), 1, 10_000);
    assert!(!accepts(own_address(), ports.moved.1), "only a rule opens a port to the network");
    let text = wait_for("the ignored port with its reason", SOON, || {
        let text = listed(vm);
        let line = text.lines().find(|line| line.contains(&format!(":{}", ports.ignored)));
        line.filter(|line| line.contains("ignores")).map(str::to_owned).ok_or(text)
    });
    assert!(!accepts(Ipv4Addr::LOCALHOST, ports.ignored), "{text}");
    assert!(!accepts(Ipv4Addr::LOCALHOST, from) && !accepts(Ipv4Addr::LOCALHOST, to + 1));
    let client = UdpSocket::bind(local(0)).unwrap();
    client.connect(local(from)).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    wait_for("an answer over UDP", SOON, || {
        client.send(b"x").and_then(|_| client.recv(&mut [0; 8])).map_err(|error| error.to_string())
    });
    drop((servers, datagrams));
    wait_until("the forward's end", SOON, || !accepts(Ipv4Addr::LOCALHOST, ports.moved.1));
    assert!(accepts(Ipv4Addr::LOCALHOST, ports.fixed), "a static forward stays");
    waiting.join().unwrap_or_else(|failure| std::panic::resume_unwind(failure));
}

fn sockets_lead_both_ways(vm: &Vm, containerd: &Path) {
    // HTTP/2's preface and empty settings (RFC 9113, 3.4): the server's settings come back.
    let mut stream = UnixStream::connect(containerd).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").unwrap();
    let mut frame = [0; 9];
    stream.read_exact(&mut frame).unwrap();
    assert_eq!(frame[3], 4, "a SETTINGS frame: {frame:?}");
    assert_eq!(vm.exec(&[TOOL, "ask", "/run/test/backwards.sock", "abc"]).ok(), "cba");
    // The ssh-agent, where the guest's programs and containers look for it.
    assert_eq!(vm.sh("echo $SSH_AUTH_SOCK").ok(), "/run/host-services/ssh-auth.sock");
    assert_eq!(vm.sh(&format!("{TOOL} ask $SSH_AUTH_SOCK agent")).ok(), "tnega");
    let mount = ["-v", "/run/host-services/ssh-auth.sock:/agent"];
    assert_eq!(vm.docker_run(&mount, &["guest-tool", "ask", "/agent", "agent"]).ok(), "tnega");
}

fn the_hosts_services_are_reached(vm: &Vm, ports: &Ports) {
    let target = |name: &str, port: u16| format!("{name}:{port}");
    vm.docker(&["network", "create", "own"]).ok();
    for options in [&[][..], &["--network", "own"], &["--network", "host"]] {
        for name in ["host.docker.internal", "host.dhow.internal"] {
            let said =
                vm.docker_run(options, &["guest-tool", "ask", &target(name, ports.service), "abc"]).ok();
            assert_eq!(said, "cba", "{name} with {options:?}");
        }
    }
    let gateway = ["--add-host", "there:host-gateway"];
    let said = vm.docker_run(&gateway, &["guest-tool", "ask", &target("there", ports.service), "abc"]).ok();
    assert_eq!(said, "cba");
    assert_eq!(vm.exec(&[TOOL, "ask", &target("host.docker.internal", ports.service), "abc"]).ok(), "cba");
    // A large exchange, hashed on both sides.
    let script =
        format!("guest-tool pattern 1 3000000 | nc host.docker.internal {} | sha256sum", ports.service);
    let mut reversed = Pattern::bytes(1, 3_000_000);
    reversed.reverse();
    let expected = Cmd::new(in_path("sha256sum").expect("sha256sum(1)")).stdin(reversed).ok();
    assert_eq!(vm.docker_run(&[], &["sh", "-c", &script]).ok().trim(), expected.trim());
    // What no rule names is closed.
    for name in ["host.docker.internal", "127.0.0.1", "192.168.127.1", "192.168.127.254"] {
        // Where nobody answers at all, the kernel would try for two minutes.
        let asked = ["timeout", "10", "guest-tool", "ask", &target(name, ports.secret), "abc"];
        // With an init: the first process of a container does not hear what timeout(1) sends it.
        let output = vm.docker_run(&["--init"], &asked).run();
        assert!(!output.status.success() && !output.all().contains("cba"), "{name}: {output}");
    }
}

fn a_new_supervisor_keeps_the_rules(vm: &Vm, ports: &Ports) {
    let before = vm.pid_of(" supervisor ");
    dhow_tests::process::kill(before);
    let asked = vm.exec(&[TOOL, "ask", &format!("host.docker.internal:{}", ports.service), "abc"]);
    assert_eq!(asked.ok(), "cba");
    assert_ne!(vm.pid_of(" supervisor "), before);
    let server = vm.exec(&[TOOL, "serve", &format!("0.0.0.0:{}", ports.moved.0)]).spawn();
    server.expect("listening");
    drop(dhow_tests::net::connect(local(ports.moved.1)));
    check_echo(local(ports.moved.1), 3, 10_000);
    assert!(accepts(Ipv4Addr::LOCALHOST, ports.fixed));
}
