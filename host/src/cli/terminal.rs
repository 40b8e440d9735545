//! The user's terminal: raw mode that is always undone, and its size.

use std::io;
use std::os::fd::AsFd;

use dhow_protocol::exec::TtySize;
use rustix::termios::{OptionalActions, Termios};

/// The terminal's size; that of a teletype where it does not tell.
#[must_use]
pub fn size() -> TtySize {
    let (stdin, stdout) = (io::stdin(), io::stdout());
    [stdout.as_fd(), stdin.as_fd()]
        .into_iter()
        .filter_map(|fd| rustix::termios::tcgetwinsize(fd).ok())
        .find(|size| size.ws_row > 0 && size.ws_col > 0)
        .map_or(TtySize { rows: 24, columns: 80 }, |size| TtySize { rows: size.ws_row, columns: size.ws_col })
}

/// Standard input in raw mode, restored when this is dropped.
#[derive(Debug)]
pub struct RawMode {
    before: Termios,
}

impl RawMode {
    /// Every byte goes to the guest's terminal, which does echo, lines and signals.
    ///
    /// # Errors
    /// When standard input is no terminal.
    pub fn enter() -> io::Result<Self> {
        let before = rustix::termios::tcgetattr(io::stdin())?;
        let raw = Self { before };
        raw.resume()?;
        Ok(raw)
    }

    /// Raw again after [`RawMode::restore`].
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn resume(&self) -> io::Result<()> {
        let mut termios = self.before.clone();
        termios.make_raw();
        Ok(rustix::termios::tcsetattr(io::stdin(), OptionalActions::Now, &termios)?)
    }

    /// As it was before. A terminal that is gone needs no restoring.
    pub fn restore(&self) {
        let _ = rustix::termios::tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        self.restore();
    }
}
