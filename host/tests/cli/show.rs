//! status, list, ports, mounts and version of a VM that runs, for people and for scripts.

use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::net::UnixListener;

use dhow::api::{ApiReply, ApiRequest, ForwardReport, VmState};
use dhow_protocol::ports::{Listener, Protocol};
use serde_json::{Value, json};

use crate::bench::{Bench, Running, read_until};
use crate::fake::{Fake, answer_running, mount, report};

fn json_of(bench: &Bench, args: &[&str]) -> Value {
    let outcome = bench.run(args);
    assert_eq!(outcome.expect(0).stdout.lines().count(), 1, "{outcome:#?}");
    serde_json::from_str(&outcome.stdout).unwrap()
}

#[test]
fn status_shows_what_the_supervisor_says_and_escapes_what_the_guest_does() {
    let bench = Bench::new();
    let _fake = Fake::running(&bench);
    let status = bench.run(&["status"]);
    let text = &status.expect(0).stdout;
    for part in [
        "state         running",
        "3 CPUs, 1.5 GiB memory (1 GiB free), 40 GiB disk (30 GiB free)",
        "tcg (emulation: slow)",
        "agent 9.9.9\\u{1b}[31m, Linux 6.12.0, up 1 min 1 s",
        "dockerd ready after 2 restarts",
        "qemu 4711",
        "unix:///fake/docker.sock (context dhow)",
    ] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    let document = json_of(&bench, &["status", "--json"]);
    assert_eq!(document["state"], "running");
    assert_eq!(document["guest"]["memory_available"], 1_u64 << 30);
    assert_eq!(
        document["daemons"][0],
        json!({"name": "dockerd", "state": "ready", "reason": null, "restarts": 2})
    );
    assert_eq!(document["processes"], json!([{"name": "qemu", "pid": 4711}]));
}

#[test]
fn only_a_vm_that_runs_well_is_status_0() {
    for state in [VmState::Starting, VmState::Degraded, VmState::Stopping, VmState::Stopped] {
        let bench = Bench::new();
        let _fake = Fake::new(&bench, move |_, peer| {
            let mut report = report(state);
            report.problem = Some("dockerd has failed: no\u{7}".into());
            peer.reply(&ApiReply::Status(Box::new(report)));
        });
        let status = bench.run(&["status"]);
        assert!(status.expect(1).stdout.contains("dockerd has failed: no\\u{7}"), "{status:#?}");
        let list = bench.run(&["list"]);
        list.expect(0);
    }
}

