//! One command's stream: input to it, output from it, its end.

use std::future::pending;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use dhow_protocol::codec::{self, CodecError, DATA_CHUNK, DATA_LIMIT};
use dhow_protocol::errors::chain;
use dhow_protocol::exec::{ExecInput, ExecOutput, ExitStatus, STDIN_WINDOW};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::process::{self, Exit, Group, StartError, Stdio};
use super::{Prepared, pipes, pty};
use crate::serve::stream::Stream;

/// How long output may be silent after the command's end while something else still holds its ends.
const GRACE: Duration = Duration::from_millis(500);
/// So much output after the command's end is not its own any more: no pipe holds as much.
const AFTER_END: usize = 2 << 20;
/// How long a command may take to end after its hang-up.
const HANGUP: Duration = Duration::from_secs(5);
/// How long the host may take to close a stream whose last frame was sent.
const LINGER: Duration = Duration::from_secs(5);
/// As a shell says it (POSIX, 2.8.2).
const CODE_NOT_FOUND: u8 = 127;
const CODE_NOT_EXECUTABLE: u8 = 126;

type Reader = Box<dyn AsyncRead + Send + Unpin>;
type Writer = Box<dyn AsyncWrite + Send + Unpin>;

/// A piece of standard input, and its part of the window until it is passed on.
type Chunk = (Vec<u8>, OwnedSemaphorePermit);

/// Bytes of standard input that were passed on and that the host does not know of yet.
#[derive(Default)]
struct Taken {
    bytes: AtomicU32,
    more: Notify,
}

impl Taken {
    fn add(&self, bytes: usize) {
        // Never more than the window, which fits.
        self.bytes.fetch_add(u32::try_from(bytes).unwrap_or(u32::MAX), Ordering::Relaxed);
        self.more.notify_one();
    }

    async fn next(&self) -> u32 {
        loop {
            match self.bytes.swap(0, Ordering::Relaxed) {
                0 => self.more.notified().await,
                bytes => return bytes,
            }
        }
    }
}

/// This side of a command's standard streams.
struct Ends {
    stdin: Writer,
    stdout: Reader,
    /// A terminal has none of its own.
    stderr: Option<Reader>,
    terminal: Option<Arc<pty::Master>>,
}

/// Runs a command whose stream is open, to its end.
pub async fn run(stream: Stream, prepared: Prepared) {
    let started = match open(&prepared) {
        Ok((ends, stdio)) => tokio::select! {
            started = process::start(&prepared, stdio) => started.map(|(group, exit)| (ends, group, exit)),
            // One that is just being started is hung up in order; one whose program cannot be read (its
            // share hangs) is killed whenever it starts after all.
            () = async { stream.hung_up().await; sleep(HANGUP).await } => return,
        },
        Err(error) => Err(StartError::Other(error)),
    };
    let ended = match started {
        Ok((ends, group, exit)) => serve(&stream, ends, group, exit).await,
        Err(error) => explain(&stream, &prepared, &error).await.map(Some),
    };
    let finished = match ended {
        Ok(Some(status)) => finish(&stream, status).await,
        Ok(None) => {
            tracing::debug!("the host left before a command's end");
            return;
        }
        Err(error) => Err(error),
    };
    if let Err(error) = finished {
        tracing::debug!(error = chain(&error), "a command's stream failed");
    }
}

fn open(prepared: &Prepared) -> io::Result<(Ends, Stdio)> {
    if let Some(size) = prepared.tty {
        let (master, stdio) = pty::open(size, &prepared.user)?;
        let terminal = Arc::new(master);
        let half = || pty::Half(Arc::clone(&terminal));
        let (stdin, stdout) = (Box::new(half()), Box::new(half()));
        return Ok((Ends { stdin, stdout, stderr: None, terminal: Some(terminal) }, stdio));
    }
    let (pipes::Pipes { stdin, stdout, stderr }, stdio) = pipes::open()?;
    let (stdin, stdout) = (Box::new(stdin), Box::new(stdout));
    Ok((Ends { stdin, stdout, stderr: Some(Box::new(stderr)), terminal: None }, stdio))
}

