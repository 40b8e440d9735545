//! The report against this machine's real sockets.

use super::*;
use dhow_protocol::ports::{Listener, PortsEvent, Protocol};
use std::collections::BTreeSet;
use tokio::io::DuplexStream;
use tokio::time::timeout;

async fn next(stream: &mut DuplexStream) -> PortsEvent {
    let frame = codec::read_frame(stream, CONTROL_LIMIT);
    timeout(Duration::from_secs(10), frame).await.unwrap().unwrap().unwrap()
}

/// Waits until `wanted` is (or is no longer) among what was reported; other tests' sockets may be too.
async fn until(stream: &mut DuplexStream, known: &mut BTreeSet<Listener>, wanted: Listener, there: bool) {
    while known.contains(&wanted) != there {
        match next(stream).await {
            PortsEvent::All(all) => *known = all.into_iter().collect(),
            PortsEvent::Changed { added, removed } => {
                known.extend(added);
                removed.iter().for_each(|gone| _ = known.remove(gone));
            }
        }
    }
}

fn serve(ports: Arc<Ports>) -> DuplexStream {
    let (ours, theirs) = tokio::io::duplex(1 << 20);
    tokio::spawn(async move { ports.serve(theirs).await });
    ours
}

fn tcp(address: std::net::SocketAddr) -> Listener {
    Listener { protocol: Protocol::Tcp, address: address.ip(), port: address.port() }
}

async fn listeners_come_and_go(ports: Arc<Ports>, limit: Duration) {
    let mut stream = serve(ports);
    let mut known = BTreeSet::new();
    let PortsEvent::All(all) = next(&mut stream).await else { panic!("the first event is all") };
    known.extend(all);
    for address in ["127.0.0.1:0", "0.0.0.0:0", "[::1]:0", "[::]:0"] {
        let socket = std::net::TcpListener::bind(address).unwrap();
        let wanted = tcp(socket.local_addr().unwrap());
        let began = std::time::Instant::now();
        until(&mut stream, &mut known, wanted, true).await;
        let opened = began.elapsed();
        // A connection is no listener.
        let _client = std::net::TcpStream::connect(("localhost", wanted.port));
        let began = std::time::Instant::now();
        drop(socket);
        until(&mut stream, &mut known, wanted, false).await;
        let closed = began.elapsed();
        println!("{address}: reported after {opened:?}, gone after {closed:?}");
        assert!(opened < limit && closed < limit, "{address}: {opened:?}, {closed:?}");
    }
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let wanted = Listener { protocol: Protocol::Udp, ..tcp(socket.local_addr().unwrap()) };
    // UDP waits for a look that something else asks for.
    let _trigger = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    until(&mut stream, &mut known, wanted, true).await;
}

#[tokio::test]
async fn with_polling_alone() {
    let (_sender, triggers) = watch::channel(0);
    let ports = Arc::new(Ports { triggers, poll: Duration::from_millis(20) });
    listeners_come_and_go(ports, Duration::from_secs(2)).await;
}

#[tokio::test]
async fn with_the_kernels_triggers() {
    if !std::path::Path::new("/sys/kernel/tracing/instances").exists() {
        eprintln!("skipped: there is no tracefs at /sys/kernel/tracing");
        return;
    }
    let (sender, triggers) = watch::channel(0);
    if let Err(error) = trigger::start(sender) {
        eprintln!("skipped: {error}");
        return;
    }
    // Far below the poll: only a trigger is that fast.
    let ports = Arc::new(Ports { triggers, poll: Duration::from_secs(60) });
    listeners_come_and_go(ports, Duration::from_secs(2)).await;
}

#[tokio::test]
async fn the_report_ends_with_the_stream() {
    let (_sender, triggers) = watch::channel(0);
    let ports = Arc::new(Ports { triggers, poll: Duration::from_secs(60) });
    let (mut ours, theirs) = tokio::io::duplex(1 << 20);
    let serving = tokio::spawn(async move { ports.serve(theirs).await });
    next(&mut ours).await;
    drop(ours);
    timeout(Duration::from_secs(5), serving).await.unwrap().unwrap();
}

#[test]
fn this_process_knows_its_own_sockets() {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut diag = diag::Diag::open().unwrap();
    assert!(diag.dump().unwrap().contains(&tcp(socket.local_addr().unwrap())));
    // Only the name server's port is left out; that it is ours is told by its inode.
    if let Ok(own) = std::net::TcpListener::bind("127.0.0.53:53") {
        assert!(!diag.dump().unwrap().contains(&tcp(own.local_addr().unwrap())));
    }
}
