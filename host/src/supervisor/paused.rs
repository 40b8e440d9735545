//! A VM that QEMU has paused because the host's disk is full: says so, and lets it go on when there is
//! room. Nothing that the guest wrote is lost; the write that did not fit is done then.

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
/// What `dhow status` sorts this problem under.
const TOPIC: &str = "disk";

/// Where the VM is paused for want of disk, waits for room and lets it go on; returns at once
/// otherwise.
pub async fn go_on(vm: &Vm) {
    match is_paused(vm).await {
        Ok(true) => {}
        Ok(false) => return,
        Err(error) => {
            tracing::warn!(
                error = crate::errors::chain(&error),
                "QEMU does not say whether the VM is paused"
            );
            return;
        }
    }
    let disk = vm.paths.disk();
    vm.state.problem(
        TOPIC,
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
        if !is_paused(vm).await.unwrap_or(true) {
            break;
        }
    }
    vm.state.problem(TOPIC, None);
}

async fn is_paused(vm: &Vm) -> Result<bool, QmpError> {
    let mut qmp = Qmp::connect(&vm.paths.qmp_socket(), QMP_DEADLINE).await?;
    let status = qmp.execute("query-status", json!({})).await?;
    // RunState: "the last IOP has failed and the device is configured to pause on I/O errors".
    Ok(status["status"] == "io-error")
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
