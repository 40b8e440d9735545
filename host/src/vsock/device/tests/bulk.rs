//! Many bytes, both ways, whatever the cuts.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use super::super::credit::WINDOW;
use super::super::packet::Op;
use super::guest::{Guest, RxLayout, Stream, pattern};

const SIZES: [usize; 7] = [1, 4096, 32767, 32768, 32769, 65536, 1_000_000];

/// Sends from the guest, in packets of 64 KiB within its credit, and reads slowly from the host's socket.
fn guest_to_host(guest: &mut Guest, stream: &Stream, ours: &mut UnixStream, bytes: &[u8], cuts: &[usize]) {
    let (mut sent, mut credit, mut got) = (0usize, WINDOW as usize, Vec::new());
    let mut chunk = vec![0; 10_007];
    guest.until("all bytes", |guest| {
        let len = (bytes.len() - sent).min(65536).min(credit - sent);
        if len > 0 {
            guest.send(stream.header(Op::Rw), &bytes[sent..sent + len], cuts);
            sent += len;
        }
        while let Some((header, _)) = guest.inbox.pop_front() {
            assert_eq!(Op::from_wire(header.op), Some(Op::CreditUpdate));
            credit = header.fwd_cnt as usize + header.buf_alloc as usize;
        }
        match ours.read(&mut chunk) {
            Ok(n) => got.extend_from_slice(&chunk[..n]),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        (got.len() == bytes.len()).then_some(())
    });
    assert!(got == bytes, "bytes differ");
}

/// Writes to the host's socket, and takes the packets in the guest.
fn host_to_guest(guest: &mut Guest, stream: &mut Stream, ours: &mut UnixStream, bytes: &[u8]) {
    let (mut sent, mut got) = (0, Vec::new());
    guest.until("all bytes", |guest| {
        if sent < bytes.len() {
            match ours.write(&bytes[sent..]) {
                Ok(n) => sent += n,
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
        }
        guest.step();
        let mut packets = 0;
        while let Some((header, payload)) = guest.inbox.pop_front() {
            match Op::from_wire(header.op) {
                Some(Op::Rw) => got.extend_from_slice(&payload),
                Some(Op::CreditRequest | Op::CreditUpdate) => {}
                other => panic!("{other:?}"),
            }
            packets += 1;
        }
        assert!(got.len() - (stream.fwd_cnt as usize) <= stream.buf_alloc as usize, "credit exceeded");
        if packets > 0 {
            stream.fwd_cnt = got.len() as u32;
            guest.send(stream.header(Op::CreditUpdate), &[], &[]);
        }
        (got.len() == bytes.len()).then_some(())
    });
    assert!(got == bytes, "bytes differ");
}

#[test]
fn every_size_both_ways() {
    for size in SIZES {
        let mut guest = Guest::new();
        let (mut stream, mut ours) = guest.open_pair(1);
        let bytes = pattern(size);
        guest_to_host(&mut guest, &stream, &mut ours, &bytes, &[]);
        host_to_guest(&mut guest, &mut stream, &mut ours, &bytes);
    }
}

#[test]
fn every_layout() {
    let cuts: [&[usize]; 5] =
        [&[44], &[44, 32768], &[10, 34, 1, 32768], &[43, 2], &[44, 0, 4096, 4096, 4096, 4096]];
    for (i, cuts) in cuts.iter().enumerate() {
        for layout in [RxLayout::One, RxLayout::HeaderApart, RxLayout::Pieces] {
            let mut guest = Guest::with(layout, i % 2 == 0);
            guest.indirect = i % 3 == 0;
            let (mut stream, mut ours) = guest.open_pair(1);
            let bytes = pattern(300_001);
            guest_to_host(&mut guest, &stream, &mut ours, &bytes, cuts);
            host_to_guest(&mut guest, &mut stream, &mut ours, &bytes);
        }
    }
}

#[test]
fn a_small_window() {
    let mut guest = Guest::new();
    let (mut stream, mut ours) = guest.open_pair(1);
    stream.buf_alloc = 3000;
    guest.send(stream.header(Op::CreditUpdate), &[], &[]);
    host_to_guest(&mut guest, &mut stream, &mut ours, &pattern(50_000));
}

#[test]
fn host_data_stays_in_the_socket_until_the_guest_can_take_it() {
    let mut guest = Guest::off(RxLayout::One);
    guest.start();
    guest.repost = false;
    for buffer in 0..3 {
        guest.post(buffer);
    }
    // REQUEST takes one buffer, two are left.
    let (_, mut ours) = guest.open_pair(1);
    ours.write_all(&pattern(20_000)).unwrap();
    for _ in 0..4 {
        guest.step();
    }
    assert_eq!(guest.inbox.len(), 2, "no more packets than buffers");
    assert!(!guest.busy(), "without buffers there is nothing to be woken for");
    let mut got: Vec<u8> = guest.inbox.drain(..).flat_map(|(_, payload)| payload).collect();
    for buffer in 0..3 {
        guest.post(buffer);
    }
    guest.step();
    got.extend(guest.inbox.drain(..).flat_map(|(_, payload)| payload));
    assert_eq!(got, pattern(20_000), "5 packets of 4,052 bytes hold all of it");
}

#[test]
fn turns_are_shared_when_buffers_are_few() {
    let mut guest = Guest::new();
    let (a, mut to_a) = guest.open_pair(1);
    let (b, mut to_b) = guest.open_pair(2);
    guest.repost = false;
    // Take all posted buffers out of the way.
    to_a.write_all(&pattern(100_000)).unwrap();
    to_b.write_all(&pattern(100_000)).unwrap();
    for _ in 0..4 {
        guest.step();
    }
    let mut sent = [0usize; 2];
    for (header, payload) in guest.inbox.drain(..) {
        sent[usize::from(header.src_port == b.host_port)] += payload.len();
    }
    assert!(sent.iter().all(|&n| n > 20_000), "{sent:?}");
    assert_ne!(a.host_port, b.host_port);
}

#[test]
fn one_buffer_at_a_time_is_shared_too() {
    let mut guest = Guest::off(RxLayout::One);
    guest.start();
    guest.repost = false;
    guest.post(0);
    let mut ends = Vec::new();
    for id in 0..2 {
        ends.push(guest.open_pair(id));
        guest.post(0);
    }
    for (_, ours) in &mut ends {
        ours.write_all(&pattern(100_000)).unwrap();
    }
    let mut count = [0; 2];
    for _ in 0..20 {
        guest.step();
        for (header, _) in guest.inbox.drain(..).collect::<Vec<_>>() {
            count[usize::from(header.src_port == ends[1].0.host_port)] += 1;
            guest.post(0);
        }
    }
    assert!(count[0] >= 5 && count[1] >= 5, "{count:?}");
}

#[test]
fn a_slow_client_holds_up_nobody_else() {
    let mut guest = Guest::new();
    let (slow, _unread) = guest.open_pair(1);
    let (mut stream, mut ours) = guest.open_pair(2);
    for chunk in pattern(WINDOW as usize).chunks(65536) {
        guest.send(slow.header(Op::Rw), chunk, &[]);
    }
    guest.inbox.clear();
    let bytes = pattern(500_000);
    guest_to_host(&mut guest, &stream, &mut ours, &bytes, &[44]);
    host_to_guest(&mut guest, &mut stream, &mut ours, &bytes);
}

#[test]
fn credit_requests_are_answered() {
    let mut guest = Guest::new();
    let (stream, mut ours) = guest.open_pair(1);
    guest.send(stream.header(Op::Rw), b"12345", &[]);
    guest.expect_silence();
    guest.send(stream.header(Op::CreditRequest), &[], &[]);
    assert_eq!(guest.expect(Op::CreditUpdate).0.fwd_cnt, 5);
    let mut got = [0; 5];
    ours.read_exact(&mut got).unwrap();
}

#[test]
fn small_packets_stay_below_the_guests_overhead_limit() {
    let mut guest = Guest::new();
    let (mut stream, mut ours) = guest.open_pair(1);
    let mut packets = 0u32;
    for i in 0..400u32 {
        ours.write_all(&[i as u8]).unwrap();
        guest.step();
        packets += guest.inbox.drain(..).filter(|(header, _)| header.op == Op::Rw as u16).count() as u32;
    }
    assert!((packets + 1) * 832 <= stream.buf_alloc, "{packets} packets are under way");
    stream.fwd_cnt = packets;
    guest.send(stream.header(Op::CreditUpdate), &[], &[]);
    let mut rest = 0;
    guest.until("the rest in few packets", |guest| {
        rest += guest.inbox.drain(..).map(|(_, payload)| payload.len()).sum::<usize>();
        (rest + packets as usize == 400).then_some(())
    });
}

#[test]
fn what_is_there_fills_whole_packets() {
    let mut guest = Guest::new();
    let (_, mut ours) = guest.open_pair(1);
    ours.write_all(&pattern(100_000)).unwrap();
    guest.step();
    let packets: Vec<_> = guest.inbox.drain(..).collect();
    let lens: Vec<_> = packets.iter().map(|(_, payload)| payload.len()).collect();
    assert_eq!(lens.iter().sum::<usize>(), 100_000);
    assert!(lens[..lens.len() - 1].iter().all(|&len| len == 4052), "{lens:?}");
    let bytes: Vec<u8> = packets.into_iter().flat_map(|(_, payload)| payload).collect();
    assert_eq!(bytes, pattern(100_000));
}

/// Buffers of any size, also such as hold no payload at all.
#[test]
fn odd_buffers_are_filled_too() {
    let mut guest = Guest::off(RxLayout::Odd);
    guest.start();
    guest.post_all();
    let (mut stream, mut ours) = guest.open_pair(1);
    host_to_guest(&mut guest, &mut stream, &mut ours, &pattern(200_000));
}
