//! Kills: whatever dies on either side, the rest goes on, comes back by itself, and loses nothing.
//!
//! Each case repeats its kill as often as DHOW_SOAK says; once otherwise.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use dhow_guest_tool::Pattern;
use nix::sys::signal::Signal;
use serde_json::json;

use dhow_tests::command::{Cmd, Output, Running};
use dhow_tests::fio::{self, Fio};
use dhow_tests::greeter::Greeter;
use dhow_tests::net::{ask, check_echo, free_port, local, own_address};
use dhow_tests::ports::first_exchange;
use dhow_tests::qmp;
use dhow_tests::settings::in_path;
use dhow_tests::{Vm, cases, process, wait_for, wait_until};

cases![Shared: kill_the_supervisor, kill_the_keeper, kill_the_device, kill_the_file_server, kill_the_worker,
    kill_passt, kill_all_but_qemu, kill_between_unplugging_and_plugging, stop_and_continue_each, a_worker_that_always_dies_is_told;
    Own: kill_qemu, kill_all_at_once, acknowledged_writes_survive_a_power_cut];

/// How long a recovery may take on a loaded machine; the product's own goal is 2 s.
const BACK: Duration = Duration::from_secs(90);

/// How long a stopped process stands still.
const STANDSTILL: Duration = Duration::from_secs(60);

const KEEPER: &str = " keeper ";
const SUPERVISOR: &str = " supervisor ";
const DEVICE: &str = " vsock-device ";
const QEMU: &str = "qemu-system";
const PASST: &str = "passt ";

fn file_server(vm: &Vm) -> String {
    // With the blank: the path of another share may begin alike.
    format!(" file-server {} ", vm.home().display())
}

/// How often a kill is repeated.
fn repetitions() -> u32 {
    let soak = std::env::var("DHOW_SOAK").ok();
    soak.map_or(1, |count| count.parse().expect("DHOW_SOAK is a number"))
}

/// What runs while something is killed: a container, a server in the guest, a program that writes to the share.
struct Life<'a> {
    vm: &'a Vm,
    container: dhow_tests::container::Container<'a>,
    begun: String,
    port: u16,
}

impl<'a> Life<'a> {
    fn new(vm: &'a Vm) -> Self {
        let port = free_port();
        let serve = format!("0.0.0.0:{port}");
        let container = vm.container(&["--network", "host"], &["guest-tool", "serve", &serve]);
        let life = Self { vm, container, begun: String::new(), port };
        check_echo(local(port), 1, 1000);
        Self { begun: life.started_at(), ..life }
    }

    fn started_at(&self) -> String {
        let format = "{{.State.StartedAt}} {{.State.Running}} {{.RestartCount}}";
        self.vm.docker(&["inspect", "--format", format, &self.container.name]).ok()
    }

    /// A connection that goes on.
    fn connection(&self) -> Conversation {
        Conversation { stream: ask(self.port, "echo"), said: 0 }
    }

    /// All works again: commands, docker, forwards, files; and the container never noticed. `since` is when `what` died.
    fn assert_back(&self, what: &str, since: Instant) {
        let vm = self.vm;
        // Figures for a person: a loaded machine may take longer than the product's goals.
        let tell =
            |part: &str| eprintln!("{part} {:.1} s after the end of {what}", since.elapsed().as_secs_f64());
        let quick = |command: Cmd| {
            let output = command.deadline(Duration::from_secs(40)).spawn().try_wait()?;
            if output.status.success() { Ok(()) } else { Err(output.to_string()) }
        };
        // At the same time as exec: neither waits for the other.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // One that was opened while the device died is reset, and asks again.
                wait_for(&format!("an exchange after the end of {what}"), BACK, || first_exchange(self.port));
                tell("an exchange over a new connection");
            });
            wait_for(&format!("exec after the end of {what}"), BACK, || quick(vm.exec(&["true"])));
            tell("exec");
        });
        wait_for(&format!("docker after the end of {what}"), BACK, || quick(vm.docker(&["version"])));
        tell("docker");
        assert_eq!(self.started_at(), self.begun, "the container after the end of {what}");
        check_echo(local(self.port), 2, 300_000);
        let file = vm.home().join("after-a-kill");
        std::fs::write(&file, what).unwrap();
        wait_for(&format!("the share after the end of {what}"), BACK, || {
            let output = vm
                .exec(&["cat", file.to_str().unwrap()])
                .deadline(Duration::from_secs(40))
                .spawn()
                .try_wait()?;
            if output.text() == what { Ok(()) } else { Err(output.to_string()) }
        });
        tell("the share");
        wait_for(&format!("a running state after the end of {what}"), BACK, || {
            let status = vm.status();
            if status["state"] == "running" { Ok(()) } else { Err(status.to_string()) }
        });
        assert_disk_locked(vm);
    }
}

