//! Start, stop, restart and delete: what lasts, what goes, and what is left.

use dhow_tests::settings::in_path;
use dhow_tests::{IMAGE, SOON, Vm, cases, process, wait_until};

cases![Shared: a_start_is_idempotent, a_second_profile_beside;
    Own: from_the_first_start_to_the_last_deletion, two_starts_at_once, a_start_that_is_interrupted,
    without_passt_there_is_slirp];

fn a_start_is_idempotent(vm: &Vm) {
    let before: Vec<_> = vm.processes().into_iter().map(|process| process.pid).collect();
    vm.start_command(&[]).run().exits(0).says("running already");
    let after: Vec<_> = vm.processes().into_iter().map(|process| process.pid).collect();
    assert_eq!(before, after);
}

fn a_second_profile_beside(vm: &Vm) {
    let other = ["-p", "other"];
    vm.start_command(&[])
        .args(other)
        .args(["--mount", "/var/empty-for-none"])
        .run()
        .exits(1)
        .says("/var/empty-for-none");
    vm.start_command(&["--no-activate"]).args(other).run().exits(0);
    assert_eq!(vm.docker(&["context", "show"]).ok(), "dhow", "--no-activate was said");
    let here = vm.docker(&["info", "--format", "{{.Name}}"]).ok();
    let there = vm.docker(&["--context", "dhow-other", "info", "--format", "{{.Name}}"]).ok();
    assert_eq!((here.as_str(), there.as_str()), ("dhow", "dhow-other"));
    assert_eq!(vm.docker(&["--context", "dhow-other", "images", "-q"]).ok(), "");
    let listed = vm.dhow(&["list"]).ok();
    assert!(listed.contains("default") && listed.contains("other"), "{listed}");
    vm.dhow(&["delete", "--data", "--force"]).args(other).run().exits(0);
    assert!(!vm.dhow(&["list"]).ok().contains("other"));
    wait_until("the end of the other VM's processes", SOON, || {
        !vm.processes().iter().any(|process| process.line.contains("other"))
    });
    vm.docker(&["version"]).ok();
}

/// Image and container are there, and the container's file with them.
fn assert_kept(vm: &Vm) {
    assert!(vm.docker(&["images", "--format", "{{.Repository}}"]).ok().contains(IMAGE));
    assert!(vm.docker(&["ps", "-a", "--format", "{{.Names}}"]).ok().contains("keep"));
    assert_eq!(vm.docker(&["start", "-a", "keep"]).ok(), "kept");
}

fn from_the_first_start_to_the_last_deletion() {
    let vm = Vm::new();
    let docker_before = vm.docker(&["context", "show"]).ok();
    let output = vm.start(&[]);
    for part in ["booting the VM", "installing docker", "starting docker", "docker run"] {
        assert!(output.all().contains(part), "{part:?} is not shown: {output}");
    }
    assert_eq!(vm.docker(&["context", "show"]).ok(), "dhow");
    vm.import_image();
    // The first time it writes, then it reads.
    let script = "[ -e /file ] && cat /file || echo kept >/file";
    vm.docker(&["run", "--name", "keep", IMAGE, "sh", "-c", script]).ok();
    vm.docker(&["volume", "create", "volume"]).ok();

    vm.stop();
    assert_eq!(vm.docker(&["context", "show"]).ok(), docker_before);
    assert!(!vm.run("docker.sock").exists(), "the socket of a VM that is stopped");
    assert!(vm.dhow(&["status"]).run().all().contains("stopped"));
    // Once more: nothing to do is no failure.
    vm.dhow(&["stop"]).run().exits(0);

    let again = vm.start(&[]);
    assert!(!again.all().contains("running already"));
    assert_kept(&vm);
    assert_eq!(vm.docker(&["volume", "ls", "-q"]).ok(), "volume");

    vm.dhow(&["restart"]).deadline(dhow_tests::vm::START * 2).run().exits(0);
    assert_kept(&vm);

    // Without --force it asks, and nobody answers.
    let asked = vm.dhow(&["delete"]).run();
    assert!(!asked.status.success() && vm.data("disk.raw").exists(), "{asked}");
    vm.docker(&["version"]).ok();
    vm.dhow(&["delete", "--force"]).run().exits(0);
    vm.assert_nothing_left();
    assert!(vm.data("disk.raw").exists());
    assert!(!vm.docker(&["context", "ls", "-q"]).ok().contains("dhow"));

    vm.start(&[]);
    assert_kept(&vm);
    vm.dhow(&["delete", "--force", "--data"]).run().exits(0);
    vm.assert_nothing_left();
    assert!(!vm.data("disk.raw").exists());
    assert_eq!(vm.json(&["list", "--json"]), serde_json::json!([]));
}

fn two_starts_at_once() {
    let vm = Vm::new();
    let first = vm.start_command(&[]).spawn();
    let second = vm.start_command(&[]).spawn();
    first.wait().exits(0);
    second.wait().exits(0);
    let qemus = vm.processes().into_iter().filter(|process| process.line.contains("qemu-system")).count();
    assert_eq!(qemus, 1);
    vm.docker(&["version"]).ok();
    // A forced stop leaves nothing either.
    vm.dhow(&["stop", "--force"]).run().exits(0);
    vm.assert_nothing_left();
}

fn a_start_that_is_interrupted() {
    let vm = Vm::new();
    let start = vm.start_command(&[]).spawn();
    wait_until("QEMU", SOON, || vm.processes().iter().any(|process| process.line.contains("qemu-system")));
    // A stop from elsewhere ends the start, with a reason.
    vm.dhow(&["stop"]).run().exits(0);
    let output = start.wait().exits(1);
    assert!(output.stderr.contains("stop"), "{output}");
    vm.assert_nothing_left();
    // And nothing is in the way of the next one.
    vm.start(&["--no-activate"]);
    assert_ne!(vm.docker(&["context", "show"]).ok(), "dhow");
    vm.docker(&["--context", "dhow", "version"]).ok();
    let supervisor = vm.pid_of(" supervisor ");
    assert!(process::is_alive(supervisor));
    vm.stop();
}

fn without_passt_there_is_slirp() {
    // All of PATH but passt.
    let vm = Vm::new();
    let programs = vm.beside("path");
    std::fs::create_dir_all(&programs).unwrap();
    for program in ["qemu-system-x86_64", "docker"] {
        if let Some(path) = in_path(program) {
            std::os::unix::fs::symlink(path, programs.join(program)).unwrap();
        }
    }
    let vm = vm.env("PATH", &programs);
    vm.start(&[]).says("passt");
    assert!(!vm.processes().iter().any(|process| process.line.contains("passt ")));
    vm.import_image();
    let answer = vm.docker_run(&[], &["nslookup", "localhost"]).run().text();
    assert!(answer.contains("127.0.0.1"), "{answer}");
    // Out it goes: the gateway is QEMU's, which reaches this host's network.
    let listener = std::net::TcpListener::bind((dhow_tests::net::own_address(), 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let accepting = std::thread::spawn(move || listener.accept().map(drop));
    let script = format!("nc -w 5 {} {} </dev/null", address.ip(), address.port());
    vm.docker_run(&[], &["sh", "-c", &script]).run();
    let reached = accepting.is_finished();
    if !reached {
        let _ = std::net::TcpStream::connect(address);
    }
    accepting.join().unwrap().unwrap();
    assert!(reached, "a container did not reach {address}");
    vm.stop();
}
