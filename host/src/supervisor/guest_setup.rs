//! The steps from an agent that is about to answer to a docker that does. Each may be repeated, so that a
//! successor goes on where a supervisor was killed.

use std::sync::Arc;
use std::time::Duration;

use dhow_parent::SpawnedChild;
use tokio::net::UnixListener;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::bundles;
use super::healing;
use super::logs::log_end;
use super::paused;
use super::processes::ended;
use super::record::{NetworkKind, Phase};
use super::services;
use super::shares::{self, Server};
use super::start::{DOCKER_BUNDLE, StartError, context_file};
use super::vm::Vm;
use crate::docker;
use crate::images::store::Image;

/// How long a guest may take from QEMU's start to its agent's first answer, where DHOW_BOOT_DEADLINE (in
/// seconds) does not say otherwise: emulated on a busy machine it is slow, and yet on its way.
const BOOT_DEADLINE: Duration = Duration::from_secs(300);
/// Lines of the guest's console that an error shows: a kernel panic with its trace is among them.
const CONSOLE_LINES: usize = 80;

/// Processes of a VM that are there already.
#[derive(Default)]
pub struct Helpers {
    /// The vsock device.
    pub device: Option<SpawnedChild>,
    /// An earlier supervisor's, which may have died before it could plug it in.
    pub device_is_adopted: bool,
    /// passt.
    pub passt: Option<SpawnedChild>,
    /// File servers, by share.
    pub servers: Vec<(u32, Server)>,
}

/// Starts what keeps the VM's processes, the control stream and the logs' bounds.
pub fn heal(tasks: &mut JoinSet<()>, vm: &Arc<Vm>, helpers: &mut Helpers) {
    tasks.spawn(healing::keep_device(Arc::clone(vm), helpers.device.take(), helpers.device_is_adopted));
    tasks.spawn(healing::keep_control(Arc::clone(vm)));
    tasks.spawn(services::bound_logs(Arc::clone(vm)));
    if let NetworkKind::Passt { reconnects } = vm.ledger.record().network {
        tasks.spawn(healing::keep_passt(Arc::clone(vm), helpers.passt.take(), reconnects));
    }
}

/// Starts what keeps the shares; returns for each, in order, the end of its first attempt.
fn keep_share(
    tasks: &mut JoinSet<()>,
    vm: &Arc<Vm>,
    helpers: &mut Helpers,
    share: super::record::ShareRecord,
) -> oneshot::Receiver<()> {
    let (sender, first) = oneshot::channel();
    let at = helpers.servers.iter().position(|(number, _)| *number == share.number);
    let server = at.map(|at| helpers.servers.swap_remove(at).1);
    tasks.spawn(shares::keep(Arc::clone(vm), share, server, sender));
    first
}

/// Goes from a VM whose agent may not answer yet to a docker that does.
///
/// # Errors
/// As [`StartError`] says, also when QEMU ends meanwhile.
pub async fn finish(
    tasks: &mut JoinSet<()>,
    vm: &Arc<Vm>,
    helpers: &mut Helpers,
    docker: UnixListener,
) -> Result<(), StartError> {
    let console = vm.paths.log_dir().join("console.log");
    let steps = async {
        vm.state.step("booting the VM", first_answer(vm, &console)).await?;
        vm.state.set_guest(Some(vm.guest.clone()));
        vm.state.set_forwards(Arc::clone(&vm.forwards));
        services::start(tasks, vm);
        mount_shares(tasks, vm, helpers).await;
        let record = vm.ledger.record();
        start_docker(vm, &Image::find(Some(&record.image), &vm.paths.images_dir())?).await?;
        services::serve_docker(tasks, docker, vm);
        activate(vm, record.activate).await;
        Ok::<(), StartError>(())
    };
    tokio::select! {
        result = steps => result?,
        () = ended(&vm.qemu.pidfd) => {
            let log = vm.qemu_log_end();
            let console = log_end(&console, CONSOLE_LINES);
            return Err(StartError::QemuEnded(format!("{log}{console}")));
        }
        () = paused::full_disk(vm) => return Err(StartError::FullDisk(vm.paths.disk())),
    }
    vm.ledger.change(|record| record.phase = Phase::Started);
    Ok(())
}

/// Serves a VM whose docker has answered before: everything at once, nothing is waited for.
pub fn resume(tasks: &mut JoinSet<()>, vm: &Arc<Vm>, helpers: &mut Helpers, docker: UnixListener) {
    vm.state.set_guest(Some(vm.guest.clone()));
    vm.state.set_forwards(Arc::clone(&vm.forwards));
    services::start(tasks, vm);
    services::serve_docker(tasks, docker, vm);
    for share in vm.ledger.record().shares {
        keep_share(tasks, vm, helpers, share);
    }
}

async fn first_answer(vm: &Vm, console: &std::path::Path) -> Result<(), StartError> {
    let deadline = boot_deadline(std::env::var("DHOW_BOOT_DEADLINE").ok().as_deref());
    tokio::time::timeout(deadline, vm.guest.answers()).await.map_err(|_| StartError::Boot {
        seconds: deadline.as_secs(),
        console: log_end(console, CONSOLE_LINES),
    })
}

/// What is no number of seconds is as if it were not there.
fn boot_deadline(setting: Option<&str>) -> Duration {
    setting.and_then(|seconds| seconds.parse().ok()).map_or(BOOT_DEADLINE, Duration::from_secs)
}

async fn mount_shares(tasks: &mut JoinSet<()>, vm: &Arc<Vm>, helpers: &mut Helpers) {
    let shares = vm.ledger.record().shares;
    if shares.is_empty() {
        return;
    }
    let mount_all = async {
        for share in shares {
            let path = share.path.clone();
            // An error is that the task is gone: the VM is ending.
            let _ = keep_share(tasks, vm, helpers, share).await;
            let facts = vm.state.facts();
            let problem = facts.mounts.iter().find(|mount| mount.path == path);
            if let Some(problem) = problem.and_then(|mount| mount.problem.as_ref()) {
                vm.state.notice(format!("{} is not mounted: {problem}", path.display()));
            }
        }
    };
    vm.state.step("mounting folders", mount_all).await;
}

async fn start_docker(vm: &Vm, image: &Image) -> Result<(), StartError> {
    let (offer, file) = image.bundle(DOCKER_BUNDLE)?;
    let step = format!("installing docker {}", offer.version);
    vm.state.step(&step, bundles::install(&vm.guest, offer, &file)).await.map_err(StartError::Docker)?;
    let starting = bundles::start(&vm.guest, DOCKER_BUNDLE);
    vm.state.step("starting docker", starting).await.map_err(StartError::Docker)
}

async fn activate(vm: &Vm, make_current: bool) {
    let name = vm.paths.profile().as_str();
    let (socket, file) = (vm.paths.docker_socket(), context_file(&vm.paths));
    let activation = docker::activate(name, &socket, &file, make_current).await;
    for notice in activation.notices {
        vm.state.notice(notice);
    }
}
