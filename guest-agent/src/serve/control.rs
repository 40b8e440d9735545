//! The control stream: requests with ids, deadlines and cancellation, and events. Knows no request.
//!
//! ```text
//! reader ──request──► task (deadline, cancel) ──answer──► queue ──► writer
//!   └────cancel─────────►┘             events (broadcast) ──┘
//! ```
//! Nothing here waits for a slow host: requests wait in their tasks, and events that it is too slow
//! for are dropped and their number told.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use dhow_protocol::codec::{self, CONTROL_LIMIT, CodecError};
use dhow_protocol::control::{ControlError, ControlRequest, ControlResponse, Event, FromAgent, ToAgent};
use dhow_protocol::errors::chain;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::stream::Stream;

/// Requests under way at once; further ones fail.
const REQUESTS: usize = 64;
/// Frames that wait for the writer.
const QUEUE: usize = 64;

/// Who fulfils requests.
pub(super) trait Handler: Send + Sync + 'static {
    /// Fulfils one. The future is dropped at the request's deadline, when it is cancelled and when
    /// the stream ends. `answered` tells when the answer was sent, or that it cannot be.
    fn handle(
        &self,
        request: ControlRequest,
        answered: oneshot::Receiver<()>,
    ) -> impl Future<Output = Result<ControlResponse, ControlError>> + Send;
}

/// Serves control streams, one at a time.
pub(super) struct Control<H> {
    handler: Arc<H>,
    events: broadcast::Sender<Event>,
    /// Number of the newest stream; an older one ends.
    newest: watch::Sender<u64>,
}

/// A frame and who wants to know that it was sent.
struct Outgoing {
    frame: FromAgent,
    sent: Option<oneshot::Sender<()>>,
}

/// Requests under way and how to cancel them.
type Running = Arc<Mutex<HashMap<u64, oneshot::Sender<()>>>>;

impl<H: Handler> Control<H> {
    /// Events are taken from `events` while there is a stream.
    pub(super) fn new(handler: Arc<H>, events: broadcast::Sender<Event>) -> Self {
        Self { handler, events, newest: watch::Sender::new(0) }
    }

    /// Serves one stream until it ends, or a newer one takes its place.
    pub(super) async fn serve(&self, stream: &Stream) {
        // Before anything is answered: an event that a request causes belongs to this stream already.
        let events = self.events.subscribe();
        let mut own = 0;
        self.newest.send_modify(|newest| {
            *newest += 1;
            own = *newest;
        });
        let mut newest = self.newest.subscribe();
        let (outgoing, queue) = mpsc::channel(QUEUE);
        let ended = tokio::select! {
            ended = self.read(stream, outgoing) => ended,
            ended = write(stream, queue, events) => ended,
            // The sender lives as long as `self`.
            _ = newest.wait_for(|newest| *newest != own) => {
                tracing::info!("a newer control stream replaces this one");
                return;
            }
        };
        match ended {
            // ENOTCONN: the host has left for good.
            Ok(()) => drop(stream.shutdown_write()),
            Err(error) => tracing::warn!(error = chain(&error), "the control stream failed"),
        }
    }

    /// Reads requests until the host has no more. Those under way then end with this future.
    async fn read(&self, mut stream: &Stream, outgoing: mpsc::Sender<Outgoing>) -> Result<(), CodecError> {
        let running = Running::default();
        let mut tasks = JoinSet::new();
        while let Some(message) = codec::read_frame::<ToAgent, _>(&mut stream, CONTROL_LIMIT).await? {
            while tasks.try_join_next().is_some() {}
            match message {
                ToAgent::Cancel { id } => {
                    // One that is answered already has nothing to cancel.
                    if let Some(cancel) = lock(&running).remove(&id) {
                        let _ = cancel.send(());
                    }
                }
                ToAgent::Request { id, deadline_ms, request } => {
                    let (cancel, cancelled) = oneshot::channel();
                    let deadline = Duration::from_millis(deadline_ms.into());
                    if let Err(error) = register(&running, id, cancel) {
                        let frame = FromAgent::Response { id, result: Err(error) };
                        // No task for one that is too many: it waits here until answers are taken.
                        let _ = outgoing.send(Outgoing { frame, sent: None }).await;
                        continue;
                    }
                    let one = One { id, deadline, cancelled, outgoing: outgoing.clone() };
                    tasks.spawn(one.run(request, Arc::clone(&self.handler), Arc::clone(&running)));
                }
            }
        }
        Ok(())
    }
}

/// One request under way.
struct One {
    id: u64,
    deadline: Duration,
    cancelled: oneshot::Receiver<()>,
    outgoing: mpsc::Sender<Outgoing>,
}

impl One {
    /// Answers exactly once.
    async fn run<H: Handler>(self, request: ControlRequest, handler: Arc<H>, running: Running) {
        let Self { id, deadline, cancelled, outgoing } = self;
        let (sent, answered) = oneshot::channel();
        let result = tokio::select! {
            result = tokio::time::timeout(deadline, handler.handle(request, answered)) => {
                result.unwrap_or(Err(ControlError::Deadline))
            }
            Ok(()) = cancelled => Err(ControlError::Cancelled),
        };
        // The writer has gone: so has the stream.
        let _ = outgoing.send(Outgoing { frame: FromAgent::Response { id, result }, sent: Some(sent) }).await;
        // Only now is it no longer one of those that are counted.
        lock(&running).remove(&id);
    }
}

fn register(running: &Running, id: u64, cancel: oneshot::Sender<()>) -> Result<(), ControlError> {
    let mut running = lock(running);
    if running.contains_key(&id) {
        return Err(ControlError::Failed(format!("request {id} is under way already")));
    }
    if running.len() >= REQUESTS {
        return Err(ControlError::Failed(format!("there are {REQUESTS} requests under way already")));
    }
    running.insert(id, cancel);
    Ok(())
}

fn lock(running: &Running) -> std::sync::MutexGuard<'_, HashMap<u64, oneshot::Sender<()>>> {
    running.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes answers and events; ends only with an error.
async fn write(
    mut stream: &Stream,
    mut queue: mpsc::Receiver<Outgoing>,
    mut events: broadcast::Receiver<Event>,
) -> Result<(), CodecError> {
    loop {
        let Outgoing { frame, sent } = tokio::select! {
            Some(outgoing) = queue.recv() => outgoing,
            Some(event) = next(&mut events) => Outgoing { frame: FromAgent::Event(event), sent: None },
            else => std::future::pending().await,
        };
        codec::write_frame(&mut stream, &frame, CONTROL_LIMIT).await?;
        if let Some(sent) = sent {
            // Most requests do not ask.
            let _ = sent.send(());
        }
    }
}

/// The next event; `None` when there will be no more.
async fn next(events: &mut broadcast::Receiver<Event>) -> Option<Event> {
    match events.recv().await {
        Ok(event) => Some(event),
        Err(broadcast::error::RecvError::Lagged(lost)) => {
            Some(Event::Warning(format!("{lost} events were lost: the host reads too slowly")))
        }
        Err(broadcast::error::RecvError::Closed) => None,
    }
}

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;
