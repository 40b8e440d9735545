//! A VM that does not run although QEMU does. One that is paused because the host's disk is full goes on
//! when there is room: nothing that the guest wrote is lost, the write that did not fit is done then.

use std::path::Path;
use std::time::Duration;

use serde_json::json;

use super::vm::Vm;
use crate::qemu::qmp::{Qmp, QmpError};

/// How long QEMU may take for one command.
const QMP_DEADLINE: Duration = Duration::from_secs(5);
/// How often the disk's room is looked at while the VM is paused.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// Bytes that must be free for the VM to go on: with fewer it would be paused again at once.
const ROOM: u64 = 64 << 20;
/// What `dhow status` sorts these problems under.
const QEMU: &str = "qemu";
/// "the last IOP has failed and the device is configured to pause on I/O errors"
const FULL_DISK: &str = "io-error";
/// "guest is actively running"
const RUNNING: &str = "running";

/// Looks why a guest is silent. Where the VM is paused for want of disk, waits for room and lets it go
/// on; returns at once otherwise.
pub async fn look(vm: &Vm) {
    let state = match run_state(vm).await {
        Ok(state) => state,
        Err(error) => {
            tracing::warn!(error = crate::errors::chain(&error), "QEMU does not say what the VM does");
            return;
        }
    };
    if state != FULL_DISK {
        let problem = (state != RUNNING).then(|| format!("QEMU says that the VM is in state {state:?}"));
        vm.state.problem(QEMU, problem);
        return;
    }
    let disk = vm.paths.disk();
    vm.state.problem(
        QEMU,
        Some(format!(
            "the host's disk is full: the VM is paused and goes on when there are {} MiB free where {} lies",
            ROOM >> 20,
            disk.display()
        )),
    );
    loop {
        if free(&disk).is_none_or(|free| free >= ROOM)
            && let Err(error) = resume(vm).await
        {
            tracing::warn!(error = crate::errors::chain(&error), "the VM cannot go on");
        }
        tokio::time::sleep(LOOK_AGAIN).await;
        if run_state(vm).await.is_ok_and(|state| state != FULL_DISK) {
            break;
        }
    }
    answers(vm);
}

/// Waits until the VM is paused for want of disk: a start that waits for such a guest is told so instead.
pub async fn full_disk(vm: &Vm) {
    loop {
        tokio::time::sleep(LOOK_AGAIN).await;
        // QEMU's end is looked for elsewhere.
        if run_state(vm).await.is_ok_and(|state| state == FULL_DISK) {
            return;
        }
    }
}

/// Whether the VM does not run, so that nothing that is asked of the guest can happen.
pub async fn stands_still(vm: &Vm) -> bool {
    run_state(vm).await.is_ok_and(|state| state != RUNNING)
}

/// The guest answers, so it runs.
pub fn answers(vm: &Vm) {
    vm.state.problem(QEMU, None);
}

/// QEMU's `RunState` (qapi/run-state.json).
async fn run_state(vm: &Vm) -> Result<String, QmpError> {
    let mut qmp = Qmp::connect(&vm.paths.qmp_socket(), QMP_DEADLINE).await?;
    let status = qmp.execute("query-status", json!({})).await?;
    Ok(status["status"].as_str().unwrap_or_default().to_owned())
}

async fn resume(vm: &Vm) -> Result<(), QmpError> {
    let mut qmp = Qmp::connect(&vm.paths.qmp_socket(), QMP_DEADLINE).await?;
    qmp.execute("cont", json!({})).await.map(drop)
}

/// Bytes that this user may still write where `path` lies.
fn free(path: &Path) -> Option<u64> {
    let space = rustix::fs::statvfs(path).ok()?;
    Some(space.f_bavail.saturating_mul(space.f_frsize))
}