/// Says why a command does not run, as its shell would.
async fn explain(
    mut stream: &Stream,
    prepared: &Prepared,
    error: &StartError,
) -> Result<ExitStatus, CodecError> {
    let name = prepared.argv.first().map_or("", String::as_str);
    let output = match prepared.tty {
        Some(_) => ExecOutput::Stdout(format!("dhow: {name}: {error}\r\n").into_bytes()),
        None => ExecOutput::Stderr(format!("dhow: {name}: {error}\n").into_bytes()),
    };
    codec::write_frame(&mut stream, &output, DATA_LIMIT).await?;
    Ok(ExitStatus::Code(match error {
        StartError::NotFound => CODE_NOT_FOUND,
        _ => CODE_NOT_EXECUTABLE,
    }))
}

/// Moves input and output until the command has ended. `None`: the host left, and the command was
/// hung up.
async fn serve(
    stream: &Stream,
    ends: Ends,
    group: Group,
    mut exit: Exit,
) -> Result<Option<ExitStatus>, CodecError> {
    let Ends { stdin, stdout, mut stderr, terminal } = ends;
    let mut stdout = Some(stdout);
    // Bounded by the window.
    let (chunks, queue) = mpsc::unbounded_channel();
    let taken = Taken::default();
    let ended = tokio::select! {
        ended = output(stream, &mut stdout, &mut stderr, &taken, &mut exit) => ended.map(Some),
        ended = input(stream, chunks, &group, terminal.as_deref()) => ended.map(|()| None),
        never = feed(stdin, queue, &taken, terminal.as_deref()) => match never {},
    };
    if matches!(ended, Ok(Some(_))) {
        group.leave();
    } else {
        if terminal.is_some() {
            // The kernel hangs up a terminal's whole session when its last fd here is closed.
            drop((terminal, stdout.take()));
        }
        hang_up(group, &mut exit, &mut stdout, &mut stderr).await;
    }
    ended
}

/// Reads what the host says until it leaves.
async fn input(
    mut stream: &Stream,
    chunks: mpsc::UnboundedSender<Chunk>,
    group: &Group,
    terminal: Option<&pty::Master>,
) -> Result<(), CodecError> {
    let mut chunks = Some(chunks);
    let window = Arc::new(Semaphore::new(STDIN_WINDOW));
    while let Some(message) = codec::read_frame(&mut stream, DATA_LIMIT).await? {
        match message {
            ExecInput::Stdin(bytes) => {
                if let Some(chunks) = &chunks {
                    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                    tokio::select! {
                        biased;
                        // There is room at once, unless the host does not keep to the window.
                        room = Arc::clone(&window).acquire_many_owned(length) => {
                            if let Ok(room) = room {
                                // Nobody takes it when the command has closed its standard input.
                                let _ = chunks.send((bytes, room));
                            }
                        }
                        // While there is none nothing else would tell that the host has left.
                        () = stream.hung_up() => return Ok(()),
                    }
                }
            }
            ExecInput::StdinEnd => chunks = None,
            ExecInput::Resize(size) => {
                if let Some(Err(error)) = terminal.map(|terminal| terminal.resize(size)) {
                    tracing::debug!(%error, "a terminal cannot be resized");
                }
            }
            ExecInput::Signal(number) => {
                if let Err(error) = group.signal(number) {
                    tracing::debug!(%error, number, "a command cannot be signalled");
                }
            }
        }
    }
    Ok(())
}

/// Writes standard input until it ends, or the command reads no more.
async fn feed(
    mut stdin: Writer,
    mut queue: mpsc::UnboundedReceiver<Chunk>,
    taken: &Taken,
    terminal: Option<&pty::Master>,
) -> std::convert::Infallible {
    let mut last = None;
    while let Some((chunk, room)) = queue.recv().await {
        if let Err(error) = stdin.write_all(&chunk).await {
            tracing::debug!(%error, "a command reads no more");
            // What waits gives its room back.
            drop(queue);
            return pending().await;
        }
        last = chunk.last().copied().or(last);
        drop(room);
        taken.add(chunk.len());
    }
    if let Some(terminal) = terminal {
        // A terminal that is gone needs no end.
        let _ = stdin.write_all(&terminal.end_of_input(last)).await;
    }
    drop(stdin);
    pending().await
}

