//! Commands of the host: run with a deadline, captured, and told whole when a case fails on them.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{self, SaFlags, SigAction, SigHandler, SigSet, Signal};
use nix::unistd::Pid;

/// How long docker commands and the like may take.
pub const DEADLINE: Duration = Duration::from_secs(180);
/// How long a pipe may stay open after its command's end: a child that kept it is a fault.
const PIPE_GRACE: Duration = Duration::from_secs(5);
/// Bytes of an output that a failure shows.
const SHOWN: usize = 6 << 10;

/// Where a command's standard input comes from.
#[derive(Debug, Default)]
enum Input {
    #[default]
    Null,
    Bytes(Vec<u8>),
    File(PathBuf),
    Pipe,
}

/// A command to run.
#[derive(Debug)]
pub struct Cmd {
    program: OsString,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    folder: Option<PathBuf>,
    user: Option<u32>,
    input: Input,
    deadline: Duration,
}

impl Cmd {
    /// `program` with an empty environment.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self {
            program: program.as_ref().to_owned(),
            arguments: Vec::new(),
            environment: Vec::new(),
            folder: None,
            user: None,
            input: Input::Null,
            deadline: DEADLINE,
        }
    }

    /// Adds an argument.
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    pub fn args<S: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.arguments.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    /// Sets a variable; a later one wins.
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.environment.retain(|(known, _)| known != name.as_ref());
        self.environment.push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// The working folder.
    pub fn cwd(mut self, folder: impl AsRef<Path>) -> Self {
        self.folder = Some(folder.as_ref().to_owned());
        self
    }

    /// Runs as that user and group.
    pub fn user(mut self, user: Option<u32>) -> Self {
        self.user = user;
        self
    }

    /// These bytes, then the end, on standard input.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = Input::Bytes(bytes.into());
        self
    }

    /// A file on standard input.
    pub fn stdin_file(mut self, path: impl AsRef<Path>) -> Self {
        self.input = Input::File(path.as_ref().to_owned());
        self
    }

    /// A pipe that the case writes to: [`Running::send`].
    pub fn stdin_pipe(mut self) -> Self {
        self.input = Input::Pipe;
        self
    }

    /// The most that it may take.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// As a person would type it.
    fn line(&self) -> String {
        let mut line = String::new();
        for (name, value) in &self.environment {
            if !["PATH", "LANG"].iter().any(|usual| name == usual) {
                let _ = write!(line, "{}={} ", name.display(), value.display());
            }
        }
        line.push_str(&self.program.to_string_lossy());
        for argument in &self.arguments {
            let argument = argument.to_string_lossy();
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,{}%@+".contains(c);
            if !argument.is_empty() && argument.chars().all(plain) {
                let _ = write!(line, " {argument}");
            } else {
                let _ = write!(line, " '{}'", argument.replace('\'', "'\\''"));
            }
        }
        line
    }

    /// The bare command, for those that set up its standard streams themselves.
    pub fn to_std(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).env_clear().envs(self.environment.iter().cloned());
        if let Some(folder) = &self.folder {
            command.current_dir(folder);
        }
        if let Some(user) = self.user {
            // Without supplementary groups: std drops them when root changes its user.
            command.uid(user).gid(user);
        }
        // SAFETY: only calls that are async-signal-safe: sigaction and sigprocmask.
        unsafe {
            command.pre_exec(|| {
                // Whoever runs the suite may ignore these, and ignored signals are inherited.
                let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
                for signal in [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGHUP, Signal::SIGPIPE] {
                    signal::sigaction(signal, &default)?;
                }
                Ok(SigSet::empty().thread_set_mask()?)
            });
        }
        command
    }

    /// Starts it.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn spawn(self) -> Running {
        let line = self.line();
        let mut command = self.to_std();
        command.process_group(0).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.stdin(match &self.input {
            Input::Null => Stdio::null(),
            Input::Bytes(_) | Input::Pipe => Stdio::piped(),
            Input::File(path) => {
                File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).into()
            }
        });
        let mut child = command.spawn().unwrap_or_else(|error| panic!("cannot run {line}: {error}"));
        let mut stdin = child.stdin.take();
        if let Input::Bytes(bytes) = self.input
            && let Some(mut pipe) = stdin.take()
        {
            // A command may end without having read all: that is for its status to say.
            std::thread::spawn(move || pipe.write_all(&bytes));
        }
        let stdout = Captured::of(child.stdout.take());
        let stderr = Captured::of(child.stderr.take());
        Running { child, stdin, stdout, stderr, line, begin: Instant::now(), deadline: self.deadline }
    }

    /// Runs it to its end.
    ///
    /// # Panics
    /// When it takes longer than its deadline.
    pub fn run(self) -> Output {
        self.spawn().wait()
    }

    /// Runs it to a successful end and returns its standard output as text.
    ///
    /// # Panics
    /// When it fails.
    pub fn ok(self) -> String {
        self.run().ok()
    }
}

