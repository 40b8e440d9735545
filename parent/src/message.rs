//! What a worker asks of its parent, and what it is told. One SOCK_SEQPACKET message each; fds
//! travel with the message that names them.

use std::os::fd::OwnedFd;

use bincode::{Decode, Encode};

/// Longest message in bytes: an argument vector and an environment fit.
pub(crate) const MESSAGE_LIMIT: usize = 256 << 10;
/// Most fds with one message (the kernel's SCM_MAX_FD is 253).
pub(crate) const FDS_LIMIT: usize = 64;

/// What to spawn.
#[derive(Debug, Default)]
pub struct Spawn {
    /// Name under which its pid, pidfd and exit are told.
    pub name: String,
    /// Program (absolute path) and arguments.
    pub argv: Vec<String>,
    /// The whole environment.
    pub env: Vec<(String, String)>,
    /// Working folder.
    pub cwd: Option<String>,
    /// Standard output; the parent's where absent.
    pub stdout: Option<OwnedFd>,
    /// Standard error; the parent's where absent.
    pub stderr: Option<OwnedFd>,
    /// Further fds: at 3, 4, … in the child, which finds their names in `DHOW_FDS`.
    pub fds: Vec<(String, OwnedFd)>,
    /// `/proc/self/oom_score_adj` of the child.
    pub oom_score_adj: Option<i32>,
    /// SIGKILL for the child when the parent dies.
    pub die_with_parent: bool,
}

/// A [`Spawn`] without its fds, which come in the order stdout, stderr, `fds`.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) struct SpawnMessage {
    pub name: String,
    pub argv: Vec<String>,
    pub env: Vec<(String, String)>,
    pub cwd: Option<String>,
    pub stdout: bool,
    pub stderr: bool,
    pub fds: Vec<String>,
    pub oom_score_adj: Option<i32>,
    pub die_with_parent: bool,
}

/// Worker → parent.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) enum Ask {
    /// Answered by `Spawned` with the pidfd, or `Refused`.
    Spawn { id: u64, spawn: SpawnMessage },
    /// One fd; replaces one of the same name. Answered by `Done`.
    Hold { id: u64, name: String },
    /// Close a held fd. Answered by `Done`, also where there was none.
    Release { id: u64, name: String },
    /// Watch a process that an earlier parent spawned as a child; its pidfd comes along. Answered by
    /// `Done`.
    Adopt { id: u64, name: String, pid: i32 },
    /// End the parent's loop. Answered by `Done`.
    ShutDown { id: u64 },
}

/// Parent → worker.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) enum Tell {
    /// A held fd, at the worker's start.
    Held { name: String },
    /// A living child with its pidfd, at the worker's start.
    Child { name: String, pid: i32 },
    /// The end of what a worker is given at its start; `first` where no worker ran before it.
    Ready { first: bool },
    /// To `Spawn`, with the pidfd.
    Spawned { id: u64, pid: i32 },
    /// Asked and done.
    Done { id: u64 },
    /// Asked and failed.
    Refused { id: u64, reason: String },
    /// A child ended; `status` is as wait(2) gives it, or [`crate::STATUS_UNKNOWN`].
    Exited { name: String, pid: i32, status: i32 },
}

impl Spawn {
    /// Splits a request into its message and its fds, in the order that the message promises.
    pub(crate) fn into_message(self) -> (SpawnMessage, Vec<OwnedFd>) {
        let message = SpawnMessage {
            name: self.name,
            argv: self.argv,
            env: self.env,
            cwd: self.cwd,
            stdout: self.stdout.is_some(),
            stderr: self.stderr.is_some(),
            fds: self.fds.iter().map(|(name, _)| name.clone()).collect(),
            oom_score_adj: self.oom_score_adj,
            die_with_parent: self.die_with_parent,
        };
        let fds = self.stdout.into_iter().chain(self.stderr).chain(self.fds.into_iter().map(|(_, fd)| fd));
        (message, fds.collect())
    }
}

impl SpawnMessage {
    /// The request that a message and its fds make; `None` when their numbers do not fit.
    pub(crate) fn into_spawn(self, fds: Vec<OwnedFd>) -> Option<Spawn> {
        let wanted = usize::from(self.stdout) + usize::from(self.stderr) + self.fds.len();
        if wanted != fds.len() {
            return None;
        }
        let mut fds = fds.into_iter();
        Some(Spawn {
            stdout: if self.stdout { fds.next() } else { None },
            stderr: if self.stderr { fds.next() } else { None },
            fds: self.fds.into_iter().zip(fds).collect(),
            name: self.name,
            argv: self.argv,
            env: self.env,
            cwd: self.cwd,
            oom_score_adj: self.oom_score_adj,
            die_with_parent: self.die_with_parent,
        })
    }
}
