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
//! ```
//!
//! `Gone` with the host `Opened` or `Attached` is *draining*: the guest finished properly, and what it sent is still
//! to be written to the fd. A connection may be forgotten when the guest is `Gone` and the host `Closed`.
//!
//! Each half ends on its own: EOF on the fd becomes SHUTDOWN(SEND) to the guest, and the guest's SHUTDOWN(SEND)
//! becomes `shutdown(fd, SHUT_WR)` once everything before it is written.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::control::Reason;
use super::credit::{Incoming, Outgoing, WINDOW};
use super::host_fd::{End, HostFd};
use super::packet::{Header, MAX_PAYLOAD, Op, SHUTDOWN_BOTH, SHUTDOWN_RCV, SHUTDOWN_SEND};
use super::queue::{RxPermit, Segments};

/// How long a guest may take to answer SHUTDOWN(both): Linux's own `VSOCK_CLOSE_TIMEOUT`.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(8);

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
    Closed,
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
    failure: Option<Reason>,
    read_error: bool,
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
            writable: false,
            host_finished: false,
            told_finished: false,
            guest_finished: false,
            guest_deaf: false,
            write_closed: false,
            update_asked: false,
            rst_due: false,
            failure: None,
            read_error: false,
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

    /// When it gives up waiting for the guest's last RST.
    pub fn close_deadline(&self) -> Option<Instant> {
        match self.guest {
            Guest::Closing { until } => Some(until),
            _ => None,
        }
    }

    /// Ends it at once: RST to the guest, a reset to the fd, `reason` to an opener that still waits.
    pub fn abort(&mut self, reason: Reason) {
        self.rst_due |= self.guest_knows();
        self.cut(reason);
    }

    /// As [`Self::abort`], for a guest that has forgotten the connection already.
    pub fn cut(&mut self, reason: Reason) {
        self.guest = Guest::Gone;
        self.buffer = VecDeque::new();
        match std::mem::replace(&mut self.host, Host::Closed) {
            Host::Handshake | Host::Opened => self.failure = Some(reason),
            Host::Attached(fd) => fd.reset(),
            Host::Closed => {}
        }
    }

    /// Whether it can take an fd.
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
    }

    /// The fd's socket became readable, writable or broken.
    pub fn on_host_event(&mut self, readable: bool, writable: bool, broken: bool) {
        let Host::Attached(fd) = &self.host else {
            return;
        };
        if broken && fd.error().is_some() {
            self.abort(Reason::HostClosed);
            return;
        }
        self.readable |= readable;
        self.writable |= writable;
        self.flush();
    }

    /// A packet from the guest for this connection.
    pub fn on_packet(&mut self, header: &Header, payload: &Segments<'_>, now: Instant) {
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
        let _ = now;
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
            if let Host::Attached(_) = &self.host
                && let Host::Attached(fd) = std::mem::replace(&mut self.host, Host::Closed)
            {
                fd.close();
            }
        } else if let Host::Attached(fd) = &self.host
            && !self.write_closed
        {
            self.write_closed = true;
            fd.finish_writing();
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

    fn held_up(&self) -> bool {
        self.preamble_sent < self.preamble.len() || self.may_read()
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

    /// Sends at most one packet, and reads from the fd only because `permit` says that the guest can take it.
    /// Returns the payload bytes sent, `None` when there was no packet to send.
    pub fn fill(&mut self, permit: RxPermit<'_, '_, '_>, now: Instant) -> Option<usize> {
        match self.guest {
            Guest::Waiting => {
                self.guest = Guest::Requested;
                return Some(self.send(permit, Op::Request, 0, 0));
            }
            Guest::Open => {}
            Guest::Requested | Guest::Closing { .. } | Guest::Gone => return None,
        }
        let allowance = self.outgoing.allowance();
        if self.held_up() && allowance > 0 {
            let room = permit.payload(allowance);
            if room.is_empty() {
                // A chain with room for a header alone is used up, or it would be offered again for ever.
                return Some(self.send(permit, Op::CreditUpdate, 0, 0));
            }
            if self.preamble_sent < self.preamble.len() {
                let sent = room.copy_from(&self.preamble[self.preamble_sent..]);
                self.preamble_sent += sent;
                return Some(self.send(permit, Op::Rw, 0, sent));
            }
            let read = self.read(&room);
            if self.read_error && read == 0 {
                self.abort(Reason::HostClosed);
                return None;
            }
            if read > 0 {
                return Some(self.send(permit, Op::Rw, 0, read));
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
            if let Host::Attached(fd) = std::mem::replace(&mut self.host, Host::Closed) {
                fd.close();
            }
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

    fn read(&mut self, room: &Segments<'_>) -> usize {
        let Host::Attached(fd) = &self.host else {
            return 0;
        };
        if self.read_error {
            return 0;
        }
        let (read, end) = fd.read_into(room);
        match end {
            End::More => {}
            End::Blocked => self.readable = false,
            End::Eof => self.host_finished = true,
            End::Failed(error) => {
                tracing::debug!(%error, ?self.ports, "the host's end cannot be read");
                self.read_error = true;
            }
        }
        read
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
