//! A guest that breaks rules harms its own connection at most.

use std::io::Read;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::super::control::{FromDevice, Reason, ToDevice};
use super::super::credit::WINDOW;
use super::super::packet::{HEADER_LEN, Header, Op};
use super::guest::{CID, Guest, Stream, pattern};

/// The other stream still works.
fn alive(guest: &mut Guest, stream: &Stream, ours: &mut UnixStream) {
    guest.send(stream.header(Op::Rw), b"alive", &[]);
    let mut got = [0; 5];
    guest.until("a sign of life", |_| ours.read_exact(&mut got).ok());
    assert_eq!(&got, b"alive");
}

#[test]
fn malformed_packets_reset_their_connection_and_come_back() {
    let mut guest = Guest::new();
    let (good, mut ours) = guest.open_pair(1);
    for id in 2..5 {
        let (bad, _other) = guest.open_pair(id);
        let mut header = bad.header(Op::Rw);
        let bytes = match id {
            2 => {
                header.len = 100;
                [header.encode().as_slice(), &[0; 99]].concat()
            }
            3 => {
                header.len = 65537;
                [header.encode().as_slice(), &[0; 65537]].concat()
            }
            _ => {
                header.len = u32::MAX;
                header.encode().to_vec()
            }
        };
        guest.send_raw(&bytes, &[]);
        guest.step();
        assert_eq!(guest.expect(Op::Rst).0.src_port, bad.host_port);
        assert!(guest.all_used());
    }
    // Too short for a header: nothing to reset, but the chain comes back.
    for len in [0, 1, HEADER_LEN - 1] {
        guest.send_raw(&vec![0xff; len], &[]);
        guest.step();
        assert!(guest.all_used());
    }
    guest.expect_silence();
    alive(&mut guest, &good, &mut ours);
    assert_eq!(guest.connections(), 1);
}

#[test]
fn bytes_behind_the_headers_length_are_not_data() {
    let mut guest = Guest::new();
    let (stream, mut ours) = guest.open_pair(1);
    let header = Header { len: 3, ..stream.header(Op::Rw) };
    guest.send_raw(&[header.encode().as_slice(), b"yesnono"].concat(), &[44]);
    guest.step();
    let mut got = [0; 10];
    assert_eq!(ours.read(&mut got).unwrap(), 3);
    assert_eq!(&got[..3], b"yes");
}

#[test]
fn strays_are_reset_but_never_an_rst() {
    let mut guest = Guest::new();
    let stray = Stream { host_port: 7, guest_port: 8, buf_alloc: 1, fwd_cnt: 1 };
    guest.send(stray.header(Op::Rst), &[], &[]);
    guest.expect_silence();
    for op in [Op::Request, Op::Response, Op::Rw, Op::Shutdown, Op::CreditRequest, Op::CreditUpdate] {
        guest.send(stray.header(op), b"", &[]);
        let (rst, _) = guest.expect(Op::Rst);
        assert_eq!((rst.src_port, rst.dst_port), (7, 8));
    }
    // Not from this guest, or not to the host.
    guest.send(Header { src_cid: CID + 1, ..stray.header(Op::Rw) }, b"x", &[]);
    guest.send(Header { dst_cid: 1, ..stray.header(Op::Rw) }, b"x", &[]);
    guest.expect_silence();
    assert_eq!(guest.connections(), 0);
}

#[test]
fn another_socket_type_is_reset() {
    let mut guest = Guest::new();
    let (stream, mut ours) = guest.open_pair(1);
    guest.send(Header { socket_type: 2, ..stream.header(Op::Rw) }, b"x", &[]);
    assert_eq!(guest.expect(Op::Rst).0.socket_type, 2);
    alive(&mut guest, &stream, &mut ours);
}

#[test]
fn more_than_the_credit_resets() {
    let mut guest = Guest::new();
    let (stream, _unread) = guest.open_pair(1);
    let (good, mut ours) = guest.open_pair(2);
    let mut sent = 0;
    let (rst, _) = guest.until("reset", |guest| {
        assert!(sent <= 4 * WINDOW);
        guest.send(stream.header(Op::Rw), &pattern(65536), &[]);
        sent += 65536;
        guest.inbox.drain(..).find(|(header, _)| header.op == Op::Rst as u16)
    });
    assert_eq!(rst.src_port, stream.host_port);
    alive(&mut guest, &good, &mut ours);
}

