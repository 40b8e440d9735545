//! The thread on which streams are opened, so that who opens many at once delays only others who open.
//!
//! To open a stream takes ten times as long as to carry a small piece over an open one. Connections are accepted and
//! prove themselves here, and forwards are connected to their targets. A relay goes on on the worker's first thread when
//! it has carried some pieces (to hand over each at once cost a fifth of the rate of new ones); everything else does so
//! at once.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use dhow_protocol::hello::Secret;
use dhow_protocol::stream::StreamHeader;
use tokio_vsock::VsockListener;

use super::accept::{self, Arrival};
use super::dispatch::Services;
use super::lane::Lane;
use super::stream::Stream;

/// Begins to serve what comes to `listener`. The caller's lane serves what is open.
pub(super) fn start(listener: OwnedFd, secret: Secret, services: Arc<Services>) {
    let quick = Lane::current();
    let opening = Lane::start("opening").unwrap_or_else(|error| {
        tracing::warn!(%error, "opening has no thread of its own");
        quick.clone()
    });
    opening.spawn(async move {
        let serve = move |arrival| serve(arrival, Arc::clone(&services), quick.clone());
        accept::run(VsockListener::from(listener), secret, accept::Limits::default(), serve).await;
    });
}

async fn serve(arrival: Arrival, services: Arc<Services>, quick: Lane) {
    if matches!(arrival.header, StreamHeader::Tcp { .. } | StreamHeader::Unix { .. }) {
        return services.serve(arrival, &quick).await;
    }
    let Arrival { stream, header, answer, room } = arrival;
    let socket = stream.into_fd();
    let lane = quick.clone();
    quick.spawn(async move {
        match Stream::new(socket) {
            Ok(stream) => services.serve(Arrival { stream, header, answer, room }, &lane).await,
            Err(error) => tracing::warn!(%error, "a stream cannot be served"),
        }
    });
}
