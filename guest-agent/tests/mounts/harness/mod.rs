//! A host folder, its file server, a guest with the share mounted: set up, and taken down.

pub mod guest;
pub mod hand;
pub mod relay;
pub mod server;

use std::ffi::OsString;
use std::fs::Permissions;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use guest::Guest;
use server::FileServer;

/// Everything that is waited for comes within this time, also on a loaded machine.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// This binary in another role, in a mount namespace from which nothing propagates: unshare(1) becomes
/// it. `first` is a shell's line that runs before.
pub fn role_apart(name: &str, first: &str) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &format!("{first}\nexec \"$@\""), "sh"]);
    command.args(role_arguments(name)).stdin(Stdio::null());
    command
}

/// This binary and arguments that run one role and nothing else.
pub fn role_arguments(name: &str) -> [OsString; 5] {
    let program = std::env::current_exe().unwrap().into_os_string();
    let [role, exact, ignored, nocapture] = [name, "--exact", "--ignored", "--nocapture"].map(OsString::from);
    [program, role, exact, ignored, nocapture]
}

/// Waits until `what` is there.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "{what}: not within {} s", DEADLINE.as_secs());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A host folder that is mounted in a guest.
pub struct World {
    /// The folder on the host.
    pub host: PathBuf,
    /// The same through the mount.
    pub mounted: PathBuf,
    /// The guest.
    pub guest: Guest,
    /// The file server.
    pub server: FileServer,
    // Last, so that it goes last.
    dir: tempfile::TempDir,
}

impl World {
    /// A folder with its share mounted, writable.
    pub fn new() -> Self {
        Self::with(false)
    }

    /// A folder with its share mounted, read-only.
    pub fn read_only() -> Self {
        Self::with(true)
    }

    /// A folder on a disk of 1 MiB with its share mounted.
    pub fn on_small_disk() -> Self {
        let mut world = Self::unmounted(false);
        world.server = FileServer::start_on_small_disk(&world.host);
        world.host = world.server.path(&world.host);
        world.connect();
        world.mount(false).unwrap();
        world
    }

    fn with(read_only: bool) -> Self {
        let world = Self::unmounted(read_only);
        world.connect();
        world.mount(read_only).unwrap();
        world
    }

    /// A folder, a server and a guest that do not know each other yet.
    pub fn unmounted(read_only: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Other users must reach the mount.
        std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        let host = dir.path().join("host");
        std::fs::create_dir(&host).unwrap();
        let guest = Guest::start(dir.path());
        let server = FileServer::start(&host, read_only);
        let mounted = guest.path(&dir.path().join("mounted"));
        Self { host, mounted, guest, server, dir }
    }

    /// Where it is mounted, as the guest calls it.
    pub fn mount_path(&self) -> PathBuf {
        self.dir.path().join("mounted")
    }

    /// Mounts the share.
    pub fn mount(&self, read_only: bool) -> Result<(), String> {
        self.guest.mount(1, &self.mount_path(), read_only)
    }

    /// Opens a stream of the share and hands it to the file server.
    pub fn connect(&self) {
        let stream = self.guest.open_files(1);
        self.server.give(stream.as_fd());
    }

    /// A stream of the share whose host side is the test's.
    pub fn connect_by_hand(&self) -> UnixStream {
        self.guest.open_files(1)
    }

    /// A shell's line in the guest, in the mounted folder, as a user without privileges.
    pub fn run_as(&self, uid: u32, line: &str) -> Command {
        let mut command = self.guest.command("setpriv");
        command.args([format!("--reuid={uid}"), format!("--regid={uid}"), "--clear-groups".to_owned()]);
        command.args(["sh", "-c", &format!("cd \"$0\" && {line}")]).arg(self.mount_path());
        command
    }

    /// A shell's line in the guest, in the mounted folder.
    pub fn run(&self, line: &str) -> Command {
        let mut command = self.guest.command("sh");
        command.args(["-c", &format!("cd \"$0\" && {line}")]).arg(self.mount_path());
        command
    }

    /// A path on the host.
    pub fn on_host(&self, name: impl AsRef<Path>) -> PathBuf {
        self.host.join(name)
    }

    /// A path in the guest.
    pub fn in_guest(&self, name: impl AsRef<Path>) -> PathBuf {
        self.mounted.join(name)
    }
}
