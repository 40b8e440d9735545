//! The host's name servers, asked as its own resolver asks them.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

/// Header of a DNS message (RFC 1035, 4.1.1).
pub(super) const HEADER: usize = 12;
const UDP_TIMEOUT: Duration = Duration::from_secs(2);
const TCP_TIMEOUT: Duration = Duration::from_secs(4);
/// How often the list of servers is gone through: the stream's guest gives up after 10 s.
const ROUNDS: usize = 2;

const SERVFAIL: u8 = 2;
const NOTIMP: u8 = 4;
const REFUSED: u8 = 5;

/// Asks one server after the other. `None` when none answers.
pub(super) async fn ask(servers: &[SocketAddr], query: &[u8]) -> Option<Vec<u8>> {
    let mut refusal = None;
    for _ in 0..ROUNDS {
        for server in servers {
            match ask_one(*server, query).await {
                // As the host's resolver does: another server may know better.
                Ok(answer) if matches!(answer[3] & 0x0f, SERVFAIL | NOTIMP | REFUSED) => {
                    refusal = Some(answer)
                }
                Ok(answer) => return Some(answer),
                Err(error) => tracing::debug!(%server, %error, "a name server did not answer"),
            }
        }
        if refusal.is_some() {
            break;
        }
    }
    refusal
}

/// Over UDP, and where the answer is cut off over TCP.
async fn ask_one(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    // An id of our own: the guest chose the one in its query, and might help somebody to guess it.
    let mut id = [0; 2];
    getrandom::fill(&mut id).map_err(io::Error::other)?;
    let mut asked = query.to_vec();
    asked[..2].copy_from_slice(&id);
    let mut answer = timeout(UDP_TIMEOUT, over_udp(server, &asked)).await??;
    if answer[2] & 0x02 != 0 {
        // A server without TCP leaves the cut answer, which says that it is cut.
        if let Ok(Ok(whole)) = timeout(TCP_TIMEOUT, over_tcp(server, &asked)).await {
            answer = whole;
        }
    }
    answer[..2].copy_from_slice(&query[..2]);
    Ok(answer)
}

async fn over_udp(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let any: IpAddr =
        if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    // A socket and so a port for each query, connected: others' datagrams do not arrive.
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(query).await?;
    let mut buffer = vec![0; 65_535];
    loop {
        let length = socket.recv(&mut buffer).await?;
        if answers(&buffer[..length], query) {
            buffer.truncate(length);
            return Ok(buffer);
        }
    }
}

async fn over_tcp(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(query.len()).map_err(io::Error::other)?;
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend_from_slice(query);
    stream.write_all(&framed).await?;
    let length = stream.read_u16().await?;
    let mut answer = vec![0; usize::from(length)];
    stream.read_exact(&mut answer).await?;
    if answers(&answer, query) { Ok(answer) } else { Err(io::Error::other("not an answer to the query")) }
}

/// Whether `answer` is a response (QR) with the query's id, and to its question where it has one.
fn answers(answer: &[u8], query: &[u8]) -> bool {
    let right_head = answer.len() >= HEADER && answer[..2] == query[..2] && answer[2] & 0x80 != 0;
    // The one question comes first in both, its name never compressed: the same bytes but for case.
    let question = question(query);
    right_head
        && (answer[4..6] == [0, 0]
            || answer
                .get(HEADER..HEADER + question.len())
                .is_some_and(|other| other.eq_ignore_ascii_case(question)))
}

/// The first question's bytes: labels, type and class.
fn question(message: &[u8]) -> &[u8] {
    let mut at = HEADER;
    while let Some(length) = message.get(at).copied().filter(|length| *length > 0) {
        at += usize::from(length) + 1;
    }
    message.get(HEADER..at + 5).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_to_its_question() {
        let mut query = vec![7, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, b'a', 0, 0, 1, 0, 1];
        let mut answer = query.clone();
        assert!(!answers(&answer, &query), "a query is no answer");
        answer[2] |= 0x80;
        assert!(answers(&answer, &query));
        answer[13] = b'A';
        assert!(answers(&answer, &query));
        answer[13] = b'b';
        assert!(!answers(&answer, &query));
        query[0] = 8;
        assert!(!answers(&answer, &query));
        assert!(!answers(&answer[..11], &query));
    }
}
