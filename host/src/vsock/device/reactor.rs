//! What happens on the host's side of the device: its epoll set, timer and control connections around the muxer.
//!
//! All fds sit in one epoll set of our own, which is itself one fd in the vhost-user event loop. So connections can
//! be watched edge-triggered, and everything but the virtqueues can be tested without a VM.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use rustix::net::SocketFlags;

use super::control::{FromDevice, ToDevice};
use super::control_socket::{ControlSocket, Record};
use super::muxer::{MAX_DEADLINE, Muxer, Owner};

const LISTENER: u64 = 0;
const TIMER: u64 = 1;
const WAKE: u64 = 2;
const FIRST_CONTROL: u64 = 16;

/// Control connections at a time: a supervisor, and its successor before the first one's end is seen.
const MOST_CONTROLS: usize = 4;

/// Events taken in one go, so that the virtqueues get their turn.
const EVENTS: usize = 64;

/// Records taken from one control connection in one go.
const RECORDS: usize = 32;

/// See the module's description.
pub struct Reactor {
    /// The connections.
    pub muxer: Muxer,
    epoll: Arc<Epoll>,
    listener: OwnedFd,
    timer: TimerFd,
    timer_at: Option<Instant>,
    wake: EventFd,
    woken: bool,
    controls: BTreeMap<u64, ControlSocket>,
    /// A supervisor waits to be accepted until an fd is free.
    accept_later: bool,
    next_control: u64,
}

