//! A home of Dhow's in a folder of its own, and the commands of a person who uses it.

use std::ffi::{OsStr, OsString};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::command::{Cmd, Output};
use super::settings::{Settings, in_path};
use super::wait::wait_for;
use super::{process, report};

/// How long a start may take on a loaded machine.
pub const START: Duration = Duration::from_secs(300);
/// How long a stop's remains may take to go.
const STOPPED: Duration = Duration::from_secs(30);
/// How long a guest may take to tell its log after a failure.
const TELL: Duration = Duration::from_secs(10);
/// Where the guest tool is put in the guest.
pub const TOOL: &str = "/root/guest-tool";

/// The folder beside the home that [`Vm::share`] shares read-only.
pub const READ_ONLY: &str = "read-only";

/// The folder of this run, with a folder for each VM.
static RUN: OnceLock<tempfile::TempDir> = OnceLock::new();
static NEXT: AtomicU32 = AtomicU32::new(0);

/// Folder of all VMs of this run.
///
/// # Panics
/// When it cannot be made.
pub fn run_folder() -> &'static Path {
    RUN.get_or_init(|| {
        let folder = tempfile::Builder::new().prefix("dhow-e2e-").tempdir().expect("a temporary folder");
        // Ordinary users have their homes below it.
        std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).expect("its mode");
        folder
    })
    .path()
}

/// Ends what is left of this run and removes its folder; returns the processes that were left.
pub fn clean_up() -> Vec<process::Process> {
    let Some(folder) = RUN.get() else { return Vec::new() };
    let left = process::end_all(folder.path());
    // A case that was ended in its middle may have left a mount.
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for mount in mounts.lines().filter_map(|line| line.split(' ').nth(1)) {
        if Path::new(mount).starts_with(folder.path()) {
            let _ = nix::mount::umount2(mount, nix::mount::MntFlags::MNT_DETACH);
        }
    }
    let _ = std::fs::remove_dir_all(folder.path());
    left
}

/// A person's home, with all that Dhow and docker keep in it. Dropping it ends what runs.
#[derive(Debug)]
pub struct Vm {
    folder: PathBuf,
    environment: Vec<(OsString, OsString)>,
    user: Option<u32>,
    seen_at: Vec<(PathBuf, PathBuf)>,
    dhow: PathBuf,
    image: PathBuf,
    docker: PathBuf,
}

impl Vm {
    /// A new home; nothing runs yet.
    ///
    /// # Panics
    /// When a file of the suite is missing, or the home cannot be made.
    #[allow(clippy::new_without_default)] // it makes files
    pub fn new() -> Self {
        let settings = Settings::get();
        let folder = run_folder().join(NEXT.fetch_add(1, Ordering::Relaxed).to_string());
        let vm = Self {
            folder,
            environment: Vec::new(),
            user: None,
            seen_at: Vec::new(),
            dhow: settings.dhow.clone(),
            image: settings.image.clone(),
            docker: settings.docker.clone(),
        };
        let plugins = vm.docker_config().join("cli-plugins");
        std::fs::create_dir_all(&plugins).expect("the docker settings");
        if let Some(buildx) = &settings.buildx {
            std::os::unix::fs::symlink(buildx, plugins.join("docker-buildx")).expect("the buildx plugin");
        }
        let vm = vm.env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("LANG", "C.UTF-8");
        let (home, dhow_home, config) = (vm.home(), vm.dhow_home(), vm.docker_config());
        let vm = vm.env("HOME", home).env("DHOW_HOME", dhow_home).env("DOCKER_CONFIG", config);
        let (program, environment) = (vm.dhow.clone(), vm.environment.clone());
        report::watch(&vm.dhow_home(), move || {
            let mut command = Cmd::new(&program).args(["logs", "agent"]).deadline(TELL);
            for (name, value) in &environment {
                command = command.env(name, value);
            }
            command.spawn().try_wait().map_or_else(|problem| problem, |output| output.all())
        });
        vm
    }

