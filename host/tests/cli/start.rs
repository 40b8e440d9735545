//! Starts: progress, failures, two at a time, one that is interrupted; stop and restart.

use std::os::unix::fs::PermissionsExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use dhow::api::{ApiReply, ApiRequest, Progress, VmState};
use nix::sys::signal::Signal;

use crate::bench::{Bench, Running, read_until, wait_until};
use crate::fake::{Fake, Peer, answer_running, report};
use crate::real::{SLOW, hold, image, nothing_is_left, only, release, start};

fn begin(peer: &mut Peer, step: &str) {
    peer.reply(&ApiReply::Progress(Progress::Begin { step: step.into() }));
}

fn end(peer: &mut Peer, step: &str, milliseconds: u64) {
    peer.reply(&ApiReply::Progress(Progress::End { step: step.into(), milliseconds }));
}

/// A VM that another command is starting.
fn starting(request: &ApiRequest, peer: &mut Peer, watch: impl Fn(&mut Peer)) {
    match request {
        ApiRequest::Status => peer.reply(&ApiReply::Status(Box::new(report(VmState::Starting)))),
        ApiRequest::WatchStart => watch(peer),
        request => answer_running(request, peer),
    }
}

#[test]
fn a_second_start_follows_the_first_step_by_step() {
    let bench = Bench::new();
    let _fake = Fake::new(&bench, |request, peer| {
        starting(request, peer, |peer| {
            end(peer, "finding out how to run a VM", 40);
            peer.reply(&ApiReply::Progress(Progress::Notice("no KVM\u{1b}[2J".into())));
            begin(peer, "booting the VM");
            end(peer, "booting the VM", 3210);
            peer.reply(&ApiReply::Started);
        });
    });
    let start = bench.run(&["start"]);
    let expected = "finding out how to run a VM … 0.0 s\nnotice: no KVM\\u{1b}[2J\nbooting the VM … 3.2 s\n";
    assert_eq!(start.expect(0).stderr, expected);
    assert!(start.stdout.contains("Docker is up in profile default"), "{start:#?}");
    let socket = bench.path("run/default/docker.sock");
    assert!(start.stdout.contains(&format!("unix://{}", socket.display())), "{start:#?}");
}

#[test]
fn a_vm_that_runs_is_left_alone_and_new_settings_wait() {
    let bench = Bench::new();
    let fake = Fake::running(&bench);
    let start = bench.run(&["start", "--cpus", "1", "--memory", "1536MiB", "--disk", "40GiB"]);
    assert!(start.expect(0).stdout.contains("is running already"), "{start:#?}");
    assert!(start.stderr.contains("they hold after `dhow restart`"), "{start:#?}");
    let settings = std::fs::read_to_string(bench.settings()).unwrap();
    assert!(settings.contains("\ncpus = 1\n") && settings.contains("\nmemory = \"1536MiB\"\n"), "{settings}");
    assert!(fake.requests().iter().all(|request| *request == ApiRequest::Status), "{:?}", fake.requests());
}

#[test]
fn a_start_that_fails_says_why_and_what_to_do() {
    let bench = Bench::new();
    let _fake = Fake::new(&bench, |request, peer| {
        starting(request, peer, |peer| {
            begin(peer, "booting the VM");
            peer.refuse(
                "the guest did not come up within 120 s; the end of it:\n  | oh\u{1b}c",
                Some("look there"),
            );
        });
    });
    let start = bench.run(&["start"]);
    start.expect_error("the guest did not come up within 120 s", "look there");
    assert!(start.stderr.contains("\n  | oh\\u{1b}c\n"), "{start:#?}");
}

#[test]
fn a_real_start_without_qemu_fails_clearly_and_leaves_nothing() {
    let bench = Bench::new();
    let (path, image) = (only(&bench, None), image(&bench));
    for _ in 0..2 {
        let outcome = Running::spawn(&mut start(&bench, &image, &path)).finish();
        outcome.expect_error("QEMU (qemu-system-x86_64) cannot be run", "install QEMU");
        nothing_is_left(&bench);
    }
    let status = bench.run(&["status"]);
    assert!(status.expect(1).stdout.contains("QEMU (qemu-system-x86_64) cannot be run"), "{status:#?}");
    let keeper = bench.run(&["logs", "keeper", "-n", "200"]);
    assert!(keeper.expect(0).stdout.contains("start failed"), "{keeper:#?}");
}

