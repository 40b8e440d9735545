//! How streams begin and end.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vhost_user_backend::{VhostUserBackendMut, VringT};

use super::super::control::{FromDevice, Reason, ToDevice};
use super::super::credit::WINDOW;
use super::super::muxer::MAX_CONNECTIONS;
use super::super::packet::{Op, SHUTDOWN_BOTH, SHUTDOWN_RCV, SHUTDOWN_SEND};
use super::guest::{Guest, RxLayout, pattern};

fn open_message(id: u32, deadline_ms: u32) -> ToDevice {
    ToDevice::Open { id, guest_port: 1000, reply_len: 0, deadline_ms, preamble: vec![] }
}

fn read_to_end(guest: &mut Guest, mut socket: impl Read) -> Vec<u8> {
    let mut got = Vec::new();
    guest.until("end of the stream", |_| {
        let mut chunk = [0; 65536];
        match socket.read(&mut chunk) {
            Ok(0) => Some(()),
            Ok(n) => {
                got.extend_from_slice(&chunk[..n]);
                None
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                None
            }
        }
    });
    got
}

fn tcp_pair() -> (TcpStream, OwnedFd) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    client.set_nonblocking(true).unwrap();
    (client, listener.accept().unwrap().0.into())
}

#[test]
fn preamble_reply_and_what_follows() {
    let mut guest = Guest::new();
    let stream = guest.open(1, b"hello", 3);
    let (header, payload) = guest.expect(Op::Rw);
    assert_eq!(payload, b"hello");
    assert_eq!(header.buf_alloc, WINDOW);
    guest.send(stream.header(Op::Rw), b"a", &[]);
    assert_eq!(guest.try_answer(), None, "the reply is not complete");
    guest.send(stream.header(Op::Rw), b"bcdef", &[]);
    assert_eq!(guest.answer(), FromDevice::Opened { id: 1, reply: b"abc".to_vec() });
    guest.send(stream.header(Op::Rw), b"gh", &[]);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    guest.attach(1, theirs.into());
    let mut got = [0; 5];
    ours.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"defgh");
}

#[test]
fn a_stream_that_is_open_is_told_what_it_is() {
    let exchange =
        |id| ToDevice::Exchange { id, reply_len: 3, deadline_ms: 600_000, preamble: b"hi".to_vec() };
    let mut guest = Guest::new();
    let stream = guest.open(1, &[], 0);
    guest.answer();
    // What is said unasked belongs to the reply.
    guest.send(stream.header(Op::Rw), b"ab", &[]);
    guest.ask(exchange(1), None);
    assert_eq!(guest.expect(Op::Rw).1, b"hi");
    assert_eq!(guest.try_answer(), None, "the reply is not complete");
    guest.send(stream.header(Op::Rw), b"cd", &[]);
    assert_eq!(guest.answer(), FromDevice::Opened { id: 1, reply: b"abc".to_vec() });
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    guest.attach(1, theirs.into());
    let mut got = [0; 1];
    ours.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"d");
    guest.ask(exchange(1), None);
    assert_eq!(guest.answer(), FromDevice::Failed { id: 1, reason: Reason::Unknown }, "it has its fd");
    // A guest that has finished will not answer.
    let stream = guest.open(2, &[], 0);
    guest.answer();
    guest.send(stream.shutdown(SHUTDOWN_SEND), &[], &[]);
    guest.ask(exchange(2), None);
    assert_eq!(guest.answer(), FromDevice::Failed { id: 2, reason: Reason::GuestClosed });
    guest.expect(Op::Rst);
}

