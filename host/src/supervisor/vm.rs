//! What a running VM is to its supervisor, however it came to it: started or adopted.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dhow_parent::{Exit, ParentLink, SpawnedChild};
use dhow_protocol::hello::Secret;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::control::Control;
use super::guest::{Guest, Opener};
use super::ledger::Ledger;
use super::logs::{log_end_after, log_length};
use super::processes::{Processes, QEMU_NAME, ended};
use super::state::State;
use crate::config::Paths;
use crate::forward::Forwards;
use crate::vsock::client::DeviceClient;

/// How long the keeper may take to tell how QEMU ended, once it has: it tells at once.
const STATUS_DEADLINE: std::time::Duration = std::time::Duration::from_secs(1);

/// What the tasks of a VM share.
pub struct Vm {
    /// The way to the keeper.
    pub link: ParentLink,
    /// Where everything lies.
    pub paths: Paths,
    /// What the API shows.
    pub state: Arc<State>,
    /// What a successor must know.
    pub ledger: Ledger,
    /// QEMU. When it ends, so does the VM.
    pub qemu: SpawnedChild,
    /// The way to the agent.
    pub guest: Guest,
    /// The port forwards.
    pub forwards: Arc<Forwards>,
    /// The current connection to the vsock device.
    pub device: watch::Sender<Option<DeviceClient>>,
    /// The current control stream.
    pub control: watch::Sender<Option<Arc<Control>>>,
    /// Bytes of QEMU's log that say nothing of how it ends.
    log_noted: AtomicU64,
}

/// What a VM is made of.
pub struct Parts {
    /// As in [`Vm`], likewise the others.
    pub link: ParentLink,
    /// Likewise.
    pub paths: Paths,
    /// Likewise.
    pub state: Arc<State>,
    /// Likewise.
    pub ledger: Ledger,
    /// Likewise.
    pub qemu: SpawnedChild,
    /// Likewise.
    pub forwards: Arc<Forwards>,
    /// Secret of this boot of the guest.
    pub secret: Secret,
}

impl Vm {
    /// A VM whose device and agent are not reached yet.
    pub fn new(parts: Parts) -> Arc<Self> {
        let Parts { link, paths, state, ledger, qemu, forwards, secret } = parts;
        let (device, devices) = watch::channel(None);
        let (control, controls) = watch::channel(None);
        let guest = Guest::new(Opener::new(devices, secret), controls);
        let log_noted = AtomicU64::new(0);
        Arc::new(Self { link, paths, state, ledger, qemu, guest, forwards, device, control, log_noted })
    }

    fn qemu_log(&self) -> PathBuf {
        self.paths.log_dir().join("qemu.log")
    }

    /// What QEMU has said until now is no reason of a later end: complaints of a dead device.
    pub fn pass_over_qemu_log(&self) {
        self.log_noted.store(log_length(&self.qemu_log()), Ordering::Relaxed);
    }

    /// The end of QEMU's log, where that may be a reason.
    pub fn qemu_log_end(&self) -> String {
        log_end_after(&self.qemu_log(), self.log_noted.load(Ordering::Relaxed), 5)
    }

    /// Starts further processes of it.
    pub fn processes(&self) -> Processes<'_> {
        Processes { link: &self.link, paths: &self.paths, state: &self.state, ledger: &self.ledger }
    }
}

/// A VM and what this supervisor does for it.
pub struct Running {
    /// The VM.
    pub vm: Arc<Vm>,
    /// Services and healing. Dropping the set ends them.
    pub tasks: JoinSet<()>,
    /// Ends of the keeper's children.
    pub exits: mpsc::UnboundedReceiver<Exit>,
}

impl Running {
    /// Waits until QEMU has ended; says how.
    pub async fn ended(&mut self) -> String {
        ended(&self.vm.qemu.pidfd).await;
        let pid = self.vm.qemu.pid;
        let told = async {
            while let Some(exit) = self.exits.recv().await {
                if exit.name == QEMU_NAME && exit.pid == pid {
                    return Some(exit.status);
                }
            }
            None
        };
        let status = tokio::time::timeout(STATUS_DEADLINE, told).await.ok().flatten();
        format!("{}{}", sentence(status), self.vm.qemu_log_end())
    }
}

/// How QEMU ended, of a status as wait(2) gives it.
pub fn sentence(status: Option<i32>) -> String {
    use std::os::unix::process::ExitStatusExt;
    let known = status.filter(|status| *status != dhow_parent::STATUS_UNKNOWN);
    let Some(status) = known.map(std::process::ExitStatus::from_raw) else {
        return "QEMU ended by itself".to_owned();
    };
    match (status.signal(), status.code()) {
        (Some(signal), _) => {
            let name = nix::sys::signal::Signal::try_from(signal).map_or("unknown", |signal| signal.as_str());
            format!("QEMU was killed by signal {signal} ({name})")
        }
        (None, Some(0)) => "the guest powered off by itself, or its kernel gave up".to_owned(),
        (None, code) => format!("QEMU ended with exit status {}", code.unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn how_qemu_ended_is_said() {
        assert_eq!(super::sentence(Some(9)), "QEMU was killed by signal 9 (SIGKILL)");
        assert_eq!(super::sentence(Some(256)), "QEMU ended with exit status 1");
        for unknown in [None, Some(dhow_parent::STATUS_UNKNOWN)] {
            assert_eq!(super::sentence(unknown), "QEMU ended by itself");
        }
    }
}