#[test]
fn odd_variables_and_a_relative_home_reach_the_keeper() {
    use std::os::unix::ffi::OsStrExt;
    let bench = Bench::new();
    let (path, image) = (only(&bench, None), image(&bench));
    let mut command = start(&bench, &image, &path);
    command.current_dir(bench.dhow_home().parent().unwrap()).env("DHOW_HOME", "dhow");
    command.env("ODD", std::ffi::OsStr::from_bytes(b"\xff")).env(std::ffi::OsStr::from_bytes(b"\xff"), "odd");
    let outcome = Running::spawn(&mut command).finish();
    outcome.expect_error("QEMU (qemu-system-x86_64) cannot be run", "install QEMU");
    nothing_is_left(&bench);
}

#[test]
fn two_starts_at_a_time_are_one() {
    let bench = Bench::new();
    let (path, image) = (only(&bench, Some(SLOW)), image(&bench));
    hold(&bench);
    let starts: Vec<Running> = (0..3).map(|_| Running::spawn(&mut start(&bench, &image, &path))).collect();
    wait_until("the supervisor is there", || {
        let status = bench.run(&["status", "--json"]).stdout;
        status.contains("\"starting\"").then_some(())
    });
    release(&bench);
    for running in starts {
        let outcome = running.finish();
        outcome.expect_error("QEMU is too old or unknown", "install QEMU");
    }
    nothing_is_left(&bench);
}

#[test]
fn ctrl_c_stops_the_start_that_one_has_begun() {
    let bench = Bench::new();
    let (path, image) = (only(&bench, Some(SLOW)), image(&bench));
    hold(&bench);
    let running = Running::spawn(&mut start(&bench, &image, &path));
    wait_until("the supervisor is there", || {
        let status = bench.run(&["status", "--json"]).stdout;
        status.contains("\"starting\"").then_some(())
    });
    running.signal(Signal::SIGINT);
    let outcome = running.finish();
    assert!(outcome.expect(130).stderr.contains("the start was stopped"), "{outcome:#?}");
    release(&bench);
    nothing_is_left(&bench);
}

#[test]
fn ctrl_c_leaves_a_start_that_another_has_begun() {
    let bench = Bench::new();
    let fake = Fake::new(&bench, |request, peer| {
        starting(request, peer, |peer| {
            end(peer, "a step", 1);
            peer.wait_for_end();
        });
    });
    let mut command = bench.command(&["start"]);
    command.stderr(std::process::Stdio::piped());
    let mut running = command.spawn().unwrap();
    let mut stderr = running.stderr.take().unwrap();
    read_until(&mut stderr, "a step … 0.0 s\n");
    let pid = nix::unistd::Pid::from_raw(i32::try_from(running.id()).unwrap());
    nix::sys::signal::kill(pid, Signal::SIGINT).unwrap();
    let said = read_until(&mut stderr, "\n");
    assert!(said.contains("goes on"), "{said}");
    assert_eq!(running.wait().unwrap().code(), Some(130));
    assert!(!fake.requests().iter().any(|request| matches!(request, ApiRequest::Stop { .. })));
}

#[test]
fn a_start_waits_for_a_stop_that_is_under_way() {
    let bench = Bench::new();
    let (path, image) = (only(&bench, None), image(&bench));
    let mut fake = Fake::new(&bench, |_, peer| {
        peer.reply(&ApiReply::Status(Box::new(report(VmState::Stopping))));
    });
    let mut command = start(&bench, &image, &path);
    let mut running = command.spawn().unwrap();
    let mut stderr = running.stderr.take().unwrap();
    read_until(&mut stderr, "notice: the VM is being stopped; starting again when it is down\n");
    fake.end();
    // It goes on to start a keeper of its own.
    read_until(&mut stderr, "dhow: QEMU (qemu-system-x86_64) cannot be run");
    assert_eq!(running.wait().unwrap().code(), Some(1));
    nothing_is_left(&bench);
}

