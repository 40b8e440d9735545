//! A guest whose rings themselves make no sense.

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::super::control::ToDevice;
use super::super::packet::Op;
use super::guest::{Guest, MEMORY, RING, RxLayout, Stream, describe, pattern};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

/// VIRTQ_DESC_F_NEXT, _WRITE and _INDIRECT (virtio v1.2, 2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Where the tests put packets and tables of their own.
const FREE: u64 = 0xe0_0000;

/// Puts one chain of the TX queue together from descriptors, and lets the device see it.
fn send_chain(guest: &mut Guest, descriptors: &[(u64, u32, u16, u16)]) {
    let memory = guest.memory.memory();
    for (index, (addr, len, flags, next)) in descriptors.iter().enumerate() {
        guest.tx.describe(&memory, index as u16, *addr, *len, *flags, *next);
    }
    guest.tx.publish(&memory, 0);
    guest.step();
    assert!(guest.all_used(), "a chain was kept: {descriptors:?}");
}

fn alive(guest: &mut Guest, stream: &Stream, ours: &mut UnixStream) {
    guest.send(stream.header(Op::Rw), b"alive", &[]);
    let mut got = [0; 5];
    guest.until("a sign of life", |_| ours.read_exact(&mut got).ok());
    ours.write_all(b"kicking").unwrap();
    assert_eq!(guest.expect(Op::Rw).1, b"kicking");
}

/// A valid packet of 100 bytes in guest memory.
fn packet(guest: &Guest, stream: &Stream) -> u32 {
    let header = super::super::packet::Header { len: 100, ..stream.header(Op::Rw) };
    let bytes = [header.encode().as_slice(), &pattern(100)].concat();
    guest.memory.memory().write_slice(&bytes, GuestAddress(FREE)).unwrap();
    bytes.len() as u32
}

#[test]
fn chains_that_make_no_sense_come_back_and_harm_nobody() {
    let mut guest = Guest::new();
    let (good, mut ours) = guest.open_pair(1);
    let (bad, _theirs) = guest.open_pair(2);
    let len = packet(&guest, &bad);
    let end = MEMORY as u64;
    let chains: &[&[(u64, u32, u16, u16)]] = &[
        // Loops: one descriptor, two, and an end that is none.
        &[(FREE, 10, NEXT, 0)],
        &[(FREE, 0, NEXT, 0)],
        &[(FREE, 10, NEXT, 1), (FREE + 10, 1, NEXT, 0)],
        &[(FREE, 0, NEXT, 1), (FREE, 0, NEXT, 0)],
        &[(FREE, 10, NEXT, 9999)],
        // Outside memory, at its edge, and around the end of the address space.
        &[(end, len, 0, 0)],
        &[(end - 1, 44, 0, 0)],
        &[(u64::MAX, len, 0, 0)],
        &[(u64::MAX - 43, 44, 0, 0)],
        &[(FREE, 44, NEXT, 1), (end - 10, 100, 0, 0)],
        // What the device shall write in a queue that it reads.
        &[(FREE, len, WRITE, 0)],
        &[(FREE, 44, NEXT, 1), (FREE + 44, 100, WRITE, 0)],
        // Indirect tables: empty, broken off, outside, with a length that is no whole number, in each other.
        &[(FREE, 0, INDIRECT, 0)],
        &[(FREE, 15, INDIRECT, 0)],
        &[(FREE, 17, INDIRECT, 0)],
        &[(end - 16, 32, INDIRECT, 0)],
        &[(u64::MAX - 15, 16, INDIRECT, 0)],
        &[(FREE + 0x1000, 16, INDIRECT | NEXT, 1), (FREE, len, 0, 0)],
        &[(FREE + 0x2000, 16, INDIRECT, 0)],
        &[(FREE + 0x3000, 0xffff_fff0, INDIRECT, 0)],
    ];
    let memory = guest.memory.memory();
    // An indirect table that points to itself, and one whose entries lead in a circle.
    describe(&memory, FREE + 0x2000, 0, FREE + 0x2000, 16, INDIRECT, 0);
    describe(&memory, FREE + 0x3000, 0, FREE, 1, NEXT, 0);
    drop(memory);
    for chain in chains {
        packet(&guest, &bad);
        send_chain(&mut guest, chain);
        guest.inbox.clear();
        alive(&mut guest, &good, &mut ours);
        guest.inbox.clear();
    }
    assert!(!guest.busy());
}

