//! The way to the agent: opens streams with the hello, hands over their host side, and asks.
//!
//! Device and control stream may be replaced while the VM runs (`healing.rs`); what is asked meanwhile
//! waits for the new one within its own deadline.

use std::hash::{Hash, Hasher};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use dhow_protocol::AGENT_PORT;
use dhow_protocol::control::{ControlRequest, ControlResponse, GuestInfo};
use dhow_protocol::hello::{Hello, HelloError, HelloReply, REPLY_LEN, Secret};
use dhow_protocol::stream::StreamHeader;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};

use super::control::{Control, RequestError, seconds};
use super::first_words::FirstWords;
use super::leavers::Leavers;
use super::spares::Spares;
use super::turnstile::Turnstile;
use crate::vsock::client::DeviceClient;
use crate::vsock::{OpenRequest, PendingStream, Reason, Transport, TransportError};

/// How long the guest may take to answer a hello. With the device's own margin it is below what a command
/// waits.
pub const OPEN_DEADLINE: Duration = Duration::from_secs(10);
/// Likewise where the guest connects to a target, for which it takes 10 s at the most.
pub const CONNECT_DEADLINE: Duration = Duration::from_secs(13);

/// Streams to places in the guest that are opened at once: enough to keep the guest's agent busy.
const AT_ONCE: usize = 3;
/// What takes longer than that waits for its target, and is no longer counted.
const TURN: Duration = Duration::from_millis(50);