#[test]
fn list_has_every_profile() {
    let bench = Bench::new();
    let _fake = Fake::running(&bench);
    std::fs::write(bench.settings(), "cpus = 1\n").unwrap();
    std::fs::write(bench.path("config/profiles/web.toml"), "cpus = 1\nmemory = '1GiB'\ndisk = '7GiB'\n")
        .unwrap();
    std::fs::write(bench.path("data/profiles/old/disk.raw"), "").unwrap();
    let list = bench.run(&["list"]);
    let lines: Vec<Vec<&str>> = list
        .expect(0)
        .stdout
        .lines()
        .map(|line| line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect())
        .collect();
    assert_eq!(lines[0], ["PROFILE", "STATE", "CPUS", "MEMORY", "DISK", "CONTEXT", "PROBLEM"]);
    assert_eq!(lines[1], ["default", "running", "3", "1.5 GiB", "40 GiB", "dhow"]);
    assert_eq!(lines[2][..2], ["old", "stopped (only its disk is left)"]);
    assert_eq!(lines[3], ["web", "stopped", "1", "1 GiB", "7 GiB", "dhow-web"]);
    let document = json_of(&bench, &["list", "--json"]);
    let states: Vec<&str> =
        document.as_array().unwrap().iter().map(|entry| entry["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["running", "stopped", "stopped"]);
    assert_eq!(document[1]["settings"], false);
}

fn forward(port: u16, host: Option<u16>, reason: Option<&str>) -> ForwardReport {
    let address = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    ForwardReport {
        guest: Listener { protocol: Protocol::Tcp, address, port },
        host: host.map(|port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)),
        reason: reason.map(str::to_owned),
    }
}

#[test]
fn ports_once() {
    let bench = Bench::new();
    let _fake = Fake::new(&bench, |request, peer| {
        assert_eq!(*request, ApiRequest::Ports { watch: false });
        let reports = vec![forward(8080, Some(8080), None), forward(22, None, Some("below 1024"))];
        peer.reply(&ApiReply::Ports(reports));
    });
    let ports = bench.run(&["ports"]);
    let expected = "PROTOCOL  GUEST         HOST            WHY NOT\n\
                    tcp       0.0.0.0:22    -               below 1024\n\
                    tcp       0.0.0.0:8080  127.0.0.1:8080\n";
    assert_eq!(ports.expect(0).stdout, expected);
    let document = json_of(&bench, &["ports", "--json"]);
    assert_eq!(
        document,
        json!([
            {"protocol": "tcp", "guest": "0.0.0.0:22", "host": null, "reason": "below 1024"},
            {"protocol": "tcp", "guest": "0.0.0.0:8080", "host": "127.0.0.1:8080", "reason": null},
        ])
    );
}

#[test]
fn ports_as_they_come_and_go() {
    let bench = Bench::new();
    let (next, changes) = std::sync::mpsc::channel::<Vec<ForwardReport>>();
    let changes = std::sync::Mutex::new(changes);
    let _fake = Fake::new(&bench, move |request, peer| {
        if *request != (ApiRequest::Ports { watch: true }) {
            return answer_running(request, peer);
        }
        // The connection ends when the test has no more: the VM stops.
        for reports in changes.lock().unwrap().iter() {
            peer.reply(&ApiReply::Ports(reports));
        }
    });
    let (running, mut stdout) = Running::spawn_unread(&mut bench.command(&["ports", "--watch"]));
    next.send(vec![forward(80, Some(80), None)]).unwrap();
    assert_eq!(read_until(&mut stdout, "\n"), "+ tcp 0.0.0.0:80 -> 127.0.0.1:80\n");
    next.send(vec![forward(80, Some(80), None), forward(81, None, Some("in use"))]).unwrap();
    assert_eq!(read_until(&mut stdout, "\n"), "+ tcp 0.0.0.0:81 -> - (in use)\n");
    // At two places of the host.
    next.send(vec![forward(81, Some(82), None), forward(81, Some(81), None)]).unwrap();
    drop(next);
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    let expected = "- tcp 0.0.0.0:80 -> 127.0.0.1:80\n- tcp 0.0.0.0:81 -> - (in use)\n+ tcp 0.0.0.0:81 -> 127.0.0.1:81\n+ tcp 0.0.0.0:81 -> 127.0.0.1:82\n";
    assert_eq!(rest, expected);
    running.finish().expect(0);
}

#[test]
fn mounts_and_their_problems() {
    let bench = Bench::new();
    let _fake = Fake::new(&bench, |_, peer| {
        let mut broken = mount("/srv/a\nb");
        (broken.read_only, broken.mounted, broken.problem) = (true, false, Some("no\u{1b}".into()));
        peer.reply(&ApiReply::Mounts(vec![mount("/home/me"), broken]));
    });
    let mounts = bench.run(&["mounts"]);
    let expected = "PATH       MODE       STATE        PROBLEM\n\
                    /home/me   writable   mounted\n\
                    /srv/a\\nb  read-only  not mounted  no\\u{1b}\n";
    assert_eq!(mounts.expect(0).stdout, expected);
    let document = json_of(&bench, &["mounts", "--json"]);
    assert_eq!(
        document[1],
        json!({"path": "/srv/a\nb", "read_only": true, "mounted": false, "problem": "no\u{1b}"})
    );
}

#[test]
fn version_asks_the_agent_and_docker() {
    let bench = Bench::new();
    let socket = bench.path("run/default/docker.sock");
    let fake_socket = socket.clone();
    let _fake = Fake::new(&bench, move |_, peer| {
        let mut report = report(VmState::Running);
        report.guest.as_mut().unwrap().agent = "0.0.1".into();
        report.docker_socket = fake_socket.clone();
        peer.reply(&ApiReply::Status(Box::new(report)));
    });
    let listener = UnixListener::bind(&socket).unwrap();
    let docker = std::thread::spawn(move || {
        use std::io::Write;
        let (mut stream, _) = listener.accept().unwrap();
        let request = read_until(&mut stream, "\r\n\r\n");
        assert!(request.starts_with("GET /version HTTP/1.0\r\n"), "{request:?}");
        stream
            .write_all(b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n{\"Version\":\"28.5\"}")
            .unwrap();
    });
    let document = json_of(&bench, &["version", "--json"]);
    let own = env!("CARGO_PKG_VERSION");
    assert_eq!(document, json!({"dhow": own, "agent": "0.0.1", "kernel": "6.12.0", "docker": "28.5"}));
    docker.join().unwrap();
}

#[test]
fn nobody_reads_and_that_is_success() {
    let bench = Bench::new();
    let _fake = Fake::running(&bench);
    std::fs::write(bench.settings(), "").unwrap();
    for args in [&["list"][..], &["status"], &["status", "--json"], &["version"], &["mounts"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = bench.command(args);
        command.stdout(writer);
        let running = Running::spawn(&mut command);
        drop(command);
        let outcome = running.finish();
        assert_eq!(outcome.expect(0).stderr, "", "{args:?}");
    }
    let mut command = bench.command(&["list"]);
    command.stdout(std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
    Running::spawn(&mut command).finish().expect_error("cannot write the output: No space left", "");
}
