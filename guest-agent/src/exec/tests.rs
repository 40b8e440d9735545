use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use dhow_protocol::codec::{self, DATA_CHUNK, DATA_LIMIT};
use dhow_protocol::exec::{ExecInput, ExecOutput, ExitStatus, STDIN_WINDOW};
use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::*;
use crate::serve::testing::{pair, within};

/// The user that the tests run as, which needs no rights to become.
fn me() -> String {
    nix::unistd::User::from_uid(nix::unistd::geteuid()).unwrap().unwrap().name
}

fn shell(script: &str) -> ExecStart {
    command(&["sh", "-c", script])
}

fn command(argv: &[&str]) -> ExecStart {
    ExecStart {
        argv: argv.iter().map(|&argument| argument.to_owned()).collect(),
        env: vec![],
        cwd: None,
        cwd_optional: false,
        tty: None,
        user: Some(me()),
    }
}

fn on_tty(start: ExecStart) -> ExecStart {
    ExecStart { tty: Some(TtySize { rows: 24, columns: 80 }), ..start }
}

/// The host's end of a command.
struct Host {
    reader: OwnedReadHalf,
    writer: OwnedWriteHalf,
    running: tokio::task::JoinHandle<()>,
    /// Bytes of standard input that were passed on.
    taken: usize,
}

/// All that a command said.
#[derive(Debug, PartialEq, Eq)]
struct Said {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    status: ExitStatus,
}

fn said(stdout: &str, stderr: &str, status: ExitStatus) -> Said {
    Said { stdout: stdout.into(), stderr: stderr.into(), status }
}

const DONE: ExitStatus = ExitStatus::Code(0);

impl Host {
    async fn start(start: ExecStart) -> Self {
        let prepared = prepare(start, &[("FROM_BOOT".to_owned(), "boot".to_owned())]).await.unwrap();
        let (agent, host): (_, UnixStream) = pair();
        let running = tokio::spawn(run(agent, prepared));
        let (reader, writer) = host.into_split();
        Self { reader, writer, running, taken: 0 }
    }

    async fn send(&mut self, input: ExecInput) {
        within(codec::write_frame(&mut self.writer, &input, DATA_LIMIT)).await.unwrap();
    }

    async fn type_in(&mut self, text: &str) {
        self.send(ExecInput::Stdin(text.into())).await;
    }

    async fn receive(&mut self) -> Option<ExecOutput> {
        loop {
            let output = within(codec::read_frame(&mut self.reader, DATA_LIMIT)).await.unwrap();
            if let Some(ExecOutput::StdinTaken(bytes)) = output {
                self.taken += bytes as usize;
            } else {
                return output;
            }
        }
    }

    /// Reads standard output until it contains `text`.
    async fn expect(&mut self, text: &str) -> String {
        let mut seen = String::new();
        while !seen.contains(text) {
            match self.receive().await {
                Some(ExecOutput::Stdout(bytes)) => seen.push_str(&String::from_utf8_lossy(&bytes)),
                other => panic!("{other:?} after {seen:?}"),
            }
        }
        seen
    }

    /// Reads to the end: `Exited` is the last frame, the stream ends in order, its task too.
    async fn finish(mut self) -> Said {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let status = loop {
            match self.receive().await.expect("ended without its last frame") {
                ExecOutput::Stdout(bytes) => stdout.extend(checked(bytes)),
                ExecOutput::Stderr(bytes) => stderr.extend(checked(bytes)),
                ExecOutput::Exited(status) => break status,
                ExecOutput::StdinTaken(_) => unreachable!("read away"),
            }
        };
        assert_eq!(self.receive().await, None);
        drop(self.writer);
        drop(self.reader);
        within(self.running).await.unwrap();
        Said { stdout, stderr, status }
    }
}

fn checked(bytes: Vec<u8>) -> Vec<u8> {
    assert!((1..=DATA_CHUNK).contains(&bytes.len()));
    bytes
}

async fn outcome(start: ExecStart) -> Said {
    Host::start(start).await.finish().await
}

#[tokio::test]
async fn output_error_and_status_are_apart() {
    let script = "echo out; echo err >&2; exit 7";
    assert_eq!(outcome(shell(script)).await, said("out\n", "err\n", ExitStatus::Code(7)));
    assert_eq!(outcome(command(&["true"])).await, said("", "", DONE));
}

