//! One stream: its handshake, its two halves and its end. Knows neither queues nor other connections.
//!
//! # Vsock in a minute
//! A connection is a pair of ports. The host asks with REQUEST, the guest accepts with RESPONSE or refuses with RST;
//! RW carries bytes. Every packet says how large the sender's buffer is (`buf_alloc`) and how much has been taken
//! out of it (`fwd_cnt`), and so how much the other side may send ([`super::credit`]). SHUTDOWN ends one half or
//! both; the answer to both is RST, and an RST at any other time means that something was cut.
//! (virtio v1.2, 5.10.6 "Device Operation"; Linux `net/vmw_vsock/virtio_transport_common.c` is the usual peer.)
//!
//! # States
//! The guest's side, left to right, and what the host's side may be meanwhile:
//!
//! ```text
//!            REQUEST sent   RESPONSE                     both halves finished:
//!                                                        SHUTDOWN(both) sent
//!  Waiting ────────► Requested ────────► Open ──────────────────────► Closing ──┐
//!     │                  │                 │ guest: SHUTDOWN(both) → RST sent,   │ RST, or 8 s
//!     │ deadline, cancel │ RST, deadline   │ or RST                              ▼
//!     └──────────────────┴─────────────────┴──────────────────────────────────► Gone
//!
//!  host:  Handshake (preamble out, reply in) ─► Opened (no fd yet) ─► Attached(fd) ─► Closed
//!             ▲──────────── exchange ──────────────┘
//! ```
//!
//! `Gone` with the host `Opened` or `Attached` is *draining*: the guest finished properly, and what it sent is still
//! to be written to the fd; or it was cut before there was one, which then gets what was sent and is reset. Between `Attached` and `Closed` may lie `Leaving`: all is written, and the client has not
//! taken it yet. A connection may be forgotten when the guest is `Gone` and the host `Closed`.
//!
//! Each half ends on its own: EOF on the fd becomes SHUTDOWN(SEND) to the guest, and the guest's SHUTDOWN(SEND)
//! becomes `shutdown(fd, SHUT_WR)` once everything before it is written.
//!
//! # An end or a cut
//! No program of a guest can send an RST: when its process dies, its kernel says SHUTDOWN(both), as at any close. So
//! the device takes SHUTDOWN(both) for an end only where SHUTDOWN(SEND) has come before it, and for a cut otherwise:
//! the fd is reset, and a client with half an answer does not take it for a whole one.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::control::Reason;
use super::credit::{Incoming, Outgoing, WINDOW};
use super::host_fd::{End, HostFd};
use super::packet::{Header, MAX_PAYLOAD, Op, SHUTDOWN_BOTH, SHUTDOWN_RCV, SHUTDOWN_SEND};
use super::queue::{RxPermit, RxQueue, Segments};

/// How long a guest may take to answer SHUTDOWN(both): Linux's own `VSOCK_CLOSE_TIMEOUT`.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(8);

/// How long a client that has everything may take to close its end; and how often one is looked at that has not.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Debug, PartialEq, Eq)]
enum Guest {
    Waiting,
    Requested,
    Open,
    Closing { until: Instant },
    Gone,
}

#[derive(Debug)]
enum Host {
    Handshake,
    Opened,
    Attached(HostFd),
    /// Both halves are over, and what was written is still on its way.
    Leaving {
        fd: HostFd,
        until: Instant,
    },
    Closed,
}

/// Buffers that a first read is offered: what an interactive client sends fits one, and each has to be looked at.
const APPETITE: usize = 4;
/// Buffers that one read is offered at the most.
const MOST_APPETITE: usize = 16;

/// What a turn of [`Connection::fill`] came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// Packets sent.
    pub packets: usize,
    /// Their payload bytes.
    pub bytes: usize,
    /// The guest has posted no more buffers.
    pub starved: bool,
}

/// Both ports of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    /// The device's, chosen by it.
    pub host: u32,
    /// The guest's, chosen by who opens.
    pub guest: u32,
}

