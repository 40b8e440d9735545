//! The steps from nothing to a VM whose agent is about to answer; `guest_setup.rs` has the rest.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dhow_parent::{ParentError, ParentLink, Restored};
use dhow_protocol::boot::BootConfig;
use dhow_protocol::codec;
use dhow_protocol::hello::Secret;
use tokio::net::UnixListener;
use tokio::task::JoinSet;

use super::bundles::BundleError;
use super::guest_setup::{self, Helpers};
use super::ledger::Ledger;
use super::network;
use super::processes::{ProcessError, Processes};
use super::record::{NetworkKind, Phase, Record, ShareRecord, host_boot};
use super::routes;
use super::services;
use super::state::{Facts, State};
use super::vm::{Parts, Running, Vm};
use crate::config::{Acceleration, ConfigError, Paths, Profile};
use crate::forward::Forwards;
use crate::forward::rules::{Passages, Side, SocketRule};
use crate::images::initramfs;
use crate::images::store::{Image, ImageError};
use crate::keeper;
use crate::qemu::acceleration::{self, QemuError};
use crate::qemu::command::{self, Accelerator};

/// The bundle that makes docker.
pub const DOCKER_BUNDLE: &str = "docker";
/// The agent's file, beside this program or in the image's folder.
const AGENT: &str = "dhow-agent";
/// Where the guest and containers find the host's ssh-agent: as in Docker Desktop.
const AGENT_SOCKET: &str = "/run/host-services/ssh-auth.sock";

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
    /// Somebody else has the disk.
    #[error("the data disk {} is in use by another process", .0.display())]
    DiskInUse(PathBuf),
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
    /// The data disk cannot grow.
    #[error("the host's disk is full: no space is left for {}", .0.display())]
    FullDisk(PathBuf),
    /// The guest did not come up.
    #[error("the guest did not come up within {seconds} s{console}")]
    Boot {
        /// How long it was waited for.
        seconds: u64,
        /// The end of the guest's console.
        console: String,
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
            Self::FullDisk(_) => "make room on the disk and start again",
            Self::DiskInUse(_) => {
                "a QEMU that nobody knows of may still run (`pgrep -a qemu`): when it has ended, start again"
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
    /// The port forwards, with none yet.
    pub forwards: Arc<Forwards>,
}

/// Brings everything up, each step shown in `state`.
///
/// # Errors
/// As [`StartError`] says. What was started by then is in the record, and the caller's to end.
pub async fn bring_up(
    setup: Setup,
    mut restored: Restored,
    state: &Arc<State>,
) -> Result<Running, StartError> {
    let Setup { link, profile, paths, docker, forwards } = setup;
    let disk = take_disk(&mut restored.fds, &paths)?;
    let image = Image::find(profile.image.as_deref(), &paths.images_dir())?;
    let choosing = choose_accelerator(&profile, &paths, &image, state);
    let accelerator = state.step("finding out how to run a VM", choosing).await?;
    grow(&disk, profile.disk_gib << 30).map_err(|source| StartError::File {
        what: "grow",
        path: paths.disk(),
        source,
    })?;
    let passages = passages(&profile, std::env::var_os("SSH_AUTH_SOCK").as_deref(), state);
    let environment = environment(&profile, &passages);
    let ledger = begin_record(&profile, passages, &paths, &image, accelerator)?;
    show(&ledger.record(), state);
    let (qemu, helpers, secret) = {
        let processes = Processes { link: &link, paths: &paths, state, ledger: &ledger };
        let plan =
            network::bring_up(&processes, acceleration::qemu_version().await?, &profile.subnets).await?;
        for hidden in routes::conflicts(&profile.subnets) {
            state.notice(hidden);
        }
        if let Some(notice) = &plan.notice {
            state.notice(notice.clone());
        }
        ledger.change(|record| record.network = plan.kind);
        let secret = new_secret(&paths)?;
        let boot = BootConfig {
            hostname: hostname(profile.name.as_str()),
            network: Some(plan.guest),
            environment: plan.environment(&environment),
            unix_nanos: services::unix_nanos(),
            log_filter: std::env::var("DHOW_AGENT_LOG").unwrap_or_else(|_| "info".to_owned()),
        };
        let command = compose(&profile, &paths, &image, accelerator, plan.card, &boot)?;
        let device = processes.vsock_device().await?;
        let qemu = processes.qemu(&command, disk).await?;
        (qemu, Helpers { device: Some(device), passt: plan.passt, ..Helpers::default() }, secret)
    };
    let parts = Parts { link, paths, state: Arc::clone(state), ledger, qemu, forwards, secret };
    bring_docker(Vm::new(parts), helpers, docker, restored).await
}

/// Goes on from a VM that boots to a docker that answers.
///
/// # Errors
/// As [`bring_up`].
pub async fn bring_docker(
    vm: Arc<Vm>,
    mut helpers: Helpers,
    docker: UnixListener,
    restored: Restored,
) -> Result<Running, StartError> {
    let mut tasks = JoinSet::new();
    guest_setup::heal(&mut tasks, &vm, &mut helpers);
    guest_setup::finish(&mut tasks, &vm, &mut helpers, docker).await?;
    Ok(Running { vm, tasks, exits: restored.exits })
}

/// The disk's fd, open and locked. A keeper that could not lock it has none.
fn take_disk(fds: &mut HashMap<String, OwnedFd>, paths: &Paths) -> Result<OwnedFd, StartError> {
    fds.remove(keeper::DISK).ok_or_else(|| StartError::DiskInUse(paths.disk()))
}

/// Notes the VM before anything of it is started.
fn begin_record(
    profile: &Profile,
    passages: Passages,
    paths: &Paths,
    image: &Image,
    accelerator: Accelerator,
) -> Result<Ledger, StartError> {
    let begin = || -> io::Result<Ledger> {
        let record = Record {
            host_boot: host_boot()?,
            phase: Phase::Starting,
            acceleration: accelerator.name().to_owned(),
            cpus: profile.cpus,
            memory_mib: profile.memory_mib,
            disk_gib: profile.disk_gib,
            image: image.folder().to_owned(),
            activate: profile.activate,
            network: NetworkKind::Slirp,
            shares: share_records(profile)?,
            passages,
            subnet: (profile.subnets.vm.network(), profile.subnets.vm.prefix_len()),
            processes: Vec::new(),
        };
        Ledger::begin(paths, record)
    };
    begin().map_err(|source| StartError::File {
        what: "write the VM's record to",
        path: paths.run_dir().to_owned(),
        source,
    })
}

/// The profile's ports and sockets, and the way to the ssh-agent at `agent` where the profile asks for it.
fn passages(profile: &Profile, agent: Option<&OsStr>, state: &State) -> Passages {
    let mut passages = profile.passages.clone();
    match agent.map(PathBuf::from).filter(|path| path.is_absolute()) {
        _ if !profile.forward_agent => {}
        Some(host) => {
            passages.sockets.push(SocketRule { listen: Side::Guest, host, guest: AGENT_SOCKET.to_owned() });
        }
        None => state.notice(
            "forward-agent is on, and no ssh-agent is known here: SSH_AUTH_SOCK is not set".to_owned(),
        ),
    }
    passages
}

/// The profile's environment, and where the ssh-agent is in the guest.
fn environment(profile: &Profile, passages: &Passages) -> Vec<(String, String)> {
    let mut environment = profile.environment.clone();
    let has_agent = passages.sockets.iter().any(|rule| rule.guest == AGENT_SOCKET);
    if has_agent && environment.iter().all(|(name, _)| name != "SSH_AUTH_SOCK") {
        environment.push(("SSH_AUTH_SOCK".to_owned(), AGENT_SOCKET.to_owned()));
    }
    environment
}

fn share_records(profile: &Profile) -> io::Result<Vec<ShareRecord>> {
    let shares = (1..).zip(&profile.mounts);
    shares
        .map(|(number, spec)| {
            let mut session = [0; 16];
            getrandom::fill(&mut session).map_err(|error| io::Error::other(error.to_string()))?;
            Ok(ShareRecord { number, path: spec.path.clone(), read_only: spec.read_only, session })
        })
        .collect()
}

/// Shows what the record says of the VM.
pub fn show(record: &Record, state: &State) {
    let Record { acceleration, image, .. } = record.clone();
    let (cpus, memory_mib, disk_gib) = (record.cpus, record.memory_mib, record.disk_gib);
    state.learn(|facts| {
        let Facts { processes, daemons, mounts, .. } = std::mem::take(facts);
        *facts = Facts { acceleration, cpus, memory_mib, disk_gib, image, processes, daemons, mounts };
    });
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

/// The secret of the guest that runs.
///
/// # Errors
/// When there is none.
pub fn read_secret(paths: &Paths) -> Result<Secret, StartError> {
    let path = secret_file(paths);
    let bytes = std::fs::read(&path).and_then(|bytes| {
        <[u8; 32]>::try_from(bytes).map_err(|bytes| {
            let problem = format!("{} bytes where a secret has 32", bytes.len());
            io::Error::new(io::ErrorKind::InvalidData, problem)
        })
    });
    bytes.map(Secret).map_err(|source| StartError::File { what: "read", path, source })
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
    network: Option<command::Network>,
    boot: &BootConfig,
) -> Result<command::Vm, StartError> {
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
    Ok(command::Vm {
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

/// Where the context before ours is remembered.
pub fn context_file(paths: &Paths) -> PathBuf {
    paths.state_dir().join("docker-context")
}