/// An echo connection on which something is said now and then.
struct Conversation {
    stream: TcpStream,
    said: u64,
}

impl Conversation {
    /// Says something, and hears it back.
    fn go_on(&mut self) {
        self.said += 1;
        let bytes = Pattern::bytes(self.said, 50_000);
        let mut back = vec![0; bytes.len()];
        let mut writer = self.stream.try_clone().unwrap();
        let said = bytes.clone();
        let saying = std::thread::spawn(move || writer.write_all(&said));
        self.stream.read_exact(&mut back).unwrap_or_else(|error| panic!("a live connection: {error}"));
        saying.join().unwrap().unwrap();
        assert!(back == bytes, "a live connection came back changed");
    }
}

/// A program in the guest that appends numbered lines to a file of the share until it is ended.
struct Writer<'a> {
    vm: &'a Vm,
    file: PathBuf,
}

impl<'a> Writer<'a> {
    fn begin(vm: &'a Vm) -> Self {
        // One for each writer: the guest may take a name that the host removed for the old file for a
        // second, and these cases are about kills.
        static WRITERS: AtomicU32 = AtomicU32::new(0);
        let file = vm.home().join(format!("lines-{}", WRITERS.fetch_add(1, Ordering::Relaxed)));
        let script = format!(
            "n=0; while :; do echo line $n >>'{}' || {{ echo failed at $n; exit 1; }}; n=$((n+1)); done",
            file.display()
        );
        // In the guest's background: the exec that began it dies with the device.
        let begin = "setsid sh -c \"$1\" >/run/lines.log 2>&1 </dev/null &";
        vm.exec(&["sh", "-c", begin, "sh", &script]).ok();
        let writer = Self { vm, file };
        writer.wait_for_more();
        writer
    }

    fn lines(&self) -> String {
        std::fs::read_to_string(&self.file).unwrap_or_default()
    }

    fn wait_for_more(&self) {
        let before = self.lines().lines().count();
        wait_for("more lines from the guest", BACK, || {
            let now = self.lines().lines().count();
            if now > before + 3 {
                return Ok(());
            }
            let log =
                self.vm.sh("cat /run/lines.log").deadline(Duration::from_secs(40)).spawn().try_wait()?;
            Err(format!("{now} lines, {before} before; the writer said: {log}"))
        });
    }

    /// Ends it: every line is there once, in order.
    fn end(self) {
        self.wait_for_more();
        // The bracket keeps the pattern from its own shell's command line.
        self.vm.sh("pkill -f '[e]cho line' || true").ok();
        assert_eq!(self.vm.sh("cat /run/lines.log").ok(), "");
        let lines = self.lines();
        let wrong = lines.lines().enumerate().find(|(number, line)| *line != format!("line {number}"));
        // The last one may have been cut by the end.
        let last = lines.lines().count().saturating_sub(1);
        assert!(wrong.is_none_or(|(number, _)| number == last), "{wrong:?} of {last}");
        let _ = std::fs::remove_file(&self.file);
    }
}

/// Nobody else gets the disk, whichever processes were killed.
fn assert_disk_locked(vm: &Vm) {
    let flock = in_path("flock").expect("flock(1)");
    let taken = Cmd::new(flock).arg("-n").arg(vm.data("disk.raw")).arg("/bin/true").run();
    assert_eq!(taken.status.code(), Some(1), "the disk of a VM that runs can be locked: {taken}");
}

