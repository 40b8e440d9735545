//! The supervisor's end of the device's control socket: the [`Transport`] of the userspace vsock device.
//!
//! Two tasks serve the socket, one for each direction, and end with the last [`DeviceClient`] and stream of it.
//! Answers find their asker by id.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use super::device::control::{FromDevice, MAX_PREAMBLE, MAX_REPLY, Reason, Stats, ToDevice};
use super::device::control_socket;
use super::{OpenRequest, PendingStream, Transport, TransportError};

/// How long after a deadline the device itself is given up: it should have answered by then.
const GRACE: Duration = Duration::from_secs(2);
/// How long an answer may take that needs no guest.
const PROMPT: Duration = Duration::from_secs(10);

/// A connection to the vsock device. Clones share it.
#[derive(Clone, Debug)]
pub struct DeviceClient {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    waiting: Arc<Waiting>,
    outgoing: mpsc::UnboundedSender<Outgoing>,
    tasks: [JoinHandle<()>; 2],
}

#[derive(Debug)]
struct Outgoing {
    message: ToDevice,
    fd: Option<OwnedFd>,
}

#[derive(Debug, Default)]
struct Waiting {
    state: Mutex<WaitingState>,
    gone: watch::Sender<bool>,
}

/// Who waits for an answer; told `None` when the device goes and never had the request, and nothing when it may have.
#[derive(Debug)]
struct Asker {
    sender: oneshot::Sender<Option<FromDevice>>,
    sent: bool,
}

#[derive(Debug, Default)]
struct WaitingState {
    last_id: u32,
    askers: HashMap<u32, Asker>,
    gone: bool,
}

impl Waiting {
    fn lock(&self) -> MutexGuard<'_, WaitingState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new id. They repeat after four thousand million, when no stream still waits for its fd.
    fn new_id(&self) -> u32 {
        let mut state = self.lock();
        state.last_id = state.last_id.wrapping_add(1);
        state.last_id
    }

    fn expect(&self, id: u32) -> Result<oneshot::Receiver<Option<FromDevice>>, TransportError> {
        let mut state = self.lock();
        if state.gone {
            return Err(TransportError::DeviceGone);
        }
        let (asker, answer) = oneshot::channel();
        state.askers.insert(id, Asker { sender: asker, sent: false });
        Ok(answer)
    }

    fn answer(&self, message: FromDevice) {
        let id = match &message {
            FromDevice::Opened { id, .. }
            | FromDevice::Failed { id, .. }
            | FromDevice::Attached { id }
            | FromDevice::AttachFailed { id, .. }
            | FromDevice::Stats { id, .. } => *id,
        };
        // Nobody waits where a stream failed before its fd came: attach will say so.
        let asker = self.lock().askers.remove(&id);
        if let Some(asker) = asker {
            let _ = asker.sender.send(Some(message));
        }
    }

    /// Whether the device may have this.
    fn note_sent(&self, message: &ToDevice, sent: bool) {
        let (ToDevice::Open { id, .. }
        | ToDevice::Attach { id, .. }
        | ToDevice::Cancel { id }
        | ToDevice::Stats { id }
        | ToDevice::Exchange { id, .. }) = message;
        if let Some(asker) = self.lock().askers.get_mut(id) {
            asker.sent = sent;
        }
    }

    fn device_gone(&self) {
        let mut state = self.lock();
        state.gone = true;
        for asker in std::mem::take(&mut state.askers).into_values().filter(|asker| !asker.sent) {
            let _ = asker.sender.send(None);
        }
        drop(state);
        self.gone.send_replace(true);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // The writer ends by itself when the channel is empty and closed, so that a last Cancel is still sent.
        self.tasks[0].abort();
    }
}

impl DeviceClient {
    /// Takes over a connected SOCK_SEQPACKET socket to the device. Must be called within a tokio runtime.
    pub fn new(control: OwnedFd) -> io::Result<Self> {
        // Only its readiness is asked of the type: records are received and sent whole, with their fds.
        let control = std::os::unix::net::UnixStream::from(control);
        control.set_nonblocking(true)?;
        let socket = Arc::new(UnixStream::from_std(control)?);
        let waiting = Arc::new(Waiting::default());
        let (outgoing, queue) = mpsc::unbounded_channel();
        let reader = tokio::spawn(read_answers(Arc::clone(&socket), Arc::clone(&waiting)));
        let writer = tokio::spawn(write_requests(socket, queue, Arc::clone(&waiting)));
        Ok(Self { shared: Arc::new(Shared { waiting, outgoing, tasks: [reader, writer] }) })
    }

    /// Waits until the connection to the device has ended: it serves no request any more.
    pub async fn gone(&self) {
        // The sender lives in `self`.
        let _ = self.shared.waiting.gone.subscribe().wait_for(|gone| *gone).await;
    }

    /// The device's numbers.
    pub async fn stats(&self) -> Result<Stats, TransportError> {
        let id = self.shared.waiting.new_id();
        match self.shared.ask(id, ToDevice::Stats { id }, None, PROMPT).await? {
            FromDevice::Stats { stats, .. } => Ok(stats),
            _ => Err(TransportError::DeviceLost),
        }
    }
}

impl Shared {
    async fn ask(
        &self,
        id: u32,
        message: ToDevice,
        fd: Option<OwnedFd>,
        patience: Duration,
    ) -> Result<FromDevice, TransportError> {
        let answer = self.waiting.expect(id)?;
        self.outgoing.send(Outgoing { message, fd }).map_err(|_| TransportError::DeviceGone)?;
        match tokio::time::timeout(patience, answer).await {
            Ok(Ok(Some(message))) => Ok(message),
            Ok(Ok(None)) => Err(TransportError::DeviceGone),
            Ok(Err(_)) => Err(TransportError::DeviceLost),
            Err(_) => {
                self.waiting.lock().askers.remove(&id);
                Err(TransportError::DeviceLost)
            }
        }
    }
}

