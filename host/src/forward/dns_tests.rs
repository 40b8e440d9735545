//! The resolver between a test that plays the guest and servers on the loopback.

use super::*;
use hickory_proto::op::{Query, ResponseCode};
use hickory_proto::rr::Name;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpListener, UdpSocket};

/// Servers for [`Watched`], whose parser is a plain function: ports by lines.
fn loopback_ports(text: &str) -> Vec<SocketAddr> {
    text.lines().map(|port| SocketAddr::from(([127, 0, 0, 1], port.parse().unwrap()))).collect()
}

struct Bench {
    folder: tempfile::TempDir,
    stream: DuplexStream,
    next: u64,
}

impl Bench {
    fn new(servers: &[SocketAddr]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ports: Vec<_> = servers.iter().map(|server| format!("{}\n", server.port())).collect();
        std::fs::write(folder.path().join("hosts"), "10.9.8.7 db.corp db\nfd00::7 db.corp\n").unwrap();
        std::fs::write(folder.path().join("servers"), ports.concat()).unwrap();
        let resolver = Resolver {
            hosts: Watched::new(&folder.path().join("hosts"), hosts::parse),
            servers: Watched::new(&folder.path().join("servers"), loopback_ports),
        };
        let (stream, theirs) = tokio::io::duplex(1 << 20);
        tokio::spawn(serve(theirs, resolver));
        Self { folder, stream, next: 0 }
    }

    async fn raw(&mut self, message: Vec<u8>) -> Vec<u8> {
        self.next += 1;
        let asked = DnsMessage { id: self.next, message };
        codec::write_frame(&mut self.stream, &asked, DATA_LIMIT).await.unwrap();
        let read = codec::read_frame::<DnsMessage, _>(&mut self.stream, DATA_LIMIT);
        let answer = timeout(Duration::from_secs(20), read).await.unwrap().unwrap().unwrap();
        assert_eq!(answer.id, self.next);
        answer.message
    }

    async fn ask(&mut self, name: &str, kind: RecordType) -> Message {
        let mut query = Message::query();
        query.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        let answer = Message::from_vec(&self.raw(query.to_vec().unwrap()).await).unwrap();
        assert_eq!(answer.id, query.id);
        answer
    }
}

fn reply(query: &[u8], code: ResponseCode, cut: bool, records: usize) -> Vec<u8> {
    let mut answer = Message::from_vec(query).unwrap().into_response();
    answer.metadata.response_code = code;
    answer.metadata.truncation = cut;
    let name = answer.queries[0].name().clone();
    for last in 0..records {
        let address = [1, 2, 3, u8::try_from(last).unwrap()].into();
        answer.add_answer(Record::from_rdata(name.clone(), 1, RData::A(A(address))));
    }
    answer.to_vec().unwrap()
}

/// A name server on UDP, and on TCP where its UDP answers are `cut`.
async fn server(code: ResponseCode, cut: bool) -> SocketAddr {
    let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = udp.local_addr().unwrap();
    let tcp = TcpListener::bind(address).await.unwrap();
    tokio::spawn(async move {
        let mut buffer = vec![0; 2048];
        loop {
            let (length, client) = udp.recv_from(&mut buffer).await.unwrap();
            let query = &buffer[..length];
            // A forger that does not know the id comes first.
            let mut forged = reply(query, ResponseCode::NoError, false, 9);
            forged[0] ^= 0xff;
            udp.send_to(&forged, client).await.unwrap();
            udp.send_to(&reply(query, code, cut, usize::from(!cut)), client).await.unwrap();
        }
    });
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = tcp.accept().await.unwrap();
            let length = stream.read_u16().await.unwrap();
            let mut query = vec![0; usize::from(length)];
            stream.read_exact(&mut query).await.unwrap();
            let answer = reply(&query, code, false, 100);
            stream.write_u16(u16::try_from(answer.len()).unwrap()).await.unwrap();
            stream.write_all(&answer).await.unwrap();
        }
    });
    address
}

#[tokio::test]
async fn the_hosts_file_comes_first_and_is_read_again() {
    let mut bench = Bench::new(&[]);
    let answer = bench.ask("DB.corp.", RecordType::A).await;
    assert_eq!(answer.answers[0].data, RData::A(A([10, 9, 8, 7].into())));
    assert_eq!(bench.ask("db.corp.", RecordType::AAAA).await.answers.len(), 1);
    let without = bench.ask("db.", RecordType::AAAA).await;
    assert_eq!((without.response_code, without.answers.len()), (ResponseCode::NoError, 0));
    std::fs::write(bench.folder.path().join("hosts"), "10.1.1.1 db.corp and more\n").unwrap();
    let answer = bench.ask("db.corp.", RecordType::A).await;
    assert_eq!(answer.answers[0].data, RData::A(A([10, 1, 1, 1].into())));
}

#[tokio::test]
async fn servers_are_asked_in_turn() {
    let refusing = server(ResponseCode::Refused, false).await;
    let dead = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let good = server(ResponseCode::NoError, false).await;
    let mut bench = Bench::new(&[dead, refusing, good]);
    let answer = bench.ask("example.org.", RecordType::A).await;
    assert_eq!((answer.response_code, answer.answers.len()), (ResponseCode::NoError, 1));
    let mut bench = Bench::new(&[refusing]);
    assert_eq!(bench.ask("example.org.", RecordType::A).await.response_code, ResponseCode::Refused);
}

#[tokio::test]
async fn a_name_that_is_not_there_is_an_answer() {
    let mut bench = Bench::new(&[server(ResponseCode::NXDomain, false).await]);
    assert_eq!(bench.ask("no.example.", RecordType::A).await.response_code, ResponseCode::NXDomain);
}

#[tokio::test]
async fn a_cut_answer_is_fetched_over_tcp() {
    let mut bench = Bench::new(&[server(ResponseCode::NoError, true).await]);
    let answer = bench.ask("large.example.", RecordType::A).await;
    assert_eq!((answer.truncation, answer.answers.len()), (false, 100));
}

#[tokio::test]
async fn malformed_queries_get_an_empty_answer_and_do_no_harm() {
    let mut bench = Bench::new(&[]);
    let response =
        reply(&Message::query().add_query(Query::new()).to_vec().unwrap(), ResponseCode::NoError, false, 0);
    for bad in [vec![], vec![0; 3], vec![0xff; 65_535], vec![0; 12], response] {
        assert_eq!(bench.raw(bad).await, [0u8; 0]);
    }
    assert_eq!(bench.ask("db.corp.", RecordType::A).await.answers.len(), 1);
}
