//! TCP from the host: connections with deadlines, to the guest tool's server.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use dhow_guest_tool::{Pattern, Summary};

use super::wait::{SOON, wait_for};

/// For one read or write.
const PATIENCE: Duration = Duration::from_secs(60);

/// The host's loopback with `port`.
pub fn local(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

/// A port that nothing on the host's loopback has at this moment.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind(local(0)).expect("a free port");
    listener.local_addr().expect("its number").port()
}

/// The first address of this host that is not its loopback.
///
/// # Panics
/// When there is none.
pub fn own_address() -> Ipv4Addr {
    let addresses = nix::ifaddrs::getifaddrs().expect("the host's addresses");
    addresses
        .filter_map(|interface| Some(interface.address?.as_sockaddr_in()?.ip()))
        .find(|address| !address.is_loopback() && !address.is_link_local())
        .expect("this host has an address beside its loopback")
}

/// A connection with deadlines.
///
/// # Errors
/// As connect(2).
pub fn try_connect(address: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// A connection to an address that may take a moment to be there.
///
/// # Panics
/// When it does not come.
pub fn connect(address: SocketAddr) -> TcpStream {
    wait_for(&format!("a connection to {address}"), SOON, || {
        try_connect(address).map_err(|error| error.to_string())
    })
}

/// A connection to the guest tool's server on `port`, with its first line sent.
pub fn ask(port: u16, line: &str) -> TcpStream {
    ask_at(local(port), line)
}

/// As [`ask`], elsewhere.
///
/// # Panics
/// When it cannot be reached.
pub fn ask_at(address: SocketAddr, line: &str) -> TcpStream {
    let mut stream = connect(address);
    stream.write_all(format!("{line}\n").as_bytes()).expect("a request to the guest tool");
    stream
}

/// Reads to the other side's end.
///
/// # Panics
/// When it does not end in good order.
pub fn read_all(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap_or_else(|error| panic!("after {} bytes: {error}", bytes.len()));
    bytes
}

/// Sends a pattern of `size` bytes to a sink and checks its summary.
///
/// # Panics
/// When they differ.
pub fn check_upload(address: SocketAddr, seed: u64, size: usize) {
    let mut stream = ask_at(address, "sink");
    let bytes = Pattern::bytes(seed, size);
    stream.write_all(&bytes).unwrap_or_else(|error| panic!("upload of {size} bytes: {error}"));
    stream.shutdown(Shutdown::Write).expect("the half-close");
    let answer = String::from_utf8_lossy(&read_all(&mut stream)).into_owned();
    assert_eq!(answer.trim(), Summary::of(&bytes), "upload of {size} bytes");
}

/// Has a pattern of `size` bytes sent and checks it.
///
/// # Panics
/// When it differs.
pub fn check_download(address: SocketAddr, seed: u64, size: usize) {
    let mut stream = ask_at(address, &format!("source {size} {seed}"));
    let got = Summary::of(&read_all(&mut stream));
    assert_eq!(got, Summary::of(&Pattern::bytes(seed, size)), "download of {size} bytes");
}

/// Has `size` bytes come back while they are being sent, and checks them.
///
/// # Panics
/// When they differ.
pub fn check_echo(address: SocketAddr, seed: u64, size: usize) {
    let mut stream = ask_at(address, "echo");
    let bytes = Pattern::bytes(seed, size);
    let expected = Summary::of(&bytes);
    let mut writer = stream.try_clone().expect("a second handle");
    let sending =
        std::thread::spawn(move || writer.write_all(&bytes).and_then(|()| writer.shutdown(Shutdown::Write)));
    let got = Summary::of(&read_all(&mut stream));
    sending.join().expect("the sender").unwrap_or_else(|error| panic!("echo of {size} bytes: {error}"));
    assert_eq!(got, expected, "echo of {size} bytes");
}

/// Whether something accepts at `address` of this host.
pub fn accepts(address: impl Into<IpAddr>, port: u16) -> bool {
    TcpStream::connect_timeout(&SocketAddr::new(address.into(), port), PATIENCE).is_ok()
}