#[tokio::test]
async fn input_travels_and_ends() {
    let mut host = Host::start(command(&["cat"])).await;
    host.type_in("one\n").await;
    host.expect("one\n").await;
    host.type_in("two").await;
    host.send(ExecInput::StdinEnd).await;
    assert_eq!(host.finish().await, said("two", "", DONE));
}

#[tokio::test]
async fn much_of_both_directions_is_whole() {
    let input: Vec<u8> =
        (0..10_000_000u64).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
    let host = Host::start(shell("tee /dev/stderr")).await;
    let Host { reader, mut writer, running, .. } = host;
    let send = async {
        for chunk in input.chunks(DATA_CHUNK) {
            let stdin = ExecInput::Stdin(chunk.to_vec());
            within(codec::write_frame(&mut writer, &stdin, DATA_LIMIT)).await.unwrap();
        }
        codec::write_frame(&mut writer, &ExecInput::StdinEnd, DATA_LIMIT).await.unwrap();
        writer
    };
    let receive = async {
        let mut reader = reader;
        let (mut out, mut err) = (Sha256::new(), Sha256::new());
        loop {
            match within(codec::read_frame(&mut reader, DATA_LIMIT)).await.unwrap().unwrap() {
                ExecOutput::Stdout(bytes) => out.update(bytes),
                ExecOutput::Stderr(bytes) => err.update(bytes),
                ExecOutput::StdinTaken(_) => {}
                ExecOutput::Exited(status) => break (status, out.finalize(), err.finalize()),
            }
        }
    };
    let (writer, (status, out, err)) = tokio::join!(send, receive);
    assert_eq!(status, DONE);
    assert_eq!(out, Sha256::digest(&input));
    assert_eq!(err, Sha256::digest(&input));
    drop(writer);
    within(running).await.unwrap();
}

#[tokio::test]
async fn a_command_that_does_not_read_is_no_obstacle() {
    let mut host = Host::start(shell("exec <&-; echo closed; sleep 0.1; exit 3")).await;
    host.expect("closed\n").await;
    for _ in 0..40 {
        // It ends in the middle of this.
        let stdin = ExecInput::Stdin(vec![0; DATA_CHUNK]);
        if codec::write_frame(&mut host.writer, &stdin, DATA_LIMIT).await.is_err() {
            break;
        }
    }
    assert_eq!(host.finish().await.status, ExitStatus::Code(3));
}

