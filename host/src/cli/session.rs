//! A command in the guest, seen from here: input, output, signals and the terminal, until it ends.
//!
//! ```text
//! stdin ──thread, window──► queue ───► writer ──► stream ──► guest
//! signals, sizes ──────────► urgent ──────┘ (overtake what is queued)
//! guest ──► stream ──► reader ──► stdout, stderr; the last frame is the exit status
//! ```

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use dhow_protocol::codec::{self, DATA_CHUNK, DATA_LIMIT};
use dhow_protocol::exec::{ExecInput, ExecOutput, ExecStart, ExitStatus, STDIN_WINDOW};
use rustix::event::{PollFd, PollFlags};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;

use super::client::{self, OPEN_DEADLINE};
use super::errors::{CommandError, signal_status};
use super::output::{say, write_all};
use super::signals::Signals;
use super::terminal::{self, RawMode};
use crate::api::{ApiReply, ApiRequest};
use crate::config::Paths;

/// Passed on to the command.
const FORWARDED: [i32; 6] =
    [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2];
/// Handled besides, where there is a terminal.
const OF_TERMINAL: [i32; 2] = [libc::SIGWINCH, libc::SIGTSTP];
/// After that many of SIGINT, SIGTERM and SIGQUIT this command leaves: the guest may hang.
const PATIENCE: u32 = 3;
/// An interactive shell ignores SIGTERM; after that long it is hung up.
const TERMINAL_GRACE: Duration = Duration::from_secs(3);
/// Chunks of input on their way.
const QUEUE: usize = 2;
/// Signals and sizes on their way.
const URGENT: usize = 16;

/// How the output ended.
enum Ended {
    /// As it should.
    Exited(ExitStatus),
    /// Without an exit status.
    Lost,
    /// Nobody reads our standard output any more.
    Unread(io::Error),
}

/// Runs `start` and returns the exit status to pass on.
///
/// # Errors
/// When the command could not be started, or its end is not known.
pub async fn run(paths: &Paths, start: ExecStart, read_stdin: bool) -> Result<u8, CommandError> {
    let with_terminal = start.tty.is_some();
    let (reply, connection) = client::open(paths, &ApiRequest::Exec(start), OPEN_DEADLINE).await?;
    if reply != ApiReply::Opened {
        return Err(CommandError::Kind);
    }
    let numbers = FORWARDED.iter().chain(with_terminal.then_some(&OF_TERMINAL).into_iter().flatten());
    let mut signals = Signals::listen(&numbers.copied().collect::<Vec<_>>())?;
    let raw = match with_terminal {
        true => Some(RawMode::enter().map_err(|source| CommandError::system("set up the terminal", source))?),
        false => None,
    };
    let (reader, writer) = connection.into_stream().into_split();
    let (input, queue) = mpsc::channel(QUEUE);
    let (urgent, urgent_queue) = mpsc::channel(URGENT);
    let window = Arc::new(Window::new());
    if read_stdin {
        let window = Arc::clone(&window);
        std::thread::spawn(move || read_input(&input, &window));
    } else {
        // The queue is empty: there is room.
        let _ = input.send(ExecInput::StdinEnd).await;
    }
    let writing = tokio::spawn(write_input(writer, queue, urgent_queue));
    let mut reading = tokio::spawn(copy_output(reader, window));
    let mut impatience = 0;
    let mut leave: Option<(tokio::time::Instant, i32)> = None;
    let ended = loop {
        let deadline = leave.map(|(at, _)| at);
        tokio::select! {
            ended = &mut reading => break ended.unwrap_or(Ended::Lost),
            () = at(deadline) => break Ended::Lost,
            signal = signals.next() => {
                if let Some(raw) = raw.as_ref().filter(|_| signal == libc::SIGTSTP) {
                    suspend(raw);
                }
                if OF_TERMINAL.contains(&signal) {
                    // Where there is no room the size is sent with the next change.
                    let _ = urgent.try_send(ExecInput::Resize(terminal::size()));
                    continue;
                }
                if matches!(signal, libc::SIGINT | libc::SIGTERM | libc::SIGQUIT) {
                    impatience += 1;
                }
                if impatience >= PATIENCE {
                    leave = Some((tokio::time::Instant::now(), signal));
                } else if with_terminal && matches!(signal, libc::SIGTERM | libc::SIGHUP) {
                    leave.get_or_insert((tokio::time::Instant::now() + TERMINAL_GRACE, signal));
                }
                // Where there is no room nothing moves any more, and patience ends it.
                let _ = urgent.try_send(ExecInput::Signal(signal));
            }
        }
    };
    drop(raw);
    writing.abort();
    match (ended, leave) {
        (Ended::Exited(ExitStatus::Code(code)), _) => Ok(code),
        (Ended::Exited(ExitStatus::Signal(signal)), _) => Ok(signal_status(signal)),
        (Ended::Unread(error), _) if error.kind() == io::ErrorKind::BrokenPipe => {
            Ok(signal_status(libc::SIGPIPE))
        }
        (Ended::Unread(error), _) => Err(CommandError::Output(error)),
        (Ended::Lost, Some((_, signal))) => {
            say("dhow: left before the command ended; it is hung up");
            Ok(signal_status(signal))
        }
        (Ended::Lost, None) => Err(CommandError::other(
            "the connection to the command in the guest is lost",
            "`dhow status` says whether the VM still runs",
        )),
    }
}

