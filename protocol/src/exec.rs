//! A command in the guest: what to run, its input, its output.
//!
//! Signals and sizes share a stream with standard input, which the command may not read. So the host
//! sends at most [`STDIN_WINDOW`] bytes that the guest has not passed on yet ([`ExecOutput::StdinTaken`]):
//! the guest always has room for them and reads on, and what comes behind them is never stuck.
//!
//! Frames are [`ExecInput`] and [`ExecOutput`], each at most [`crate::codec::DATA_LIMIT`]. The host keeps
//! its half of the stream open until `Exited`: its end before that means that it has left, and hangs
//! the command up.

use bincode::{Decode, Encode};

/// Bytes of standard input that may be on their way to the command.
pub const STDIN_WINDOW: usize = 1 << 20;

/// What to run.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ExecStart {
    /// Program (looked up in the guest's PATH) and arguments; empty means the user's login shell.
    pub argv: Vec<String>,
    /// Added to the guest's own environment.
    pub env: Vec<(String, String)>,
    /// Working folder; the user's home where absent.
    pub cwd: Option<String>,
    /// Falls back to the user's home, instead of failing, where `cwd` does not exist.
    pub cwd_optional: bool,
    /// A pty of that size; separate pipes where absent.
    pub tty: Option<TtySize>,
    /// Name of the guest user; root where absent.
    pub user: Option<String>,
}

/// A terminal's size in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct TtySize {
    /// Lines.
    pub rows: u16,
    /// Characters a line.
    pub columns: u16,
}

/// Host → guest.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ExecInput {
    /// Bytes for standard input, at most [`crate::codec::DATA_CHUNK`].
    Stdin(Vec<u8>),
    /// Standard input has ended.
    StdinEnd,
    /// The terminal's new size.
    Resize(TtySize),
    /// A signal (Linux number) for the command's process group.
    Signal(i32),
}

/// Guest → host.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ExecOutput {
    /// Bytes of standard output, or of the pty, at most [`crate::codec::DATA_CHUNK`].
    Stdout(Vec<u8>),
    /// Bytes of standard error.
    Stderr(Vec<u8>),
    /// The last frame: the command ended and all its output was sent.
    Exited(ExitStatus),
    /// That many more bytes of standard input were passed on, and as many more may come. A command that
    /// has closed its standard input takes no more.
    StdinTaken(u32),
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum ExitStatus {
    /// With this status.
    Code(u8),
    /// Killed by this signal (Linux number).
    Signal(i32),
}
