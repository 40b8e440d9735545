//! exec: streams, exit statuses, signals, the working folder, and ends that are none.

use std::io::{Read, Write};
use std::process::Stdio;
use std::sync::mpsc;

use dhow::api::{ApiReply, ApiRequest};
use dhow_protocol::codec::DATA_CHUNK;
use dhow_protocol::exec::{ExecInput, ExecOutput, ExecStart, ExitStatus};
use nix::sys::signal::Signal;

use crate::bench::{Bench, Running, read_until, set_signals, wait_until};
use crate::fake::{Fake, Peer, answer_running, mount};

fn exited(peer: &mut Peer, status: ExitStatus) {
    peer.output(ExecOutput::Exited(status));
}

/// cat, which tells standard error how much it was.
fn cat(_: &ExecStart, peer: &mut Peer) {
    let mut total = 0;
    while let Some(input) = peer.input() {
        match input {
            ExecInput::Stdin(bytes) => {
                total += bytes.len();
                peer.output(ExecOutput::Stdout(bytes));
            }
            ExecInput::StdinEnd => break,
            other => panic!("{other:?}"),
        }
    }
    peer.output(ExecOutput::Stderr(format!("{total} bytes\n").into_bytes()));
    exited(peer, ExitStatus::Code(0));
}

#[test]
fn streams_are_apart_and_whole() {
    let bench = Bench::new();
    let _fake = Fake::exec(&bench, cat);
    let data: Vec<u8> =
        (0..3_000_001_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut command = bench.command(&["exec", "cat"]);
    command.stdin(Stdio::piped());
    let (mut running, mut stdout) = Running::spawn_unread(&mut command);
    let mut stdin = running.child.stdin.take().unwrap();
    let sent = data.clone();
    let writing = std::thread::spawn(move || stdin.write_all(&sent).unwrap());
    let mut read = Vec::new();
    stdout.read_to_end(&mut read).unwrap();
    writing.join().unwrap();
    assert!(read == data, "{} bytes came back of {}", read.len(), data.len());
    assert_eq!(running.finish().expect(0).stderr, "3000001 bytes\n");
}

#[test]
fn without_input_it_ends_at_once() {
    let bench = Bench::new();
    let _fake = Fake::exec(&bench, cat);
    // Standard input stays open and is not read: only -n can end this.
    let mut command = bench.command(&["exec", "-n", "cat"]);
    command.stdin(Stdio::piped());
    assert_eq!(Running::spawn(&mut command).finish().expect(0).stderr, "0 bytes\n");
    assert_eq!(bench.run(&["exec", "-i", "cat"]).expect(0).stderr, "0 bytes\n");
    bench.run(&["exec", "-i", "-n", "cat"]).expect(2);
}

#[test]
fn the_exit_status_is_the_commands_own() {
    for (status, code) in [
        (ExitStatus::Code(0), 0),
        (ExitStatus::Code(42), 42),
        (ExitStatus::Code(255), 255),
        (ExitStatus::Signal(9), 137),
        (ExitStatus::Signal(libc::SIGRTMAX()), 128 + libc::SIGRTMAX()),
    ] {
        let bench = Bench::new();
        let _fake = Fake::exec(&bench, move |_, peer| {
            peer.output(ExecOutput::Stdout(b"out".to_vec()));
            exited(peer, status);
        });
        let outcome = bench.run(&["exec", "true"]);
        assert_eq!((outcome.expect(code).stdout.as_str(), outcome.stderr.as_str()), ("out", ""));
    }
}

/// What the guest is asked to run by these arguments, in this folder.
fn asked(args: &[&str], here: &str, shares: &[&str]) -> ExecStart {
    let bench = Bench::new();
    let (sender, receiver) = mpsc::channel();
    let (sender, home) = (std::sync::Mutex::new(sender), bench.home());
    let shares: Vec<_> = shares.iter().map(|share| mount(home.join(share))).collect();
    let _fake = Fake::new(&bench, move |request, peer| match request {
        ApiRequest::Mounts => peer.reply(&ApiReply::Mounts(shares.clone())),
        ApiRequest::Exec(start) => {
            sender.lock().unwrap().send(start.clone()).unwrap();
            peer.reply(&ApiReply::Opened);
            exited(peer, ExitStatus::Code(0));
        }
        request => answer_running(request, peer),
    });
    let here = bench.home().join(here);
    std::fs::create_dir_all(&here).unwrap();
    let mut command = bench.command(args);
    command.current_dir(here).env("KNOWN", "of the host");
    Running::spawn(&mut command).finish().expect(0);
    let mut start: ExecStart = receiver.recv().unwrap();
    // Shown as below the home, whose name is of no interest.
    let home = bench.home().canonicalize().unwrap();
    start.cwd = start.cwd.map(|cwd| cwd.replace(home.to_str().unwrap(), "~"));
    start
}

#[test]
fn what_to_run_is_asked_for_word_by_word() {
    let start = asked(
        &[
            "exec", "-e", "A=1", "-e", "KNOWN", "-e", "UNKNOWN", "-u", "me", "-w", "/srv", "ls", "-l", "--",
            "a b", "-p", "x",
        ],
        ".",
        &[],
    );
    assert_eq!(start.argv, ["ls", "-l", "--", "a b", "-p", "x"]);
    let known = ("KNOWN".to_owned(), "of the host".to_owned());
    assert_eq!(start.env, [("A".to_owned(), "1".to_owned()), known]);
    assert_eq!((start.user.as_deref(), start.cwd.as_deref()), (Some("me"), Some("/srv")));
    assert!(!start.cwd_optional && start.tty.is_none());
    assert_eq!(asked(&["exec", "--", "-odd"], ".", &[]).argv, ["-odd"]);
}

#[test]
fn the_working_folder_is_this_one_where_it_is_shared() {
    let place = |args: &[&str], here: &str, shares: &[&str]| {
        let start = asked(args, here, shares);
        (start.cwd, start.cwd_optional)
    };
    let is = |folder: &str, optional| (Some(folder.to_owned()), optional);
    assert_eq!(place(&["exec", "pwd"], "src/x", &["src"]), is("~/src/x", true));
    assert_eq!(place(&["exec", "pwd"], "src", &["src"]), is("~/src", true));
    assert_eq!(place(&["exec", "pwd"], "source", &["src"]), (None, true));
    assert_eq!(place(&["exec", "-w", "y", "pwd"], "src", &["src"]), is("~/src/y", false));
    assert_eq!(place(&["shell", "pwd"], "src", &["src"]), is("~/src", true));
}

#[test]
fn signals_reach_the_command() {
    for signal in
        [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGUSR2]
    {
        let bench = Bench::new();
        let _fake = Fake::exec(&bench, move |_, peer| {
            peer.output(ExecOutput::Stdout(b"ready\n".to_vec()));
            while let Some(input) = peer.input() {
                if input == ExecInput::Signal(signal as i32) {
                    exited(peer, ExitStatus::Code(7));
                }
            }
        });
        let (running, mut stdout) = Running::spawn_unread(&mut bench.command(&["exec", "trap"]));
        read_until(&mut stdout, "ready\n");
        running.signal(signal);
        running.finish().expect(7);
    }
}

#[test]
fn a_signal_that_was_ignored_stays_so() {
    let bench = Bench::new();
    let _fake = Fake::exec(&bench, |_, peer| {
        peer.output(ExecOutput::Stdout(b"ready\n".to_vec()));
        let signals =
            std::iter::from_fn(|| peer.input()).filter(|input| matches!(input, ExecInput::Signal(_)));
        let first = signals.map(|input| matches!(input, ExecInput::Signal(libc::SIGUSR1))).next();
        exited(peer, ExitStatus::Code(if first == Some(true) { 7 } else { 8 }));
    });
    let mut command = bench.command(&["exec", "trap"]);
    set_signals(&mut command, libc::SIG_IGN);
    let (running, mut stdout) = Running::spawn_unread(&mut command);
    read_until(&mut stdout, "ready\n");
    running.signal(Signal::SIGINT);
    running.signal(Signal::SIGUSR1);
    running.finish().expect(7);
}

#[test]
fn the_third_ctrl_c_leaves_a_command_that_hangs() {
    let bench = Bench::new();
    let (sender, signals) = mpsc::channel();
    let sender = std::sync::Mutex::new(sender);
    let _fake = Fake::exec(&bench, move |_, peer| {
        peer.output(ExecOutput::Stdout(b"ready\n".to_vec()));
        while let Some(input) = peer.input() {
            sender.lock().unwrap().send(input).unwrap();
        }
    });
    let mut command = bench.command(&["exec", "hang"]);
    command.stdin(Stdio::piped());
    let (running, mut stdout) = Running::spawn_unread(&mut command);
    read_until(&mut stdout, "ready\n");
    for _ in 0..2 {
        running.signal(Signal::SIGINT);
        assert_eq!(signals.recv_timeout(crate::bench::DEADLINE).unwrap(), ExecInput::Signal(libc::SIGINT));
    }
    running.signal(Signal::SIGINT);
    let outcome = running.finish();
    assert!(outcome.expect(130).stderr.contains("left before the command ended"), "{outcome:#?}");
}

#[test]
fn ctrl_c_ends_a_command_that_does_not_read_its_input() {
    let bench = Bench::new();
    let _fake = Fake::exec(&bench, |_, peer| {
        peer.output(ExecOutput::Stdout(b"ready\n".to_vec()));
        // Until the command leaves: nothing is read.
        while peer.output(ExecOutput::Stderr(Vec::new())) {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    });
    let mut command = bench.command(&["exec", "sleep"]);
    command.stdin(std::fs::File::open("/dev/zero").unwrap());
    let (mut running, mut stdout) = Running::spawn_unread(&mut command);
    read_until(&mut stdout, "ready\n");
    // As a person does: the first may still find room in a socket that nobody reads.
    wait_until("the command ends", || {
        running.signal(Signal::SIGINT);
        running.child.try_wait().unwrap()
    });
    let outcome = running.finish();
    assert!(outcome.expect(130).stderr.contains("left before the command ended"), "{outcome:#?}");
}

#[test]
fn nobody_reads_the_output() {
    let bench = Bench::new();
    let (sender, left) = mpsc::channel();
    let sender = std::sync::Mutex::new(sender);
    let _fake = Fake::exec(&bench, move |_, peer| {
        while peer.output(ExecOutput::Stdout(vec![b'y'; DATA_CHUNK])) {}
        sender.lock().unwrap().send(()).unwrap();
    });
    let (running, mut stdout) = Running::spawn_unread(&mut bench.command(&["exec", "yes"]));
    stdout.read_exact(&mut [0; 10]).unwrap();
    drop(stdout);
    // As `yes | head -1` ends for the shell: SIGPIPE.
    assert_eq!(running.finish().expect(141).stderr, "");
    left.recv_timeout(crate::bench::DEADLINE).unwrap();
}

#[test]
fn a_refusal_a_lost_connection_and_a_full_disk_are_failures_of_ours() {
    let bench = Bench::new();
    let mut fake = Fake::new(&bench, |request, peer| match request {
        ApiRequest::Exec(_) => peer.refuse("no such program: \u{1b}x", Some("look in PATH")),
        request => answer_running(request, peer),
    });
    bench.run(&["exec", "x"]).expect_error("no such program: \\u{1b}x", "look in PATH");
    fake.end();
    let mut fake = Fake::exec(&bench, |_, peer| {
        peer.output(ExecOutput::Stdout(b"some".to_vec()));
    });
    let outcome = bench.run(&["exec", "x"]);
    outcome.expect_error("the connection to the command in the guest is lost", "dhow status");
    assert_eq!(outcome.stdout, "some");
    fake.end();
    let _fake = Fake::exec(&bench, |_, peer| {
        peer.output(ExecOutput::Stdout(b"some".to_vec()));
        exited(peer, ExitStatus::Code(0));
    });
    let mut command = bench.command(&["exec", "x"]);
    command.stdout(std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
    Running::spawn(&mut command).finish().expect_error("cannot write the output: No space left", "");
}

#[test]
fn frames_that_are_none_end_it() {
    let bench = Bench::new();
    let _fake = Fake::exec(&bench, |_, peer| {
        peer.0.write_all(&[0xff; 64]).unwrap();
        peer.wait_for_end();
    });
    bench
        .run(&["exec", "x"])
        .expect_error("the connection to the command in the guest is lost", "dhow status");
}
