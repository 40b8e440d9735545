//! A supervisor that accepts and says nothing: every command still ends, with a reason.

use std::os::unix::net::UnixListener;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use dhow::api::{ApiReply, ApiRequest, Progress, VmState};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::bench::{Bench, Running, processes_of, wait_until};
use crate::fake::{Fake, report};
use crate::real::{SLOW, hold, image, nothing_is_left, only, release, start};

/// A child that a signal has stopped. The test listens, so it counts as the keeper, and this as one of
/// its processes.
struct Halted(std::process::Child);

impl Halted {
    fn new() -> Self {
        let child = Command::new("sleep").arg("3600").spawn().unwrap();
        let halted = Self(child);
        kill(Pid::from_raw(halted.pid()), Signal::SIGSTOP).unwrap();
        let stat = format!("/proc/{}/stat", halted.pid());
        wait_until("it is stopped", || {
            let text = std::fs::read_to_string(&stat).unwrap();
            text.rsplit_once(") ").unwrap().1.starts_with('T').then_some(())
        });
        halted
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).unwrap()
    }
}

impl Drop for Halted {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn every_command_ends_and_says_who_is_stopped() {
    let bench = Bench::new();
    std::fs::write(bench.settings(), "").unwrap();
    // Its backlog takes connections that nobody ever accepts.
    let _listener = UnixListener::bind(bench.api_socket()).unwrap();
    let halted = Halted::new();
    let spawn = |args: &[&str]| Running::spawn(&mut bench.command(args));
    let reason = format!("the sleep process {} is stopped by a signal", halted.pid());
    let commands: [&[&str]; 7] =
        [&["start"], &["stop"], &["exec", "true"], &["ports"], &["mounts"], &["logs", "agent"], &["shell"]];
    // Together: each of them waits for its deadline.
    let (status, list, version) = (spawn(&["status", "--json"]), spawn(&["list"]), spawn(&["version"]));
    let running: Vec<Running> = commands.iter().map(|args| spawn(args)).collect();
    for (running, args) in running.into_iter().zip(commands) {
        let outcome = running.finish();
        // Other tests of this process may have such a child, too: the hint names it then.
        outcome.expect_error("did not answer within", "`kill -CONT ");
        assert!(outcome.stderr.contains(&reason), "{args:?}: {outcome:#?}");
    }
    let status = status.finish();
    let document: serde_json::Value = serde_json::from_str(&status.expect(1).stdout).unwrap();
    assert_eq!(document["state"], "silent");
    assert!(document["problem"].as_str().unwrap().contains(&reason), "{document}");
    let list = list.finish();
    assert!(list.expect(0).stdout.contains("silent"), "{list:#?}");
    version.finish().expect(0);
}

#[test]
fn a_start_whose_supervisor_falls_silent_ends() {
    let bench = Bench::new();
    let asked = AtomicU32::new(0);
    let _fake = Fake::new(&bench, move |request, peer| match request {
        // The first time it is well; then it is asked because nothing comes.
        ApiRequest::Status if asked.fetch_add(1, Ordering::SeqCst) == 0 => {
            peer.reply(&ApiReply::Status(Box::new(report(VmState::Starting))));
        }
        ApiRequest::Status => peer.wait_for_end(),
        _ => {
            peer.reply(&ApiReply::Progress(Progress::Begin { step: "booting the VM".into() }));
            peer.wait_for_end();
        }
    });
    bench.run(&["start"]).expect_error("the supervisor did not answer within", "dhow stop --force");
}

#[test]
fn a_slow_start_whose_supervisor_answers_goes_on() {
    let bench = Bench::new();
    let (sender, asked) = std::sync::mpsc::channel();
    let (sender, asked) = (std::sync::Mutex::new(sender), std::sync::Mutex::new(asked));
    let _fake = Fake::new(&bench, move |request, peer| match request {
        ApiRequest::Status => {
            peer.reply(&ApiReply::Status(Box::new(report(VmState::Starting))));
            sender.lock().unwrap().send(()).unwrap();
        }
        _ => {
            // Silent until it was asked whether it lives: once by the start, twice since.
            for _ in 0..3 {
                asked.lock().unwrap().recv_timeout(crate::bench::DEADLINE).unwrap();
            }
            peer.reply(&ApiReply::Started);
        }
    });
    bench.run(&["start"]).expect(0);
}

#[test]
fn a_real_supervisor_that_is_stopped_is_named_and_ended_by_force() {
    let bench = Bench::new();
    let (path, image) = (only(&bench, Some(SLOW)), image(&bench));
    hold(&bench);
    let running = Running::spawn(&mut start(&bench, &image, &path));
    wait_until("the supervisor is there", || {
        let status = bench.run(&["status", "--json"]).stdout;
        status.contains("\"starting\"").then_some(())
    });
    let supervisor = wait_until("the supervisor is found", || {
        let processes = processes_of(&bench.dhow_home());
        let (pid, _) = processes.into_iter().find(|(_, line)| line.contains(" supervisor default"))?;
        Some(pid)
    });
    kill(Pid::from_raw(supervisor), Signal::SIGSTOP).unwrap();
    let reason = format!("the supervisor process {supervisor} is stopped by a signal");
    let status = bench.run(&["status"]);
    assert!(status.expect(1).stdout.contains(&reason), "{status:#?}");
    assert!(status.stderr.contains(&format!("`kill -CONT {supervisor}`")), "{status:#?}");
    running.finish().expect_error(&reason, "kill -CONT");
    bench.run(&["stop", "--force"]).expect(0);
    release(&bench);
    nothing_is_left(&bench);
}
