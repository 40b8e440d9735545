//! DNS messages: which queries are answered here, and what fits into an answer. No I/O.

use std::net::Ipv4Addr;

use hickory_proto::op::{Message, MessageType, Metadata, OpCode, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{DNSClass, RData, Record, RecordType};

/// Names of the host, as the guest may ask for them (without the final dot, lower case).
const HOST_NAMES: [&str; 3] = ["host.docker.internal", "host.dhow.internal", "gateway.docker.internal"];
/// Seconds that a client may keep an answer of ours.
const TTL: u32 = 60;
/// RFC 1035, 4.2.1: "Messages carried by UDP are restricted to 512 bytes".
const UDP_WITHOUT_EDNS: usize = 512;

/// A well-formed query.
#[derive(Debug)]
pub(super) struct Query {
    raw: Vec<u8>,
    parsed: Message,
}

impl Query {
    /// `None` for whatever is not one question with one query in it: such bytes get no answer, so
    /// that two servers can never be made to answer each other for ever.
    pub(super) fn parse(raw: &[u8]) -> Option<Self> {
        let parsed = Message::from_vec(raw).ok()?;
        let ours = parsed.message_type == MessageType::Query
            && parsed.op_code == OpCode::Query
            && parsed.queries.len() == 1;
        ours.then(|| Self { raw: raw.to_vec(), parsed })
    }

    /// The message as it came.
    pub(super) fn message(&self) -> &[u8] {
        &self.raw
    }

    /// The answer where the question is about one of the host's names.
    pub(super) fn own_answer(&self, host: Ipv4Addr) -> Option<Vec<u8>> {
        let question = &self.parsed.queries[0];
        let name = question.name().to_ascii().to_ascii_lowercase();
        let name = name.strip_suffix('.').unwrap_or(&name);
        if question.query_class() != DNSClass::IN || !HOST_NAMES.contains(&name) {
            return None;
        }
        let mut answer = self.response(ResponseCode::NoError);
        if matches!(question.query_type(), RecordType::A | RecordType::ANY) {
            answer.add_answer(Record::from_rdata(question.name().clone(), TTL, RData::A(A(host))));
        }
        // Any other type: the name exists, it has no such record.
        answer.to_vec().ok()
    }

    /// SERVFAIL.
    pub(super) fn failed(&self) -> Vec<u8> {
        self.response(ResponseCode::ServFail).to_vec().unwrap_or_default()
    }

    /// `answer` if it is one to this query, SERVFAIL otherwise.
    pub(super) fn checked(&self, answer: Vec<u8>) -> Vec<u8> {
        // Header: id in bytes 0 and 1, QR in the highest bit of byte 2.
        let fits = answer.len() >= 12
            && answer.len() <= usize::from(u16::MAX)
            && answer[..2] == self.raw[..2]
            && answer[2] & 0x80 != 0;
        if fits { answer } else { self.failed() }
    }

    /// `answer`, or where it is too large for UDP only its head with the TC bit, so that the client
    /// asks again over TCP.
    pub(super) fn fit_udp(&self, answer: Vec<u8>) -> Vec<u8> {
        let limit = self
            .parsed
            .edns
            .as_ref()
            .map_or(UDP_WITHOUT_EDNS, |edns| usize::from(edns.max_payload()).max(UDP_WITHOUT_EDNS));
        if answer.len() <= limit {
            return answer;
        }
        let head = Message::from_vec(&answer).ok().and_then(|answer| answer.truncate().to_vec().ok());
        head.filter(|head| head.len() <= limit).unwrap_or_else(|| {
            let mut empty = self.response(ResponseCode::NoError);
            empty.metadata.truncation = true;
            empty.to_vec().unwrap_or_default()
        })
    }

    fn response(&self, code: ResponseCode) -> Message {
        let mut response = Message::response(self.parsed.id, OpCode::Query);
        response.metadata = Metadata::response_from_request(&self.parsed.metadata);
        response.metadata.recursion_available = true;
        response.metadata.response_code = code;
        response.add_query(self.parsed.queries[0].clone());
        response
    }
}
