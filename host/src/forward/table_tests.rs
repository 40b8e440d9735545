//! Forwards on this machine's loopback, with a test in the transport's place.

use std::os::fd::OwnedFd;

use super::*;
use crate::forward::rules::{Action, PortRange, Rule};
use dhow_protocol::stream::StreamHeader;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Echoes until the client's half-close, or refuses.
#[derive(Clone)]
struct Guest {
    refuse: bool,
    asked: tokio::sync::mpsc::UnboundedSender<StreamHeader>,
}

impl Opener for Guest {
    async fn open(&self, header: StreamHeader, fd: OwnedFd) -> Result<(), String> {
        self.asked.send(header).unwrap();
        if self.refuse {
            return Err("connection refused".into());
        }
        let mut stream = TcpStream::from_std(fd.into()).unwrap();
        assert!(stream.nodelay().unwrap());
        tokio::spawn(async move {
            let mut said = vec![0; 64];
            while let Ok(length @ 1..) = stream.read(&mut said).await {
                stream.write_all(&said[..length]).await.unwrap();
            }
        });
        Ok(())
    }
}

fn guest(refuse: bool) -> (Guest, tokio::sync::mpsc::UnboundedReceiver<StreamHeader>) {
    let (asked, headers) = tokio::sync::mpsc::unbounded_channel();
    (Guest { refuse, asked }, headers)
}

fn policy() -> Policy {
    Policy { first_port: 1024, limit: 16, denied: vec![22], rules: Vec::new() }
}

fn forwards() -> Arc<Forwards> {
    Forwards::new(policy(), Kept::default())
}

fn listener(address: &str, port: u16) -> Listener {
    Listener { protocol: Protocol::Tcp, address: address.parse().unwrap(), port }
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[tokio::test]
async fn a_connection_is_handed_over_and_outlives_its_listener() {
    let (opener, mut headers) = guest(false);
    let forwards = forwards();
    let port = free_port();
    forwards.apply(PortsEvent::All(vec![listener("0.0.0.0", port)]), &opener);
    let mut client = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    client.write_all(b"one").await.unwrap();
    let mut answer = [0; 3];
    client.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"one");
    assert_eq!(headers.recv().await.unwrap(), StreamHeader::Tcp { address: [127, 0, 0, 1].into(), port });

    let gone = PortsEvent::Changed { added: vec![], removed: vec![listener("0.0.0.0", port)] };
    forwards.apply(gone, &opener);
    assert_eq!(forwards.reports(), []);
    // The accepting task is aborted, its socket closed as soon as the runtime gets to it.
    tokio::task::yield_now().await;
    assert!(TcpStream::connect(("127.0.0.1", port)).await.is_err());
    client.write_all(b"two").await.unwrap();
    client.shutdown().await.unwrap();
    let mut rest = String::new();
    client.read_to_string(&mut rest).await.unwrap();
    assert_eq!(rest, "two");
}

