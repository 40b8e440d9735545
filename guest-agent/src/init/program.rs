//! Runs a program of the base to its end, during the boot.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::process::{Command, ExitStatus, Stdio};

use super::error::InitError;

/// How much of a program's last words is kept, in bytes.
const SAID_LIMIT: u64 = 2048;

/// What a program that ran to its end did.
pub(crate) struct Ended {
    status: ExitStatus,
    program: &'static str,
    /// The end of what it said, on standard output and error.
    pub said: String,
}

impl Ended {
    /// Its exit status; `None` when a signal ended it.
    pub(crate) fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// An error unless the exit status is one of `fine`.
    pub(crate) fn expect(self, fine: &[i32]) -> Result<String, InitError> {
        match self.code() {
            Some(code) if fine.contains(&code) => Ok(self.said),
            _ => Err(self.into_error()),
        }
    }

    /// As an error.
    pub(crate) fn into_error(self) -> InitError {
        InitError::Program { program: self.program, ended: self.status.to_string(), said: self.said }
    }
}

/// Runs it with nothing to read. What it says goes to a file without a name, so that no amount of
/// it can block the program.
///
/// # Errors
/// When it cannot be started.
pub(crate) fn run(program: &'static str, arguments: &[&str]) -> Result<Ended, InitError> {
    let run = || -> std::io::Result<(ExitStatus, String)> {
        let mut words =
            File::from(rustix::fs::memfd_create("dhow-program", rustix::fs::MemfdFlags::CLOEXEC)?);
        let status = Command::new(program)
            .args(arguments)
            .env_clear()
            .env("PATH", super::PATH)
            .stdin(Stdio::null())
            .stdout(words.try_clone()?)
            .stderr(words.try_clone()?)
            .status()?;
        let end = words.seek(SeekFrom::End(0))?;
        words.seek(SeekFrom::Start(end.saturating_sub(SAID_LIMIT)))?;
        let mut said = Vec::new();
        words.take(SAID_LIMIT).read_to_end(&mut said)?;
        Ok((status, String::from_utf8_lossy(&said).trim().to_owned()))
    };
    let (status, said) = run().map_err(InitError::at("run", program))?;
    Ok(Ended { status, program, said })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_what_it_said_and_its_status() {
        let script = "i=0; while [ $i -lt 2000 ]; do echo $i; i=$((i + 1)); done; echo last >&2; exit 3";
        let ended = run("/bin/sh", &["-c", script]).unwrap();
        assert_eq!(ended.code(), Some(3));
        assert!(ended.said.ends_with("1999\nlast") && ended.said.len() <= 2048, "{}", ended.said);
        let error = ended.expect(&[0, 1]).unwrap_err().to_string();
        assert!(error.starts_with("/bin/sh exit status: 3: "), "{error}");
        assert!(run("/bin/sh", &["-c", "exit 1"]).unwrap().expect(&[0, 1]).is_ok());
        let error = run("/no/such", &[]).err().unwrap();
        assert_eq!(error.to_string(), "cannot run /no/such");
    }
}