#[test]
fn a_long_preamble_waits_for_credit() {
    let mut guest = Guest::new();
    let preamble = pattern(60 * 1024);
    let open = ToDevice::Open {
        id: 1,
        guest_port: 1000,
        reply_len: 0,
        deadline_ms: 600_000,
        preamble: preamble.clone(),
    };
    guest.ask(open, None);
    let (request, _) = guest.expect(Op::Request);
    let mut stream =
        super::guest::Stream { host_port: request.src_port, guest_port: 1000, buf_alloc: 10_000, fwd_cnt: 0 };
    guest.send(stream.header(Op::Response), &[], &[]);
    let mut got = Vec::new();
    while got.len() < preamble.len() {
        let (header, payload) = guest.next();
        match Op::from_wire(header.op) {
            Some(Op::Rw) => {
                got.extend_from_slice(&payload);
                assert!(got.len() - stream.fwd_cnt as usize <= 10_000);
            }
            Some(Op::CreditRequest) => {
                stream.fwd_cnt = got.len() as u32;
                guest.send(stream.header(Op::CreditUpdate), &[], &[]);
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(got, preamble);
    assert!(matches!(guest.answer(), FromDevice::Opened { .. }));
}

#[test]
fn nobody_listens() {
    let mut guest = Guest::new();
    guest.ask(open_message(1, 600_000), None);
    let (request, _) = guest.expect(Op::Request);
    let stream =
        super::guest::Stream { host_port: request.src_port, guest_port: 1000, buf_alloc: 0, fwd_cnt: 0 };
    guest.send(stream.header(Op::Rst), &[], &[]);
    assert_eq!(guest.answer(), FromDevice::Failed { id: 1, reason: Reason::Refused });
    guest.expect_silence();
    assert_eq!(guest.connections(), 0);
}

#[test]
fn opens_wait_for_the_driver_until_their_deadline() {
    let mut guest = Guest::off(RxLayout::One);
    guest.ask(open_message(1, 30), None);
    guest.ask(open_message(2, 600_000), None);
    assert_eq!(guest.answer(), FromDevice::Failed { id: 1, reason: Reason::Deadline });
    guest.start();
    guest.post_all();
    guest.expect(Op::Request);
    guest.expect_silence();
    assert_eq!(guest.connections(), 1);
}

#[test]
fn an_unanswered_request_ends_at_its_deadline() {
    let mut guest = Guest::new();
    guest.ask(open_message(1, 20), None);
    guest.expect(Op::Request);
    assert_eq!(guest.answer(), FromDevice::Failed { id: 1, reason: Reason::Deadline });
    guest.expect(Op::Rst);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn half_close_from_the_host() {
    let mut guest = Guest::new();
    let (stream, mut ours) = guest.open_pair(1);
    ours.write_all(b"question").unwrap();
    ours.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.expect(Op::Rw).1, b"question");
    assert_eq!(guest.expect(Op::Shutdown).0.flags, SHUTDOWN_SEND);
    guest.send(stream.header(Op::Rw), b"answer", &[]);
    guest.send(stream.shutdown(SHUTDOWN_SEND), &[], &[]);
    assert_eq!(read_to_end(&mut guest, &ours), b"answer");
    assert_eq!(guest.expect(Op::Shutdown).0.flags, SHUTDOWN_BOTH);
    assert_eq!(guest.connections(), 1, "until the guest agrees");
    guest.send(stream.header(Op::Rst), &[], &[]);
    assert_eq!(guest.connections(), 0);
    guest.expect_silence();
}

#[test]
fn half_close_from_the_guest() {
    let mut guest = Guest::new();
    let (stream, mut ours) = guest.open_pair(1);
    guest.send(stream.header(Op::Rw), b"answer", &[]);
    guest.send(stream.shutdown(SHUTDOWN_SEND), &[], &[]);
    assert_eq!(read_to_end(&mut guest, &ours), b"answer");
    ours.write_all(b"late").unwrap();
    assert_eq!(guest.expect(Op::Rw).1, b"late");
    drop(ours);
    assert_eq!(guest.expect(Op::Shutdown).0.flags, SHUTDOWN_BOTH);
}

#[test]
fn a_guest_that_closes_gets_its_rst_at_once_and_the_client_all_its_bytes() {
    let mut guest = Guest::new();
    let (stream, ours) = guest.open_pair(1);
    // More than a socket pair holds, within the window.
    let bytes = pattern(WINDOW as usize);
    for chunk in bytes.chunks(65536) {
        guest.send(stream.header(Op::Rw), chunk, &[44, 32768]);
    }
    guest.inbox.clear();
    guest.finish(&stream);
    guest.expect(Op::Rst);
    assert_eq!(guest.connections(), 1, "it drains");
    assert_eq!(read_to_end(&mut guest, &ours), bytes);
    assert_eq!(guest.connections(), 0);
    guest.expect_silence();
}

#[test]
fn a_guest_that_closes_before_the_fd_comes() {
    let mut guest = Guest::new();
    let stream = guest.open(1, &[], 0);
    guest.answer();
    guest.send(stream.header(Op::Rw), b"greeting", &[]);
    guest.finish(&stream);
    guest.expect(Op::Rst);
    let (ours, theirs) = UnixStream::pair().unwrap();
    guest.attach(1, theirs.into());
    assert_eq!(read_to_end(&mut guest, &ours), b"greeting");
    assert_eq!(guest.connections(), 0);
}

#[test]
fn a_guest_that_closes_before_its_reply() {
    let mut guest = Guest::new();
    let stream = guest.open(1, &[], 5);
    guest.send(stream.header(Op::Rw), b"half", &[]);
    guest.send(stream.shutdown(SHUTDOWN_BOTH), &[], &[]);
    guest.expect(Op::Rst);
    assert_eq!(guest.answer(), FromDevice::Failed { id: 1, reason: Reason::GuestClosed });
}

#[test]
fn a_cut_is_a_reset_for_a_tcp_client() {
    let mut guest = Guest::new();
    let stream = guest.open(1, &[], 0);
    guest.answer();
    let (mut client, fd) = tcp_pair();
    guest.attach(1, fd);
    guest.send(stream.header(Op::Rst), &[], &[]);
    let error = guest.until("reset", |_| match client.read(&mut [0; 10]) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => None,
        other => Some(other),
    });
    assert_eq!(error.unwrap_err().kind(), ErrorKind::ConnectionReset);
    guest.expect_silence();
}

#[test]
fn a_reset_after_both_halves_is_a_normal_end() {
    let mut guest = Guest::new();
    let stream = guest.open(1, &[], 0);
    guest.answer();
    let (mut client, fd) = tcp_pair();
    guest.attach(1, fd);
    client.write_all(b"x").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    guest.expect(Op::Rw);
    guest.expect(Op::Shutdown);
    guest.repost = false;
    guest.send(stream.header(Op::Rw), b"bye", &[]);
    guest.send(stream.shutdown(SHUTDOWN_SEND), &[], &[]);
    guest.send(stream.header(Op::Rst), &[], &[]);
    assert_eq!(read_to_end(&mut guest, &client), b"bye");
    assert_eq!(guest.connections(), 0);
}

#[test]
fn a_broken_client_resets_the_guest() {
    let mut guest = Guest::new();
    let stream = guest.open(1, &[], 0);
    guest.answer();
    let (client, fd) = tcp_pair();
    guest.attach(1, fd);
    rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO)).unwrap();
    drop(client);
    guest.expect(Op::Rst);
    assert_eq!(guest.connections(), 0);
    // Its late packets are strays now, and answered as such.
    guest.send(stream.header(Op::Rw), b"late", &[]);
    guest.expect(Op::Rst);
}

