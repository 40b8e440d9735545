//! All connections: finds the one that a packet, an fd event or a request is for, and shares the guest's RX queue
//! out among them in turns.
//!
//! Nothing a guest sends makes more than its own connection fail, and nothing here waits: what the guest's RX queue
//! cannot take now stays where it is (a connection in the ready list, an RST in the reset list) until it can.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollFlags};

use super::connection::{Connection, Ports};
use super::control::{FromDevice, Reason, Stats};
use super::host_fd::{self, HostFd};
use super::packet::{HOST_CID, Header, Op, TYPE_STREAM};
use super::ports::PortRotation;
use super::queue::{ChainError, RxQueue, TxPacket};

/// As many connections as there may be at a time.
pub const MAX_CONNECTIONS: usize = 4095;

/// Packets that one connection may send before it is another one's turn.
const TURN: usize = 16;

/// RSTs kept for packets that belong to no connection, while the guest takes none. Beyond, they are dropped: only
/// a guest that floods gets there.
const MOST_STRAY_RESETS: usize = 1024;

/// Who waits for a connection without an fd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    /// The control connection.
    pub control: u64,
    /// The supervisor's number for the stream.
    pub id: u32,
}

/// What a pass over the ready connections came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pumped {
    /// Nothing is left to send.
    Idle,
    /// The guest has posted no more buffers.
    Starved,
    /// The pass was long enough; there is more to send.
    More,
}

#[derive(Debug)]
struct Slot {
    connection: Connection,
    owner: Option<Owner>,
    /// By when it must be open, while it is not.
    deadline: Option<Instant>,
    queued: bool,
    /// Of which it is one of those with an fd; 0 where of none.
    group: u32,
}

/// See the module's description.
#[derive(Debug)]
pub struct Muxer {
    guest_cid: u64,
    epoll: Arc<Epoll>,
    /// Fixed in length; the generation tells an event of a former tenant apart.
    slots: Vec<(u32, Option<Slot>)>,
    free: Vec<usize>,
    by_ports: HashMap<Ports, usize>,
    by_owner: HashMap<Owner, usize>,
    /// Connections of each group that has any.
    groups: HashMap<u32, usize>,
    ready: VecDeque<usize>,
    resets: VecDeque<Header>,
    stray_resets: usize,
    ports: PortRotation,
    /// No deadline is before this one.
    earliest: Option<Instant>,
    notices: Vec<(u64, FromDevice)>,
    stats: Stats,
}

impl Muxer {
    /// No connections yet. Their fds are watched in `epoll`, under tokens from [`Muxer::FIRST_TOKEN`] on.
    pub fn new(guest_cid: u64, epoll: Arc<Epoll>) -> Self {
        Self {
            guest_cid,
            epoll,
            slots: (0..MAX_CONNECTIONS).map(|_| (0, None)).collect(),
            free: (0..MAX_CONNECTIONS).rev().collect(),
            by_ports: HashMap::new(),
            by_owner: HashMap::new(),
            groups: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            stray_resets: 0,
            ports: PortRotation::new(),
            earliest: None,
            notices: Vec::new(),
            stats: Stats::default(),
        }
    }

    /// The lowest epoll token that a connection uses.
    pub const FIRST_TOKEN: u64 = 1 << 63;

    fn token(&self, slot: usize) -> u64 {
        Self::FIRST_TOKEN | (u64::from(self.slots[slot].0) << 16) | slot as u64
    }

    /// Numbers of now and so far.
    pub fn stats(&self) -> Stats {
        let attached =
            self.slots.iter().filter(|(_, slot)| slot.as_ref().is_some_and(|s| s.connection.attached()));
        Stats {
            connections: (MAX_CONNECTIONS - self.free.len()) as u64,
            attached: attached.count() as u64,
            ..self.stats
        }
    }

    /// Answers for control connections, in order.
    pub fn take_notices(&mut self) -> Vec<(u64, FromDevice)> {
        std::mem::take(&mut self.notices)
    }

    /// Whether a supervisor uses that number for a stream without an fd.
    pub fn knows(&self, owner: Owner) -> bool {
        self.by_owner.contains_key(&owner)
    }

