//! Requests out of the device into the stream, replies out of the stream into the device.

use std::sync::Arc;

use dhow_protocol::codec::{self, FILE_LIMIT};
use dhow_protocol::files::{FileRequest, MAX_IO};
use tokio::sync::mpsc;

use super::device::{BUFFER, Device, Read};
use super::ledger::{Answer, Next, Step};
use super::share::{Share, StreamError};
use super::stream::{Replies, Stream};
use super::uapi::{InitIn, InitOut, MAJOR, init};

/// Frames are gathered up to so many bytes before they are sent.
const GATHER: usize = 256 << 10;
/// Requests that are read before replies are looked at.
const TURNS: u32 = 64;
/// Asynchronous requests (read-ahead) that the kernel has open at once.
const MAX_BACKGROUND: u16 = 64;
/// Bytes that the kernel reads ahead.
const MAX_READAHEAD: u32 = MAX_IO as u32;
/// What is used of what the kernel can do. Not among it: ATOMIC_O_TRUNC (opens are not asked, so a
/// truncation must come as SETATTR), the write-back cache (the kernel would own size and times of
/// files that the host may change), HANDLE_KILLPRIV (the kernel clears set-id bits with SETATTR,
/// because they are virtual on the host), locks (they stay in the guest).
const WANTED: u64 = init::ASYNC_READ
    | init::BIG_WRITES
    | init::AUTO_INVAL_DATA
    | init::DO_READDIRPLUS
    | init::NO_OPEN_SUPPORT
    | init::PARALLEL_DIROPS
    | init::MAX_PAGES
    | init::NO_OPENDIR_SUPPORT
    | init::INIT_EXT
    | init::HAS_RESEND;

/// How serving a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The stream is over; the mount waits for the next one.
    Stream,
    /// The mount is gone.
    Mount,
}

/// Serves a mount on a stream until one of them ends.
///
/// # Errors
/// The stream's; the mount goes on with the next one.
pub async fn run(
    share: &Share,
    device: &Arc<Device>,
    stream: &Stream,
    replies: &mut Replies,
) -> Result<Ended, StreamError> {
    // Second looks, which are seldom. Sent by the one who sends all else, so that nobody waits for the
    // stream while replies are to be read.
    let (more, also) = mpsc::unbounded_channel();
    tokio::select! {
        ended = requests(share, device, stream, also) => ended,
        ended = answers(share, device, stream, replies, &more) => ended,
    }
}

async fn requests(
    share: &Share,
    device: &Device,
    stream: &Stream,
    mut also: mpsc::UnboundedReceiver<FileRequest>,
) -> Result<Ended, StreamError> {
    let mut buffer = vec![0; BUFFER];
    let mut frames = Vec::new();
    let mut turns = 0;
    loop {
        turns += 1;
        if turns == TURNS {
            turns = 0;
            // Requests that are answered here come without a wait; replies must have their turn.
            tokio::task::yield_now().await;
        }
        while let Ok(request) = also.try_recv() {
            codec::append_frame(&mut frames, &request, FILE_LIMIT)?;
        }
        let read = device.read(&mut buffer)?;
        match read {
            Read::Request(length) => {
                let step = share.ledger().request(&buffer[..length]);
                match step {
                    Step::Ask(request) => codec::append_frame(&mut frames, &request, FILE_LIMIT)?,
                    Step::Write(write) => codec::append_frame(&mut frames, &write, FILE_LIMIT)?,
                    Step::Tell(answer) => tell(share, device, answer),
                    Step::Init(unique, asked) => begin(share, device, unique, &asked),
                    Step::Nothing => tracing::warn!(length, "unreadable request of the kernel"),
                }
            }
            Read::Gone => return Ok(Ended::Mount),
            Read::Nothing if frames.is_empty() => {
                tokio::select! {
                    readable = device.readable() => readable?,
                    Some(request) = also.recv() => codec::append_frame(&mut frames, &request, FILE_LIMIT)?,
                }
            }
            Read::Nothing => {}
        }
        if frames.len() >= GATHER || (read == Read::Nothing && !frames.is_empty()) {
            let owed = share.ledger().owed();
            if let Some(owed) = owed {
                codec::append_frame(&mut frames, &owed, FILE_LIMIT)?;
            }
            stream.send(&frames).await?;
            frames.clear();
        }
    }
}

async fn answers(
    share: &Share,
    device: &Device,
    stream: &Stream,
    replies: &mut Replies,
    more: &mpsc::UnboundedSender<FileRequest>,
) -> Result<Ended, StreamError> {
    while let Some(reply) = replies.next(stream).await? {
        let next = share.ledger().reply(reply);
        match next {
            Some(Next::Tell(answer)) => tell(share, device, answer),
            // The receiver lives as long as this future.
            Some(Next::Ask(request)) => drop(more.send(request)),
            None => {}
        }
    }
    Ok(Ended::Stream)
}

fn tell(share: &Share, device: &Device, answer: Answer<'_>) {
    if !device.answer(&answer) {
        share.ledger().not_taken(answer.given);
    }
}

/// Answers INIT.
fn begin(share: &Share, device: &Device, unique: u64, asked: &InitIn) {
    let refusal = match (asked.major, asked.flags & init::HAS_RESEND) {
        (MAJOR, 0) => Some("the guest's kernel is older than 6.9 and cannot ask again for what is open"),
        (MAJOR, _) => None,
        _ => Some("the guest's kernel speaks another FUSE protocol"),
    };
    let flags = asked.flags & WANTED;
    let out = InitOut {
        max_readahead: asked.max_readahead.max(MAX_READAHEAD),
        flags,
        max_background: MAX_BACKGROUND,
        congestion_threshold: MAX_BACKGROUND / 4 * 3,
        max_write: MAX_IO as u32,
        max_pages: (MAX_IO / 4096) as u16,
    };
    let (body, result) = match refusal {
        Some(refusal) => (Err(libc::EPROTO), Err(refusal.to_owned())),
        None => {
            // Before the answer: a new worker can answer once more, but must know that it may.
            share.negotiated((asked.minor, flags));
            (Ok(out.to_bytes()), Ok(()))
        }
    };
    device.answer(&Answer::new(unique, body));
    share.begun(result);
}
