//! The file server's process.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Child;

use dhow::fileserver::{FileServerArgs, hand_over, run};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

const ROOT: &str = "DHOW_TEST_ROOT";
const READ_ONLY: &str = "DHOW_TEST_READ_ONLY";

/// A running file server.
pub struct FileServer {
    process: Child,
    control: OwnedFd,
}

impl FileServer {
    /// Serves `root`.
    pub fn start(root: &Path, read_only: bool) -> Self {
        Self::start_after("", root, read_only)
    }

    /// Serves `root` with an empty disk of 1 MiB mounted there, which only it has.
    pub fn start_on_small_disk(root: &Path) -> Self {
        Self::start_after("mount -t tmpfs -o size=1m,mode=755 none \"$DHOW_TEST_ROOT\"", root, false)
    }

    /// A path as the server sees it.
    pub fn path(&self, path: &Path) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{}", self.process.id(), path.display()))
    }

    fn start_after(first: &str, root: &Path, read_only: bool) -> Self {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let mut command = super::role_apart("role_file_server", first);
        command.env(ROOT, root).stdin(theirs);
        if read_only {
            command.env(READ_ONLY, "1");
        }
        Self { process: command.spawn().unwrap(), control: ours }
    }

    /// Gives it a stream to serve.
    pub fn give(&self, stream: BorrowedFd<'_>) {
        hand_over(self.control.as_fd(), stream).unwrap();
    }
}

impl Drop for FileServer {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

/// The process itself.
pub fn role() {
    let Some(root) = std::env::var_os(ROOT) else { return };
    let signal = Some(rustix::process::Signal::KILL);
    rustix::process::set_parent_process_death_signal(signal).unwrap();
    let args = FileServerArgs {
        root: root.into(),
        read_only: std::env::var_os(READ_ONLY).is_some(),
        masked: Vec::new(),
        control: std::io::stdin().as_fd().try_clone_to_owned().unwrap(),
    };
    run(args).unwrap();
}
