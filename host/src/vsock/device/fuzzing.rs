//! What fuzzing drives: the device with a guest of our own, told what to do by any bytes. Built for fuzzing alone.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use vhost_user_backend::VhostUserBackendMut;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::control::{FromDevice, ToDevice};
use super::packet::{Header, Op};

#[allow(dead_code, missing_docs, reason = "shared with the tests, which use all of it")]
#[path = "tests/guest.rs"]
mod guest;

use guest::{Guest, MEMORY, RING, Stream};

/// Where the packet under test lies.
const PACKET: u64 = 0xe0_0000;
/// Turns after which a device that is left alone must be at rest.
const PATIENCE: usize = 200;

/// Bytes as a source of choices; zeros when they are used up.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn number(&mut self, bytes: usize) -> u64 {
        (0..bytes).fold(0, |number, _| number << 8 | u64::from(self.byte()))
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.number(3) as usize) % limit
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Any descriptors in either ring, over any packet: nothing panics, every chain comes back, the device comes to rest,
/// and a stream of before still works.
pub fn packet(data: &[u8]) {
    let mut choices = Choices(data);
    let mut guest = Guest::new();
    let (good, mut ours) = guest.open_pair(1);
    let (bad, _theirs) = guest.open_pair(2);
    let receive = choices.byte() % 4 == 0;
    let count = choices.byte() % 16 + 1;
    let mut chain = Vec::new();
    for index in 0..u16::from(count) {
        let addr = match choices.byte() % 4 {
            0 => PACKET,
            1 => PACKET + choices.number(2),
            2 => (MEMORY as u64).wrapping_sub(choices.number(2)),
            _ => choices.number(8),
        };
        let len = if choices.byte() % 4 == 0 { choices.number(4) as u32 } else { choices.number(2) as u32 };
        let flags = u16::from(choices.byte() % 8);
        let next = if choices.byte() % 4 == 0 { u16::from(choices.byte()) } else { index + 1 };
        chain.push((addr, len, flags, next));
    }
    let mut header = bad.header(Op::Rw).encode();
    for byte in &mut header {
        // Mostly the header of a living stream, with a few bytes changed.
        if choices.byte() % 8 == 1 {
            *byte = choices.byte();
        }
    }
    let changed = Header::decode(&header);
    if (changed.dst_port, changed.src_port) == (good.host_port, good.guest_port) {
        return;
    }
    let memory = guest.memory.memory();
    let bytes = [&header, choices.0].concat();
    memory.write_slice(&bytes[..bytes.len().min(0x1_0000)], GuestAddress(PACKET)).expect("room");
    if receive {
        for (index, (addr, len, flags, next)) in chain.iter().enumerate() {
            guest.rx.describe(&memory, index as u16, *addr, *len, *flags, *next);
        }
        drop(memory);
        // Packets into buffers that the guest has changed since it posted them.
        let _ = ours.write(&[7; 50_000]);
        for _ in 0..20 {
            guest.turn();
        }
        rest(&guest);
        return;
    }
    for (index, (addr, len, flags, next)) in chain.iter().enumerate() {
        guest.tx.describe(&memory, index as u16, *addr, *len, *flags, *next);
    }
    guest.tx.publish(&memory, 0);
    drop(memory);
    guest.step();
    assert!(guest.all_used(), "a chain was kept");
    for _ in 0..20 {
        guest.step();
    }
    rest(&guest);
    guest.send(good.header(Op::Rw), b"alive", &[]);
    let mut got = [0; 5];
    guest.until("a sign of life", |_| ours.read_exact(&mut got).ok());
    assert_eq!(&got, b"alive");
}

/// Any packets, events of clients and requests of a supervisor, in any order, for a few streams: nothing panics,
/// every chain comes back, nothing spins, and when all have left nothing is left.
pub fn connection(data: &[u8]) {
    let mut choices = Choices(data);
    let mut guest = Guest::new();
    guest.repost = choices.byte() % 4 != 0;
    let mut ends: Vec<(Stream, Option<UnixStream>)> = Vec::new();
    for id in 0..2 {
        let (stream, ours) = guest.open_pair(id);
        ends.push((stream, Some(ours)));
    }
    let mut last_id = 2;
    while !choices.is_empty() {
        act(&mut guest, &mut ends, &mut choices, &mut last_id);
        assert!(guest.all_used(), "a chain was kept");
    }
    for _ in 0..PATIENCE {
        guest.step();
        while guest.try_answer().is_some() {}
    }
    guest.inbox.clear();
    rest(&guest);
    // The guest reboots, the clients leave and the supervisor ends.
    drop(ends);
    guest.backend.reset_device();
    guest.control = guest.connect();
    for _ in 0..20 {
        guest.turn();
    }
    assert_eq!(guest.backend.connections(), 0, "a connection is left");
}