/// See the module's description.
#[derive(Debug)]
pub struct Connection {
    ports: Ports,
    guest_cid: u64,
    guest: Guest,
    host: Host,
    outgoing: Outgoing,
    incoming: Incoming,
    /// Preamble not yet sent.
    preamble: Vec<u8>,
    preamble_sent: usize,
    reply: Vec<u8>,
    reply_len: usize,
    /// From the guest, for the fd; at most [`WINDOW`] bytes, as its credit says.
    buffer: VecDeque<u8>,
    readable: bool,
    /// Buffers for the next read: more after one that filled all, one after one that left nothing behind.
    appetite: usize,
    writable: bool,
    /// The fd has no more for the guest.
    host_finished: bool,
    /// The guest was told.
    told_finished: bool,
    /// The guest will send no more.
    guest_finished: bool,
    /// The guest will take no more.
    guest_deaf: bool,
    /// The fd was told that no more comes.
    write_closed: bool,
    update_asked: bool,
    rst_due: bool,
    /// The guest has cut it before the fd came: that gets what is buffered, and is reset.
    cut_before_fd: bool,
    failure: Option<Reason>,
}

impl Connection {
    /// A connection that still has to be asked for.
    pub fn new(guest_cid: u64, ports: Ports, preamble: Vec<u8>, reply_len: usize) -> Self {
        Self {
            ports,
            guest_cid,
            guest: Guest::Waiting,
            host: Host::Handshake,
            outgoing: Outgoing::default(),
            incoming: Incoming::default(),
            preamble,
            preamble_sent: 0,
            reply: Vec::with_capacity(reply_len),
            reply_len,
            buffer: VecDeque::new(),
            readable: false,
            appetite: APPETITE,
            writable: false,
            host_finished: false,
            told_finished: false,
            guest_finished: false,
            guest_deaf: false,
            write_closed: false,
            update_asked: false,
            rst_due: false,
            cut_before_fd: false,
            failure: None,
        }
    }

    /// Both ports.
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// Whether the guest has been asked for it and has not ended it.
    pub fn guest_knows(&self) -> bool {
        !matches!(self.guest, Guest::Waiting | Guest::Gone)
    }

    /// Whether packets from the guest no longer belong to it.
    pub fn guest_gone(&self) -> bool {
        self.guest == Guest::Gone
    }

    /// Whether it has its fd.
    pub fn attached(&self) -> bool {
        matches!(self.host, Host::Attached(_))
    }

    /// Whether nothing is left to be done for it.
    pub fn dead(&self) -> bool {
        self.guest == Guest::Gone && matches!(self.host, Host::Closed)
    }

    /// The reply to the opener, once, when the handshake is complete.
    pub fn take_opened(&mut self) -> Option<Vec<u8>> {
        let complete = matches!(self.host, Host::Handshake)
            && matches!(self.guest, Guest::Open | Guest::Gone)
            && self.failure.is_none()
            && self.preamble_sent == self.preamble.len()
            && self.reply.len() == self.reply_len;
        complete.then(|| {
            self.host = Host::Opened;
            self.preamble = Vec::new();
            std::mem::take(&mut self.reply)
        })
    }

    /// Why it failed before it had an fd, once.
    pub fn take_failure(&mut self) -> Option<Reason> {
        self.failure.take()
    }

    /// Whether an RST is still to be sent for it, once.
    pub fn take_rst(&mut self) -> Option<Header> {
        std::mem::take(&mut self.rst_due).then(|| self.header(Op::Rst))
    }

    /// When [`Self::expire`] is due: it has waited long enough for the guest's last RST, or for the client.
    pub fn deadline(&self) -> Option<Instant> {
        let guest = match self.guest {
            Guest::Closing { until } => Some(until),
            _ => None,
        };
        let host = match self.host {
            Host::Leaving { until, .. } => Some(until),
            _ => None,
        };
        [guest, host].into_iter().flatten().min()
    }

