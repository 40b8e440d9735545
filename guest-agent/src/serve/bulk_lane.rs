//! The thread for relays of bulk data, so that small requests have the worker's own to themselves.
//!
//! On one thread a round trip of 64 bytes waits for a turn of each bulk relay: 20 ms beside eight of them in an
//! emulated guest. The kernel shares processors out more finely than that.

use std::sync::LazyLock;

use tokio::sync::{mpsc, oneshot};

use super::relay::{Lane, Moving, Relay, Step};

/// Turns of relays before sockets are looked at again.
const TURNS: u32 = 8;

struct Job {
    relay: Moving,
    done: oneshot::Sender<Step<Moving>>,
}

/// Where jobs go; `None` where there is no second thread. It begins with the first job and stays.
static LANE: LazyLock<Option<mpsc::UnboundedSender<Job>>> = LazyLock::new(|| {
    let (sender, jobs) = mpsc::unbounded_channel();
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_io().event_interval(TURNS).build();
    let started = runtime.and_then(|runtime| {
        let thread = std::thread::Builder::new().name("bulk".into());
        thread.spawn(move || runtime.block_on(serve(jobs)))
    });
    match started {
        Ok(_) => Some(sender),
        Err(error) => {
            tracing::warn!(%error, "bulk data has no thread of its own");
            None
        }
    }
});

/// Runs `relay` on the bulk lane until it ends or carries little.
pub(super) async fn run(relay: Relay) -> Step {
    let Some(lane) = &*LANE else { return relay.run(Lane::Only).await };
    let (done, ended) = oneshot::channel();
    // The thread never ends, so neither fails.
    let sent = lane.send(Job { relay: relay.pack(), done });
    match (sent, ended.await) {
        (Ok(()), Ok(Step::Ended(ended))) => Step::Ended(ended),
        (Ok(()), Ok(Step::Leaves(moving))) => match moving.unpack() {
            Ok(relay) => Step::Leaves(relay),
            Err(error) => Step::Ended(Err(error)),
        },
        _ => Step::Ended(Err(std::io::ErrorKind::BrokenPipe.into())),
    }
}

async fn serve(mut jobs: mpsc::UnboundedReceiver<Job>) {
    while let Some(Job { relay, done }) = jobs.recv().await {
        tokio::spawn(async move {
            let step = match relay.unpack() {
                Ok(relay) => relay.run(Lane::Bulk).await,
                Err(error) => Step::Ended(Err(error)),
            };
            // Its task waits, unless the worker is ending.
            let _ = done.send(match step {
                Step::Ended(ended) => Step::Ended(ended),
                Step::Leaves(relay) => Step::Leaves(relay.pack()),
            });
        });
    }
}
