//! What watching the ports costs: CPU of the worker in the guest and of the supervisor on the host.

use std::time::{Duration, Instant};

use dhow_tests::Vm;

/// How long nothing is done.
const IDLE: Duration = Duration::from_secs(60);
/// How long after a burst its reports may still be worked on.
const SETTLE: Duration = Duration::from_secs(2);
/// Clock ticks of /proc/PID/stat a second (`sysconf(_SC_CLK_TCK)` on x86-64 and arm64).
const TICKS: f64 = 100.0;

/// Seconds of CPU: user and system, the 14th and 15th field of proc_pid_stat(5).
fn seconds(stat: &str) -> f64 {
    let (_, fields) = stat.rsplit_once(')').expect("a line of /proc/PID/stat");
    let ticks = fields.split_ascii_whitespace().skip(11).take(2);
    ticks.map(|field| field.parse::<f64>().expect("a number of ticks")).sum::<f64>() / TICKS
}

/// Of worker and supervisor.
fn spent(vm: &Vm) -> [f64; 2] {
    let worker = vm.sh("cat /proc/$(pgrep -x -f '.*dhow-agent serve')/stat").ok();
    let supervisor = format!("/proc/{}/stat", vm.pid_of(" supervisor "));
    [worker, std::fs::read_to_string(&supervisor).expect("the supervisor's stat")].map(|stat| seconds(&stat))
}

fn wait(duration: Duration) {
    let end = Instant::now() + duration;
    while let Some(left) = end.checked_duration_since(Instant::now()) {
        std::thread::sleep(left);
    }
}

/// Percent of a core while nothing happens. The looks themselves are an exec each, and counted.
pub fn idle(vm: &Vm) -> [(&'static str, f64); 2] {
    let before = spent(vm);
    wait(IDLE);
    let after = spent(vm);
    let percent = |at: usize| (after[at] - before[at]) / IDLE.as_secs_f64() * 100.0;
    [("agent's worker", percent(0)), ("supervisor", percent(1))]
}

/// Milliseconds of CPU of both while `work` is done.
pub fn during(vm: &Vm, work: impl FnOnce()) -> String {
    let before = spent(vm);
    work();
    wait(SETTLE);
    let after = spent(vm);
    let spent = |at: usize| (after[at] - before[at]) * 1e3;
    format!("{:.0} and {:.0}", spent(0), spent(1))
}