/// Bytes that a thread reads from a pipe.
#[derive(Debug, Clone)]
struct Captured(Arc<(Mutex<Bytes>, Condvar)>);

#[derive(Debug, Default)]
struct Bytes {
    bytes: Vec<u8>,
    ended: bool,
}

impl Captured {
    fn of(pipe: Option<impl Read + Send + 'static>) -> Self {
        let captured = Self(Arc::default());
        let target = captured.clone();
        if let Some(mut pipe) = pipe {
            std::thread::spawn(move || {
                let mut chunk = vec![0; 64 << 10];
                loop {
                    let read = pipe.read(&mut chunk).unwrap_or(0);
                    target.change(|bytes| {
                        bytes.bytes.extend_from_slice(&chunk[..read]);
                        bytes.ended = read == 0;
                    });
                    if read == 0 {
                        return;
                    }
                }
            });
        }
        captured
    }

    fn change(&self, change: impl FnOnce(&mut Bytes)) {
        change(&mut self.0.0.lock().unwrap_or_else(PoisonError::into_inner));
        self.0.1.notify_all();
    }

    fn text(&self) -> String {
        let bytes = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes.bytes).into_owned()
    }

    /// Waits until `condition` holds; false after `deadline`.
    fn wait(&self, deadline: Duration, mut condition: impl FnMut(&Bytes) -> bool) -> bool {
        let bytes = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.0.1.wait_timeout_while(bytes, deadline, |bytes| !condition(bytes));
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}

/// A command that runs. Dropping it ends it and its process group.
#[derive(Debug)]
pub struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Captured,
    stderr: Captured,
    line: String,
    begin: Instant,
    deadline: Duration,
}

