//! Streams that are opened ahead of their use: the guest has accepted them and waits to hear what they are.
//!
//! An open costs two round trips through the guest, one to connect and one for the hello; with a spare it is one. Some
//! are there as soon as something was opened, and stay: in the guest a connection that has said nothing yet costs a
//! descriptor. They do not outlive the device or the agent's worker, and who is given one that has died opens another.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dhow_protocol::AGENT_PORT;

use super::guest::OPEN_DEADLINE;
use crate::vsock::client::DeviceClient;
use crate::vsock::{OpenRequest, PendingStream, Transport};

/// So many: what a browser or a docker command opens at once. The agent lets more than that wait.
pub(super) const SPARES: usize = 4;

/// The spares of one VM. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Spares {
    shelf: Arc<Mutex<Shelf>>,
}

#[derive(Debug, Default)]
struct Shelf {
    ready: Vec<PendingStream>,
    /// That are being opened.
    coming: usize,
}

impl Spares {
    /// One of them, where there is one.
    pub fn take(&self) -> Option<PendingStream> {
        self.shelf().ready.pop()
    }

    /// Opens as many as are missing, in the background.
    pub fn fill(&self, client: &DeviceClient) {
        let mut shelf = self.shelf();
        while shelf.ready.len() + shelf.coming < SPARES {
            shelf.coming += 1;
            let (spares, client) = (self.clone(), client.clone());
            tokio::spawn(async move {
                let nothing = OpenRequest {
                    guest_port: AGENT_PORT,
                    preamble: Vec::new(),
                    reply_len: 0,
                    deadline: OPEN_DEADLINE,
                };
                let opened = client.open(nothing).await;
                let mut shelf = spares.shelf();
                shelf.coming -= 1;
                match opened {
                    Ok(spare) => shelf.ready.push(spare),
                    Err(error) => tracing::debug!(%error, "no spare stream"),
                }
            });
        }
    }

    #[cfg(test)]
    pub(super) fn ready(&self) -> usize {
        self.shelf().ready.len()
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
