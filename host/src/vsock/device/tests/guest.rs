//! A guest driver for tests: rings in real guest memory, a backend behind them, a supervisor's control connection.

use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vhost_user_backend::{VhostUserBackendMut, VringMutex, VringT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic};
use vmm_sys_util::epoll::EventSet;

use super::super::backend::{Backend, REACTOR_EVENT};
use super::super::control::{FromDevice, ToDevice};
use super::super::control_socket;
use super::super::packet::{HEADER_LEN, HOST_CID, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_SEND, TYPE_STREAM};
use super::super::queue::Memory;
use super::super::reactor::Reactor;

pub const CID: u64 = 42;
pub const RING: u16 = 128;
/// What the guest grants unless a test says otherwise: Linux's default.
pub const BUF_ALLOC: u32 = 256 * 1024;

/// Bytes of memory.
pub const MEMORY: usize = 16 << 20;
pub const RX_RING: u64 = 0x1000;
pub const TX_RING: u64 = 0x1_0000;
const RX_BUFFERS: u64 = 0x10_0000;
const TX_BUFFERS: u64 = 0x40_0000;
const TABLES: u64 = 0xf0_0000;

pub struct Ring {
    at: u64,
    pub avail: u16,
    pub seen: u16,
}

impl Ring {
    fn new(at: u64) -> Self {
        Self { at, avail: 0, seen: 0 }
    }
    pub fn avail_at(&self) -> u64 {
        self.at + 0x4000
    }
    pub fn used_at(&self) -> u64 {
        self.at + 0x8000
    }
    pub fn describe(&self, memory: &Memory, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        describe(memory, self.at, index, addr, len, flags, next);
    }
    pub fn publish(&mut self, memory: &Memory, head: u16) {
        let slot = u64::from(self.avail % RING);
        memory.write_obj(head, GuestAddress(self.avail_at() + 4 + 2 * slot)).unwrap();
        self.avail = self.avail.wrapping_add(1);
        memory.write_obj(self.avail, GuestAddress(self.avail_at() + 2)).unwrap();
    }
    pub fn take_used(&mut self, memory: &Memory) -> Option<(u16, u32)> {
        let used: u16 = memory.read_obj(GuestAddress(self.used_at() + 2)).unwrap();
        if used == self.seen {
            return None;
        }
        let at = self.used_at() + 4 + 8 * u64::from(self.seen % RING);
        self.seen = self.seen.wrapping_add(1);
        // used_event: tell me of the next one.
        memory.write_obj(self.seen, GuestAddress(self.avail_at() + 4 + 2 * u64::from(RING))).unwrap();
        let id: u32 = memory.read_obj(GuestAddress(at)).unwrap();
        Some((id as u16, memory.read_obj(GuestAddress(at + 4)).unwrap()))
    }
}

pub fn describe(memory: &Memory, table: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
    let at = table + 16 * u64::from(index);
    memory.write_obj(addr, GuestAddress(at)).unwrap();
    memory.write_obj(len, GuestAddress(at + 8)).unwrap();
    memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
    memory.write_obj(next, GuestAddress(at + 14)).unwrap();
}

/// How RX buffers are laid out.
#[derive(Clone, Copy, PartialEq)]
pub enum RxLayout {
    /// Header and payload in one descriptor of 4 KiB, as current kernels.
    One,
    /// A descriptor of 44 bytes and one of 4 KiB, as kernels before 6.2.
    HeaderApart,
    /// Pieces of 1,000 bytes.
    Pieces,
    /// One descriptor, each of another length.
    Odd,
}

impl RxLayout {
    fn lens(self) -> &'static [u32] {
        match self {
            Self::One | Self::Odd => &[4096],
            Self::HeaderApart => &[44, 4096],
            Self::Pieces => &[1000, 1000, 1000, 1000],
        }
    }
}

/// The guest's driver: rings and buffers in its memory.
pub struct Driver {
    /// What came from the device.
    pub inbox: VecDeque<(Header, Vec<u8>)>,
    /// Post used RX buffers again at once.
    pub repost: bool,
    /// Send chains through an indirect table.
    pub indirect: bool,
    pub memory: GuestMemoryAtomic<Memory>,
    pub rx: Ring,
    pub tx: Ring,
    layout: RxLayout,
    tx_descriptors: u16,
    tx_bytes: u64,
}

