//! logs: of the guest, and of the host's processes while they are written.

use std::io::Write;

use dhow::api::{ApiReply, ApiRequest};
use dhow_protocol::stream::LogSource;
use nix::sys::signal::Signal;

use crate::bench::{Bench, Running, read_until};
use crate::fake::{Fake, answer_running};

#[test]
fn a_log_of_the_guest_is_passed_through() {
    let bench = Bench::new();
    let fake = Fake::new(&bench, |request, peer| match request {
        ApiRequest::Logs { .. } => {
            peer.reply(&ApiReply::Opened);
            peer.0.write_all(b"one\ntwo\x1b\n").unwrap();
        }
        request => answer_running(request, peer),
    });
    assert_eq!(bench.run(&["logs", "dockerd", "-n", "2", "-f"]).expect(0).stdout, "one\ntwo\u{1b}\n");
    bench.run(&["logs", "kernel"]).expect(0);
    let expected = [
        ApiRequest::Logs { source: LogSource::Daemon("dockerd".into()), tail: Some(2), follow: true },
        ApiRequest::Logs { source: LogSource::Kernel, tail: None, follow: false },
    ];
    assert_eq!(fake.requests(), expected);
    let list = bench.run(&["logs"]);
    for source in ["agent", "kernel", "dockerd", "containerd"] {
        assert!(list.expect(0).stdout.contains(&format!("\n{source} ")), "{list:#?}");
    }
}

#[test]
fn a_log_of_the_host_has_a_tail_and_is_followed_through_rotation() {
    let bench = Bench::new();
    let log = bench.path("data/profiles/default/log/qemu.log");
    std::fs::write(&log, "one\ntwo\nthree\n").unwrap();
    assert_eq!(bench.run(&["logs", "qemu", "-n", "2"]).expect(0).stdout, "two\nthree\n");
    assert_eq!(bench.run(&["logs", "qemu"]).expect(0).stdout, "one\ntwo\nthree\n");
    assert!(bench.run(&["logs"]).expect(0).stdout.contains("qemu    host   14 B"));

    let (running, mut stdout) =
        Running::spawn_unread(&mut bench.command(&["logs", "qemu", "-f", "--tail", "1"]));
    assert_eq!(read_until(&mut stdout, "\n"), "three\n");
    std::fs::OpenOptions::new().append(true).open(&log).unwrap().write_all(b"more\n").unwrap();
    assert_eq!(read_until(&mut stdout, "\n"), "more\n");
    std::fs::rename(&log, log.with_extension("log.1")).unwrap();
    std::fs::write(&log, "another file\n").unwrap();
    assert_eq!(read_until(&mut stdout, "\n"), "another file\n");
    std::fs::write(&log, "cut\n").unwrap();
    assert_eq!(read_until(&mut stdout, "\n"), "cut\n");
    running.signal(Signal::SIGTERM);
    running.finish().expect(-libc::SIGTERM);
}