#[tokio::test]
async fn a_refusal_of_the_guest_is_a_reset() {
    let (opener, mut headers) = guest(true);
    let forwards = forwards();
    let port = free_port();
    forwards.apply(PortsEvent::All(vec![listener("0.0.0.0", port)]), &opener);
    let mut client = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    headers.recv().await.unwrap();
    let error = client.read(&mut [0]).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_port_in_use_is_reported_and_taken_when_it_is_free() {
    let (opener, _headers) = guest(false);
    let forwards = forwards();
    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = other.local_addr().unwrap().port();
    forwards.apply(PortsEvent::All(vec![listener("0.0.0.0", port)]), &opener);
    let report = &forwards.reports()[0];
    assert_eq!(report.host, None);
    assert!(report.reason.as_ref().unwrap().contains("in use on the host"));
    assert_eq!(forwards.table().retries, 1);
    drop(other);
    forwards.settle(Open::Waiting, &opener);
    assert_eq!(forwards.reports()[0].host, Some(([127, 0, 0, 1], port).into()));
}

#[tokio::test]
async fn the_ipv6_wildcard_alone_serves_both_families() {
    let (opener, mut headers) = guest(false);
    let forwards = forwards();
    let port = free_port();
    forwards.apply(PortsEvent::All(vec![listener("::", port)]), &opener);
    for client in ["127.0.0.1", "::1"] {
        TcpStream::connect((client, port)).await.unwrap();
        let target = StreamHeader::Tcp { address: "::1".parse().unwrap(), port };
        assert_eq!(headers.recv().await.unwrap(), target);
    }
    assert_eq!(forwards.reports().len(), 2);
}

#[tokio::test]
async fn a_stream_is_followed_and_its_end_leaves_the_forwards() {
    let (opener, _headers) = guest(false);
    let forwards = forwards();
    let mut changes = forwards.watch();
    let (port, other) = (free_port(), free_port());
    let (mut ours, mut theirs) = tokio::io::duplex(1 << 16);
    let serving = {
        let forwards = Arc::clone(&forwards);
        tokio::spawn(async move { forwards.serve(&mut theirs, &opener).await })
    };
    let first = PortsEvent::All(vec![listener("0.0.0.0", port), listener("0.0.0.0", 22)]);
    codec::write_frame(&mut ours, &first, CONTROL_LIMIT).await.unwrap();
    changes.changed().await.unwrap();
    assert_eq!(forwards.reports().len(), 2);
    changes.mark_unchanged();
    let second = PortsEvent::Changed { added: vec![listener("127.0.0.1", other)], removed: vec![] };
    codec::write_frame(&mut ours, &second, CONTROL_LIMIT).await.unwrap();
    changes.changed().await.unwrap();
    drop(ours);
    serving.await.unwrap().unwrap();
    TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    forwards.clear();
    assert_eq!(forwards.reports(), []);
}

#[tokio::test]
async fn who_waits_has_a_turn_when_another_leaves() {
    let (opener, _headers) = guest(false);
    let forwards = forwards();
    let (port, late) = (free_port(), free_port());
    let [first, second, both] =
        [listener("127.0.0.1", port), listener("127.0.0.2", port), listener("::", late)];
    let changed = |added: &[Listener], removed: &[Listener]| PortsEvent::Changed {
        added: added.to_vec(),
        removed: removed.to_vec(),
    };
    let host_of = |forwards: &Forwards, guest: Listener| {
        let all = forwards.reports();
        all.iter().filter(|report| report.guest == guest).filter_map(|report| report.host).collect::<Vec<_>>()
    };
    forwards.apply(PortsEvent::All(vec![first]), &opener);
    forwards.apply(changed(&[second], &[]), &opener);
    assert_eq!(host_of(&forwards, second), []);
    // One that has nothing to do with it changes nothing, and one that leaves is forgotten.
    forwards.apply(changed(&[listener("127.0.0.1", 22)], &[]), &opener);
    assert_eq!(forwards.reports().len(), 3);
    forwards.apply(changed(&[], &[listener("127.0.0.1", 22)]), &opener);
    assert_eq!(forwards.reports().len(), 2);
    forwards.apply(changed(&[], &[first]), &opener);
    // The accepting task is aborted, its socket closed as soon as the runtime gets to it.
    tokio::task::yield_now().await;
    forwards.settle(Open::Waiting, &opener);
    assert_eq!(host_of(&forwards, second), [([127, 0, 0, 1], port).into()]);
    // So has one that has a part of what it wants.
    let v4 = listener("127.0.0.1", late);
    forwards.apply(changed(&[v4], &[]), &opener);
    forwards.apply(changed(&[both], &[]), &opener);
    assert_eq!(host_of(&forwards, both).len(), 1);
    forwards.apply(changed(&[], &[v4]), &opener);
    tokio::task::yield_now().await;
    forwards.settle(Open::Waiting, &opener);
    assert_eq!(host_of(&forwards, both).len(), 2);
}

#[tokio::test]
async fn a_static_forward_is_not_forgotten_with_a_listener() {
    let (opener, _headers) = guest(false);
    let forwards = forwards();
    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = other.local_addr().unwrap().port();
    let action = Action::Forward { address: None, first_port: port, always: true };
    let rule = Rule { protocol: None, address: None, ports: PortRange { first: port, last: port }, action };
    let fixed = rule.statics().next().unwrap();
    forwards.follow(Policy { rules: vec![rule], ..policy() });
    forwards.apply(PortsEvent::All(vec![fixed]), &opener);
    forwards.apply(PortsEvent::Changed { added: vec![], removed: vec![fixed] }, &opener);
    assert!(forwards.reports()[0].reason.is_some());
    assert!(forwards.table().retries > 0);
    drop(other);
    forwards.settle(Open::Waiting, &opener);
    assert!(forwards.reports()[0].host.is_some());
}

#[tokio::test]
async fn a_flood_is_bounded() {
    let (opener, _headers) = guest(false);
    let forwards = forwards();
    let all = (20_000..40_000).map(|port| listener("127.0.0.1", port)).collect();
    forwards.apply(PortsEvent::All(all), &opener);
    let table = forwards.table();
    assert!(table.bound.len() <= 16);
    assert_eq!(table.listeners.len(), MAX_LISTENERS);
}

#[tokio::test]
async fn a_static_rule_listens_without_the_guest() {
    let (opener, mut headers) = guest(false);
    let forwards = forwards();
    let (port, other) = (free_port(), free_port());
    let action = Action::Forward { address: None, first_port: other, always: true };
    let rule = Rule { protocol: None, address: None, ports: PortRange { first: port, last: port }, action };
    forwards.follow(Policy { rules: vec![rule], ..policy() });
    for event in
        [PortsEvent::All(vec![]), PortsEvent::All(vec![listener("0.0.0.0", port)]), PortsEvent::All(vec![])]
    {
        forwards.apply(event, &opener);
        assert_eq!(forwards.reports().len(), 1);
        TcpStream::connect(("127.0.0.1", other)).await.unwrap();
        let target = StreamHeader::Tcp { address: [127, 0, 0, 1].into(), port };
        assert_eq!(headers.recv().await.unwrap(), target);
    }
    assert!(TcpStream::connect(("127.0.0.1", port)).await.is_err(), "the rule has another port");
}