impl Transport for DeviceClient {
    async fn open(&self, request: OpenRequest) -> Result<PendingStream, TransportError> {
        check("preamble", request.preamble.len(), MAX_PREAMBLE)?;
        check("reply", request.reply_len, MAX_REPLY)?;
        let OpenRequest { guest_port, preamble, reply_len, deadline } = request;
        let id = self.shared.waiting.new_id();
        let message = ToDevice::Open {
            id,
            guest_port,
            reply_len: reply_len as u32,
            deadline_ms: milliseconds(deadline),
            preamble,
        };
        // From here on a drop of this future cancels.
        let ticket = Ticket { shared: Arc::clone(&self.shared), id, guest_port, live: true };
        let (reply, inner) = ticket.replied(message, reply_len, deadline).await?;
        Ok(PendingStream { reply, inner })
    }
}

fn milliseconds(deadline: Duration) -> u32 {
    u32::try_from(deadline.as_millis()).unwrap_or(u32::MAX)
}

fn check(what: &'static str, have: usize, limit: usize) -> Result<(), TransportError> {
    if have > limit { Err(TransportError::TooLong { what, have, limit }) } else { Ok(()) }
}

fn failure(reason: Reason, guest_port: u32, deadline: Duration) -> TransportError {
    match reason {
        Reason::Refused => TransportError::Refused(guest_port),
        Reason::Deadline => TransportError::Deadline(deadline),
        Reason::TooMany => TransportError::TooMany,
        Reason::BadFd => TransportError::BadFd,
        other => TransportError::Reset(other),
    }
}

/// The right to a stream without an fd; cancels it when dropped.
#[derive(Debug)]
pub(super) struct Ticket {
    shared: Arc<Shared>,
    id: u32,
    guest_port: u32,
    live: bool,
}

impl Ticket {
    /// Sends `message`, and waits for the reply that it makes the guest give.
    async fn replied(
        mut self,
        message: ToDevice,
        reply_len: usize,
        deadline: Duration,
    ) -> Result<(Vec<u8>, Self), TransportError> {
        match self.shared.ask(self.id, message, None, deadline.saturating_add(GRACE)).await? {
            FromDevice::Opened { reply, .. } if reply.len() == reply_len => Ok((reply, self)),
            FromDevice::Failed { reason, .. } => {
                self.live = false;
                Err(failure(reason, self.guest_port, deadline))
            }
            _ => Err(TransportError::DeviceLost),
        }
    }

    pub(super) async fn exchange(
        self,
        preamble: Vec<u8>,
        reply_len: usize,
        deadline: Duration,
    ) -> Result<(Vec<u8>, Self), TransportError> {
        check("preamble", preamble.len(), MAX_PREAMBLE)?;
        check("reply", reply_len, MAX_REPLY)?;
        let message = ToDevice::Exchange {
            id: self.id,
            reply_len: reply_len as u32,
            deadline_ms: milliseconds(deadline),
            preamble,
        };
        self.replied(message, reply_len, deadline).await
    }

    pub(super) async fn attach(mut self, group: u32, fd: OwnedFd) -> Result<(), TransportError> {
        let id = self.id;
        // Cancelled from here on, the fd is on its way and belongs to the device.
        self.live = false;
        match self.shared.ask(id, ToDevice::Attach { id, group }, Some(fd), PROMPT).await? {
            FromDevice::Attached { .. } => Ok(()),
            FromDevice::AttachFailed { reason: Reason::BadFd, .. } => Err(TransportError::BadFd),
            FromDevice::AttachFailed { reason: Reason::TooMany, .. } => Err(TransportError::TooMany),
            FromDevice::AttachFailed { reason, .. } | FromDevice::Failed { reason, .. } => {
                Err(TransportError::Reset(reason))
            }
            _ => Err(TransportError::DeviceLost),
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.live {
            self.shared.waiting.lock().askers.remove(&self.id);
            let cancel = Outgoing { message: ToDevice::Cancel { id: self.id }, fd: None };
            let _ = self.shared.outgoing.send(cancel);
        }
    }
}

async fn read_answers(socket: Arc<UnixStream>, waiting: Arc<Waiting>) {
    loop {
        match socket.async_io(Interest::READABLE, || control_socket::receive(&*socket)).await {
            Ok(Some(record)) => match FromDevice::decode(&record.bytes) {
                Ok(message) => waiting.answer(message),
                Err(error) => {
                    tracing::error!(%error, "the vsock device sent nonsense");
                    break;
                }
            },
            Ok(None) => break,
            Err(error) => {
                tracing::error!(%error, "the vsock device's control connection failed");
                break;
            }
        }
    }
    waiting.device_gone();
}

async fn write_requests(
    socket: Arc<UnixStream>,
    mut queue: mpsc::UnboundedReceiver<Outgoing>,
    waiting: Arc<Waiting>,
) {
    while let Some(Outgoing { message, fd }) = queue.recv().await {
        let bytes = message.encode();
        waiting.note_sent(&message, true);
        let sent = socket
            .async_io(Interest::WRITABLE, || {
                control_socket::send(&*socket, &bytes, fd.as_ref().map(AsFd::as_fd))
            })
            .await;
        if let Err(error) = sent {
            tracing::error!(%error, "the vsock device takes no requests");
            waiting.note_sent(&message, false);
            waiting.device_gone();
            return;
        }
    }
}