fn pids(vm: &Vm, parts: &[&str]) -> Vec<i32> {
    parts.iter().map(|part| vm.pid_of(part)).collect()
}

/// Waits until the process with `part` is another one than `old`.
fn wait_for_new(vm: &Vm, part: &str, old: i32) {
    wait_for(&format!("a new process with {part:?}"), BACK, || {
        let all = vm.processes();
        let found = all.iter().any(|process| process.line.contains(part) && process.pid != old);
        if found { Ok(()) } else { Err(format!("{all:?}")) }
    });
}

/// Times of kills, spaced so that a parent's limit (10 restarts in 30 s) is never reached: a case that kills one
/// worker again and again is about recovery, and another one about giving up.
#[derive(Default)]
struct Paced(VecDeque<Instant>);

impl Paced {
    /// Waits until one more kill is within the limit, and counts it.
    fn kill(&mut self) {
        if self.0.len() == 8 {
            let oldest = self.0.pop_front().unwrap();
            wait_until("the parent's window of restarts", BACK, || {
                oldest.elapsed() > Duration::from_secs(31)
            });
        }
        self.0.push_back(Instant::now());
    }
}

fn kill_the_supervisor(vm: &Vm) {
    let life = Life::new(vm);
    let mut paced = Paced::default();
    for _ in 0..repetitions() {
        paced.kill();
        let mut conversation = life.connection();
        conversation.go_on();
        let server = file_server(vm);
        let stay = [QEMU, DEVICE, KEEPER, PASST, &server];
        let before = pids(vm, &stay);
        let supervisor = vm.pid_of(SUPERVISOR);
        // It must not start another one before clients have come.
        process::send(vm.pid_of(KEEPER), Signal::SIGSTOP);
        let since = Instant::now();
        process::kill(supervisor);
        // Whoever comes now waits, and is not refused.
        let mut docker = UnixStream::connect(vm.run("docker.sock")).expect("docker.sock after a kill");
        docker.set_read_timeout(Some(BACK)).unwrap();
        docker.write_all(b"GET /_ping HTTP/1.0\r\n\r\n").unwrap();
        let mut client = TcpStream::connect(local(life.port)).expect("a forwarded port after a kill");
        client.set_read_timeout(Some(BACK)).unwrap();
        client.write_all(b"source 5 1\n").unwrap();
        conversation.go_on();
        process::send(vm.pid_of(KEEPER), Signal::SIGCONT);
        let mut answer = String::new();
        docker.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("200 OK"), "{answer}");
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).expect("who has waited is served");
        assert_eq!(answer, Pattern::bytes(1, 5));
        life.assert_back("the supervisor", since);
        wait_for_new(vm, SUPERVISOR, supervisor);
        assert_eq!(pids(vm, &stay), before);
        conversation.go_on();
    }
}

fn kill_the_keeper(vm: &Vm) {
    let life = Life::new(vm);
    for _ in 0..repetitions() {
        let mut conversation = life.connection();
        conversation.go_on();
        let server = file_server(vm);
        let stay = [QEMU, DEVICE, &server];
        let before = pids(vm, &stay);
        let keeper = vm.pid_of(KEEPER);
        let since = Instant::now();
        process::kill(keeper);
        conversation.go_on();
        assert_disk_locked(vm);
        // The next command brings a new one.
        life.assert_back("the keeper", since);
        wait_for_new(vm, KEEPER, keeper);
        assert_eq!(pids(vm, &stay), before);
        conversation.go_on();
    }
}

fn kill_the_device(vm: &Vm) {
    let life = Life::new(vm);
    for _ in 0..repetitions() {
        let writer = Writer::begin(vm);
        let device = vm.pid_of(DEVICE);
        let qemu = vm.pid_of(QEMU);
        let since = Instant::now();
        process::kill(device);
        life.assert_back("the device", since);
        wait_for_new(vm, DEVICE, device);
        let status = std::fs::read_to_string(format!("/proc/{}/status", vm.pid_of(DEVICE))).unwrap();
        // "SECCOMP_MODE_FILTER" (proc_pid_status(5)).
        assert!(status.contains("Seccomp:\t2"), "the device is not confined: {status}");
        assert_eq!(vm.pid_of(QEMU), qemu);
        writer.end();
    }
}

