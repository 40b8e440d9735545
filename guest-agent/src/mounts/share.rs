//! One share in the worker: its streams, one after the other, and the device of its mount.
//!
//! ```text
//!   serve(stream) ─► wait for the turn ─► Attach ─► Restore? ─► wait for the device ─► pump
//!                          ▲                                                            │
//!                          └── the next stream ◄── broken: the kernel is asked again ◄──┘
//! ```
//! While no stream is attached nothing is read from the device: requests wait in the kernel, where
//! the death of who asked takes them back.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dhow_protocol::codec::{self, CodecError, FILE_LIMIT};
use dhow_protocol::control::MountRequest;
use dhow_protocol::files::{FileAnswer, FileOp, FileRequest};
use tokio::sync::watch;

use super::device::Device;
use super::ledger::Ledger;
use super::pump::{self, Ended};
use super::state::{Negotiated, State, StateFile};
use super::stream::{Replies, Stream};

/// How long a file server may take to attach, or to restore some nodes.
const ATTACH_DEADLINE: Duration = Duration::from_secs(60);

/// Why a stream ended early.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The socket.
    #[error("the stream of a share failed")]
    Io(#[from] io::Error),
    /// What came on it.
    #[error("the file server sent what is no reply")]
    Codec(#[from] CodecError),
    /// It did not attach.
    #[error("the file server did not attach: {0}")]
    Attach(String),
}

/// What is mounted.
#[derive(Debug)]
struct Mounted {
    file: StateFile,
    state: State,
}

/// See the module's page.
#[derive(Debug)]
pub struct Share {
    /// Its number.
    pub number: u32,
    /// Names the mount to the file server.
    pub mount: [u8; 16],
    /// Held while it is being mounted or unmounted.
    pub changing: tokio::sync::Mutex<()>,
    over: AtomicBool,
    ledger: Mutex<Ledger>,
    mounted: Mutex<Option<Mounted>>,
    device: watch::Sender<Option<Arc<Device>>>,
    attached: watch::Sender<bool>,
    begun: watch::Sender<Option<Result<(), String>>>,
    current: Mutex<Option<Arc<Stream>>>,
    turn: tokio::sync::Mutex<()>,
}

impl Share {
    /// A share that is not mounted. `mount` is random.
    pub fn new(number: u32, mount: [u8; 16]) -> Self {
        Self::with(number, mount, Ledger::default(), None, None)
    }

    /// A share that an earlier worker mounted. The kernel is asked at once for what that one left
    /// unanswered.
    pub fn adopted(device: Device, file: StateFile, state: State) -> Self {
        if let Err(error) = device.resend() {
            tracing::error!(%error, "the kernel does not ask again for what the last worker left unanswered");
        }
        let (number, mount) = (state.request.share, state.mount);
        Self::with(number, mount, Ledger::adopted(), Some(Arc::new(device)), Some(Mounted { file, state }))
    }

    fn with(
        number: u32,
        mount: [u8; 16],
        ledger: Ledger,
        device: Option<Arc<Device>>,
        mounted: Option<Mounted>,
    ) -> Self {
        Self {
            number,
            mount,
            changing: tokio::sync::Mutex::new(()),
            over: AtomicBool::new(false),
            ledger: Mutex::new(ledger),
            mounted: Mutex::new(mounted),
            device: watch::Sender::new(device),
            attached: watch::Sender::new(false),
            begun: watch::Sender::new(None),
            current: Mutex::new(None),
            turn: tokio::sync::Mutex::new(()),
        }
    }

    /// What it is mounted with.
    pub fn request(&self) -> Option<MountRequest> {
        if self.is_over() {
            return None;
        }
        lock(&self.mounted).as_ref().map(|mounted| mounted.state.request.clone())
    }

    /// Whether it was mounted and is not any more: it is of no use then.
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
            || self.device.borrow().as_ref().is_some_and(|device| device.is_gone())
    }

    /// Gives the device of a fresh mount to the stream that is attached or will be.
    pub fn begin(&self, device: Device, file: StateFile, state: State) {
        *lock(&self.mounted) = Some(Mounted { file, state });
        self.device.send_replace(Some(Arc::new(device)));
    }

    /// Waits until a stream is attached.
    pub async fn until_attached(&self) {
        // The sender lives as long as `self`.
        let _ = self.attached.subscribe().wait_for(|attached| *attached).await;
    }

    /// Waits until the kernel's INIT was answered.
    ///
    /// # Errors
    /// When kernel and agent do not agree.
    pub async fn until_begun(&self) -> Result<(), String> {
        let mut begun = self.begun.subscribe();
        match begun.wait_for(Option::is_some).await {
            Ok(result) => result.clone().unwrap_or(Ok(())),
            Err(_) => Ok(()),
        }
    }

    /// Ends its stream and drops its device, for good.
    pub fn end(&self) {
        self.over.store(true, Ordering::Release);
        *lock(&self.mounted) = None;
        self.device.send_replace(None);
        if let Some(stream) = lock(&self.current).take() {
            stream.end();
        }
    }

    /// The ledger.
    pub fn ledger(&self) -> MutexGuard<'_, Ledger> {
        lock(&self.ledger)
    }

    /// INIT was answered so; a new worker must know it.
    pub fn negotiated(&self, result: Result<Negotiated, String>) {
        if let (Ok(negotiated), Some(mounted)) = (&result, lock(&self.mounted).as_mut()) {
            mounted.state.negotiated = Some(*negotiated);
            if let Err(error) = mounted.file.write(&mounted.state) {
                tracing::error!(%error, "a mount's state could not be kept for a new worker");
            }
        }
        self.begun.send_replace(Some(result.map(drop)));
    }

    /// Serves a stream until it ends, or a newer one replaces it, or the mount is gone.
    pub async fn serve(&self, fd: OwnedFd) -> Ended {
        let stream = match Stream::new(fd) {
            Ok(stream) => Arc::new(stream),
            Err(error) => {
                tracing::error!(%error, "a stream of a share cannot be served");
                return Ended::Stream;
            }
        };
        if let Some(old) = lock(&self.current).replace(Arc::clone(&stream)) {
            old.end();
        }
        let _turn = self.turn.lock().await;
        let is_current = || lock(&self.current).as_ref().is_some_and(|current| Arc::ptr_eq(current, &stream));
        if !is_current() || self.is_over() {
            stream.end();
            return Ended::Stream;
        }
        let ended = self.converse(&stream).await;
        self.attached.send_replace(false);
        stream.end();
        self.break_off();
        if is_current() {
            lock(&self.current).take();
        }
        match ended {
            Ok(ended) => ended,
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, share = self.number, "stream ended");
                Ended::Stream
            }
        }
    }

    /// Everything that is open goes back into the kernel's queue.
    fn break_off(&self) {
        self.ledger().broken();
        let device = self.device.borrow().clone();
        if let Some(device) = device
            && !device.is_gone()
            && let Err(error) = device.resend()
        {
            tracing::error!(%error, "the kernel does not ask again for what is unanswered");
        }
    }

    async fn converse(&self, stream: &Stream) -> Result<Ended, StreamError> {
        let mut replies = Replies::default();
        match handshake(stream, &mut replies, FileOp::Attach { mount: self.mount }).await? {
            Ok(FileAnswer::Attached { resumed }) => {
                tracing::info!(share = self.number, resumed, "file server attached");
                let first = self.ledger().attached(resumed);
                for op in first {
                    match handshake(stream, &mut replies, op).await? {
                        Ok(FileAnswer::Done) => {}
                        // Names are looked up anew; only what is open is lost.
                        other => tracing::warn!(?other, "the file server did not restore nodes"),
                    }
                }
            }
            other => return Err(StreamError::Attach(format!("{other:?}"))),
        }
        self.attached.send_replace(true);
        let mut devices = self.device.subscribe();
        let device = tokio::select! {
            device = devices.wait_for(Option::is_some) => device.ok().and_then(|device| device.clone()),
            // Nothing was asked yet: whatever comes is its end.
            reply = replies.next(stream) => {
                reply?;
                None
            }
        };
        match device {
            Some(device) => pump::run(self, &device, stream, &mut replies).await,
            None => Ok(Ended::Stream),
        }
    }
}

/// Asks and waits for the answer, when nothing else is open.
async fn handshake(
    stream: &Stream,
    replies: &mut Replies,
    op: FileOp,
) -> Result<Result<FileAnswer, dhow_protocol::files::Errno>, StreamError> {
    let frame = codec::to_frame(&FileRequest { unique: 0, op }, FILE_LIMIT)?;
    let answered = async {
        stream.send(&frame).await?;
        replies.next(stream).await.map_err(StreamError::from)
    };
    match tokio::time::timeout(ATTACH_DEADLINE, answered).await {
        Ok(Ok(Some(reply))) => Ok(reply.result),
        Ok(Ok(None)) => Err(StreamError::Attach("the stream ended".to_owned())),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(StreamError::Attach(format!("no answer within {} s", ATTACH_DEADLINE.as_secs()))),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
