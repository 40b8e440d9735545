//! The command line: exec, shell, logs, and what scripts read.

use dhow_guest_tool::{Pattern, Summary};
use nix::sys::signal::Signal;

use dhow_tests::{Pty, SOON, Vm, cases, wait_for};

cases![Shared: exec_has_status_and_streams, exec_takes_input_to_its_end, exec_keeps_arguments, exec_passes_signals_on,
    exec_in_a_shared_folder, exec_moves_much, exec_many_at_once, exec_of_nothing_that_exists, shell_is_on_a_terminal,
    logs_of_every_source, scripts_read_json, usage_mistakes, a_reader_that_leaves;
    Own: commands_without_a_vm];

fn exec_has_status_and_streams(vm: &Vm) {
    let output = vm.sh("echo out; echo err >&2; exit 7").run().exits(7);
    assert_eq!((output.text().as_str(), output.stderr.as_str()), ("out\n", "err\n"));
    // As shells say it: 128 and the signal.
    vm.sh("kill -9 $$").run().exits(137);
    vm.exec(&["false"]).run().exits(1);
    vm.exec(&["true"]).run().exits(0);
}

fn exec_takes_input_to_its_end(vm: &Vm) {
    assert_eq!(vm.exec(&["cat"]).stdin("x").ok(), "x");
    assert_eq!(vm.exec(&["cat"]).ok(), "");
    let bytes = Pattern::bytes(1, 5_000_000);
    let sum = vm.sh("sha256sum; echo end >&2").stdin(bytes.clone()).run().exits(0).says("end").text();
    assert_eq!(sum.split(' ').next(), Summary::of(&bytes).split(' ').nth(1));
    let output = vm.exec(&["cat"]).stdin(bytes.clone()).run().exits(0);
    assert!(output.stdout == bytes, "{} bytes came back", output.stdout.len());
    // A command that does not read its input ends all the same.
    vm.exec(&["true"]).stdin(bytes).run().exits(0);
}

fn exec_keeps_arguments(vm: &Vm) {
    let words = ["a b", "c'd", "", "$HOME", "*", "ünï", "--flag", "-p", "\"", "line\nbreak", "back\\slash"];
    let mut argv = vec!["printf", "%s|"];
    argv.extend(words);
    assert_eq!(vm.exec(&argv).ok(), words.join("|") + "|");
}

fn exec_passes_signals_on(vm: &Vm) {
    for (signal, name) in [(Signal::SIGTERM, "TERM"), (Signal::SIGINT, "INT"), (Signal::SIGUSR1, "USR1")] {
        let script =
            format!("trap 'echo got {name}; exit 9' {name}; echo ready; while :; do sleep 0.1; done");
        let running = vm.sh(&script).spawn();
        running.expect("ready");
        running.signal(signal);
        running.wait().exits(9).says(&format!("got {name}"));
    }
    // A killed client takes its command with it.
    let running = vm.sh("echo $$; exec sleep 1234.5").spawn();
    running.expect("\n");
    let pid = running.stdout().trim().to_owned();
    vm.exec(&["kill", "-0", &pid]).ok();
    drop(running);
    wait_for("the end of the command", SOON, || {
        let output = vm.exec(&["kill", "-0", &pid]).run();
        if output.status.success() { Err("it runs".to_owned()) } else { Ok(()) }
    });
}

fn exec_in_a_shared_folder(vm: &Vm) {
    let folder = vm.home().join("cwd/with space");
    std::fs::create_dir_all(&folder).unwrap();
    assert_eq!(vm.exec(&["pwd"]).cwd(&folder).ok(), folder.to_str().unwrap());
    // A folder that the guest does not have as the host's is not looked for in the guest.
    assert_eq!(vm.exec(&["pwd"]).cwd("/usr").ok(), "/root");
}

fn exec_moves_much(vm: &Vm) {
    let output = vm.exec(&["/root/guest-tool", "pattern", "2", "30000000"]).run().exits(0);
    assert_eq!(output.stdout.len(), 30_000_000);
    assert!(output.stdout == Pattern::bytes(2, 30_000_000));
}

fn exec_many_at_once(vm: &Vm) {
    let running: Vec<_> = (0..20).map(|number| vm.sh(&format!("sleep 1; echo {number}")).spawn()).collect();
    for (number, running) in running.into_iter().enumerate() {
        assert_eq!(running.wait().ok(), number.to_string());
    }
}

