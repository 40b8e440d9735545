//! Two profiles at once: each has the networks that it asks for, and neither reaches the other.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::DirBuilderExt;

use dhow_tests::net::{accepts, check_echo, free_port, local, own_address};
use dhow_tests::{SOON, TOOL, Vm, cases, wait_for};

cases![Own: two_profiles_are_apart];

/// Of the second profile.
const SECOND: [&str; 2] = ["--profile", "second"];

fn second(vm: &Vm, arguments: &[&str]) -> dhow_tests::command::Cmd {
    vm.dhow(&SECOND).args(arguments)
}

fn two_profiles_are_apart() {
    let vm = Vm::new();
    // What docker cuts its networks from hides the one that this host is in, of which a start tells.
    let [a, b, ..] = own_address().octets();
    let folder = vm.dhow_home().join("config/profiles");
    std::fs::create_dir_all(vm.home()).unwrap();
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder).unwrap();
    let text = format!("subnet = \"10.99.8.0/24\"\ndocker-subnet = \"{a}.{b}.0.0/16\"\n");
    std::fs::write(folder.join("default.toml"), text).unwrap();
    let started = vm.start(&["--no-mounts"]);
    assert!(started.all().contains(&format!("{a}.{b}.0.0/16 overlaps with")), "{started}");
    vm.import_image();
    vm.install_tool();
    networks_are_as_asked_for(&vm, &format!("{a}.{b}."));

    vm.start_command(&SECOND).args(["--no-mounts"]).run().exits(0);
    second(&vm, &["exec", "--", "sh", "-c", &format!("cat >{TOOL} && chmod 755 {TOOL}")])
        .stdin(std::fs::read(&dhow_tests::settings::Settings::get().guest_tool).unwrap())
        .ok();
    neither_reaches_the_other(&vm);
    second(&vm, &["stop"]).ok();
    vm.stop();
}

fn networks_are_as_asked_for(vm: &Vm, docker: &str) {
    let addresses = vm.sh("ip -4 -o addr show").ok();
    assert!(addresses.contains(" 10.99.8."), "{addresses}");
    let subnet = |network: &str| {
        let format = "{{range .IPAM.Config}}{{.Subnet}}{{end}}";
        vm.docker(&["network", "inspect", "--format", format, network]).ok()
    };
    assert!(subnet("bridge").starts_with(docker), "{}", subnet("bridge"));
    vm.docker(&["network", "create", "another"]).ok();
    assert!(subnet("another").starts_with(docker), "{}", subnet("another"));
    let answer = vm.docker_run(&[], &["nslookup", "-type=a", "host.docker.internal"]).run().text();
    assert!(answer.contains("Address: 10.99.8."), "{answer}");
}

fn neither_reaches_the_other(vm: &Vm) {
    let port = free_port();
    let address = SocketAddr::from(([0, 0, 0, 0], port)).to_string();
    let server = vm.exec(&[TOOL, "serve", &address]).spawn();
    server.expect("listening");
    drop(dhow_tests::net::connect(local(port)));
    check_echo(local(port), 1, 1000);
    let own = own_address().to_string();
    for place in ["10.99.8.1", "10.99.8.2", "10.99.8.254", "192.168.127.1", "127.0.0.1", &own] {
        let target = format!("{place}:{port}");
        // Where nobody answers at all, the kernel would try for two minutes.
        let asked = ["exec", "--", "timeout", "5", TOOL, "ask", &target, "echo\nabc"];
        let output = second(vm, &asked).run();
        assert!(!output.status.success() && !output.all().contains("abc"), "{place}: {output}");
    }
    // The host has the port once: the second profile's is told why it is not there.
    let other = second(vm, &["exec", "--", TOOL, "serve", &address]).spawn();
    other.expect("listening");
    wait_for("the reason", SOON, || {
        let text = second(vm, &["ports"]).ok();
        if text.contains("in use on the host") { Ok(()) } else { Err(text) }
    });
    check_echo(local(port), 2, 1000);
    // Asked in the same way where it is, it answers: who asks is not what failed above.
    let asked = ["exec", "--", TOOL, "ask", &local(port).to_string(), "echo\nabc"];
    assert_eq!(second(vm, &asked).ok(), "abc");
    // And not the other way round, from a container, to a port that only the second one serves.
    let theirs = free_port();
    let serving = second(vm, &["exec", "--", TOOL, "serve", &format!("0.0.0.0:{theirs}")]).spawn();
    serving.expect("listening");
    check_echo(local(theirs), 4, 1000);
    for place in ["192.168.127.1", "192.168.127.2", "host.docker.internal", &own] {
        let target = format!("{place}:{theirs}");
        let asked = ["timeout", "5", "guest-tool", "ask", &target, "echo\nabc"];
        let output = vm.docker_run(&["--init"], &asked).run();
        assert!(!output.status.success() && !output.all().contains("abc"), "{place}: {output}");
    }
    drop(serving);
    // It gets the port when the first one leaves it.
    drop(server);
    wait_for("the second one's forward", SOON, || {
        let text = second(vm, &["ports"]).ok();
        if text.contains("in use on the host") { Err(text) } else { Ok(()) }
    });
    check_echo(local(port), 3, 1000);
    drop(other);
    dhow_tests::wait_until("the forward's end", SOON, || !accepts(Ipv4Addr::LOCALHOST, port));
}