    /// Gives up what is past its deadline.
    pub fn expire(&mut self, now: Instant) {
        if let Guest::Closing { until } = self.guest
            && until <= now
        {
            self.abort(Reason::GuestClosed);
        }
        if let Host::Leaving { fd, until } = &mut self.host
            && *until <= now
        {
            // Closed with bytes under way, the kernel would give them up after a while; a slow reader may take hours.
            if fd.delivered() || fd.acknowledged() {
                self.host = Host::Closed;
            } else {
                *until = now + LEAVE_TIMEOUT;
            }
        }
    }

    /// Closes the fd early where that loses nothing but the client's politeness; whether it did.
    pub fn make_room(&mut self) -> bool {
        let done = matches!(&self.host, Host::Leaving { fd, .. } if fd.delivered() || fd.acknowledged());
        if done {
            self.host = Host::Closed;
        }
        done
    }

    /// Ends it at once: RST to the guest, a reset to the fd, `reason` to an opener that still waits.
    pub fn abort(&mut self, reason: Reason) {
        self.rst_due |= self.guest_knows();
        self.cut(reason);
    }

    /// As [`Self::abort`], for a guest that has forgotten the connection already.
    pub fn cut(&mut self, reason: Reason) {
        let answered = matches!(self.host, Host::Opened) && !self.buffer.is_empty();
        if answered && matches!(reason, Reason::GuestReset | Reason::GuestClosed) && self.guest != Guest::Gone
        {
            self.guest = Guest::Gone;
            self.cut_before_fd = true;
            return;
        }
        self.guest = Guest::Gone;
        self.buffer = VecDeque::new();
        match std::mem::replace(&mut self.host, Host::Closed) {
            Host::Handshake | Host::Opened => self.failure = Some(reason),
            Host::Attached(fd) => fd.reset(),
            // Nothing of what it is waiting for can be cut by the guest.
            leaving @ Host::Leaving { .. } => self.host = leaving,
            Host::Closed => {}
        }
    }

    /// Has a stream that is open and has no fd say `preamble`, and wait for a reply. What the guest has said unasked
    /// is taken for the beginning of that.
    pub fn exchange(&mut self, preamble: Vec<u8>, reply_len: usize) {
        if self.guest != Guest::Open || self.guest_finished || self.guest_deaf {
            self.abort(Reason::GuestClosed);
            return;
        }
        self.host = Host::Handshake;
        self.preamble = preamble;
        self.preamble_sent = 0;
        self.reply_len = reply_len;
        self.reply = self.buffer.drain(..reply_len.min(self.buffer.len())).collect();
        self.incoming.forward(self.reply.len());
    }

    /// Whether it can take an fd, or something to say.
    pub fn awaits_fd(&self) -> bool {
        matches!(self.host, Host::Opened)
    }

    /// Gives it its fd.
    pub fn attach(&mut self, fd: HostFd) {
        self.host = Host::Attached(fd);
        // Optimistic: the first transfer finds out, and edge-triggered events follow from there.
        self.readable = true;
        self.writable = true;
        if self.guest_deaf {
            self.stop_reading();
        }
        self.flush();
        if self.cut_before_fd {
            self.cut(Reason::GuestReset);
        }
    }

    /// The fd's socket became readable, writable or broken.
    pub fn on_host_event(&mut self, readable: bool, writable: bool, broken: bool) {
        let fd = match &self.host {
            Host::Attached(fd) => fd,
            Host::Leaving { fd, .. } => {
                if broken && fd.error().is_some() || fd.delivered() {
                    self.host = Host::Closed;
                }
                return;
            }
            Host::Handshake | Host::Opened | Host::Closed => return,
        };
        if broken && fd.error().is_some() {
            self.abort(Reason::HostClosed);
            return;
        }
        self.readable |= readable;
        if readable {
            self.appetite = self.appetite.max(APPETITE);
        }
        self.writable |= writable;
        self.flush();
    }

