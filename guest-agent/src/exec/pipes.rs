//! Standard input, output and error as three pipes.

use std::io;

use tokio::net::unix::pipe;

use super::process::Stdio;

/// This side of them.
pub(super) struct Pipes {
    pub stdin: pipe::Sender,
    pub stdout: pipe::Receiver,
    pub stderr: pipe::Receiver,
}

/// Makes them; the command's ends are blocking, as programs expect.
pub(super) fn open() -> io::Result<(Pipes, Stdio)> {
    let (stdin, their_stdin) = pipe::pipe()?;
    let (their_stdout, stdout) = pipe::pipe()?;
    let (their_stderr, stderr) = pipe::pipe()?;
    let stdio = Stdio {
        stdin: their_stdin.into_blocking_fd()?,
        stdout: their_stdout.into_blocking_fd()?,
        stderr: their_stderr.into_blocking_fd()?,
        terminal: false,
    };
    Ok((Pipes { stdin, stdout, stderr }, stdio))
}
