//! What tests of streams share.

use std::os::fd::OwnedFd;
use std::time::Duration;

use dhow_protocol::hello::{Hello, HelloError, HelloReply, REPLY_LEN, Secret};
use dhow_protocol::stream::StreamHeader;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use super::stream::Stream;

/// The secret of a test's boot.
pub(crate) const SECRET: Secret = Secret([7; 32]);
/// The nonce of a test's host.
pub(crate) const NONCE: [u8; 32] = [9; 32];

/// The agent's end of a stream and the host's.
pub(crate) fn pair() -> (Stream, UnixStream) {
    let (agent, host) = raw_pair();
    (Stream::new(agent).unwrap(), host)
}

/// As [`pair`], the agent's end still as it is accepted.
pub(crate) fn raw_pair() -> (OwnedFd, UnixStream) {
    let (agent, host) = std::os::unix::net::UnixStream::pair().unwrap();
    host.set_nonblocking(true).unwrap();
    (agent.into(), UnixStream::from_std(host).unwrap())
}

/// What a host with `secret` sends first.
pub(crate) fn preamble(secret: &Secret, header: &StreamHeader) -> Vec<u8> {
    Hello::preamble(secret, NONCE, header).unwrap()
}

/// Reads the agent's answer.
pub(crate) async fn reply(host: &mut UnixStream) -> Result<HelloReply, HelloError> {
    let mut bytes = [0; REPLY_LEN];
    within(host.read_exact(&mut bytes)).await.unwrap();
    HelloReply::parse(&bytes, &SECRET, &NONCE)
}

/// What must happen, and soon but for a loaded machine.
pub(crate) async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(60), future).await.expect("it takes too long")
}