    /// A packet from the guest for this connection.
    pub fn on_packet(&mut self, header: &Header, payload: &Segments<'_>) {
        let Some(op) = Op::from_wire(header.op) else {
            self.abort(Reason::Protocol);
            return;
        };
        match (&self.guest, op) {
            (Guest::Waiting | Guest::Gone, _) => {}
            (Guest::Requested, Op::Response) => {
                self.outgoing.update(header.buf_alloc, header.fwd_cnt);
                self.guest = Guest::Open;
            }
            (Guest::Requested, Op::Rst) => self.cut(Reason::Refused),
            (Guest::Closing { .. }, Op::Rst) => self.guest = Guest::Gone,
            // It was told that both halves are over; what crossed that on the way no longer matters.
            (Guest::Closing { .. }, _) => {}
            (Guest::Open, Op::Rst) => self.on_rst(),
            (Guest::Open, Op::Rw) => {
                self.outgoing.update(header.buf_alloc, header.fwd_cnt);
                self.on_data(payload);
            }
            (Guest::Open, Op::Shutdown) => {
                self.outgoing.update(header.buf_alloc, header.fwd_cnt);
                self.on_shutdown(header.flags);
            }
            (Guest::Open, Op::CreditUpdate) => self.outgoing.update(header.buf_alloc, header.fwd_cnt),
            (Guest::Open, Op::CreditRequest) => {
                self.outgoing.update(header.buf_alloc, header.fwd_cnt);
                self.update_asked = true;
            }
            (Guest::Requested, _) | (Guest::Open, Op::Request | Op::Response) => self.abort(Reason::Protocol),
        }
    }

    fn on_rst(&mut self) {
        if self.guest_finished && (self.told_finished || self.guest_deaf) {
            // Both halves were over: an end, not a cut. What is buffered still goes to the fd.
            self.leave_guest();
        } else {
            self.cut(Reason::GuestReset);
        }
    }

    fn on_data(&mut self, payload: &Segments<'_>) {
        let len = payload.len();
        if self.guest_finished {
            self.abort(Reason::Protocol);
            return;
        }
        if let Err(error) = self.incoming.receive(len) {
            tracing::debug!(%error, ?self.ports, "reset");
            self.abort(Reason::Protocol);
            return;
        }
        let mut done = 0;
        if matches!(self.host, Host::Handshake) {
            let have = self.reply.len();
            let wanted = (self.reply_len - have).min(len);
            self.reply.resize(have + wanted, 0);
            done = payload.copy_to(&mut self.reply[have..]);
            self.incoming.forward(done);
        }
        if let Host::Attached(fd) = &self.host
            && self.buffer.is_empty()
            && self.writable
        {
            let (written, end) = fd.write_from(payload);
            self.incoming.forward(written);
            done += written;
            if self.write_ended(end) {
                return;
            }
        }
        if done < len {
            let mut rest = vec![0; (len - done).min(MAX_PAYLOAD)];
            let copied = payload.range(done, rest.len()).copy_to(&mut rest);
            self.buffer.extend(&rest[..copied]);
        }
    }

    fn on_shutdown(&mut self, flags: u32) {
        if flags & SHUTDOWN_BOTH == SHUTDOWN_BOTH && !self.guest_finished {
            // The guest's kernel waits for the RST before it gives up the port.
            let opening = matches!(self.host, Host::Handshake);
            self.rst_due = true;
            self.cut(if opening { Reason::GuestClosed } else { Reason::GuestReset });
            return;
        }
        if flags & SHUTDOWN_SEND != 0 {
            self.guest_finished = true;
        }
        if flags & SHUTDOWN_RCV != 0 && !self.guest_deaf {
            self.guest_deaf = true;
            self.stop_reading();
        }
        if matches!(self.host, Host::Handshake) && (self.guest_finished || self.guest_deaf) {
            let replied = self.reply.len() == self.reply_len && self.preamble_sent == self.preamble.len();
            if !replied {
                self.abort(Reason::GuestClosed);
                return;
            }
        }
        if self.guest_finished && self.guest_deaf {
            // > When both are set, the peer answers with RST, and Linux gives up its port only then. Nothing has to
            // > wait for a slow client: what the guest sent is in the buffer.
            self.rst_due = true;
            self.leave_guest();
        } else {
            self.flush();
        }
    }

