//! QMP, QEMU's control protocol: JSON objects, one a line (QEMU's `docs/interop/qmp-spec`).

use std::collections::VecDeque;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

/// Longest line taken from QEMU, in bytes.
const LINE_LIMIT: usize = 1 << 20;
/// Events kept that nobody has asked for yet; the oldest go first.
const EVENTS_LIMIT: usize = 64;

/// Why QEMU did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket failed.
    #[error("QEMU's control socket failed")]
    Socket(#[from] std::io::Error),
    /// QEMU closed the socket.
    #[error("QEMU closed its control socket")]
    Closed,
    /// Not JSON, or too long.
    #[error("QEMU's control socket spoke something else than QMP")]
    Malformed,
    /// QEMU refused the command.
    #[error("QEMU refused {command}: {reason}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's class of the error ("DeviceNotFound", mostly "GenericError").
        class: String,
        /// QEMU's description.
        reason: String,
    },
    /// No answer within the deadline.
    #[error("QEMU did not answer {command} within {seconds} s")]
    Deadline {
        /// The command.
        command: String,
        /// The deadline.
        seconds: u64,
    },
}

/// A connection to QEMU's monitor, of which it serves one at a time. One command at a time.
pub struct Qmp {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    deadline: Duration,
    /// The beginning of a line, over a deadline in its middle.
    partial: Vec<u8>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects and leaves the negotiation mode. Each command has `deadline`.
    ///
    /// # Errors
    /// As [`QmpError`] says.
    pub async fn connect(socket: &Path, deadline: Duration) -> Result<Self, QmpError> {
        let (reader, writer) = UnixStream::connect(socket).await?.into_split();
        let reader = BufReader::new(reader);
        let mut qmp = Self { reader, writer, deadline, partial: Vec::new(), events: VecDeque::new() };
        tokio::time::timeout(deadline, qmp.line())
            .await
            .map_err(|_| deadline_error("its greeting", deadline))??;
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Runs one command and returns its `return` member.
    ///
    /// # Errors
    /// As [`QmpError`] says.
    pub async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let deadline = self.deadline;
        tokio::time::timeout(deadline, self.exchange(command, arguments))
            .await
            .map_err(|_| deadline_error(command, deadline))?
    }

    /// The next event named `name` for which `wanted` holds for its data; `None` when it did not come
    /// within `deadline`. Other events are dropped.
    ///
    /// # Errors
    /// As [`QmpError`] says.
    pub async fn event(
        &mut self,
        name: &str,
        wanted: impl Fn(&Value) -> bool,
        deadline: Duration,
    ) -> Result<Option<Value>, QmpError> {
        let end = tokio::time::Instant::now() + deadline;
        loop {
            while let Some(mut event) = self.events.pop_front() {
                let data = event.get_mut("data").map_or(Value::Null, Value::take);
                if event["event"] == name && wanted(&data) {
                    return Ok(Some(data));
                }
            }
            match tokio::time::timeout_at(end, self.line()).await {
                Ok(line) => self.note(line?),
                Err(_) => return Ok(None),
            }
        }
    }

    fn note(&mut self, message: Value) {
        if message.get("event").is_some() {
            self.events.push_back(message);
            if self.events.len() > EVENTS_LIMIT {
                self.events.pop_front();
            }
        }
    }

    async fn exchange(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        self.writer.write_all(line.as_bytes()).await?;
        loop {
            let mut answer = self.line().await?;
            if let Some(error) = answer.get("error") {
                let text = |member| error.get(member).and_then(Value::as_str).unwrap_or("unknown").to_owned();
                let (class, reason) = (text("class"), text("desc"));
                return Err(QmpError::Refused { command: command.to_owned(), class, reason });
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            self.note(answer);
        }
    }

    async fn line(&mut self) -> Result<Value, QmpError> {
        // What is read lands in `partial` at once, so that a dropped future loses nothing.
        let room = (LINE_LIMIT - self.partial.len()) as u64;
        (&mut self.reader).take(room).read_until(b'\n', &mut self.partial).await?;
        if self.partial.is_empty() {
            return Err(QmpError::Closed);
        }
        let line = std::mem::take(&mut self.partial);
        serde_json::from_slice(&line).map_err(|_| QmpError::Malformed)
    }
}

fn deadline_error(command: &str, deadline: Duration) -> QmpError {
    QmpError::Deadline { command: command.to_owned(), seconds: deadline.as_secs() }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn served(lines: &'static str) -> Result<Value, QmpError> {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp");
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"{\"QMP\":{}}\n{\"return\":{}}\n").await.unwrap();
            stream.write_all(lines.as_bytes()).await.unwrap();
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).await.unwrap();
        });
        let mut qmp = Qmp::connect(&socket, Duration::from_millis(300)).await?;
        qmp.execute("query-status", json!({})).await
    }

    #[tokio::test]
    async fn events_are_passed_over_and_answers_returned() {
        let value = served("{\"event\":\"RESUME\"}\n{\"return\":{\"status\":\"running\"}}\n").await.unwrap();
        assert_eq!(value["status"], "running");
    }

    #[tokio::test]
    async fn an_event_is_found_before_and_after_an_answer_and_a_cut_line_is_not_lost() {
        let (server, client) = UnixStream::pair().unwrap();
        let (reader, writer) = client.into_split();
        let (partial, events) = (Vec::new(), VecDeque::new());
        let deadline = Duration::from_secs(30);
        let mut qmp = Qmp { reader: BufReader::new(reader), writer, deadline, partial, events };
        let (mut commands, mut answers) = server.into_split();
        answers
            .write_all(b"{\"event\":\"A\",\"data\":{\"n\":1}}\n{\"return\":{}}\n{\"event\":\"B\"")
            .await
            .unwrap();
        qmp.execute("x", json!({})).await.unwrap();
        let one = qmp.event("A", |data| data["n"] == 1, deadline).await.unwrap();
        assert_eq!(one.unwrap()["n"], 1);
        assert!(qmp.event("B", |_| true, Duration::from_millis(20)).await.unwrap().is_none());
        answers.write_all(b",\"data\":{}}\n").await.unwrap();
        assert!(qmp.event("B", |_| true, deadline).await.unwrap().is_some());
        drop(answers);
        let mut said = Vec::new();
        drop(qmp);
        commands.read_to_end(&mut said).await.unwrap();
        assert!(said.starts_with(b"{"));
    }

    #[tokio::test]
    async fn refusals_silence_and_nonsense_are_errors() {
        let refused = served("{\"error\":{\"class\":\"X\",\"desc\":\"no such device\"}}\n").await;
        assert!(matches!(refused, Err(QmpError::Refused { reason, .. }) if reason == "no such device"));
        assert!(matches!(served("").await, Err(QmpError::Deadline { .. })));
        assert!(matches!(served("nonsense\n").await, Err(QmpError::Malformed)));
    }
}
