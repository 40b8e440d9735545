//! The harness itself, without a VM: what would hide faults must not be broken.

use std::os::unix::process::CommandExt;
use std::panic::catch_unwind;
use std::time::Duration;

use dhow_tests::command::Cmd;
use dhow_tests::{Pty, cases, process, report, vm};

cases![Own: deadlines_end_a_command_with_its_children, failures_tell_the_command, kept_pipes_are_noticed,
    leftovers_are_found_and_ended, a_terminal_is_one];

fn sh(script: &str) -> Cmd {
    Cmd::new("/bin/sh").env("PATH", "/usr/bin:/bin").args(["-c", script])
}

/// What a piece of a case says when it fails.
fn failure_of(case: impl FnOnce() + std::panic::UnwindSafe) -> String {
    drop(report::failure());
    assert!(catch_unwind(case).is_err(), "it was expected to fail");
    report::failure().words
}

fn deadlines_end_a_command_with_its_children() {
    let folder = vm::run_folder().join("deadline");
    std::fs::create_dir_all(&folder).unwrap();
    let script = format!("sleep 1000 # {}\n sleep 1001", folder.display());
    let slow = sh(&script).env("MARK", &folder).deadline(Duration::from_millis(300));
    let text = failure_of(|| drop(slow.run()));
    assert!(text.contains("no end within") && text.contains("sleep 1000"), "{text}");
    assert!(process::of_home(&folder).is_empty());
}

fn failures_tell_the_command() {
    let text = failure_of(|| drop(sh("echo out; echo err >&2; exit 3").ok()));
    for part in ["$ /bin/sh -c", "exit status 3", "stdout: out", "stderr: err"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

fn kept_pipes_are_noticed() {
    let text = failure_of(|| drop(sh("sleep 30 & exit 0").run()));
    assert!(text.contains("keeps the output"), "{text}");
}

fn leftovers_are_found_and_ended() {
    let folder = vm::run_folder().join("leftover");
    let mut left =
        sh("sleep 1000 & wait").env("DHOW_HOME", &folder).to_std().process_group(0).spawn().unwrap();
    let found = process::end_all(&folder);
    left.wait().unwrap();
    assert!(!found.is_empty() && process::of_home(&folder).is_empty(), "{found:?}");
}

fn a_terminal_is_one() {
    let mut pty = Pty::spawn(sh("test -t 0 && stty size; read line; stty size; exit 7"), 33, 77);
    pty.expect("33 77");
    pty.resize(44, 88);
    pty.send("go\n");
    pty.expect("44 88");
    assert_eq!(pty.wait().0, Some(7));
}