    /// The guest is done with it properly; the fd gets what is buffered.
    fn leave_guest(&mut self) {
        self.guest = Guest::Gone;
        self.guest_finished = true;
        self.flush();
    }

    fn stop_reading(&mut self) {
        self.host_finished = true;
        self.readable = false;
        if let Host::Attached(fd) = &self.host {
            fd.finish_reading();
        }
    }

    /// Writes what is buffered as far as the fd takes it, then passes the guest's end of stream on.
    fn flush(&mut self) {
        while self.writable && !self.buffer.is_empty() {
            let Host::Attached(fd) = &self.host else {
                return;
            };
            let (written, end) = fd.write(self.buffer.as_slices().0);
            self.buffer.drain(..written);
            self.incoming.forward(written);
            if self.write_ended(end) {
                return;
            }
        }
        if !self.buffer.is_empty() || !self.guest_finished {
            return;
        }
        if self.guest == Guest::Gone {
            self.leave_host();
        } else if let Host::Attached(fd) = &self.host
            && !self.write_closed
        {
            self.write_closed = true;
            fd.finish_writing();
        }
    }

    /// All is written and read: closes the fd, as soon as that loses nothing.
    fn leave_host(&mut self) {
        match std::mem::replace(&mut self.host, Host::Closed) {
            Host::Attached(fd) => {
                if let Some(fd) = fd.close() {
                    self.host = Host::Leaving { fd, until: Instant::now() + LEAVE_TIMEOUT };
                }
            }
            other => self.host = other,
        }
    }

    /// Acts on the end of a write; returns whether the connection was cut by it.
    fn write_ended(&mut self, end: End) -> bool {
        match end {
            End::More => false,
            End::Blocked => {
                self.writable = false;
                false
            }
            End::Eof => {
                self.abort(Reason::HostClosed);
                true
            }
            End::Failed(error) => {
                tracing::debug!(%error, ?self.ports, "the host's end cannot be written");
                self.abort(Reason::HostClosed);
                true
            }
        }
    }

    fn both_finished(&self) -> bool {
        self.write_closed && self.told_finished
    }

    fn may_read(&self) -> bool {
        self.readable && !self.host_finished && self.attached()
    }

    fn preamble_left(&self) -> bool {
        self.preamble_sent < self.preamble.len()
    }

    fn held_up(&self) -> bool {
        self.preamble_left() || self.may_read()
    }

    /// Whether [`Self::fill`] would have something for the guest.
    pub fn wants_permit(&self) -> bool {
        match self.guest {
            Guest::Waiting => true,
            Guest::Open => {
                (self.held_up() && (self.outgoing.allowance() > 0 || self.outgoing.should_ask()))
                    || (self.host_finished && self.attached() && !self.told_finished)
                    || self.both_finished()
                    || self.update_asked
                    || self.incoming.update_due()
            }
            Guest::Requested | Guest::Closing { .. } | Guest::Gone => false,
        }
    }

    /// Sends up to `most` packets, and reads from the fd only what the guest can take.
    pub fn fill(&mut self, rx: &mut RxQueue<'_, '_>, most: usize, now: Instant) -> Turn {
        let mut turn = Turn::default();
        while turn.packets < most && self.wants_permit() {
            if self.guest == Guest::Open && !self.preamble_left() && self.may_read() {
                let most = self.appetite.min(most - turn.packets);
                if let Some((packets, bytes)) = self.fill_from_fd(rx, most) {
                    turn.packets += packets;
                    turn.bytes += bytes;
                    continue;
                }
            }
            let Some(permit) = rx.permit() else {
                turn.starved = true;
                break;
            };
            let Some(bytes) = self.fill_one(permit, now) else {
                break;
            };
            turn.packets += 1;
            turn.bytes += bytes;
        }
        turn
    }