#[tokio::test]
async fn input_that_was_passed_on_is_told_and_makes_room() {
    let mut host = Host::start(command(&["wc", "-c"])).await;
    let chunk = vec![b'x'; DATA_CHUNK];
    let total = 3 * STDIN_WINDOW;
    let mut sent = 0;
    while host.taken < total {
        while sent < total && sent + chunk.len() <= host.taken + STDIN_WINDOW {
            host.send(ExecInput::Stdin(chunk.clone())).await;
            sent += chunk.len();
        }
        match within(codec::read_frame(&mut host.reader, DATA_LIMIT)).await.unwrap() {
            Some(ExecOutput::StdinTaken(bytes)) => host.taken += bytes as usize,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((sent, host.taken), (total, total));
    host.send(ExecInput::StdinEnd).await;
    assert_eq!(host.finish().await, said(&format!("{total}\n"), "", DONE));
}

#[tokio::test]
async fn signals_and_the_hosts_end_pass_by_input_that_is_not_read() {
    let fill = async |host: &mut Host| {
        for _ in 0..STDIN_WINDOW / DATA_CHUNK {
            host.send(ExecInput::Stdin(vec![0; DATA_CHUNK])).await;
        }
    };
    let mut host = Host::start(command(&["sleep", "600"])).await;
    fill(&mut host).await;
    host.send(ExecInput::Signal(libc::SIGTERM)).await;
    assert_eq!(host.finish().await.status, ExitStatus::Signal(libc::SIGTERM));

    let mut host = Host::start(command(&["sleep", "600"])).await;
    fill(&mut host).await;
    let running = host.running;
    drop((host.reader, host.writer));
    within(running).await.unwrap();
}

#[tokio::test]
async fn what_cannot_run_says_so_as_a_shell_does() {
    let missing = outcome(command(&["no-such-program"])).await;
    assert_eq!(missing, said("", "dhow: no-such-program: command not found\n", ExitStatus::Code(127)));
    let missing = outcome(on_tty(command(&["/no/such"]))).await;
    assert_eq!(missing, said("dhow: /no/such: command not found\r\n", "", ExitStatus::Code(127)));
    let folder = tempfile::tempdir().unwrap();
    let plain = folder.path().join("plain");
    std::fs::write(&plain, "text").unwrap();
    let refused = outcome(command(&[plain.to_str().unwrap()])).await;
    assert_eq!(refused.status, ExitStatus::Code(126));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("cannot be executed"), "{refused:?}");
}

#[tokio::test]
async fn signals_reach_the_group_and_end_it() {
    let mut host =
        Host::start(shell("trap 'echo caught; exit 5' TERM; echo ready; while :; do sleep 60 & wait; done"))
            .await;
    host.expect("ready\n").await;
    host.send(ExecInput::Signal(0)).await;
    host.send(ExecInput::Signal(4000)).await;
    host.send(ExecInput::Signal(libc::SIGTERM)).await;
    assert_eq!(host.finish().await, said("caught\n", "", ExitStatus::Code(5)));

    let mut host = Host::start(command(&["sleep", "600"])).await;
    host.send(ExecInput::Signal(libc::SIGKILL)).await;
    assert_eq!(host.finish().await, said("", "", ExitStatus::Signal(libc::SIGKILL)));
}

#[tokio::test]
async fn signals_are_at_their_defaults() {
    let status = outcome(shell("kill -INT $$; kill -PIPE $$; sleep 600")).await.status;
    assert_eq!(status, ExitStatus::Signal(libc::SIGINT));
    let said = outcome(shell("grep -E '^Sig(Blk|Ign)' /proc/self/status")).await;
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    let masks: Vec<u64> = text
        .lines()
        .filter_map(|line| u64::from_str_radix(line.split_once(":\t")?.1, 16).ok())
        // Of signals from 32 on some are the C library's own, which lets nobody touch them.
        .map(|mask| mask & 0x7fff_ffff)
        .collect();
    assert_eq!(masks, [0, 0], "{text}");
}

#[tokio::test]
async fn nothing_but_the_standard_streams_is_inherited() {
    let said = outcome(shell("ls /proc/self/fd | wc -l")).await;
    // 0, 1, 2 and the folder that ls itself reads.
    assert_eq!(String::from_utf8_lossy(&said.stdout).trim(), "4");
}

#[tokio::test]
async fn the_environment_is_made_and_nothing_of_the_workers_leaks() {
    let mut start = shell("env | sort");
    start.env = vec![("TERM".into(), "xterm".into()), ("LANG".into(), "de_DE.UTF-8".into())];
    let said = outcome(start).await;
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    let names: Vec<&str> =
        text.lines().filter_map(|line| line.split_once('=')).map(|(name, _)| name).collect();
    // PWD, SHLVL, OLDPWD and _ are the shell's own.
    let own = |name: &&str| !["PWD", "SHLVL", "OLDPWD", "_"].contains(name);
    let names: Vec<&str> = names.into_iter().filter(own).collect();
    assert_eq!(names, ["FROM_BOOT", "HOME", "LANG", "LOGNAME", "PATH", "SHELL", "TERM", "USER"]);
    assert!(text.contains("FROM_BOOT=boot\n") && text.contains("LANG=de_DE.UTF-8\n"), "{text}");
    assert!(text.contains(&format!("USER={}\n", me())), "{text}");
}

#[tokio::test]
async fn the_working_folder_is_as_asked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().canonicalize().unwrap();
    let at = |cwd: &Path, cwd_optional| {
        let cwd = Some(cwd.to_str().unwrap().to_owned());
        ExecStart { cwd, cwd_optional, ..command(&["pwd"]) }
    };
    assert_eq!(outcome(at(&path, false)).await, said(&format!("{}\n", path.display()), "", DONE));

    let gone = path.join("gone");
    let Refused { status, detail } = prepare(at(&gone, false), &[]).await.unwrap_err();
    assert_eq!(status, Status::NotFound);
    assert!(detail.contains(gone.to_str().unwrap()), "{detail}");
    let file = path.join("file");
    std::fs::write(&file, "").unwrap();
    assert!(prepare(at(&file, false), &[]).await.unwrap_err().detail.contains("not a folder"));
    assert!(prepare(at(Path::new("relative"), false), &[]).await.is_err());

    let home = outcome(ExecStart { cwd: None, ..command(&["pwd"]) }).await;
    assert_eq!(outcome(at(&gone, true)).await, home);
}