#[test]
fn a_flood_of_strays_without_buffers_is_bounded() {
    let mut guest = Guest::new();
    guest.repost = false;
    let stray = Stream { host_port: 7, guest_port: 8, buf_alloc: 1, fwd_cnt: 1 };
    for _ in 0..3000 {
        guest.send(stray.header(Op::Rw), b"", &[]);
        assert!(guest.all_used(), "the TX queue never waits for the RX queue");
    }
    guest.inbox.clear();
    guest.repost = true;
    guest.post_all();
    for _ in 0..50 {
        guest.step();
    }
    assert_eq!(guest.inbox.len(), 1024);
}

#[test]
fn an_answer_out_of_turn_fails_the_open() {
    let mut guest = Guest::new();
    let open = ToDevice::Open { id: 1, guest_port: 9, reply_len: 0, deadline_ms: 600_000, preamble: vec![] };
    guest.ask(open, None);
    let (request, _) = guest.expect(Op::Request);
    let stream = Stream { host_port: request.src_port, guest_port: 9, buf_alloc: 1, fwd_cnt: 0 };
    guest.send(stream.header(Op::Rw), b"x", &[]);
    assert_eq!(guest.answer(), FromDevice::Failed { id: 1, reason: Reason::Protocol });
    guest.expect(Op::Rst);
}

#[derive(Clone, Debug)]
enum Act {
    Packet { stream: usize, op: u16, flags: u32, buf_alloc: u32, fwd_cnt: u32, len: usize, claimed: i32 },
    Raw(Vec<u8>),
    HostWrite(usize),
    HostRead,
    HostClose,
    Step,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (0usize..3, 0u16..9, 0u32..4, any::<u32>(), any::<u32>(), 0usize..70_000, -2i32..3).prop_map(
            |(stream, op, flags, buf_alloc, fwd_cnt, len, claimed)| Act::Packet {
                stream, op, flags, buf_alloc, fwd_cnt, len, claimed
            }
        ),
        1 => prop::collection::vec(any::<u8>(), 0..100).prop_map(Act::Raw),
        2 => (0usize..20_000).prop_map(Act::HostWrite),
        1 => Just(Act::HostRead),
        1 => Just(Act::HostClose),
        2 => Just(Act::Step),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a guest sends: no panic, every chain comes back, and a new stream can be opened afterwards.
    #[test]
    fn nothing_kills_the_device(acts in prop::collection::vec(act(), 1..60)) {
        use std::io::Write;
        let mut guest = Guest::new();
        let mut ends: Vec<_> = (0..3).map(|id| guest.open_pair(id)).collect();
        for act in acts {
            match act {
                Act::Packet { stream, op, flags, buf_alloc, fwd_cnt, len, claimed } => {
                    let claimed = (len as i64 + i64::from(claimed)).max(0) as u32;
                    let header = Header {
                        op, flags, buf_alloc, fwd_cnt, len: claimed, ..ends[stream].0.header(Op::Rw)
                    };
                    let bytes = [header.encode().as_slice(), &vec![7; len]].concat();
                    guest.send_raw(&bytes, &[44, 32768]);
                    guest.step();
                }
                Act::Raw(bytes) => {
                    guest.send_raw(&bytes, &[10]);
                    guest.step();
                }
                Act::HostWrite(len) => drop(ends[0].1.write(&vec![1; len])),
                Act::HostRead => drop(ends[1].1.read(&mut [0; 50_000])),
                Act::HostClose => drop(ends[2].1.shutdown(std::net::Shutdown::Both)),
                Act::Step => guest.step(),
            }
            prop_assert!(guest.all_used());
        }
        for _ in 0..20 {
            guest.step();
        }
        guest.inbox.clear();
        drop(ends);
        for _ in 0..20 {
            guest.step();
        }
        guest.inbox.clear();
        let (stream, mut ours) = guest.open_pair(9);
        alive(&mut guest, &stream, &mut ours);
    }
}
