//! The guest's names: its queries are answered here, and it is told how the host completes short ones.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use dhow_protocol::control::{ControlRequest, SearchList};
use dhow_protocol::stream::StreamHeader;

use super::guest::{Guest, OPEN_DEADLINE, Opener};
use super::services::REOPEN;
use crate::forward::{self, RESOLV_CONF, Watched};

/// How often the host's settings are looked at: a VPN that comes up changes them.
const LOOK: Duration = Duration::from_secs(5);
/// How long the guest may take to write a file.
const DEADLINE: Duration = Duration::from_secs(10);

/// Answers the guest's queries.
pub async fn serve(opener: Opener) {
    loop {
        match opener.open_here(&StreamHeader::Dns, OPEN_DEADLINE).await {
            Ok(stream) => {
                let ended = forward::serve_dns(stream).await;
                tracing::info!(?ended, "the stream of name queries ended");
            }
            Err(error) => tracing::warn!(error = crate::errors::chain(&error), "no stream of name queries"),
        }
        tokio::time::sleep(REOPEN).await;
    }
}

/// Tells the guest the host's search list, at once and whenever it changes.
pub async fn tell_search(guest: Guest) {
    let host = Watched::new(Path::new(RESOLV_CONF), forward::search);
    let mut told: Option<Arc<SearchList>> = None;
    loop {
        let now = host.get();
        if told.as_ref() != Some(&now) {
            guest.answers().await;
            match guest.request(ControlRequest::SetSearch((*now).clone()), DEADLINE).await {
                Ok(_) => told = Some(now),
                Err(error) => {
                    let error = crate::errors::chain(&error);
                    tracing::warn!(error, "the guest does not know the host's search domains");
                }
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}