/// Why a stream could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The device could not reach the agent.
    #[error("the guest cannot be reached")]
    Transport(#[from] TransportError),
    /// The agent refused, or is not ours.
    #[error(transparent)]
    Hello(#[from] HelloError),
    /// The client has left, as too many others did.
    #[error("clients connect and leave faster than they are passed on")]
    Left,
    /// The client has gone.
    #[error("the client reset the connection before it was open")]
    Reset,
    /// No socket pair or no random numbers on the host.
    #[error("no stream could be made on the host")]
    Host(#[from] io::Error),
}

/// Opens streams to this boot's agent. Clones share the device.
#[derive(Clone)]
pub struct Opener {
    device: watch::Receiver<Option<DeviceClient>>,
    secret: Secret,
    spares: Spares,
    turnstile: Turnstile,
    leavers: Leavers,
}

impl Opener {
    /// Opens streams through whichever device there is, proving `secret`.
    #[must_use]
    pub fn new(device: watch::Receiver<Option<DeviceClient>>, secret: Secret) -> Self {
        let (spares, turnstile, leavers) = (Spares::default(), Turnstile::new(AT_ONCE), Leavers::default());
        Self { device, secret, spares, turnstile, leavers }
    }

    /// Opens a stream as far as the agent's consent; the host side is attached by the caller. Where the
    /// device is just being replaced, the new one is waited for.
    ///
    /// # Errors
    /// As [`OpenError`] says; the agent's refusal is [`HelloError::Refused`].
    pub async fn open(&self, header: &StreamHeader, deadline: Duration) -> Result<PendingStream, OpenError> {
        self.open_saying(header, &[], deadline).await
    }

    /// As [`Opener::open`]; `words` follow the hello, and are in the guest once at the most.
    async fn open_saying(
        &self,
        header: &StreamHeader,
        words: &[u8],
        deadline: Duration,
    ) -> Result<PendingStream, OpenError> {
        // A command is not to be run twice either.
        let once = !words.is_empty() || matches!(header, StreamHeader::Exec(_));
        let end = Instant::now() + deadline;
        let mut left = deadline;
        let mut device = self.device.clone();
        loop {
            let client = device.borrow_and_update().clone();
            if let Some(client) = client {
                match self.open_through(&client, header, words, once, left).await {
                    Err(OpenError::Transport(TransportError::DeviceGone)) => {}
                    Err(OpenError::Transport(TransportError::DeviceLost)) if !once => {}
                    result => return result,
                }
            }
            if !matches!(timeout_at(end, device.changed()).await, Ok(Ok(()))) {
                return Err(TransportError::DeviceGone.into());
            }
            left = end.saturating_duration_since(Instant::now());
        }
    }

    async fn open_through(
        &self,
        client: &DeviceClient,
        header: &StreamHeader,
        words: &[u8],
        once: bool,
        deadline: Duration,
    ) -> Result<PendingStream, OpenError> {
        let mut nonce = [0; 32];
        getrandom::fill(&mut nonce).map_err(|error| io::Error::other(error.to_string()))?;
        let mut preamble = Hello::preamble(&self.secret, nonce, header)?;
        preamble.extend_from_slice(words);
        let pending = self.say(client, preamble, once, deadline).await?;
        self.spares.fill(client);
        HelloReply::parse(pending.reply(), &self.secret, &nonce)?;
        Ok(pending)
    }

    /// Says a hello on a stream that was opened ahead, or on a new one. What is to be said `once` is not said again where
    /// any of it may have been heard.
    async fn say(
        &self,
        client: &DeviceClient,
        preamble: Vec<u8>,
        once: bool,
        deadline: Duration,
    ) -> Result<PendingStream, TransportError> {
        let end = Instant::now() + deadline;
        let left = || end.saturating_duration_since(Instant::now());
        while let Some(spare) = self.spares.take() {
            match spare.exchange(preamble.clone(), REPLY_LEN, left()).await {
                Ok(pending) => return Ok(pending),
                Err(TransportError::Deadline(_)) => return Err(TransportError::Deadline(deadline)),
                // It had died before, with the worker or the device that it led to.
                Err(error @ (TransportError::Reset(Reason::Unknown) | TransportError::DeviceGone)) => {
                    tracing::debug!(%error, "a stream that was opened ahead is of no use");
                }
                Err(error) if once => return Err(error),
                // The device is silent: another spare would wait as long.
                Err(error) if left().is_zero() => return Err(error),
                Err(error) => tracing::debug!(%error, "a stream that was opened ahead is of no use"),
            }
        }
        let deadline = left();
        client.open(OpenRequest { guest_port: AGENT_PORT, preamble, reply_len: REPLY_LEN, deadline }).await
    }

    /// Opens a stream to a target in the guest, whose host side is `fd`, a connected stream socket. Those to one
    /// target leave room for others, and wait in a line of their own.
    ///
    /// # Errors
    /// As [`Opener::open`].
    pub async fn open_with(&self, header: &StreamHeader, fd: OwnedFd) -> Result<(), OpenError> {
        let Some(group) = group(header) else {
            return Ok(self.open(header, CONNECT_DEADLINE).await?.attach(fd).await?);
        };
        let mut turn = self.turnstile.turn(group).await;
        let mut leave = None;
        let words = match FirstWords::of(&fd) {
            FirstWords::None => Vec::new(),
            FirstWords::Some(words) => words,
            FirstWords::Reset => return Err(OpenError::Reset),
            // The host's services open in the guest's turn, and as many as that lets.
            FirstWords::Never if matches!(header, StreamHeader::Dialled { .. }) => Vec::new(),
            FirstWords::Never => {
                drop(turn);
                let waited = timeout(CONNECT_DEADLINE, self.leavers.turn(group)).await;
                let line = waited.ok().flatten().ok_or(OpenError::Left)?;
                turn = self.turnstile.turn(group).await;
                leave = Some(line.begin());
                Vec::new()
            }
        };
        let opening = self.open_saying(header, &words, CONNECT_DEADLINE);
        tokio::pin!(opening);
        let pending = match timeout(TURN, &mut opening).await {
            Ok(opened) => {
                turn.opened();
                opened?
            }
            Err(_) => {
                // What it waits for costs the guest nothing.
                drop(leave);
                turn.waits();
                opening.await?
            }
        };
        FirstWords::take_off(&fd, &words)?;
        Ok(pending.attach_of(group, fd).await?)
    }

    /// Opens a stream that this process itself reads and writes.
    ///
    /// # Errors
    /// As [`Opener::open`].
    pub async fn open_here(
        &self,
        header: &StreamHeader,
        deadline: Duration,
    ) -> Result<UnixStream, OpenError> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let ours = UnixStream::from_std(ours)?;
        self.open(header, deadline).await?.attach(theirs.into()).await?;
        Ok(ours)
    }
}

/// A number for those streams that are many: one for each place that they lead to, the same for every supervisor of
/// this build. Two places may have one number; then they share their room.
fn group(header: &StreamHeader) -> Option<u32> {
    let mut hasher = std::hash::DefaultHasher::new();
    match header {
        StreamHeader::Tcp { address, port } => ("tcp", address, port).hash(&mut hasher),
        StreamHeader::Udp { address, port } => ("udp", address, port).hash(&mut hasher),
        StreamHeader::Unix { path } => ("unix", path).hash(&mut hasher),
        StreamHeader::Dialled { .. } => "dialled".hash(&mut hasher),
        _ => return None,
    }
    // 0 is no group.
    Some(hasher.finish() as u32 | 1)
}

/// The guest as the services see it. Clones share it.
#[derive(Clone)]
pub struct Guest {
    /// Opens further streams.
    pub opener: Opener,
    control: watch::Receiver<Option<Arc<Control>>>,
}

impl Guest {
    /// Asks on whichever control stream there is.
    pub fn new(opener: Opener, control: watch::Receiver<Option<Arc<Control>>>) -> Self {
        Self { opener, control }
    }

    /// Waits until there is a control stream.
    pub async fn answers(&self) {
        // An error means that the VM is ending; who waits is ended, too.
        if self.control.clone().wait_for(Option::is_some).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Waits until the control stream is another one than now: the agent was restarted, or the device.
    pub async fn renewed(&self) {
        let mut control = self.control.clone();
        let before = control.borrow_and_update().clone();
        let other = control.wait_for(|now| match (now, &before) {
            (Some(now), Some(before)) => !Arc::ptr_eq(now, before),
            (Some(_), None) => true,
            (None, _) => false,
        });
        if other.await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Sends one request and waits for its answer, `deadline` at the most, also for a control stream.
    ///
    /// # Errors
    /// As [`RequestError`] says.
    pub async fn request(
        &self,
        request: ControlRequest,
        deadline: Duration,
    ) -> Result<ControlResponse, RequestError> {
        let end = Instant::now() + deadline;
        let mut control = self.control.clone();
        let current = match timeout_at(end, control.wait_for(Option::is_some)).await {
            Ok(Ok(current)) => current.clone(),
            Ok(Err(_)) => None,
            Err(_) => return Err(RequestError::Deadline(seconds(deadline))),
        };
        let current = current.ok_or(RequestError::Lost)?;
        current.request(request, end.saturating_duration_since(Instant::now())).await
    }

    /// What the guest is.
    ///
    /// # Errors
    /// As [`RequestError`] says.
    pub async fn info(&self, deadline: Duration) -> Result<GuestInfo, RequestError> {
        match self.request(ControlRequest::Info, deadline).await? {
            ControlResponse::Info(info) => Ok(info),
            _ => Err(RequestError::Kind),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{IpAddr, Ipv4Addr};

    use dhow_protocol::codec::{self, CONTROL_LIMIT};
    use dhow_protocol::control::{FromAgent, ToAgent};
    use dhow_protocol::hello::HELLO_LEN;
    use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

    use super::super::{leavers, spares};
    use super::*;
    use crate::vsock::device::control::{FromDevice, Reason, ToDevice};

    const DEADLINE: Duration = Duration::from_secs(60);

    fn pair() -> (OwnedFd, OwnedFd) {
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .unwrap()
    }

    /// What becomes of the streams that were opened ahead.
    #[derive(Clone, Copy)]
    enum Ahead {
        Refused,
        Dead,
        Silent,
    }

    /// A device and an agent that consents to streams that are opened for something; returns how many exchanges it was
    /// asked for, when the client is gone.
    fn consent(socket: &OwnedFd, secret: &Secret, ahead: Ahead) -> usize {
        let mut bytes = vec![0; 64 << 10];
        let mut exchanges = 0;
        loop {
            let (_, length) = rustix::net::recv(socket, &mut bytes[..], RecvFlags::empty()).unwrap();
            if length == 0 {
                return exchanges;
            }
            let answer = match (ToDevice::decode(&bytes[..length]).unwrap(), ahead) {
                (ToDevice::Open { id, preamble, .. }, _) if !preamble.is_empty() => {
                    let hello = Hello::parse(preamble[..HELLO_LEN].try_into().unwrap()).unwrap();
                    let reply = HelloReply::ok().to_bytes(secret, &hello.nonce()).to_vec();
                    FromDevice::Opened { id, reply }
                }
                (ToDevice::Open { id, .. }, Ahead::Refused) => {
                    FromDevice::Failed { id, reason: Reason::Refused }
                }
                (ToDevice::Open { id, .. }, _) => FromDevice::Opened { id, reply: Vec::new() },
                (ToDevice::Exchange { id, .. }, Ahead::Dead) => {
                    exchanges += 1;
                    FromDevice::Failed { id, reason: Reason::Unknown }
                }
                (ToDevice::Exchange { .. }, _) => {
                    exchanges += 1;
                    continue;
                }
                (ToDevice::Attach { id, .. }, _) => FromDevice::Attached { id },
                _ => continue,
            };
            // The client may be gone.
            let _ = rustix::net::send(socket, &answer.encode(), SendFlags::NOSIGNAL);
        }
    }

    /// An opener that has opened something, whose device is served until it is dropped.
    async fn opened(ahead: Ahead) -> (Opener, std::thread::JoinHandle<usize>) {
        let secret = Secret([7; 32]);
        let (ours, theirs) = pair();
        let (_devices, device) = watch::channel(Some(DeviceClient::new(ours).unwrap()));
        let opener = Opener::new(device, secret.clone());
        let serving = std::thread::spawn(move || consent(&theirs, &secret, ahead));
        opener.open(&StreamHeader::Dns, DEADLINE).await.unwrap();
        (opener, serving)
    }

    async fn all_spares(opener: &Opener) {
        while opener.spares.ready() < spares::SPARES {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn streams_that_died_ahead_of_their_use_cost_nothing_but_themselves() {
        let (opener, serving) = opened(Ahead::Dead).await;
        all_spares(&opener).await;
        opener.open(&StreamHeader::Dns, DEADLINE).await.unwrap();
        all_spares(&opener).await;
        drop(opener);
        let exchanges = tokio::task::spawn_blocking(move || serving.join().unwrap()).await.unwrap();
        assert_eq!(exchanges, spares::SPARES);
    }

    #[tokio::test]
    async fn a_silent_device_is_waited_for_once() {
        let (opener, serving) = opened(Ahead::Silent).await;
        all_spares(&opener).await;
        let error = opener.open(&StreamHeader::Dns, Duration::from_millis(10)).await.unwrap_err();
        assert!(matches!(error, OpenError::Transport(TransportError::DeviceGone)), "{error}");
        drop(opener);
        let exchanges = tokio::task::spawn_blocking(move || serving.join().unwrap()).await.unwrap();
        assert_eq!(exchanges, 1);
    }

    const TARGET: StreamHeader = StreamHeader::Tcp { address: IpAddr::V4(Ipv4Addr::LOCALHOST), port: 80 };

    fn client() -> (OwnedFd, std::os::unix::net::UnixStream) {
        let (ours, client) = std::os::unix::net::UnixStream::pair().unwrap();
        (ours.into(), client)
    }

    #[tokio::test]
    async fn who_leaves_without_a_word_waits_for_others_of_his_kind_alone() {
        let (opener, _serving) = opened(Ahead::Refused).await;
        let first = opener.leavers.turn(group(&TARGET).unwrap()).await.unwrap();
        let leaving: Vec<_> = (0..2 * leavers::WAITING)
            .map(|_| {
                let (opener, (fd, left)) = (opener.clone(), client());
                drop(left);
                tokio::spawn(async move { opener.open_with(&TARGET, fd).await })
            })
            .collect();
        while leaving.iter().filter(|leaving| leaving.is_finished()).count() <= leavers::WAITING {
            tokio::task::yield_now().await;
        }
        let (fd, mut client) = client();
        client.write_all(b"hello").unwrap();
        opener.open_with(&TARGET, fd).await.unwrap();
        drop(first);
        let mut served = 0;
        for leaving in leaving {
            match leaving.await.unwrap() {
                Ok(()) => served += 1,
                Err(OpenError::Left) => {}
                Err(other) => panic!("{other}"),
            }
        }
        assert_eq!(served, leavers::WAITING - 1);
    }

    /// A device that hears one request, and what is said in it, and dies.
    fn hears_once(socket: OwnedFd) -> Vec<u8> {
        let mut bytes = vec![0; 64 << 10];
        let (_, length) = rustix::net::recv(&socket, &mut bytes[..], RecvFlags::empty()).unwrap();
        match ToDevice::decode(&bytes[..length]).unwrap() {
            ToDevice::Open { preamble, .. } => preamble,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn what_a_client_says_first_goes_with_the_hello_and_once() {
        let (ours, theirs) = pair();
        let (devices, device) = watch::channel(Some(DeviceClient::new(ours).unwrap()));
        let opener = Opener::new(device, Secret([7; 32]));
        let hearing = std::thread::spawn(move || hears_once(theirs));
        let (fd, mut client) = client();
        client.write_all(b"hello").unwrap();
        let error = opener.open_with(&TARGET, fd).await.unwrap_err();
        assert!(matches!(error, OpenError::Transport(TransportError::DeviceLost)), "{error}");
        let heard = tokio::task::spawn_blocking(move || hearing.join().unwrap()).await.unwrap();
        let hello = Hello::parse(heard[..HELLO_LEN].try_into().unwrap()).unwrap();
        assert_eq!(&heard[HELLO_LEN + hello.header_len()..], b"hello");
        drop(devices);
    }

    #[tokio::test]
    async fn what_is_asked_of_a_dead_device_waits_for_the_next() {
        let secret = Secret([7; 32]);
        let (devices, device) = watch::channel(None);
        let opener = Opener::new(device, secret.clone());
        let (ours, dead) = pair();
        devices.send_replace(Some(DeviceClient::new(ours).unwrap()));
        drop(dead);
        let opening = tokio::spawn(async move { opener.open(&StreamHeader::Dns, DEADLINE).await.map(drop) });
        let (ours, theirs) = pair();
        let serving = std::thread::spawn(move || consent(&theirs, &secret, Ahead::Refused));
        devices.send_replace(Some(DeviceClient::new(ours).unwrap()));
        opening.await.unwrap().unwrap();
        drop(devices);
        // The client's own tasks must go on for it to leave.
        tokio::task::spawn_blocking(move || serving.join().unwrap()).await.unwrap();
    }

    #[tokio::test]
    async fn without_a_device_the_deadline_holds() {
        let (_devices, device) = watch::channel(None);
        let opener = Opener::new(device, Secret([7; 32]));
        let error = opener.open(&StreamHeader::Dns, Duration::from_millis(10)).await.unwrap_err();
        assert!(matches!(error, OpenError::Transport(TransportError::DeviceGone)));
    }

    #[tokio::test]
    async fn a_request_waits_for_a_control_stream() {
        let (_devices, device) = watch::channel(None);
        let (controls, control) = watch::channel(None);
        let guest = Guest::new(Opener::new(device, Secret([7; 32])), control);
        let late = guest.request(ControlRequest::Ping, Duration::from_millis(10)).await;
        assert!(matches!(late, Err(RequestError::Deadline(_))));
        let asking = {
            let guest = guest.clone();
            tokio::spawn(async move { guest.request(ControlRequest::Ping, DEADLINE).await })
        };
        let renewed = tokio::spawn(async move { guest.renewed().await });
        // So that both wait already.
        tokio::task::yield_now().await;
        let (ours, mut agent) = UnixStream::pair().unwrap();
        let (control, _events) = Control::new(ours);
        controls.send_replace(Some(Arc::new(control)));
        let request = codec::read_frame::<ToAgent, _>(&mut agent, CONTROL_LIMIT).await.unwrap().unwrap();
        let ToAgent::Request { id, .. } = request else { panic!("{request:?}") };
        let answer = FromAgent::Response { id, result: Ok(ControlResponse::Pong) };
        codec::write_frame(&mut agent, &answer, CONTROL_LIMIT).await.unwrap();
        assert_eq!(asking.await.unwrap().unwrap(), ControlResponse::Pong);
        renewed.await.unwrap();
    }
}
