//! Gives each stream to who serves its kind.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use dhow_protocol::errors::chain;
use dhow_protocol::hello::Status;
use dhow_protocol::stream::StreamHeader;
use tokio::sync::OwnedSemaphorePermit;

use super::accept::Arrival;
use super::connect::{self, Refusal};
use super::control::Control;
use super::hello::Answer;
use super::lane::Lane;
use super::relay;
use super::requests::Requests;
use super::stream::Stream;
use super::udp;
use crate::dns::Dns;
use crate::exec;
use crate::host_services::HostServices;
use crate::mounts::Mounts;
use crate::ports::Ports;
use crate::runtimes::Runtimes;

/// All that streams lead to.
pub(super) struct Services {
    pub(super) control: Control<Requests>,
    pub(super) runtimes: Arc<Runtimes>,
    pub(super) mounts: Arc<Mounts>,
    /// None without a network.
    pub(super) dns: Option<Arc<Dns>>,
    /// What the host lets the guest reach.
    pub(super) host_services: Arc<HostServices>,
    /// None where the kernel cannot list sockets.
    pub(super) ports: Option<Arc<Ports>>,
    /// Proxies and the like, for commands.
    pub(super) environment: Vec<(String, String)>,
}

impl Services {
    /// Answers one stream's hello and serves it to its end; a forward goes on on `quick` when it is no longer new.
    pub(super) async fn serve(self: Arc<Self>, arrival: Arrival, quick: &Lane) {
        let Arrival { stream, header, answer, room } = arrival;
        match header {
            StreamHeader::Tcp { address, port } => {
                forward(stream, answer, connect::tcp(SocketAddr::new(address, port)), room, quick).await;
            }
            StreamHeader::Unix { path } => {
                forward(stream, answer, connect::unix(&path), room, quick).await;
            }
            StreamHeader::Control => {
                let Some(stream) = accepted(stream, answer).await else { return };
                self.control.serve(&stream).await;
            }
            StreamHeader::Exec(start) => match exec::prepare(start, &self.environment).await {
                Ok(prepared) => {
                    let Some(stream) = accepted(stream, answer).await else { return };
                    exec::run(stream, prepared).await;
                }
                Err(exec::Refused { status, detail }) => answer.refuse(&stream, status, &detail).await,
            },
            StreamHeader::Ports => {
                let Some(ports) = &self.ports else {
                    let detail = "the guest's kernel cannot list sockets";
                    return answer.refuse(&stream, Status::NotFound, detail).await;
                };
                let Some(stream) = accepted(stream, answer).await else { return };
                ports.serve(stream).await;
            }
            StreamHeader::Dns => {
                let Some(dns) = &self.dns else {
                    return answer.refuse(&stream, Status::NotFound, "the guest has no name server").await;
                };
                let Some(stream) = accepted(stream, answer).await else { return };
                dns.serve(stream).await;
            }
            StreamHeader::Files { share, session } => {
                let Some(stream) = accepted(stream, answer).await else { return };
                self.mounts.serve_files(share, session, stream.into_fd()).await;
            }
            StreamHeader::Bundle(offer) => {
                let Some(stream) = accepted(stream, answer).await else { return };
                self.runtimes.receive(offer, stream).await;
            }
            StreamHeader::Udp { address, port } => match udp::connect(SocketAddr::new(address, port)).await {
                Ok(socket) => {
                    let Some(stream) = accepted(stream, answer).await else { return };
                    if let Err(error) = udp::relay(&stream, &socket).await {
                        tracing::debug!(error = chain(&error), "a session over UDP was cut");
                    }
                }
                Err(error) => answer.refuse(&stream, Status::Failed, &error.to_string()).await,
            },
            StreamHeader::HostServices(offer) => {
                let Some(stream) = accepted(stream, answer).await else { return };
                self.host_services.serve(stream, offer).await;
            }
            StreamHeader::Dialled { id } if self.host_services.expects(id) => {
                let Some(stream) = accepted(stream, answer).await else { return };
                if let Err(stream) = self.host_services.dialled(id, stream) {
                    stream.cut();
                }
            }
            StreamHeader::Dialled { .. } => {
                answer.refuse(&stream, Status::NotFound, "nobody waits for it any more").await;
            }
            StreamHeader::Logs { source, tail, follow } => {
                let Some(stream) = accepted(stream, answer).await else { return };
                crate::logs::serve(stream, source, tail, follow).await;
            }
        }
    }
}

/// The open stream; `None` when its host has left before the answer.
async fn accepted(stream: Stream, answer: Answer) -> Option<Stream> {
    match answer.accept(&stream).await {
        Ok(()) => Some(stream),
        Err(error) => {
            tracing::debug!(%error, "the host did not wait for its stream");
            None
        }
    }
}

/// Answers when the target has, then relays.
async fn forward(
    stream: Stream,
    answer: Answer,
    target: impl Future<Output = Result<OwnedFd, Refusal>>,
    room: OwnedSemaphorePermit,
    quick: &Lane,
) {
    let connected = tokio::select! {
        connected = target => connected,
        // The client gave up.
        () = stream.hung_up() => return,
    };
    let target = match connected {
        Ok(target) => target,
        Err(Refusal { status, detail }) => return answer.refuse(&stream, status, &detail).await,
    };
    let Some(stream) = accepted(stream, answer).await else { return };
    let relayed = match Stream::new(target) {
        Ok(target) => relay::relay_new(stream, target, quick).await,
        Err(error) => Err(error),
    };
    if let Err(error) = relayed {
        tracing::debug!(error = chain(&error), "a forwarded connection was cut");
    }
    drop(room);
}