    /// A supervisor wants a stream.
    pub fn open(
        &mut self,
        owner: Owner,
        guest_port: u32,
        preamble: Vec<u8>,
        reply_len: usize,
        deadline: Instant,
    ) {
        if self.free.is_empty() {
            self.make_room();
        }
        let Some(index) = self.free.pop() else {
            self.stats.failed += 1;
            self.notices.push((owner.control, FromDevice::Failed { id: owner.id, reason: Reason::TooMany }));
            return;
        };
        let host = self.ports.allocate(|host| self.by_ports.contains_key(&Ports { host, guest: guest_port }));
        let ports = Ports { host, guest: guest_port };
        let connection = Connection::new(self.guest_cid, ports, preamble, reply_len);
        self.slots[index].1 =
            Some(Slot { connection, owner: Some(owner), deadline: Some(deadline), queued: false, group: 0 });
        self.by_ports.insert(ports, index);
        self.by_owner.insert(owner, index);
        self.settle(index);
    }

    /// Lets those go that only wait for their client to close its end.
    fn make_room(&mut self) {
        for index in 0..self.slots.len() {
            if self.slot_mut(index).is_some_and(|slot| slot.connection.make_room()) {
                self.settle(index);
            }
        }
    }

    /// A supervisor has a stream that is open say something.
    pub fn exchange(&mut self, owner: Owner, preamble: Vec<u8>, reply_len: usize, deadline: Instant) {
        let index = self.by_owner.get(&owner).copied();
        let slot = index.and_then(|index| self.slot_mut(index)).filter(|slot| slot.connection.awaits_fd());
        let (Some(index), Some(slot)) = (index, slot) else {
            // The guest may have reset it on the way.
            self.notices.push((owner.control, FromDevice::Failed { id: owner.id, reason: Reason::Unknown }));
            return;
        };
        slot.deadline = Some(deadline);
        slot.connection.exchange(preamble, reply_len);
        self.settle(index);
    }

    /// A supervisor hands over the fd of a stream that is open.
    pub fn attach(&mut self, owner: Owner, group: u32, fd: Option<OwnedFd>) {
        let refuse = |this: &mut Self, reason| {
            this.notices.push((owner.control, FromDevice::AttachFailed { id: owner.id, reason }));
        };
        let slot = self.by_owner.get(&owner).copied();
        let awaited = slot.filter(|&index| self.slot(index).is_some_and(|slot| slot.connection.awaits_fd()));
        let Some(index) = awaited else {
            // The guest may have reset it on the way: the client is to see that, not an empty success.
            if let Some(fd) = fd {
                host_fd::reset(&fd);
            }
            refuse(self, Reason::Unknown);
            return;
        };
        if !self.has_room(group) {
            self.make_room();
        }
        if !self.has_room(group) {
            // The client is to see that it is refused.
            if let Some(fd) = fd {
                host_fd::reset(&fd);
            }
            refuse(self, Reason::TooMany);
            self.disown(index);
            if let Some(slot) = self.slot_mut(index) {
                slot.connection.abort(Reason::TooMany);
            }
            self.settle(index);
            return;
        }
        let adopted = fd.map(|fd| HostFd::adopt(fd, &self.epoll, self.token(index)));
        match adopted {
            Some(Ok(fd)) => {
                self.by_owner.remove(&owner);
                if let Some(slot) = self.slot_mut(index) {
                    slot.owner = None;
                    slot.group = group;
                    slot.connection.attach(fd);
                }
                if group != 0 {
                    *self.groups.entry(group).or_default() += 1;
                }
                self.notices.push((owner.control, FromDevice::Attached { id: owner.id }));
            }
            other => {
                if let Some(Err((fd, error))) = other {
                    tracing::warn!(%error, "the fd of a stream cannot be used");
                    host_fd::reset(&fd);
                }
                refuse(self, Reason::BadFd);
                self.disown(index);
                if let Some(slot) = self.slot_mut(index) {
                    slot.connection.abort(Reason::BadFd);
                }
            }
        }
        self.settle(index);
    }

    /// Whether a group may have one more: not more than there is room for others besides. A flood to one place so ends
    /// with half of all connections, and one to another place beside it with half of the rest.
    fn has_room(&self, group: u32) -> bool {
        group == 0 || self.groups.get(&group).is_none_or(|&members| members < self.free.len())
    }

