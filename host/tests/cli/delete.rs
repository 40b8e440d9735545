//! delete: what goes, what stays, and what is in the way.

use dhow::api::{ApiReply, ApiRequest};
use rustix::fs::FlockOperation;

use crate::bench::Bench;
use crate::fake::{Fake, answer_running};

/// A profile that has been used.
fn used() -> Bench {
    let bench = Bench::new();
    std::fs::write(bench.settings(), "cpus = 1\n").unwrap();
    for file in ["disk.raw", "log/qemu.log", "state/ended"] {
        std::fs::write(bench.path(&format!("data/profiles/default/{file}")), "x").unwrap();
    }
    std::fs::write(bench.path("run/default/keeper.lock"), "").unwrap();
    std::fs::write(bench.path("config/profiles/other.toml"), "").unwrap();
    bench
}

fn exists(bench: &Bench, below: &str) -> bool {
    bench.dhow_home().join(below).exists()
}

#[test]
fn without_a_terminal_it_needs_force() {
    let bench = used();
    bench.run(&["delete"]).expect_error("standard input is no terminal", "dhow delete --force");
    assert!(
        exists(&bench, "config/profiles/default.toml")
            && exists(&bench, "data/profiles/default/log/qemu.log")
    );
}

#[test]
fn the_disk_stays_unless_it_is_asked_for() {
    let bench = used();
    let delete = bench.run(&["delete", "--force"]);
    assert!(delete.expect(0).stdout.contains("Its data disk is kept: "), "{delete:#?}");
    for gone in [
        "config/profiles/default.toml",
        "data/profiles/default/log",
        "data/profiles/default/state",
        "run/default",
    ] {
        assert!(!exists(&bench, gone), "{gone}");
    }
    assert!(exists(&bench, "data/profiles/default/disk.raw") && exists(&bench, "config/profiles/other.toml"));
    let delete = bench.run(&["delete", "--force", "--data"]);
    assert_eq!(delete.expect(0).stdout, "Profile default is deleted.\n");
    assert!(!exists(&bench, "data/profiles/default") && exists(&bench, "config/profiles/other.toml"));
    bench.run(&["delete"]).expect_error("there is no profile default", "dhow list");
}

#[test]
fn what_somebody_uses_is_not_deleted() {
    for file in ["data/profiles/default/disk.raw", "run/default/keeper.lock"] {
        let bench = used();
        let held = std::fs::File::open(bench.path(file)).unwrap();
        rustix::fs::flock(&held, FlockOperation::LockExclusive).unwrap();
        bench.run(&["delete", "--force", "--data"]).expect_error("is in use by another process", "pgrep");
        assert!(
            exists(&bench, "config/profiles/default.toml")
                && exists(&bench, "data/profiles/default/disk.raw")
        );
    }
}

#[test]
fn a_vm_that_runs_is_stopped_first() {
    let bench = used();
    let socket = bench.api_socket();
    let fake = Fake::new(&bench, move |request, peer| match request {
        ApiRequest::Stop { .. } => {
            std::fs::remove_file(&socket).unwrap();
            peer.reply(&ApiReply::Stopped);
        }
        request => answer_running(request, peer),
    });
    bench.run(&["delete", "--force", "--data"]).expect(0);
    assert_eq!(fake.requests(), [ApiRequest::Stop { force: false }]);
    assert!(!exists(&bench, "data/profiles/default"));
}