/// Sends output until all of it is sent and the command has ended.
async fn output(
    mut stream: &Stream,
    stdout: &mut Option<Reader>,
    stderr: &mut Option<Reader>,
    taken: &Taken,
    exit: &mut Exit,
) -> Result<ExitStatus, CodecError> {
    let (mut out, mut err) = (vec![0; DATA_CHUNK], vec![0; DATA_CHUNK]);
    let mut status = None;
    let mut quiet_until = Instant::now();
    let mut left = AFTER_END;
    while status.is_none() || ((stdout.is_some() || stderr.is_some()) && left > 0) {
        let frame = tokio::select! {
            // The end is told once. Silence is nothing that may win over output.
            biased;
            ended = exit.status(), if status.is_none() => {
                status = Some(ended);
                quiet_until = Instant::now() + GRACE;
                continue;
            }
            // Before output, of which there may be no end.
            bytes = taken.next(), if status.is_none() => ExecOutput::StdinTaken(bytes),
            frame = either(stdout, stderr, &mut out, &mut err) => match frame {
                Some(frame) => frame,
                None => continue,
            },
            () = sleep_until(quiet_until), if status.is_some() => break,
        };
        codec::write_frame(&mut stream, &frame, DATA_LIMIT).await?;
        if status.is_some() {
            let (ExecOutput::Stdout(bytes) | ExecOutput::Stderr(bytes)) = &frame else { continue };
            left = left.saturating_sub(bytes.len());
            quiet_until = Instant::now() + GRACE;
        }
    }
    match status {
        Some(status) => Ok(status),
        None => Ok(exit.status().await),
    }
}

/// Output of whichever has some; `None` when one has ended. Takes turns at random.
async fn either(
    stdout: &mut Option<Reader>,
    stderr: &mut Option<Reader>,
    out: &mut [u8],
    err: &mut [u8],
) -> Option<ExecOutput> {
    tokio::select! {
        length = read(stdout, out) => (length > 0).then(|| ExecOutput::Stdout(out[..length].to_vec())),
        length = read(stderr, err) => (length > 0).then(|| ExecOutput::Stderr(err[..length].to_vec())),
    }
}

/// Reads once; at the end the reader is taken away. Never ready without a reader.
async fn read(reader: &mut Option<Reader>, buffer: &mut [u8]) -> usize {
    let Some(open) = reader else { return pending().await };
    let length = open.read(buffer).await.unwrap_or_else(|error| {
        tracing::debug!(%error, "a command's output cannot be read");
        0
    });
    if length == 0 {
        *reader = None;
    }
    length
}

/// The last frame and an orderly end: what the host sent meanwhile is read away, or the close would
/// look like a cut.
async fn finish(mut stream: &Stream, status: ExitStatus) -> Result<(), CodecError> {
    codec::write_frame(&mut stream, &ExecOutput::Exited(status), DATA_LIMIT).await?;
    stream.shutdown_write().map_err(CodecError::Io)?;
    let mut sink = tokio::io::sink();
    // A host that does not close is not waited for.
    let _ = timeout(LINGER, tokio::io::copy(&mut stream, &mut sink)).await;
    Ok(())
}

/// Ends a command whose host has left, as a terminal does, then by force. What it says meanwhile is
/// read away: whoever cleans up and speaks of it must not die of a closed pipe.
async fn hang_up(group: Group, exit: &mut Exit, stdout: &mut Option<Reader>, stderr: &mut Option<Reader>) {
    // ESRCH: it has ended already.
    let _ = group.signal(libc::SIGHUP);
    let _ = group.signal(libc::SIGCONT);
    let (mut out, mut err) = (vec![0; DATA_CHUNK], vec![0; DATA_CHUNK]);
    let deaf = async {
        while stdout.is_some() || stderr.is_some() {
            either(stdout, stderr, &mut out, &mut err).await;
        }
        pending().await
    };
    let ended = tokio::select! {
        _ = exit.status() => true,
        never = deaf => never,
        () = sleep(HANGUP) => false,
    };
    if !ended {
        tracing::debug!("a command did not end at its hang-up");
    }
    // By force.
    drop(group);
}
