//! The report against this machine's real sockets.

use super::*;
use dhow_protocol::ports::{Listener, Protocol};
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
    // Below the range for clients.
    let socket =
        (20_000..30_000).find_map(|port| std::net::UdpSocket::bind(("127.0.0.1", port)).ok()).unwrap();
    let wanted = Listener { protocol: Protocol::Udp, ..tcp(socket.local_addr().unwrap()) };
    let began = std::time::Instant::now();
    until(&mut stream, &mut known, wanted, true).await;
    drop(socket);
    until(&mut stream, &mut known, wanted, false).await;
    assert!(began.elapsed() < limit, "{:?}", began.elapsed());
}

#[tokio::test]
async fn with_polling_alone() {
    let (_sender, hints) = broadcast::channel(MOST_HINTS);
    let ports =
        Arc::new(Ports { own: Vec::new(), away: Box::new(|| false), hints, poll: Duration::from_millis(20) });
    listeners_come_and_go(ports, Duration::from_secs(2)).await;
}

#[tokio::test]
async fn with_the_kernels_triggers() {
    if !std::path::Path::new("/sys/kernel/tracing/instances").exists() {
        eprintln!("skipped: there is no tracefs at /sys/kernel/tracing");
        return;
    }
    let (sender, hints) = broadcast::channel(MOST_HINTS);
    if let Err(error) = trigger::start(sender) {
        eprintln!("skipped: {error}");
        return;
    }
    // Far below the poll: only a trigger is that fast.
    let ports =
        Arc::new(Ports { own: Vec::new(), away: Box::new(|| false), hints, poll: Duration::from_secs(60) });
    listeners_come_and_go(ports, Duration::from_secs(2)).await;
}

#[tokio::test]
async fn the_report_ends_with_the_stream() {
    let (_sender, hints) = broadcast::channel(MOST_HINTS);
    let ports =
        Arc::new(Ports { own: Vec::new(), away: Box::new(|| false), hints, poll: Duration::from_secs(60) });
    let (mut ours, theirs) = tokio::io::duplex(1 << 20);
    let serving = tokio::spawn(async move { ports.serve(theirs).await });
    next(&mut ours).await;
    drop(ours);
    timeout(Duration::from_secs(5), serving).await.unwrap().unwrap();
}

#[test]
fn the_agents_own_addresses_are_left_out() {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let own = std::net::TcpListener::bind("127.0.0.53:0").unwrap();
    let [socket, own] = [socket, own].map(|listener| (tcp(listener.local_addr().unwrap()), listener));
    let all = diag::Diag::open(Vec::new()).unwrap().dump(&Scope::all()).unwrap();
    assert!(all.contains(&socket.0) && all.contains(&own.0));
    let others = diag::Diag::open(vec![own.0.address]).unwrap().dump(&Scope::all()).unwrap();
    assert!(others.contains(&socket.0) && !others.contains(&own.0));
}

#[tokio::test]
async fn what_goes_while_the_publisher_is_away_lingers() {
    let away = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let is_away = Arc::clone(&away);
    let (_sender, hints) = broadcast::channel(MOST_HINTS);
    let ports = Arc::new(Ports {
        hints,
        poll: Duration::from_millis(5),
        own: Vec::new(),
        away: Box::new(move || is_away.load(std::sync::atomic::Ordering::Relaxed)),
    });
    let mut stream = serve(ports);
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let wanted = tcp(socket.local_addr().unwrap());
    let mut known = BTreeSet::new();
    until(&mut stream, &mut known, wanted, true).await;
    drop(socket);
    // Something that comes is reported, and by then the other one has been missed.
    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    until(&mut stream, &mut known, tcp(other.local_addr().unwrap()), true).await;
    assert!(known.contains(&wanted));
    away.store(false, std::sync::atomic::Ordering::Relaxed);
    until(&mut stream, &mut known, wanted, false).await;
}
