//! What a parent holds, passed on when the parent is gone: its worker, which has a duplicate of each
//! fd, replaces itself by a new parent that inherits them.
//!
//! Replacing the own process (exec) leaves no moment in which two processes, or none, are in charge:
//! locks and listening sockets stay with their open file descriptions, children are known by their
//! pidfds. They are not children of the new parent in the kernel's eyes, so it learns that they ended
//! but not how, and whoever adopted them (init, a subreaper) reaps them.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::link::SpawnedChild;
use crate::spawn;

/// Before the name of a held fd.
const HELD: &str = "held/";
/// Before a child's pid, a slash and its name.
const CHILD: &str = "child/";

/// Held fds and living children.
#[derive(Debug, Default)]
pub struct Estate {
    /// Held fds by name.
    pub fds: BTreeMap<String, OwnedFd>,
    /// Children with their pidfds.
    pub children: Vec<SpawnedChild>,
}

impl Estate {
    /// Takes an estate out of `inherited` ([`crate::inherited_fds`]); `None` where there is none.
    #[must_use]
    pub fn from_inherited(inherited: &mut HashMap<String, OwnedFd>) -> Option<Self> {
        let mut estate = Self::default();
        let names: Vec<String> = inherited.keys().cloned().collect();
        for name in names {
            if let Some(held) = name.strip_prefix(HELD) {
                estate.fds.extend(inherited.remove(&name).map(|fd| (held.to_owned(), fd)));
            } else if let Some((pid, child)) =
                name.strip_prefix(CHILD).and_then(|child| child.split_once('/'))
                && let Ok(pid) = pid.parse()
                && let Some(pidfd) = inherited.remove(&name)
            {
                estate.children.push(SpawnedChild { name: child.to_owned(), pid, pidfd });
            }
        }
        (!estate.fds.is_empty() || !estate.children.is_empty()).then_some(estate)
    }

    /// Replaces this process by `argv` (an absolute path and arguments), which finds the estate with
    /// [`Estate::from_inherited`]. Other threads end; fds that are close-on-exec are closed.
    ///
    /// Returns only when it failed. The process should end then: fds above standard error may have
    /// been replaced.
    #[must_use]
    pub fn exec(self, argv: &[OsString]) -> io::Error {
        let Some((program, arguments)) = argv.split_first() else {
            return io::Error::new(io::ErrorKind::InvalidInput, "an empty argument vector");
        };
        let held = self.fds.into_iter().map(|(name, fd)| (format!("{HELD}{name}"), fd));
        let children = self.children.into_iter().map(|child| {
            let SpawnedChild { name, pid, pidfd } = child;
            (format!("{CHILD}{pid}/{name}"), pidfd)
        });
        let fds: Vec<(String, OwnedFd)> = held.chain(children).collect();
        let (names, sources) = match spawn::lift(&fds) {
            Ok(lifted) => lifted,
            Err(error) => return error,
        };
        let numbers: Vec<_> = sources.iter().map(AsRawFd::as_raw_fd).collect();
        let mut command = Command::new(program);
        command.args(arguments).env(spawn::FDS_VARIABLE, names);
        // SAFETY: the closure only calls dup2(2), in this process just before it is replaced.
        unsafe {
            command.pre_exec(move || spawn::place(&numbers));
        }
        command.exec()
    }
}