/// Waits until then, for ever where there is no then.
async fn at(deadline: Option<tokio::time::Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// What the default action of SIGTSTP would do, with the terminal as the shell expects it.
fn suspend(raw: &RawMode) {
    raw.restore();
    if nix::sys::signal::raise(nix::sys::signal::Signal::SIGSTOP).is_ok() {
        // Continued. Where that fails the terminal is gone, and its end of input comes next.
        let _ = raw.resume();
    }
}

/// Bytes of standard input that the guest has room for: what is not read stays where it is.
struct Window {
    room: Mutex<usize>,
    more: Condvar,
}

impl Window {
    fn new() -> Self {
        Self { room: Mutex::new(STDIN_WINDOW), more: Condvar::new() }
    }

    /// The guest has passed on so many bytes.
    fn add(&self, bytes: usize) {
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        // It cannot pass on more than there was.
        *room = room.saturating_add(bytes).min(STDIN_WINDOW);
        self.more.notify_one();
    }

    /// Waits until there is room; how much.
    fn wait(&self) -> usize {
        let room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        *self.more.wait_while(room, |room| *room == 0).unwrap_or_else(PoisonError::into_inner)
    }

    /// So many bytes are sent.
    fn take(&self, bytes: usize) {
        *self.room.lock().unwrap_or_else(PoisonError::into_inner) -= bytes;
    }
}

/// Reads standard input to its end; a thread, since a terminal's read cannot be given up.
fn read_input(input: &mpsc::Sender<ExecInput>, window: &Window) {
    let stdin = io::stdin();
    let mut chunk = vec![0; DATA_CHUNK];
    loop {
        let room = window.wait().min(DATA_CHUNK);
        match rustix::io::read(&stdin, &mut chunk[..room]) {
            Ok(length @ 1..) => {
                window.take(length);
                if input.blocking_send(ExecInput::Stdin(chunk[..length].to_vec())).is_err() {
                    return;
                }
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => {
                let _ = rustix::event::poll(&mut [PollFd::new(&stdin, PollFlags::IN)], None);
            }
            // EIO: the terminal is gone. There is no more input in any of these cases.
            Ok(_) | Err(_) => {
                let _ = input.blocking_send(ExecInput::StdinEnd);
                return;
            }
        }
    }
}

/// Sends what is queued, for as long as the guest takes it. The half is kept open until the end: the
/// guest takes its closing for the user's leaving.
async fn write_input(
    mut writer: OwnedWriteHalf,
    mut queue: mpsc::Receiver<ExecInput>,
    mut urgent: mpsc::Receiver<ExecInput>,
) {
    loop {
        let frame = tokio::select! {
            biased;
            Some(frame) = urgent.recv() => frame,
            Some(frame) = queue.recv() => frame,
            else => break,
        };
        if codec::write_frame(&mut writer, &frame, DATA_LIMIT).await.is_err() {
            // The reader learns why.
            break;
        }
    }
    std::future::pending::<()>().await;
}

async fn copy_output(mut reader: OwnedReadHalf, window: Arc<Window>) -> Ended {
    loop {
        let frame = match codec::read_frame(&mut reader, DATA_LIMIT).await {
            Ok(Some(frame)) => frame,
            Ok(None) | Err(_) => return Ended::Lost,
        };
        match frame {
            ExecOutput::Stdout(bytes) => {
                if let Err(error) = write_blocking(1, bytes).await {
                    return Ended::Unread(error);
                }
            }
            // As a local command would do, it goes on where nobody reads its complaints.
            ExecOutput::Stderr(bytes) => drop(write_blocking(2, bytes).await),
            ExecOutput::Exited(status) => return Ended::Exited(status),
            ExecOutput::StdinTaken(bytes) => window.add(bytes as usize),
        }
    }
}

/// Writes on a thread that may block: signals are still forwarded while a pager stands still.
async fn write_blocking(fd: u8, bytes: Vec<u8>) -> io::Result<()> {
    let written = tokio::task::spawn_blocking(move || {
        let (stdout, stderr) = (io::stdout(), io::stderr());
        let fd: BorrowedFd<'_> = if fd == 1 { stdout.as_fd() } else { stderr.as_fd() };
        write_all(fd, &bytes)
    });
    written.await.map_err(io::Error::other)?
}
