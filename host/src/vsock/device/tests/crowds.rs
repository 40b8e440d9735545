//! Many connections at once: slow, silent, short-lived.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use super::super::control::{FromDevice, Reason, ToDevice};
use super::super::credit::WINDOW;
use super::super::muxer::MAX_CONNECTIONS;
use super::super::packet::{Op, SHUTDOWN_SEND};
use super::guest::{Guest, RxLayout, Stream, pattern};

fn open(id: u32) -> ToDevice {
    ToDevice::Open { id, guest_port: 1000, reply_len: 0, deadline_ms: 600_000, preamble: vec![] }
}

/// Bytes there and back over one stream, while others do what they do.
fn echo(guest: &mut Guest, stream: &mut Stream, ours: &mut UnixStream, bytes: &[u8]) {
    for chunk in bytes.chunks(16_000) {
        guest.send(stream.header(Op::Rw), chunk, &[44]);
        let mut got = vec![0; chunk.len()];
        let mut have = 0;
        guest.until("the bytes", |_| {
            match ours.read(&mut got[have..]) {
                Ok(n) => have += n,
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
            (have == got.len()).then_some(())
        });
        ours.write_all(&got).unwrap();
        let mut back = Vec::new();
        guest.until("the bytes back", |guest| {
            while let Some((header, payload)) = guest.inbox.pop_front() {
                if header.src_port == stream.host_port {
                    back.extend(payload);
                }
            }
            (back.len() == chunk.len()).then_some(())
        });
        assert!(back == chunk, "bytes differ");
        stream.fwd_cnt = stream.fwd_cnt.wrapping_add(chunk.len() as u32);
        guest.send(stream.header(Op::CreditUpdate), &[], &[]);
    }
}

#[test]
fn a_hundred_slow_readers_hold_up_nobody() {
    let mut guest = Guest::new();
    let mut slow = Vec::new();
    for id in 0..100 {
        let (stream, ours) = guest.open_pair(id);
        for chunk in pattern(WINDOW as usize).chunks(65_536) {
            guest.send(stream.header(Op::Rw), chunk, &[44, 32_768]);
        }
        guest.inbox.clear();
        slow.push((stream, ours));
    }
    let (mut stream, mut ours) = guest.open_pair(1000);
    echo(&mut guest, &mut stream, &mut ours, &pattern(400_000));
    assert_eq!(guest.connections(), 101);
    assert!(!guest.busy(), "slow readers make the device spin");
    // In the end they get what was theirs.
    for (_, ours) in &mut slow {
        let mut got = Vec::new();
        guest.until("a slow reader's bytes", |_| {
            let mut chunk = [0; 65_536];
            match ours.read(&mut chunk) {
                Ok(n) => got.extend_from_slice(&chunk[..n]),
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
            (got.len() == WINDOW as usize).then_some(())
        });
        assert!(got == pattern(WINDOW as usize));
    }
}

#[test]
fn a_thousand_requests_that_nobody_answers_hold_up_nobody() {
    let mut guest = Guest::new();
    for id in 0..1000 {
        guest.ask(open(id), None);
        guest.expect(Op::Request);
    }
    let (mut stream, mut ours) = guest.open_pair(5000);
    echo(&mut guest, &mut stream, &mut ours, &pattern(200_000));
    assert_eq!(guest.connections(), 1001);
    assert!(!guest.busy());
    for id in 0..1000 {
        guest.ask(ToDevice::Cancel { id }, None);
    }
    guest.until("their end", |guest| {
        guest.inbox.clear();
        (guest.connections() == 1).then_some(())
    });
}

/// REQUESTs of the guest's own: each is refused, none is remembered.
#[test]
fn a_flood_of_requests_is_refused_one_by_one() {
    let mut guest = Guest::new();
    let (mut stream, mut ours) = guest.open_pair(1);
    for port in 0..5000 {
        let asked = Stream { host_port: port, guest_port: 70_000 + port, buf_alloc: 1 << 18, fwd_cnt: 0 };
        guest.send(asked.header(Op::Request), &[], &[]);
        let (rst, _) = guest.expect(Op::Rst);
        assert_eq!((rst.src_port, rst.dst_port), (port, 70_000 + port));
    }
    guest.expect_silence();
    assert_eq!(guest.connections(), 1);
    echo(&mut guest, &mut stream, &mut ours, &pattern(20_000));
}

/// A guest that takes nothing: whatever waits for its buffers waits without work.
#[test]
fn without_receive_buffers_nothing_spins() {
    let mut guest = Guest::off(RxLayout::One);
    guest.start();
    for id in 0..MAX_CONNECTIONS as u32 {
        guest.ask(open(id), None);
    }
    let stray = Stream { host_port: 7, guest_port: 8, buf_alloc: 1, fwd_cnt: 1 };
    for _ in 0..100 {
        guest.send(stray.header(Op::Rw), b"x", &[]);
    }
    for _ in 0..5 {
        guest.step();
    }
    assert!(!guest.busy());
    assert!(guest.inbox.is_empty());
    guest.post_all();
    let mut count = 0;
    guest.until("all packets", |guest| {
        count += guest.inbox.drain(..).count();
        (count == MAX_CONNECTIONS + 100).then_some(())
    });
}

/// Opens and closes streams in every way there is, and looks at the process around it: no fd and no memory is lost.
/// Run in a process of its own, since other tests would be counted too.
#[test]
#[ignore = "the process that the other tests start"]
fn storm_process() {
    let mut guest = Guest::new();
    let all = |guest: &mut Guest, count| {
        storm(guest, count);
        dying_readers(guest);
        more_than_there_is_room_for(guest);
    };
    all(&mut guest, 300);
    let before = (open_fds(), resident());
    all(&mut guest, 10_000);
    let after = (open_fds(), resident());
    assert_eq!(after.0, before.0, "fds");
    assert!(after.1 <= before.1 + (8 << 20), "{} bytes before, {} after", before.1, after.1);
    println!("weathered");
}

fn storm(guest: &mut Guest, count: u32) {
    for id in 0..count {
        match id % 5 {
            0 => {
                guest.ask(open(id), None);
                let (request, _) = guest.expect(Op::Request);
                let stream =
                    Stream { host_port: request.src_port, guest_port: 1000, buf_alloc: 0, fwd_cnt: 0 };
                guest.send(stream.header(Op::Rst), &[], &[]);
                assert!(matches!(guest.answer(), FromDevice::Failed { .. }));
            }
            1 => {
                guest.open(id, &[], 0);
                guest.answer();
                guest.ask(ToDevice::Cancel { id }, None);
                guest.expect(Op::Rst);
            }
            way => {
                let (stream, mut ours) = guest.open_pair(id);
                guest.send(stream.header(Op::Rw), &pattern(1000), &[]);
                ours.write_all(&pattern(5000)).unwrap();
                let mut got = [0; 1000];
                ours.read_exact(&mut got).unwrap();
                assert_eq!(guest.expect(Op::Rw).1.len(), 4052);
                assert_eq!(guest.expect(Op::Rw).1.len(), 948);
                match way {
                    2 => guest.finish(&stream),
                    3 => guest.send(stream.header(Op::Rst), &[], &[]),
                    _ => {
                        drop(ours);
                        assert_eq!(guest.expect(Op::Shutdown).0.flags, SHUTDOWN_SEND);
                        guest.send(stream.shutdown(SHUTDOWN_SEND), &[], &[]);
                        guest.expect(Op::Shutdown);
                        guest.send(stream.header(Op::Rst), &[], &[]);
                    }
                }
                if way == 2 {
                    guest.expect(Op::Rst);
                }
            }
        }
        assert!(guest.inbox.is_empty());
    }
    assert_eq!(guest.connections(), 0);
}

/// A hundred clients that read nothing, and die in mid-flow.
fn dying_readers(guest: &mut Guest) {
    let slow: Vec<_> = (0..100)
        .map(|id| {
            let (stream, ours) = guest.open_pair(id);
            for chunk in pattern(WINDOW as usize).chunks(65_536) {
                guest.send(stream.header(Op::Rw), chunk, &[44, 32_768]);
            }
            guest.inbox.clear();
            ours
        })
        .collect();
    assert_eq!(guest.connections(), 100);
    drop(slow);
    nobody_is_left(guest);
}

/// Ten thousand opens at once, of which the guest answers none.
fn more_than_there_is_room_for(guest: &mut Guest) {
    const OPENS: usize = 10_000;
    let mut refused = 0;
    let mut count = |guest: &mut Guest| {
        while let Some(answer) = guest.try_answer() {
            assert!(matches!(answer, FromDevice::Failed { reason: Reason::TooMany, .. }), "{answer:?}");
            refused += 1;
        }
        guest.inbox.clear();
        refused
    };
    for id in 0..OPENS as u32 {
        guest.ask(open(id), None);
        count(guest);
    }
    guest.until("the refusals", |guest| (count(guest) == OPENS - MAX_CONNECTIONS).then_some(()));
    assert!(!guest.busy());
    for id in 0..OPENS as u32 {
        guest.ask(ToDevice::Cancel { id }, None);
        while guest.try_answer().is_some() {}
    }
    nobody_is_left(guest);
}

fn nobody_is_left(guest: &mut Guest) {
    guest.until("their end", |guest| {
        guest.inbox.clear();
        while guest.try_answer().is_some() {}
        (guest.connections() == 0).then_some(())
    });
}

fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn ten_thousand_connections_leave_nothing_behind() {
    let output = super::process::again("crowds::storm_process").output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains("weathered"), "{output:?}");
}