impl Reactor {
    /// Starts to listen for supervisors.
    pub fn new(guest_cid: u64, listener: OwnedFd) -> io::Result<Self> {
        let epoll = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?);
        let timer =
            TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)?;
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        rustix::io::ioctl_fionbio(&listener, true)?;
        // Edge-triggered: a full fd table must not make the listener wake the loop for ever.
        epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, LISTENER))?;
        epoll.add(&timer, EpollEvent::new(EpollFlags::EPOLLIN, TIMER))?;
        epoll.add(&wake, EpollEvent::new(EpollFlags::EPOLLIN, WAKE))?;
        Ok(Self {
            muxer: Muxer::new(guest_cid, Arc::clone(&epoll)),
            epoll,
            listener,
            timer,
            timer_at: None,
            wake,
            woken: false,
            controls: BTreeMap::new(),
            accept_later: false,
            next_control: FIRST_CONTROL,
        })
    }

    /// The epoll set, readable when [`Self::turn`] has something to do.
    pub fn poll_set(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }

    /// Makes the event loop come back at once: there is more to do than one turn did.
    pub fn wake(&mut self) {
        if !self.woken {
            self.woken = self.wake.write(1).is_ok();
        }
    }

    /// Takes what has happened on the host's side.
    pub fn turn(&mut self) {
        let mut events = [EpollEvent::empty(); EVENTS];
        let count = self.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap_or(0);
        for event in &events[..count] {
            match event.data() {
                LISTENER => self.accept(),
                TIMER => {
                    let _ = self.timer.wait();
                    self.timer_at = None;
                }
                WAKE => {
                    let _ = self.wake.read();
                    self.woken = false;
                }
                token if token >= Muxer::FIRST_TOKEN => self.muxer.on_host_event(token, event.events()),
                token => self.serve(token, event.events()),
            }
        }
    }

    /// Ends a turn: answers go out, and the timer is set for the next deadline.
    pub fn finish(&mut self, now: Instant) {
        let next = self.muxer.expire(now);
        if self.accept_later {
            // A connection may have ended in this turn, and its fd is free.
            self.accept();
        }
        let mut broken = Vec::new();
        for (to, message) in self.muxer.take_notices() {
            self.answer(to, &message);
        }
        for (token, control) in &mut self.controls {
            if control.congested() && control.flush().is_err() {
                broken.push(*token);
            }
        }
        for token in broken {
            self.drop_control(token);
        }
        self.watch_congestion();
        if let Some(at) = next
            && self.timer_at.is_none_or(|set| at < set)
        {
            let wait = at.saturating_duration_since(now).max(Duration::from_millis(1));
            let expiration = Expiration::OneShot(TimeSpec::from(wait));
            if self.timer.set(expiration, TimerSetTimeFlags::empty()).is_ok() {
                self.timer_at = Some(at);
            }
        }
    }

    fn accept(&mut self) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        loop {
            match rustix::net::accept_with(&self.listener, flags) {
                Ok(socket) => self.admit(socket),
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    self.accept_later = false;
                    return;
                }
                Err(error) => {
                    if !self.accept_later {
                        tracing::warn!(%error, "a supervisor cannot be accepted now");
                    }
                    self.accept_later = true;
                    return;
                }
            }
        }
    }

    fn admit(&mut self, socket: OwnedFd) {
        if self.controls.len() >= MOST_CONTROLS {
            tracing::warn!("more than {MOST_CONTROLS} supervisors at once: the newest is refused");
            return;
        }
        let token = self.next_control;
        self.next_control += 1;
        if let Err(error) = self.epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, token)) {
            tracing::warn!(%error, "a supervisor cannot be watched");
            return;
        }
        tracing::info!("supervisor connected");
        self.controls.insert(token, ControlSocket::new(socket));
    }

    /// A supervisor that does not take its answers is not asked for more.
    fn watch_congestion(&mut self) {
        for (token, control) in &mut self.controls {
            let congested = control.congested();
            if congested == control.watched_for_room {
                continue;
            }
            control.watched_for_room = congested;
            let events = if congested { EpollFlags::EPOLLOUT } else { EpollFlags::EPOLLIN };
            let _ = self.epoll.modify(control.as_fd(), &mut EpollEvent::new(events, *token));
        }
    }

    fn serve(&mut self, token: u64, events: EpollFlags) {
        for _ in 0..RECORDS {
            let Some(control) = self.controls.get(&token) else {
                return;
            };
            if control.congested() && !events.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
                return;
            }
            match control.receive() {
                Ok(Some(record)) => {
                    if let Err(error) = self.obey(token, record) {
                        tracing::warn!(%error, "bad request from the supervisor: its connection is closed");
                        return self.drop_control(token);
                    }
                }
                Ok(None) => return self.drop_control(token),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::warn!(%error, "the supervisor's connection is closed");
                    return self.drop_control(token);
                }
            }
        }
    }

    fn obey(&mut self, control: u64, record: Record) -> Result<(), Box<dyn std::error::Error>> {
        let now = Instant::now();
        match ToDevice::decode(&record.bytes)? {
            ToDevice::Open { id, guest_port, reply_len, deadline_ms, preamble } => {
                let owner = Owner { control, id };
                if self.muxer.knows(owner) {
                    return Err(format!("stream {id} exists already").into());
                }
                let deadline = deadline(now, deadline_ms);
                self.muxer.open(owner, guest_port, preamble, reply_len as usize, deadline);
            }
            ToDevice::Exchange { id, reply_len, deadline_ms, preamble } => {
                let owner = Owner { control, id };
                self.muxer.exchange(owner, preamble, reply_len as usize, deadline(now, deadline_ms));
            }
            ToDevice::Attach { id, group } => self.muxer.attach(Owner { control, id }, group, record.fd),
            ToDevice::Cancel { id } => self.muxer.cancel(Owner { control, id }),
            ToDevice::Stats { id } => {
                let stats = self.muxer.stats();
                self.answer(control, &FromDevice::Stats { id, stats });
            }
        }
        Ok(())
    }

    fn answer(&mut self, control: u64, message: &FromDevice) {
        if let Some(control) = self.controls.get_mut(&control) {
            control.push(message);
        }
    }

    fn drop_control(&mut self, token: u64) {
        if let Some(control) = self.controls.remove(&token) {
            let _ = self.epoll.delete(control.as_fd());
            self.muxer.drop_control(token);
            tracing::info!("supervisor disconnected");
        }
    }
}

fn deadline(now: Instant, ms: u32) -> Instant {
    now + Duration::from_millis(ms.into()).min(MAX_DEADLINE)
}