fn kill_the_file_server(vm: &Vm) {
    let life = Life::new(vm);
    let part = file_server(vm);
    for _ in 0..repetitions() {
        let writer = Writer::begin(vm);
        let mut conversation = life.connection();
        let server = vm.pid_of(&part);
        let since = Instant::now();
        process::kill(server);
        conversation.go_on();
        life.assert_back("the file server", since);
        wait_for_new(vm, &part, server);
        conversation.go_on();
        writer.end();
    }
}

/// The worker's pid in the guest.
fn worker(vm: &Vm) -> String {
    vm.sh("pgrep -x -f '.*dhow-agent serve'").ok()
}

fn kill_the_worker(vm: &Vm) {
    let life = Life::new(vm);
    let mut paced = Paced::default();
    for _ in 0..repetitions() {
        paced.kill();
        let writer = Writer::begin(vm);
        let before = worker(vm);
        // The exec that kills it cannot tell how it ended.
        let _ = vm.sh("pkill -9 -x -f '.*dhow-agent serve'").run();
        let since = Instant::now();
        life.assert_back("the worker", since);
        assert_ne!(worker(vm), before);
        writer.end();
    }
}

/// Kills each new worker in the guest until none comes any more, with a line in /run/workers for each, and waits for the
/// state that says so.
fn kill_every_worker(vm: &Vm) {
    let script = "rm -f /run/workers; last=; idle=0
        while [ $idle -lt 50 ]; do
            now=$(pgrep -x -f '.*dhow-agent serve')
            if [ -n \"$now\" ] && [ \"$now\" != \"$last\" ]; then
                last=$now; idle=0; echo $now >>/run/workers; kill -9 $now
            else
                idle=$((idle + 1)); sleep 0.1
            fi
        done";
    vm.exec(&["sh", "-c", "setsid sh -c \"$1\" >/dev/null 2>&1 </dev/null &", "sh", script]).ok();
    wait_for("a state that says so", BACK, || {
        let status = vm.status();
        let problem = status["problem"].as_str().unwrap_or_default();
        let told = problem.contains("ended too often");
        if status["state"] == "degraded" && told { Ok(()) } else { Err(status.to_string()) }
    });
}

fn a_worker_that_always_dies_is_told(vm: &Vm) {
    kill_every_worker(vm);
    // PID 1 rests, and tries again.
    wait_until("a worker after the rest", BACK, || {
        let tried = vm.exec(&["true"]).deadline(Duration::from_secs(40)).spawn().try_wait();
        tried.is_ok_and(|output| output.status.success())
    });
    let workers = vm.sh("cat /run/workers").ok();
    // The first one and ten restarts; more where a slow guest took longer than 30 s for them.
    assert!(workers.lines().count() > 10, "given up after {workers:?}");
    vm.docker(&["version"]).ok();
    kill_every_worker(vm);
    // A restart needs no help from the worker.
    vm.dhow(&["restart"]).deadline(dhow_tests::vm::START * 2).run().exits(0);
    vm.install_tool();
    vm.docker(&["version"]).ok();
}

fn kill_all_but_qemu(vm: &Vm) {
    let life = Life::new(vm);
    for _ in 0..repetitions() {
        let writer = Writer::begin(vm);
        let qemu = vm.pid_of(QEMU);
        let others: Vec<_> = vm.processes().into_iter().filter(|process| process.pid != qemu).collect();
        for part in [KEEPER, SUPERVISOR, DEVICE, PASST, " file-server "] {
            assert!(others.iter().any(|process| process.line.contains(part)), "no {part:?} in {others:?}");
        }
        let passt = vm.pid_of(PASST);
        let since = Instant::now();
        // At once: none of them has the time to bring another back.
        for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
            others.iter().for_each(|process| process::send(process.pid, signal));
        }
        wait_until("the end of all but QEMU", BACK, || {
            !others.iter().any(|process| process::is_alive(process.pid))
        });
        assert_disk_locked(vm);
        life.assert_back("all but QEMU", since);
        assert_eq!(vm.pid_of(QEMU), qemu);
        wait_for_new(vm, PASST, passt);
        assert_network(vm);
        writer.end();
    }
}