impl Driver {
    /// A driver in `memory`, whose rings are at [`RX_RING`] and [`TX_RING`].
    pub fn new(memory: GuestMemoryAtomic<Memory>, layout: RxLayout) -> Self {
        Self {
            inbox: VecDeque::new(),
            repost: true,
            indirect: false,
            memory,
            rx: Ring::new(RX_RING),
            tx: Ring::new(TX_RING),
            layout,
            tx_descriptors: 0,
            tx_bytes: 0,
        }
    }

    pub fn post_all(&mut self) {
        for buffer in 0..self.rx_buffers() {
            self.post(buffer);
        }
    }

    pub fn rx_buffers(&self) -> u16 {
        RING / self.layout.lens().len() as u16
    }

    pub fn post(&mut self, buffer: u16) {
        let memory = self.memory.memory();
        let lens = self.layout.lens();
        let first = buffer * lens.len() as u16;
        let mut addr = RX_BUFFERS + u64::from(buffer) * 8192;
        for (i, len) in lens.iter().enumerate() {
            let odd = [44, 45, 4096, 60, 2000, 8192, 44, 300][usize::from(buffer % 8)];
            let len = if self.layout == RxLayout::Odd { &odd } else { len };
            let index = first + i as u16;
            let next = if i + 1 < lens.len() { 1 } else { 0 };
            self.rx.describe(&memory, index, addr, *len, 2 | next, index + 1);
            addr += u64::from(*len);
        }
        self.rx.publish(&memory, first);
    }

    /// Puts raw bytes into the TX queue, cut into descriptors of `cuts` bytes and a last one of what is left.
    pub fn send_raw(&mut self, bytes: &[u8], cuts: &[usize]) {
        let memory = self.memory.memory();
        let base = TX_BUFFERS + self.tx_bytes;
        self.tx_bytes += bytes.len() as u64 + 64;
        memory.write_slice(bytes, GuestAddress(base)).unwrap();
        let mut pieces = Vec::new();
        let mut at = 0;
        for cut in cuts.iter().copied().chain([usize::MAX]) {
            let len = cut.min(bytes.len() - at);
            if len > 0 {
                pieces.push((base + at as u64, len as u32));
            }
            at += len;
        }
        if pieces.is_empty() {
            pieces.push((base, 0));
        }
        let head = self.tx_descriptors;
        if self.indirect {
            let table = TABLES + u64::from(head) * 1024;
            for (i, (addr, len)) in pieces.iter().enumerate() {
                let more = u16::from(i + 1 < pieces.len());
                describe(&memory, table, i as u16, *addr, *len, more, i as u16 + 1);
            }
            self.tx.describe(&memory, head, table, 16 * pieces.len() as u32, 4, 0);
            self.tx_descriptors += 1;
        } else {
            for (i, (addr, len)) in pieces.iter().enumerate() {
                let more = u16::from(i + 1 < pieces.len());
                self.tx.describe(&memory, head + i as u16, *addr, *len, more, head + i as u16 + 1);
            }
            self.tx_descriptors += pieces.len() as u16;
        }
        assert!(self.tx_descriptors <= RING, "the test sends too much at once");
        self.tx.publish(&memory, head);
    }

    /// Takes what the device gave back.
    pub fn collect(&mut self) {
        let memory = self.memory.memory();
        while let Some((_, len)) = self.tx.take_used(&memory) {
            assert_eq!(len, 0);
        }
        if self.tx.seen == self.tx.avail {
            (self.tx_descriptors, self.tx_bytes) = (0, 0);
        }
        while let Some((head, len)) = self.rx.take_used(&memory) {
            let buffer = head / self.layout.lens().len() as u16;
            let mut bytes = vec![0; len as usize];
            memory.read_slice(&mut bytes, GuestAddress(RX_BUFFERS + u64::from(buffer) * 8192)).unwrap();
            let header = Header::decode(bytes[..HEADER_LEN].try_into().unwrap());
            assert_eq!(header.len as usize + HEADER_LEN, bytes.len());
            assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID));
            self.inbox.push_back((header, bytes.split_off(HEADER_LEN)));
            if self.repost {
                self.post(buffer);
            }
        }
    }

    /// Every chain sent has come back.
    pub fn all_used(&self) -> bool {
        self.tx.seen == self.tx.avail
    }
}

