//! Brings back what has died while QEMU lives: the vsock device, the control stream, passt. Shares heal
//! themselves (`shares.rs`), streams are opened again by their services.
//!
//! Each task waits on a pidfd or a stream, costs nothing until that ends, and tries for as long as QEMU
//! lives; meanwhile `dhow status` says what is wrong. A process that is merely stopped (SIGSTOP) is
//! never replaced.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use dhow_parent::SpawnedChild;
use dhow_protocol::boot::WORKER_GAVE_UP;
use dhow_protocol::control::Event;
use dhow_protocol::stream::StreamHeader;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::Signal;
use tokio::sync::mpsc;

use super::control::Control;
use super::logs::log_end;
use super::network;
use super::paused;
use super::processes::{ProcessError, ended, has_ended};
use super::services;
use super::vm::Vm;
use crate::config::Paths;
use crate::qemu::hotplug::{self, HotplugError};
use crate::qemu::qmp::{Qmp, QmpError};
use crate::vsock::client::DeviceClient;

/// One attempt to reach the agent.
const CONTROL_ATTEMPT: Duration = Duration::from_secs(5);
/// How long QEMU may take for one command.
const QMP_DEADLINE: Duration = Duration::from_secs(10);
/// Who lived that long does not die of its start.
const STEADY: Duration = Duration::from_secs(60);
/// How long the agent may take to say what it is.
const INFO_DEADLINE: Duration = Duration::from_secs(10);

/// Lines of the guest's console in which PID 1 would have said so lately.
const CONSOLE_LINES: usize = 8;

/// Growing pauses between attempts.
pub struct Pause {
    first: Duration,
    next: Duration,
    longest: Duration,
}

impl Pause {
    /// The first pause and the longest.
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self { first, next: first, longest }
    }

    /// It worked: the next pause is the first one again.
    pub fn reset(&mut self) {
        self.next = self.first;
    }

    /// Pauses.
    pub async fn wait(&mut self) {
        tokio::time::sleep(self.next).await;
        self.next = (self.next * 2).min(self.longest);
    }
}

/// Why a new device is not there.
#[derive(Debug, thiserror::Error)]
enum DeviceError {
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error("the control socket of the vsock device cannot be reached")]
    Connect(#[source] io::Error),
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error(transparent)]
    Hotplug(#[from] HotplugError),
}

/// Keeps a connection to the vsock device, and a device; `device` is the one that there is, if any, and
/// `adopted` whether it is an earlier supervisor's.
pub async fn keep_device(vm: Arc<Vm>, mut device: Option<SpawnedChild>, adopted: bool) {
    const TOPIC: &str = "device";
    if let Some(child) = device.as_ref().filter(|child| adopted && !has_ended(&child.pidfd))
        && !is_plugged(&vm).await
    {
        tracing::warn!("the vsock device was never plugged in: its supervisor died before that");
        give_up(child).await;
    }
    let mut pause = Pause::new(Duration::from_millis(50), Duration::from_secs(2));
    loop {
        let reached = match &device {
            Some(child) if !has_ended(&child.pidfd) => connect(&vm.paths).map_err(DeviceError::Connect),
            _ => replace(&vm).await.map(|(child, client)| {
                device = Some(child);
                client
            }),
        };
        match reached {
            Ok(client) => {
                vm.device.send_replace(Some(client.clone()));
                vm.state.problem(TOPIC, None);
                pause.reset();
                let dead = async {
                    match &device {
                        Some(child) => ended(&child.pidfd).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    () = dead => {}
                    () = client.gone() => {}
                }
                vm.device.send_replace(None);
                vm.state
                    .problem(TOPIC, Some("the vsock device has died; a new one is plugged in".to_owned()));
            }
            Err(error) => {
                let problem = format!("no vsock device: {}", crate::errors::chain(&error));
                vm.state.problem(TOPIC, Some(problem));
                pause.wait().await;
            }
        }
        if has_ended(&vm.qemu.pidfd) {
            return;
        }
    }
}

/// A connection to the device's control socket.
fn connect(paths: &Paths) -> io::Result<DeviceClient> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(paths.device_control_socket())?)?;
    DeviceClient::new(socket)
}

/// Plugs a new device in where a dead one was.
async fn replace(vm: &Vm) -> Result<(SpawnedChild, DeviceClient), DeviceError> {
    let mut qmp = Qmp::connect(&vm.paths.qmp_socket(), QMP_DEADLINE).await?;
    hotplug::unplug_vsock(&mut qmp).await?;
    let child = vm.processes().vsock_device().await?;
    let plugged = async {
        hotplug::plug_vsock(&mut qmp, &vm.paths.device_socket()).await?;
        connect(&vm.paths).map_err(DeviceError::Connect)
    };
    match plugged.await {
        Ok(client) => {
            vm.pass_over_qemu_log();
            Ok((child, client))
        }
        Err(error) => {
            tracing::warn!("a new vsock device could not be plugged in; it is ended");
            give_up(&child).await;
            Err(error)
        }
    }
}

