//! Commands in the guest: one stream, one command, on a pty or on three pipes.
//!
//! ```text
//! prepare ─► (hello's answer) ─► run: process.rs starts it in pty.rs or pipes.rs
//!   user.rs, environment.rs        session.rs: ExecInput ─► stdin, resize, signal
//!                                              stdout, stderr ─► ExecOutput … Exited
//! ```
//! The host keeps its half of the stream open until `Exited`: its end before that means that it has
//! left, and the command is hung up as by a terminal.

mod environment;
mod pipes;
mod process;
mod pty;
mod session;
mod user;

use std::path::PathBuf;

use dhow_protocol::exec::{ExecStart, TtySize};
use dhow_protocol::hello::Status;

pub use session::run;
use user::User;

/// Why a command is not even tried: what the host is told instead of an open stream.
#[derive(Debug, PartialEq, Eq)]
pub struct Refused {
    /// As a code.
    pub status: Status,
    /// For a person.
    pub detail: String,
}

/// A command with everything looked up that can be.
#[derive(Debug)]
pub struct Prepared {
    /// Program and arguments, at least one; the first is what the program is told of its name.
    argv: Vec<String>,
    /// The program, where it is not to be looked up by the name in `argv`.
    program: Option<PathBuf>,
    env: Vec<(String, String)>,
    cwd: PathBuf,
    tty: Option<TtySize>,
    user: User,
}

/// Looks up what `start` names. `environment` is what the host wants every command to have.
///
/// # Errors
/// An unknown user, a working folder that is none, names that no environment can hold.
pub async fn prepare(start: ExecStart, environment: &[(String, String)]) -> Result<Prepared, Refused> {
    let ExecStart { argv, env, cwd, cwd_optional, tty, user } = start;
    let user = user::lookup(user.as_deref())?;
    let env = environment::build(&user, environment, &env)?;
    if argv.iter().any(|argument| argument.contains('\0')) {
        return Err(malformed("an argument contains a zero byte"));
    }
    let cwd = match cwd {
        Some(cwd) => working_folder(cwd.into(), cwd_optional, &user).await?,
        None => user.home_or_root().await,
    };
    let (argv, program) = match argv.is_empty() {
        false => (argv, None),
        // "A login shell is one whose first character of argument zero is a -" (bash(1)).
        true => (vec![format!("-{}", user.shell_name())], Some(user.shell.clone())),
    };
    Ok(Prepared { argv, program, env, cwd, tty, user })
}

fn malformed(detail: impl Into<String>) -> Refused {
    Refused { status: Status::Malformed, detail: detail.into() }
}

/// Off the worker's thread: the folder may be on a share that hangs.
async fn working_folder(cwd: PathBuf, optional: bool, user: &User) -> Result<PathBuf, Refused> {
    let found =
        if cwd.is_absolute() { tokio::fs::metadata(&cwd).await.map(|meta| meta.is_dir()) } else { Ok(false) };
    match found {
        Ok(true) => Ok(cwd),
        _ if optional => Ok(user.home_or_root().await),
        Ok(false) => {
            let detail = format!("{} is not a folder in the guest", cwd.display());
            Err(Refused { status: Status::NotFound, detail })
        }
        Err(error) => {
            let detail = format!("cannot work in {} in the guest: {error}", cwd.display());
            Err(Refused { status: Status::NotFound, detail })
        }
    }
}

#[cfg(test)]
mod tests;
