use dhow_protocol::control::{DaemonState, DaemonStatus};
use tokio::net::UnixStream;

use super::*;
use crate::serve::testing::{pair, within};

/// Answers pings at once, starts a runtime when it is told to, never stops one.
struct Fake {
    ready: tokio::sync::Semaphore,
    /// Requests that were dropped before they were fulfilled.
    given_up: mpsc::UnboundedSender<String>,
    answered: mpsc::UnboundedSender<Result<(), oneshot::error::RecvError>>,
}

struct Pending<'a>(&'a Fake, String);

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        let _ = self.0.given_up.send(std::mem::take(&mut self.1));
    }
}

impl Handler for Fake {
    async fn handle(
        &self,
        request: ControlRequest,
        answered: oneshot::Receiver<()>,
    ) -> Result<ControlResponse, ControlError> {
        match request {
            ControlRequest::Ping => Ok(ControlResponse::Pong),
            ControlRequest::PowerOff => {
                let tell = self.answered.clone();
                tokio::spawn(async move { tell.send(answered.await) });
                Ok(ControlResponse::Done)
            }
            ControlRequest::StartRuntime { .. } => {
                self.ready.acquire().await.unwrap().forget();
                Ok(ControlResponse::Done)
            }
            ControlRequest::StopRuntime { name } => {
                let _pending = Pending(self, name);
                std::future::pending().await
            }
            other => Err(ControlError::Failed(format!("{other:?}"))),
        }
    }
}

struct Guest {
    control: Arc<Control<Fake>>,
    events: broadcast::Sender<Event>,
    given_up: mpsc::UnboundedReceiver<String>,
    answered: mpsc::UnboundedReceiver<Result<(), oneshot::error::RecvError>>,
}

impl Guest {
    fn new() -> Self {
        let (give_up, given_up) = mpsc::unbounded_channel();
        let (answer, answered) = mpsc::unbounded_channel();
        let ready = tokio::sync::Semaphore::new(0);
        let fake = Arc::new(Fake { ready, given_up: give_up, answered: answer });
        let (events, _) = broadcast::channel(4);
        let control = Arc::new(Control::new(fake, events.clone()));
        Self { control, events, given_up, answered }
    }

    fn connect(&self) -> Host {
        let (agent, host) = pair();
        let control = Arc::clone(&self.control);
        let serving = tokio::spawn(async move { control.serve(&agent).await });
        Host { stream: host, serving }
    }
}

struct Host {
    stream: UnixStream,
    serving: tokio::task::JoinHandle<()>,
}

impl Host {
    async fn send(&mut self, message: &ToAgent) {
        codec::write_frame(&mut self.stream, message, CONTROL_LIMIT).await.unwrap();
    }

    async fn ask(&mut self, id: u64, deadline_ms: u32, request: ControlRequest) {
        self.send(&ToAgent::Request { id, deadline_ms, request }).await;
    }

    async fn receive(&mut self) -> FromAgent {
        within(codec::read_frame(&mut self.stream, CONTROL_LIMIT)).await.unwrap().unwrap()
    }

    async fn answer(&mut self) -> (u64, Result<ControlResponse, ControlError>) {
        match self.receive().await {
            FromAgent::Response { id, result } => (id, result),
            event => panic!("{event:?}"),
        }
    }

    /// What is left until the end, which must be one.
    async fn rest(mut self) -> Vec<FromAgent> {
        let mut rest = Vec::new();
        loop {
            match within(codec::read_frame(&mut self.stream, CONTROL_LIMIT)).await {
                Ok(Some(frame)) => rest.push(frame),
                Ok(None) => break,
                // Closed with bytes of the host unread.
                Err(CodecError::Io(error)) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
                Err(error) => panic!("{error:?}"),
            }
        }
        within(self.serving).await.unwrap();
        rest
    }
}

const LONG: u32 = 3_600_000;

fn start() -> ControlRequest {
    ControlRequest::StartRuntime { name: "docker".to_owned() }
}

fn stop() -> ControlRequest {
    ControlRequest::StopRuntime { name: "docker".to_owned() }
}

#[tokio::test]
async fn answers_come_as_they_are_ready() {
    let guest = Guest::new();
    let mut host = guest.connect();
    host.ask(5, LONG, start()).await;
    host.ask(3, LONG, ControlRequest::Ping).await;
    assert_eq!(host.answer().await, (3, Ok(ControlResponse::Pong)));
    guest.control.handler.ready.add_permits(1);
    assert_eq!(host.answer().await, (5, Ok(ControlResponse::Done)));
    host.ask(6, LONG, ControlRequest::Info).await;
    assert_eq!(host.answer().await, (6, Err(ControlError::Failed("Info".to_owned()))));
}

#[tokio::test]
async fn each_request_is_answered_once_whatever_happens_to_it() {
    let mut guest = Guest::new();
    let mut host = guest.connect();
    host.ask(1, 1, stop()).await;
    assert_eq!(host.answer().await, (1, Err(ControlError::Deadline)));
    host.ask(2, LONG, stop()).await;
    host.ask(20, LONG, ControlRequest::Ping).await;
    assert_eq!(host.answer().await, (20, Ok(ControlResponse::Pong)));
    host.send(&ToAgent::Cancel { id: 2 }).await;
    assert_eq!(host.answer().await, (2, Err(ControlError::Cancelled)));
    for _ in 0..2 {
        assert_eq!(within(guest.given_up.recv()).await.unwrap(), "docker");
    }
    // Of those that are answered, or never were asked, nothing comes.
    for id in [1, 2, 77] {
        host.send(&ToAgent::Cancel { id }).await;
    }
    host.ask(3, LONG, ControlRequest::Ping).await;
    assert_eq!(host.answer().await, (3, Ok(ControlResponse::Pong)));
}

