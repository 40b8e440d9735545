//! A command on a terminal of the test's own: typed into, read from, resized.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Child;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{Winsize, openpty};

use super::command::Cmd;

/// How long the other end may take to write what is expected, or to end.
const DEADLINE: Duration = Duration::from_secs(120);

/// A terminal with a command on it. Dropping it ends the command.
pub struct Pty {
    child: Child,
    master: std::fs::File,
    seen: String,
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

impl Pty {
    /// Runs `command` on a terminal of that size, as the leader of a session of its own.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn spawn(command: Cmd, rows: u16, columns: u16) -> Self {
        use std::os::unix::process::CommandExt;
        let pair = openpty(Some(&size(rows, columns)), None).expect("a pty");
        let slave = || -> OwnedFd { pair.slave.try_clone().expect("a duplicate of the pty") };
        let mut command = command.env("TERM", "xterm").to_std();
        command.stdin(slave()).stdout(slave()).stderr(slave());
        // SAFETY: setsid and ioctl are async-signal-safe; fd 0 is the terminal by then.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                // SAFETY: TIOCSCTTY takes an integer.
                match libc::ioctl(0, libc::TIOCSCTTY, 0) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                }
            });
        }
        let child = command.spawn().expect("the command on the pty");
        Self { child, master: pair.master.into(), seen: String::new() }
    }

    /// Types `text`.
    ///
    /// # Panics
    /// When the terminal is gone.
    pub fn send(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).expect("the pty takes input");
    }

    /// Makes the terminal as large; the kernel tells the command.
    ///
    /// # Panics
    /// When the terminal is gone.
    pub fn resize(&self, rows: u16, columns: u16) {
        let size = size(rows, columns);
        // SAFETY: TIOCSWINSZ reads a `winsize`, which lives through the call.
        let result = unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
        assert_eq!(result, 0, "resize: {}", std::io::Error::last_os_error());
    }

    /// Waits until `text` has been written; what came up to its end is returned and forgotten.
    ///
    /// # Panics
    /// When it does not come, with all that did.
    pub fn expect(&mut self, text: &str) -> String {
        let end = Instant::now() + DEADLINE;
        loop {
            if let Some(at) = self.seen.find(text) {
                let rest = self.seen.split_off(at + text.len());
                return std::mem::replace(&mut self.seen, rest);
            }
            let more = self.read(end);
            assert!(more, "{text:?} did not come on the terminal; this did: {:?}", self.seen);
        }
    }

    /// Waits for the command's end; returns its exit status and what was written last.
    ///
    /// # Panics
    /// When it does not end.
    pub fn wait(mut self) -> (Option<i32>, String) {
        let end = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.child.try_wait().expect("the command's status") {
                // What is written is in the terminal's buffer by now.
                while self.read(Instant::now()) {}
                return (status.code(), std::mem::take(&mut self.seen));
            }
            assert!(Instant::now() < end, "no end on the terminal; written: {:?}", self.seen);
            self.read(Instant::now() + Duration::from_millis(20));
        }
    }

    /// Reads what is there by `end`; false when nothing came.
    fn read(&mut self, end: Instant) -> bool {
        let left = end.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX));
        if !matches!(ready, Ok(1)) {
            return false;
        }
        let mut chunk = [0; 4096];
        // EIO: nobody has the other end open.
        let read = self.master.read(&mut chunk).unwrap_or(0);
        self.seen.push_str(&String::from_utf8_lossy(&chunk[..read]));
        read > 0
    }
}

impl Drop for Pty {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