impl Running {
    /// Its pid.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap_or_else(|error| panic!("{error}"))
    }

    /// What it has written so far.
    pub fn stdout(&self) -> String {
        self.stdout.text()
    }

    /// Waits until its standard output holds `text`.
    ///
    /// # Panics
    /// When it does not within the command's deadline.
    pub fn expect(&self, text: &str) {
        let found = |bytes: &Bytes| bytes.bytes.windows(text.len()).any(|part| part == text.as_bytes());
        let seen = self.stdout.wait(self.deadline, |bytes| found(bytes) || bytes.ended);
        let stdout = self.stdout.text();
        assert!(
            seen && stdout.contains(text),
            "{text:?} was not written by:\n$ {}\nstdout: {}\nstderr: {}",
            self.line,
            end_of(&stdout),
            end_of(&self.stderr.text())
        );
    }

    /// Writes to its standard input (see [`Cmd::stdin_pipe`]).
    ///
    /// # Panics
    /// When that is closed.
    pub fn send(&mut self, bytes: &[u8]) {
        let pipe = self.stdin.as_mut().expect("the command has a pipe as standard input");
        pipe.write_all(bytes)
            .and_then(|()| pipe.flush())
            .unwrap_or_else(|error| panic!("{}: cannot write to it: {error}", self.line));
    }

    /// Ends its standard input.
    pub fn end_stdin(&mut self) {
        self.stdin = None;
    }

    /// Sends `signal` to the command alone.
    pub fn signal(&self, signal: Signal) {
        signal::kill(Pid::from_raw(self.pid()), signal)
            .unwrap_or_else(|error| panic!("{}: {signal}: {error}", self.line));
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().is_ok_and(|status| status.is_some())
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// As [`Running::try_wait`] fails.
    pub fn wait(self) -> Output {
        self.try_wait().unwrap_or_else(|problem| panic!("{problem}"))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it takes longer than its deadline, or somebody else keeps its output open.
    pub fn try_wait(mut self) -> Result<Output, String> {
        self.stdin = None;
        let end = self.begin + self.deadline;
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
                Ok(None) => {
                    return Err(format!(
                        "no end within {} s:\n$ {}\nstdout: {}\nstderr: {}",
                        self.deadline.as_secs(),
                        self.line,
                        end_of(&self.stdout.text()),
                        end_of(&self.stderr.text())
                    ));
                }
                Err(error) => return Err(format!("{}: {error}", self.line)),
            }
        };
        let took = self.begin.elapsed();
        for (name, pipe) in [("output", &self.stdout), ("error output", &self.stderr)] {
            if !pipe.wait(PIPE_GRACE, |bytes| bytes.ended) {
                // The group is not empty, so its number is not another's by now.
                let _ = signal::killpg(Pid::from_raw(self.pid()), Signal::SIGKILL);
                return Err(format!(
                    "somebody else keeps the {name} of this ended command open: {}",
                    self.line
                ));
            }
        }
        let bytes = std::mem::take(&mut self.stdout.0.0.lock().unwrap_or_else(PoisonError::into_inner).bytes);
        Ok(Output { line: self.line.clone(), status, stdout: bytes, stderr: self.stderr.text(), took })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.has_ended() {
            let _ = signal::killpg(Pid::from_raw(self.pid()), Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

/// What a command left.
#[derive(Debug)]
pub struct Output {
    line: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: String,
    /// How long it took.
    pub took: Duration,
}

impl Output {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Both outputs.
    pub fn all(&self) -> String {
        format!("{}{}", self.text(), self.stderr)
    }

    /// Standard output as text, without its last line break.
    ///
    /// # Panics
    /// When the command failed.
    pub fn ok(self) -> String {
        self.exits(0).text().trim_end_matches('\n').to_owned()
    }

    /// Asserts the exit status.
    ///
    /// # Panics
    /// When it was another one.
    pub fn exits(self, code: i32) -> Self {
        assert!(self.status.code() == Some(code), "exit status {code} was expected:\n{self}");
        self
    }

    /// Asserts that some output holds `part`.
    ///
    /// # Panics
    /// When it does not.
    pub fn says(self, part: &str) -> Self {
        assert!(self.all().contains(part), "{part:?} was expected in the output:\n{self}");
        self
    }
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ended = match (self.status.code(), self.status.signal()) {
            (Some(code), _) => format!("exit status {code}"),
            (None, signal) => format!("signal {}", signal.unwrap_or_default()),
        };
        writeln!(f, "$ {}\n{ended} after {:.1} s", self.line, self.took.as_secs_f64())?;
        writeln!(f, "stdout: {}", end_of(&self.text()))?;
        write!(f, "stderr: {}", end_of(&self.stderr))
    }
}

/// The end of a text that may be long.
fn end_of(text: &str) -> String {
    let start = text.len().saturating_sub(SHOWN);
    let start = (start..text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len());
    let cut = if start > 0 { "…" } else { "" };
    format!(
        "{cut}{}",
        text[start..].escape_debug().to_string().replace("\\n", "\n  | ").replace("\\\"", "\"")
    )
}