#[tokio::test]
async fn users_are_looked_up() {
    let unknown = ExecStart { user: Some("nobody-of-that-name".into()), ..shell("true") };
    let Refused { status, detail } = prepare(unknown, &[]).await.unwrap_err();
    assert_eq!(status, Status::NotFound);
    assert_eq!(detail, "there is no user \"nobody-of-that-name\" in the guest");
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can become another user");
        return;
    }
    for tty in [None, Some(TtySize { rows: 1, columns: 1 })] {
        let start = ExecStart { user: Some("nobody".into()), tty, ..shell("id -un; id -G; umask") };
        let said = outcome(start).await;
        let text = String::from_utf8_lossy(&said.stdout).replace("\r\n", "\n");
        let mut lines = text.lines();
        assert_eq!(lines.next(), Some("nobody"), "{text}");
        // Root's groups are not kept.
        assert!(!lines.next().unwrap().split(' ').any(|group| group == "0"), "{text}");
        assert_eq!(lines.next(), Some("0022"), "{text}");
    }
    let secret = tempfile::tempdir().unwrap();
    std::fs::set_permissions(secret.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    let cwd = Some(secret.path().to_str().unwrap().to_owned());
    let refused = outcome(ExecStart { user: Some("nobody".into()), cwd, ..shell("true") }).await;
    assert_eq!(refused.status, ExitStatus::Code(126));
    assert!(
        String::from_utf8_lossy(&refused.stderr).contains("working folder cannot be entered"),
        "{refused:?}"
    );
}

#[tokio::test]
async fn what_no_environment_and_no_command_line_holds_is_refused() {
    for env in [("A=B", ""), ("", ""), ("A\0", ""), ("A", "\0")] {
        let start = ExecStart { env: vec![(env.0.into(), env.1.into())], ..shell("true") };
        assert_eq!(prepare(start, &[]).await.unwrap_err().status, Status::Malformed);
    }
    assert_eq!(prepare(command(&["a\0b"]), &[]).await.unwrap_err().status, Status::Malformed);
    let user = ExecStart { user: Some("a\0b".into()), ..shell("true") };
    assert_eq!(prepare(user, &[]).await.unwrap_err().status, Status::Malformed);
}

#[tokio::test]
async fn an_empty_command_is_the_login_shell() {
    let mut host = Host::start(command(&[])).await;
    host.type_in("echo $0; exit 4\n").await;
    let said = host.finish().await;
    assert!(said.stdout.starts_with(b"-"), "{said:?}");
    assert_eq!(said.status, ExitStatus::Code(4));
}

#[tokio::test]
async fn a_terminal_is_one() {
    let mut host = Host::start(on_tty(shell(
        "stty size; tty <&2; stty -a | grep -ow 'iutf8\\|-iutf8'; read line; echo \"got $line\"",
    )))
    .await;
    let seen = host.expect("iutf8").await;
    assert!(seen.starts_with("24 80\r\n/dev/pts/"), "{seen}");
    assert!(!seen.contains("-iutf8"), "{seen}");
    host.type_in("hello\n").await;
    // The terminal's echo first.
    host.expect("hello\r\ngot hello\r\n").await;
    assert_eq!(host.finish().await, said("", "", DONE));
}

#[tokio::test]
async fn a_terminal_is_resized_and_the_command_told() {
    let script = "trap 'stty size; exit 0' WINCH; echo ready; while :; do sleep 0.05; done";
    let mut host = Host::start(on_tty(shell(script))).await;
    host.expect("ready\r\n").await;
    host.send(ExecInput::Resize(TtySize { rows: 50, columns: 132 })).await;
    assert_eq!(host.finish().await, said("50 132\r\n", "", DONE));
}

#[tokio::test]
async fn a_terminals_keys_signal_its_foreground() {
    let mut host = Host::start(on_tty(shell(
        "trap 'echo interrupted; exit 9' INT; echo ready; while :; do sleep 0.05; done",
    )))
    .await;
    host.expect("ready\r\n").await;
    host.type_in("\x03").await;
    let said = host.finish().await;
    assert!(String::from_utf8_lossy(&said.stdout).contains("interrupted\r\n"), "{said:?}");
    assert_eq!(said.status, ExitStatus::Code(9));
}