/// The guest reaches a server of the host's network.
fn assert_network(vm: &Vm) {
    let server = Greeter::at(own_address(), "reached");
    wait_for("the guest's way out", BACK, || {
        let said =
            server.heard_in(vm, server.address.ip()).deadline(Duration::from_secs(40)).spawn().try_wait()?;
        if said.text() == "reached" { Ok(()) } else { Err(said.to_string()) }
    });
}

fn kill_passt(vm: &Vm) {
    let life = Life::new(vm);
    assert_network(vm);
    let mut paced = Paced::default();
    for _ in 0..repetitions() {
        paced.kill();
        let mut conversation = life.connection();
        conversation.go_on();
        let passt = vm.pid_of(PASST);
        let since = Instant::now();
        process::kill(passt);
        wait_for_new(vm, PASST, passt);
        assert_network(vm);
        eprintln!("the network {:.1} s after the end of passt", since.elapsed().as_secs_f64());
        conversation.go_on();
        life.assert_back("passt", since);
    }
}

/// A supervisor that dies while it replaces the device leaves one that QEMU does not have.
fn kill_between_unplugging_and_plugging(vm: &Vm) {
    let life = Life::new(vm);
    for _ in 0..repetitions() {
        let (supervisor, device) = (vm.pid_of(SUPERVISOR), vm.pid_of(DEVICE));
        // It must not heal what is done here.
        process::send(supervisor, Signal::SIGSTOP);
        qmp::monitor(vm, "device_del vsock");
        wait_until("QEMU without the device", BACK, || {
            let devices = qmp::execute(vm, "qom-list", &json!({ "path": "/machine/peripheral" }));
            !devices.as_array().expect("a list").iter().any(|device| device["name"] == "vsock")
        });
        assert!(process::is_alive(device), "the device's process waits for another QEMU");
        let since = Instant::now();
        process::kill(supervisor);
        life.assert_back("the supervisor, while it replaced the device", since);
        wait_for_new(vm, DEVICE, device);
    }
}

/// Stops each process by a signal, looks how the command line takes it, and lets it go on after a minute.
fn stop_and_continue_each(vm: &Vm) {
    let life = Life::new(vm);
    let server = file_server(vm);
    // The keeper only holds, and a file server serves but its share: they stand still together.
    let stopped: [(&[&str], bool); 4] =
        [(&[SUPERVISOR], true), (&[KEEPER, &server], false), (&[DEVICE], true), (&[QEMU], true)];
    for (parts, needed) in std::iter::repeat_n(stopped, repetitions() as usize).flatten() {
        let pids = pids(vm, parts);
        let stopped = Instant::now();
        pids.iter().for_each(|pid| process::send(*pid, Signal::SIGSTOP));
        let asked = ask_while_stopped(vm, parts);
        std::thread::sleep(STANDSTILL.saturating_sub(stopped.elapsed()));
        let since = Instant::now();
        pids.iter().for_each(|pid| process::send(*pid, Signal::SIGCONT));
        let [answer, exec] = asked.unwrap_or_else(|problem| panic!("with {parts:?} stopped: {problem}"));
        for pid in &pids {
            let told = answer.all().contains(&format!("process {pid} is stopped by a signal"));
            assert!(told, "with {parts:?} stopped, {pid} is not told: {answer}");
        }
        if needed {
            assert!(!exec.status.success() && !exec.stderr.is_empty(), "with {parts:?} stopped: {exec}");
        }
        life.assert_back(&format!("the stop of {parts:?}"), since);
        assert_eq!(self::pids(vm, parts), pids, "{parts:?} only stood still");
    }
    for _ in 0..repetitions() {
        stop_the_worker(vm, &life);
    }
}