#[test]
fn a_guest_that_will_not_read() {
    let mut guest = Guest::new();
    let (stream, mut ours) = guest.open_pair(1);
    guest.send(stream.shutdown(SHUTDOWN_RCV), &[], &[]);
    assert!(ours.write_all(b"unwanted").is_err());
    guest.send(stream.header(Op::Rw), b"still talking", &[]);
    let mut got = [0; 13];
    ours.read_exact(&mut got).unwrap();
    guest.expect_silence();
    guest.send(stream.shutdown(SHUTDOWN_SEND), &[], &[]);
    guest.expect(Op::Rst);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn cancel_and_a_dead_supervisor_reset_what_has_no_fd() {
    let mut guest = Guest::new();
    guest.open(1, &[], 0);
    guest.answer();
    guest.ask(ToDevice::Cancel { id: 1 }, None);
    guest.expect(Op::Rst);
    let (stream, mut ours) = guest.open_pair(2);
    guest.open(3, &[], 0);
    guest.answer();
    // A successor takes over; what has an fd lives on.
    guest.control = guest.connect();
    guest.expect(Op::Rst);
    assert_eq!(guest.connections(), 1);
    guest.send(stream.header(Op::Rw), b"alive", &[]);
    let mut got = [0; 5];
    ours.read_exact(&mut got).unwrap();
}

#[test]
fn an_fd_for_a_stream_that_was_reset_becomes_a_reset() {
    let mut guest = Guest::new();
    let stream = guest.open(1, &[], 0);
    guest.answer();
    guest.send(stream.header(Op::Rst), &[], &[]);
    assert_eq!(guest.answer(), FromDevice::Failed { id: 1, reason: Reason::GuestReset });
    let (mut client, fd) = tcp_pair();
    guest.ask(ToDevice::Attach { id: 1, group: 0 }, Some(fd));
    assert_eq!(guest.answer(), FromDevice::AttachFailed { id: 1, reason: Reason::Unknown });
    assert_eq!(client.read(&mut [0; 10]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn an_fd_that_is_no_stream_socket_is_refused() {
    let mut guest = Guest::new();
    guest.open(1, &[], 0);
    guest.answer();
    let file = std::fs::File::open("/dev/null").unwrap();
    guest.ask(ToDevice::Attach { id: 1, group: 0 }, Some(file.into()));
    assert_eq!(guest.answer(), FromDevice::AttachFailed { id: 1, reason: Reason::BadFd });
    guest.expect(Op::Rst);
    guest.open(2, &[], 0);
    guest.answer();
    guest.ask(ToDevice::Attach { id: 2, group: 0 }, None);
    assert_eq!(guest.answer(), FromDevice::AttachFailed { id: 2, reason: Reason::BadFd });
}

/// What QEMU does around a pause and a driver's reset: both rings stop; returns where they were.
fn stop_rings(guest: &mut Guest) -> [u16; 2] {
    [0, 1].map(|ring: u16| {
        let vring = &guest.vrings[usize::from(ring)];
        vring.set_queue_ready(false);
        let next = vring.queue_next_avail();
        guest.backend.stop_vring(ring.into()).unwrap();
        next
    })
}

fn start_rings(guest: &mut Guest, bases: [u16; 2]) {
    for (vring, base) in guest.vrings.iter().zip(bases) {
        vring.set_queue_next_avail(base);
        vring.set_queue_ready(true);
    }
}

/// A paused VM knows its connections when it goes on, and what came meanwhile is carried then.
#[test]
fn a_pause_cuts_nobody() {
    let mut guest = Guest::new();
    let (stream, mut ours) = guest.open_pair(1);
    let bases = stop_rings(&mut guest);
    ours.write_all(b"meanwhile").unwrap();
    for _ in 0..5 {
        guest.turn();
    }
    assert!(!guest.busy(), "a paused guest makes the device spin");
    start_rings(&mut guest, bases);
    assert_eq!(guest.expect(Op::Rw).1, b"meanwhile");
    guest.send(stream.header(Op::Rw), b"alive", &[]);
    let mut got = [0; 5];
    ours.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"alive");
}

#[test]
fn a_driver_that_starts_anew_closes_every_fd() {
    let mut guest = Guest::new();
    let (_, ours) = guest.open_pair(1);
    guest.open(2, &[], 0);
    guest.answer();
    stop_rings(&mut guest);
    start_rings(&mut guest, [0; 2]);
    guest.turn();
    assert_eq!(guest.answer(), FromDevice::Failed { id: 2, reason: Reason::DeviceReset });
    assert_eq!(read_to_end(&mut guest, &ours), b"");
    assert_eq!(guest.connections(), 0);
}

#[test]
fn there_is_a_limit() {
    let mut guest = Guest::new();
    for id in 0..MAX_CONNECTIONS as u32 {
        guest.ask(open_message(id, 600_000), None);
        guest.expect(Op::Request);
    }
    guest.ask(open_message(5000, 600_000), None);
    assert_eq!(guest.answer(), FromDevice::Failed { id: 5000, reason: Reason::TooMany });
    guest.ask(ToDevice::Cancel { id: 0 }, None);
    guest.expect(Op::Rst);
    guest.ask(open_message(5000, 600_000), None);
    guest.expect(Op::Request);
}

#[test]
fn a_group_leaves_as_much_room_as_it_takes() {
    let mut guest = Guest::new();
    let mut ends = Vec::new();
    let mut attach = |guest: &mut Guest, id: u32, group: u32| {
        guest.open(id, &[], 0);
        guest.answer();
        let (ours, theirs) = UnixStream::pair().unwrap();
        guest.ask(ToDevice::Attach { id, group }, Some(theirs.into()));
        ends.push(ours);
        guest.answer()
    };
    let half = MAX_CONNECTIONS as u32 / 2;
    for id in 0..half {
        assert_eq!(attach(&mut guest, id, 7), FromDevice::Attached { id });
    }
    let refused = FromDevice::AttachFailed { id: half, reason: Reason::TooMany };
    assert_eq!(attach(&mut guest, half, 7), refused);
    guest.expect(Op::Rst);
    // Others have room, and so has the group when some of it have left.
    for (id, group) in [(half + 1, 8), (half + 2, 0)] {
        assert_eq!(attach(&mut guest, id, group), FromDevice::Attached { id });
    }
    assert!(matches!(attach(&mut guest, half + 3, 7), FromDevice::AttachFailed { .. }));
    guest.expect(Op::Rst);
    drop(ends);
    guest.backend.reset_device();
    guest.turn();
    assert_eq!(guest.connections(), 0);
}

#[test]
fn a_dead_connections_socket_is_no_longer_watched() {
    let mut guest = Guest::new();
    let stream = guest.open(1, &[], 0);
    guest.answer();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let duplicate = theirs.try_clone().unwrap();
    guest.attach(1, theirs.into());
    guest.send(stream.header(Op::Rst), &[], &[]);
    guest.step();
    ours.write_all(b"anyone there?").unwrap();
    assert!(!guest.busy(), "an event of a connection that is gone");
    drop(duplicate);
}

/// Reads until the stream ends; what came, and whether it ended in a reset.
fn read_to_the_end(guest: &mut Guest, mut socket: impl Read) -> (Vec<u8>, bool) {
    let mut got = Vec::new();
    let reset = guest.until("end of the stream", |_| {
        let mut chunk = [0; 65536];
        match socket.read(&mut chunk) {
            Ok(0) => Some(false),
            Ok(n) => {
                got.extend_from_slice(&chunk[..n]);
                None
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::ConnectionReset);
                Some(true)
            }
        }
    });
    (got, reset)
}

/// An open stream with a TCP client.
fn open_tcp(guest: &mut Guest, id: u32) -> (super::guest::Stream, TcpStream) {
    let stream = guest.open(id, &[], 0);
    assert!(matches!(guest.answer(), FromDevice::Opened { .. }));
    let (client, fd) = tcp_pair();
    guest.attach(id, fd);
    (stream, client)
}

#[test]
fn a_close_without_an_end_is_a_cut() {
    let mut guest = Guest::new();
    let (stream, client) = open_tcp(&mut guest, 1);
    guest.send(stream.header(Op::Rw), b"half an answer", &[]);
    guest.send(stream.shutdown(SHUTDOWN_BOTH), &[], &[]);
    guest.expect(Op::Rst);
    let (_, reset) = read_to_the_end(&mut guest, &client);
    assert!(reset, "the client takes half an answer for a whole one");
    assert_eq!(guest.connections(), 0);
    guest.expect_silence();
    // A local client cannot be told, but it does not hang.
    let (stream, ours) = guest.open_pair(2);
    guest.send(stream.shutdown(SHUTDOWN_BOTH), &[], &[]);
    guest.expect(Op::Rst);
    assert_eq!(read_to_end(&mut guest, &ours), b"");
    assert_eq!(guest.connections(), 0);
}

#[test]
fn a_cut_is_a_cut_after_the_client_has_finished_too() {
    let mut guest = Guest::new();
    let (stream, mut client) = open_tcp(&mut guest, 1);
    client.write_all(b"question").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    guest.expect(Op::Rw);
    assert_eq!(guest.expect(Op::Shutdown).0.flags, SHUTDOWN_SEND);
    guest.send(stream.header(Op::Rw), b"half an answer", &[]);
    guest.send(stream.shutdown(SHUTDOWN_BOTH), &[], &[]);
    guest.expect(Op::Rst);
    assert!(read_to_the_end(&mut guest, &client).1);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn a_cut_before_the_fd_comes_resets_it() {
    let mut guest = Guest::new();
    let stream = guest.open(1, &[], 0);
    guest.answer();
    guest.send(stream.shutdown(SHUTDOWN_BOTH), &[], &[]);
    guest.expect(Op::Rst);
    assert_eq!(guest.answer(), FromDevice::Failed { id: 1, reason: Reason::GuestReset });
    let (client, fd) = tcp_pair();
    guest.ask(ToDevice::Attach { id: 1, group: 0 }, Some(fd));
    assert_eq!(guest.answer(), FromDevice::AttachFailed { id: 1, reason: Reason::Unknown });
    assert!(read_to_the_end(&mut guest, &client).1);
}

/// A server may answer what came with the hello, and be cut, before the fd comes: the answer is the client's all the same.
#[test]
fn an_answer_before_the_fd_comes_outlives_a_cut() {
    let mut guest = Guest::new();
    for by_rst in [false, true] {
        let stream = guest.open(1, &[], 0);
        guest.answer();
        guest.send(stream.header(Op::Rw), b"answer", &[]);
        if by_rst {
            guest.send(stream.header(Op::Rst), &[], &[]);
        } else {
            guest.send(stream.shutdown(SHUTDOWN_BOTH), &[], &[]);
            guest.expect(Op::Rst);
        }
        let (client, fd) = tcp_pair();
        guest.attach(1, fd);
        assert_eq!(read_to_the_end(&mut guest, &client), (b"answer".to_vec(), true));
        assert_eq!(guest.connections(), 0);
    }
    // Nobody comes for it.
    let stream = guest.open(2, &[], 0);
    guest.answer();
    guest.send(stream.header(Op::Rw), b"answer", &[]);
    guest.send(stream.shutdown(SHUTDOWN_BOTH), &[], &[]);
    guest.expect(Op::Rst);
    guest.ask(ToDevice::Cancel { id: 2 }, None);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn halves_that_end_one_by_one_are_an_end() {
    for first in [SHUTDOWN_SEND, SHUTDOWN_RCV] {
        let mut guest = Guest::new();
        let (stream, client) = open_tcp(&mut guest, 1);
        guest.send(stream.header(Op::Rw), b"all of it", &[]);
        guest.send(stream.shutdown(first), &[], &[]);
        guest.send(stream.shutdown(SHUTDOWN_BOTH - first), &[], &[]);
        guest.expect(Op::Rst);
        assert_eq!(read_to_the_end(&mut guest, &client), (b"all of it".to_vec(), false));
        drop(client);
        guest.until("the client's end", |guest| (guest.connections() == 0).then_some(()));
    }
}

/// A client that still sends when the guest is done: with unread bytes, or an early close, its kernel would throw away
/// what it has not read.
#[test]
fn a_client_that_goes_on_sending_gets_every_byte() {
    let mut guest = Guest::new();
    let (stream, mut client) = open_tcp(&mut guest, 1);
    rustix::net::sockopt::set_socket_recv_buffer_size(&client, 4096).unwrap();
    let upload = pattern(3_000_000);
    let answer = pattern(WINDOW as usize);
    let mut sent = 0;
    let mut push = |client: &mut TcpStream, most: usize| {
        while sent < most
            && let Ok(n) = client.write(&upload[sent..most])
        {
            sent += n;
        }
        sent
    };
    push(&mut client, 500_000);
    // It is not read: the guest gives no more credit.
    for chunk in answer.chunks(65536) {
        guest.send(stream.header(Op::Rw), chunk, &[]);
    }
    guest.finish(&stream);
    let mut got = Vec::new();
    guest.until("the whole answer", |_| {
        push(&mut client, 3_000_000);
        let mut chunk = [0; 3000];
        match client.read(&mut chunk) {
            Ok(0) => Some(()),
            Ok(n) => {
                got.extend_from_slice(&chunk[..n]);
                None
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock, "after {} bytes", got.len());
                None
            }
        }
    });
    assert!(got == answer, "{} of {} bytes", got.len(), answer.len());
    guest.until("the whole upload", |_| (push(&mut client, 3_000_000) == 3_000_000).then_some(()));
    drop(client);
    guest.until("the client's end", |guest| (guest.connections() == 0).then_some(()));
}

/// Clients that have everything and only keep their end open make room for others.
#[test]
fn clients_that_do_not_close_hold_up_nobody() {
    let mut guest = Guest::new();
    let mut clients = Vec::new();
    for id in 0..MAX_CONNECTIONS as u32 {
        let (stream, client) = open_tcp(&mut guest, id);
        guest.finish(&stream);
        guest.expect(Op::Rst);
        clients.push(client);
    }
    assert_eq!(guest.connections(), MAX_CONNECTIONS as u64);
    for client in &clients {
        assert_eq!(read_to_the_end(&mut guest, client), (vec![], false));
    }
    guest.open_pair(5000);
    assert_eq!(guest.connections(), 1);
}

#[test]
fn a_local_client_that_leaves_bytes_unread_resets_the_guest() {
    let mut guest = Guest::new();
    let (stream, ours) = guest.open_pair(1);
    guest.send(stream.header(Op::Rw), b"never read", &[]);
    drop(ours);
    assert_eq!(guest.expect(Op::Rst).0.src_port, stream.host_port);
    assert_eq!(guest.connections(), 0);
    // One that has read everything has only finished, as far as can be seen; writing shows the rest.
    let (stream, ours) = guest.open_pair(2);
    drop(ours);
    assert_eq!(guest.expect(Op::Shutdown).0.flags, SHUTDOWN_SEND);
    guest.send(stream.header(Op::Rw), b"anyone there?", &[]);
    guest.expect(Op::Rst);
    assert_eq!(guest.connections(), 0);
}

/// Fds that come in excess are closed, all of them: nobody can tell which one was meant.
#[test]
fn too_many_fds_are_closed() {
    use std::os::fd::AsFd;
    for count in [2, 3, 20] {
        let mut guest = Guest::new();
        guest.open(1, &[], 0);
        guest.answer();
        let (watch, fd) = UnixStream::pair().unwrap();
        watch.set_nonblocking(true).unwrap();
        let fds = vec![fd.as_fd(); count];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(20))];
        let mut ancillary = rustix::net::SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(rustix::net::SendAncillaryMessage::ScmRights(&fds)));
        let record = ToDevice::Attach { id: 1, group: 0 }.encode();
        let part = [std::io::IoSlice::new(&record)];
        let flags = rustix::net::SendFlags::empty();
        rustix::net::sendmsg(&guest.control, &part, &mut ancillary, flags).unwrap();
        drop(fd);
        assert_eq!(guest.answer(), FromDevice::AttachFailed { id: 1, reason: Reason::BadFd });
        guest.expect(Op::Rst);
        assert_eq!(read_to_end(&mut guest, &watch), b"", "{count}");
    }
}
