//! Answers the guest's name queries as this host resolves names: `/etc/hosts`, then its own name
//! servers, so that VPN names and split DNS work in containers too.
//!
//! The guest is hostile: a query is parsed here before anything is asked, only well-formed single
//! questions leave, and a bounded number at once.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use dhow_protocol::codec::{self, CodecError, DATA_LIMIT};
use dhow_protocol::stream::DnsMessage;
use hickory_proto::op::{Message, MessageType, Metadata, OpCode};
use hickory_proto::rr::rdata::{A, AAAA};
use hickory_proto::rr::{DNSClass, RData, Record, RecordType};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;

use super::hosts::{self, Hosts};
use super::resolv_conf::{self, RESOLV_CONF};
use super::upstream;
use super::watched::Watched;

/// Queries that are being answered at once; the stream's own flow control holds back the rest.
const MAX_ASKING: usize = 128;
/// Above what the guest waits an answer is of no use.
const DEADLINE: Duration = Duration::from_secs(9);
/// Seconds that an answer from `/etc/hosts` may be kept: a person edits it.
const HOSTS_TTL: u32 = 5;

/// Serves a `Dns` stream until it ends.
///
/// # Errors
/// The stream failed, or what it said was no frame.
pub async fn serve_dns(stream: UnixStream) -> Result<(), CodecError> {
    let resolver = Resolver {
        hosts: Watched::new(Path::new("/etc/hosts"), hosts::parse),
        servers: Watched::new(Path::new(RESOLV_CONF), resolv_conf::servers),
    };
    serve(stream, resolver).await
}

#[derive(Debug)]
struct Resolver {
    hosts: Watched<Hosts>,
    servers: Watched<Vec<SocketAddr>>,
}

async fn serve<S: AsyncRead + AsyncWrite>(stream: S, resolver: Resolver) -> Result<(), CodecError> {
    let resolver = Arc::new(resolver);
    let (mut reader, mut writer) = tokio::io::split(stream);
    let (answers, mut ready) = mpsc::channel::<DnsMessage>(MAX_ASKING);
    let asking = Arc::new(Semaphore::new(MAX_ASKING));
    let receive = async {
        loop {
            let Ok(permit) = Arc::clone(&asking).acquire_owned().await else { return Ok(()) };
            let Some(DnsMessage { id, message }) = codec::read_frame(&mut reader, DATA_LIMIT).await? else {
                return Ok(());
            };
            let (resolver, answers) = (Arc::clone(&resolver), answers.clone());
            tokio::spawn(async move {
                let answer = timeout(DEADLINE, resolver.resolve(&message)).await;
                let message = answer.ok().flatten().unwrap_or_default();
                let _ = answers.send(DnsMessage { id, message }).await;
                drop(permit);
            });
        }
    };
    let send = async {
        while let Some(answer) = ready.recv().await {
            codec::write_frame(&mut writer, &answer, DATA_LIMIT).await?;
        }
        Ok(())
    };
    tokio::select! { ended = receive => ended, ended = send => ended }
}

impl Resolver {
    /// The answer to `query`; `None` for what is no query or has no answer.
    async fn resolve(&self, query: &[u8]) -> Option<Vec<u8>> {
        let parsed = Message::from_vec(query).ok()?;
        let sound = parsed.message_type == MessageType::Query
            && parsed.op_code == OpCode::Query
            && parsed.queries.len() == 1;
        if !sound {
            return None;
        }
        if let Some(answer) = from_hosts(&parsed, &self.hosts.get()) {
            return answer.to_vec().ok();
        }
        let servers = self.servers.get();
        upstream::ask(&servers, query).await
    }
}

/// The answer where `hosts` knows the name. A name without an address of the asked family has none:
/// the network is not asked about what the file says.
fn from_hosts(query: &Message, hosts: &Hosts) -> Option<Message> {
    let question = &query.queries[0];
    if question.query_class() != DNSClass::IN {
        return None;
    }
    let kind = question.query_type();
    if !matches!(kind, RecordType::A | RecordType::AAAA) {
        return None;
    }
    let name = question.name().to_ascii().trim_end_matches('.').to_ascii_lowercase();
    let addresses = hosts.get(&name)?;
    let mut answer = Message::response(query.id, OpCode::Query);
    answer.metadata = Metadata::response_from_request(&query.metadata);
    answer.metadata.recursion_available = true;
    answer.add_query(question.clone());
    for address in addresses {
        let data = match address {
            IpAddr::V4(address) if kind == RecordType::A => RData::A(A(*address)),
            IpAddr::V6(address) if kind == RecordType::AAAA => RData::AAAA(AAAA(*address)),
            _ => continue,
        };
        answer.add_answer(Record::from_rdata(question.name().clone(), HOSTS_TTL, data));
    }
    Some(answer)
}

#[cfg(test)]
#[path = "dns_tests.rs"]
mod tests;
