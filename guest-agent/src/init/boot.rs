//! The order of the boot's steps.

use dhow_protocol::errors::chain;
use std::ffi::OsString;
use std::fmt::Write;
use std::io;
use std::time::{Duration, Instant};

use dhow_parent::{Limits, Parent, WorkerCommand};
use rustix::time::ClockId;

use super::error::InitError;
use super::{PATH, button, data, filesystems, firmware, listener, log, modules, network, root, settings};

/// Names under which PID 1 holds what it gives each worker.
pub mod held {
    /// The vsock listener: bound, listening, non-blocking.
    pub const LISTENER: &str = "listener";
    /// Sealed memfd with the boot configuration's bytes. The offset is shared: read at positions.
    pub const BOOT: &str = "boot";
    /// Sealed memfd with the 32 bytes of the boot secret. The offset is shared: read at positions.
    pub const SECRET: &str = "secret";
}

/// Times each step for the log, which is not there before the first ones are over.
struct Steps {
    begin: Instant,
    done: Vec<(&'static str, Duration)>,
}

impl Steps {
    fn take<T>(&mut self, name: &'static str, step: impl FnOnce() -> T) -> T {
        let (result, time) = timed(step);
        self.done.push((name, time));
        result
    }

    fn log(&self) {
        let mut steps = String::new();
        for (name, time) in &self.done {
            // To a string: it cannot fail.
            let _ = write!(steps, " {name} {}", time.as_millis());
        }
        let kernel = Duration::try_from(rustix::time::clock_gettime(ClockId::Boottime)).unwrap_or_default();
        let own = self.begin.elapsed();
        tracing::info!(
            "booted: kernel {} ms, then {} ms:{steps}",
            kernel.saturating_sub(own).as_millis(),
            own.as_millis()
        );
    }
}

fn timed<T>(step: impl FnOnce() -> T) -> (T, Duration) {
    let begin = Instant::now();
    (step(), begin.elapsed())
}

/// Brings the system up, as far as the worker can be started.
///
/// # Errors
/// The step that failed; the guest is of no use then.
pub(crate) fn boot() -> Result<Parent, InitError> {
    let mut steps = Steps { begin: Instant::now(), done: Vec::new() };
    let missing = steps.take("filesystems", filesystems::mount_all)?;
    settings::unlimited_kmsg();
    filesystems::redirect_stdio()?;
    let left_out = steps.take("modules", modules::insert_all)?;
    let firmware = steps.take("firmware", firmware::read)?;
    log::to_file(&firmware.config.log_filter);
    super::power_off_on_panic();
    for error in missing {
        tracing::info!(error = chain(&error), "this kernel lacks a filesystem");
    }
    for (module, error) in left_out {
        tracing::info!(%error, module = %module.display(), "a kernel module was left out");
    }
    firmware::close();
    settings::set_clock(&firmware.config);
    steps.take("root", root::switch)?;
    // The disk is mostly waited for: meanwhile the rest is done.
    let data_disk = std::thread::scope(|scope| {
        let data_disk = std::thread::Builder::new()
            .spawn_scoped(scope, || timed(data::mount_disk))
            .map_err(|error| InitError::System("start a thread", error))?;
        steps.take("settings", || {
            settings::apply();
            settings::control_groups()
        })?;
        steps.take("network", || {
            network::configure(&firmware.config);
            network::set_names(&firmware.config)
        })?;
        data_disk.join().map_err(|_| InitError::System("wait for a thread", io::ErrorKind::Other.into()))
    })?;
    steps.done.push(("data disk", data_disk.1));
    data_disk.0?;
    filesystems::share_root()?;
    let listener = steps.take("listener", listener::open)?;
    let mut parent = Parent::new(worker(), Limits::default(), true)
        .map_err(|error| InitError::System("redirect signals", error))?;
    parent.hold(held::LISTENER, listener);
    parent.hold(held::BOOT, firmware.config_fd);
    parent.hold(held::SECRET, firmware.secret_fd);
    // After the parent has blocked the signals, so that the thread inherits that.
    button::watch();
    steps.log();
    Ok(parent)
}

fn worker() -> WorkerCommand {
    let env = [("PATH", PATH), ("HOME", "/root"), ("LANG", "C.UTF-8")];
    WorkerCommand {
        argv: vec![OsString::from(root::AGENT_PATH), OsString::from("serve")],
        env: env.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
    }
}