    /// A supervisor gives up a stream that has no fd yet; one that it does not know is no error, as answers cross.
    pub fn cancel(&mut self, owner: Owner) {
        if let Some(&index) = self.by_owner.get(&owner) {
            self.disown(index);
            if let Some(slot) = self.slot_mut(index) {
                slot.connection.abort(Reason::Cancelled);
            }
            self.settle(index);
        }
    }

    /// A supervisor is gone: so are its streams without an fd; the others go on.
    pub fn drop_control(&mut self, control: u64) {
        let orphans: Vec<Owner> =
            self.by_owner.keys().filter(|owner| owner.control == control).copied().collect();
        for owner in orphans {
            self.cancel(owner);
        }
        self.notices.retain(|(to, _)| *to != control);
    }

    /// The guest's driver stopped or its memory is gone: it knows none of the connections any more. Those that it
    /// was never asked for keep waiting.
    pub fn guest_stopped(&mut self) {
        for index in 0..self.slots.len() {
            let Some(slot) = self.slot_mut(index) else {
                continue;
            };
            if slot.connection.guest_knows() {
                slot.connection.cut(Reason::DeviceReset);
                self.settle(index);
            }
        }
        self.resets.clear();
        self.stray_resets = 0;
    }

    /// An event of a connection's fd.
    pub fn on_host_event(&mut self, token: u64, events: EpollFlags) {
        let index = (token & 0xffff) as usize;
        if index >= self.slots.len() || self.token(index) != token {
            return;
        }
        let Some(slot) = self.slot_mut(index) else {
            return;
        };
        let hang_up = events.contains(EpollFlags::EPOLLHUP);
        let broken = events.contains(EpollFlags::EPOLLERR);
        let readable = events.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP);
        let writable = events.contains(EpollFlags::EPOLLOUT);
        slot.connection.on_host_event(readable || hang_up || broken, writable || hang_up || broken, broken);
        self.settle(index);
    }

    /// A chain of the guest's TX queue, good or bad.
    pub fn on_guest_packet(&mut self, packet: Result<TxPacket<'_>, ChainError>) {
        let (header, payload) = match packet {
            Ok(TxPacket { header, payload }) => (header, Ok(payload)),
            Err(error) => {
                self.stats.stray_packets += 1;
                tracing::debug!(%error, "malformed packet from the guest");
                match error {
                    ChainError::Truncated { header, .. } | ChainError::TooLong { header } => {
                        (header, Err(()))
                    }
                    _ => return,
                }
            }
        };
        // As Linux's vhost device: what is not between this guest and the host is nobody's.
        if header.dst_cid != HOST_CID || header.src_cid != self.guest_cid {
            self.stats.stray_packets += 1;
            return;
        }
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        let index = self.by_ports.get(&ports).copied().filter(|_| header.socket_type == TYPE_STREAM);
        let Some(index) = index else {
            // Host-initiated streams only: a REQUEST is refused like anything else that has no connection.
            self.stats.stray_packets += u64::from(header.op != Op::Rst as u16);
            self.answer_stray(&header);
            return;
        };
        if let Some(slot) = self.slots[index].1.as_mut() {
            match payload {
                Ok(payload) => {
                    self.stats.bytes_from_guest += payload.len() as u64;
                    slot.connection.on_packet(&header, &payload);
                }
                Err(()) => slot.connection.abort(Reason::Protocol),
            }
        }
        self.settle(index);
    }

    fn answer_stray(&mut self, header: &Header) {
        if let Some(reset) = header.reset_for()
            && self.stray_resets < MOST_STRAY_RESETS
        {
            self.stray_resets += 1;
            self.resets.push_back(reset);
        }
    }

    /// Fails what is past its deadline; returns the earliest one to come.
    pub fn expire(&mut self, now: Instant) -> Option<Instant> {
        if self.earliest.is_none_or(|earliest| earliest > now) {
            return self.earliest;
        }
        let mut next: Option<Instant> = None;
        self.earliest = None;
        for index in 0..self.slots.len() {
            let Some(slot) = self.slot_mut(index) else {
                continue;
            };
            let (opening, closing) = (slot.deadline, slot.connection.deadline());
            if opening.is_some_and(|at| at <= now) {
                slot.connection.abort(Reason::Deadline);
                self.settle(index);
            } else if closing.is_some_and(|at| at <= now) {
                slot.connection.expire(now);
                self.settle(index);
            } else {
                next = [next, opening, closing].into_iter().flatten().min();
            }
        }
        self.earliest = [next, self.earliest].into_iter().flatten().min();
        self.earliest
    }

    /// Sends to the guest, at most `budget` packets, while it has buffers.
    pub fn pump(&mut self, rx: &mut RxQueue<'_, '_>, mut budget: usize, now: Instant) -> Pumped {
        while let Some(reset) = self.resets.front() {
            if budget == 0 {
                return Pumped::More;
            }
            let Some(permit) = rx.permit() else {
                return Pumped::Starved;
            };
            permit.send(reset);
            budget -= 1;
            self.stats.resets_sent += 1;
            self.resets.pop_front();
            self.stray_resets = self.stray_resets.min(self.resets.len());
        }
        while let Some(&index) = self.ready.front() {
            if budget == 0 {
                return Pumped::More;
            }
            if let Some(slot) = self.slots[index].1.as_mut() {
                let turn = slot.connection.fill(rx, TURN.min(budget), now);
                budget -= turn.packets;
                self.stats.bytes_to_guest += turn.bytes as u64;
                if turn.starved {
                    // Its turn is over where it has sent anything: else a guest that posts few buffers at a time
                    // would feed them all to one connection.
                    if turn.packets > 0 {
                        self.ready.rotate_left(1);
                    }
                    return Pumped::Starved;
                }
                slot.queued = false;
            }
            self.ready.pop_front();
            self.settle(index);
        }
        if self.resets.is_empty() { Pumped::Idle } else { Pumped::More }
    }

    fn slot(&self, index: usize) -> Option<&Slot> {
        self.slots[index].1.as_ref()
    }

    fn slot_mut(&mut self, index: usize) -> Option<&mut Slot> {
        self.slots[index].1.as_mut()
    }

    fn disown(&mut self, index: usize) {
        if let Some(owner) = self.slots[index].1.as_mut().and_then(|slot| slot.owner.take()) {
            self.by_owner.remove(&owner);
        }
    }

    /// Brings everything about a connection up to date after anything happened to it.
    fn settle(&mut self, index: usize) {
        let Some(slot) = self.slots[index].1.as_mut() else {
            return;
        };
        if let Some(reply) = slot.connection.take_opened() {
            slot.deadline = None;
            self.stats.opened += 1;
            if let Some(owner) = slot.owner {
                self.notices.push((owner.control, FromDevice::Opened { id: owner.id, reply }));
            }
        }
        if let Some(reason) = slot.connection.take_failure() {
            slot.deadline = None;
            if let Some(owner) = slot.owner.take() {
                self.stats.failed += 1;
                self.by_owner.remove(&owner);
                self.notices.push((owner.control, FromDevice::Failed { id: owner.id, reason }));
            }
        }
        if let Some(reset) = slot.connection.take_rst() {
            self.resets.push_back(reset);
        }
        let ports = slot.connection.ports();
        if slot.connection.guest_gone() && self.by_ports.get(&ports) == Some(&index) {
            self.by_ports.remove(&ports);
        }
        if slot.connection.dead() {
            let (queued, group) = (slot.queued, slot.group);
            if let Some(members) = self.groups.get_mut(&group) {
                *members -= 1;
                if *members == 0 {
                    self.groups.remove(&group);
                }
            }
            self.slots[index].1 = None;
            self.slots[index].0 = self.slots[index].0.wrapping_add(1) & 0x3fff_ffff;
            self.free.push(index);
            if queued {
                self.ready.retain(|&other| other != index);
            }
            return;
        }
        let deadlines = [self.earliest, slot.deadline, slot.connection.deadline()];
        self.earliest = deadlines.into_iter().flatten().min();
        if !slot.queued && slot.connection.wants_permit() {
            slot.queued = true;
            self.ready.push_back(index);
        }
    }
}

/// The longest deadline that an opener may ask for.
pub const MAX_DEADLINE: Duration = Duration::from_secs(600);
