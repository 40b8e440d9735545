//! Gives each stream to who serves its kind.

use std::net::SocketAddr;
use std::sync::Arc;

use dhow_protocol::hello::Status;
use dhow_protocol::stream::StreamHeader;

use super::connect::{self, Refusal};
use super::control::Control;
use super::hello::Answer;
use super::requests::Requests;
use super::stream::Stream;
use super::{chain, relay};
use crate::dns::Dns;
use crate::exec;
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
    /// None where the kernel cannot list sockets.
    pub(super) ports: Option<Arc<Ports>>,
    /// Proxies and the like, for commands.
    pub(super) environment: Vec<(String, String)>,
}

impl Services {
    /// Answers one stream's hello and serves it to its end.
    pub(super) async fn serve(self: Arc<Self>, stream: Stream, header: StreamHeader, answer: Answer) {
        // A stream whose host has left before its answer needs nobody.
        macro_rules! accept {
            () => {
                if answer.accept(&stream).await.is_err() {
                    return;
                }
            };
        }
        match header {
            StreamHeader::Control => {
                accept!();
                self.control.serve(&stream).await;
            }
            StreamHeader::Exec(start) => match exec::prepare(start, &self.environment).await {
                Ok(prepared) => {
                    accept!();
                    exec::run(stream, prepared).await;
                }
                Err(exec::Refused { status, detail }) => answer.refuse(&stream, status, &detail).await,
            },
            StreamHeader::Tcp { address, port } => {
                forward(stream, answer, connect::tcp(SocketAddr::new(address, port))).await;
            }
            StreamHeader::Unix { path } => forward(stream, answer, connect::unix(&path)).await,
            StreamHeader::Ports => match &self.ports {
                Some(ports) => {
                    accept!();
                    ports.serve(stream).await;
                }
                None => {
                    answer.refuse(&stream, Status::NotFound, "the guest's kernel cannot list sockets").await;
                }
            },
            StreamHeader::Dns => match &self.dns {
                Some(dns) => {
                    accept!();
                    dns.serve(stream).await;
                }
                None => answer.refuse(&stream, Status::NotFound, "the guest has no name server").await,
            },
            StreamHeader::Files { share, session } => {
                accept!();
                self.mounts.serve_files(share, session, stream.into_fd()).await;
            }
            StreamHeader::Bundle(offer) => {
                accept!();
                self.runtimes.receive(offer, stream).await;
            }
            StreamHeader::Logs { source, tail, follow } => {
                accept!();
                crate::logs::serve(stream, source, tail, follow).await;
            }
        }
    }
}

/// Answers when the target has, then relays.
async fn forward(stream: Stream, answer: Answer, target: impl Future<Output = Result<Stream, Refusal>>) {
    let connected = tokio::select! {
        connected = target => connected,
        // The client gave up.
        () = stream.hung_up() => return,
    };
    match connected {
        Ok(target) => {
            if answer.accept(&stream).await.is_err() {
                return;
            }
            if let Err(error) = relay::relay(stream, target).await {
                tracing::debug!(error = chain(&error), "a forwarded connection was cut");
            }
        }
        Err(Refusal { status, detail }) => answer.refuse(&stream, status, &detail).await,
    }
}
