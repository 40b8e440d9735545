//! The server over real loopback sockets, with a test in the host's place.

use super::*;
use hickory_proto::op::{Message, Query as Question, ResponseCode};
use hickory_proto::rr::rdata::{A, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use tokio::io::DuplexStream;

const HOST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const SHORT: Patience = Patience { stream: Duration::from_millis(150), answer: Duration::from_millis(400) };

async fn start() -> (Arc<Dns>, SocketAddr) {
    Dns::start_on((Ipv4Addr::LOCALHOST, 0).into(), HOST, SHORT).await.unwrap()
}

fn attach(dns: &Arc<Dns>) -> DuplexStream {
    let (ours, theirs) = tokio::io::duplex(1 << 20);
    let dns = Arc::clone(dns);
    tokio::spawn(async move { dns.serve(theirs).await });
    ours
}

fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::query();
    message.add_query(Question::query(Name::from_ascii(name).unwrap(), kind));
    message
}

async fn udp(server: SocketAddr, query: &Message) -> Message {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.send_to(&query.to_vec().unwrap(), server).await.unwrap();
    let mut buffer = vec![0; 65_535];
    let (length, _) = timeout(Duration::from_secs(5), socket.recv_from(&mut buffer)).await.unwrap().unwrap();
    let answer = Message::from_vec(&buffer[..length]).unwrap();
    assert_eq!(answer.id, query.id);
    answer
}

/// Answers every query with `records` TXT records of 200 bytes and an A record, as the host would.
async fn answer_all(mut stream: DuplexStream, records: usize) {
    while let Ok(Some(asked)) = codec::read_frame::<DnsMessage, _>(&mut stream, DATA_LIMIT).await {
        let question = Message::from_vec(&asked.message).unwrap();
        let name = question.queries[0].name().clone();
        let mut answer = question.into_response();
        answer.add_answer(Record::from_rdata(name.clone(), 1, RData::A(A(Ipv4Addr::new(1, 2, 3, 4)))));
        for _ in 0..records {
            answer.add_answer(Record::from_rdata(
                name.clone(),
                1,
                RData::TXT(TXT::new(vec!["x".repeat(200)])),
            ));
        }
        let answer = DnsMessage { id: asked.id, message: answer.to_vec().unwrap() };
        codec::write_frame(&mut stream, &answer, DATA_LIMIT).await.unwrap();
    }
}

#[tokio::test]
async fn the_hosts_names_are_answered_here() {
    let (_dns, server) = start().await;
    for name in ["host.docker.internal.", "HOST.dhow.internal.", "gateway.docker.internal."] {
        let answer = udp(server, &query(name, RecordType::A)).await;
        assert_eq!(answer.answers[0].data, RData::A(A(HOST)), "{name}");
        let answer = udp(server, &query(name, RecordType::AAAA)).await;
        assert_eq!((answer.response_code, answer.answers.len()), (ResponseCode::NoError, 0));
    }
}

#[tokio::test]
async fn other_names_are_asked_of_the_host() {
    let (dns, server) = start().await;
    tokio::spawn(answer_all(attach(&dns), 0));
    let answer = udp(server, &query("example.org.", RecordType::A)).await;
    assert_eq!(answer.answers[0].data, RData::A(A(Ipv4Addr::new(1, 2, 3, 4))));
}

#[tokio::test]
async fn without_a_stream_a_query_fails_and_a_late_stream_still_serves_it() {
    let (dns, server) = start().await;
    assert_eq!(
        udp(server, &query("example.org.", RecordType::A)).await.response_code,
        ResponseCode::ServFail
    );
    let late = tokio::spawn(async move { udp(server, &query("example.org.", RecordType::A)).await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    tokio::spawn(answer_all(attach(&dns), 0));
    assert_eq!(late.await.unwrap().answers.len(), 1);
}

#[tokio::test]
async fn a_broken_streams_queries_go_to_the_next_one() {
    let (dns, server) = start().await;
    let mut broken = attach(&dns);
    let asked = tokio::spawn(async move { udp(server, &query("example.org.", RecordType::A)).await });
    codec::read_frame::<DnsMessage, _>(&mut broken, DATA_LIMIT).await.unwrap().unwrap();
    drop(broken);
    tokio::spawn(answer_all(attach(&dns), 0));
    assert_eq!(asked.await.unwrap().answers.len(), 1);
}

#[tokio::test]
async fn a_silent_host_ends_in_servfail_and_leaves_nothing_waiting() {
    let (dns, server) = start().await;
    let _silent = attach(&dns);
    assert_eq!(
        udp(server, &query("example.org.", RecordType::A)).await.response_code,
        ResponseCode::ServFail
    );
    let link = dns.link.borrow().clone().unwrap();
    assert_eq!(link.waiting.lock().unwrap().as_ref().unwrap().len(), 0);
    assert_eq!(dns.outstanding.available_permits(), MAX_OUTSTANDING);
}

#[tokio::test]
async fn an_answer_too_large_for_udp_is_truncated_and_whole_over_tcp() {
    let (dns, server) = start().await;
    tokio::spawn(answer_all(attach(&dns), 20));
    let question = query("large.example.", RecordType::TXT);
    let answer = udp(server, &question).await;
    assert!(answer.truncation && answer.answers.is_empty());

    // Two queries in one write, on one connection.
    let mut connection = TcpStream::connect(server).await.unwrap();
    let bytes = question.to_vec().unwrap();
    let mut twice = Vec::new();
    for _ in 0..2 {
        twice.extend_from_slice(&u16::try_from(bytes.len()).unwrap().to_be_bytes());
        twice.extend_from_slice(&bytes);
    }
    connection.write_all(&twice).await.unwrap();
    for _ in 0..2 {
        let length = connection.read_u16().await.unwrap();
        let mut answer = vec![0; usize::from(length)];
        connection.read_exact(&mut answer).await.unwrap();
        let answer = Message::from_vec(&answer).unwrap();
        assert_eq!((answer.truncation, answer.answers.len()), (false, 21));
    }
}

#[tokio::test]
async fn an_answer_with_another_id_is_a_failure_and_garbage_gets_none() {
    let (dns, server) = start().await;
    let mut stream = attach(&dns);
    let liar = tokio::spawn(async move {
        let asked = codec::read_frame::<DnsMessage, _>(&mut stream, DATA_LIMIT).await.unwrap().unwrap();
        let mut message = asked.message.clone();
        message[0] ^= 0xff;
        codec::write_frame(&mut stream, &DnsMessage { id: asked.id, message }, DATA_LIMIT).await.unwrap();
        stream
    });
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    for garbage in [&b""[..], b"x", &[0xff; 600]] {
        socket.send_to(garbage, server).await.unwrap();
    }
    assert_eq!(
        udp(server, &query("example.org.", RecordType::A)).await.response_code,
        ResponseCode::ServFail
    );
    drop(liar.await);
    assert!(socket.try_recv(&mut [0; 16]).is_err());
}

proptest::proptest! {
    #[test]
    fn any_bytes_are_a_query_or_nothing(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
        if let Some(query) = answer::Query::parse(&bytes) {
            query.failed();
            query.own_answer(HOST);
            query.fit_udp(vec![0; 600]);
        }
    }
}