    /// A variable for all commands.
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.set_env(name, value);
        self
    }

    /// A variable for all commands from now on.
    pub fn set_env(&mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) {
        self.environment.retain(|(known, _)| known != name.as_ref());
        self.environment.push((name.as_ref().to_owned(), value.as_ref().to_owned()));
    }

    /// The person's home folder, which is shared with the guest by default.
    pub fn home(&self) -> PathBuf {
        self.folder.join("home")
    }

    /// Dhow's own folder, inside the home.
    pub fn dhow_home(&self) -> PathBuf {
        self.home().join(".dhow")
    }

    /// A folder beside the home.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Arguments of `start` that share the home, and beside it [`READ_ONLY`].
    ///
    /// # Panics
    /// When that cannot be made.
    pub fn share(&self) -> [String; 4] {
        let read_only = self.beside(READ_ONLY);
        std::fs::create_dir_all(&read_only).expect("a folder to share");
        let [home, read_only] = [self.home().display().to_string(), format!("{}:ro", read_only.display())];
        ["--mount".to_owned(), home, "--mount".to_owned(), read_only]
    }

    fn docker_config(&self) -> PathBuf {
        self.home().join(".docker")
    }

    /// A path of the default profile's data.
    pub fn data(&self, name: &str) -> PathBuf {
        self.dhow_home().join("data/profiles/default").join(name)
    }

    /// A path of the default profile's sockets.
    pub fn run(&self, name: &str) -> PathBuf {
        self.dhow_home().join("run/default").join(name)
    }

    /// From now on commands, and what they start, see `file` at the path `at` of the host: each has a mount
    /// namespace of its own. A change of `file` in its place is seen there, too.
    ///
    /// # Panics
    /// Without root, who alone may mount.
    pub fn show(&mut self, file: &Path, at: &Path) {
        assert!(
            nix::unistd::geteuid().is_root(),
            "this case needs root, for a mount namespace of its own: use `sudo`"
        );
        self.seen_at.push((file.to_owned(), at.to_owned()));
    }

    /// `program` with this home's environment.
    ///
    /// # Panics
    /// When files are shown elsewhere and there is no unshare(1).
    pub fn command(&self, program: &Path) -> Cmd {
        let mut command = if self.seen_at.is_empty() {
            Cmd::new(program)
        } else {
            // The names come as arguments: nothing in them is the shell's.
            let mounts =
                "while [ \"$1\" != -- ]; do mount --bind \"$1\" \"$2\" || exit 125; shift 2; done; shift";
            let shown = self.seen_at.iter().flat_map(|(file, at)| [file, at]);
            Cmd::new(in_path("unshare").expect("unshare(1)"))
                .args(["--mount", "sh", "-c", &format!("{mounts}; exec \"$@\""), "sh"])
                .args(shown)
                .arg("--")
                .arg(program)
        };
        command = command.user(self.user).cwd(self.home());
        for (name, value) in &self.environment {
            command = command.env(name, value);
        }
        command
    }

    /// `dhow` with `arguments`.
    pub fn dhow(&self, arguments: &[&str]) -> Cmd {
        self.command(&self.dhow).args(arguments)
    }

    /// The unmodified docker CLI with `arguments`, on whatever context is current.
    pub fn docker(&self, arguments: &[&str]) -> Cmd {
        self.command(&self.docker).args(arguments)
    }

    /// `dhow exec` of a command.
    pub fn exec(&self, argv: &[&str]) -> Cmd {
        self.dhow(&["exec", "--"]).args(argv)
    }

    /// `dhow exec` of a shell's script.
    pub fn sh(&self, script: &str) -> Cmd {
        self.exec(&["sh", "-c", script])
    }

    /// `dhow start` for this machine, with further `arguments`; not yet run.
    pub fn start_command(&self, arguments: &[&str]) -> Cmd {
        let image = self.image.to_string_lossy().into_owned();
        self.dhow(&["start", "--image", &image, "--accel", "tcg", "--memory", "1536MiB", "--disk", "20GiB"])
            .args(arguments)
            .deadline(START)
    }

    /// Starts the VM.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start(&self, arguments: &[&str]) -> Output {
        self.start_command(arguments).run().exits(0)
    }

    /// Stops the VM and checks that nothing is left of it.
    ///
    /// # Panics
    /// When something is.
    pub fn stop(&self) -> Output {
        let output = self.dhow(&["stop"]).run().exits(0);
        self.assert_nothing_left();
        output
    }

    /// Waits until no process of this home is left.
    ///
    /// # Panics
    /// When one stays.
    pub fn assert_nothing_left(&self) {
        wait_for("the end of every process of this home", STOPPED, || match self.processes().as_slice() {
            [] => Ok(()),
            left => Err(format!("{left:?}")),
        });
    }

    /// Processes of this home.
    pub fn processes(&self) -> Vec<process::Process> {
        process::of_home(&self.folder)
    }

    /// The pid of the only process of this home whose command line holds `part`.
    ///
    /// # Panics
    /// When there is none or more than one.
    pub fn pid_of(&self, part: &str) -> i32 {
        let all = self.processes();
        let fitting: Vec<_> = all.iter().filter(|process| process.line.contains(part)).collect();
        match fitting.as_slice() {
            [process] => process.pid,
            _ => panic!("one process with {part:?} was expected among {all:?}"),
        }
    }

    /// The status as `dhow status --json` tells it.
    ///
    /// # Panics
    /// When that fails or is no JSON.
    pub fn status(&self) -> serde_json::Value {
        self.json(&["status", "--json"])
    }

    /// The JSON of a command, whose exit status may say more.
    ///
    /// # Panics
    /// When it is no JSON.
    pub fn json(&self, arguments: &[&str]) -> serde_json::Value {
        let output = self.dhow(arguments).run();
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output}"))
    }

    /// Puts the guest tool at [`TOOL`].
    ///
    /// # Panics
    /// When it cannot.
    pub fn install_tool(&self) {
        let bytes = std::fs::read(&Settings::get().guest_tool).expect("the guest tool");
        let script = format!("cat >{TOOL}.new && chmod 755 {TOOL}.new && mv {TOOL}.new {TOOL}");
        self.sh(&script).stdin(bytes).ok();
    }

    /// From now on everything is done by an ordinary user, who owns the home.
    ///
    /// # Panics
    /// When files cannot be put where that user reaches them.
    pub fn become_user(&mut self, user: u32) {
        let settings = Settings::get();
        let programs = self.folder.join("programs");
        std::fs::create_dir_all(programs.join("image")).expect("a folder for programs");
        let agent = settings.dhow.with_file_name("dhow-agent");
        for (from, name) in [(&settings.dhow, "dhow"), (&agent, "dhow-agent"), (&settings.docker, "docker")] {
            std::fs::copy(from, programs.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        for entry in std::fs::read_dir(&settings.image).expect("the image").flatten() {
            let target = programs.join("image").join(entry.file_name());
            if entry.file_type().is_ok_and(|kind| kind.is_file())
                && std::fs::hard_link(entry.path(), &target).is_err()
            {
                std::fs::copy(entry.path(), &target).expect("a copy of the image");
            }
        }
        self.dhow = programs.join("dhow");
        self.docker = programs.join("docker");
        self.image = programs.join("image");
        self.user = Some(user);
        let own = format!("{user}:{user}");
        Cmd::new("/bin/chown").args(["-R", "-h", &own]).arg(self.home()).ok();
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if !self.processes().is_empty() && !std::thread::panicking() {
            // A case may leave its VM running; the product is asked to end it.
            let _ = self.dhow(&["stop", "--force"]).deadline(Duration::from_secs(60)).spawn().try_wait();
            let end = std::time::Instant::now() + STOPPED;
            while !self.processes().is_empty() && std::time::Instant::now() < end {
                std::thread::sleep(Duration::from_millis(50));
            }
            let left = self.processes();
            if !left.is_empty() {
                report::fault(format!("left running after `dhow stop --force`: {left:?}"));
            }
        }
        process::end_all(&self.folder);
        report::forget(&self.dhow_home());
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
