//! Requests to the agent on its control stream, matched to their answers by id.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use dhow_protocol::codec::{self, CONTROL_LIMIT, CodecError};
use dhow_protocol::control::{ControlError, ControlRequest, ControlResponse, Event, FromAgent, ToAgent};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};

/// What the host adds to a request's deadline for the way there and back.
const MARGIN: Duration = Duration::from_secs(2);
/// Events not yet handled; the agent is not read further while they are that many.
const EVENTS_LIMIT: usize = 256;

/// Why a request was not fulfilled.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The agent says so.
    #[error(transparent)]
    Guest(#[from] ControlError),
    /// No answer in time, not even that it is late.
    #[error("the guest's agent did not answer within {0} s")]
    Deadline(u64),
    /// The control stream has ended.
    #[error("the connection to the guest's agent is lost")]
    Lost,
    /// The request could not be sent.
    #[error("the request could not be sent to the guest's agent")]
    Send(#[source] CodecError),
    /// An answer of the wrong kind.
    #[error("the guest's agent gave an answer of the wrong kind")]
    Kind,
}

type Waiting = Mutex<HashMap<u64, oneshot::Sender<Result<ControlResponse, ControlError>>>>;

/// The control stream.
pub struct Control {
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    next: AtomicU64,
    waiting: Arc<Waiting>,
}

impl Control {
    /// Takes over an open control stream. Events go to the receiver, which is at its end when the stream
    /// is.
    #[must_use]
    pub fn new(stream: UnixStream) -> (Self, mpsc::Receiver<Event>) {
        let (reader, writer) = stream.into_split();
        let waiting = Arc::new(Waiting::default());
        let (events, receiver) = mpsc::channel(EVENTS_LIMIT);
        tokio::spawn(read(reader, Arc::clone(&waiting), events));
        let control = Self { writer: tokio::sync::Mutex::new(writer), next: AtomicU64::new(1), waiting };
        (control, receiver)
    }

    /// Sends one request and waits for its answer, `deadline` at the most.
    ///
    /// # Errors
    /// As [`RequestError`] says.
    pub async fn request(
        &self,
        request: ControlRequest,
        deadline: Duration,
    ) -> Result<ControlResponse, RequestError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let deadline_ms = u32::try_from(deadline.as_millis()).unwrap_or(u32::MAX);
        let (sender, receiver) = oneshot::channel();
        lock(&self.waiting).insert(id, sender);
        // Removes the entry however this ends, also when the caller drops the future.
        let _entry = Entry { waiting: &self.waiting, id };
        let message = ToAgent::Request { id, deadline_ms, request };
        let exchange = async {
            self.send(&message).await?;
            receiver.await.map_err(|_| RequestError::Lost)?.map_err(RequestError::Guest)
        };
        match tokio::time::timeout(deadline + MARGIN, exchange).await {
            Ok(result) => result,
            Err(_) => Err(RequestError::Deadline(seconds(deadline))),
        }
    }

    async fn send(&self, message: &ToAgent) -> Result<(), RequestError> {
        let mut writer = self.writer.lock().await;
        codec::write_frame(&mut *writer, message, CONTROL_LIMIT).await.map_err(RequestError::Send)
    }
}

/// A deadline in whole seconds, for a person.
pub fn seconds(deadline: Duration) -> u64 {
    (deadline + Duration::from_millis(500)).as_secs()
}

struct Entry<'a> {
    waiting: &'a Waiting,
    id: u64,
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        lock(self.waiting).remove(&self.id);
    }
}

fn lock(
    waiting: &Waiting,
) -> std::sync::MutexGuard<'_, HashMap<u64, oneshot::Sender<Result<ControlResponse, ControlError>>>> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn read(mut reader: OwnedReadHalf, waiting: Arc<Waiting>, events: mpsc::Sender<Event>) {
    loop {
        match codec::read_frame::<FromAgent, _>(&mut reader, CONTROL_LIMIT).await {
            Ok(Some(FromAgent::Response { id, result })) => {
                // Nobody waits for a late answer.
                if let Some(sender) = lock(&waiting).remove(&id) {
                    let _ = sender.send(result);
                }
            }
            Ok(Some(FromAgent::Event(event))) => {
                if events.send(event).await.is_err() {
                    break;
                }
            }
            Ok(None) => break,
            Err(error) => {
                tracing::warn!(error = crate::errors::chain(&error), "the control stream failed");
                break;
            }
        }
    }
    // Before the events' end: who sees that finds no request that still waits.
    lock(&waiting).clear();
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn pair() -> (Control, mpsc::Receiver<Event>, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (control, events) = Control::new(ours);
        (control, events, theirs)
    }

    #[tokio::test]
    async fn answers_come_in_any_order() {
        let (control, _events, mut agent) = pair().await;
        tokio::spawn(async move {
            let mut ids = Vec::new();
            for _ in 0..2 {
                match codec::read_frame::<ToAgent, _>(&mut agent, CONTROL_LIMIT).await.unwrap().unwrap() {
                    ToAgent::Request { id, request, .. } => ids.push((id, request)),
                    other => panic!("{other:?}"),
                }
            }
            for (id, request) in ids.into_iter().rev() {
                let result = match request {
                    ControlRequest::Ping => Ok(ControlResponse::Pong),
                    _ => Err(ControlError::Failed("no".to_owned())),
                };
                let answer = FromAgent::Response { id, result };
                codec::write_frame(&mut agent, &answer, CONTROL_LIMIT).await.unwrap();
            }
            std::future::pending::<()>().await;
        });
        let deadline = Duration::from_secs(5);
        let (ping, info) = tokio::join!(
            control.request(ControlRequest::Ping, deadline),
            control.request(ControlRequest::Info, deadline)
        );
        assert_eq!(ping.unwrap(), ControlResponse::Pong);
        assert!(matches!(info, Err(RequestError::Guest(ControlError::Failed(_)))));
    }

    #[tokio::test]
    async fn a_lost_stream_ends_every_request_and_is_noticed() {
        let (control, mut events, agent) = pair().await;
        let request = control.request(ControlRequest::Ping, Duration::from_secs(60));
        let (result, ()) = tokio::join!(request, async move { drop(agent) });
        assert!(matches!(result, Err(RequestError::Lost | RequestError::Send(_))));
        assert_eq!(events.recv().await, None);
    }
}
