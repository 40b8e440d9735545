//! One TCP forward: what its host socket accepts is handed over.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use dhow_protocol::ports::Listener;
use dhow_protocol::stream::StreamHeader;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::policy::endpoint;
use super::{MAX_OPENING, Opener};

/// Serves `listener` for ever: drop or abort the future to end it.
pub(super) async fn accept<O: Opener>(listener: TcpListener, guest: Listener, opener: O) {
    let opening = Arc::new(Semaphore::new(MAX_OPENING));
    loop {
        // The permit comes first: who cannot be served yet waits in the kernel's queue.
        let Ok(permit) = Arc::clone(&opening).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((client, _)) => {
                let opener = opener.clone();
                tokio::spawn(async move {
                    if let Err(error) = hand_over(client, guest, &opener).await {
                        tracing::debug!(%error, port = guest.port, "a forwarded connection was refused");
                    }
                    drop(permit);
                });
            }
            // Out of descriptors, or the client has left: others go on.
            Err(error) => {
                tracing::warn!(%error, port = guest.port, "a forward cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Makes `client` the host end of a stream. Where the guest refuses, the client sees a reset, as it
/// would from the guest itself, and not an empty success.
async fn hand_over<O: Opener>(client: TcpStream, guest: Listener, opener: &O) -> Result<(), String> {
    let told = |error: io::Error| error.to_string();
    client.set_nodelay(true).map_err(told)?;
    let client = client.into_std().map_err(told)?;
    // The fd is the opener's from here on; this one is for the reset.
    let held = client.try_clone().map_err(told)?;
    let target = endpoint(&guest);
    let header = StreamHeader::Tcp { address: target.ip(), port: target.port() };
    let opened = opener.open(header, client.into()).await;
    if opened.is_err() {
        // "l_onoff 1, l_linger 0": the close sends RST (socket(7), tcp(7)).
        let reset = libc::linger { l_onoff: 1, l_linger: 0 };
        setsockopt(&held, sockopt::Linger, &reset).map_err(|error| error.to_string())?;
    }
    opened
}
