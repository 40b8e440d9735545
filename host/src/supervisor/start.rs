//! The steps from nothing to a docker that answers.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dhow_parent::{Exit, ParentError, ParentLink, Restored, SpawnedChild};
use dhow_protocol::boot::BootConfig;
use dhow_protocol::codec;
use dhow_protocol::hello::Secret;
use dhow_protocol::stream::StreamHeader;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::bundles::{self, BundleError};
use super::control::Control;
use super::guest::{Guest, OpenError, Opener};
use super::network;
use super::processes::{ProcessError, Processes, has_ended, log_end};
use super::services;
use super::shares;
use super::state::State;
use crate::config::{Acceleration, ConfigError, Paths, Profile};
use crate::docker;
use crate::forward::{Forwards, Policy};
use crate::images::initramfs;
use crate::images::store::{Image, ImageError};
use crate::keeper;
use crate::qemu::acceleration::{self, QemuError};
use crate::qemu::command::{Accelerator, Vm};
use crate::vsock::client::DeviceClient;

/// How long a guest may take from QEMU's start to its agent's first answer.
const BOOT_DEADLINE: Duration = Duration::from_secs(120);
/// One attempt to reach the agent; in between QEMU's end is looked for.
const BOOT_ATTEMPT: Duration = Duration::from_secs(5);
/// Lines of the guest's console that an error shows.
const CONSOLE_LINES: usize = 15;
/// The bundle that makes docker.
const DOCKER_BUNDLE: &str = "docker";
/// The agent's file, beside this program or in the image's folder.
const AGENT: &str = "dhow-agent";