fn exec_of_nothing_that_exists(vm: &Vm) {
    let output = vm.exec(&["no-such-program"]).run();
    assert!(!output.status.success(), "{output}");
    output.says("no-such-program");
}

fn shell_is_on_a_terminal(vm: &Vm) {
    let mut pty = Pty::spawn(vm.dhow(&["shell"]), 31, 71);
    pty.send("stty size; echo o''ne\r");
    let seen = pty.expect("one");
    assert!(seen.contains("31 71"), "{seen}");
    pty.resize(41, 81);
    // The new size overtakes nothing: it is there by the next command or the one after.
    let mut count = 0;
    wait_for("the new size", SOON, || {
        count += 1;
        pty.send(&format!("stty size; echo mark$(({count}+0)):\r"));
        let seen = pty.expect(&format!("mark{count}:"));
        if seen.contains("41 81") { Ok(()) } else { Err(seen) }
    });
    // A child says so: between two commands the interrupt would be the shell's own.
    pty.send("sh -c \"echo be''gun; exec sleep 1000\"\r");
    pty.expect("begun");
    pty.send("\u{3}");
    // The line editor throws away what was typed before its prompt.
    pty.expect("^C");
    pty.expect("# ");
    pty.send("tty; pwd; exit 5\r");
    pty.expect("/dev/pts/");
    assert_eq!(pty.wait().0, Some(5));
}

fn logs_of_every_source(vm: &Vm) {
    for source in ["dockerd", "containerd", "agent", "kernel", "console", "qemu", "keeper", "vsock-device"] {
        // Some of them may have nothing to say.
        vm.dhow(&["logs", source]).run().exits(0);
    }
    let all = vm.dhow(&["logs", "dockerd"]).ok();
    assert!(all.contains("API listen"), "{all}");
    let output = vm.dhow(&["logs", "no-such-log"]).run();
    assert!(!output.status.success(), "{output}");
}

fn scripts_read_json(vm: &Vm) {
    let status = vm.status();
    assert_eq!((&status["state"], &status["acceleration"]), (&"running".into(), &"tcg".into()), "{status}");
    let list = vm.json(&["list", "--json"]);
    assert!(list.as_array().is_some_and(|profiles| profiles.len() == 1), "{list}");
    assert!(vm.json(&["ports", "--json"]).is_array() && vm.json(&["mounts", "--json"]).is_array());
    let text = vm.dhow(&["status"]).ok();
    assert!(text.to_lowercase().contains("running"), "{text}");
    assert!(vm.dhow(&["list"]).ok().contains("default"));
    let version = vm.dhow(&["version"]).ok();
    assert!(version.contains(env!("CARGO_PKG_VERSION")), "{version}");
}

fn usage_mistakes(vm: &Vm) {
    for arguments in [&["no-such-command"][..], &["start", "--no-such-flag"], &["exec"], &["-p"]] {
        vm.dhow(arguments).run().exits(2).says("--help");
    }
    vm.dhow(&["-p", "Not A Name", "status"]).run().says("Not A Name");
}

fn a_reader_that_leaves(vm: &Vm) {
    let script = "\"$@\" | head -n 1";
    let dhow = vm.dhow(&["exec", "--", "yes"]).to_std();
    let output = vm
        .command("/bin/sh".as_ref())
        .args(["-c", script, "sh"])
        .arg(dhow.get_program())
        .args(dhow.get_args())
        .run()
        .exits(0);
    assert_eq!((output.text().as_str(), output.stderr.as_str()), ("y\n", ""));
}

fn commands_without_a_vm() {
    let vm = Vm::new();
    for arguments in [&["exec", "--", "true"][..], &["shell"], &["logs", "dockerd"], &["ports"], &["mounts"]]
    {
        let output = vm.dhow(arguments).run().exits(1);
        assert!(output.stderr.contains("not running") && output.stderr.contains("hint: "), "{output}");
    }
    assert_eq!(vm.json(&["list", "--json"]), serde_json::json!([]));
    vm.dhow(&["version"]).ok();
    assert!(vm.processes().is_empty());
    assert!(!vm.data("disk.raw").exists(), "a question has made a disk");
}
