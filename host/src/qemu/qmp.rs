//! QMP, QEMU's control protocol: JSON objects, one a line (QEMU's `docs/interop/qmp-spec`).

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

/// Longest line taken from QEMU, in bytes.
const LINE_LIMIT: u64 = 1 << 20;

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

/// A connection to QEMU's monitor. One command at a time; events are passed over.
pub struct Qmp {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    deadline: Duration,
}

impl Qmp {
    /// Connects and leaves the negotiation mode. Each command has `deadline`.
    ///
    /// # Errors
    /// As [`QmpError`] says.
    pub async fn connect(socket: &Path, deadline: Duration) -> Result<Self, QmpError> {
        let (reader, writer) = UnixStream::connect(socket).await?.into_split();
        let mut qmp = Self { reader: BufReader::new(reader), writer, deadline };
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

    async fn exchange(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        self.writer.write_all(line.as_bytes()).await?;
        loop {
            let mut answer = self.line().await?;
            if let Some(error) = answer.get("error") {
                let reason = error.get("desc").and_then(Value::as_str).unwrap_or("no reason given");
                return Err(QmpError::Refused { command: command.to_owned(), reason: reason.to_owned() });
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    async fn line(&mut self) -> Result<Value, QmpError> {
        let mut line = Vec::new();
        (&mut self.reader).take(LINE_LIMIT).read_until(b'\n', &mut line).await?;
        if line.is_empty() {
            return Err(QmpError::Closed);
        }
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
    async fn refusals_silence_and_nonsense_are_errors() {
        let refused = served("{\"error\":{\"class\":\"X\",\"desc\":\"no such device\"}}\n").await;
        assert!(matches!(refused, Err(QmpError::Refused { reason, .. }) if reason == "no such device"));
        assert!(matches!(served("").await, Err(QmpError::Deadline { .. })));
        assert!(matches!(served("nonsense\n").await, Err(QmpError::Malformed)));
    }
}