/// Why there is no docker.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The settings are wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No usable QEMU.
    #[error(transparent)]
    Qemu(#[from] QemuError),
    /// KVM was asked for, and there is none.
    #[error("the profile asks for KVM, which does not work here: {0}")]
    NoKvm(String),
    /// No image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// No agent.
    #[error("the guest agent ({AGENT}) is neither beside this program nor in the image's folder")]
    NoAgent,
    /// A process of the host side.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The keeper.
    #[error(transparent)]
    Parent(#[from] ParentError),
    /// The keeper did not hand over what it must hold.
    #[error("the keeper did not hand over {0}")]
    Missing(&'static str),
    /// A file of the start could not be written.
    #[error("cannot {what} {}", path.display())]
    File {
        /// "write", "grow".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// QEMU ended while the guest was coming up.
    #[error("QEMU ended while the guest was coming up{0}")]
    QemuEnded(String),
    /// The guest did not come up.
    #[error("the guest did not come up within {} s{console}", BOOT_DEADLINE.as_secs())]
    Boot {
        /// The end of the console.
        console: String,
        /// The last attempt's failure.
        #[source]
        source: Option<OpenError>,
    },
    /// Docker could not be installed or started.
    #[error("docker did not start in the guest")]
    Docker(#[source] BundleError),
    /// Somebody stopped it in the middle.
    #[error("the start was interrupted by a stop")]
    Interrupted,
}

impl StartError {
    /// What to do next, where there is something.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Config(error) => return error.hint(),
            Self::Qemu(_) | Self::Process(ProcessError::Missing(_)) => {
                "install QEMU (on Debian: `apt-get install qemu-system-x86`), or run `make setup`"
            }
            Self::NoKvm(_) => "start with `--accel auto` to fall back to emulation",
            Self::Image(_) => "make one with `make image`, and name its folder with `--image DIR`",
            Self::NoAgent => "build it with `make build`",
            Self::File { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                "make room on the disk and start again"
            }
            Self::QemuEnded(_) | Self::Boot { .. } => {
                "`dhow logs console` and `dhow logs qemu` show more; then try `dhow start` again"
            }
            Self::Docker(_) => "`dhow logs dockerd` and `dhow logs containerd` show more",
            _ => return None,
        };
        Some(hint.to_owned())
    }
}

/// What a start begins with.
pub struct Setup {
    /// The way to the keeper.
    pub link: ParentLink,
    /// The settings.
    pub profile: Profile,
    /// Where everything lies.
    pub paths: Paths,
    /// docker.sock, listening.
    pub docker: UnixListener,
}

/// A VM whose docker answers.
pub struct Running {
    /// Requests to the agent.
    pub guest: Arc<Guest>,
    /// QEMU.
    pub qemu: SpawnedChild,
    /// Where everything lies.
    pub paths: Paths,
    /// The profile's name.
    pub profile: String,
    /// The port forwards.
    pub forwards: Arc<Forwards>,
    /// docker.sock, forwards, names, events, clock.
    pub services: JoinSet<()>,
    exits: mpsc::UnboundedReceiver<Exit>,
}

impl Running {
    /// Waits until something that the VM cannot do without has ended; says what.
    pub async fn ended(&mut self) -> String {
        while let Some(exit) = self.exits.recv().await {
            tracing::warn!(?exit, "a process of the host side ended");
            if exit.name == "qemu" {
                let log = log_end(&self.paths.log_dir().join("qemu.log"), 5);
                return format!("QEMU ended by itself{log}");
            }
        }
        "the keeper is gone".to_owned()
    }
}

/// Brings everything up, each step shown in `state`.
///
/// # Errors
/// As [`StartError`] says. What was started by then is ended with the keeper.
pub async fn bring_up(
    setup: Setup,
    mut restored: Restored,
    state: &Arc<State>,
) -> Result<Running, StartError> {
    let Setup { link, profile, paths, docker } = setup;
    let image = Image::find(profile.image.as_deref(), &paths.images_dir())?;
    let accelerator = state
        .step("finding out how to run a VM", choose_accelerator(&profile, &paths, &image, state))
        .await?;
    state.learn(|facts| {
        facts.acceleration = accelerator.name().to_owned();
        facts.cpus = profile.cpus;
        facts.memory_mib = profile.memory_mib;
        facts.disk_gib = profile.disk_gib;
        facts.image = image.folder().to_owned();
    });
    let processes = Processes { link: &link, paths: &paths, state };
    let disk = take(&mut restored.fds, keeper::DISK)?;
    grow(&disk, profile.disk_gib << 30).map_err(|source| StartError::File {
        what: "grow",
        path: paths.disk(),
        source,
    })?;
    let plan = network::bring_up(&processes).await?;
    if let Some(notice) = &plan.notice {
        state.notice(notice.clone());
    }
    let secret = new_secret(&paths)?;
    let boot = BootConfig {
        hostname: hostname(profile.name.as_str()),
        network: Some(plan.guest),
        environment: plan.environment(&profile.environment),
        unix_nanos: services::unix_nanos(),
        log_filter: std::env::var("DHOW_AGENT_LOG").unwrap_or_else(|_| "info".to_owned()),
    };
    let vm = compose(&profile, &paths, &image, accelerator, plan.card, &boot)?;
    let vhost = take(&mut restored.fds, keeper::DEVICE)?;
    let control = take(&mut restored.fds, keeper::DEVICE_CONTROL)?;
    processes.vsock_device(vhost, control).await?;
    let qemu = processes.qemu(&vm, disk).await?;
    let opener = Opener::new(connect_device(&paths)?, secret);
    let stream = state.step("booting the VM", first_stream(&opener, &qemu, &paths, &vm.console)).await?;
    let (control, events) = Control::new(stream);
    let guest = Arc::new(Guest { opener, control });
    state.set_guest(Some(Arc::clone(&guest)));
    let forwards = Forwards::new(Policy::for_this_process(), crate::forward::Kept::default());
    state.set_forwards(Arc::clone(&forwards));
    let mut tasks = services::start(state, &guest, &forwards, events);
    mount_shares(state, &processes, &guest, &profile).await;
    start_docker(state, &guest, &image).await?;
    services::serve_docker(&mut tasks, docker, &guest);
    activate(state, &profile, &paths).await;
    Ok(Running {
        guest,
        qemu,
        profile: profile.name.to_string(),
        paths,
        forwards,
        services: tasks,
        exits: restored.exits,
    })
}

fn take(fds: &mut HashMap<String, OwnedFd>, name: &'static str) -> Result<OwnedFd, StartError> {
    fds.remove(name).ok_or(StartError::Missing(name))
}

async fn choose_accelerator(
    profile: &Profile,
    paths: &Paths,
    image: &Image,
    state: &State,
) -> Result<Accelerator, StartError> {
    let cache = paths.cache_dir().join("acceleration");
    match profile.acceleration {
        Acceleration::Tcg => Ok(acceleration::emulation().await?),
        wish => match acceleration::choose(&image.kernel(), &cache).await? {
            (accelerator, None) => Ok(accelerator),
            (_, Some(reason)) if wish == Acceleration::Kvm => Err(StartError::NoKvm(reason)),
            (accelerator, Some(reason)) => {
                state.notice(format!("no hardware acceleration: {reason}; using emulation, which is slow"));
                Ok(accelerator)
            }
        },
    }
}

/// Makes the disk as large as the settings say; it never shrinks. It is sparse: only what the guest
/// writes takes room.
fn grow(disk: &OwnedFd, size: u64) -> io::Result<()> {
    let now = rustix::fs::fstat(disk)?.st_size;
    if u64::try_from(now).is_ok_and(|now| now < size) {
        rustix::fs::ftruncate(disk, size)?;
    }
    Ok(())
}

/// "dhow" for the default profile, "dhow-NAME" for others.
fn hostname(profile: &str) -> String {
    if profile == "default" { "dhow".to_owned() } else { format!("dhow-{profile}") }
}

/// Writes a file that only its owner reads, replacing what was there.
fn write_private(path: &Path, bytes: &[u8]) -> Result<(), StartError> {
    // The umask is 077 since the keeper's start.
    std::fs::write(path, bytes).map_err(|source| StartError::File {
        what: "write",
        path: path.to_owned(),
        source,
    })
}

fn secret_file(paths: &Paths) -> PathBuf {
    paths.run_dir().join("secret")
}

fn new_secret(paths: &Paths) -> Result<Secret, StartError> {
    let mut bytes = [0; 32];
    let path = secret_file(paths);
    getrandom::fill(&mut bytes).map_err(|error| StartError::File {
        what: "make random bytes for",
        path: path.clone(),
        source: io::Error::other(error.to_string()),
    })?;
    write_private(&path, &bytes)?;
    Ok(Secret(bytes))
}

/// Writes what the guest boots from, and says how.
fn compose(
    profile: &Profile,
    paths: &Paths,
    image: &Image,
    accelerator: Accelerator,
    network: Option<crate::qemu::command::Network>,
    boot: &BootConfig,
) -> Result<Vm, StartError> {
    let agent = find_agent(image).ok_or(StartError::NoAgent)?;
    let target = paths.run_dir().join("initramfs");
    initramfs::compose(&image.initramfs(), &agent, &target).map_err(|source| StartError::File {
        what: "write",
        path: target.clone(),
        source,
    })?;
    let boot_config = paths.run_dir().join("boot");
    let bytes = codec::to_bytes(boot).map_err(|error| StartError::File {
        what: "encode",
        path: boot_config.clone(),
        source: io::Error::other(error),
    })?;
    write_private(&boot_config, &bytes)?;
    let console = paths.log_dir().join("console.log");
    // Each boot's console begins anew: an error shows this boot's end, not an older one's.
    write_private(&console, b"")?;
    Ok(Vm {
        name: profile.name.to_string(),
        accelerator,
        cpus: profile.cpus,
        memory_mib: profile.memory_mib,
        kernel: image.kernel(),
        initramfs: target,
        base: image.base(),
        disk: paths.disk(),
        boot_config,
        secret: secret_file(paths),
        device_socket: paths.device_socket(),
        qmp_socket: paths.qmp_socket(),
        console,
        network,
    })
}

fn find_agent(image: &Image) -> Option<PathBuf> {
    let beside = std::env::current_exe().ok().and_then(|program| Some(program.parent()?.join(AGENT)));
    beside.into_iter().chain([image.folder().join(AGENT)]).find(|path| path.is_file())
}

fn connect_device(paths: &Paths) -> Result<DeviceClient, StartError> {
    let path = paths.device_control_socket();
    let connect = || -> io::Result<DeviceClient> {
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(&path)?)?;
        DeviceClient::new(socket)
    };
    connect().map_err(|source| StartError::File { what: "connect to", path: path.clone(), source })
}

/// The control stream, as soon as the agent answers.
async fn first_stream(
    opener: &Opener,
    qemu: &SpawnedChild,
    paths: &Paths,
    console: &Path,
) -> Result<tokio::net::UnixStream, StartError> {
    let deadline = tokio::time::Instant::now() + BOOT_DEADLINE;
    loop {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(|source| StartError::File {
            what: "make",
            path: "a socket pair".into(),
            source,
        })?;
        let attempt = async {
            let pending = opener.open(&StreamHeader::Control, BOOT_ATTEMPT).await?;
            pending.attach(theirs.as_fd().try_clone_to_owned()?).await?;
            Ok::<_, OpenError>(())
        };
        let error = match attempt.await {
            Ok(()) => {
                let stream = ours.set_nonblocking(true).and_then(|()| tokio::net::UnixStream::from_std(ours));
                return stream.map_err(|source| StartError::File {
                    what: "use",
                    path: "a socket pair".into(),
                    source,
                });
            }
            Err(error) => error,
        };
        if has_ended(&qemu.pidfd) {
            let log = log_end(&paths.log_dir().join("qemu.log"), 5);
            let console = log_end(console, CONSOLE_LINES);
            return Err(StartError::QemuEnded(format!("{log}{console}")));
        }
        if tokio::time::Instant::now() >= deadline {
            let console = log_end(console, CONSOLE_LINES);
            return Err(StartError::Boot { console, source: Some(error) });
        }
        tracing::debug!(error = crate::errors::chain(&error), "the agent does not answer yet");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn mount_shares(state: &State, processes: &Processes<'_>, guest: &Guest, profile: &Profile) {
    let mount_all = async {
        for (number, share) in (1..).zip(&profile.mounts) {
            let report = shares::mount(processes, guest, number, share).await;
            if let Some(problem) = &report.problem {
                state.notice(format!("{} is not mounted: {problem}", report.path.display()));
            }
            state.learn(|facts| facts.mounts.push(report));
        }
    };
    if !profile.mounts.is_empty() {
        state.step("mounting folders", mount_all).await;
    }
}

async fn start_docker(state: &State, guest: &Guest, image: &Image) -> Result<(), StartError> {
    let (offer, file) = image.bundle(DOCKER_BUNDLE)?;
    let step = format!("installing docker {}", offer.version);
    state.step(&step, bundles::install(guest, offer, &file)).await.map_err(StartError::Docker)?;
    state.step("starting docker", bundles::start(guest, DOCKER_BUNDLE)).await.map_err(StartError::Docker)
}

/// Where the context before ours is remembered.
pub fn context_file(paths: &Paths) -> PathBuf {
    paths.state_dir().join("docker-context")
}

async fn activate(state: &State, profile: &Profile, paths: &Paths) {
    let (name, socket, file) = (profile.name.as_str(), paths.docker_socket(), context_file(paths));
    let activation = docker::activate(name, &socket, &file, profile.activate).await;
    for notice in activation.notices {
        state.notice(notice);
    }
}