#[tokio::test]
async fn the_end_of_input_ends_a_terminals_reader() {
    for text in ["", "whole\n", "part"] {
        let mut host = Host::start(on_tty(shell("stty -echo; echo ready; cat; echo ended"))).await;
        host.expect("ready\r\n").await;
        if !text.is_empty() {
            host.type_in(text).await;
        }
        host.send(ExecInput::StdinEnd).await;
        let said = host.finish().await;
        let expected = format!("{}ended\r\n", text.replace('\n', "\r\n"));
        assert_eq!(String::from_utf8_lossy(&said.stdout), expected);
    }
}

#[tokio::test]
async fn much_of_a_terminals_output_is_whole() {
    let said = outcome(on_tty(shell("stty -opost; seq 1 200000"))).await;
    let expected: String = (1..=200_000).map(|line| format!("{line}\n")).collect();
    assert_eq!(Sha256::digest(&said.stdout), Sha256::digest(expected));
    assert_eq!(said.status, DONE);
}

#[tokio::test]
async fn a_grandchild_that_holds_the_output_is_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let stop = folder.path().join("stop");
    std::fs::write(&stop, "").unwrap();
    let script = format!("while test -e {}; do sleep 0.05; done & echo mine; exit 6", stop.display());
    assert_eq!(outcome(shell(&script)).await, said("mine\n", "", ExitStatus::Code(6)));
    let flood = format!("while test -e {}; do echo y; done 2>/dev/null & echo mine; exit 6", stop.display());
    let said = outcome(shell(&flood)).await;
    assert_eq!(said.status, ExitStatus::Code(6));
    drop(folder);
}

/// Waits until a file is there, or until it is not.
async fn until(path: &Path, there: bool) {
    within(async {
        while path.exists() != there {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_host_that_leaves_hangs_its_command_up() {
    for tty in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let (up, hung_up) = (folder.path().join("up"), folder.path().join("hung-up"));
        let (up_path, hung_up_path) = (up.display(), hung_up.display());
        let script =
            format!("trap 'echo >{hung_up_path}; exit 0' HUP; echo >{up_path}; while :; do sleep 0.05; done");
        let start = if tty { on_tty(shell(&script)) } else { shell(&script) };
        let host = Host::start(start).await;
        until(&up, true).await;
        let Host { reader, writer, running, .. } = host;
        drop((reader, writer));
        within(running).await.unwrap();
        assert!(hung_up.exists(), "tty: {tty}");
    }
}

#[tokio::test]
async fn a_command_that_ignores_its_hang_up_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let pid = folder.path().join("pid");
    let script =
        format!("trap '' HUP; echo $$ >{}.tmp; mv {0}.tmp {0}; while :; do sleep 0.05; done", pid.display());
    let host = Host::start(shell(&script)).await;
    until(&pid, true).await;
    let number = std::fs::read_to_string(&pid).unwrap().trim().to_owned();
    let process = Path::new("/proc").join(number);
    assert!(process.exists());
    let running = host.running;
    drop((host.reader, host.writer));
    within(running).await.unwrap();
    until(&process, false).await;
}

#[tokio::test]
async fn a_host_that_leaves_in_mid_input_is_noticed() {
    let mut host = Host::start(command(&["sleep", "600"])).await;
    // Until nobody takes any more: pipe, queue and socket are full.
    let frame = codec::to_frame(&ExecInput::Stdin(vec![0; DATA_CHUNK]), DATA_LIMIT).unwrap();
    let full = std::time::Duration::from_millis(300);
    while let Ok(written) = tokio::time::timeout(full, host.writer.write_all(&frame)).await {
        written.unwrap();
    }
    let running = host.running;
    drop((host.reader, host.writer));
    within(running).await.unwrap();
}

#[tokio::test]
async fn nonsense_hangs_a_command_up() {
    let mut host = Host::start(command(&["sleep", "600"])).await;
    host.writer.write_all(&[0xff; 16]).await.unwrap();
    within(host.running).await.unwrap();
}

#[tokio::test]
async fn memory_pressure_treats_commands_as_any_other() {
    let said = outcome(command(&["cat", "/proc/self/oom_score_adj"])).await;
    assert_eq!(String::from_utf8_lossy(&said.stdout), "0\n");
}

#[tokio::test]
async fn fifty_at_once() {
    let mut hosts = Vec::new();
    for number in 0..50 {
        hosts.push((number, Host::start(shell(&format!("read x; echo {number}; exit {number}"))).await));
    }
    for (number, mut host) in hosts {
        host.type_in("go\n").await;
        assert_eq!(host.finish().await, said(&format!("{number}\n"), "", ExitStatus::Code(number)));
    }
}
