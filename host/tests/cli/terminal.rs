//! What needs a terminal: shell in raw mode, its restoring, sizes; the question of delete; escapes.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::{Mutex, mpsc};

use dhow::api::{ApiReply, ApiRequest, Progress, VmState};
use dhow_protocol::exec::{ExecInput, ExecOutput, ExitStatus, TtySize};
use nix::pty::Winsize;
use nix::sys::signal::Signal;
use nix::sys::termios::{LocalFlags, Termios, tcgetattr};

use crate::bench::{Bench, DEADLINE, Running, read_until, wait_until};
use crate::fake::{Fake, report};

/// A terminal whose user is the test.
struct Terminal {
    user: std::fs::File,
    program: OwnedFd,
}

fn winsize(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

impl Terminal {
    fn new() -> Self {
        let pty = nix::pty::openpty(&winsize(33, 99), None).unwrap();
        Self { user: pty.master.into(), program: pty.slave }
    }

    /// Runs the command with this as its controlling terminal.
    fn spawn(&self, command: &mut Command) -> Running {
        let stdio = || Stdio::from(self.program.try_clone().unwrap());
        command.stdin(stdio()).stdout(stdio()).stderr(stdio());
        // SAFETY: setsid(2) and ioctl(2) are async-signal-safe and allocate nothing.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                if libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        Running::spawn(command)
    }

    fn resize(&self, rows: u16, columns: u16) {
        let size = winsize(rows, columns);
        // SAFETY: TIOCSWINSZ reads a winsize, which `size` is, and keeps no pointer.
        assert_eq!(unsafe { libc::ioctl(self.user.as_raw_fd(), libc::TIOCSWINSZ, &size) }, 0);
    }

    fn settings(&self) -> Termios {
        tcgetattr(self.program.as_fd()).unwrap()
    }

    fn is_raw(&self) -> bool {
        !self.settings().local_flags.intersects(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG)
    }
}

/// A shell that tells what it is sent, until a byte `q` comes.
fn shell(bench: &Bench) -> (Fake, mpsc::Receiver<ExecInput>) {
    let (sender, inputs) = mpsc::channel();
    let sender = Mutex::new(sender);
    let fake = Fake::exec(bench, move |start, peer| {
        assert_eq!(start.tty, Some(TtySize { rows: 33, columns: 99 }));
        assert_eq!(start.env, [("TERM".to_owned(), "dumb-but-true".to_owned())]);
        peer.output(ExecOutput::Stdout(b"guest$ ".to_vec()));
        while let Some(input) = peer.input() {
            if input == ExecInput::Stdin(b"q".to_vec()) {
                peer.output(ExecOutput::Exited(ExitStatus::Code(3)));
            }
            sender.lock().unwrap().send(input).unwrap();
        }
    });
    (fake, inputs)
}

fn next(inputs: &mpsc::Receiver<ExecInput>) -> ExecInput {
    inputs.recv_timeout(DEADLINE).unwrap()
}

#[test]
fn a_shell_gets_every_byte_and_every_size_and_leaves_the_terminal_as_it_was() {
    for args in [&["shell"][..], &["exec", "-t", "bash"]] {
        let bench = Bench::new();
        let (_fake, inputs) = shell(&bench);
        let mut terminal = Terminal::new();
        let before = terminal.settings();
        let mut command = bench.command(args);
        command.env("TERM", "dumb-but-true");
        let running = terminal.spawn(&mut command);
        read_until(&mut terminal.user, "guest$ ");
        assert!(terminal.is_raw());
        // ^C and ^Z are the guest's business.
        terminal.user.write_all(b"\x03\x1a").unwrap();
        let mut typed = Vec::new();
        while typed.len() < 2 {
            match next(&inputs) {
                ExecInput::Stdin(bytes) => typed.extend(bytes),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(typed, b"\x03\x1a");
        terminal.resize(44, 111);
        assert_eq!(next(&inputs), ExecInput::Resize(TtySize { rows: 44, columns: 111 }));
        terminal.user.write_all(b"q").unwrap();
        running.finish().expect(3);
        assert_eq!(terminal.settings(), before);
    }
}

#[test]
fn a_shell_that_is_ended_from_outside_restores_the_terminal() {
    for signal in [Signal::SIGTERM, Signal::SIGHUP] {
        let bench = Bench::new();
        let (_fake, inputs) = shell(&bench);
        let mut terminal = Terminal::new();
        let before = terminal.settings();
        let mut command = bench.command(&["shell"]);
        command.env("TERM", "dumb-but-true");
        let running = terminal.spawn(&mut command);
        read_until(&mut terminal.user, "guest$ ");
        running.signal(signal);
        // The guest's shell may end by it; this one does not.
        assert_eq!(next(&inputs), ExecInput::Signal(signal as i32));
        running.finish().expect(128 + signal as i32);
        assert_eq!(terminal.settings(), before);
    }
}

#[test]
fn a_shell_whose_connection_is_lost_restores_the_terminal() {
    let bench = Bench::new();
    let _fake = Fake::exec(&bench, |_, peer| {
        peer.output(ExecOutput::Stdout(b"guest$ ".to_vec()));
        let _ = peer.input();
    });
    let mut terminal = Terminal::new();
    let before = terminal.settings();
    let running = terminal.spawn(&mut bench.command(&["shell"]));
    read_until(&mut terminal.user, "guest$ ");
    terminal.user.write_all(b"x").unwrap();
    read_until(&mut terminal.user, "the connection to the command in the guest is lost");
    running.finish().expect(1);
    assert_eq!(terminal.settings(), before);
}

#[test]
fn a_shell_that_is_suspended_gives_the_terminal_back_for_that_time() {
    let bench = Bench::new();
    let (_fake, inputs) = shell(&bench);
    let mut terminal = Terminal::new();
    let before = terminal.settings();
    let mut command = bench.command(&["shell"]);
    command.env("TERM", "dumb-but-true");
    let running = terminal.spawn(&mut command);
    read_until(&mut terminal.user, "guest$ ");
    running.signal(Signal::SIGTSTP);
    let stat = format!("/proc/{}/stat", running.pid());
    wait_until("it is stopped", || {
        let text = std::fs::read_to_string(&stat).unwrap();
        text.rsplit_once(") ").unwrap().1.starts_with('T').then_some(())
    });
    assert_eq!(terminal.settings(), before);
    running.signal(Signal::SIGCONT);
    assert_eq!(next(&inputs), ExecInput::Resize(TtySize { rows: 33, columns: 99 }));
    assert!(terminal.is_raw());
    terminal.user.write_all(b"q").unwrap();
    running.finish().expect(3);
}

#[test]
fn without_a_terminal_a_shell_reads_commands_and_exec_refuses_one() {
    let bench = Bench::new();
    let _fake = Fake::exec(&bench, |start, peer| {
        assert_eq!((start.tty, start.argv.len()), (None, 0));
        let input = peer.input();
        assert_eq!(input, Some(ExecInput::StdinEnd));
        peer.output(ExecOutput::Exited(ExitStatus::Code(0)));
    });
    bench.run(&["shell"]).expect(0);
    bench.run(&["exec", "-t", "bash"]).expect_error("-t needs a terminal", "leave -t out");
}

#[test]
fn a_step_turns_while_it_runs_and_then_has_a_line_of_its_own() {
    let bench = Bench::new();
    let (sender, seen) = mpsc::channel::<()>();
    let seen = Mutex::new(seen);
    let _fake = Fake::new(&bench, move |request, peer| match request {
        ApiRequest::Status => peer.reply(&ApiReply::Status(Box::new(report(VmState::Starting)))),
        _ => {
            let step = "booting the VM".to_owned();
            peer.reply(&ApiReply::Progress(Progress::Begin { step: step.clone() }));
            seen.lock().unwrap().recv_timeout(DEADLINE).unwrap();
            peer.reply(&ApiReply::Progress(Progress::Notice("no KVM".into())));
            peer.reply(&ApiReply::Progress(Progress::End { step, milliseconds: 500 }));
            peer.reply(&ApiReply::Started);
        }
    });
    let mut terminal = Terminal::new();
    let mut command = bench.command(&["start"]);
    command.env("TERM", "xterm");
    let running = terminal.spawn(&mut command);
    // Drawn more than once.
    let mut seen = read_until(&mut terminal.user, " booting the VM … ");
    seen += &read_until(&mut terminal.user, " booting the VM … ");
    sender.send(()).unwrap();
    seen += &read_until(&mut terminal.user, "Docker is up");
    running.finish().expect(0);
    // Each line begins where the spinner was wiped off.
    for line in ["notice: no KVM\r\n", "booting the VM … 0.5 s\r\n", "Docker is up"] {
        let before = seen.split(line).next().unwrap();
        assert!(
            before.is_empty() || before.ends_with("\u{1b}[2K") || before.ends_with('\n'),
            "{line:?} in {seen:?}"
        );
    }
}

#[test]
fn delete_asks_and_takes_only_yes() {
    let bench = Bench::new();
    std::fs::write(bench.settings(), "cpus = 1\n").unwrap();
    for (answer, deleted) in [("n\n", false), ("\n", false), ("\x04", false), ("yes\n", true)] {
        let mut terminal = Terminal::new();
        let running = terminal.spawn(&mut bench.command(&["delete"]));
        read_until(&mut terminal.user, "Delete it? [y/N] ");
        terminal.user.write_all(answer.as_bytes()).unwrap();
        running.finish().expect(i32::from(!deleted));
        assert_eq!(bench.settings().exists(), !deleted, "{answer:?}");
    }
}

#[test]
fn a_log_does_not_steer_the_terminal() {
    let bench = Bench::new();
    let log = bench.path("data/profiles/default/log/console.log");
    std::fs::write(&log, b"boot\r\n\x1b]0;title\x07\xe2\x80\xae\xff end\n").unwrap();
    let mut terminal = Terminal::new();
    let running = terminal.spawn(&mut bench.command(&["logs", "console"]));
    let shown = read_until(&mut terminal.user, "end\r\n");
    running.finish().expect(0);
    assert_eq!(shown, "boot\r\n\\u{1b}]0;title\\u{7}\\u{202e}\u{fffd} end\r\n");
    // Into a pipe goes what was logged.
    let (running, mut stdout) = Running::spawn_unread(&mut bench.command(&["logs", "console"]));
    let mut raw = Vec::new();
    stdout.read_to_end(&mut raw).unwrap();
    running.finish().expect(0);
    assert_eq!(raw, std::fs::read(&log).unwrap());
}