/// Ends a device that QEMU does not know of: it would wait for ever. The next attempt brings its own.
async fn give_up(child: &SpawnedChild) {
    if let Err(error) = rustix::process::pidfd_send_signal(&child.pidfd, Signal::KILL) {
        tracing::debug!(%error, "the vsock device has ended already");
    }
    ended(&child.pidfd).await;
}

/// Whether QEMU has a vsock device. One that does not answer for now is not doubted.
async fn is_plugged(vm: &Vm) -> bool {
    match Qmp::connect(&vm.paths.qmp_socket(), QMP_DEADLINE).await {
        Ok(mut qmp) => hotplug::is_plugged(&mut qmp).await.unwrap_or(true),
        Err(_) => true,
    }
}

/// Keeps a control stream to the agent, and hands on its events.
pub async fn keep_control(vm: Arc<Vm>) {
    const TOPIC: &str = "agent";
    let mut before = false;
    let mut pause = Pause::new(Duration::from_millis(20), Duration::from_millis(500));
    loop {
        match vm.guest.opener.open_here(&StreamHeader::Control, CONTROL_ATTEMPT).await {
            Ok(stream) => {
                let (control, events) = Control::new(stream);
                vm.control.send_replace(Some(Arc::new(control)));
                vm.state.problem(TOPIC, None);
                before = true;
                pause.reset();
                tokio::join!(learn_daemons(&vm), follow(&vm, events));
                vm.control.send_replace(None);
                let problem = "the guest's agent has gone; it is looked for".to_owned();
                vm.state.problem(TOPIC, Some(problem));
            }
            Err(error) => {
                let error = crate::errors::chain(&error);
                tracing::debug!(error, "the agent does not answer");
                // A guest that boots is no problem yet; the start has a deadline of its own.
                if before || vm.ledger.record().phase != super::record::Phase::Starting {
                    let problem = format!("the guest's agent does not answer ({}): {error}", silence(&vm));
                    vm.state.problem(TOPIC, Some(problem));
                    paused::look(&vm).await;
                }
                pause.wait().await;
            }
        }
    }
}

/// Why the agent may be silent, as far as the end of the guest's console tells.
fn silence(vm: &Vm) -> &'static str {
    let console = log_end(&vm.paths.log_dir().join("console.log"), CONSOLE_LINES);
    if console.contains(WORKER_GAVE_UP) {
        "its worker has ended too often, and is started again within 30 s; `dhow logs agent` then says why"
    } else {
        "`dhow logs console` may say why"
    }
}

async fn learn_daemons(vm: &Vm) {
    match vm.guest.info(INFO_DEADLINE).await {
        Ok(info) => info.daemons.into_iter().for_each(|daemon| services::learn_daemon(&vm.state, daemon)),
        Err(error) => {
            tracing::warn!(error = crate::errors::chain(&error), "the agent did not say what it is")
        }
    }
}

async fn follow(vm: &Vm, mut events: mpsc::Receiver<Event>) {
    while let Some(event) = events.recv().await {
        match event {
            Event::Daemon(status) => services::learn_daemon(&vm.state, status),
            Event::Warning(text) => tracing::warn!(?text, "the guest warns"),
        }
    }
}

/// Keeps passt; `passt` is the one that there is, if any.
pub async fn keep_passt(vm: Arc<Vm>, mut passt: Option<SpawnedChild>, reconnects: bool) {
    const TOPIC: &str = "network";
    let mut pause = Pause::new(Duration::from_millis(100), Duration::from_secs(10));
    loop {
        if let Some(child) = &passt {
            let begun = tokio::time::Instant::now();
            ended(&child.pidfd).await;
            if begun.elapsed() > STEADY {
                pause.reset();
            }
        }
        // It ends with QEMU, too.
        tokio::time::sleep(Duration::from_millis(100)).await;
        if has_ended(&vm.qemu.pidfd) {
            return;
        }
        if !reconnects {
            let problem = "passt has died, and this QEMU does not connect to a new one: the guest has no \
                           network until `dhow restart`";
            vm.state.problem(TOPIC, Some(problem.to_owned()));
            return;
        }
        let (address, prefix) = vm.ledger.record().subnet;
        let Ok(net) = ipnet::Ipv4Net::new(address, prefix) else { return };
        passt = match network::start_passt(&vm.processes(), net).await {
            Ok(Some(child)) => {
                vm.state.problem(TOPIC, None);
                Some(child)
            }
            Ok(None) => {
                vm.state.problem(TOPIC, Some("passt has died and is no longer installed".to_owned()));
                None
            }
            Err(error) => {
                vm.state.problem(TOPIC, Some(format!("passt: {}", crate::errors::chain(&error))));
                None
            }
        };
        pause.wait().await;
    }
}
