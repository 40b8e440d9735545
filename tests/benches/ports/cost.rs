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

/// Shell: the worker's line of /proc/PID/stat.
const WORKER: &str = "cat /proc/$(pgrep -x -f '.*dhow-agent serve')/stat";

/// The supervisor's.
fn supervisor(vm: &Vm) -> f64 {
    let stat = format!("/proc/{}/stat", vm.pid_of(" supervisor "));
    seconds(&std::fs::read_to_string(&stat).expect("the supervisor's stat"))
}

/// Of worker and supervisor.
fn spent(vm: &Vm) -> [f64; 2] {
    [seconds(&vm.sh(WORKER).ok()), supervisor(vm)]
}

fn wait(duration: Duration) {
    let end = Instant::now() + duration;
    while let Some(left) = end.checked_duration_since(Instant::now()) {
        std::thread::sleep(left);
    }
}

/// Percent of a core while nothing happens. One command in the guest looks at the worker twice, so that neither its
/// start nor its end is counted; of the supervisor both are.
pub fn idle(vm: &Vm) -> [(&'static str, f64); 2] {
    let before = supervisor(vm);
    // A second for the start of the command to be over.
    let script = format!("sleep 1; {WORKER}; sleep {}; {WORKER}", IDLE.as_secs());
    let looks = vm.sh(&script).deadline(IDLE * 2).ok();
    let after = supervisor(vm);
    let looks: Vec<f64> = looks.lines().map(seconds).collect();
    let percent = |spent: f64| spent / IDLE.as_secs_f64() * 100.0;
    [("agent's worker", percent(looks[1] - looks[0])), ("supervisor", percent(after - before))]
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
