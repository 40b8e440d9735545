//! Guests and clients that do too much, or nothing: bounded, told once, and nobody else is disturbed.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dhow_tests::net::{check_echo, connect, free_port, local};
use dhow_tests::ports::serve;
use dhow_tests::wait::SetOnDrop;
use dhow_tests::{SOON, TOOL, Vm, cases, wait_for, wait_until};

cases![Shared: a_guest_that_listens_everywhere, a_flood_of_connections_leaves_room, clients_that_leave_without_a_word,
    a_guest_that_never_reads];

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
    let text = std::fs::read_to_string(&log).unwrap();
    assert!(text.contains("most allowed"), "nothing about ports beyond the limit in the log");
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
    let told = || {
        let log = std::fs::read_to_string(&log).unwrap();
        let about =
            |line: &&str| line.contains("connections are refused") && line.contains("too many streams");
        log.lines().filter(about).count()
    };
    let before = told();
    let held: Vec<TcpStream> = std::thread::scope(|scope| {
        let one = || (0..FLOOD / FLOODERS).filter_map(|_| held_open(flooded)).collect::<Vec<_>>();
        let flooders: Vec<_> = (0..FLOODERS).map(|_| scope.spawn(one)).collect();
        others_work();
        flooders.into_iter().flat_map(|flooder| flooder.join().unwrap()).collect()
    });
    assert!((1024..FLOOD - 100).contains(&held.len()), "{} of {FLOOD} are open", held.len());
    others_work();
    let new = told() - before;
    // Once a minute: nothing new where it was told just before this case.
    assert!(new == 1 || new == 0 && before > 0, "{new} lines about it, {before} before");
    drop(held);
    wait_for("room for new ones", SOON, || held_open(flooded).map(drop).ok_or_else(|| "refused".to_owned()));
    check_echo(local(flooded), 3, 100_000);
    drop(servers);
}

/// Clients that connect and leave as fast as they can: others go on, also who finishes sending before he has said a word.
fn clients_that_leave_without_a_word(vm: &Vm) {
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
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _end = SetOnDrop(&done);
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
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
