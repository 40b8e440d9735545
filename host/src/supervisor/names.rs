//! The guest's names: its queries are answered here, and it is told how the host completes short ones.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use dhow_protocol::control::{ControlRequest, SearchList};
use dhow_protocol::stream::StreamHeader;

use super::control::RequestError;
use super::guest::{Guest, OPEN_DEADLINE, Opener};
use super::services::REOPEN;
use crate::forward::{self, RESOLV_CONF, Watched};

/// How often the host's settings are looked at: a VPN that comes up changes them.
const LOOK: Duration = Duration::from_secs(2);
/// Control streams that may end over one list.
const MAX_LOSSES: u32 = 3;
/// Characters of the guest's words that a log shows.
const MAX_ERROR: usize = 500;
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
pub async fn tell_search_list(guest: Guest) {
    tell(guest, Watched::new(Path::new(RESOLV_CONF), forward::search_list), LOOK).await;
}

async fn tell(guest: Guest, host: Watched<SearchList>, look: Duration) {
    let mut told: Option<Arc<SearchList>> = None;
    let mut before = host.get();
    let (mut failed, mut losses) = (false, 0);
    loop {
        let now = host.get();
        // One that has just changed may be in the middle of being written.
        let settled = now == std::mem::replace(&mut before, Arc::clone(&now));
        if settled && told.as_ref() != Some(&now) {
            guest.answers().await;
            match guest.request(ControlRequest::SetSearch((*now).clone()), DEADLINE).await {
                Ok(_) => (told, failed, losses) = (Some(now), false, 0),
                Err(error) => {
                    if !std::mem::replace(&mut failed, true) {
                        let error = crate::errors::chain(&error);
                        let error: String = error.chars().take(MAX_ERROR).collect();
                        tracing::warn!(error, "the guest does not know the host's search domains");
                    }
                    // An agent of an older version ends the stream over what it does not know, and must not lose each
                    // one to it; one that has died at this moment is asked again.
                    losses += u32::from(matches!(error, RequestError::Lost | RequestError::Send(_)));
                    if losses == MAX_LOSSES {
                        (told, losses) = (Some(now), 0);
                    }
                }
            }
        }
        tokio::time::sleep(look).await;
    }
}

#[cfg(test)]
mod tests {
    use dhow_protocol::codec::{self, CONTROL_LIMIT};
    use dhow_protocol::control::{ControlError, ControlResponse, FromAgent, ToAgent};
    use dhow_protocol::hello::Secret;
    use tokio::net::UnixStream;
    use tokio::sync::watch;

    use super::*;
    use crate::supervisor::control::Control;

    /// The next list that the guest is told, answered with `result`.
    async fn heard(agent: &mut UnixStream, result: Result<ControlResponse, ControlError>) -> Vec<String> {
        let read = codec::read_frame::<ToAgent, _>(agent, CONTROL_LIMIT);
        let frame = tokio::time::timeout(DEADLINE, read).await.expect("a request").unwrap().unwrap();
        let ToAgent::Request { id, request: ControlRequest::SetSearch(list), .. } = frame else {
            panic!("{frame:?}");
        };
        codec::write_frame(agent, &FromAgent::Response { id, result }, CONTROL_LIMIT).await.unwrap();
        list.domains
    }

    #[tokio::test]
    async fn it_is_told_at_once_when_it_changes_and_again_after_a_failure() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("resolv.conf");
        let write = |domain| std::fs::write(&file, format!("search {domain}\n")).unwrap();
        write("a.test");
        let (_devices, device) = watch::channel(None);
        let (controls, control) = watch::channel(None);
        let guest = Guest::new(Opener::new(device, Secret([7; 32])), control);
        let host = Watched::new(&file, forward::search_list);
        let telling = tokio::spawn(tell(guest, host, Duration::from_millis(2)));
        let (ours, mut agent) = UnixStream::pair().unwrap();
        let (control, _events) = Control::new(ours);
        controls.send_replace(Some(Arc::new(control)));
        let failure = Err(ControlError::Failed("no room".to_owned()));
        assert_eq!(heard(&mut agent, failure).await, ["a.test"]);
        assert_eq!(heard(&mut agent, Ok(ControlResponse::Done)).await, ["a.test"]);
        write("b.test");
        assert_eq!(heard(&mut agent, Ok(ControlResponse::Done)).await, ["b.test"]);
        // A stream that ends over it does not end it: on the next one what is new is said.
        drop(agent);
        write("c.test");
        let (ours, mut agent) = UnixStream::pair().unwrap();
        let (control, _events) = Control::new(ours);
        while controls.borrow().is_some() {
            let lost = controls.borrow().as_ref().unwrap().request(ControlRequest::Ping, DEADLINE).await;
            assert!(lost.is_err());
            controls.send_replace(None);
        }
        controls.send_replace(Some(Arc::new(control)));
        write("d.test");
        let mut told = heard(&mut agent, Ok(ControlResponse::Done)).await;
        if told == ["c.test"] {
            told = heard(&mut agent, Ok(ControlResponse::Done)).await;
        }
        assert_eq!(told, ["d.test"]);
        telling.abort();
    }
}