#[tokio::test]
async fn too_many_requests_fail_and_the_others_go_on() {
    let guest = Guest::new();
    let mut host = guest.connect();
    for id in 0..REQUESTS as u64 {
        host.ask(id, LONG, start()).await;
    }
    host.ask(1000, LONG, ControlRequest::Ping).await;
    assert!(matches!(host.answer().await, (1000, Err(ControlError::Failed(_)))));
    host.ask(0, LONG, ControlRequest::Ping).await;
    assert!(matches!(host.answer().await, (0, Err(ControlError::Failed(_)))));
    guest.control.handler.ready.add_permits(REQUESTS);
    let mut answered = Vec::new();
    for _ in 0..REQUESTS {
        let (id, result) = host.answer().await;
        assert_eq!(result, Ok(ControlResponse::Done));
        answered.push(id);
    }
    answered.sort_unstable();
    assert_eq!(answered, (0..REQUESTS as u64).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_newer_stream_replaces_an_older_one() {
    let mut guest = Guest::new();
    let mut older = guest.connect();
    older.ask(1, LONG, stop()).await;
    older.ask(2, LONG, ControlRequest::Ping).await;
    assert_eq!(older.answer().await, (2, Ok(ControlResponse::Pong)));
    let mut newer = guest.connect();
    assert_eq!(older.rest().await, []);
    assert_eq!(within(guest.given_up.recv()).await.unwrap(), "docker");
    guest.events.send(Event::Warning("hot".to_owned())).unwrap();
    assert_eq!(newer.receive().await, FromAgent::Event(Event::Warning("hot".to_owned())));
}

#[tokio::test]
async fn the_end_of_a_stream_ends_its_requests() {
    let mut guest = Guest::new();
    let mut host = guest.connect();
    host.ask(1, LONG, stop()).await;
    host.ask(2, LONG, ControlRequest::Ping).await;
    assert_eq!(host.answer().await, (2, Ok(ControlResponse::Pong)));
    drop(host);
    assert_eq!(within(guest.given_up.recv()).await.unwrap(), "docker");
}

#[tokio::test]
async fn nonsense_ends_a_stream_and_the_next_one_works() {
    use tokio::io::AsyncWriteExt;
    let guest = Guest::new();
    for nonsense in [&[0xff; 64][..], &[1, 0, 0, 0, 200], &[5, 0, 0, 0, 0, 1, 2]] {
        let mut host = guest.connect();
        host.stream.write_all(nonsense).await.unwrap();
        // It may be closed already.
        let _ = host.stream.shutdown().await;
        assert_eq!(host.rest().await, []);
    }
    let mut host = guest.connect();
    host.ask(1, LONG, ControlRequest::Ping).await;
    assert_eq!(host.answer().await, (1, Ok(ControlResponse::Pong)));
}

#[tokio::test]
async fn events_that_a_host_is_too_slow_for_are_counted() {
    let guest = Guest::new();
    let mut host = guest.connect();
    host.ask(1, LONG, ControlRequest::Ping).await;
    assert_eq!(host.answer().await, (1, Ok(ControlResponse::Pong)));
    // No await between these: the channel holds four.
    for restarts in 0..6 {
        let state = DaemonState::Ready;
        guest
            .events
            .send(Event::Daemon(DaemonStatus { name: "dockerd".to_owned(), state, restarts }))
            .unwrap();
    }
    assert!(
        matches!(host.receive().await, FromAgent::Event(Event::Warning(text)) if text.starts_with("2 events"))
    );
    for expected in 2..6 {
        match host.receive().await {
            FromAgent::Event(Event::Daemon(DaemonStatus { restarts, .. })) => assert_eq!(restarts, expected),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_host_that_does_not_read_blocks_nobody() {
    let guest = Guest::new();
    let _deaf = {
        let mut deaf = guest.connect();
        deaf.ask(1, LONG, ControlRequest::Ping).await;
        deaf
    };
    // More than the socket and the channel hold, and each send returns at once.
    for _ in 0..64 {
        guest.events.send(Event::Warning("x".repeat(64 << 10))).unwrap();
        tokio::task::yield_now().await;
    }
    let mut host = guest.connect();
    host.ask(1, LONG, ControlRequest::Ping).await;
    assert_eq!(host.answer().await, (1, Ok(ControlResponse::Pong)));
}

#[tokio::test]
async fn whoever_asks_learns_that_an_answer_was_sent() {
    let mut guest = Guest::new();
    let mut host = guest.connect();
    host.ask(1, LONG, ControlRequest::PowerOff).await;
    assert_eq!(host.answer().await, (1, Ok(ControlResponse::Done)));
    assert_eq!(within(guest.answered.recv()).await.unwrap(), Ok(()));
}
