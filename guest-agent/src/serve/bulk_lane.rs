//! The thread for relays of bulk data, so that small requests have the worker's own to themselves.
//!
//! On one thread a round trip of 64 bytes waits for a turn of each bulk relay: 20 ms beside eight of them in an
//! emulated guest.

use std::sync::LazyLock;

use super::lane::Lane;
use super::relay::{Load, Relay, Step};

/// `None` where there is no second thread. It begins with the first relay of its kind and stays.
static LANE: LazyLock<Option<Lane>> = LazyLock::new(|| match Lane::start("bulk") {
    Ok(lane) => Some(lane),
    Err(error) => {
        tracing::warn!(%error, "bulk data has no thread of its own");
        None
    }
});

/// Runs `relay` on the bulk lane until it ends or carries little.
pub(super) async fn run(relay: Relay) -> Step {
    let Some(lane) = &*LANE else { return relay.run(Load::Any).await };
    let moving = relay.pack();
    let ran = lane.spawn(async move {
        match moving.unpack() {
            Ok(relay) => relay.run(Load::Bulk).await.pack(),
            Err(error) => Step::Ended(Err(error)),
        }
    });
    match ran.await {
        Ok(step) => step.unpack(),
        // It panicked, or the worker ends.
        Err(error) => Step::Ended(Err(error.into())),
    }
}
