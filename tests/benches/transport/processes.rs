//! What the processes cost: private memory, and processor time and wakeups while nothing happens.

use std::time::{Duration, Instant};

use dhow_tests::Vm;

/// How long nothing happens.
const IDLE: Duration = Duration::from_secs(10);

/// The host's processes that matter: name, and what its command line holds.
const HOST: [(&str, &str); 3] =
    [("keeper", " keeper "), ("supervisor", " supervisor "), ("vsock device", " vsock-device ")];

/// RssAnon in MiB of each process, the agent's two in the guest among them.
///
/// # Panics
/// When one is missing.
pub fn memory(vm: &Vm) -> Vec<(String, f64)> {
    let mut found: Vec<_> = HOST
        .iter()
        .map(|(name, part)| {
            let status = std::fs::read_to_string(format!("/proc/{}/status", vm.pid_of(part)));
            ((*name).to_owned(), anonymous(&status.expect("a process of the VM")))
        })
        .collect();
    let script = "for pid in 1 $(cat /proc/1/task/1/children); do
        case $(tr '\\0' ' ' </proc/$pid/cmdline) in *serve*) cat /proc/$pid/status;; esac; done";
    let status = vm.sh(script).ok();
    found.push(("worker in the guest".to_owned(), anonymous(&status)));
    found.push(("init in the guest".to_owned(), anonymous(&vm.exec(&["cat", "/proc/1/status"]).ok())));
    found
}

/// proc_pid_status(5): "RssAnon: N kB", in MiB.
fn anonymous(status: &str) -> f64 {
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let number = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<f64>().ok());
    number.unwrap_or_else(|| panic!("no RssAnon in {status:?}")) / 1024.0
}

/// Percent of a core, and wakeups a second.
#[derive(Debug, Clone, Copy)]
pub struct Cost {
    /// Percent of a core.
    pub percent: f64,
    /// Voluntary context switches a second.
    pub wakeups: f64,
}

/// What each process of the host costs while nobody uses the VM.
///
/// # Panics
/// When one is missing.
pub fn idle(vm: &Vm) -> Vec<(String, Cost)> {
    let pids = HOST.map(|(name, part)| (name, vm.pid_of(part)));
    let begin = Instant::now();
    let before = pids.map(|(_, pid)| usage(pid));
    // Nothing to wait for: that nothing happens is what is measured.
    std::thread::sleep(IDLE);
    let seconds = begin.elapsed().as_secs_f64();
    pids.iter()
        .zip(before)
        .map(|((name, pid), before)| {
            let now = usage(*pid);
            let cost =
                Cost { percent: (now.0 - before.0) * 100.0 / seconds, wakeups: (now.1 - before.1) / seconds };
            ((*name).to_owned(), cost)
        })
        .collect()
}

/// Seconds on a processor and voluntary switches so far, of all threads.
fn usage(pid: i32) -> (f64, f64) {
    let mut total = (0.0, 0.0);
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("its threads");
    for task in tasks.flatten() {
        let read = |name: &str| std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
        // proc_pid_schedstat: nanoseconds on the processor come first.
        let nanoseconds = read("schedstat").split(' ').next().and_then(|word| word.parse::<f64>().ok());
        let status = read("status");
        let switches = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        total.0 += nanoseconds.unwrap_or_default() / 1e9;
        total.1 += switches.and_then(|word| word.trim().parse::<f64>().ok()).unwrap_or_default();
    }
    total
}
