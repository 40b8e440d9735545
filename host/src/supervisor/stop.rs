//! The steps from a running VM to nothing left.

use std::time::Duration;

use dhow_parent::SpawnedChild;
use dhow_protocol::control::ControlRequest;
use tokio::task::JoinSet;

use super::paused;
use super::processes::{QEMU_NAME, end, ended};
use super::record::{Phase, Record};
use super::start::context_file;
use super::state::State;
use super::vm::{Running, Vm};
use crate::config::Paths;
use crate::docker;
use crate::qemu::qmp::{Qmp, QmpError};

/// How long the guest may take to end its containers, write back and power off.
const POWER_OFF_DEADLINE: Duration = Duration::from_secs(60);
/// How long the agent may take to say that it begins.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);
/// How long QEMU may take for one command.
const QMP_DEADLINE: Duration = Duration::from_secs(3);
/// How long QEMU may take to write back and end.
const QEMU_GRACE: Duration = Duration::from_secs(5);
/// How long those may take that end by themselves when QEMU has gone.
const SETTLE: Duration = Duration::from_millis(200);
/// How long the others may take.
const GRACE: Duration = Duration::from_secs(2);

/// Takes everything down. With `force` the guest is not waited for: its disk is as after a power cut.
pub async fn take_down(running: &mut Running, force: bool, state: &State) {
    let Running { vm, tasks, .. } = running;
    // A successor would go on with the stop.
    vm.ledger.change(|record| record.phase = Phase::Stopping);
    let notices = docker::deactivate(vm.paths.profile().as_str(), &context_file(&vm.paths)).await;
    for notice in notices {
        state.notice(notice);
    }
    if !force {
        state.step("stopping the VM", power_off(vm, tasks, state)).await;
    }
    tasks.shutdown().await;
    vm.forwards.clear();
    state.set_guest(None);
    end_all(&vm.paths, &[], state).await;
}

async fn power_off(vm: &Vm, tasks: &mut JoinSet<()>, state: &State) {
    let asking = vm.guest.request(ControlRequest::PowerOff, REQUEST_DEADLINE);
    let answer = tokio::select! {
        answer = asking => answer,
        () = ended(&vm.qemu.pidfd) => return,
    };
    if let Err(error) = answer {
        let error = crate::errors::chain(&error);
        if paused::stands_still(vm).await {
            state.notice(format!("the VM is paused and cannot power off ({error}); ending it"));
            return;
        }
        if let Err(no_button) = press_power_button(vm).await {
            let no_button = crate::errors::chain(&no_button);
            state.notice(format!("the guest did not take the stop ({error}; {no_button}); ending it"));
            return;
        }
        state.notice(format!(
            "the guest's agent did not take the stop ({error}); its power button is pressed"
        ));
    }
    // What ends from here on is not to be brought back. Streams that are open go on in their processes.
    tasks.shutdown().await;
    if tokio::time::timeout(POWER_OFF_DEADLINE, ended(&vm.qemu.pidfd)).await.is_err() {
        state.notice(format!(
            "the guest did not power off within {} s; ending it",
            POWER_OFF_DEADLINE.as_secs()
        ));
    }
}

/// The way past the agent: PID 1 powers off as it would when asked.
async fn press_power_button(vm: &Vm) -> Result<(), QmpError> {
    let mut qmp = Qmp::connect(&vm.paths.qmp_socket(), QMP_DEADLINE).await?;
    qmp.execute("system_powerdown", serde_json::json!({})).await.map(drop)
}

/// Ends every process of the record and of `others`, QEMU first, then removes the record.
pub async fn end_all(paths: &Paths, others: &[SpawnedChild], state: &State) {
    let recorded = Record::read(paths).map(|record| record.processes).unwrap_or_default();
    let recorded: Vec<SpawnedChild> =
        recorded.iter().filter_map(super::record::ProcessRecord::find).collect();
    let all = || recorded.iter().chain(others);
    let mut stuck = Vec::new();
    for child in all().filter(|child| child.name == QEMU_NAME) {
        if !end(child, QEMU_GRACE).await {
            stuck.push(child);
        }
    }
    // They end with QEMU by themselves; all at once, so that the waits do not add up.
    let mut ending = tokio::task::JoinSet::new();
    for child in all().filter(|child| child.name != QEMU_NAME) {
        match child.try_clone() {
            Ok(child) => drop(ending.spawn(async move { (end_helper(&child).await, child) })),
            Err(_) => drop(end_helper(child).await),
        }
    }
    while ending.join_next().await.is_some() {}
    for child in &stuck {
        state.notice(format!("{} (pid {}) cannot be ended: it waits in the kernel", child.name, child.pid));
    }
    if stuck.is_empty() {
        Record::remove(paths);
    }
}

async fn end_helper(child: &SpawnedChild) -> bool {
    if tokio::time::timeout(SETTLE, ended(&child.pidfd)).await.is_ok() {
        return true;
    }
    end(child, GRACE).await
}
