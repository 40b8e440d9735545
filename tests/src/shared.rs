//! The VM that most cases share: started when the first one needs it, replaced when a failure broke it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::report;
use super::vm::Vm;

/// Starts that may fail before the cases that need one fail at once.
const ATTEMPTS: u32 = 2;
/// How long a healthy VM may take to say so.
const HEALTH: Duration = Duration::from_secs(60);

struct Shared {
    vm: Option<Arc<Vm>>,
    failed: u32,
}

static SHARED: Mutex<Shared> = Mutex::new(Shared { vm: None, failed: 0 });

/// The shared VM, with the test image and the guest tool in it.
///
/// # Panics
/// When it does not start.
pub fn get() -> Arc<Vm> {
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(vm) = &shared.vm {
        return Arc::clone(vm);
    }
    assert!(shared.failed < ATTEMPTS, "the shared VM did not start {ATTEMPTS} times; see the first failures");
    // Taken back once it is up.
    shared.failed += 1;
    let vm = Vm::new();
    vm.start(&vm.share().each_ref().map(String::as_str));
    vm.import_image();
    vm.install_tool();
    shared.failed -= 1;
    let vm = Arc::new(vm);
    shared.vm = Some(Arc::clone(&vm));
    vm
}

/// After a failed case: brings back a VM that others can use.
pub fn mend() {
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(vm) = &shared.vm else { return };
    let well = |command: super::command::Cmd| {
        command.deadline(HEALTH).spawn().try_wait().is_ok_and(|output| output.status.success())
    };
    let healthy = well(vm.exec(&["true"])) && well(vm.docker(&["version"]));
    // Containers that the case left may hold ports and names.
    let clean = "ids=$(docker ps -aq); [ -z \"$ids\" ] || docker rm -f $ids";
    if !healthy || !well(vm.sh(clean)) {
        shared.vm = None;
    }
}

/// Stops it, if it runs, and checks that nothing of it is left.
pub fn stop() {
    let vm = SHARED.lock().unwrap_or_else(PoisonError::into_inner).vm.take();
    let Some(vm) = vm else { return };
    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| vm.stop())).is_err() {
        let failure = report::failure();
        report::fault(format!("the shared VM did not stop well: {}{}", failure.words, failure.logs));
    }
}