/// A driver with a device behind it, and a supervisor's connection to that.
pub struct Guest {
    pub backend: Backend,
    pub vrings: Vec<VringMutex>,
    pub control: OwnedFd,
    driver: Driver,
    address: SocketAddrUnix,
}

impl Deref for Guest {
    type Target = Driver;
    fn deref(&self) -> &Driver {
        &self.driver
    }
}

impl DerefMut for Guest {
    fn deref_mut(&mut self) -> &mut Driver {
        &mut self.driver
    }
}

impl Guest {
    pub fn new() -> Self {
        Self::with(RxLayout::One, false)
    }

    pub fn with(layout: RxLayout, event_idx: bool) -> Self {
        let mut guest = Self::off(layout);
        for vring in &guest.vrings {
            vring.set_queue_event_idx(event_idx);
        }
        guest.start();
        guest.post_all();
        guest
    }

    /// A guest whose driver is not ready.
    pub fn off(layout: RxLayout) -> Self {
        let memory = Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let memory = GuestMemoryAtomic::new(memory);
        // An abstract name, so that nothing has to be cleaned up.
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let name = format!("dhow-device-test-{}-{count}", std::process::id());
        let address = SocketAddrUnix::new_abstract_name(name.as_bytes()).unwrap();
        let listener = seqpacket();
        rustix::net::bind(&listener, &address).unwrap();
        rustix::net::listen(&listener, 8).unwrap();
        let reactor = Reactor::new(CID, listener).unwrap();
        let control = connect(&address);
        let backend = Backend::new(CID, memory.clone(), reactor);
        let vrings = (0..3).map(|_| VringMutex::new(memory.clone(), 1024).unwrap()).collect();
        Self { backend, vrings, control, driver: Driver::new(memory, layout), address }
    }

    pub fn start(&mut self) {
        for (vring, at) in self.vrings.iter().zip([RX_RING, TX_RING]) {
            vring.set_queue_size(RING);
            vring.set_queue_info(at, at + 0x4000, at + 0x8000).unwrap();
            vring.set_queue_ready(true);
            vring.set_enabled(true);
        }
    }

    pub fn connect(&self) -> OwnedFd {
        connect(&self.address)
    }

    /// Puts a packet into the TX queue and lets the device take it.
    pub fn send(&mut self, header: Header, payload: &[u8], cuts: &[usize]) {
        let header = Header { len: payload.len() as u32, ..header };
        let mut bytes = header.encode().to_vec();
        bytes.extend_from_slice(payload);
        self.send_raw(&bytes, cuts);
        self.step();
    }

    /// Ends a stream as a program of the guest does that is done: `shutdown(SHUT_WR)`, then `close`.
    pub fn finish(&mut self, stream: &Stream) {
        self.send(stream.shutdown(SHUTDOWN_SEND), &[], &[]);
        self.send(stream.shutdown(SHUTDOWN_BOTH), &[], &[]);
    }

    /// Lets the device do one turn; takes what it gave.
    pub fn step(&mut self) {
        self.turn();
        self.collect();
    }

    /// Lets the device do one turn.
    pub fn turn(&mut self) {
        let vrings = self.vrings.clone();
        for event in [REACTOR_EVENT as u16, 1, 0] {
            self.backend.handle_event(event, EventSet::IN, &vrings, 0).unwrap();
        }
    }

    /// Whether the event loop would come back at once.
    pub fn busy(&self) -> bool {
        let mut polled = [PollFd::new(self.backend.poll_set(), PollFlags::POLLIN)];
        poll(&mut polled, PollTimeout::ZERO).unwrap() > 0
    }

