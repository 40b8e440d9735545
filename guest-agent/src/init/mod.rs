//! PID 1: brings the system up, is the parent of worker and daemons, powers off. It never unwinds and
//! never ends, for then the kernel would panic.
//!
//! ```text
//! boot ──► worker runs ──► it, a signal or the power button asks for the end ──► power-off
//!   │         ▲    │
//!   │  pause ─┘◄───┘ it died too often: containers go on, errors on the console
//!   └──► a step fails: a sentence on the console, power-off
//! ```
//! `boot.rs` has the order of the steps, the other files one step each.

mod boot;
mod button;
mod console;
mod data;
mod disk;
mod error;
mod filesystems;
mod firmware;
mod listener;
pub mod log;
mod modules;
mod mountinfo;
mod network;
mod power;
mod processes;
mod program;
mod root;
mod settings;

use dhow_protocol::boot::WORKER_GAVE_UP;
use dhow_protocol::errors::chain;
use std::process::ExitCode;
use std::time::Duration;

use dhow_parent::Outcome;

pub use boot::held;
pub use root::AGENT_PATH;

/// Where programs are looked for.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Between giving the worker up and trying again: a person may have freed what it lacked.
const PAUSE: Duration = Duration::from_secs(30);

/// Brings the system up, runs the worker, powers off. Never returns.
pub fn main() -> ExitCode {
    power_off_on_panic();
    let mut parent = match boot::boot() {
        Ok(parent) => parent,
        Err(error) => {
            console::error(&format!("cannot boot: {}", chain(&error)));
            power::off(None)
        }
    };
    loop {
        let outcome = match parent.run() {
            Outcome::ShutDown => Some(Outcome::ShutDown),
            Outcome::GaveUp => {
                tracing::error!(
                    "{WORKER_GAVE_UP}: containers go on, but the host does not reach this guest; the next try is \
                     in {} seconds",
                    PAUSE.as_secs()
                );
                parent.rest(PAUSE)
            }
        };
        if outcome == Some(Outcome::ShutDown) {
            power::off(Some(parent))
        }
    }
}

/// Keeps the OOM killer from the calling process. For the worker: PID 1 is never chosen anyway, and
/// what PID 1 starts must not inherit it. Whatever the worker itself starts does.
pub fn exempt_from_oom() {
    // Only root may, and only in the guest does it matter.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
}

/// A panic of PID 1 says so on the console and powers off.
fn power_off_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        console::error(&format!("PID 1 failed: {panic}"));
        power::switch_off()
    }));
}
