//! A fresh home for one test, and commands that run in it with a deadline.

use std::io::Read;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Far above what any command takes: a machine may be loaded.
pub const DEADLINE: Duration = Duration::from_secs(120);

/// A home and a `DHOW_HOME` that nothing else uses.
pub struct Bench {
    folder: TempDir,
}

/// What a command did.
#[derive(Debug)]
pub struct Outcome {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| -self.status.signal().unwrap_or(0))
    }

    /// Fails with all that was said.
    #[track_caller]
    pub fn expect(&self, code: i32) -> &Self {
        assert_eq!(self.code(), code, "{self:#?}");
        self
    }

    /// It failed, said so once, and said what to do.
    #[track_caller]
    pub fn expect_error(&self, message: &str, hint: &str) {
        self.expect(1);
        let errors: Vec<&str> = self.stderr.lines().filter(|line| line.starts_with("dhow: ")).collect();
        assert_eq!(errors.len(), 1, "{self:#?}");
        assert!(errors[0].contains(message), "{message:?} is not in {self:#?}");
        let said = self.stderr.lines().filter_map(|line| line.strip_prefix("hint: ")).collect::<String>();
        assert!(said.contains(hint), "{hint:?} is not in the hint of {self:#?}");
    }
}

impl Bench {
    pub fn new() -> Self {
        // Short, and not below the test's own TMPDIR: socket paths have a limit.
        let folder = tempfile::Builder::new().prefix("dhow-cli-").tempdir_in("/tmp").unwrap();
        std::fs::create_dir(folder.path().join("home")).unwrap();
        Self { folder }
    }

    pub fn home(&self) -> PathBuf {
        self.folder.path().join("home")
    }

    pub fn dhow_home(&self) -> PathBuf {
        self.folder.path().join("dhow")
    }

    /// A path below `DHOW_HOME`, whose folder is made as Dhow makes it.
    pub fn path(&self, below: &str) -> PathBuf {
        let path = self.dhow_home().join(below);
        let folder = path.parent().unwrap();
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).unwrap();
        path
    }

    pub fn settings(&self) -> PathBuf {
        self.path("config/profiles/default.toml")
    }

    pub fn api_socket(&self) -> PathBuf {
        self.path("run/default/api.sock")
    }

    /// The command with nothing of the test's own environment but PATH.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dhow"));
        command.args(args).env_clear().current_dir(self.home());
        command.env("PATH", std::env::var_os("PATH").unwrap());
        command.env("HOME", self.home()).env("DHOW_HOME", self.dhow_home());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        set_signals(&mut command, libc::SIG_DFL);
        command
    }

    /// Runs to the end.
    pub fn run(&self, args: &[&str]) -> Outcome {
        Running::spawn(&mut self.command(args)).finish()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // Only where a test has failed is there anything left.
        for (pid, _) in processes_of(&self.dhow_home()) {
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
    }
}

/// A shell that runs tests in the background has SIGINT and SIGQUIT ignored: each command gets what
/// its test means.
pub fn set_signals(command: &mut Command, action: libc::sighandler_t) {
    // SAFETY: signal(2) is async-signal-safe and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            for number in [libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGHUP, libc::SIGTSTP] {
                libc::signal(number, action);
            }
            Ok(())
        });
    }
}

/// A command that runs; killed when the test fails before its end.
pub struct Running {
    pub child: Child,
    outputs: [Option<JoinHandle<String>>; 2],
}

impl Running {
    pub fn spawn(command: &mut Command) -> Self {
        let mut child = command.spawn().unwrap();
        let stdout = child.stdout.take().map(collect);
        let stderr = child.stderr.take().map(collect);
        Self { child, outputs: [stdout, stderr] }
    }

    /// With its standard output left to the test.
    pub fn spawn_unread(command: &mut Command) -> (Self, std::process::ChildStdout) {
        let mut child = command.spawn().unwrap();
        let stdout = child.stdout.take().unwrap();
        let stderr = child.stderr.take().map(collect);
        (Self { child, outputs: [None, stderr] }, stdout)
    }

    pub fn pid(&self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap())
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(self.pid(), signal).unwrap();
    }

    pub fn finish(mut self) -> Outcome {
        let status = wait_until("the command ends", || self.child.try_wait().unwrap());
        let [stdout, stderr] = std::mem::take(&mut self.outputs)
            .map(|output| output.map(|thread| thread.join().unwrap()).unwrap_or_default());
        Outcome { status, stdout, stderr }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Only where a test has failed; otherwise it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn collect(mut pipe: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Asks until there is an answer.
#[track_caller]
pub fn wait_until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Reads until `text` has come.
#[track_caller]
pub fn read_until(reader: &mut impl Read, text: &str) -> String {
    let mut read = Vec::new();
    let mut byte = [0];
    while !String::from_utf8_lossy(&read).contains(text) {
        let length = reader.read(&mut byte).unwrap();
        assert_eq!(length, 1, "ended before {text:?}: {:?}", String::from_utf8_lossy(&read));
        read.push(byte[0]);
    }
    String::from_utf8_lossy(&read).into_owned()
}

/// Processes whose environment names this home, all that Dhow has started there: pid and command line.
pub fn processes_of(home: &Path) -> Vec<(i32, String)> {
    let wanted = format!("DHOW_HOME={}", home.display());
    let read = |pid: i32, file: &str| std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| read(*pid, "environ").split(|byte| *byte == 0).any(|line| line == wanted.as_bytes()))
        .map(|pid| (pid, String::from_utf8_lossy(&read(pid, "cmdline")).replace('\0', " ")))
        // A zombie has no command line any more.
        .filter(|(_, line)| !line.is_empty())
        .collect()
}