    /// Reads once into as many packets as the guest's buffers and its credit allow; what was sent. `None` where
    /// nothing can be read: it is something else's turn.
    fn fill_from_fd(&mut self, rx: &mut RxQueue<'_, '_>, most: usize) -> Option<(usize, usize)> {
        let Host::Attached(fd) = &self.host else {
            return None;
        };
        let outgoing = &self.outgoing;
        let mut batch = rx.permits(most.min(outgoing.packets()), |planned| outgoing.allowance_after(planned));
        if batch.is_empty() {
            return None;
        }
        let room = batch.payload();
        let (read, end) = fd.read_into(&room);
        self.appetite = if read < room.len() { 1 } else { MOST_APPETITE.min(4 * self.appetite) };
        match end {
            End::More => {}
            End::Blocked => self.readable = false,
            End::Eof => self.host_finished = true,
            End::Failed(error) => {
                tracing::debug!(%error, ?self.ports, "the host's end cannot be read");
                self.abort(Reason::HostClosed);
            }
        }
        if read == 0 {
            return Some((0, 0));
        }
        // The same credit in all of them: it cannot change meanwhile.
        let header = self.header(Op::Rw);
        let outgoing = &mut self.outgoing;
        let packets = batch.send(read, |len| {
            outgoing.sent(len);
            Header { len: len as u32, ..header }
        });
        self.update_asked = false;
        Some((packets, read))
    }

    /// Sends one packet that does not come from the fd; its payload bytes, `None` where there is none to send.
    fn fill_one(&mut self, permit: RxPermit<'_, '_, '_>, now: Instant) -> Option<usize> {
        match self.guest {
            Guest::Waiting => {
                self.guest = Guest::Requested;
                return Some(self.send(permit, Op::Request, 0, 0));
            }
            Guest::Open => {}
            Guest::Requested | Guest::Closing { .. } | Guest::Gone => return None,
        }
        if self.held_up() && self.outgoing.allowance() > 0 {
            let room = permit.payload(self.outgoing.allowance());
            if room.is_empty() {
                // A chain with room for a header alone is used up, or it would be offered again for ever.
                return Some(self.send(permit, Op::CreditUpdate, 0, 0));
            }
            if self.preamble_left() {
                let sent = room.copy_from(&self.preamble[self.preamble_sent..]);
                self.preamble_sent += sent;
                return Some(self.send(permit, Op::Rw, 0, sent));
            }
        }
        if self.host_finished && self.attached() && !self.told_finished {
            self.told_finished = true;
            // A guest that no longer receives has nothing to learn from it.
            if !self.guest_deaf && !self.write_closed {
                return Some(self.send(permit, Op::Shutdown, SHUTDOWN_SEND, 0));
            }
        }
        if self.both_finished() {
            self.guest = Guest::Closing { until: now + CLOSE_TIMEOUT };
            self.leave_host();
            return Some(self.send(permit, Op::Shutdown, SHUTDOWN_BOTH, 0));
        }
        if self.update_asked || self.incoming.update_due() {
            return Some(self.send(permit, Op::CreditUpdate, 0, 0));
        }
        if self.held_up() && self.outgoing.should_ask() {
            self.outgoing.asked();
            return Some(self.send(permit, Op::CreditRequest, 0, 0));
        }
        None
    }

    fn header(&mut self, op: Op) -> Header {
        Header {
            buf_alloc: WINDOW,
            fwd_cnt: self.incoming.announce(),
            ..Header::to_guest(self.guest_cid, self.ports.host, self.ports.guest, op)
        }
    }

    fn send(&mut self, permit: RxPermit<'_, '_, '_>, op: Op, flags: u32, len: usize) -> usize {
        let header = Header { flags, len: len as u32, ..self.header(op) };
        permit.send(&header);
        self.update_asked = false;
        if op == Op::Rw {
            self.outgoing.sent(len);
        }
        len
    }
}
