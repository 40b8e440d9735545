//! The steps from a running VM to nothing left.

use std::time::Duration;

use dhow_protocol::control::ControlRequest;
use tokio::io::unix::AsyncFd;

use super::start::{Running, context_file};
use super::state::State;
use crate::docker;

/// How long the guest may take to end its containers, write back and power off.
const POWER_OFF_DEADLINE: Duration = Duration::from_secs(60);
/// How long the agent may take to say that it begins.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);

/// Takes everything down. With `force` the guest is not waited for: its disk is as after a power
/// cut. What is left is ended by the keeper.
pub async fn take_down(running: &mut Running, force: bool, state: &State) {
    let notices = docker::deactivate(&running.profile, &context_file(&running.paths)).await;
    for notice in notices {
        state.notice(notice);
    }
    if !force {
        state.step("stopping the VM", power_off(running, state)).await;
    }
    running.services.abort_all();
    running.forwards.clear();
    state.set_guest(None);
}

async fn power_off(running: &Running, state: &State) {
    if let Err(error) = running.guest.control.request(ControlRequest::PowerOff, REQUEST_DEADLINE).await {
        state
            .notice(format!("the guest did not take the stop ({}); ending it", crate::errors::chain(&error)));
        return;
    }
    // SAFETY: the duplicate is owned by the AsyncFd and never taken out or replaced while it lives.
    let waiting =
        running.qemu.pidfd.try_clone().and_then(|fd| unsafe { AsyncFd::register(fd) }.map_err(Into::into));
    let Ok(waiting) = waiting else { return };
    if tokio::time::timeout(POWER_OFF_DEADLINE, waiting.readable()).await.is_err() {
        state.notice(format!(
            "the guest did not power off within {} s; ending it",
            POWER_OFF_DEADLINE.as_secs()
        ));
    }
}