/// The agent's worker in the guest, which nobody but the guest itself can let go on.
fn stop_the_worker(vm: &Vm, life: &Life) {
    let before = worker(vm);
    let seconds = STANDSTILL.as_secs();
    // A moment later: this very exec goes through the worker.
    let script = format!("sleep 2; kill -STOP {before}; sleep {seconds}; kill -CONT {before}");
    vm.exec(&["sh", "-c", "setsid sh -c \"$1\" >/dev/null 2>&1 </dev/null &", "sh", &script]).ok();
    wait_until("the worker to stand still", BACK, || {
        let tried = vm.exec(&["true"]).deadline(Duration::from_secs(60)).spawn().try_wait();
        tried.is_ok_and(|output| !output.status.success() && !output.stderr.is_empty())
    });
    let stopped = Instant::now();
    let [answer, exec] = ask_while_stopped(vm, &["the worker"])
        .unwrap_or_else(|problem| panic!("the worker stopped: {problem}"));
    assert!(!exec.status.success() && !exec.stderr.is_empty(), "with the worker stopped: {exec}");
    assert!(!answer.text().is_empty(), "{answer}");
    wait_for("a word about the silence", STANDSTILL, || {
        let status = vm.status();
        let problem = status["problem"].as_str().unwrap_or_default();
        if problem.contains("agent") { Ok(()) } else { Err(status.to_string()) }
    });
    // It goes on by itself, some time before that.
    std::thread::sleep(STANDSTILL.saturating_sub(stopped.elapsed()));
    life.assert_back("the stop of the worker", Instant::now());
    assert_eq!(worker(vm), before, "the worker only stood still");
}

/// The answers of `status` and `exec` while `parts` are stopped: which ones depends on who is silent, but they come.
fn ask_while_stopped(vm: &Vm, parts: &[&str]) -> Result<[Output; 2], String> {
    let ask = |what: &str, command: Cmd| {
        let begun = Instant::now();
        let answer = command.deadline(Duration::from_secs(60)).spawn().try_wait();
        // For a person: the goal is 15 s.
        eprintln!("with {parts:?} stopped {what} takes {:.1} s", begun.elapsed().as_secs_f64());
        answer
    };
    Ok([ask("status", vm.dhow(&["status"]))?, ask("exec", vm.exec(&["true"]))?])
}

/// The guest has no complaint about its disk, and had nothing to repair.
fn assert_disk_clean(vm: &Vm) {
    let kernel = vm.dhow(&["logs", "kernel"]).ok();
    for bad in ["EXT4-fs error", "EXT4-fs warning", "I/O error", "needs fsck", "e2fsck"] {
        assert!(!kernel.contains(bad), "{bad}: {kernel}");
    }
    let agent = vm.dhow(&["logs", "agent"]).ok() + &vm.dhow(&["logs", "console"]).ok();
    for bad in ["was repaired", "is checked", "was checked", "mounted read-only"] {
        assert!(!agent.contains(bad), "{bad}: {agent}");
    }
}

/// e2fsck(8) finds nothing on the disk of a VM that is stopped: the whole of it, read only.
fn assert_fsck_clean(vm: &Vm) {
    let program = in_path("e2fsck").expect("e2fsck(8)");
    Cmd::new(program).args(["-f", "-n"]).arg(vm.data("disk.raw")).deadline(BACK).run().exits(0);
}

fn kill_qemu() {
    let vm = Vm::new();
    vm.start(&[]);
    vm.import_image();
    vm.docker(&["run", "-d", "--name", "keep", "--restart", "always", dhow_tests::IMAGE, "sleep", "100000"])
        .ok();
    // Docker does not fsync that it has started a container; a cut a moment later would find it not started.
    vm.sh("sync").ok();
    for _ in 0..repetitions() {
        process::kill(vm.pid_of(QEMU));
        vm.assert_nothing_left();
        let status = vm.status();
        assert_eq!(status["state"], "stopped", "{status}");
        assert!(status["problem"].as_str().is_some_and(|problem| problem.contains("QEMU")), "{status}");
        vm.start(&[]);
        assert_disk_clean(&vm);
        wait_until("the container that always restarts", BACK, || {
            vm.docker(&["ps", "--format", "{{.Names}}"]).ok().contains("keep")
        });
    }
    vm.stop();
    assert_fsck_clean(&vm);
}