#[test]
fn a_chain_of_as_many_pieces_as_the_ring_holds_is_a_packet() {
    let mut guest = Guest::new();
    let (stream, mut ours) = guest.open_pair(1);
    packet(&guest, &stream);
    let pieces: Vec<_> = (0..RING)
        .map(|index| {
            let last = index + 1 == RING;
            let len = if last { 144 - u32::from(RING) + 1 } else { 1 };
            (FREE + u64::from(index), len, if last { 0 } else { NEXT }, index + 1)
        })
        .collect();
    send_chain(&mut guest, &pieces);
    let mut got = [0; 100];
    ours.read_exact(&mut got).unwrap();
    assert_eq!(got.as_slice(), pattern(100));
}

#[test]
fn receive_buffers_that_make_no_sense_are_passed_over() {
    let mut guest = Guest::off(RxLayout::One);
    guest.start();
    let memory = guest.memory.memory();
    let end = MEMORY as u64;
    let bad: [(u64, u32, u16, u16); 8] = [
        (end, 4096, WRITE, 0),
        (end - 10, 4096, WRITE, 0),
        (u64::MAX, 4096, WRITE, 0),
        (FREE, 0, WRITE, 0),
        (FREE, 43, WRITE, 0),
        (FREE, 4096, 0, 0),
        (FREE, 40, WRITE | NEXT, 5),
        (FREE, 15, INDIRECT, 0),
    ];
    for (index, (addr, len, flags, next)) in bad.iter().enumerate() {
        let index = index as u16 + 100;
        guest.rx.describe(&memory, index, *addr, *len, *flags, *next);
        guest.rx.publish(&memory, index);
    }
    drop(memory);
    // They are looked at when something must be sent; they come back empty, and a good one is used.
    let open = ToDevice::Open { id: 1, guest_port: 1, reply_len: 0, deadline_ms: 600_000, preamble: vec![] };
    super::super::control_socket::send(&guest.control, &open.encode(), None).unwrap();
    // The supervisor is accepted, is heard, and its packet goes out.
    for _ in 0..3 {
        guest.turn();
    }
    for (index, chain) in bad.iter().enumerate() {
        let memory = guest.memory.memory();
        let used = guest.rx.take_used(&memory);
        assert_eq!(used, Some((index as u16 + 100, 0)), "{chain:?}");
    }
    guest.expect_silence();
    assert!(!guest.busy());
    guest.post(0);
    guest.expect(Op::Request);
}

/// An index that has run ahead of what a ring can hold: nothing is taken, nothing spins, and when the driver has
/// mended it all goes on.
#[test]
fn an_index_that_ran_away_stops_that_queue_alone() {
    let mut guest = Guest::new();
    let (stream, mut ours) = guest.open_pair(1);
    for queue in [0, 1] {
        let ring = if queue == 0 { &guest.rx } else { &guest.tx };
        let (at, index) = (ring.avail_at() + 2, ring.avail);
        for jump in [RING + 1, 5000, u16::MAX] {
            let memory = guest.memory.memory();
            memory.write_obj(index.wrapping_add(jump), GuestAddress(at)).unwrap();
            drop(memory);
            ours.write_all(b"x").unwrap();
            for _ in 0..5 {
                guest.step();
            }
            assert!(!guest.busy(), "queue {queue} makes the device spin");
            guest.memory.memory().write_obj(index, GuestAddress(at)).unwrap();
            guest.step();
        }
    }
    guest.until("the bytes", |guest| (!guest.inbox.is_empty()).then_some(()));
    guest.inbox.clear();
    alive(&mut guest, &stream, &mut ours);
}

/// A head that no table has cannot be given back; the ones behind it are taken.
#[test]
fn a_head_beyond_the_table_is_passed_over() {
    let mut guest = Guest::new();
    let (stream, mut ours) = guest.open_pair(1);
    let memory = guest.memory.memory();
    for head in [RING, 1000, u16::MAX] {
        guest.tx.publish(&memory, head);
    }
    drop(memory);
    for _ in 0..5 {
        guest.step();
    }
    assert!(!guest.busy());
    let len = packet(&guest, &stream);
    let memory = guest.memory.memory();
    guest.tx.describe(&memory, 0, FREE, len, 0, 0);
    guest.tx.publish(&memory, 0);
    drop(memory);
    guest.step();
    let mut got = [0; 100];
    guest.until("the packet", |_| ours.read_exact(&mut got).ok());
    assert_eq!(got.as_slice(), pattern(100));
}