/// The supervisor reads its answers before it asks again.
fn ask(guest: &mut Guest, message: ToDevice, fd: Option<OwnedFd>) {
    while guest.try_answer().is_some() {}
    guest.ask(message, fd);
}

fn act(
    guest: &mut Guest,
    ends: &mut Vec<(Stream, Option<UnixStream>)>,
    choices: &mut Choices<'_>,
    last: &mut u32,
) {
    let which = choices.below(ends.len());
    match choices.byte() % 16 {
        0..=5 => {
            let len = match choices.byte() % 4 {
                0 => 0,
                1 => choices.below(100),
                _ => choices.below(66_000),
            };
            let mut header = Header { len: len as u32, ..ends[which].0.header(Op::Rw) };
            header.op = u16::from(choices.byte() % 9);
            header.flags = u32::from(choices.byte() % 5);
            if choices.byte() % 4 == 0 {
                header.buf_alloc = choices.number(4) as u32;
                header.fwd_cnt = choices.number(4) as u32;
            }
            if choices.byte() % 8 == 0 {
                header.len = choices.number(4) as u32;
            }
            let bytes = [header.encode().as_slice(), &vec![7; len]].concat();
            guest.send_raw(&bytes, &[44, 32_768]);
            guest.step();
        }
        6 | 7 => {
            let len = choices.below(100_000);
            if let Some(ours) = &mut ends[which].1 {
                let _ = ours.write(&vec![1; len]);
            }
        }
        8 => {
            if let Some(ours) = &mut ends[which].1 {
                let _ = ours.read(&mut vec![0; 60_000]);
            }
        }
        9 => ends[which].1 = None,
        10 => {
            let how = [std::net::Shutdown::Read, std::net::Shutdown::Write, std::net::Shutdown::Both];
            if let Some(ours) = &ends[which].1 {
                let _ = ours.shutdown(how[choices.below(3)]);
            }
        }
        11 => {
            *last += 1;
            let preamble = vec![9; choices.below(10_000)];
            let reply_len = choices.below(50) as u32;
            let guest_port = 1000 + *last;
            let open = ToDevice::Open { id: *last, guest_port, reply_len, deadline_ms: 600_000, preamble };
            ask(guest, open, None);
            if ends.len() < 20 {
                let asked = guest.inbox.iter().rev().find(|(header, _)| header.dst_port == guest_port);
                let host_port = asked.map_or(0, |(header, _)| header.src_port);
                ends.push((Stream { host_port, guest_port, ..ends[0].0 }, None));
            }
        }
        12 => {
            let (ours, theirs) = UnixStream::pair().expect("a socket pair");
            ours.set_nonblocking(true).expect("a socket");
            let id = choices.below(*last as usize + 2) as u32;
            let fd = (choices.byte() % 8 != 0).then(|| theirs.into());
            ask(guest, ToDevice::Attach { id, group: id % 3 }, fd);
            ends[which].1 = Some(ours);
        }
        13 => {
            let id = choices.below(*last as usize + 2) as u32;
            let preamble = vec![8; choices.below(10_000)];
            let reply_len = choices.below(50) as u32;
            let exchange = ToDevice::Exchange { id, reply_len, deadline_ms: 600_000, preamble };
            ask(guest, if choices.byte() % 2 == 0 { ToDevice::Cancel { id } } else { exchange }, None);
        }
        14 => {
            if !guest.repost && choices.byte() % 2 == 0 && guest.rx.avail == guest.rx.seen {
                for buffer in 0..RING / 4 {
                    guest.post(buffer);
                }
            }
            guest.step();
        }
        _ => {
            while let Some(answer) = guest.try_answer() {
                assert!(!matches!(answer, FromDevice::Stats { .. }));
            }
            guest.step();
        }
    }
}

/// Fails when the event loop would come back at once for ever.
fn rest(guest: &Guest) {
    assert!(!guest.busy(), "the device does not come to rest");
}