/// A VM whose keeper ends after a stop.
fn stoppable(bench: &Bench, force: bool) -> Fake {
    let socket = bench.api_socket();
    let asked = AtomicUsize::new(0);
    Fake::new(bench, move |request, peer| match request {
        ApiRequest::Stop { force: asked_force } => {
            assert_eq!((*asked_force, asked.fetch_add(1, Ordering::SeqCst)), (force, 0));
            end(peer, "stopping the VM", 2500);
            std::fs::remove_file(&socket).unwrap();
            peer.reply(&ApiReply::Stopped);
        }
        request => answer_running(request, peer),
    })
}

#[test]
fn stop_shows_its_steps_and_ends_with_the_keeper() {
    for force in [false, true] {
        let bench = Bench::new();
        let _fake = stoppable(&bench, force);
        let stop = bench.run(if force { &["stop", "--force"] } else { &["stop"] });
        assert_eq!(stop.expect(0).stderr, "stopping the VM … 2.5 s\n");
        assert_eq!(stop.stdout, "The VM of profile default is stopped.\n");
    }
}

#[test]
fn restart_stops_first_and_does_not_with_wrong_settings() {
    let bench = Bench::new();
    let (path, image) = (only(&bench, None), image(&bench));
    let fake = stoppable(&bench, false);
    let restart = |settings: &str| {
        std::fs::write(bench.settings(), settings).unwrap();
        let mut command = bench.command(&["restart"]);
        command.env("PATH", &path);
        Running::spawn(&mut command).finish()
    };
    restart("cpus = 0\n").expect_error("cpus: 0 CPUs", "choose 1");
    assert_eq!(fake.requests(), []);
    let outcome = restart(&format!("mounts = []\nactivate = false\nimage = '{image}'\n"));
    outcome.expect_error("QEMU (qemu-system-x86_64) cannot be run", "install QEMU");
    assert!(outcome.stderr.starts_with("stopping the VM … 2.5 s\n"), "{outcome:#?}");
    nothing_is_left(&bench);
}

#[test]
fn a_supervisor_that_is_just_ending_is_asked_no_more() {
    let bench = Bench::new();
    let socket = bench.api_socket();
    let ended = AtomicBool::new(false);
    // It takes the request, and ends without an answer.
    let fake = Fake::new(&bench, move |_, _| {
        if !ended.swap(true, Ordering::SeqCst) {
            std::fs::remove_file(&socket).unwrap();
        }
    });
    let status = bench.run(&["status"]);
    assert!(status.expect(1).stdout.contains("state      stopped"), "{status:#?}");
    assert_eq!(fake.requests().len(), 1);
}

#[test]
fn a_docker_context_that_is_current_is_named() {
    let bench = Bench::new();
    let watched = Mutex::new(());
    let _fake = Fake::new(&bench, move |request, peer| {
        let _one = watched.lock().unwrap();
        starting(request, peer, |peer| peer.reply(&ApiReply::Started));
    });
    let folder = only(&bench, None);
    std::fs::write(folder.join("docker"), "").unwrap();
    std::fs::set_permissions(folder.join("docker"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let words = |current: Option<&str>, path: &std::path::Path| {
        let config = bench.home().join(".docker");
        std::fs::create_dir_all(&config).unwrap();
        let text = current.map_or("{}".to_owned(), |name| format!("{{\"currentContext\": \"{name}\"}}"));
        std::fs::write(config.join("config.json"), text).unwrap();
        let mut command = bench.command(&["start"]);
        command.env("PATH", path);
        Running::spawn(&mut command).finish().stdout
    };
    assert!(words(Some("dhow"), &folder).contains("docker run --rm"));
    assert!(words(Some("other"), &folder).contains("docker --context dhow run --rm"));
    assert!(words(None, &folder).contains("docker --context dhow run --rm"));
    assert!(words(None, &bench.home()).contains("install the docker CLI"));
}