    /// Turns until a packet comes.
    pub fn next(&mut self) -> (Header, Vec<u8>) {
        self.until("a packet", |guest| guest.inbox.pop_front())
    }

    pub fn expect(&mut self, op: Op) -> (Header, Vec<u8>) {
        let (header, payload) = self.next();
        assert_eq!(Op::from_wire(header.op), Some(op), "{header:?}");
        (header, payload)
    }

    pub fn expect_silence(&mut self) {
        for _ in 0..5 {
            self.step();
        }
        assert_eq!(self.inbox.pop_front(), None);
    }

    /// Turns until `done` has something.
    pub fn until<T>(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> Option<T>) -> T {
        let end = Instant::now() + Duration::from_secs(120);
        loop {
            if let Some(got) = done(self) {
                return got;
            }
            assert!(Instant::now() < end, "no {what}");
            self.step();
            std::thread::yield_now();
        }
    }

    pub fn ask(&mut self, message: ToDevice, fd: Option<OwnedFd>) {
        use std::os::fd::AsFd;
        control_socket::send(&self.control, &message.encode(), fd.as_ref().map(AsFd::as_fd)).unwrap();
        self.step();
    }

    pub fn try_answer(&mut self) -> Option<FromDevice> {
        match control_socket::receive(&self.control) {
            Ok(Some(record)) => Some(FromDevice::decode(&record.bytes).unwrap()),
            Ok(None) => panic!("the device closed the control connection"),
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
                None
            }
        }
    }

    pub fn answer(&mut self) -> FromDevice {
        self.until("answer", Self::try_answer)
    }

    pub fn connections(&mut self) -> u64 {
        self.stats().connections
    }

    pub fn stats(&mut self) -> super::super::control::Stats {
        self.ask(ToDevice::Stats { id: u32::MAX }, None);
        match self.answer() {
            FromDevice::Stats { stats, .. } => stats,
            other => panic!("{other:?}"),
        }
    }

    /// Opens a stream up to the guest's RESPONSE.
    pub fn open(&mut self, id: u32, preamble: &[u8], reply_len: u32) -> Stream {
        let open = ToDevice::Open {
            id,
            guest_port: 1000,
            reply_len,
            deadline_ms: 600_000,
            preamble: preamble.to_vec(),
        };
        self.ask(open, None);
        let (request, _) = self.expect(Op::Request);
        assert_eq!(request.dst_port, 1000);
        let stream =
            Stream { host_port: request.src_port, guest_port: 1000, buf_alloc: BUF_ALLOC, fwd_cnt: 0 };
        self.send(stream.header(Op::Response), &[], &[]);
        stream
    }

    /// Opens a stream and gives it one end of a socket pair.
    pub fn open_pair(&mut self, id: u32) -> (Stream, UnixStream) {
        let stream = self.open(id, &[], 0);
        assert_eq!(self.answer(), FromDevice::Opened { id, reply: vec![] });
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        self.attach(id, theirs.into());
        (stream, ours)
    }

    pub fn attach(&mut self, id: u32, fd: OwnedFd) {
        self.ask(ToDevice::Attach { id, group: 0 }, Some(fd));
        assert_eq!(self.answer(), FromDevice::Attached { id });
    }
}

/// The guest's end of a stream.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    pub host_port: u32,
    pub guest_port: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Stream {
    pub fn header(&self, op: Op) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: self.guest_port,
            dst_port: self.host_port,
            len: 0,
            socket_type: TYPE_STREAM,
            op: op as u16,
            flags: 0,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
        }
    }

    pub fn shutdown(&self, flags: u32) -> Header {
        Header { flags, ..self.header(Op::Shutdown) }
    }
}

fn seqpacket() -> OwnedFd {
    let flags = SocketFlags::CLOEXEC;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
}

fn connect(address: &SocketAddrUnix) -> OwnedFd {
    let socket = seqpacket();
    rustix::net::connect(&socket, address).unwrap();
    rustix::io::ioctl_fionbio(&socket, true).unwrap();
    socket
}

/// Bytes in which a lost, doubled or moved piece shows.
pub fn pattern(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}