/// All is killed at once. As when the host loses power: sockets and state files of dead processes lie about; in every
/// other round the host has another boot id when somebody looks at them.
fn kill_all_at_once() {
    let mut vm = Vm::new();
    let boot = vm.beside("boot-id");
    let reboot = |round: u32| std::fs::write(&boot, format!("{round:08x}-0000-4000-8000-000000000000\n"));
    reboot(0).unwrap();
    vm.show(&boot, Path::new("/proc/sys/kernel/random/boot_id"));
    vm.start(&[]);
    // Both kinds at the least.
    for round in 0..repetitions().max(2) {
        // At once: none of them has the time to bring another back.
        for process in process::of_home(&vm.dhow_home()) {
            process::send(process.pid, Signal::SIGSTOP);
        }
        process::end_all(&vm.dhow_home());
        assert!(vm.run("docker.sock").exists(), "nobody has cleaned up");
        let why = if round % 2 == 0 {
            reboot(round + 1).unwrap();
            "this host was restarted"
        } else {
            "they were killed"
        };
        // QEMU's memory takes a moment to go: until then there is a VM to take over, of this boot.
        wait_for("the profile is seen to be stopped", BACK, || {
            let status = vm.status();
            let told = status["problem"].as_str().is_some_and(|problem| problem.contains(why));
            if status["state"] == "stopped" && told { Ok(()) } else { Err(status.to_string()) }
        });
        // Each kind with and without: neither needs it.
        if matches!(round % 4, 1 | 2) {
            let stopped = vm.dhow(&["stop"]).run().exits(0);
            assert!(!stopped.all().is_empty());
        }
        vm.start(&[]).says("docker");
        assert_disk_clean(&vm);
        vm.docker(&["version"]).ok();
    }
    vm.stop();
    assert_fsck_clean(&vm);
}

/// Two programs write when QEMU is killed: one that says of each record that it is on the disk, and fio.
fn acknowledged_writes_survive_a_power_cut() {
    let vm = Vm::new();
    vm.start(&[]);
    vm.import_image();
    fio::import(&vm);
    let rounds = if repetitions() > 1 { repetitions() } else { 3 };
    for round in 0..rounds {
        let options = ["-v", "records:/data"];
        let writing = vm.docker_run(&options, &["guest-tool", "records", "write", "/data/log"]).spawn();
        let count = |running: &Running| {
            let text = running.stdout();
            // A line that is cut off by the end is no acknowledgement.
            let whole = text.rfind('\n').map_or("", |end| &text[..end]);
            whole.lines().last().and_then(|line| line.trim().parse::<u64>().ok())
        };
        let mut first = None;
        wait_until("acknowledged records", BACK, || {
            first = first.or_else(|| count(&writing));
            first.zip(count(&writing)).is_some_and(|(first, now)| now >= first + 50)
        });
        let written = tempfile::tempdir().unwrap();
        let name = format!("round-{round}");
        Fio::start(&vm, free_port(), &name).write_until_power_cut(vm.pid_of(QEMU), written.path());
        let acknowledged = count(&writing).unwrap();
        drop(writing);
        vm.assert_nothing_left();
        vm.start(&[]);
        assert_disk_clean(&vm);
        let kept: u64 =
            vm.docker_run(&options, &["guest-tool", "records", "check", "/data/log"]).ok().parse().unwrap();
        assert!(kept >= acknowledged, "{acknowledged} records were acknowledged, {kept} are there");
        let verified = Fio::start(&vm, free_port(), &name).verify(written.path());
        eprintln!("{kept} records and {verified} writes of fio are there");
        vm.stop();
        assert_fsck_clean(&vm);
        vm.start(&[]);
        assert!(verified >= 20, "fio wrote {verified} times only");
    }
    vm.stop();
}
